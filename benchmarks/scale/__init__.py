"""What runs out first at 8, 64 and 512 GPUs: rates measured here, set against needs."""
