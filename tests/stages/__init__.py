"""Stages for `tests/test_on_gpu.py` that end badly in different ways."""
