"""Estimate what runs out first at 8, 64 and 512 GPUs, from rates measured here."""
