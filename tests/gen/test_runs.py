"""Runs in `addp app`: which are found, their curves as they grow, and their newest complete previews."""

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from addp_core.base.errors import UserError
from gen.runs import NO_RUN, RunsView, newest_previews, seen


def add_metrics(folder: Path, *lines: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def png(color: str, size: tuple[int, int] = (30, 20)) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", size, color).save(file, "png")
        return file.getvalue()


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs, of which b is newer, beside a folder that is none."""
    add_metrics(tmp_path / "runs" / "a", {"step": 10, "loss": 2.0, "epoch": 1.0}, {"step": 20, "loss": 1.0})
    add_metrics(tmp_path / "runs" / "deep" / "b", {"step": 5, "loss": 3.0, "top1": 50.0})
    os.utime(tmp_path / "runs" / "a" / "metrics.jsonl", (1e9, 1e9))
    (tmp_path / "runs" / "a" / "checkpoints" / "none").mkdir(parents=True)
    (tmp_path / "runs" / "images").mkdir()
    return tmp_path / "runs"


def test_runs_are_found_at_any_depth_the_newest_first(runs):
    assert list(RunsView([str(runs)]).find()) == ["runs/deep/b", "runs/a"]
    add_metrics(runs / "empty")  # written last, but there is nothing to draw
    assert list(RunsView([str(runs)]).find()) == ["runs/deep/b", "runs/a", "runs/empty"]
    assert list(RunsView([str(runs / "a")]).find()) == ["a"]
    other = add_metrics(runs.parent / "other" / "a", {"step": 1})
    assert set(RunsView([str(runs / "a"), str(other)]).find()) == {str(runs / "a"), str(other)}


def test_curves_of_all_runs_are_in_one_panel_for_each_metric(runs):
    view = RunsView([str(runs)])
    page = view.render(view.choose([]))
    assert page.count("image/svg+xml") == 2  # loss and top1, not the epoch
    assert "runs/a: step 20, written 2001-09-" in page
    assert "runs/deep/b: step 5, written" in page
    alone = view.render(view.choose(["runs/a"]))
    assert alone.count("image/svg+xml") == 1
    assert "runs/deep/b" not in alone


def test_what_a_run_adds_is_seen(runs):
    view = RunsView([str(runs)])
    before = seen(view.choose([]))
    assert seen(view.choose([])) == before
    add_metrics(runs / "a", {"step": 30, "loss": 0.5})
    after = seen(view.choose([]))
    assert after != before
    (runs / "a" / "images").mkdir()
    (runs / "a" / "images" / "sample-30.png").write_bytes(png("red"))
    assert seen(view.choose([])) != after
    (runs / "a" / "finished.json").write_text("{}")
    page = view.render(view.choose([]))
    assert "runs/a: step 30, finished" in page
    assert "runs/a: sample, step 30" in page


def test_the_newest_complete_preview_of_each_kind_is_shown(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in {
        "sample-9": png("red"),
        "sample-10": png("blue", (400, 20)),
        "sample-100": png("green")[:60],  # still being written
        "guess-9": b"",
        "curves": png("black"),
    }.items():
        (folder / f"{name}.png").write_bytes(content)
    (preview,) = newest_previews("a", tmp_path)
    assert (preview.caption, preview.width) == ("a: sample, step 10", 400)


def test_without_a_run_the_page_says_so(tmp_path):
    view = RunsView([str(tmp_path)])
    assert NO_RUN in view.render(view.choose([]))
    with pytest.raises(UserError, match=r"runs: .*nowhere is not a folder"):
        RunsView([str(tmp_path / "nowhere")])
