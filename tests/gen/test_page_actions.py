"""What the buttons of `addp app` do, without its page: generating, filling, stopping, and errors of the visitor."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_addp

from addp_core import sample
from addp_core.base.errors import UserError
from gen.page_actions import STOPPED_EARLY, Clicks, Limits, PageActions, Result

HW = (8, 12)
SAMPLING = (3, "cosine", 6.0, 1.0, 0, "confidence")


@pytest.fixture
def actions() -> PageActions:
    model = tiny_addp(HW)
    model.predictor = None
    return PageActions(model, Limits(images=3, steps=5, pixels=2000))


def photograph(height: int = HW[0], width: int = HW[1]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def always() -> bool:
    return True


def images_of(result: Result) -> list[np.ndarray]:
    """Return the images of the first section."""
    assert result.sections is not None
    return [np.array(Image.open(io.BytesIO(tile.content))) for tile in result.sections[0].tiles]


def for_checks(count: int) -> Callable[[], bool]:
    """Return what says that a result is wanted this many times, and then no longer."""
    answers = iter([True] * count)
    return lambda: next(answers, False)


def editor_value(image: Image.Image | None, *boxes: tuple[int, int, int, int]) -> dict:
    """Return what the editor gives: an image, and a layer with one painted box (left, top, right, bottom) for each."""
    layers = []
    for left, top, right, bottom in boxes:
        stroke = np.zeros((*(image or photograph()).size[::-1], 4), dtype=np.uint8)
        stroke[top:bottom, left:right] = 255
        layers.append(Image.fromarray(stroke))
    return {"background": image, "layers": layers, "composite": image}


def test_generate_yields_every_step_and_ends_with_the_sample(actions):
    steps = list(actions.generate(always, 2, 4, *SAMPLING))
    assert [len(images_of(step)) for step in steps] == [2, 2, 2]
    assert steps[-1].note == "Step 3 of 3."
    expected = sample(actions.model, 2, 3, seed=4).permute(0, 2, 3, 1).mul(255).byte().numpy()
    assert all((image == pixels).all() for image, pixels in zip(images_of(steps[-1]), expected, strict=True))


def test_the_last_result_shows_the_steps_of_each_image(actions):
    *_, before, last = actions.generate(always, 2, 4, *SAMPLING)
    assert len(before.sections) == 1
    _, first, second = last.sections
    assert second.title.startswith("image 1, step by step")
    assert [tile.caption.split(",")[0] for tile in first.tiles] == ["step 1", "step 2", "step 3"]
    assert first.tiles[-1].caption == "step 3, 4% unreliable"
    assert first.tiles[0].width == HW[1]
    final = np.array(Image.open(io.BytesIO(first.tiles[-1].content)))
    assert (final[: HW[0]] == images_of(last)[0]).all()


def test_painted_pixels_are_filled_and_the_others_are_unchanged(actions):
    image = photograph()
    hole = np.zeros(HW, dtype=bool)
    hole[2:5, 3:8] = True
    *_, last = actions.fill(always, editor_value(image, (3, 2, 8, 5)), 2, 0, 4, *SAMPLING)
    assert (len(images_of(last)), last.note) == (2, "Step 3 of 3.")
    for variation in images_of(last):
        assert (variation[~hole] == np.array(image)[~hole]).all()
        assert (variation[hole] != np.array(image)[hole]).any()


@pytest.mark.parametrize("box", [(0, 2, 3, 5), (37, 0, 40, 8), (20, 3, 21, 4)])
def test_the_crop_covers_what_is_painted_wherever_it_is(actions, box):
    """The image is far wider than the model's: what lies outside the central crop is filled, not dropped."""
    image = photograph(8, 40)
    _, hole, note = actions.read_editor(editor_value(image, box))
    assert int(hole.sum()) == (box[2] - box[0]) * (box[3] - box[1])
    assert "this is the part of the image from (" in note
    *_, last = actions.fill(always, editor_value(image, box), 1, 0, 0, *SAMPLING)
    left = int(last.note.partition("from (")[2].partition(",")[0])
    part = np.array(image)[:, left : left + HW[1]]
    changed = (images_of(last)[0] != part).any(-1)
    assert changed.any()
    assert not changed[~hole.numpy()].any()


