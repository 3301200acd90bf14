"""Building models from files: round trips, parts, sizes, numbers of heads, and tensors that do not fit."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from checks import assert_user_error, same_weights
from golden_weights import HEADS
from tiny import tiny_addp

from addp_core import load_addp, load_encoder, load_predictor, load_tokenizer, sample, save_model
from addp_core.networks.classifier import Classifier
from addp_core.recipes.config import load_recipe
from addp_core.recipes.keys import keys_of
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.layouts.published import to_published
from addp_core.weights.loading import load_classifier
from addp_core.weights.pretrained import EncoderKeys
from addp_core.weights.reading import read_weights
from pretrain import addp as pretraining


def published_content(model):
    """Return what `save_published` writes: the published layout with the architecture."""
    text = json.dumps({"kind": "addp", "architecture": dataclasses.asdict(model.config)})
    return {"model": to_published(model), "addp": text}


def test_our_file_round_trips(tmp_path):
    model = tiny_addp(target="both", ids_to="encoder+decoder")
    save_model(model, tmp_path / "m.safetensors")
    again = load_addp(tmp_path / "m.safetensors")
    assert same_weights(model, again)
    assert again.config == model.config
    assert not again.training
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_parts_round_trip(tmp_path):
    model = tiny_addp()
    save_model(model.tokenizer, tmp_path / "t.safetensors")
    save_model(model.predictor, tmp_path / "p.safetensors", grid=model.config.grid)
    save_model(model.denoiser.encoder, tmp_path / "e.safetensors")
    assert same_weights(load_tokenizer(tmp_path / "t.safetensors"), model.tokenizer)
    assert load_tokenizer(tmp_path / "t.safetensors").grid == (4, 6)
    assert same_weights(load_predictor(tmp_path / "p.safetensors"), model.predictor)
    encoder = load_encoder(tmp_path / "e.safetensors", img_size=(8, 12), tokenizer_norm=True)
    assert same_weights(encoder, model.denoiser.encoder)


def test_parts_are_read_from_models_and_run_folders(tmp_path):
    model = tiny_addp()
    save_model(model, tmp_path / MODEL_FILE)
    assert same_weights(load_tokenizer(tmp_path), model.tokenizer)
    assert same_weights(load_predictor(tmp_path), model.predictor)
    assert same_weights(load_addp(tmp_path), model)
    assert same_weights(load_addp(str(tmp_path), tokenizer=tmp_path, predictor=tmp_path), model)


def test_reading_infers_kind_and_architecture(golden):
    weights = read_weights({"model": golden}, heads=HEADS)
    assert weights.kind == "addp"
    assert weights.architecture.image_size == (256, 256)
    assert weights.architecture.tokenizer.multipliers == (1, 1, 2, 2, 4)
    assert weights.architecture.vocabulary.size == 2025


def test_heads_of_unknown_widths_are_demanded(golden, caplog):
    assert_user_error(lambda: load_addp({"model": golden}), "has width 64", "expected encoder_heads=<number>")
    config = load_addp({"model": golden}, encoder_heads=4).config
    assert (config.denoiser.encoder.heads, config.denoiser.decoder.heads) == (4, 16)
    for key in ("decoder_heads", "predictor_heads", "predictor_decoder_heads"):
        assert f"({key} overrides this)" in caplog.text
    caplog.clear()
    load_addp({"model": golden}, **HEADS)
    assert not caplog.text


@pytest.mark.parametrize("key", HEADS)
def test_heads_that_contradict_the_stored_ones_of_addp_are_refused(tmp_path, key):
    """Taken without a word they would change all outputs."""
    model = tiny_addp()
    save_model(model, tmp_path / "m.safetensors")
    for source in (published_content(model), tmp_path / "m.safetensors"):
        assert load_addp(source, **{key: 2}).config == model.config
        wrong = partial(load_addp, source, **{key: 4})
        assert_user_error(wrong, f"{key}=4", "stores 2 attention heads; leave the key out")


def test_heads_that_contradict_the_stored_ones_of_a_part_are_refused(tmp_path):
    model = tiny_addp()
    encoder, classifier, predictor = (tmp_path / f"{name}.safetensors" for name in "ecp")
    save_model(model.denoiser.encoder, encoder)
    save_model(Classifier(model.denoiser.encoder, 3), classifier)
    save_model(model.predictor, predictor, (4, 6))
    for load, source, key in (
        (partial(load_encoder, img_size=(8, 12)), encoder, "encoder_heads"),
        (partial(load_encoder, img_size=(8, 12)), classifier, "encoder_heads"),
        (partial(load_encoder, img_size=(8, 12), init="random"), encoder, "encoder_heads"),
        (load_classifier, classifier, "encoder_heads"),
        (load_predictor, predictor, "predictor_heads"),
        (partial(load_encoder, img_size=(8, 12), tokenizer=published_content(model)), predictor, "encoder_heads"),
    ):
        assert_user_error(partial(load, source, **{key: 8}), f"{key}=8", "stores 2 attention heads")


def test_positions_are_resampled_to_other_sizes(golden):
    model = load_addp({"model": golden}, image_size=(128, 192), **HEADS)
    assert model.config.grid == (8, 12)
    assert sample(model, 1, steps=2).shape == (1, 3, 128, 192)
    images = torch.rand(1, 3, 128, 192)
    assert torch.isfinite(model(images)["loss"])
    unchanged = load_addp({"model": golden}, image_size=(256, 256), **HEADS)
    assert same_weights(unchanged, load_addp({"model": golden}, **HEADS))


def test_resampling_keeps_the_class_position_and_smooth_maps():
    model = tiny_addp(image_size=(16, 16))
    ramp = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        model.denoiser.encoder.pos_embed[0, 1:, 0] = (ramp[:, None] + ramp[None]).flatten()
    encoder = load_encoder(to_published(model), img_size=(32, 24), encoder_heads=2)
    assert encoder.grid == (16, 12)
    assert torch.equal(encoder.pos_embed[0, 0], model.denoiser.encoder.pos_embed[0, 0])
    field = encoder.pos_embed[0, 1:, 0].view(16, 12)
    assert (field.diff(dim=0)[2:-2] > 0).all()
    assert (field.diff(dim=1)[:, 2:-2] > 0).all()


def test_predictors_of_another_grid_are_resampled():
    model = load_addp(published_content(tiny_addp(image_size=(8, 8))), predictor=published_content(tiny_addp()))
    assert model.predictor.tokens == 16
    assert torch.isfinite(model(torch.rand(1, 3, 8, 8))["loss"])


def test_encoder_options(golden):
    encoder = load_encoder({"model": golden}, 256, encoder_heads=4, tokenizer_norm=True, drop_path=0.2)
    assert torch.equal(encoder.tokenizer_norm.weight, golden["tokenizer_norm.weight"])
    assert encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    vit = {k: v for k, v in golden.items() if k.startswith(("blocks", "cls", "pos_embed", "patch", "norm"))}
    assert_user_error(lambda: load_encoder(vit, encoder_heads=4, tokenizer_norm=True), "tokenizer_norm", "has none")


def test_every_wrong_tensor_is_named(golden):
    broken = dict(golden)
    del broken["blocks.1.norm1.bias"], broken["mlm_layer.ln.weight"]
    broken["surplus.weight"] = torch.zeros(2)
    broken["norm.weight"] = torch.zeros(65)
    assert_user_error(
        lambda: load_addp({"model": broken}, **HEADS),
        "2 missing: denoiser.encoder.blocks.1.norm1.bias, denoiser.decoder.mlm_layer.ln.weight",
        "1 unexpected: surplus.weight",
        "1 mis-shaped: denoiser.encoder.norm.weight (found (65,), expected (64,))",
    )


def test_a_model_without_any_tokenizer_is_refused(golden):
    assert_user_error(
        lambda: load_addp({"model": {k: v for k, v in golden.items() if "vqgan" not in k}}, **HEADS),
        "has no tokenizer",
        "tokenizer=<VQGAN file>",
    )


def test_parts_with_another_codebook_are_refused(golden):
    model, other = tiny_addp(), tiny_addp()
    assert_user_error(
        lambda: load_addp({"model": golden}, tokenizer=published_content(model), **HEADS),
        "it has 24 codes",
        "predicts 1024",
    )
    assert same_weights(load_addp(published_content(model), tokenizer=published_content(other)), model)


def test_misspelled_arguments_name_the_nearest(golden):
    with pytest.raises(TypeError, match="encoder_head'; did you mean 'encoder_heads'"):
        load_addp({"model": golden}, encoder_head=4)


def test_the_size_tiny_is_not_the_recipe_tiny():
    """`addp pretrain tiny` trains another encoder than the ViT of this name; errors and help tell their widths."""
    recipe = load_recipe(pretraining, "tiny", ["data=photos", "out=run"])
    assert recipe.model.encoder.width == 128
    assert load_encoder("tiny", init="random").config.width == 192
    assert_user_error(lambda: load_encoder("tiny"), "192 wide", "init=random", "recipe of this name", "run folder")
    assert "tiny (192 wide)" in keys_of(EncoderKeys)["model"].help
