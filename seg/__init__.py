"""Semantic segmentation: UperNet over the encoder on ADE20K, through MMSegmentation (Sec. 4, App. D)."""
