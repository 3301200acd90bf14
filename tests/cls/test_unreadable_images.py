"""`data.max_errors` is one count for all processes of a run, in training and in evaluation."""

import tarfile

import pytest
from ranks import assert_ends, run_ranks
from shard_server import serve
from transfers import NO_AUGMENTATION, write_color_images, write_tiny_checkpoint

from addp_core.data import remote
from addp_core.data.config import DataConfig
from addp_core.data.images import eval_transform
from addp_core.data.sources import open_source
from addp_core.data.stream import Stream
from addp_core.recipes.cli import main


@pytest.fixture
def images(tmp_path):
    write_color_images(tmp_path / "colors")
    return tmp_path / "colors"


def one_step(images, out, max_errors):
    """Return a fine-tuning of one step that reads all 48 training images, and then all 18 validation images."""
    return [
        *("finetune", f"data={images}", "data.size=8", "data.workers=0", f"out={out}", f"data.max_errors={max_errors}"),
        *(f"model={write_tiny_checkpoint(images)}", "train.batch=48", "train.steps=1", "train.warmup_steps=0"),
        *(f"{key}={value!r}" for key, value in NO_AUGMENTATION.items()),
    ]


def cut_off(images, split, index):
    """Leave only the first bytes of an image."""
    path = images / split / open_source(str(images), split).name(index)
    path.write_bytes(path.read_bytes()[:40])


def cut_off_one_for_each_process(images):
    """Cut off the first image that each of two processes reads in training."""
    stream = Stream(open_source(str(images), "train"), eval_transform(8), DataConfig(workers=0), seed=0, batch=48)
    for index in [int(next(stream.batches(0, rank, 2)).indices[0]) for rank in (0, 1)]:
        cut_off(images, "train", index)


def test_training_counts_the_images_of_all_processes(images, tmp_path):
    cut_off_one_for_each_process(images)
    ended = run_ranks(one_step(images, tmp_path / "run", 1), tmp_path / "job")
    assert_ends(ended, [2, 2], "data.max_errors: 2 of 48 images unreadable, 1 tolerated")


def test_evaluation_counts_the_images_of_all_processes(images, tmp_path):
    for index in (0, 1):
        cut_off(images, "val", index)
    ended = run_ranks(one_step(images, tmp_path / "run", 1), tmp_path / "job")
    assert_ends(ended, [2, 2], "data.max_errors: more than 1 of 18 images are unreadable")


def test_as_many_as_the_limit_are_tolerated(images, tmp_path):
    cut_off_one_for_each_process(images)
    for index in (0, 1):
        cut_off(images, "val", index)
    ended = run_ranks(one_step(images, tmp_path / "run", 2), tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    assert (tmp_path / "run" / "finished.json").exists()


def test_evaluation_ends_with_the_address_of_a_server_that_is_gone(images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    for split in ("train", "val"):
        with tarfile.open(images / f"colors-{split}.tar", "w") as tar:
            tar.add(images / split, ".")
    command = one_step(images, tmp_path / "run", 1)
    with serve(images) as server:
        command[1] = f"data={server.url}/colors-{{train,val}}.tar"
        command[3] = "data.workers=1"
        begun = tmp_path / "run" / "metrics.jsonl"
        server.fail = lambda request: 503 if "val" in request.name and begun.exists() else None
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"addp: data.source: {server.url}/colors-val.tar: HTTP 503")
        server.fail = lambda request: None
        assert main(command) == 0
