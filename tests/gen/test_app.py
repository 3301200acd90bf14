"""`addp app`: what the buttons of the page do, and that it is served to this machine alone by default."""

import socket

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_addp

from addp_core import sample, save_model
from addp_core.base.errors import UserError

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'addp[app]'")
app, page = pytest.importorskip("gen.app"), pytest.importorskip("gen.page")
HW = (8, 12)
SAMPLING = (3, "cosine", 6.0, 1.0, 0, "confidence")


@pytest.fixture
def actions():
    model = tiny_addp(HW)
    model.predictor = None
    return page.PageActions(model, page.Limits(images=3, steps=5, pixels=2000))


def test_generate_yields_every_step_and_ends_with_the_sample(actions):
    steps = list(actions.generate(2, 4, *SAMPLING))
    assert [len(images) for images in steps] == [2, 2, 2]
    expected = sample(actions.model, 2, 3, seed=4).permute(0, 2, 3, 1).mul(255).byte().numpy()
    assert all((np.array(image) == pixels).all() for image, pixels in zip(steps[-1], expected, strict=True))


def test_painted_pixels_are_filled_and_the_others_are_unchanged(actions):
    background = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8))
    stroke = np.zeros((*HW, 4), dtype=np.uint8)
    stroke[2:5, 3:8] = 255
    hole = stroke[..., 3] > 0
    editor_value = {"background": background, "layers": [Image.fromarray(stroke)], "composite": background}
    for image in actions.fill(editor_value, 2, 0, 4, *SAMPLING):
        assert (np.array(image)[~hole] == np.array(background)[~hole]).all()
        assert (np.array(image)[hole] != np.array(background)[hole]).any()


def test_limits(actions):
    with pytest.raises(gr.Error, match="images: 4; expected 1 to 3"):
        next(actions.generate(4, 0, *SAMPLING))
    with pytest.raises(gr.Error, match="steps: 6; expected 1 to 5"):
        next(actions.generate(1, 0, 6, *SAMPLING[1:]))
    with pytest.raises(gr.Error, match="Upload an image first"):
        actions.fill(None, 1, 0, 8, *SAMPLING)
    with pytest.raises(gr.Error, match="more than 2000 pixels"):
        actions.fill({"background": Image.new("RGB", (50, 50)), "layers": []}, 1, 0, 8, *SAMPLING)


@pytest.mark.parametrize(("keys", "host"), [({}, "127.0.0.1"), ({"host": "0.0.0.0"}, "0.0.0.0")])
def test_the_page_is_local_unless_host_says_otherwise(tmp_path, monkeypatch, keys, host):
    options = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **given: options.update(given))
    save_model(tiny_addp(HW), tmp_path / "model.safetensors")
    app.run(app.Recipe(model=str(tmp_path / "model.safetensors"), **keys))
    assert options["server_name"] == host
    assert options["share"] is False


def test_the_error_names_a_port_that_is_taken(tmp_path):
    save_model(tiny_addp(HW), tmp_path / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port: {port} at 127.0.0.1 is taken"):
            app.run(app.Recipe(model=str(tmp_path / "model.safetensors"), port=port))
