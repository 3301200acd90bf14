"""The fifteen corruptions of ImageNet-C (Hendrycks and Dietterich, 2019), made here.

Names, order and the parameters of the five severities are the published ones, which are for pictures of 224 x 224.
For another size, lengths (radii, shifts, flakes) scale with the shorter side; amounts (noise, contrast, the share of
pixels that pixelate keeps, JPEG quality) stay. What differs from the published programs, so that figures on these
pictures are near those on the real set but not the same:

    glass_blur         pixels take their neighbours' place independently of each other instead of swapping in turn
    motion_blur, snow  the trail's kernel is ours, not ImageMagick's
    frost              drawn ice, for the published one lays photographs of frost over the picture
    fog                clouds summed octave by octave instead of the diamond-square algorithm, of the same decay
    elastic_transform  warp and ripples in one interpolation; the ripples' noise wraps around
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import fft, ndimage

Array = np.ndarray
Rng = np.random.Generator

REFERENCE_SIDE = 224  # pixels of the published pictures
JPEG_QUALITY = 85  # of the published JPEG files
SEVERITIES = range(1, 6)


def apply_corruption(image: Array, name: str, severity: int, rng: Rng) -> Array:
    """`image`: float[h,w,3] in [0,1] -> the same shape and range; `severity` 1 to 5."""
    return np.clip(CORRUPTIONS[name](image, severity - 1, rng), 0.0, 1.0)


def corrupted_jpeg(image: Array, name: str, severity: int, rng: Rng) -> Image.Image:
    """uint8[h,w,3] -> a picture as the published files hold them: corrupted, then written as JPEG and read again."""
    return _jpeg(apply_corruption(image / 255, name, severity, rng), JPEG_QUALITY)


# -------------------- tools


def smooth_noise(rng: Rng, height: int, width: int, cells: int) -> Array:
    """float[h,w]: smooth noise of about `cells` x `cells` bumps, mean 0, standard deviation 1."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return (fine - fine.mean()) / (fine.std() + 1e-9)


def cloud_noise(rng: Rng, height: int, width: int, decay: float) -> Array:
    """float[h,w] in [0,1]: clouds of all sizes, each octave weaker by `decay` squared than the one above."""
    octaves = range(max(1, min(height, width).bit_length()))
    total = sum(smooth_noise(rng, height, width, 2**octave) / decay ** (2 * octave) for octave in octaves)
    return (total - total.min()) / (total.max() - total.min() + 1e-9)


def _unit(image: Array) -> float:
    """Pixels here for one of the published pictures."""
    return min(image.shape[:2]) / REFERENCE_SIDE


def _filter(image: Array, kernel: Array) -> Array:
    """float[h,w,c] convolved with float[k,k], k odd, whose sum becomes 1; edges are mirrored."""
    (height, width), reach = image.shape[:2], len(kernel) // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    shape = [fft.next_fast_len(side, real=True) for side in padded.shape[:2]]
    spectrum = fft.rfft2(padded, shape, axes=(0, 1)) * fft.rfft2(kernel / kernel.sum(), shape)[..., None]
    # what wraps around falls on the first 2 * reach rows and columns
    return fft.irfft2(spectrum, shape, axes=(0, 1))[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def _trail(radius: float, sigma: float, angle: float) -> Array:
    """A kernel that smears to one side along a line of 2 * radius, fading as a Gaussian."""
    reach = max(1, round(2 * radius))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for step in range(reach + 1):
        row, column = round(reach + step * np.sin(angle)), round(reach + step * np.cos(angle))
        kernel[row, column] += np.exp(-(step**2) / (2 * sigma**2))
    return kernel


def _moved(image: Array, rows: Array, columns: Array) -> Array:
    """Every pixel taken from the place (rows, columns), float[h,w] each."""
    channels = [ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, axis=2)


def _bytes(image: Array) -> Image.Image:
    return Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255 + 0.5))


def _jpeg(image: Array, quality: int) -> Image.Image:
    file = io.BytesIO()
    _bytes(image).save(file, "JPEG", quality=quality)
    return Image.open(file)


# -------------------- noise


def gaussian_noise(image: Array, s: int, rng: Rng) -> Array:
    return image + rng.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[s], image.shape)