def test_a_thin_stroke_on_a_large_image_is_filled(actions):
    actions.limits = Limits(images=1, steps=5, pixels=10**6)
    _, hole, _ = actions.read_editor(editor_value(photograph(400, 600), (301, 0, 302, 400)))
    assert hole.any(0).sum() == 1
    assert hole.any(1).all()


def test_what_cannot_be_filled_is_an_error_that_says_so(actions):
    def fails(value: dict | None, message: str) -> None:
        with pytest.raises(UserError, match=message):
            next(actions.fill(always, value, 1, 0, 8, *SAMPLING))

    fails(None, "Upload an image first")
    fails({"background": None, "layers": []}, "Upload an image first")
    blank = Image.new("RGBA", (12, 8))
    fails(editor_value(blank, (1, 1, 3, 3)), "Upload an image first")  # painted on the empty canvas
    fails(editor_value(photograph()), "nothing is painted yet")
    fails(editor_value(photograph(), (2, 2, 2, 2)), "nothing is painted yet")
    fails(editor_value(photograph(8, 40), (0, 0, 2, 2), (36, 0, 38, 2)), "38 pixels wide.* can see 12 x 8 of this")
    fails(editor_value(photograph(50, 50), (1, 1, 3, 3)), "50 x 50 pixels, expected at most 2000")


@pytest.mark.parametrize(
    ("n", "seed", "sampling", "message"),
    [
        (4, 0, SAMPLING, "images: 4; expected 1 to 3"),
        (None, 0, SAMPLING, "images: empty; expected a number"),
        (1, None, SAMPLING, "seed: empty; expected a number"),
        (1, 0, (6, *SAMPLING[1:]), "steps: 6; expected 1 to 5"),
        (1, 0, (3, "cosine", float("nan"), *SAMPLING[3:]), "temperature: nan; expected a number"),
        (1, 0, (3, "cosine", 6.0, 2.0, *SAMPLING[4:]), "found 6.0, 2.0; expected >= 0 and in"),
    ],
)
def test_wrong_numbers(actions, n, seed, sampling, message):
    with pytest.raises(UserError, match=message):
        next(actions.generate(always, n, seed, *sampling))


@pytest.mark.parametrize("verb", ["generate", "fill"])
def test_sampling_ends_when_it_is_no_longer_wanted(actions, monkeypatch, verb):
    """No step is computed after that, and what is there is shown with its steps."""
    render, calls = actions.model.render, []
    monkeypatch.setattr(actions.model, "render", lambda *arguments: (calls.append(1), render(*arguments))[1])
    inputs = (1, 0, 5, *SAMPLING[1:]) if verb == "generate" else None
    inputs = inputs or (editor_value(photograph(), (0, 0, 12, 8)), 1, 0, 8, 5, *SAMPLING[1:])
    results = list(getattr(actions, verb)(for_checks(2), *inputs))
    assert [result.note for result in results] == ["Step 1 of 5.", "Step 2 of 5.", "Stopped after step 2 of 5."]
    assert [tile.caption.split(",")[0] for tile in results[-1].sections[1].tiles] == ["step 1", "step 2"]
    assert len(calls) == 2
    assert [result.note for result in getattr(actions, verb)(for_checks(0), *inputs)] == [STOPPED_EARLY]
    assert len(calls) == 2


def test_clicks_are_stopped_for_their_visitor_alone():
    clicks = Clicks()
    mine, other = clicks.begin("me"), clicks.begin("someone else")
    waiting = clicks.begin("me")
    clicks.stop("nobody")
    assert clicks.is_wanted("me", mine)
    clicks.stop("me")
    assert not clicks.is_wanted("me", mine)
    assert not clicks.is_wanted("me", waiting)
    assert clicks.is_wanted("someone else", other)
    again = clicks.begin("me")
    assert clicks.is_wanted("me", again)
    clicks.leave("me")
    assert not clicks.is_wanted("me", again)
    clicks.begin("me")  # the page is back
    assert not clicks.is_wanted("me", again)
