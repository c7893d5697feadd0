"""A worker process: its process group, job, checkpoints and watchdog."""
