"""What the trainers of timm, mmengine and detectron2 write is read, with what it says about its model."""

import argparse
import types

import pytest
import torch
from torch import nn

from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.weights.files import read_file


def encoder(seed=0, heads=4, **options):
    """A ViT of a width that tells nothing about its heads, far enough from its start for them to matter."""
    torch.manual_seed(seed)
    model = Encoder(EncoderConfig(32, 2, heads, **options), (32, 32), 8).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


# -------------------- unpickling


def test_options_of_a_training_are_read_with_their_values(tmp_path):
    for options in (argparse.Namespace(model="vit", size=64), types.SimpleNamespace(model="vit", size=64)):
        torch.save({"state_dict": {"x": torch.zeros(1)}, "args": options}, tmp_path / "last.pth.tar")
        content = read_file(tmp_path / "last.pth.tar")
        assert vars(content.metadata["args"]) == {"model": "vit", "size": 64}
        assert list(content.state) == ["x"]


class Attribute:
    """Pickles as `getattr(module, name)`, which must not be looked up."""

    def __reduce__(self):
        return getattr, (argparse.Namespace, "__init__")


def test_a_pickled_attribute_is_not_looked_up(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}, "extra": Attribute()}, tmp_path / "f.pth")
    assert not callable(read_file(tmp_path / "f.pth").metadata["extra"])


@pytest.fixture(scope="module")
def runner_file(tmp_path_factory):
    """A checkpoint of mmengine's Runner with its histories, numbers of numpy, scheduler, EMA and classes."""
    runner = pytest.importorskip("mmengine.runner", reason="needs mmengine: pip install 'addp[seg]'")
    from mmengine.model import BaseModel

    class Segmentor(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.encoder = encoder()
            self.decode_head = nn.Linear(32, 2)

        def forward(self, images, mode="loss"):
            return {"loss": self.decode_head(self.backbone.encoder.forward_features(torch.stack(images))).mean()}

    class Images(torch.utils.data.Dataset):
        metainfo = {"classes": ("ground", "digit"), "palette": [[0, 0, 0], [200, 30, 30]]}

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"images": torch.full((3, 32, 32), index / 4)}

    folder = tmp_path_factory.mktemp("runner")
    loader = {"batch_size": 2, "dataset": Images(), "sampler": {"type": "InfiniteSampler"}, "num_workers": 0}
    runner.Runner(
        Segmentor(),
        str(folder),
        train_dataloader=loader,
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": 2},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}},
        param_scheduler=[{"type": "LinearLR", "by_epoch": False}],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 2, "by_epoch": False}},
        custom_hooks=[{"type": "EMAHook"}],
        experiment_name="trainers",
    ).train()
    return folder / "iter_2.pth"


def test_a_runners_checkpoint_is_read_with_its_meta(runner_file):
    content = read_file(runner_file)
    assert "backbone.encoder.cls_token" in content.state
    assert content.metadata["meta"]["dataset_meta"]["classes"] == ("ground", "digit")
    assert "optimizer" not in content.metadata
