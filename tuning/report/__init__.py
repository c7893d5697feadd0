"""Tell what a sweep found: table, plots, importances, the winner as a recipe."""
