"""`addp app`: what the buttons of the page do, and that nobody else reaches it unless that is said."""

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
def studio():
    model = tiny_addp(HW)
    model.predictor = None
    return page.Studio(model, app.Recipe(model="tiny", max_n=3, max_steps=5, max_pixels=2000))


def test_every_step_is_shown_and_the_last_one_is_the_image(studio):
    steps = list(studio.generate(2, 4, *SAMPLING))
    assert [len(images) for images in steps] == [2, 2, 2]
    plain = sample(studio.model, 2, 3, seed=4).permute(0, 2, 3, 1).mul(255).byte().numpy()
    assert all((np.array(image) == want).all() for image, want in zip(steps[-1], plain, strict=True))


def test_what_is_painted_is_filled_and_the_rest_is_kept(studio):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8))
    stroke = np.zeros((*HW, 4), dtype=np.uint8)
    stroke[2:5, 3:8] = 255
    hole = stroke[..., 3] > 0
    drawn = {"background": picture, "layers": [Image.fromarray(stroke)], "composite": picture}
    for image in studio.fill(drawn, 2, 0, 4, *SAMPLING):
        assert (np.array(image)[~hole] == np.array(picture)[~hole]).all()
        assert (np.array(image)[hole] != np.array(picture)[hole]).any()


def test_limits(studio):
    with pytest.raises(gr.Error, match="images: 4; expected 1 to 3"):
        next(studio.generate(4, 0, *SAMPLING))
    with pytest.raises(gr.Error, match="steps: 6; expected 1 to 5"):
        next(studio.generate(1, 0, 6, *SAMPLING[1:]))
    with pytest.raises(gr.Error, match="Upload a picture first"):
        studio.fill(None, 1, 0, 8, *SAMPLING)
    with pytest.raises(gr.Error, match="more than 2000 pixels"):
        studio.fill({"background": Image.new("RGB", (50, 50)), "layers": []}, 1, 0, 8, *SAMPLING)


@pytest.mark.parametrize(("keys", "host"), [({}, "127.0.0.1"), ({"host": "0.0.0.0"}, "0.0.0.0")])
def test_only_this_machine_is_answered_unless_told(tmp_path, monkeypatch, keys, host):
    said = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: said.update(options))
    save_model(tiny_addp(HW), tmp_path / "model.safetensors")
    app.run(app.Recipe(model=str(tmp_path / "model.safetensors"), **keys))
    assert said["server_name"] == host
    assert said["share"] is False


def test_a_port_that_is_taken_is_named(tmp_path):
    save_model(tiny_addp(HW), tmp_path / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port: {port} at 127.0.0.1 is taken"):
            app.run(app.Recipe(model=str(tmp_path / "model.safetensors"), port=port))
