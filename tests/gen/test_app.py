"""`addp app`: the page displays errors, and is served to this machine alone by default."""

import asyncio
import socket

import pytest
from PIL import Image
from tiny import tiny_addp

from addp_core import save_model
from addp_core.base.errors import UserError

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'addp[app]'")
app, page = pytest.importorskip("gen.app"), pytest.importorskip("gen.page")
page_actions, uploads = pytest.importorskip("gen.page_actions"), pytest.importorskip("gen.uploads")
HW = (8, 12)
SAMPLING = (3, "cosine", 6.0, 1.0, 0, "confidence")
LIMITS = page_actions.Limits(images=3, steps=5, pixels=5000)


@pytest.fixture
def blocks():
    model = tiny_addp(HW)
    model.predictor = None
    return page.build_page(page.Actions(page_actions.PageActions(model, LIMITS)), "tiny")


def test_errors_are_displayed_and_leave_no_traceback_in_the_terminal():
    with pytest.raises(gr.Error, match="no image") as raised, page.displayed_errors():
        raise UserError("no image")
    assert raised.value.print_exception is False


@pytest.mark.parametrize("content", [b"a text", b"\x89PNG\r\n\x1a\nbroken", b""])
def test_an_upload_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "photo.png").write_bytes(content)
    file = gr.FileData(path=str(tmp_path / "photo.png"), orig_name="photo.png")
    payload = gr.components.image_editor.EditorData(background=file, layers=[], composite=None)
    with pytest.raises(gr.Error, match="cannot be read as an image") as raised:
        page.image_editor(LIMITS, HW).preprocess(payload)
    assert raised.value.print_exception is False


def test_a_truncated_upload_is_named(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "photo.png")
    (tmp_path / "photo.png").write_bytes((tmp_path / "photo.png").read_bytes()[:700])
    file = gr.FileData(path=str(tmp_path / "photo.png"), orig_name="photo.png")
    with pytest.raises(gr.Error, match="cannot be read as an image"):
        page.image_editor(LIMITS, HW).preprocess(gr.components.image_editor.EditorData(background=file))


def test_an_upload_that_is_too_large_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("RGB", (100, 60)).save(tmp_path / "photo.png")
    file = gr.FileData(path=str(tmp_path / "photo.png"), orig_name="photo.png")
    editor = page.image_editor(LIMITS, HW)
    with pytest.raises(gr.Error, match="100 x 60 pixels, expected at most 5000"):
        editor.preprocess(gr.components.image_editor.EditorData(background=file))
    # what the page itself sends
    blobs = gr.components.image_editor.EditorDataBlobs(
        background=(tmp_path / "photo.png").read_bytes(), layers=[], composite=None
    )
    editor.blob_storage["sent"] = blobs
    with pytest.raises(gr.Error, match="100 x 60 pixels, expected at most 5000"):
        editor.preprocess(gr.components.image_editor.EditorData(id="sent"))
    assert "sent" not in editor.blob_storage  # nothing of it stays in memory


def test_the_buttons_reach_the_actions(blocks):
    handlers = {function.name: function for function in blocks.fns.values()}
    assert {"begin", "generate", "fill", "stop", "leave"} <= set(handlers)
    request = gr.Request(session_hash="visitor")
    click, note = handlers["begin"].fn(request)
    assert note == page.WAITING
    results = list(handlers["generate"].fn(request, click, 1, 0, *SAMPLING))
    assert [text for _, text in results] == ["Step 1 of 3.", "Step 2 of 3.", "Step 3 of 3."]
    assert "data:image/png;base64," in results[-1][0]
    with pytest.raises(gr.Error, match="Upload an image first"):
        next(handlers["fill"].fn(request, click, None, 1, 0, 8, *SAMPLING))


@pytest.mark.parametrize("end", ["stop", "leave"])
def test_what_waits_is_stopped_too(blocks, end):
    handlers = {function.name: function for function in blocks.fns.values()}
    request = gr.Request(session_hash="visitor")
    click, _ = handlers["begin"].fn(request)
    assert handlers[end].fn(request) is None
    (result,) = handlers["generate"].fn(request, click, 1, 0, *SAMPLING)
    assert result[1] == page_actions.STOPPED_EARLY


def test_requests_are_bounded():
    """By the length that they state, and by what they send."""
    answers, read = [], []

    async def application(scope, receive, send):
        while (message := await receive())["type"] != "http.disconnect":
            read.append(message["body"])

    async def send(message):
        answers.append(message.get("status"))

    async def receive():
        return {"type": "http.request", "body": b"1234"}

    bounded = uploads.BoundedBodies(application, limit=10)
    asyncio.run(bounded({"type": "http", "headers": [(b"content-length", b"11")]}, receive, send))
    assert (answers[0], read) == (413, [])
    asyncio.run(bounded({"type": "http", "headers": []}, receive, send))
    assert read == [b"1234", b"1234"]


@pytest.mark.parametrize(("keys", "host"), [({}, "127.0.0.1"), ({"host": "0.0.0.0"}, "0.0.0.0")])
def test_the_page_is_local_unless_host_says_otherwise(tmp_path, monkeypatch, keys, host):
    options = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **given: options.update(given))
    save_model(tiny_addp(HW), tmp_path / "model.safetensors")
    app.run(app.Recipe(model=str(tmp_path / "model.safetensors"), **keys))
    assert options["server_name"] == host
    assert options["share"] is False
    assert options["max_file_size"] == "20mb"


def test_the_error_names_a_port_that_is_taken(tmp_path):
    save_model(tiny_addp(HW), tmp_path / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port: {port} at 127.0.0.1 is taken"):
            app.run(app.Recipe(model=str(tmp_path / "model.safetensors"), port=port))
