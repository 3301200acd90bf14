"""Runs that continue after their folder, their data or their files have moved, and other inputs, which are refused."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from ranks import group_environment

from addp_core.base.errors import UserError
from addp_core.base.paths import CachePath, DatasetPath, FilePath
from addp_core.data.sources import open_source
from addp_core.training.run_folder import mark_finished, prepare_out, release_out
from addp_core.training.stage import TrainConfig


@dataclass
class Recipe:
    out: str
    data: Annotated[DatasetPath, "images"] = "photos"
    val: Annotated[DatasetPath | None, "other images"] = None
    model: Annotated[FilePath, "pretrained encoder"] = "encoder.pth"
    cache: Annotated[CachePath, "features"] = ""
    note: str = "text"
    train: TrainConfig = field(default_factory=TrainConfig)

    def datasets(self):
        return {"train": open_source(self.data), "val": open_source(self.val or self.data)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with images and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(4):
        (Path("photos") / f"{i}.png").write_bytes(b"-" * i)
    Path("encoder.pth").write_bytes(b"weights")
    return tmp_path


def prepare(recipe: Recipe, record: bool = True) -> Path | None:
    """Prepare the run folder as a verb does. Without `record`, leave no inputs.json, as older versions did."""
    try:
        return prepare_out(recipe.out, recipe, recipe.datasets if record else None)
    finally:
        release_out(recipe.out)


def begin(recipe: Recipe, record: bool = True) -> None:
    """Begin a run and write its first checkpoint."""
    assert prepare(recipe, record) is None
    (Path(recipe.out) / "checkpoints/step-1").mkdir()


def finish(recipe: Recipe, record: bool = True) -> None:
    begin(recipe, record)
    (Path(recipe.out) / "model.safetensors").touch()
    mark_finished(Path(recipe.out), recipe, {"step": 1})


@pytest.mark.parametrize("record", [True, False])
def test_another_spelling_of_a_path_is_the_same(record, here, monkeypatch):
    os.symlink("photos", "link")
    begin(Recipe("run"), record)
    for data in ("photos/", "./photos", str(here / "photos"), "link"):
        assert prepare(Recipe("./run", data), record) is None
    assert prepare(Recipe(str(here / "run"), model="./encoder.pth", cache="elsewhere"), record) is None
    with pytest.raises(UserError, match=r"another recipe: note=./text \(was text\);"):
        prepare(Recipe("run", note="./text"), record)
    if record:  # otherwise nobody knows where relative paths began
        monkeypatch.chdir(here / "photos")
        assert prepare(Recipe("../run", "../photos", model="../encoder.pth"), record) is None


def test_a_finished_run_of_a_version_that_recorded_less_is_known_after_its_data_moved():
    finish(Recipe("run", "photos", "photos"))
    record = json.loads(Path("run/inputs.json").read_text())
    del record["datasets"]["val"]
    Path("run/inputs.json").write_text(json.dumps(record))
    shutil.move("photos", "scratch")
    assert prepare(Recipe("run", "scratch", "scratch")) == Path("run/model.safetensors")


def test_moved_data_and_files_are_told_by_their_content(caplog):
    begin(Recipe("run"))
    shutil.move("photos", "scratch")
    shutil.move("encoder.pth", "copy.pth")
    assert prepare(Recipe("run", "scratch", model="copy.pth")) is None
    assert "scratch instead of" in caplog.text
    assert "with the same images" in caplog.text
    caplog.clear()
    assert prepare(Recipe("run", "scratch", "scratch", model="copy.pth")) is None  # val, which was data, by name

    Path("other.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"another recipe: model=other.pth \(was copy.pth\);"):
        prepare(Recipe("run", "scratch", model="other.pth"))
    shutil.copytree("scratch", "more")
    (Path("more") / "new.png").touch()
    for _ in range(2):  # the refused path is not recorded
        with pytest.raises(
            UserError, match=r"run on other data: data=.*more .was .*scratch.; train: 5 images instead of 4"
        ):
            prepare(Recipe("run", "more", "scratch", model="copy.pth"))
    assert prepare(Recipe("run", "scratch", "scratch", model="copy.pth")) is None


def test_images_that_were_added_or_replaced_are_logged(caplog):
    begin(Recipe("run"))
    (Path("photos") / "new.png").touch()
    assert prepare(Recipe("run")) is None
    assert (
        "changed since this run last read it: train: 5 images instead of 4; val: 5 images instead of 4" in caplog.text
    )
    caplog.clear()
    assert prepare(Recipe("run")) is None
    assert "changed" not in caplog.text
    os.rename("photos/new.png", "photos/newer.png")
    assert prepare(Recipe("run")) is None
    assert "train: 5 images as before, but others" in caplog.text


def test_a_finished_run_stays_finished_when_its_data_move(monkeypatch):
    finish(Recipe("run"))
    model = Path("run/model.safetensors")
    shutil.move("photos", "scratch")
    for rank in (0, 1):
        for name, value in group_environment(rank, 2, port=1).items():
            monkeypatch.setenv(name, value)
        assert prepare(Recipe("run", "scratch")) == model
        assert prepare(Recipe("run", "scratch", note="other")) is None if rank == 1 else True
    monkeypatch.setenv("RANK", "0")
    (Path("scratch") / "new.png").touch()
    with pytest.raises(UserError, match="run on other data"):
        prepare(Recipe("run", "scratch"))


@pytest.mark.parametrize("record", [True, False])
def test_a_moved_run_finds_the_earlier_stage_inside_it(record):
    Path("run/tokenizer").mkdir(parents=True)
    Path("run/tokenizer/model.safetensors").write_bytes(b"tokenizer")
    finish(Recipe("run/predictor", model="run/tokenizer/model.safetensors"), record)
    shutil.move("run", "run2")
    moved = Recipe("run2/predictor", model="run2/tokenizer/model.safetensors")
    assert prepare(moved, record) == Path("run2/predictor/model.safetensors")
    with pytest.raises(UserError, match=r"another recipe: model=encoder\.pth"):
        prepare(Recipe("run2/predictor", model="encoder.pth"), record)


def test_a_run_whose_checkpoints_were_deleted_does_not_start_again():
    longer = Recipe("run", train=TrainConfig(steps=9))
    finish(Recipe("run"))
    shutil.rmtree("run/checkpoints")
    assert prepare(Recipe("run")) == Path("run/model.safetensors")
    with pytest.raises(UserError, match="holds a run that has finished, but its checkpoints have been deleted"):
        prepare(longer)

    begin(Recipe("stopped"))
    (Path("stopped") / "last_checkpoint.json").write_text(json.dumps({"step": 1}))
    shutil.rmtree("stopped/checkpoints")
    with pytest.raises(UserError, match="holds a run that was stopped, but its checkpoints have been deleted"):
        prepare(Recipe("stopped"))

    assert prepare(Recipe("killed")) is None  # before its first checkpoint
    assert prepare(Recipe("killed", note="corrected")) is None
