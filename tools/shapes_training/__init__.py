"""Trains the bundled shapes models from nothing: the stages behind tools/train_shapes.py."""
