"""Events that workers report to the driver, and the channel that carries them."""
