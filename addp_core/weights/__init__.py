"""Reading and writing weights: our files, foreign layouts, and the pretrained encoders of transfers."""
