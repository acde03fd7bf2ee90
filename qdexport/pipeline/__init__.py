"""The stages of a compilation, in order: quantize, export, build, validate, report."""
