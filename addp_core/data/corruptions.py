"""The fifteen corruptions of ImageNet-C (Hendrycks and Dietterich, 2019), reimplemented.

Names, order and the parameters of the five severities are the published ones, which are for images of 224 x 224 pixels.
For other sizes, lengths (radii, shifts, snowflakes) scale with the shorter side; amounts (noise, contrast, the fraction
of pixels that pixelate keeps, JPEG quality) do not. Metrics on these images are close to those on the published set but
not equal, because of these differences from the published programs:

    glass_blur         pixels take the value of a neighbor independently of each other instead of swapping in turn
    motion_blur, snow  the motion kernel is ours, not ImageMagick's
    frost              the ice is synthetic; the published program overlays photographs of frost
    fog                clouds are a sum of octaves instead of the diamond-square algorithm, with the same decay
    elastic_transform  warp and ripples are one interpolation; the noise of the ripples wraps around
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import fft, ndimage

Array = np.ndarray
Rng = np.random.Generator

REFERENCE_SIDE = 224  # pixels per side of the published images
JPEG_QUALITY = 85  # of the published files
SEVERITIES = range(1, 6)
VERSION = 2  # to be raised when the pixels of a corruption change; 1 had one zoom less in the first zoom_blur


def apply_corruption(image: Array, name: str, severity: int, rng: Rng) -> Array:
    """Corrupt an image, float[h,w,3] in [0,1] -> float[h,w,3] in [0,1], with a severity of 1 to 5."""
    return np.clip(CORRUPTIONS[name](image, severity - 1, rng), 0.0, 1.0)


def corrupted_jpeg(image: Array, name: str, severity: int, rng: Rng) -> Image.Image:
    """Corrupt an image, uint8[h,w,3], and compress it as the published files are: written as JPEG and read again."""
    return _jpeg_compressed(apply_corruption(image / 255, name, severity, rng), JPEG_QUALITY)


# -------------------- building blocks


def smooth_noise(rng: Rng, height: int, width: int, cells: int) -> Array:
    """Return float[h,w]: noise with about `cells` x `cells` bumps, mean 0 and standard deviation 1."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return (fine - fine.mean()) / (fine.std() + 1e-9)


def cloud_noise(rng: Rng, height: int, width: int, decay: float) -> Array:
    """Return float[h,w] in [0,1]: noise of all sizes, each octave weaker than the previous one by `decay` squared."""
    total = np.zeros((height, width))
    for octave in range(max(1, min(height, width).bit_length())):
        total = total + smooth_noise(rng, height, width, 2**octave) / decay ** (2 * octave)
    return (total - total.min()) / (total.max() - total.min() + 1e-9)


def _scale(image: Array) -> float:
    """Return the image's shorter side relative to that of the published images."""
    return min(image.shape[:2]) / REFERENCE_SIDE


def _convolve(image: Array, kernel: Array) -> Array:
    """Convolve float[h,w,c] with the kernel float[k,k], k odd, normalized to a sum of 1; edges are mirrored."""
    (height, width), reach = image.shape[:2], len(kernel) // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    shape = [fft.next_fast_len(side, real=True) for side in padded.shape[:2]]
    spectrum = fft.rfft2(padded, shape, axes=(0, 1)) * fft.rfft2(kernel / kernel.sum(), shape)[..., None]
    # Wrap-around falls on the first 2 * reach rows and columns.
    return fft.irfft2(spectrum, shape, axes=(0, 1))[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def _motion_kernel(radius: float, sigma: float, angle: float) -> Array:
    """Return a kernel that smears to one side along a line of length 2 * radius, with Gaussian weights."""
    reach = max(1, round(2 * radius))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for step in range(reach + 1):
        row, column = round(reach + step * np.sin(angle)), round(reach + step * np.cos(angle))
        kernel[row, column] += np.exp(-(step**2) / (2 * sigma**2))
    return kernel


def _sample_at(image: Array, rows: Array, columns: Array) -> Array:
    """Interpolate the image at these positions, float[h,w] each, one for every output pixel."""
    channels = [ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, axis=2)


def _to_pil(image: Array) -> Image.Image:
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))


def _jpeg_compressed(image: Array, quality: int) -> Image.Image:
    file = io.BytesIO()
    _to_pil(image).save(file, "JPEG", quality=quality)
    return Image.open(file)


# -------------------- noise; `level` is the severity minus 1


def gaussian_noise(image: Array, level: int, rng: Rng) -> Array:
    return image + rng.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[level], image.shape)


