"""Writes legal ONNX files and reads back what is in them."""
