"""Turn encoded images into model inputs: sample, decode, augment, normalise."""
