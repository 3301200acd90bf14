"""Layouts of weights: the published models, plain ViTs, and ours without its architecture."""
