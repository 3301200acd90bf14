"""The ADDP paper, whose numbers the report shows beside measured ones. Each benchmark has its own: `published`."""

SOURCE = "ADDP paper, arXiv 2306.05423 (ICLR 2024)"
ENCODER_PARAMETERS = {"ADDP ViT-B": 86e6, "ADDP ViT-L": 304e6}  # of the models in the report's first table
