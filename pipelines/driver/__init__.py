"""Run a training from the driver: preflight, launch, listen, record."""