def shot_noise(image: Array, s: int, rng: Rng) -> Array:
    photons = (60, 25, 12, 5, 3)[s]
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Array, s: int, rng: Rng) -> Array:
    hit = rng.random(image.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    return np.where(hit, rng.integers(0, 2, image.shape), image)


# -------------------- blur


def defocus_blur(image: Array, s: int, rng: Rng) -> Array:
    radius = (3, 4, 6, 8, 10)[s] * _unit(image)
    reach = int(np.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _filter(image, np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1))


def glass_blur(image: Array, s: int, rng: Rng) -> Array:
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    sigma, reach = sigma * _unit(image), reach * _unit(image)
    (height, width), blur = image.shape[:2], (sigma, sigma, 0)
    image = ndimage.gaussian_filter(image, blur)
    rows, columns = np.indices((height, width))
    for _ in range(times):
        # rounded by chance, so that a reach below one pixel moves some pixels
        down, right = np.floor(rng.uniform(-reach, reach, (2, height, width)) + rng.random((2, height, width)))
        image = image[
            np.clip(rows + down, 0, height - 1).astype(int), np.clip(columns + right, 0, width - 1).astype(int)
        ]
    return ndimage.gaussian_filter(image, blur)


def motion_blur(image: Array, s: int, rng: Rng) -> Array:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    unit = _unit(image)
    return _filter(image, _trail(radius * unit, sigma * unit, rng.uniform(-np.pi / 4, np.pi / 4)))


def zoom_blur(image: Array, s: int, rng: Rng) -> Array:
    last, step = ((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03))[s]
    picture, (height, width) = _bytes(image), image.shape[:2]
    zoomed = []
    for factor in np.arange(1, last + step / 2, step):
        x, y = (width - width / factor) / 2, (height - height / factor) / 2
        part = picture.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, width - x, height - y))
        zoomed.append(np.asarray(part) / 255)
    return (image + sum(zoomed)) / (1 + len(zoomed))


# -------------------- weather


def snow(image: Array, s: int, rng: Rng) -> Array:
    mean, zoom, least, radius, sigma, share = (
        (0.1, 3, 0.5, 10, 4, 0.8),
        (0.2, 2, 0.5, 12, 4, 0.7),
        (0.55, 4, 0.9, 12, 8, 0.7),
        (0.55, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 2.5, 0.85, 12, 12, 0.55),
    )[s]
    (height, width), unit = image.shape[:2], _unit(image)
    cell = max(2.0, zoom * unit)  # of single pixels, more would pass the threshold
    small = rng.normal(mean, 0.3, (round(height / cell), round(width / cell))).astype(np.float32)
    flakes = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    flakes = np.where(flakes < least, 0, np.clip(flakes, 0, 1))[..., None]
    flakes = _filter(flakes, _trail(radius * unit, sigma * unit, rng.uniform(np.pi / 4, 3 * np.pi / 4)))
    pale = np.maximum(image, 1.5 * (image @ (0.299, 0.587, 0.114))[..., None] + 0.5)
    return share * image + (1 - share) * pale + flakes + flakes[::-1, ::-1]


def frost(image: Array, s: int, rng: Rng) -> Array:
    through, amount = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    ridges = 1 - np.abs(2 * cloud_noise(rng, *image.shape[:2], 1.4) - 1) ** 0.5
    ice = (0.15 + 0.85 * ridges[..., None]) * (0.85, 0.95, 1.0)
    return through * image + amount * ice


def fog(image: Array, s: int, rng: Rng) -> Array:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[s]
    brightest = image.max()
    return (image + amount * cloud_noise(rng, *image.shape[:2], decay)[..., None]) * brightest / (brightest + amount)


def brightness(image: Array, s: int, rng: Rng) -> Array:
    value = image.max(2, keepdims=True)  # HSV's; hue and saturation stay
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[s], 1)
    return np.where(value > 0, image * raised / np.maximum(value, 1e-9), raised)


# -------------------- digital


def contrast(image: Array, s: int, rng: Rng) -> Array:
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def elastic_transform(image: Array, s: int, rng: Rng) -> Array:
    # published for sides of 244: a random warp that moves three points, then ripples. Two severities of strong warps,
    # then three of ripples
    height, sigma, warp = (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    )[s]
    unit, (rows, columns) = _unit(image), np.indices(image.shape[:2])
    middle, third = np.array(image.shape[:2]) // 2, min(image.shape[:2]) // 3
    points = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    goals = points + rng.uniform(-warp * unit, warp * unit, points.shape)
    matrix = np.linalg.solve(np.c_[points, np.ones(3)], goals)
    places = np.stack([rows, columns, np.ones_like(rows)], axis=2) @ matrix
    for axis in range(2):
        noise = rng.uniform(-1, 1, rows.shape)
        ripples = fft.ifft2(ndimage.fourier_gaussian(fft.fft2(noise), sigma * unit)).real
        # blurred over `unit` times as many pixels, noise keeps 1 / unit times as much
        places[..., axis] += height * unit**2 * ripples
    return _moved(image, places[..., 0], places[..., 1])


def pixelate(image: Array, s: int, rng: Rng) -> Array:
    height, width = image.shape[:2]
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s]
    small = _bytes(image).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(image: Array, s: int, rng: Rng) -> Array:
    return np.asarray(_jpeg(image, (25, 18, 15, 10, 7)[s])) / 255


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
