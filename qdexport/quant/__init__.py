"""Quantizers, observers, calibration and quantized checkpoints, in PyTorch."""
