"""Typed reads, edits, execution and verification of ONNX graphs (onnx_ir and numpy only)."""
