"""The stream of batches: order, augmentation, unreadable images and workers."""

import logging
import math
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_data import (
    QUICK,
    MemorySource,
    concatenate,
    encode,
    equal_rows,
    make_stream,
    memory_source,
    noise_image,
    save_image,
    take_batches,
)
from PIL import Image

from addp_core.base.errors import UserError
from addp_core.data.sources import open_source
from addp_core.data.stream import epoch_order


@QUICK
@given(st.integers(1, 9), st.integers(1, 7), st.data())
def test_ranks_share_the_batch_of_one_process(count, batch, data):
    world = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, 30))
    stream = make_stream(memory_source(count), batch)
    full = take_batches(stream, 2, start)
    parts = [take_batches(stream, 2, start, rank, world) for rank in range(world)]
    for step in range(2):
        assert equal_rows(concatenate([part[step] for part in parts]), concatenate([full[step]]))
    slices = [stream.rows_of(rank, world) for rank in range(world)]
    assert [row for each in slices for row in range(each.start, each.stop)] == list(range(batch))


@QUICK
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 12), st.integers(0, 3))
def test_starting_later_equals_skipping_batches(count, batch, start, seed):
    stream = make_stream(memory_source(count), batch, seed)
    assert equal_rows(concatenate(take_batches(stream, 2, start)), concatenate(take_batches(stream, start + 2)[start:]))


