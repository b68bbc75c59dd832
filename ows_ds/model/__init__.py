"""A causal language model: its layers, its shapes, its fingerprint, and how it is loaded."""
