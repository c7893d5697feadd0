"""Compute a backbone's tokens once, and train heads on them."""
