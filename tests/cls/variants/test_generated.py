"""ImageNet-C generated from clean images."""

import numpy as np
import pytest
from PIL import Image

from addp_core.data.sources import open_source
from cls.variants.generated import CorruptedImages
from tools.toy import toy


def test_the_corruption_depends_only_on_seed_and_index(tmp_path):
    toy.run(toy.Recipe(str(tmp_path), only=["imagenet"], size=32, imagenet_train=10, imagenet_val=20))
    source = open_source(str(tmp_path / "imagenet"), "val")

    def pixels(index: int, seed: int = 0, severity: int = 3, hw: tuple[int, int] = (24, 24)) -> np.ndarray:
        images = CorruptedImages(source, hw, "gaussian_noise", severity, seed)
        return np.asarray(images.open_image(index)[0].decode()).astype(int)

    assert (pixels(5) == pixels(5)).all()
    different = [pixels(5, seed=1), pixels(6), pixels(5, severity=4)]
    assert all(np.abs(pixels(5) - other).mean() > 5 for other in different)
    assert pixels(0, hw=(448, 672)).shape == (224, 336, 3)  # the resolution of ImageNet-C, whatever the model input


@pytest.mark.parametrize("side", [224, 384])
def test_generated_images_are_cropped_as_in_imagenet_c(side, tmp_path):
    """Resized to 256 and cropped to 224, which removes the frame, even if the model's own crop would keep it."""
    framed = Image.new("RGB", (200, 200), "red")
    framed.paste("teal", (8, 8, 192, 192))
    (tmp_path / "0").mkdir()
    framed.save(tmp_path / "0" / "0.png")
    image = CorruptedImages(open_source(str(tmp_path)), (side, side), "brightness", 1, 0).open_image(0)[0]
    pixels = np.asarray(image.decode()).astype(int)
    assert pixels.shape == (224, 224, 3)
    assert np.abs(pixels - pixels[0, 0]).max() < 10
