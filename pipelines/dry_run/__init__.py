"""Report what a run will do before it starts: sizes, memory, time, paths."""
