"""One training step and its loop: model, optimizer, mixup, metrics."""
