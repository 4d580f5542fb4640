"""functrain: training as a composition of pure functions."""
