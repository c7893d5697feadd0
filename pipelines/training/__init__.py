"""One training step: model, optimizer, mixup, NaN guard, metrics."""
