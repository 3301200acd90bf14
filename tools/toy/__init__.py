"""Toy datasets of handwritten digits in the formats of ImageNet, COCO and ADE20K, for `addp toy`."""
