"""Parse options, print help, and end commands with one line for an error."""
