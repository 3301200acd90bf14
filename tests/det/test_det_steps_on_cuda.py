"""A detector's training step on a CUDA device that computes nothing: no tensor is on the wrong device, and our parts
make the host wait for none of them. torchvision's do: it looks for degenerate boxes, and how many proposals there are.
"""

import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from fake_cuda import fake_cuda, on_fake_cuda
from tiny_detectors import VITDET, sample_with_boxes, tiny_detector, tiny_encoder

from addp_core.training.stage import MicroStep
from det.augment import collate
from det.coco import CocoDataset
from det.pyramid import FeaturePyramid
from det.stage import DetStage

TORCHVISION = str(Path(torchvision.__file__).parent)


def batch_on_cuda():
    """Two images with two objects and one."""
    samples = [sample_with_boxes((2, 2, 10, 12), (4, 4, 20, 20)), sample_with_boxes((1, 1, 9, 9))]
    batch = collate(samples, torch.full((2,), -1), torch.arange(2), [])
    names = ("images", "boxes", "labels", "masks", "indices")
    return replace(batch, **{name: getattr(batch, name).to("cuda", non_blocking=True) for name in names})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_pyramid_of_an_encoder_in_windows(checkpointing):
    pyramid = FeaturePyramid(tiny_encoder(VITDET), 16, (2.0, 1.0))
    pyramid.net.checkpointing = checkpointing
    with fake_cuda():
        maps = on_fake_cuda(pyramid).train()(torch.rand(2, 3, 32, 40).to("cuda", non_blocking=True))
        assert {value.device.type for value in maps.values()} == {"cuda"}


def test_the_heads_of_the_proposals():
    model = tiny_detector()
    with fake_cuda():
        images = torch.rand(2, 3, 32, 32).to("cuda", non_blocking=True)
        maps = list(on_fake_cuda(model).train().backbone(images).values())
        assert {value.device.type for part in model.rpn.head(maps) for value in part} == {"cuda"}


def test_the_first_wait_of_a_step_is_torchvisions():
    images = CocoDataset.__new__(CocoDataset)  # no step reads one
    images.masks = True
    stage = DetStage(tiny_detector(), val=images)
    with fake_cuda():
        model = on_fake_cuda(stage.model).train()
        with pytest.raises(Exception, match=r"blocking copy|nonzero|_local_scalar_dense") as caught:
            stage.loss(model, batch_on_cuda(), MicroStep(0, 0, 0, 0, 1, 2, slice(0, 2)))
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    last = next(name for name in reversed(files) if "/torch/" not in name and not name.endswith("fake_cuda.py"))
    assert last.startswith(TORCHVISION), last
