"""CPU and GPU: the device API, and what a host computes on."""
