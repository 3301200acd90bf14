"""The encoder as mmseg's backbone, the feature pyramid, and layer-wise learning rate decay."""

import pytest
import torch
from timm.models.beit import Beit

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.base.errors import UserError
from addp_core.weights.encoders import load_encoder
from seg.backbone import AddpViT, LayerDecay, MapPyramid, default_out_indices

ARCH = {"width": 16, "depth": 4, "heads": 2}  # of the file `encoder_file`


def load_backbone(path, arch=ARCH, **options):
    """Build a backbone and load its pretrained file, as mmengine does."""
    init_cfg = {"type": "Pretrained", "checkpoint": str(path)}
    backbone = AddpViT(arch, **({"patch_size": 8} | options), init_cfg=init_cfg)
    backbone.init_weights()
    return backbone.eval()


def test_feature_maps_without_relative_positions_equal_the_encoders_tokens(encoder_file):
    indices, images = (0, 2, 3), torch.randn(2, 3, 48, 32)
    backbone = load_backbone(encoder_file, img_size=(48, 32), out_indices=indices, relative="none")
    encoder = load_encoder(str(encoder_file), (48, 32))
    tokens_by_block = encoder.forward_tokens(images, indices)
    assert torch.allclose(tokens_by_block[-1], encoder.forward_features(images), atol=1e-6)
    with torch.no_grad():
        for tokens, feature_map in zip(tokens_by_block, backbone(images), strict=True):
            expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (6, 4))
            assert (feature_map - expected).abs().max() < 1e-5


def test_relative_position_tables_are_initialized_to_zero_and_used(encoder_file):
    images = torch.randn(1, 3, 40, 48)
    backbone = load_backbone(encoder_file, img_size=32)  # of another size than the images
    tables = [value for name, value in backbone.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == 4
    with torch.no_grad():
        with_zeros = backbone(images)
        for table in tables:
            table.normal_()
        with_values = backbone(images)
    assert [tuple(feature_map.shape) for feature_map in with_zeros] == [(1, 16, 5, 6)] * 4
    assert not torch.allclose(with_zeros[-1], with_values[-1], atol=1e-3)


def test_a_beit_checkpoint_needs_its_relative_position_tables(tmp_path):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    beit = Beit(**shape, use_abs_pos_emb=False, use_rel_pos_bias=True)
    for block in beit.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.save({"model": beit.state_dict()}, tmp_path / "beit.pth")
    arch = ARCH | {"layer_scale": "gamma_1" in "".join(beit.state_dict())}
    backbone = load_backbone(tmp_path / "beit.pth", arch, img_size=32)
    assert backbone.encoder.blocks[0].relative.relative_position_bias_table.any()
    with pytest.raises(UserError, match=r"^relative=none: .*beit.pth has .*; expected relative=table$"):
        load_backbone(tmp_path / "beit.pth", arch, img_size=32, relative="none")


def test_feature_maps_equal_beits_with_its_class_token(tmp_path):
    torch.manual_seed(0)
    shape = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    beit = Beit(**shape, use_abs_pos_emb=False, use_rel_pos_bias=True).eval()
    for parameter in beit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"model": beit.state_dict()}, tmp_path / "beit.pth")
    images, blocks = torch.randn(2, 3, 24, 32), [0, 1, 2, 3]
    options = {"img_size": (24, 32), "out_indices": blocks}
    with torch.no_grad():
        expected = beit.forward_intermediates(images, indices=blocks, norm=False, intermediates_only=True)
        maps, without_class_token = (
            load_backbone(tmp_path / "beit.pth", **options, class_token=keep)(images) for keep in (True, False)
        )
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without_class_token[-1], expected[-1], atol=0.01)


def test_the_pyramid_takes_one_feature_map_or_four():
    pyramid = MapPyramid(8, norm_cfg={"type": "BN"}).eval()
    feature_map = torch.randn(2, 8, 4, 6)
    sizes = [tuple(level.shape[2:]) for level in pyramid([feature_map])]
    assert sizes == [(16, 24), (8, 12), (4, 6), (2, 3)]
    from_one, from_four = pyramid([feature_map]), pyramid([feature_map] * 4)
    assert all(torch.equal(a, b) for a, b in zip(from_one, from_four, strict=True))
    assert default_out_indices(12) == (3, 5, 7, 11)
    assert default_out_indices(24) == (7, 11, 15, 23)


def test_the_learning_rate_falls_from_block_to_block():
    model = torch.nn.Module()
    model.backbone = AddpViT({"width": 16, "depth": 4, "heads": 2}, 32, 8)
    model.decode_head = torch.nn.Conv2d(16, 3, 1)
    optimizer = {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}
    wrapper = LayerDecay({"type": "OptimWrapper", "optimizer": optimizer}, {"decay_rate": 0.5})(model)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == {id(p) for p in trained.values()}
    rates = {name: groups[id(p)]["lr"] for name, p in trained.items()}
    assert rates["decode_head.weight"] == 1
    assert [rates[f"backbone.layers.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**k for k in (4, 3, 2, 1)]
    assert rates["backbone.patch_embed.proj.weight"] == rates["backbone.pos_embed"] == 0.5**5
    without_decay = {name for name, p in trained.items() if groups[id(p)]["weight_decay"] == 0}
    assert without_decay == {
        name for name, p in trained.items() if p.ndim == 1 or name.endswith(("pos_embed", "cls_token"))
    }
