"""The method section of the paper: the diffusion process, ADDP and its training loss, and the sampler."""
