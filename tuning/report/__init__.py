"""Report of a sweep: table, plots, importances, the winner as a recipe."""
