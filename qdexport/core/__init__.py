"""Values that every stage shares: formats, recipes, targets, results and files. Needs neither torch nor TensorRT."""
