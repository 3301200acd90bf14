"""Reading class maps."""

import numpy as np
import pytest
from PIL import Image
from toy_segmentation import CLASSES

from addp_core.base.errors import UserError
from seg.scenes import read_class_map


def test_a_class_map_must_have_the_size_of_its_image(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "map.png")
    with pytest.raises(UserError, match="found 4 x 4 pixels"):
        read_class_map(tmp_path / "map.png", (4, 5), CLASSES)
