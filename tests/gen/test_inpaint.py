"""`addp inpaint`: pixels outside the hole stay bit for bit, whatever the hole; errors name the key."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_addp

from addp_core import load_addp, sample, save_model
from addp_core.recipes.cli import main
from gen.image_folder import write_image

HW = (8, 12)  # of the model's images; a token spans 2 x 2 pixels


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save_model(tiny_addp(HW), root / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, hw in (("same", HW), ("tall", (20, 6)), ("odd", (9, 12)), ("large", (40, 60))):
        Image.fromarray(rng.integers(0, 256, (*hw, 3), dtype=np.uint8)).save(root / f"{name}.png")
    return root


def inpaint_command(inputs: Path, out: Path, *settings: str) -> list[str]:
    keys = {
        "model": inputs / "model.safetensors",
        "image": inputs / "same.png",
        "out": out,
        "n": 2,
        "sampling.steps": 3,
    }
    keys |= dict(setting.split("=", 1) for setting in settings)
    return ["inpaint", *(f"{key}={value}" for key, value in keys.items())]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def write_mask(path: Path, hole: np.ndarray, mode: str = "L") -> Path:
    Image.fromarray(np.where(hole, 255, 0).astype(np.uint8)).convert(mode).save(path)
    return path


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_hole_of_a_turned_photograph_is_where_it_is_seen(inputs, tmp_path, orientation):
    """A camera that was turned says so in the file; `size` must not turn the upright image again."""
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:4, :4] = 255  # in a corner
    turned = {3: np.rot90(upright, 2), 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = tmp_path / "photo.png"
    Image.fromarray(turned).save(photo, exif=exif)
    settings = [f"image={photo}", "box=[12,8,24,16]", "size=[8,12]", "n=1"]
    assert main(inpaint_command(inputs, tmp_path / "out", *settings)) == 0
    kept = pixels(tmp_path / "out" / "input.png")
    assert kept[0, 0].min() > 200
    assert kept[:4, 4:].max() < 50
    assert kept[5:, :6].max() < 50


def test_pixels_outside_the_hole_are_unchanged_and_variations_differ(inputs, tmp_path):
    hole = np.zeros(HW, dtype=bool)
    hole[1:6, 3:9] = True
    mask = write_mask(tmp_path / "mask.png", hole)
    assert main(inpaint_command(inputs, tmp_path / "out", f"mask={mask}", "n=3")) == 0
    before = pixels(inputs / "same.png")
    variations = [pixels(tmp_path / "out" / f"{i:06d}.png") for i in range(3)]
    for image in variations:
        assert (image[~hole] == before[~hole]).all()
        assert (image[hole] != before[hole]).any()
    assert (variations[0] != variations[1]).any()
    assert ((pixels(tmp_path / "out" / "mask.png")[..., 0] > 0) == hole).all()
    assert (pixels(tmp_path / "out" / "input.png")[hole] == 127).all()
    assert pixels(tmp_path / "out" / "grid.png").shape[1] > 4 * HW[1]
    # the same hole as a box, and as what lies outside a mask
    assert main(inpaint_command(inputs, tmp_path / "box", "box=[3,1,9,6]", "n=3")) == 0
    outside = write_mask(tmp_path / "outside.png", ~hole, "RGB")
    assert main(inpaint_command(inputs, tmp_path / "not", f"mask={outside}", "outside=true", "n=3")) == 0
    for folder in ("box", "not"):
        assert all((pixels(tmp_path / folder / f"{i:06d}.png") == variations[i]).all() for i in range(3))
    # another seed gives another variation
    assert main(inpaint_command(inputs, tmp_path / "seed", f"mask={mask}", "seed=1", "n=1")) == 0
    assert (pixels(tmp_path / "seed" / "000000.png") != variations[0]).any()


def test_a_thin_stroke_on_a_large_image_is_filled(inputs, tmp_path):
    hole = np.zeros((40, 60), dtype=bool)
    hole[:, [1, 23, 47]] = True
    mask = write_mask(tmp_path / "mask.png", hole)
    settings = [f"image={inputs / 'large.png'}", f"mask={mask}", "size=[8,12]", "n=1"]
    assert main(inpaint_command(inputs, tmp_path / "out", *settings)) == 0
    filled = pixels(tmp_path / "out" / "mask.png")[..., 0] > 0
    assert filled[:, [0, 4, 9]].all()
    assert filled.sum() == 3 * 8


@pytest.mark.parametrize("name", ["input.png", "mask.png", "000001.png"])
def test_what_is_read_is_not_overwritten(inputs, tmp_path, expect_user_error, name):
    path = tmp_path / name
    path.write_bytes((inputs / "same.png").read_bytes())
    before = path.read_bytes()
    for key in ("image", "mask"):
        settings = [f"{key}={path}"] + (["box=[2,2,4,4]"] if key == "image" else [])
        expect_user_error(inpaint_command(inputs, tmp_path, *settings), f"{key}: {path} would be overwritten")
    assert path.read_bytes() == before


def test_an_empty_hole_returns_the_image(inputs, tmp_path, capsys):
    mask = write_mask(tmp_path / "mask.png", np.zeros(HW, dtype=bool))
    assert main(inpaint_command(inputs, tmp_path / "out", f"mask={mask}")) == 0
    for name in ("000000.png", "000001.png", "input.png"):
        assert (pixels(tmp_path / "out" / name) == pixels(inputs / "same.png")).all()
    assert "the hole is empty" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", [{}, {"order": "halton", "top_k": 3}])
def test_a_hole_over_the_whole_image_equals_generation(inputs, tmp_path, sampling):
    settings = [f"sampling.{key}={value}" for key, value in sampling.items()]
    assert main(inpaint_command(inputs, tmp_path / "out", "box=[0,0,12,8]", "seed=4", *settings)) == 0
    generated = sample(load_addp(inputs / "model.safetensors").eval(), 2, steps=3, seed=4, batch=1, **sampling)
    for i, image in enumerate(generated):
        write_image(image, tmp_path / "generated.png")
        assert (pixels(tmp_path / "out" / f"{i:06d}.png") == pixels(tmp_path / "generated.png")).all()


@pytest.mark.parametrize(
    ("keys", "shape", "kept"),
    [
        (["extend=[4,2,6,0]"], (10, 22), (slice(2, 10), slice(4, 16))),  # outpainting
        (["box=[4,2,8,6]", "outside=true"], HW, (slice(2, 6), slice(4, 8))),  # uncropping
        (["box=[4,2,8,6]", "outside=true", "extend=[0,0,2,2]"], (10, 14), (slice(2, 6), slice(4, 8))),
    ],
)
def test_outpainting_and_uncropping(inputs, tmp_path, keys, shape, kept):
    assert main(inpaint_command(inputs, tmp_path / "out", *keys)) == 0
    filled, before = pixels(tmp_path / "out" / "000000.png"), pixels(inputs / "same.png")
    assert filled.shape[:2] == shape
    inside = before if "extend" in keys[0] else before[2:6, 4:8]
    assert (filled[kept] == inside).all()
    white = pixels(tmp_path / "out" / "mask.png")[..., 0] > 0
    assert not white[kept].any()
    assert (~white).sum() == inside.shape[0] * inside.shape[1]


def test_images_of_any_size_that_the_patches_tile(inputs, tmp_path, capsys):
    arguments = inpaint_command(inputs, tmp_path / "tall", f"image={inputs / 'tall.png'}", "box=[0,4,6,12]")
    assert main(arguments) == 0
    filled, before = pixels(tmp_path / "tall" / "000000.png"), pixels(inputs / "tall.png")
    assert (filled[:4] == before[:4]).all()
    assert (filled[12:] == before[12:]).all()
    assert (
        main(inpaint_command(inputs, tmp_path / "large", f"image={inputs / 'large.png'}", "box=[0,0,9,9]", "n=1")) == 0
    )
    assert "600 tokens, but the model was trained on 24" in capsys.readouterr().err
    resized = inpaint_command(
        inputs, tmp_path / "small", f"image={inputs / 'large.png'}", "box=[0,0,30,40]", "size=[8,12]"
    )
    assert main(resized) == 0
    white = pixels(tmp_path / "small" / "mask.png")[..., 0] > 0
    assert white[:, :6].all()
    assert not white[:, 6:].any()


def test_the_seam_is_blended_over_the_requested_width(inputs, tmp_path):
    for blend in (0, 3):
        assert main(inpaint_command(inputs, tmp_path / str(blend), "box=[6,0,12,8]", f"blend={blend}", "n=1")) == 0
    plain, blended = (pixels(tmp_path / str(blend) / "000000.png").astype(int) for blend in (0, 3))
    changed = np.abs(plain - blended).max((0, 2)) > 0
    assert changed.tolist() == [False] * 6 + [True] * 3 + [False] * 3


def test_errors_name_the_key(inputs, tmp_path, expect_user_error):
    out = tmp_path / "out"
    mask = write_mask(tmp_path / "mask.png", np.ones((9, 12), dtype=bool))
    expect_user_error(inpaint_command(inputs, out, f"mask={mask}"), "12 x 9 pixels", "12 x 8", "expected the same size")
    expect_user_error(inpaint_command(inputs, out), "mask, box, extend: expected at least one")
    expect_user_error(
        inpaint_command(inputs, out, "box=[0,0,13,8]"), "box: found [0, 0, 13, 8]", "0 to 12 across and 0 to 8 down"
    )
    expect_user_error(inpaint_command(inputs, out, "box=[4,0,2,8]"), "box:")
    expect_user_error(inpaint_command(inputs, out, "box=[4,0,2]"), "box", "expected a list of 4")
    expect_user_error(inpaint_command(inputs, out, "extend=[-2,0,0,0]"), "extend", ">= 0")
    expect_user_error(inpaint_command(inputs, out, "box=[0,0,2,2]", "n=0"), "n", ">= 1")
    expect_user_error(
        inpaint_command(inputs, out, "box=[0,0,2,2]", f"image={inputs / 'odd.png'}"),
        "12 x 9",
        "multiples of 2",
        "12 x 8",
    )
    expect_user_error(
        inpaint_command(inputs, out, "box=[0,0,2,2]", f"image={inputs / 'none.png'}"), "image:", "none.png"
    )
    (tmp_path / "broken.png").write_bytes((inputs / "same.png").read_bytes()[:80])
    expect_user_error(
        inpaint_command(inputs, out, "box=[0,0,2,2]", f"image={tmp_path / 'broken.png'}"), "image:", "broken.png"
    )
    expect_user_error(inpaint_command(inputs, out, f"mask={tmp_path / 'broken.png'}"), "mask:", "broken.png")
    assert not out.exists()
    assert main(inpaint_command(inputs, out, "box=[0,0,2,2]", "n=1")) == 0
    expect_user_error(inpaint_command(inputs, out, "box=[0,0,2,4]"), "holds images made with box=(0, 0, 2, 2)")


def test_a_hole_that_the_crop_drops_is_said(inputs, tmp_path, capsys, expect_user_error):
    """size=8 keeps the central 40 pixels of 60."""
    square = [f"image={inputs / 'large.png'}", "size=[8,8]"]
    expect_user_error(
        inpaint_command(inputs, tmp_path / "out", *square, "box=[52,0,60,40]"),
        "mask, box: what they select lies outside the central part that size= keeps, 10 to 50 across and 0 to 40 down",
    )
    assert main(inpaint_command(inputs, tmp_path / "half", *square, "box=[40,0,60,40]")) == 0
    assert "50 % of the hole lies outside the central part" in capsys.readouterr().err
    uncropping = inpaint_command(inputs, tmp_path / "uncropped", *square, "box=[20,0,40,40]", "outside=true")
    assert main(uncropping) == 0
    assert "lies outside" not in capsys.readouterr().err
