"""Save and load checkpoints, pretrained weights, and the record of a run."""
