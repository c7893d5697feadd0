"""Do second-order heads help on photographs? Trainings by plan, and a page of them."""
