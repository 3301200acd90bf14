"""Generation: sampling, inpainting, the paper's figures, a local web page, and metrics of generated images."""
