"""Say what a run will do before it does anything: sizes, memory, time, places."""
