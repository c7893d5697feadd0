"""Pack what a bare GPU machine lacks: `python -m benchmarks.gpu_pack`."""
