"""Turns a fake-quant PyTorch denoiser into an ONNX graph of the quantized dialect."""
