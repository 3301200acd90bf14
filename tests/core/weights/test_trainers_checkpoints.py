"""What the trainers of timm, mmengine and detectron2 write is read, with what it says about its model."""

import argparse
import types
from functools import partial

import pytest
import timm
import torch
from checks import assert_user_error
from timm.models.vision_transformer import VisionTransformer
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from addp_core import load_encoder, save_model
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.weights.files import read_file
from addp_core.weights.loading import load_classifier
from addp_core.weights.saving import save_state


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


# -------------------- timm's train.py


SHAPE = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 8}


def trained_by_timm(folder, model, name, model_kwargs, **options):
    """Save a model and its average as timm's `train.py` does."""
    defaults = dict.fromkeys(("gp", "mean", "std", "crop_pct", "input_size", "img_size"))
    args = argparse.Namespace(model=name, model_kwargs=model_kwargs, opt="adamw", **defaults | options)
    average = ModelEmaV3(model)
    with torch.no_grad():
        for value in (*model.parameters(), *average.module.parameters()):
            value.add_(0.1 * torch.randn_like(value))
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(0, metric=1.0)
    assert {"last.pth.tar", "model_best.pth.tar", "checkpoint-0.pth.tar"} <= {path.name for path in folder.iterdir()}
    return model.eval(), average.module.eval(), folder / "last.pth.tar"


def vit_for_timm(**options):
    """What the registered name builds: timm's ViT with the norm after its pooling."""
    return VisionTransformer(num_classes=3, **{"global_pool": "avg", "fc_norm": True} | SHAPE | options)


def assert_same_outputs(read, model, size):
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(read(images), model(images), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pooling", ["avg", "token"])
def test_a_model_that_timm_trained_under_our_name(tmp_path, caplog, pooling):
    model = vit_for_timm(img_size=32, global_pool=pooling)
    model, average, path = trained_by_timm(
        tmp_path, model, "addp_vit_tiny_patch16", SHAPE, gp=pooling, mean=[0.5], std=[0.25], crop_pct=0.9, img_size=32
    )
    read = load_classifier(path)
    assert (read.encoder.config.heads, read.mean, read.std, read.crop) == (4, (0.5,) * 3, (0.25,) * 3, 0.9)
    assert_same_outputs(read, model, (32, 32))
    assert_same_outputs(load_classifier(path, weights="ema"), average, (32, 32))
    assert "took state_dict (weights=state_dict_ema takes the other)" in caplog.text
    assert "heads" not in caplog.text
    assert "normalized" not in caplog.text
    caplog.clear()
    assert load_encoder(path, 32, weights="state_dict").config.heads == 4
    assert f"was trained on images with mean {(0.5,) * 3}" in caplog.text
    wrong = "encoder_heads=8", "was trained with 4 attention heads (arch addp_vit_tiny_patch16 num_heads=4)"
    for load in (load_encoder, load_classifier):
        assert_user_error(partial(load, path, 32, encoder_heads=8), *wrong)
    assert_user_error(lambda: load_classifier(path, normalisation="half"), "normalisation", "leave the key out")


def test_timms_own_vit_with_options(tmp_path, caplog):
    options = {"img_size": (32, 64), "num_heads": 6, "depth": 1, "patch_size": 16}
    name = "vit_tiny_patch16_224"
    model, _, path = trained_by_timm(tmp_path, timm.create_model(name, num_classes=3, **options), name, options)
    read = load_classifier(path, weights="state_dict")
    assert (read.encoder.config.heads, read.encoder.grid, read.pooling) == (6, (2, 4), "token")
    assert (read.mean, read.crop) == ((0.5,) * 3, 0.9)  # timm's configuration of the name
    assert not caplog.text
    assert_same_outputs(read, model, (32, 64))


def test_a_model_that_timm_trained_as_our_classifier(tmp_path, caplog):
    """Under the same name, before it was timm's own ViT."""
    model = Classifier(encoder(), 3, "token")
    model, _, path = trained_by_timm(tmp_path, model, "addp_vit_tiny_patch16", {"embed_dim": 32, "num_heads": 4})
    content = torch.load(path, weights_only=False)
    content["state_dict"] = dict(content["state_dict"])  # without metadata
    torch.save(content, tmp_path / "old.pth.tar")
    for name in ("last.pth.tar", "old.pth.tar"):
        read = load_encoder(tmp_path / name, 32, weights="state_dict")
        assert read.config.heads == 4
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(read.forward_features(images), model.encoder.forward_features(images))
        assert "head" not in caplog.text
        assert load_classifier(tmp_path / name, weights="state_dict").num_classes == 3


def test_a_pooling_that_we_lack_is_refused(tmp_path):
    for pooling, words in (("avg", "the average of normalized tokens"), ("max", "global_pool=max")):
        vit = vit_for_timm(img_size=32, global_pool=pooling, fc_norm=pooling == "max")
        folder = tmp_path / pooling
        folder.mkdir()
        _, _, path = trained_by_timm(folder, vit, "addp_vit_tiny_patch16", SHAPE, gp=pooling)
        assert_user_error(partial(load_classifier, path), words, "addp_vit_tiny_patch16")
        assert load_encoder(path, 32).config.heads == 4


@pytest.mark.parametrize("arch", ["resnet18", "addp_vit_tiny_patch16", "vit_tiny_patch16_224", "of_another_program"])
def test_options_that_do_not_fit_the_tensors_state_nothing(tmp_path, caplog, arch):
    vit = vit_for_timm(img_size=32, embed_dim=192)
    args = argparse.Namespace(model_kwargs={"embed_dim": 32}, mean="unknown")
    torch.save({"state_dict": vit.state_dict(), "arch": arch, "args": args}, tmp_path / "f.pth")
    assert load_classifier(tmp_path / "f.pth").encoder.config.heads == 3
    assert "took ImageNet's mean and std" in caplog.text


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


def test_a_classifier_over_an_encoder_without_a_class_token(tmp_path):
    """As detectors train it: every token is a patch."""
    model = Classifier(encoder(attention=AttentionConfig(window=2, global_blocks=1, class_token=False)), 3).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.encoder.forward_features(images)
    assert torch.equal(model(images), model.head(model.fc_norm(tokens.mean(1))))
    save_model(model, tmp_path / "c.safetensors")
    assert torch.equal(load_classifier(tmp_path / "c.safetensors")(images), model(images))
    assert_user_error(lambda: Classifier(model.encoder, 3, "token"), "pooling=token", "without a class token")


def test_the_encoder_of_a_detector_or_segmentor_of_ours(tmp_path):
    model = nn.Module()
    model.backbone, model.head = nn.Module(), nn.Linear(2, 2)
    model.backbone.encoder = encoder(tokenizer_norm=True)
    save_state(model.state_dict(), tmp_path / "m.safetensors", "detector", EncoderConfig())
    read = load_encoder(tmp_path / "m.safetensors", None)
    assert read.architecture == model.backbone.encoder.architecture
    assert torch.equal(read.cls_token, model.backbone.encoder.cls_token)
    assert_user_error(lambda: load_encoder(tmp_path / "m.safetensors", encoder_heads=8), "stores 4 attention heads")
