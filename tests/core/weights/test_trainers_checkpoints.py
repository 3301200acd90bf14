"""What the trainers of timm, mmengine and detectron2 write is read, with what it says about its model."""

import argparse
import types

import pytest
import torch
from checks import assert_user_error
from torch import nn

from addp_core import load_encoder
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.weights.files import read_file


def encoder(seed=0, heads=4, tokenizer_norm=False, **options):
    """A ViT of a width that tells nothing about its heads, far enough from its start for them to matter."""
    torch.manual_seed(seed)
    config = EncoderConfig(32, 2, heads, tokenizer_norm=tokenizer_norm, input_dropout=0.0, pre_norm=tokenizer_norm)
    model = Encoder(config, (32, 32), 8, **options).eval()
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
        def __init__(self):
            self.metainfo = {"classes": ("ground", "digit"), "palette": [[0, 0, 0], [200, 30, 30]]}

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


# -------------------- mmengine and detectron2


def trained(path, wanted="state_dict"):
    """The encoder among a runner's tensors."""
    model, prefix = encoder(), "module.backbone.encoder." if wanted == "ema_state_dict" else "backbone.encoder."
    tensors = torch.load(path, weights_only=False)[wanted]
    model.load_state_dict({key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)})
    return model


def test_the_encoder_of_a_runners_segmentor_has_the_architecture_that_was_trained(runner_file, caplog):
    read = load_encoder(runner_file, 32)
    assert (read.config.heads, read.image_size, read.patch_size) == (4, (32, 32), 8)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(read.forward_features(images), trained(runner_file).forward_features(images))
    assert "took the model under 'backbone.encoder.' and left out the tensors under decode_head." in caplog.text
    assert "heads" not in caplog.text
    assert_user_error(lambda: load_encoder(runner_file, 32, encoder_heads=8), "encoder_heads=8", "stores 4")


def test_a_runners_average_is_in_its_state_dict(runner_file, caplog):
    assert torch.equal(load_encoder(runner_file, 32).cls_token, load_encoder(runner_file, 32, weights="ema").cls_token)
    assert "holds state_dict and ema_state_dict; took state_dict, the average" in caplog.text
    raw = load_encoder(runner_file, 32, weights="ema_state_dict")
    assert torch.equal(raw.cls_token, trained(runner_file, "ema_state_dict").cls_token)
    assert not torch.equal(raw.cls_token, trained(runner_file).cls_token)


PLACES = {"backbone.net.encoder": False, "backbone.encoder": True, "backbone.bottom_up.encoder": False}


@pytest.mark.parametrize(("place", "tokenizer_norm"), PLACES.items())
def test_the_encoder_of_a_detectors_final_checkpoint(tmp_path, place, tokenizer_norm):
    """detectron2's checkpointer writes nothing but the tensors, the optimizer and the iteration. ADDP's norm, which
    transfers drop, stays if the detector was trained with it.
    """
    attention = AttentionConfig(window=2, global_blocks=1, relative="decomposed", class_token=False)
    model = nn.Module()
    part = model
    for name in place.split("."):
        setattr(part, name, nn.Module())
        outer, part = part, getattr(part, name)
    setattr(outer, name, encoder(tokenizer_norm=tokenizer_norm, attention=attention))
    model.roi_heads, model.proposal_generator = nn.Linear(2, 2), nn.Linear(2, 2)
    trainer = {"iteration": 9, "optimizer": torch.optim.AdamW(model.parameters()).state_dict()}
    path = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict(), "trainer": trainer, "iteration": 9}, path)
    read = load_encoder(path, 32)
    expected = encoder(tokenizer_norm=tokenizer_norm, attention=attention)
    assert read.architecture == expected.architecture
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(read.forward_features(images), expected.forward_features(images))
    plain = AttentionConfig(class_token=True)
    assert_user_error(lambda: load_encoder(path, 32, attention=plain), "attention", "without a class token")


def test_any_state_dict_of_an_encoder_keeps_its_architecture(tmp_path):
    for wrap in (nn.DataParallel, torch.compile):
        torch.save(wrap(encoder()).state_dict(), tmp_path / "plain.pth")
        assert load_encoder(tmp_path / "plain.pth", 32).config == encoder().config


def test_a_detector_without_an_encoder_of_ours_is_described():
    resnet = {"backbone.bottom_up.stem.conv1.weight": torch.zeros(1), "roi_heads.x": torch.zeros(1)}
    assert_user_error(lambda: load_encoder(resnet), "this is a detector's or segmenter's checkpoint")
