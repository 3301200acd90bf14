"""MAGE's encoder over token ids: its features, sizes, files, layers, and files that do not go together."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import assert_user_error, same_weights
from golden_weights import HEADS, golden_state
from safetensors.torch import save_file
from timm.models import group_parameters
from tiny import TOKENIZER, tiny_addp

from addp_core import load_encoder, load_tokenizer, save_model
from addp_core.method.addp import ADDP
from addp_core.networks.attention import PLAIN_ATTENTION, AttentionConfig
from addp_core.networks.classifier import Classifier, normalize
from addp_core.networks.encoder import Encoder
from addp_core.networks.tokenizer import Tokenizer
from addp_core.weights.files import strip_prefix
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.loading import load_classifier

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def save_parts(model: ADDP, folder: Path) -> tuple[Path, Path]:
    """Write (predictor, tokenizer) as two of our files."""
    save_model(model.predictor, folder / "p.safetensors", grid=model.config.grid)
    save_model(model.tokenizer, folder / "t.safetensors")
    return folder / "p.safetensors", folder / "t.safetensors"


def test_the_encoder_reads_the_tokens_of_the_images(tmp_path):
    model = tiny_addp()
    predictor, tokenizer = save_parts(model, tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    images = torch.rand(3, 3, 8, 12)
    normalized = normalize(images, encoder.mean, encoder.std)
    ids = model.tokenizer.encode(images)
    assert torch.equal(encoder.tokenize(normalized), ids)
    tokens = encoder.forward_features(normalized)
    torch.testing.assert_close(encoder.norm(tokens), model.predictor.encode(ids), **CLOSE)
    first, last = encoder.forward_maps(normalized, [0, -1])
    assert first.shape == last.shape == (3, 16, 4, 6)
    torch.testing.assert_close(last.flatten(2).mT, tokens[:, 1:])
    assert (encoder.patch_size, encoder.grid_of(normalized), encoder.config.width) == (2, (4, 6), 16)


def test_a_published_mage_file_with_and_without_its_tokenizer():
    golden = golden_state()
    state, vqgan = strip_prefix(golden, "token_predictor."), strip_prefix(golden, "vqgan.")
    options = {"encoder_heads": HEADS["predictor_heads"]}
    separate = load_encoder({"model": state}, 256, tokenizer={"state_dict": vqgan}, **options)
    combined = load_encoder({"model": state | {f"vqgan.{k}": v for k, v in vqgan.items()}}, 256, **options)
    assert same_weights(separate, combined)
    assert separate.config.heads == HEADS["predictor_heads"]
    assert not any("decoder" in key for key in separate.state_dict())
    assert_user_error(lambda: load_encoder({"model": state}, 256), "MAGE reads token ids", "tokenizer=<VQGAN file>")
    assert_user_error(lambda: load_encoder({"model": golden}, 256, tokenizer=vqgan, **options), "no MAGE checkpoint")


def test_only_the_transformer_gets_gradients(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer, dropout=0.1, drop_path=0.1).train()
    encoder.checkpointing = True
    encoder.forward_features(torch.randn(2, 3, 8, 12)).sum().backward()
    trained = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained == {"token_emb", "blocks"}
    assert not any(p.requires_grad for p in encoder.tokenizer.parameters())
    assert encoder.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)


def test_other_sizes_resample_the_positions(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    encoder = load_encoder(predictor, (16, 16), tokenizer=tokenizer)
    assert encoder.token_emb.position_embeddings.weight.shape == (65, 16)
    assert encoder.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 65, 16)


def test_sizes_that_the_stride_does_not_divide_are_padded(tmp_path):
    """With zeros after normalization, below and on the right; the ids of padded places are tokens too."""
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    encoder = load_encoder(predictor, (7, 11), tokenizer=tokenizer)
    images = torch.randn(2, 3, 7, 11)
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1))
    assert (encoder.grid, encoder.grid_of(images)) == ((4, 6), (4, 6))
    assert torch.equal(encoder.tokenize(images), encoder.tokenize(padded))
    whole = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    assert torch.equal(encoder.forward_features(images), whole.forward_features(padded))
    save_model(encoder, tmp_path / "e.safetensors")
    assert load_encoder(tmp_path / "e.safetensors", None).image_size == (7, 11)
    with pytest.raises(ValueError, match="images of 9 x 12 pixels, expected 8 x 12"):
        whole.forward_features(torch.randn(1, 3, 9, 12))


def test_large_images_are_tokenized_one_at_a_time(tmp_path, monkeypatch):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    images, encode, counts = torch.randn(3, 3, 8, 12), encoder.tokenizer.encode, []
    expected = encoder.tokenize(images)
    monkeypatch.setattr("addp_core.networks.token_encoder.LARGE_IMAGE", 8 * 12 - 1)
    monkeypatch.setattr(encoder.tokenizer, "encode", lambda x: counts.append(len(x)) or encode(x))
    assert torch.equal(encoder.tokenize(images), expected)
    assert counts == [1, 1, 1]


# -------------------- the blocks of dense prediction


@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(relative="table"),
        AttentionConfig(relative="decomposed", class_token=False),
        AttentionConfig(window=3, global_blocks=1, relative="decomposed", class_token=False),
    ],
    ids=["table", "decomposed", "windows"],
)
def test_the_blocks_are_those_of_the_encoder_over_pixels(tmp_path, attention):
    """Given the same embeddings, the blocks of both inputs compute the same; other sizes are resampled alike."""
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    tokens = load_encoder(predictor, (8, 12), tokenizer=tokenizer, attention=attention, dynamic=True)
    pixels = Encoder(tokens.config, (8, 12), 2, attention, dynamic=True).eval()
    with torch.no_grad():
        for name, parameter in tokens.named_parameters():
            if ".relative." in name:
                parameter.normal_()
        pixels.pos_embed.copy_(tokens.positions)
    pixels.blocks.load_state_dict(tokens.blocks.state_dict())
    for size in ((8, 12), (10, 6)):
        images = torch.randn(2, 3, *size)
        embedded = tokens.embed(images)
        grid = tokens.grid_of(images)
        torch.testing.assert_close(tokens.positions_of(grid), pixels.positions_of(grid))
        pixels.embed = lambda images, x=embedded: x
        torch.testing.assert_close(tokens.forward_features(images), pixels.forward_features(images))
        assert tokens.forward_maps(images, [-1])[0].shape == (2, 16, *grid)


def test_features_in_dense_prediction_are_those_of_recognition_where_attention_is_plain(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    images = torch.randn(2, 3, 8, 12)
    expected = load_encoder(predictor, (8, 12), tokenizer=tokenizer).forward_features(images)
    for attention in (PLAIN_ATTENTION, AttentionConfig(relative="table"), AttentionConfig(relative="decomposed")):
        dense = load_encoder(predictor, (8, 12), tokenizer=tokenizer, attention=attention, dynamic=True)
        torch.testing.assert_close(dense.forward_features(images), expected, **CLOSE)  # new relative positions are zero


def test_attention_and_normalization_are_stored(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    attention = AttentionConfig(relative="table", class_token=False)
    options = {"tokenizer": tokenizer, "attention": attention, "normalisation": "half"}
    encoder = load_encoder(predictor, (8, 12), **options)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    torch.nn.init.normal_(encoder.blocks[1].relative.relative_position_bias_table)
    save_model(encoder, tmp_path / "e.safetensors")
    torch.save({"model": encoder.state_dict()}, tmp_path / "e.pth")  # of any trainer
    images = torch.randn(2, 3, 8, 12)
    for name in ("e.safetensors", "e.pth"):
        again = load_encoder(tmp_path / name, (8, 12), normalisation="half")
        assert again.architecture == encoder.architecture
        assert torch.equal(again.forward_features(images), encoder.forward_features(images))
        load = partial(load_encoder, tmp_path / name, (8, 12))
        assert_user_error(lambda load=load: load(attention=AttentionConfig()), "without a class token")
    larger = load_encoder(tmp_path / "e.safetensors", (16, 16))
    assert larger.blocks[1].relative.relative_position_bias_table.shape == (225, 2)


def test_files_from_before_attention_was_stored(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    former = {key: asdict(encoder.architecture)[key] for key in ("predictor", "vocabulary", "tokenizer", "image_size")}
    metadata = {"addp": json.dumps({"kind": "token_encoder", "architecture": former})}
    save_file(dict(encoder.state_dict()), tmp_path / "former.safetensors", metadata)
    again = load_encoder(tmp_path / "former.safetensors", (8, 12))
    assert same_weights(again, encoder)
    assert again.architecture == encoder.architecture


# -------------------- which input


def test_the_tokenizer_that_a_run_names(tmp_path, caplog):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(predictor, run / "model.safetensors")
    (run / "recipe.yaml").write_text(f"tokenizer: {tokenizer}\n")
    for source in (run, run / "model.safetensors"):
        assert same_weights(load_encoder(source, (8, 12)), load_encoder(predictor, (8, 12), tokenizer=tokenizer))
    assert f"took the tokenizer that the recipe of its run names, {tokenizer}" in caplog.text
    (run / "recipe.yaml").write_text(f"tokenizer: {tmp_path}/gone\n")
    expected = ("MAGE reads token ids, and its run names a tokenizer", "gone", "expected tokenizer=<VQGAN file>")
    assert_user_error(lambda: load_encoder(run, (8, 12)), *expected)


def test_the_input_can_be_demanded(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    save_model(tiny_addp(), tmp_path / "addp.safetensors")
    mage = partial(load_encoder, predictor, (8, 12), tokenizer=tokenizer)
    addp = partial(load_encoder, tmp_path / "addp.safetensors", (8, 12))
    size = partial(load_encoder, "tiny", (8, 12), init="random")
    assert mage(input="token").kind == size(input="token", tokenizer=tokenizer).kind == "token_encoder"
    assert addp(input="pixels").kind == "encoder"
    assert_user_error(lambda: size(input="token"), "input=token: tiny is a size", "expected tokenizer=<VQGAN file>")
    assert_user_error(lambda: addp(input="token"), "input=token: ", "reads pixels", "expected a MAGE checkpoint")
    assert_user_error(lambda: mage(input="pixels"), "tokenizer=", "found input=pixels too")
    cnn = partial(load_encoder, "resnet18", (64, 64), init="random", tokenizer=tokenizer)
    assert_user_error(cnn, "tokenizer=", "resnet18 is a CNN of timm, which reads pixels")
    save_model(mage(), tmp_path / "e.safetensors")
    load = partial(load_encoder, tmp_path / "e.safetensors", (8, 12))
    assert_user_error(lambda: load(input="pixels"), "reads token ids", "expected an encoder of pixels")
    other = Tokenizer(replace(TOKENIZER, codebook=20))
    save_model(other, tmp_path / "other.safetensors")
    assert_user_error(lambda: mage(tokenizer=tmp_path / "other.safetensors"), "it has 20 codes", "predicts 24")


def test_token_input_from_scratch_has_the_shape_and_the_tokenizer_of_an_addp_file(tmp_path):
    model = tiny_addp()
    save_model(model, tmp_path / "addp.safetensors")
    pixels = load_encoder(tmp_path / "addp.safetensors", (8, 12), init="random")
    tokens = load_encoder(tmp_path / "addp.safetensors", (8, 12), init="random", input="token")
    assert tokens.kind == "token_encoder"
    assert [value.shape for value in tokens.blocks.parameters()] == [
        value.shape for value in pixels.blocks.parameters()
    ]
    encoding = {key: value for key, value in model.tokenizer.state_dict().items() if not key.startswith("decoder.")}
    assert all(torch.equal(tokens.tokenizer.state_dict()[key], value) for key, value in encoding.items())
    save_model(load_encoder(tmp_path / "addp.safetensors", (8, 12)), tmp_path / "encoder.safetensors")
    without = partial(load_encoder, tmp_path / "encoder.safetensors", (8, 12), init="random", input="token")
    assert_user_error(without, "input=token: ", "reads pixels", "with init=random an ADDP checkpoint")


def test_mage_classifiers_round_trip(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    model = Classifier(encoder, 3, class_names=("a", "b", "c"), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    save_model(model, tmp_path / "c.safetensors")
    again = load_classifier(tmp_path / "c.safetensors")
    assert same_weights(model, again)
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(
        again.encoder.tokenize(normalize(images, again.mean, again.std)), tiny_addp().tokenizer.encode(images)
    )
    torch.testing.assert_close(again(images), model(images))
    assert load_classifier(tmp_path / "c.safetensors", (16, 12))(torch.rand(1, 3, 16, 12)).shape == (1, 3)
    assert same_weights(load_encoder(tmp_path / "c.safetensors", (8, 12)), encoder)
    save_model(encoder, tmp_path / "e.safetensors")
    assert same_weights(load_encoder(tmp_path / "e.safetensors", (8, 12)), encoder)


def test_layers_of_a_token_encoder(tmp_path):
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    model = Classifier(load_encoder(predictor, (8, 12), tokenizer=tokenizer), 3)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["encoder.token_emb.word_embeddings.weight"] == 0
    assert layers["encoder.blocks.1.attn.qkv.weight"] == 2
    assert layers["head.weight"] == 3
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_random_initialization_keeps_the_tokenizer(tmp_path):
    """The transformer over a trained tokenizer is random (Tab. 1), with a file's architecture or of a named size."""
    predictor, tokenizer = save_parts(tiny_addp(), tmp_path)
    torch.manual_seed(3)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer, init="random")
    pretrained = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    assert same_weights(encoder.tokenizer, pretrained.tokenizer)
    assert not torch.equal(encoder.token_emb.word_embeddings.weight, pretrained.token_emb.word_embeddings.weight)
    tiny = load_encoder("tiny", (8, 12), tokenizer=tokenizer, init="random")
    assert tiny.config.width == 192
    assert tiny.vocabulary.codebook == TOKENIZER.codebook
    assert same_weights(tiny.tokenizer, pretrained.tokenizer)


def test_files_that_do_not_go_together_are_refused(tmp_path):
    model = tiny_addp()
    model.predictor.trained_on = fingerprint(tiny_addp(seed=1).tokenizer)
    predictor, tokenizer = save_parts(model, tmp_path)
    assert_user_error(lambda: load_encoder(predictor, (8, 12), tokenizer=tokenizer), "trained on another")
    model.predictor.trained_on = fingerprint(load_tokenizer(tokenizer))
    predictor, tokenizer = save_parts(model, tmp_path)
    load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    load = partial(load_encoder, predictor, (8, 12), tokenizer=tokenizer)
    assert_user_error(lambda: load(tokenizer_norm=True), "tokenizer_norm", "has none")
    assert_user_error(lambda: load(patch_size=16), "patch_size: found 16", "has 2")
    assert_user_error(lambda: load(tokenizer=predictor), "expected a VQGAN checkpoint")
