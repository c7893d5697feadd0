"""Measure accuracy on corrupted and perturbed images: ImageNet-C and -P."""
