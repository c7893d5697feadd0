"""Say what runs out first when a training grows: `python -m benchmarks.scale`."""
