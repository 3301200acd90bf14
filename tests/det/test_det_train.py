"""How `addp det train` prepares training: the encoder's initialization, the recipes, and the choice of the engine."""

import pytest
import torch
from ranks import Fault, assert_ends, run_ranks
from safetensors.torch import load_file
from timm.models.beit import Beit
from tiny_detectors import tiny_encoder

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.recipes.config import load, load_recipe
from addp_core.weights.saving import save_model
from det import train as det_train


@pytest.mark.parametrize("relative", ["none", "decomposed", "table"])
def test_positions_are_resampled_to_the_detectors_size(tmp_path, relative):
    """From a checkpoint for 32 pixels to a detector for 48: relative position tables in the file are resized, those
    that it lacks are initialized to 0.
    """
    attention = AttentionConfig(relative=relative, class_token=False)
    pretrained = tiny_encoder(attention)
    for name, value in pretrained.named_parameters():
        if ".relative." in name:
            torch.nn.init.normal_(value)
    save_model(pretrained, tmp_path / "encoder.safetensors")
    settings = [f"model={tmp_path / 'encoder.safetensors'}", f"out={tmp_path}", "data.size=48"]
    settings += [f"attention={{window: 0, relative: {relative}, class_token: false}}"]
    encoder = det_train.build_encoder(load(det_train.Recipe, None, settings))
    assert encoder.pos_embed.shape == (1, 1 + 12 * 12, 32)
    small, large = (e.pos_embed.detach()[0, 1:].unflatten(0, (n, n)) for e, n in ((pretrained, 8), (encoder, 12)))
    assert torch.allclose(large.mean((0, 1)), small.mean((0, 1)), atol=1e-2)
    tables = {name: value for name, value in encoder.named_parameters() if ".relative." in name}
    assert len(tables) == {"none": 0, "decomposed": 4, "table": 2}[relative]
    assert all(value.abs().max() > 0.5 for value in tables.values())
    if relative == "none":
        changes = ["attention.relative=decomposed", "attention.window=5"]
        with_tables = det_train.build_encoder(load(det_train.Recipe, None, [*settings, *changes]))
        assert all((p == 0).all() for n, p in with_tables.named_parameters() if ".relative." in n)
    assert encoder.forward_maps(torch.randn(1, 3, 48, 48), [-1])[0].shape == (1, 32, 12, 12)


def test_random_initialization_takes_only_the_architecture_from_the_file(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_model(tiny_encoder(), path)
    settings = [f"model={path}", "out=x", "init=random", "data.size=48", "checkpointing=true", "drop_path=0.2"]
    first, second = (det_train.build_encoder(load(det_train.Recipe, None, settings)) for _ in range(2))
    weight = "blocks.1.mlp.fc1.weight"
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], load_file(path)[weight])
    assert first.config.width == 32
    assert first.config.drop_path == 0.2
    assert first.checkpointing


def test_a_beit_checkpoint_needs_its_relative_position_tables(tmp_path):
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    beit = Beit(**shape, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    for block in beit.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.save({"model": beit.state_dict()}, tmp_path / "beit.pth")
    settings = [f"model={tmp_path / 'beit.pth'}", "out=x", "data.size=48"]
    with pytest.raises(
        UserError, match=r"attention.relative=decomposed: .*beit.pth .* expected attention.relative=table"
    ):
        det_train.build_encoder(load(det_train.Recipe, None, settings))
    with_tables = det_train.build_encoder(load(det_train.Recipe, None, [*settings, "attention.relative=table"]))
    assert with_tables.blocks[0].relative.relative_position_bias_table.abs().max() > 0.5
    # a random initialization has absolute positions of its own
    det_train.build_encoder(load(det_train.Recipe, None, [*settings, "init=random"]))


@pytest.mark.parametrize("name", ["tiny", "vitdet_b_100ep", "vitdet_l_100ep"])
def test_every_named_recipe_can_be_loaded(name):
    load_recipe(det_train, name, ["model=x", "out=y"])


@pytest.mark.parametrize(("name", "drop_path", "decay"), [("vitdet_b_100ep", 0.1, 0.8), ("vitdet_l_100ep", 0.4, 0.9)])
def test_det_recipes_hold_the_papers_hyperparameters(name, drop_path, decay):
    recipe = load_recipe(det_train, name, ["model=x", "out=y"])
    data, attention, train = recipe.data, recipe.attention, recipe.train
    assert (data.size, data.scale, data.flip) == (1024, (0.1, 2.0), True)
    assert (attention.window, attention.global_blocks, attention.relative) == (14, 4, "decomposed")
    assert (recipe.drop_path, train.layer_decay) == (drop_path, decay)
    assert (train.epochs, train.batch, train.warmup_steps) == (100, 128, 250)
    assert (train.peak_lr, train.schedule, train.min_lr) == (1.6e-4, "cosine", 0)
    assert (train.betas, train.weight_decay, train.clip_grad) == ((0.9, 0.999), 0.1, None)


def test_detectron2_is_chosen_only_if_it_is_installed(monkeypatch):
    monkeypatch.setattr(det_train, "find_spec", lambda name: None)
    assert det_train.resolve_engine("auto") == "torchvision"
    with pytest.raises(UserError, match="engine=detectron2: it is not installed; `addp doctor` shows the command"):
        det_train.resolve_engine("detectron2")
    monkeypatch.setattr(det_train, "find_spec", lambda name: object())
    assert det_train.resolve_engine("auto") == "detectron2"
    assert det_train.resolve_engine("torchvision") == "torchvision"


def test_what_one_rank_alone_cannot_use_ends_both(toy_coco, tmp_path):
    keys = ["model=tiny", "init=random", f"data={toy_coco}", f"out={tmp_path / 'run'}"]
    fault = Fault("user error", "det.train:prepare_out", 0)
    ended = run_ranks(["det", "train", *keys], tmp_path / "job", fault=fault)
    assert_ends(ended, [2, 2], "injected=1")
