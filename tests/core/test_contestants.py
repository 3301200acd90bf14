"""Encoders of other methods: each equals the model that wrote its file, at its own size and at others."""

import pytest
import torch
from test_checkpoint import fails, same
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from tiny import TOKENIZER, tiny_addp

from addp_core import load_encoder, load_tokenizer, save_model
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.classifier import Classifier, normalize
from addp_core.weights.checkpoint import fingerprint, load_classifier
from addp_core.weights.layouts import strip, to_published

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def scrambled(model):
    """The model with every parameter away from zero and one, so that none can be missed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


# -------------------- BEiT


@pytest.mark.parametrize("tables", ["own", "shared", "both"])
@pytest.mark.parametrize("absolute", [False, True])
def test_beit(tables, absolute):
    beit = Beit(
        **SHAPE,
        init_values=0.1,
        use_abs_pos_emb=absolute,
        use_rel_pos_bias=tables != "shared",
        use_shared_rel_pos_bias=tables != "own",
    )
    state = {"model": scrambled(beit).state_dict() | {"mask_token": torch.zeros(1, 1, 64)}}
    encoder = load_encoder(state, 32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.forward_features(images), beit.forward_features(images), **CLOSE)
    assert encoder.config.heads == 2  # the table tells
    assert encoder.config.layer_scale
    assert encoder.attention == AttentionConfig(relative="table")
    assert encoder(images).shape == (2, 17, 64)


def test_beit_at_another_size_is_timms():
    beit = scrambled(Beit(**SHAPE, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True))
    encoder = load_encoder(beit.state_dict(), (48, 64))
    beit.set_input_size((48, 64))
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(encoder.forward_features(images), beit.forward_features(images), **CLOSE)


def test_beit_with_a_final_norm_round_trips(tmp_path):
    """`use_fc_norm=False`: published pretraining files; the final norm is kept under its name."""
    beit = scrambled(Beit(**SHAPE, init_values=0.1, use_rel_pos_bias=True, use_fc_norm=False))
    encoder = load_encoder(beit.state_dict(), 32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), beit.forward_features(images), **CLOSE)
    save_model(encoder, tmp_path / "e.safetensors")
    assert same(load_encoder(tmp_path / "e.safetensors", 32), encoder)


def test_beit_without_positions_of_any_kind_is_refused():
    beit = Beit(**SHAPE, use_abs_pos_emb=False)
    fails(lambda: load_encoder(beit.state_dict(), 32), "without positions")
    beit = Beit(**SHAPE | {"img_size": (32, 40)}, use_abs_pos_emb=False, use_rel_pos_bias=True)
    fails(lambda: load_encoder(beit.state_dict(), 32), "no square grid")


# -------------------- timm's ViT


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.1},
        {"pre_norm": True},
        {"init_values": 0.1, "no_embed_class": True, "fc_norm": True, "global_pool": "avg"},
    ],
    ids=["layer scale", "CLIP", "DeiT III"],
)
def test_timm_vits(tmp_path, options):
    vit = scrambled(VisionTransformer(**SHAPE, **options))
    encoder = load_encoder(vit.state_dict(), 32, encoder_heads=2)
    images = torch.randn(2, 3, 32, 32)
    vit.norm = torch.nn.Identity()
    torch.testing.assert_close(encoder.forward_features(images), vit.forward_features(images), **CLOSE)
    save_model(encoder, tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors", 32)
    torch.testing.assert_close(again.forward_features(images), encoder.forward_features(images))
    assert load_encoder(tmp_path / "e.safetensors", 64, dropout=0.1).grid == (8, 8)


# -------------------- MAGE


def mage():
    """A tiny MAGE file's contents, its tokenizer's, and the model that both come from (4 x 6 tokens of 2 pixels)."""
    model = tiny_addp()
    state = to_published(model)
    return strip(state, "token_predictor."), strip(state, "vqgan."), model


def saved(model, folder):
    """(predictor, tokenizer): our files, which carry their architecture."""
    save_model(model.predictor, folder / "p.safetensors", grid=model.config.grid)
    save_model(model.tokenizer, folder / "t.safetensors")
    return folder / "p.safetensors", folder / "t.safetensors"


def test_mage_sees_the_images_tokens(tmp_path):
    *_, model = mage()
    predictor, tokenizer = saved(model, tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    images = torch.rand(3, 3, 8, 12)
    seen = normalize(images, encoder.mean, encoder.std)
    ids = model.tokenizer.encode(images)
    assert torch.equal(encoder.tokenize(seen), ids)
    tokens = encoder.forward_features(seen)
    torch.testing.assert_close(encoder.norm(tokens), model.predictor.encode(ids), **CLOSE)
    first, last = encoder.forward_maps(seen, [0, -1])
    assert first.shape == last.shape == (3, 16, 4, 6)
    torch.testing.assert_close(last.flatten(2).mT, tokens[:, 1:])
    assert (encoder.patch_size, encoder.grid_of(seen), encoder.config.width) == (2, (4, 6), 16)


def test_a_published_mage_file_with_and_without_its_tokenizer():
    from golden_weights import HEADS, golden_state

    golden = golden_state()
    state, vqgan = strip(golden, "token_predictor."), strip(golden, "vqgan.")
    options = {"encoder_heads": HEADS["predictor_heads"]}
    alone = load_encoder({"model": state}, 256, tokenizer={"state_dict": vqgan}, **options)
    both = load_encoder({"model": state | {f"vqgan.{k}": v for k, v in vqgan.items()}}, 256, **options)
    assert same(alone, both)
    assert alone.config.heads == HEADS["predictor_heads"]
    assert not any("decoder" in key for key in alone.state_dict())
    fails(lambda: load_encoder({"model": state}, 256), "MAGE reads token ids", "tokenizer=<VQGAN file>")
    fails(lambda: load_encoder({"model": golden}, 256, tokenizer=vqgan, **options), "no MAGE checkpoint")


def test_only_the_transformer_learns(tmp_path):
    predictor, tokenizer = saved(mage()[2], tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer, dropout=0.1, drop_path=0.1).train()
    encoder.checkpointing = True
    encoder.forward_features(torch.randn(2, 3, 8, 12)).sum().backward()
    trained = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained == {"token_emb", "blocks"}
    assert not any(p.requires_grad for p in encoder.tokenizer.parameters())
    assert encoder.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)


def test_other_sizes_resample_the_positions(tmp_path):
    predictor, tokenizer = saved(mage()[2], tmp_path)
    encoder = load_encoder(predictor, (16, 16), tokenizer=tokenizer)
    assert encoder.token_emb.position_embeddings.weight.shape == (65, 16)
    assert encoder.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 65, 16)
    fails(lambda: load_encoder(predictor, (9, 12), tokenizer=tokenizer), "img_size=(9, 12)", "stride 2")


def test_mage_classifiers_round_trip(tmp_path):
    predictor, tokenizer = saved(mage()[2], tmp_path)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    model = Classifier(encoder, 3, class_names=("a", "b", "c"), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    save_model(model, tmp_path / "c.safetensors")
    again = load_classifier(tmp_path / "c.safetensors")
    assert same(model, again)
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(
        again.encoder.tokenize(normalize(images, again.mean, again.std)), mage()[2].tokenizer.encode(images)
    )
    torch.testing.assert_close(again(images), model(images))
    assert load_classifier(tmp_path / "c.safetensors", (16, 12))(torch.rand(1, 3, 16, 12)).shape == (1, 3)
    assert same(load_encoder(tmp_path / "c.safetensors", (8, 12)), encoder)
    save_model(encoder, tmp_path / "e.safetensors")
    assert same(load_encoder(tmp_path / "e.safetensors", (8, 12)), encoder)


def test_layers_of_a_token_encoder(tmp_path):
    from timm.models import group_parameters

    predictor, tokenizer = saved(mage()[2], tmp_path)
    model = Classifier(load_encoder(predictor, (8, 12), tokenizer=tokenizer), 3)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["encoder.token_emb.word_embeddings.weight"] == 0
    assert layers["encoder.blocks.1.attn.qkv.weight"] == 2
    assert layers["head.weight"] == 3
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_token_input_from_scratch(tmp_path):
    """Random transformers over trained tokens (Tab. 1): of a file's architecture, or of a size."""
    predictor, tokenizer = saved(mage()[2], tmp_path)
    torch.manual_seed(3)
    encoder = load_encoder(predictor, (8, 12), tokenizer=tokenizer, init="random")
    pretrained = load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    assert same(encoder.tokenizer, pretrained.tokenizer)
    assert not torch.equal(encoder.token_emb.word_embeddings.weight, pretrained.token_emb.word_embeddings.weight)
    tiny = load_encoder("tiny", (8, 12), tokenizer=tokenizer, init="random")
    assert tiny.config.width == 192
    assert tiny.vocabulary.codebook == TOKENIZER.codebook
    assert same(tiny.tokenizer, pretrained.tokenizer)


def test_wrong_partners(tmp_path):
    model = mage()[2]
    model.predictor.trained_on = fingerprint(tiny_addp(seed=1).tokenizer)
    predictor, tokenizer = saved(model, tmp_path)
    fails(lambda: load_encoder(predictor, (8, 12), tokenizer=tokenizer), "trained on another")
    model.predictor.trained_on = fingerprint(load_tokenizer(tokenizer))
    predictor, tokenizer = saved(model, tmp_path)
    load_encoder(predictor, (8, 12), tokenizer=tokenizer)
    options = {"tokenizer": tokenizer}
    fails(lambda: load_encoder(predictor, (8, 12), dynamic=True, **options), "attention", "over tokens")
    fails(lambda: load_encoder(predictor, (8, 12), tokenizer_norm=True, **options), "tokenizer_norm", "has none")
    fails(lambda: load_encoder(predictor, (8, 12), patch_size=16, **options), "patch_size: found 16", "has 2")
    fails(lambda: load_encoder(predictor, (8, 12), tokenizer=predictor), "expected a VQGAN checkpoint")
