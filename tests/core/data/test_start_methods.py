"""Data workers under the start methods of processes that pickle what they are given: forkserver is the default of Linux
from Python 3.14 on, spawn that of macOS and Windows.
"""

import pickle
from pathlib import Path

import pytest
from checks import start_method
from image_data import concatenate, equal_rows, make_stream, noise_image, save_image, take_batches, write_shards

from addp_core.data.sources import ImageSource, open_source
from addp_core.data.stream import Stream


def make_source(kind: str, root: Path) -> ImageSource:
    if kind == "tar":
        write_shards(root)
    else:
        for i in range(6):
            save_image(root / "ab"[i % 2] / f"{i}.png", noise_image(20, 20, i))
    return open_source(str(root))


def streams(kind: str, root: Path) -> tuple[Stream, Stream]:
    """Two streams of the same batches, without workers and with one."""
    source, cache = make_source(kind, root), "ram" if kind == "cached" else "none"
    return make_stream(source, cache=cache, workers=0), make_stream(source, cache=cache, workers=1)


@pytest.mark.parametrize("kind", ["folder", "tar", "cached"])
def test_sources_and_transforms_can_be_pickled(kind, tmp_path):
    stream, _ = streams(kind, tmp_path)
    batches = take_batches(stream, 2)
    stream.source, stream.transform = pickle.loads(pickle.dumps((stream.source, stream.transform)))
    assert equal_rows(concatenate(take_batches(stream, 2)), concatenate(batches))


@pytest.mark.parametrize(
    ("method", "kind"), [("forkserver", "folder"), ("forkserver", "tar"), ("forkserver", "cached"), ("spawn", "tar")]
)
def test_workers_read_the_same_batches(method, kind, tmp_path):
    expected, stream = streams(kind, tmp_path)
    with start_method(method):
        batches = take_batches(stream, 2)
    assert equal_rows(concatenate(batches), concatenate(take_batches(expected, 2)))
