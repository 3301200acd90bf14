"""Robustness of a classifier on variants of ImageNet: ImageNet-A, -R, -Sketch and -C, and generated corruptions."""
