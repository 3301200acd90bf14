"""Semantic segmentation on ADE20K: UperNet over the encoder, through MMSegmentation (Sec. 4, App. D)."""
