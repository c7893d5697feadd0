"""Weights from files: the papers' released ones, under our tensors' names."""
