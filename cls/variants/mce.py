"""The mean corruption error (mCE) of ImageNet-C (Hendrycks and Dietterich, 2019)."""

from collections.abc import Mapping

import numpy as np

ALEXNET_ERRORS = {  # AlexNet's errors, averaged over the severities, by which mCE divides
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def corruption_errors(errors: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    """Top-1 errors in [0,1] by corruption and severity -> for each corruption its mean `error` and `ce`, in percent.

    `ce` is the mean error divided by AlexNet's; mCE is the mean of `ce` over the fifteen corruptions.
    """
    means = {name: float(np.mean(list(by_severity.values()))) for name, by_severity in errors.items()}
    return {name: {"error": 100 * mean, "ce": 100 * mean / ALEXNET_ERRORS[name]} for name, mean in means.items()}
