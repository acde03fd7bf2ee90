"""Reads diffusers models, and knows how to call and sample them."""
