"""MAGE's encoder over token ids: its features, sizes, files, layers, and files that do not go together."""

from functools import partial
from pathlib import Path

import pytest
import torch
from checks import assert_user_error, same_weights
from golden_weights import HEADS, golden_state
from timm.models import group_parameters
from tiny import TOKENIZER, tiny_addp

from addp_core import load_encoder, load_tokenizer, save_model
from addp_core.method.addp import ADDP
from addp_core.networks.classifier import Classifier, normalize
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
    assert_user_error(lambda: load_encoder(predictor, (9, 12), tokenizer=tokenizer), "img_size=(9, 12)", "stride 2")


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
    assert_user_error(lambda: load(dynamic=True), "attention", "over tokens")
    assert_user_error(lambda: load(tokenizer_norm=True), "tokenizer_norm", "has none")
    assert_user_error(lambda: load(patch_size=16), "patch_size: found 16", "has 2")
    assert_user_error(lambda: load(tokenizer=predictor), "expected a VQGAN checkpoint")