@QUICK
@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 5))
def test_every_image_is_shown_once_per_epoch(count, batch, seed):
    stream = make_stream(memory_source(count), batch, seed)
    _, labels, indices = concatenate(take_batches(stream, -(-3 * count // batch)))
    for epoch in range(3):
        assert sorted(indices[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    assert torch.equal(labels, indices)


def test_orders_differ_between_epochs_and_seeds():
    def order(seed: int) -> torch.Tensor:
        return concatenate(take_batches(make_stream(memory_source(32), 32, seed), 2))[2]

    assert not torch.equal(order(0)[:32], order(0)[32:])
    assert not torch.equal(order(0), order(1))


def random_transform(image: Image.Image) -> torch.Tensor:
    """Draw from all three random number generators."""
    return torch.full((3, 2, 2), random.random() + np.random.rand()) + torch.rand(3, 2, 2)


@pytest.mark.parametrize("transform", [None, random_transform])
def test_any_number_of_workers_gives_the_same_batches(transform):
    source = memory_source(10, broken=(3,))
    runs = [
        take_batches(make_stream(source, transform=transform, workers=workers, max_errors=2), 6, 2)
        for workers in (0, 1, 3)
    ]
    assert all(equal_rows(concatenate(run), concatenate(runs[0])) for run in runs[1:])
    assert all([batch.errors for batch in run] == [batch.errors for batch in runs[0]] for run in runs[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_does_not_change_the_training_random_numbers(workers):
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = [draw() for _ in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    batches = make_stream(memory_source(6), transform=random_transform, workers=workers).batches(0, 0, 1)
    found = []
    for _ in range(3):
        found.append(draw())
        next(batches)
    batches.close()
    assert found == expected


def test_batch_shapes_and_ranges():
    (batch,) = take_batches(make_stream(memory_source(6), 5, size=(16, 8)), 1)
    assert (batch.images.shape, batch.images.dtype) == ((5, 3, 16, 8), torch.float32)
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert (batch.labels.dtype, batch.indices.dtype, len(batch), batch.errors) == (torch.int64, torch.int64, 5, [])
    assert take_batches(make_stream(MemorySource([encode(noise_image(9, 9))])), 1)[0].labels.tolist() == [-1] * 4


def test_unreadable_images_are_replaced_counted_and_named_once(caplog):
    caplog.set_level(logging.WARNING, "addp")
    stream = make_stream(memory_source(8, broken=(2, 5)), 8, max_errors=2)
    batches = take_batches(stream, 3)
    assert stream.errors == {"image-2": "no such image", "image-5": "no such image"}
    for batch in batches:
        assert set(batch.indices.tolist()) == {0, 1, 3, 4, 6, 7}
        assert {name for name, _ in batch.errors} == {"image-2", "image-5"}
    assert [record.getMessage().count("unreadable image") for record in caplog.records] == [1, 1]
    assert "image-" in caplog.text
    expected = take_batches(make_stream(memory_source(8), 8), 3)  # readable images are not affected
    for batch, other in zip(batches, expected, strict=True):
        unaffected = batch.indices == other.indices
        assert unaffected.sum() == 6
        assert torch.equal(batch.images[unaffected], other.images[unaffected])


LIMITS = [(0, 0), (0.5, 5), (0.001, 1), (1, 1), (3, 3), (0.25, 2), (math.inf, 10)]


@pytest.mark.parametrize(("max_errors", "limit"), LIMITS)
def test_max_errors_is_a_fraction_or_a_count(max_errors, limit):
    assert make_stream(memory_source(10), max_errors=max_errors).error_limit == limit


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_end_the_run(workers):
    stream = make_stream(memory_source(20, broken=tuple(range(7))), 20, max_errors=6, workers=workers)
    with pytest.raises(UserError) as error:
        take_batches(stream, 2)
    message = str(error.value)
    assert message.startswith("data.max_errors: 7 of 20 images unreadable, 6 tolerated: image-")
    assert "(no such image)" in message
    assert "and 2 more" in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_dataset_without_a_readable_image(workers):
    stream = make_stream(memory_source(5, broken=tuple(range(5))), max_errors=1000, workers=workers)
    with pytest.raises(UserError, match="5 of 5 images unreadable"):
        take_batches(stream, 1)


def test_truncated_jpegs_in_a_folder(tmp_path):
    for i in range(6):
        noise_image(40, 40, seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:900])
    stream = make_stream(open_source(str(tmp_path)), 6, max_errors=1)
    take_batches(stream, 1)
    assert list(stream.errors) == [str(tmp_path / "3.jpg")]
    assert "truncated" in stream.errors[str(tmp_path / "3.jpg")]
    with pytest.raises(UserError, match=r"data\.max_errors.*3\.jpg \(.*truncated"):
        take_batches(make_stream(open_source(str(tmp_path)), 6, max_errors=0), 1)


def test_deleted_files_count_as_unreadable(tmp_path):
    for i in range(4):
        save_image(tmp_path / f"{i}.png")
    source = open_source(str(tmp_path))
    (tmp_path / "1.png").unlink()
    stream = make_stream(source, 4, max_errors=1)
    take_batches(stream, 1)
    assert list(stream.errors.values()) == ["No such file or directory"]


def raising_transform(image: Image.Image) -> torch.Tensor:
    raise RuntimeError("a mistake in the transform")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_a_transform_do_not_count_as_unreadable_images(workers):
    with pytest.raises(RuntimeError, match="a mistake in the transform"):
        take_batches(make_stream(memory_source(4), transform=raising_transform, workers=workers), 1)


@QUICK
@given(st.integers(1, 60), st.integers(2, 12), st.integers(0, 3))
def test_blocks_of_neighbors_are_shuffled(count, block, seed):
    orders = [epoch_order(count, seed, epoch, block) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
        breaks = int((order[1:] != order[:-1] + 1).sum())
        assert breaks <= count // block + 1
    assert torch.equal(orders[0], epoch_order(count, seed, 0, block))


def test_an_order_of_blocks_differs_between_epochs():
    orders = [epoch_order(1000, 0, epoch, 10) for epoch in range(2)]
    assert not torch.equal(*orders)
    starts = [set((order[1:][order[1:] != order[:-1] + 1] % 10).tolist()) for order in orders]
    assert starts[0] != starts[1]  # the blocks begin elsewhere


class KillingTransform:
    """A transform that kills its process while fewer than `times` files lie in the folder; each death adds one."""

    def __init__(self, folder: Path, times: int):
        self.folder, self.times = folder, times

    def __call__(self, image: Image.Image) -> torch.Tensor:
        deaths = len(list(self.folder.iterdir()))
        if deaths < self.times:
            (self.folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 2, 2)


def test_dead_workers_are_restarted(tmp_path, caplog):
    batches = take_batches(make_stream(memory_source(8), transform=KillingTransform(tmp_path, 1), workers=1), 3)
    assert equal_rows(
        concatenate(batches),
        concatenate(take_batches(make_stream(memory_source(8), transform=KillingTransform(tmp_path, 1)), 3)),
    )
    assert "restarting the data workers at micro-step 0" in caplog.text


def test_workers_that_keep_dying_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"died three times at micro-step 0.*data\.workers=0"):
        take_batches(make_stream(memory_source(8), transform=KillingTransform(tmp_path, 99), workers=1), 1)


def test_workers_survive_signals_to_the_process_group():
    batches = make_stream(memory_source(8), workers=2).batches(0, 0, 1)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    for _ in range(8):
        next(batches)
    batches.close()
    assert not any(child.is_alive() for child in children)


def test_more_processes_than_images_per_batch():
    with pytest.raises(UserError, match="batch: found 3 images per step for 4 processes"):
        make_stream(memory_source(4), 3).rows_of(0, 4)
    with pytest.raises(UserError, match="batch: found 0"):
        make_stream(memory_source(4), 0)
