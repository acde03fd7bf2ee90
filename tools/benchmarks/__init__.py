"""What the benchmark tools share: processes that are measured, and the models that are measured on."""
