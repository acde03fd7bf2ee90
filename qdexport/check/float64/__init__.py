"""File and fake-quant model executed in float64, where nothing is rounded but codes, and compared."""
