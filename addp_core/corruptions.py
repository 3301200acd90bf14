"""The fifteen corruptions of ImageNet-C (Hendrycks and Dietterich, 2019), written small, for the toy sets.

The names, their order and the five severities are those of the real set. The strengths are chosen by eye for small
pictures and scale with the picture's size: results on them are not comparable with published ones.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

Array = np.ndarray
Rng = np.random.Generator


def corrupt(image: Array, name: str, severity: int, rng: Rng) -> Array:
    """`image`: float[h,w,3] in [0,1] -> the same shape and range; `severity` 1 to 5."""
    return np.clip(CORRUPTIONS[name](image, severity - 1, rng), 0.0, 1.0)


def clouds(rng: Rng, height: int, width: int, cells: int) -> Array:
    """float[h,w]: smooth noise of about `cells` x `cells` bumps, mean 0, standard deviation 1."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return (fine - fine.mean()) / (fine.std() + 1e-9)


def plasma(rng: Rng, height: int, width: int) -> Array:
    """float[h,w] in [0,1]: clouds of all sizes, the large ones strongest."""
    total = sum(clouds(rng, height, width, 2**octave) / 2**octave for octave in range(1, 5))
    return (total - total.min()) / (total.max() - total.min() + 1e-9)


def _scale(image: Array) -> float:
    return min(image.shape[:2]) / 64


def _filter(image: Array, kernel: Array) -> Array:
    kernel = kernel / kernel.sum()
    return np.stack([ndimage.convolve(image[..., c], kernel, mode="nearest") for c in range(image.shape[2])], axis=2)


def _line(length: float, angle: float) -> Array:
    """A kernel that smears along a line."""
    half = max(1, round(length / 2))
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    for step in np.linspace(-half, half, 4 * half + 1):
        kernel[round(half + step * np.sin(angle)), round(half + step * np.cos(angle))] = 1
    return kernel


def _moved(image: Array, down: Array, right: Array) -> Array:
    """Every pixel taken from `down`, `right` pixels away."""
    rows, columns = np.indices(image.shape[:2])
    at = [rows + down, columns + right]
    return np.stack([ndimage.map_coordinates(image[..., c], at, order=1, mode="reflect") for c in range(3)], axis=2)


def gaussian_noise(image: Array, s: int, rng: Rng) -> Array:
    return image + rng.normal(0, (0.05, 0.08, 0.12, 0.17, 0.23)[s], image.shape)


def shot_noise(image: Array, s: int, rng: Rng) -> Array:
    photons = (150, 70, 35, 18, 10)[s]
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Array, s: int, rng: Rng) -> Array:
    hit = rng.random(image.shape) < (0.02, 0.04, 0.08, 0.13, 0.2)[s]
    return np.where(hit, rng.integers(0, 2, image.shape), image)


def defocus_blur(image: Array, s: int, rng: Rng) -> Array:
    radius = (0.9, 1.3, 1.8, 2.4, 3.1)[s] * _scale(image)
    reach = int(np.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _filter(image, np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1))


def glass_blur(image: Array, s: int, rng: Rng) -> Array:
    reach = (0.7, 1.0, 1.4, 1.9, 2.5)[s] * _scale(image)
    shifts = rng.uniform(-reach, reach, (2, *image.shape[:2]))
    return ndimage.gaussian_filter(_moved(image, *shifts), (0.4, 0.4, 0))


def motion_blur(image: Array, s: int, rng: Rng) -> Array:
    return _filter(image, _line((3, 5, 7, 10, 13)[s] * _scale(image), rng.uniform(-np.pi / 4, np.pi / 4)))


def zoom_blur(image: Array, s: int, rng: Rng) -> Array:
    height, width = image.shape[:2]
    rows, columns = np.indices((height, width))
    down, right = rows - (height - 1) / 2, columns - (width - 1) / 2
    factors = np.linspace(1, (1.1, 1.17, 1.25, 1.35, 1.48)[s], 8)
    return sum(_moved(image, down / f - down, right / f - right) for f in factors) / len(factors)


def snow(image: Array, s: int, rng: Rng) -> Array:
    flakes = (rng.random(image.shape[:2]) < (0.01, 0.02, 0.03, 0.045, 0.06)[s]).astype(float)[..., None]
    streaks = _filter(flakes, _line(5 * _scale(image), rng.uniform(np.pi / 4, 3 * np.pi / 4)))
    pale = (0.05, 0.1, 0.15, 0.2, 0.25)[s]
    grey = image.mean(2, keepdims=True)
    return (1 - pale) * image + pale * np.maximum(image, 0.5 + 0.5 * grey) + 4 * streaks


def frost(image: Array, s: int, rng: Rng) -> Array:
    ridges = 1 - np.abs(2 * plasma(rng, *image.shape[:2]) - 1) ** 0.5
    ice = (0.35 + 0.65 * ridges[..., None]) * (0.85, 0.95, 1.0)
    amount = (0.3, 0.4, 0.5, 0.57, 0.64)[s]
    return (1 - 0.6 * amount) * image + amount * ice * ridges[..., None]


def fog(image: Array, s: int, rng: Rng) -> Array:
    amount = (0.6, 0.9, 1.3, 1.7, 2.2)[s]
    return (image + amount * plasma(rng, *image.shape[:2])[..., None]) / (1 + amount)


def brightness(image: Array, s: int, rng: Rng) -> Array:
    return image + (0.1, 0.2, 0.3, 0.4, 0.5)[s]


def contrast(image: Array, s: int, rng: Rng) -> Array:
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * (0.6, 0.45, 0.3, 0.2, 0.12)[s] + mean


def elastic_transform(image: Array, s: int, rng: Rng) -> Array:
    reach = (0.8, 1.2, 1.6, 2.1, 2.7)[s] * _scale(image)
    return _moved(image, *(reach * clouds(rng, *image.shape[:2], 6) for _ in range(2)))


def _resized(image: Array, size: tuple[int, int], method: Image.Resampling) -> Array:
    picture = Image.fromarray((image * 255).astype(np.uint8)).resize(size, method)
    return np.asarray(picture) / 255


def pixelate(image: Array, s: int, rng: Rng) -> Array:
    height, width = image.shape[:2]
    share = (0.6, 0.48, 0.38, 0.3, 0.23)[s]
    small = _resized(image, (max(1, round(width * share)), max(1, round(height * share))), Image.Resampling.BOX)
    return _resized(small, (width, height), Image.Resampling.NEAREST)


def jpeg_compression(image: Array, s: int, rng: Rng) -> Array:
    file = io.BytesIO()
    Image.fromarray((image * 255).astype(np.uint8)).save(file, "JPEG", quality=(25, 16, 11, 7, 4)[s])
    return np.asarray(Image.open(file)) / 255


CORRUPTIONS: dict[str, Callable[[Array, int, Rng], Array]] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
