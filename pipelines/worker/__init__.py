"""A worker process: training loop, process group, checkpoints, watchdog."""
