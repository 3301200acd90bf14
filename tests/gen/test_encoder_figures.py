"""`addp figures` of what an encoder sees, for ADDP and for any other encoder."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import tiny_addp

from addp_core import load_encoder, save_model
from addp_core.recipes.cli import main
from gen.drawing import principal_colors, write_contact_sheet
from gen.encoder_figures import Subject, attention_maps, class_attention, draw_neighbors
from gen.figures import Recipe, open_subject

HW = (8, 12)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with photos/ (three reddish and three bluish images), an ADDP model, a ViT and a CNN of timm."""
    root = tmp_path_factory.mktemp("inputs")
    save_model(tiny_addp(HW), root / "model.safetensors")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0)
    torch.save(vit.state_dict(), root / "vit.pth")
    save_model(load_encoder("resnet18", 64, init="random"), root / "cnn.safetensors")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        image = rng.integers(0, 40, (40, 40, 3), dtype=np.uint8)
        image[..., 2 * (i // 3)] += 180
        Image.fromarray(image).save(root / "photos" / f"{i}.png")
    return root


def subject_of(inputs: Path) -> Subject:
    model, data = str(inputs / "model.safetensors"), str(inputs / "photos")
    return open_subject(Recipe(model=model, out="", data=data, n=2, pool=6), "addp")


def drawn(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def test_the_attention_is_that_of_the_blocks(inputs):
    """The weights times the values, through the projection, are the class token's output of the attention."""
    subject = subject_of(inputs)
    images = subject.images(2)
    assert images.shape[2:] == HW  # the size of the file
    captured: dict = {}
    attention = subject.encoder.blocks[1].attn
    attention.qkv.register_forward_hook(lambda module, args, output: captured.update(qkv=output))
    attention.register_forward_hook(lambda module, args, output: captured.update(output=output))
    weights = class_attention(subject, images)[1]
    heads = weights.shape[1]
    values = captured["qkv"].chunk(3, -1)[2].unflatten(2, (heads, -1)).transpose(1, 2)
    own = 1 - weights.sum(-1, keepdim=True)
    mixed = torch.cat([own, weights], -1)[:, :, None] @ values
    expected = attention.proj(mixed.transpose(1, 2).flatten(2))[:, 0]
    torch.testing.assert_close(captured["output"][:, 0], expected, atol=1e-5, rtol=1e-5)


def test_neighbors_are_of_the_same_color(inputs):
    figure = draw_neighbors(subject_of(inputs))["neighbors"]
    axis = figure.get_axes()[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["image", *(f"neighbor {i}" for i in range(1, 6))]
    rows = np.asarray(axis.get_images()[0].get_array())
    height, width = rows.shape[0] // 2, rows.shape[1] // 6
    for row, channel in ((0, 0), (1, 2)):
        for column in range(3):  # the image and the two of its kind
            part = rows[row * height + 2 : (row + 1) * height - 2, column * width + 2 : (column + 1) * width - 2]
            assert part.reshape(-1, 3).mean(0).argmax() == channel


def test_colors_show_the_largest_components():
    features = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0)) * 1e-3
    features[:2, :, 3] += 1
    colors = principal_colors(features)
    assert colors.shape == (4, 9, 3)
    assert 0 <= colors.min() <= colors.max() <= 1
    assert (colors[:2, :, 0] - colors[2:, :, 0]).abs().min() > 0.9
    assert principal_colors(torch.randn(2, 2)).shape == (2, 3)


def test_any_encoder_has_the_figures_of_encoders(inputs, tmp_path, capsys):
    line = ["figures", f"data={inputs / 'photos'}", "n=2", "pool=4"]
    assert main([*line, f"model={inputs / 'vit.pth'}", "blocks=[1,-1]", f"out={tmp_path / 'vit'}"]) == 0
    assert drawn(tmp_path / "vit") == {"features", "attention", "neighbors", "contact"}
    assert main([*line, f"model={inputs / 'cnn.safetensors'}", f"out={tmp_path / 'cnn'}"]) == 0
    assert drawn(tmp_path / "cnn") == {"features", "neighbors", "contact"}
    assert "no attention: there is no class token in its attention" in capsys.readouterr().err


def test_errors_name_the_key(inputs, tmp_path, expect_user_error):
    line = ["figures", f"out={tmp_path}", f"model={inputs / 'vit.pth'}"]
    expect_user_error(line, "data: not given; expected images for features, attention, neighbors")
    line.append(f"data={inputs / 'photos'}")
    expect_user_error([*line, "only=[steps]"], "only: found steps, but", "is no ADDP checkpoint; expected")
    expect_user_error([*line, "blocks=[3]"], "blocks: found 3, expected 1 to 2")
    expect_user_error([*line, f"data={tmp_path / 'nowhere'}"], "addp: data: ", "does not exist")
    (tmp_path / "broken").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "broken" / name).write_text("no image")
    for name in ("features", "attention", "neighbors"):
        broken = [*line, f"data={tmp_path / 'broken'}", f"only=[{name}]"]
        expect_user_error(broken, "data: none of the 2 images tried can be read, such as", "0.png")
    cnn = [*line, f"model={inputs / 'cnn.safetensors'}", "only=[attention]"]
    expect_user_error(cnn, "only: no attention of", "there is no class token")


def test_attention_shows_in_dark_images_too(inputs):
    """A black image gets the colors of attention alone, a bright one the same ones over gray."""
    subject = subject_of(inputs)
    black, gray = (torch.full((1, 3, *HW), value) for value in (0.0, 0.5))
    maps = attention_maps(subject, torch.cat([black, gray]))
    assert [each.shape for each in maps] == [(2, 3, *HW)] * len(subject.blocks)
    for each in maps:
        assert each[0].amax() > 0.5  # the color of the largest weight
        assert each[1].mean() > each[0].mean()


def test_a_contact_sheet_scales_all_figures_by_one_factor(tmp_path):
    for name, size in (("wide", (800, 100)), ("narrow", (200, 100))):
        Image.new("RGB", size, "black").save(tmp_path / f"{name}.png")
    write_contact_sheet([tmp_path / "wide.png", tmp_path / "narrow.png"], tmp_path / "contact.png")
    dark = np.asarray(Image.open(tmp_path / "contact.png").convert("L")) < 128
    half = dark.shape[1] // 2
    assert dark[0, :half].sum() == pytest.approx(4 * dark[0, half:].sum(), rel=0.02)
    assert dark[:, 10].sum() == pytest.approx(dark[:, half + half // 2].sum(), abs=1)
