"""A segmentor's training step on a CUDA device that computes nothing: no tensor is on the wrong device, and the host
waits for none of them, until mmseg's heads look for pixels without a class to leave them out of their accuracy.
"""

import traceback

import pytest
import torch
from fake_cuda import fake_cuda, on_fake_cuda
from toy_segmentation import TINY_CONFIG

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from seg.cost import Recipe, read_segmentor
from seg.launch import build_model
from seg.mmseg_config import fill_model

CROP = 32


@pytest.fixture
def model():
    cfg, segmentor = read_segmentor(Recipe(config=TINY_CONFIG.removeprefix("config="), crop=CROP))
    fill_model(cfg, segmentor)
    return build_model(cfg)


def test_the_maps_of_encoder_pyramid_and_heads(model):
    with fake_cuda():
        features = on_fake_cuda(model).train().extract_feat(torch.rand(2, 3, CROP, CROP).to("cuda", non_blocking=True))
        logits = model.decode_head(features), model.auxiliary_head(features)
        assert {value.device.type for value in (*features, *logits)} == {"cuda"}


def test_the_first_wait_of_a_step_is_mmsegs(model):
    with fake_cuda():
        on_fake_cuda(model).train()
        images, labels = torch.rand(2, 3, CROP, CROP), torch.zeros(1, CROP, CROP, dtype=torch.long)
        samples = [SegDataSample(metainfo={"img_shape": (CROP, CROP)}) for _ in images]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=labels.to("cuda", non_blocking=True))
        with pytest.raises(Exception, match="nonzero") as caught:
            model.loss(images.to("cuda", non_blocking=True), samples)
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert any(name.endswith("mmseg/models/losses/accuracy.py") for name in files)
