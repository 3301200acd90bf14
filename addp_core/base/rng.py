"""Stateless randomness: every random number is a function of a seed and of what the number is used for.

Nothing depends on how many numbers were drawn before. A resumed run therefore repeats the numbers of an uninterrupted
one, and the number of workers, processes or images per batch does not change how an image is augmented.
"""

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """Return a 63-bit seed for these parts, such as (0, "mask", step); it is the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `seed_for(*parts)`."""
    return torch.Generator().manual_seed(seed_for(*parts))
