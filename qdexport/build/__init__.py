"""Compiles ONNX files to engines in a child process and reads the kernel plan."""
