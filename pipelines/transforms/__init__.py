"""Turn encoded images into what a model sees: draw, decode, augment, normalise."""
