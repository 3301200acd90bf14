"""The training loop, run folders and checkpoints, and the switches of computation that all tasks share."""
