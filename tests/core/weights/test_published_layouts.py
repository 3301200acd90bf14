"""The published layouts of ADDP, MAGE and the VQGAN: reading, writing, and telling them apart."""

import argparse

import pytest
import torch
from checks import assert_user_error, same_weights
from golden_weights import HEADS, SPEC
from tiny import tiny_addp

from addp_core import load_addp, load_encoder, load_predictor, load_tokenizer, save_model, save_published
from addp_core.weights.layouts.registry import describe_tensors


def test_published_round_trips_through_ours(tmp_path, golden):
    model = load_addp({"model": golden}, **HEADS)
    save_model(model, tmp_path / "m.safetensors")
    save_published(load_addp(tmp_path / "m.safetensors"), tmp_path / "p.pth")
    again = load_addp(tmp_path / "p.pth")  # the file stores the numbers of heads
    assert same_weights(model, again)

    written = torch.load(tmp_path / "p.pth", weights_only=True)["model"]
    assert set(SPEC["shapes"]) <= set(written)
    assert all(list(written[name].shape) == shape for name, shape in SPEC["shapes"].items())
    extra = set(written) - set(SPEC["shapes"])
    assert {e for e in extra if not e.startswith("token_predictor.vqgan.")} == {
        "token_predictor.token_emb.position_ids"
    }
    unused = [n for n in SPEC["shapes"] if not torch.equal(written[n], golden[n])]
    assert all(
        "decoder_pred" in n or "pos" in n or "patch_embed" in n or "cls_token" in n or "mask_token" in n for n in unused
    )


def test_a_published_training_checkpoint(tmp_path, golden):
    """It also holds the optimizer, scaler, epoch, an argparse.Namespace, the tokenizer twice, and DDP's prefix."""
    twice = golden | {"token_predictor." + k: v for k, v in golden.items() if k.startswith("vqgan.")}
    content = {
        "model": {"module." + k: v for k, v in twice.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 1599,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="addp_vit_base_patch16", blr=1e-4),
    }
    torch.save(content, tmp_path / "checkpoint-1599.pth")
    assert same_weights(load_addp(tmp_path / "checkpoint-1599.pth", **HEADS), load_addp({"model": golden}, **HEADS))


@pytest.mark.parametrize("prefix", ["vqgan.", "token_predictor.vqgan."])
def test_the_tokenizer_is_found_under_any_prefix(golden, prefix):
    vqgan = {k.removeprefix("vqgan."): v for k, v in golden.items() if k.startswith("vqgan.")}
    rest = {k: v for k, v in golden.items() if not k.startswith("vqgan.")}
    model = load_addp({"model": rest | {prefix + k: v for k, v in vqgan.items()}}, **HEADS)
    assert same_weights(model, load_addp({"model": golden}, **HEADS))
    for form in ({"state_dict": vqgan}, vqgan, {"model": {"vqgan." + k: v for k, v in vqgan.items()}}):
        assert same_weights(load_tokenizer(form), model.tokenizer)
    assert same_weights(load_addp({"model": rest}, tokenizer=vqgan, **HEADS), model)


def test_predictor_from_a_mage_file(golden):
    mage = {k.removeprefix("token_predictor."): v for k, v in golden.items() if k.startswith("token_predictor.")}
    heads = {k: v for k, v in HEADS.items() if k.startswith("predictor")}
    model = load_addp({"model": golden}, **HEADS)
    assert same_weights(load_predictor({"model": mage}, **heads), model.predictor)
    with_vqgan = mage | {k: v for k, v in golden.items() if k.startswith("vqgan.")}
    assert same_weights(load_predictor({"model": with_vqgan}, **heads), model.predictor)
    without = {k: v for k, v in golden.items() if not k.startswith("token_predictor.")}
    assert same_weights(load_addp({"model": without}, predictor={"model": mage}, **HEADS), model)
    assert load_addp({"model": without}, **HEADS).predictor is None


def test_a_tokenizer_inside_a_mage_file(golden):
    mage = {
        k.removeprefix("token_predictor."): v for k, v in golden.items() if k.startswith(("token_predictor.", "vqgan."))
    }
    assert same_weights(load_tokenizer({"model": mage}), load_addp({"model": golden}, **HEADS).tokenizer)


def test_the_state_dict_of_our_model(golden):
    model = load_addp({"model": golden}, **HEADS)
    assert same_weights(load_addp(model.state_dict(), **HEADS), model)
    assert_user_error(lambda: load_addp(tiny_addp(ids_to="none").state_dict()), "save the model with save_model")


def test_models_that_the_published_layout_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="only supports 'decoder'"):
        save_published(tiny_addp(ids_to="none"), tmp_path / "p.pth")
    model = tiny_addp()
    model.predictor = None
    with pytest.raises(ValueError, match="no token predictor"):
        save_published(model, tmp_path / "p.pth")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("cls_token", 3),
        ("pos_embed", 3),
        ("patch_embed.proj.weight", 4),
        ("token_emb.weight", 2),
        ("vqgan.encoder.conv_in.weight", 4),
        ("vqgan.encoder.down.0.block.0.conv1.weight", 4),
        ("vqgan.quantize.embedding.weight", 2),
        ("token_predictor.token_emb.word_embeddings.weight", 2),
        ("token_predictor.token_emb.position_embeddings.weight", 2),
    ],
)
def test_tensors_with_another_number_of_dimensions_are_named(golden, name, rank):
    loads = [(load_addp, golden, "", HEADS)]
    if (prefix := name.split(".")[0] + ".") in ("vqgan.", "token_predictor."):
        heads = {key: HEADS[key] for key in HEADS if key.startswith("predictor")} if prefix != "vqgan." else {}
        part = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
        loads.append((load_tokenizer if prefix == "vqgan." else load_predictor, part, prefix, heads))
    for load, state, prefix, heads in loads:
        tensor = name.removeprefix(prefix)
        for wrong in (torch.tensor(1.0), torch.zeros(3), torch.zeros(1, 1, 1, 1, 1)):
            changed = {**state, tensor: wrong}
            assert_user_error(lambda: load(changed, **heads), f"has shape {list(wrong.shape)}, expected {rank} dim")  # noqa: B023


def test_files_of_other_methods_are_recognized(golden):
    mage = {
        "model": {k.removeprefix("token_predictor."): v for k, v in golden.items() if k.startswith("token_predictor.")}
    }
    vqgan = {k.removeprefix("vqgan."): v for k, v in golden.items() if k.startswith("vqgan.")}
    assert_user_error(lambda: load_addp(mage), "this is a MAGE checkpoint: pass it as predictor=")
    assert_user_error(lambda: load_addp(vqgan), "this is a VQGAN checkpoint: pass it as tokenizer=")
    assert_user_error(lambda: load_predictor(vqgan), "VQGAN", "expected a MAGE checkpoint")
    assert_user_error(lambda: load_encoder(vqgan), "VQGAN", "pixel encoder")
    resnet = dict.fromkeys(["conv1.weight", "layer1.0.conv1.weight"], torch.zeros(1))
    assert_user_error(lambda: load_addp(resnet), "ResNet")
    assert_user_error(lambda: load_addp({"a.weight": torch.zeros(1)}), "unknown content (1 entries such as a.weight)")
    assert "MAE" in describe_tensors(dict.fromkeys(["mask_token", "decoder_pred.weight", "blocks.0.attn.qkv.weight"]))
    with_attention = vqgan | {"encoder.mid.attn_1.q.weight": torch.zeros(1)}
    assert_user_error(lambda: load_tokenizer({"state_dict": with_attention}), "attention")
