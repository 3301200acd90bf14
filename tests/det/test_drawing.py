"""Drawing detections on images."""

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tiny_detectors import CATEGORIES

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
