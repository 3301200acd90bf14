"""Drawing detections on images."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from tiny_detectors import CATEGORIES

from addp_core.base.fonts import find_font
from det.config import Category
from det.drawing import draw_detections
from det.model import Detections


def test_the_highest_scoring_detections_are_drawn():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 20, 38, 38], [2, 2, 10, 10]])
    empty = coco_mask.encode(np.zeros((40, 40), dtype=np.uint8, order="F"))
    detections = Detections(boxes, torch.tensor([0.6, 0.3]), torch.tensor([0, 1]), [empty, empty])
    first_alone = draw_detections(image, detections, CATEGORIES, min_score=0.1, max_objects=1)
    assert not first_alone[:, 2:11, 2:11].any()
    assert first_alone[:, 20:39, 20:39].any()
    assert torch.equal(first_alone, draw_detections(image, detections, CATEGORIES))  # the default minimum is 0.5
    assert draw_detections(image, detections, CATEGORIES, min_score=0.1)[:, 2:11, 2:11].any()


@pytest.mark.parametrize(("first", "second"), [("żaba", "łaba"), ("кот", "кит")])
def test_names_beyond_ascii_are_drawn_with_a_font_that_has_their_letters(first, second):
    """A font without the letters draws the same box for each of them."""
    image, boxes = torch.zeros(3, 40, 120, dtype=torch.uint8), torch.tensor([[2.0, 2, 118, 38]])
    detections = Detections(boxes, torch.tensor([0.9]), torch.tensor([0]), None)
    drawn = [draw_detections(image, detections, (Category(1, name),)) for name in (first, second)]
    assert not torch.equal(*drawn)


def test_letters_that_no_font_has_are_named(caplog):
    assert find_font("a") is None
    assert find_font("\U000f0000a")  # a character for private use
    assert "no installed font has all characters of these names; drawn as boxes" in caplog.text


def test_boxes_are_drawn_without_masks():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    detections = Detections(torch.tensor([[2.0, 12, 30, 38]]), torch.tensor([0.9]), torch.tensor([1]), None)
    drawn = draw_detections(image, detections, CATEGORIES)
    assert drawn.any()
    assert not drawn[:, 30:36, 6:28].any()  # inside of the box
