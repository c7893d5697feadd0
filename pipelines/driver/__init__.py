"""The driver of a training: preflight, launch, listening, recording."""
