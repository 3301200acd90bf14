"""What `addp app` shows of an uploaded image: features, attention and neighbors; and what uploads it refuses."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_addp

from addp_core import load_encoder, save_model
from addp_core.base.errors import UserError
from gen.app import open_actions
from gen.page_actions import Result
from gen.page_features import FeatureActions
from gen.recipe import AppRecipe
from gen.uploads import open_upload

HW = (8, 12)
PIXELS = 3000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with an ADDP model, a CNN, and photos/ (twenty reddish and twenty bluish images, and no image)."""
    root = tmp_path_factory.mktemp("inputs")
    save_model(tiny_addp(HW), root / "model.safetensors")
    save_model(load_encoder("resnet18", 64, init="random"), root / "cnn.safetensors")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        image = rng.integers(0, 40, (40, 60, 3), dtype=np.uint8)
        image[..., 2 * (i % 2)] += 180
        Image.fromarray(image).save(root / "photos" / f"{i:02d}.png")
    (root / "photos" / "99.png").write_bytes(b"no image")
    return root


def actions_of(inputs: Path, model: str = "model", **keys) -> FeatureActions:
    _, features, _ = open_actions(AppRecipe(model=str(inputs / f"{model}.safetensors"), max_pixels=PIXELS, **keys))
    assert features is not None
    return features


def always() -> bool:
    return True


def titles(result: Result) -> list[str]:
    return [section.title.split(":")[0].split(",")[0] for section in result.sections or []]


def test_features_attention_and_neighbors_are_shown(inputs):
    actions = actions_of(inputs, data=str(inputs / "photos"), pool=100)
    results = list(actions.describe(always, str(inputs / "photos" / "01.png")))
    features, attention, neighbors = results[-1].sections
    assert titles(results[-1]) == ["patch features", "attention of the class token", "nearest of 40 images"]
    assert [tile.caption for tile in features.tiles] == ["image", "block 1", "block 2"]
    assert len(attention.tiles) == 2
    captions = [tile.caption for tile in neighbors.tiles]
    assert captions[0] == "1.00, photos/01.png"
    assert all(int(caption[-6:-4]) % 2 for caption in captions)  # bluish, too
    assert "Reading the images of data: 32 of 41." in results[1].note
    # The features of the images are there now.
    assert len(list(actions.describe(always, str(inputs / "photos" / "01.png")))) == 2


def test_reading_the_images_can_be_stopped_and_goes_on_later(inputs):
    actions = actions_of(inputs, data=str(inputs / "photos"), pool=100)
    answers = iter([True, False])
    *_, last = actions.describe(lambda: next(answers), str(inputs / "photos" / "00.png"))
    assert "Stopped: the features of 32 of 41 images are there." in last.note
    *_, reading, last = actions.describe(always, str(inputs / "photos" / "00.png"))
    assert "40 of 40" in reading.note
    assert titles(last)[-1] == "nearest of 40 images"


def test_any_encoder_has_the_features_and_says_what_it_lacks(inputs):
    actions = actions_of(inputs, "cnn")
    shown, last = actions.describe(always, str(inputs / "photos" / "00.png"))
    assert titles(shown) == ["patch features"]
    assert "Attention is not shown: there is no class token" in shown.note
    assert "Start the app with data=<images>" in last.note


def png_header(width: int, height: int) -> bytes:
    """Return the beginning of a PNG file of this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\x09IDAT"
    )


def test_bad_uploads_are_one_clear_line(inputs, tmp_path):
    actions = actions_of(inputs)
    with io.BytesIO() as file:
        Image.effect_noise((50, 50), 90).save(file, "png")
        truncated = file.getvalue()[:700]
    for content, message in {
        b"": "cannot be read as an image",
        b"a text": "cannot be read as an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n": "cannot be read as an image",
        truncated: "cannot be read as an image",
        png_header(60, 60): "The image has 60 x 60 pixels, expected at most 3000 in all: upload a smaller one",
        png_header(60_000, 60_000): "far too many pixels, expected at most 3000 in all: upload a smaller one",
    }.items():
        (tmp_path / "upload.png").write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            next(actions.describe(always, str(tmp_path / "upload.png")))
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="Upload an image first"):
        next(actions.describe(always, None))
    assert open_upload(png_header(30, 50), PIXELS).width == 30


def test_the_app_needs_a_model_or_runs(inputs, tmp_path):
    with pytest.raises(UserError, match="model: not given; expected a model, or runs="):
        open_actions(AppRecipe())
    sampling, features, runs = open_actions(AppRecipe(runs=(str(tmp_path),)))
    assert (sampling, features) == (None, None)
    assert runs is not None
    with pytest.raises(UserError, match="data: "):
        actions_of(inputs, data=str(tmp_path / "nowhere"))
