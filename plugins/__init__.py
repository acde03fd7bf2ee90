"""TensorRT plugins (none needed by the open recipes; see docs)."""
