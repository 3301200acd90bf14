"""Stateless randomness: every random number of the suite is a function of a seed and of what it is for.

Nothing depends on how many numbers were drawn before. That is why a continued run repeats the numbers of one that never
stopped, and why the number of workers, processes or images a batch does not change what an image looks like.
"""

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed for these parts, for example `seed_for(0, "mask", step)`; stable across machines and versions."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_for(*parts)`."""
    return torch.Generator().manual_seed(seed_for(*parts))
