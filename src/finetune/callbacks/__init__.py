"""What Lightning does not already have: whole checkpoints, clean stops, honest rates, pictures."""
