"""Modules that make a network: So-ViT, and second-order heads on trunks of timm."""