def shot_noise(image: Array, level: int, rng: Rng) -> Array:
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Array, level: int, rng: Rng) -> Array:
    hit = rng.random(image.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return np.where(hit, rng.integers(0, 2, image.shape), image)


# -------------------- blur


def defocus_blur(image: Array, level: int, rng: Rng) -> Array:
    radius = (3, 4, 6, 8, 10)[level] * _scale(image)
    reach = int(np.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _convolve(image, np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1))


def glass_blur(image: Array, level: int, rng: Rng) -> Array:
    published_sigma, published_reach, iterations = (
        (0.7, 1, 2),
        (0.9, 2, 1),
        (1, 2, 3),
        (1.1, 3, 2),
        (1.5, 4, 2),
    )[level]
    sigma, reach = published_sigma * _scale(image), published_reach * _scale(image)
    (height, width), blur = image.shape[:2], (sigma, sigma, 0)
    image = ndimage.gaussian_filter(image, blur)
    rows, columns = np.indices((height, width))
    for _ in range(iterations):
        # Rounded randomly, so that a reach below one pixel moves some pixels.
        down, right = np.floor(rng.uniform(-reach, reach, (2, height, width)) + rng.random((2, height, width)))
        image = image[
            np.clip(rows + down, 0, height - 1).astype(int), np.clip(columns + right, 0, width - 1).astype(int)
        ]
    return ndimage.gaussian_filter(image, blur)


def motion_blur(image: Array, level: int, rng: Rng) -> Array:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    scale = _scale(image)
    return _convolve(image, _motion_kernel(radius * scale, sigma * scale, rng.uniform(-np.pi / 4, np.pi / 4)))


def zoom_blur(image: Array, level: int, rng: Rng) -> Array:
    # The published end and step. The first severity has 1.11 too, because of rounding: 12 zooms.
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    pil_image, (height, width) = _to_pil(image), image.shape[:2]
    zoomed = []
    for factor in np.arange(1, end, step):
        x, y = (width - width / factor) / 2, (height - height / factor) / 2
        part = pil_image.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, width - x, height - y))
        zoomed.append(np.asarray(part) / 255)
    return (image + sum(zoomed)) / (1 + len(zoomed))


# -------------------- weather


def snow(image: Array, level: int, rng: Rng) -> Array:
    mean, zoom, threshold, radius, sigma, image_weight = (
        (0.1, 3, 0.5, 10, 4, 0.8),
        (0.2, 2, 0.5, 12, 4, 0.7),
        (0.55, 4, 0.9, 12, 8, 0.7),
        (0.55, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    (height, width), scale = image.shape[:2], _scale(image)
    cell = max(2.0, zoom * scale)  # with cells of one pixel, more of them would exceed the threshold
    coarse = rng.normal(mean, 0.3, (round(height / cell), round(width / cell))).astype(np.float32)
    flakes = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))[..., None]
    flakes = _convolve(flakes, _motion_kernel(radius * scale, sigma * scale, rng.uniform(np.pi / 4, 3 * np.pi / 4)))
    pale = np.maximum(image, 1.5 * (image @ (0.299, 0.587, 0.114))[..., None] + 0.5)
    return image_weight * image + (1 - image_weight) * pale + flakes + flakes[::-1, ::-1]


def frost(image: Array, level: int, rng: Rng) -> Array:
    image_weight, amount = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    height, width = image.shape[:2]
    ridges = 1 - np.abs(2 * cloud_noise(rng, height, width, 1.4) - 1) ** 0.5
    ice = (0.15 + 0.85 * ridges[..., None]) * (0.85, 0.95, 1.0)
    return image_weight * image + amount * ice


def fog(image: Array, level: int, rng: Rng) -> Array:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    (height, width), brightest = image.shape[:2], image.max()
    clouds = cloud_noise(rng, height, width, decay)[..., None]
    return (image + amount * clouds) * brightest / (brightest + amount)


def brightness(image: Array, level: int, rng: Rng) -> Array:
    value = image.max(2, keepdims=True)  # of HSV, whose hue and saturation do not change
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.where(value > 0, image * raised / np.maximum(value, 1e-9), raised)


# -------------------- digital


def contrast(image: Array, level: int, rng: Rng) -> Array:
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def elastic_transform(image: Array, level: int, rng: Rng) -> Array:
    # Published for sides of 244 pixels: a random warp that moves three points, then ripples. The first two severities
    # are strong warps, the other three ripples.
    amplitude, sigma, warp = (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    )[level]
    scale, (rows, columns) = _scale(image), np.indices(image.shape[:2])
    center, third = np.array(image.shape[:2]) // 2, min(image.shape[:2]) // 3
    points = center + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved_points = points + rng.uniform(-warp * scale, warp * scale, points.shape)
    matrix = np.linalg.solve(np.c_[points, np.ones(3)], moved_points)
    positions = np.stack([rows, columns, np.ones_like(rows)], axis=2) @ matrix
    for axis in range(2):
        noise = rng.uniform(-1, 1, rows.shape)
        ripples = fft.ifft2(ndimage.fourier_gaussian(fft.fft2(noise), sigma * scale)).real
        # Blurring noise over `scale` times as many pixels per side divides it by `scale`.
        positions[..., axis] += amplitude * scale**2 * ripples
    return _sample_at(image, positions[..., 0], positions[..., 1])


def pixelate(image: Array, level: int, rng: Rng) -> Array:
    height, width = image.shape[:2]
    fraction = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    small_size = max(1, int(width * fraction)), max(1, int(height * fraction))
    small = _to_pil(image).resize(small_size, Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(image: Array, level: int, rng: Rng) -> Array:
    return np.asarray(_jpeg_compressed(image, (25, 18, 15, 10, 7)[level])) / 255


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
