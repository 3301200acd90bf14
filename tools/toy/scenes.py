"""What the scenes of the toy COCO and ADE20K share: their size, and where the digits go."""

from collections.abc import Iterator, Sequence

import numpy as np

from tools.toy.recipe import Recipe

MAX_OVERLAP = 0.3  # of a digit's square with any square placed before it, as a share of its area
PLACEMENT_TRIES = 30


def scene_size(rng: np.random.Generator, recipe: Recipe) -> tuple[int, int]:
    """Return (height, width): landscape or portrait, in COCO's proportions."""
    short, long = recipe.scene, round(recipe.scene * rng.choice((1.0, 4 / 3, 1.5)))
    return (short, long) if rng.random() < 0.7 else (long, short)


def place_squares(
    rng: np.random.Generator, height: int, width: int, sizes: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Yield (top, left, size) for each size for which a place is found that covers little of the earlier squares."""
    placed: list[tuple[int, int, int]] = []
    for size in sizes:
        for _ in range(PLACEMENT_TRIES):
            top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
            overlaps = (
                max(0, min(top + size, y + other) - max(top, y)) * max(0, min(left + size, x + other) - max(left, x))
                for y, x, other in placed
            )
            if max(overlaps, default=0) < MAX_OVERLAP * size**2:
                placed.append((top, left, size))
                yield top, left, size
                break
