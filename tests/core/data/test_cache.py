"""Images cached in memory."""

import torch
from image_data import MemorySource, concatenate, encode, make_stream, noise_image, smooth_image, take_batches

from addp_core.data.sources import open_source


def test_cached_images_give_the_same_batches(tmp_path):
    for i in range(6):
        smooth_image(200, 150).save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "small.png").write_bytes(encode(noise_image(12, 9)))
    source = open_source(str(tmp_path))
    expected = take_batches(make_stream(source, 7, max_errors=2), 3)
    cached = make_stream(source, 7, max_errors=2, cache="ram")
    assert min(cached.source.read(0)[0].size) == 21  # 8 pixels from the smallest crop: 8 / sqrt(0.2 * 0.75)
    assert cached.source.read(6)[0].size == (12, 9)
    for path in tmp_path.iterdir():
        path.unlink()
    for workers in (0, 2):
        cached.config.workers = workers
        found = take_batches(cached, 3)
        assert torch.equal(concatenate(found)[2], concatenate(expected)[2])
        assert (concatenate(found)[0] - concatenate(expected)[0]).abs().mean() < 0.01  # the same crops
        assert list(cached.errors) == [str(tmp_path / "2.jpg")]


def test_images_beyond_the_memory_limit_are_read_each_time(caplog):
    source = MemorySource([encode(noise_image(40, 40, seed=i), "PNG") for i in range(300)])
    stream = make_stream(source, 8, cache="ram", cache_gb=1e-6)
    assert "hold 256 of 300 images" in caplog.text
    assert len({int(i) for batch in take_batches(stream, 38) for i in batch.indices}) == 300
