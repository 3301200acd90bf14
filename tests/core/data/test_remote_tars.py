"""Tar shards at an address: the same images, classes and batches as from the disk, each requested once."""

import importlib
import logging
import multiprocessing
import signal
import tarfile
from collections import Counter
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from image_data import add_member, concatenate, encode, equal_rows, make_stream, noise_image, take_batches
from shard_server import serve

from addp_core.base.errors import UserError
from addp_core.data import remote, remote_tars
from addp_core.data.config import DataConfig
from addp_core.data.image_source import Subset
from addp_core.data.sources import ImageSource, open_source

pytest.importorskip("aiohttp")

IMAGES, SHARDS = 12, 3  # of each shard


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add_member(tar, name, content)


def image(seed: int) -> bytes:
    return encode(noise_image(12 + seed % 5, 10, seed=seed))


def web_shard(shard: int) -> dict[str, bytes]:
    """Return images with labels beside them, as WebDataset has them."""
    members = {}
    for i in range(IMAGES):
        members[f"{i:03d}.png"] = image(shard * IMAGES + i)
        members[f"{i:03d}.cls"] = str(i % 3).encode()
        members[f"{i:03d}.json"] = b'{"caption": "noise"}'
    return members


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote_tars, "MAX_GAP", 3000)  # the label files and headers between two of these small images
    for shard in range(SHARDS):
        write_tar(tmp_path / "web" / f"train-{shard:02d}.tar", web_shard(shard))
    with serve(tmp_path) as server:
        yield server


def both(server, folder: str, pattern: str, **keys) -> tuple[ImageSource, ImageSource]:
    """Return the source on the disk and the one at the address."""
    address = open_source(DataConfig(source=f"{server.url}/{pattern}", **keys))
    return open_source(DataConfig(source=str(server.folder / folder), **keys)), address


def web_source(server, **keys) -> ImageSource:
    return open_source(DataConfig(source=f"{server.url}/web/train-{{00..02}}.tar", **keys))


def folder_shards(root: Path) -> None:
    write_tar(root / "a-0.tar", {f"train/{c}/{i}.png": image(i) for c in ("cat", "dog") for i in range(3)})
    write_tar(root / "a-1.tar", {f"val/{c}/{i}.png": image(i) for c in ("cat", "dog") for i in range(2)})


def nested_shard(root: Path) -> None:
    for name in ("n01", "n02"):
        write_tar(root / f"{name}.tar", {f"{name}_{i}.JPEG": image(i) for i in range(2)})
    inner = {f"{name}.tar": (root / f"{name}.tar").read_bytes() for name in ("n01", "n02")}
    write_tar(root / "all" / "x.tar", {**inner, "../../../etc/passwd.png": image(5)})


@pytest.mark.parametrize(
    ("write", "folder", "pattern", "keys"),
    [
        (lambda root: None, "web", "web/train-{00..02}.tar", {}),
        (lambda root: None, "web/train-01.tar", "web/train-01.tar", {}),
        (folder_shards, ".", "a-{0,1}.tar", {"split": "val"}),
        (nested_shard, "all/x.tar", "all/x.tar", {}),
    ],
)
def test_what_is_at_an_address_equals_what_is_on_the_disk(server, tmp_path, write, folder, pattern, keys):
    write(tmp_path)
    if folder == ".":
        for path in (tmp_path / "web").iterdir():
            path.unlink()
    here, there = both(server, folder, pattern, **keys)
    assert len(there) == len(here) > 1
    assert there.classes == here.classes
    assert there.labels.tolist() == here.labels.tolist()
    assert there.relative_names() == here.relative_names()
    assert there.digest() == here.digest()
    assert [there.read_bytes(i) for i in range(len(here))] == [here.read_bytes(i) for i in range(len(here))]
    assert there.name(1).startswith(f"{server.url}/{pattern.partition('{')[0]}")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("block", [1, 5])
def test_batches_equal_those_from_the_disk_and_repeat_to_the_bit(server, workers, block):
    here, there = both(server, "web", "web/train-{00..02}.tar")
    expected = concatenate(take_batches(make_stream(here, 8, shuffle_block=block), 7, start=2))
    for _ in range(2):
        stream = make_stream(there, 8, shuffle_block=block, workers=workers)
        assert equal_rows(concatenate(take_batches(stream, 7, start=2)), expected)


def test_an_index_is_read_once(server, caplog):
    caplog.set_level(logging.INFO, "addp")
    first = web_source(server)
    read = len(server.parts)
    assert read >= SHARDS
    server.requests.clear()
    assert web_source(server).digest() == first.digest()
    assert len(server.parts) <= 1  # whether the server sends parts
    path = server.folder / "web" / "train-00.tar"
    write_tar(path, {"new.png": image(1), "new.cls": b"0"})
    assert len(web_source(server)) == 1 + (SHARDS - 1) * IMAGES
    assert "labels are read from the .cls files" in caplog.text


def test_two_ranks_with_two_workers_request_every_image_once(server):
    source, batch = web_source(server), 6
    extents = Counter(source.extent(i) for i in range(len(source)))
    stream = make_stream(source, batch, workers=2)
    steps = len(source) // batch
    server.requests.clear()
    seen = []
    for rank in range(2):
        seen += concatenate(take_batches(make_stream(source, batch, workers=0), steps, rank=rank, world=2))[2].tolist()
    assert sorted(seen) == list(range(len(source)))
    asked = Counter((part.name.removeprefix("web/"), (part.start, part.end - part.start)) for part in server.parts)
    assert sum(asked.values()) <= len(source)  # neighbors are one request
    assert sum(end for (_, (_, end)), _ in asked.items()) >= sum(size for (_, (_, size)) in extents)
    with_workers = [concatenate(take_batches(stream, steps, rank=rank, world=2))[2] for rank in range(2)]
    assert sorted(torch.cat(with_workers).tolist()) == list(range(len(source)))


def test_blocks_of_neighbors_are_one_request(server):
    source = web_source(server)
    server.requests.clear()
    take_batches(make_stream(source, 12), 3)
    single = len(server.parts)
    server.requests.clear()
    indices = concatenate(take_batches(make_stream(source, 12, shuffle_block=6), 3))[2]
    assert sorted(indices.tolist()) == list(range(len(source)))
    assert len(server.parts) < single * 2 / 3


def send_indices(pipe: Connection, address: str, start: int) -> None:
    """Send the images of each step from `start` on."""
    torch.set_num_threads(1)
    with closing(make_stream(open_source(address), 5, shuffle_block=4).batches(start)) as batches:
        for batch in batches:
            pipe.send(batch.indices.tolist())


def shown_until_killed(address: str, start: int, steps: int) -> list[int]:
    """Return the images of the first steps that another process shows, which is then killed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_indices, args=(sender, address, start))
    process.start()
    shown = [index for _ in range(steps) for index in receiver.recv()]
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return shown


def test_killed_in_mid_shard_and_continued_every_image_is_shown_once(server):
    count, address = SHARDS * IMAGES, f"{server.url}/web/train-{{00..02}}.tar"
    shown, step = [], 0
    for steps in (4, 3, 8):  # of 5 images: in the middle of a shard and of an epoch
        shown += shown_until_killed(address, step, steps)
        step += steps
    for epoch in range(2):
        assert sorted(shown[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_broken_connections_change_nothing(server):
    here, there = both(server, "web", "web/train-{00..02}.tar")
    server.fail = lambda request: "drop" if len(server.requests) % 3 == 0 else None
    batches = concatenate(take_batches(make_stream(there, 8), 5))
    assert equal_rows(batches, concatenate(take_batches(make_stream(here, 8), 5)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_is_gone_ends_the_run_with_its_address(server, workers):
    source = web_source(server, tries=2)
    server.fail = lambda request: 503
    stream = make_stream(source, 8, workers=workers)
    with pytest.raises(UserError) as error:
        take_batches(stream, 1)
    assert str(error.value).startswith(f"data.source: {server.url}/web/train-0")
    assert "HTTP 503" in str(error.value)
    assert "\n" not in str(error.value)
    assert not stream.errors  # no image counts as unreadable


def test_unreadable_images_are_replaced_and_counted(server):
    members = web_shard(0)
    members["004.png"] = members["004.png"][:60]
    write_tar(server.folder / "web" / "train-00.tar", members)
    stream = make_stream(web_source(server), 9, max_errors=1)
    indices = concatenate(take_batches(stream, 4))[2]
    assert list(stream.errors) == [f"{server.url}/web/train-00.tar/004.png"]
    assert len(set(indices.tolist())) == SHARDS * IMAGES - 1


def test_memory_is_bounded(server, monkeypatch):
    here, there = both(server, "web", "web/train-{00..02}.tar")
    expected = concatenate(take_batches(make_stream(here, 12), 2))
    monkeypatch.setattr(remote_tars, "MAX_AHEAD", 1500)  # three images
    monkeypatch.setattr(remote_tars, "MAX_GAP", 0)
    server.requests.clear()
    assert equal_rows(concatenate(take_batches(make_stream(there, 12), 2)), expected)
    assert max(part.end - part.start for part in server.parts) <= 1500
    monkeypatch.setattr(remote_tars, "MAX_IMAGE", 500)
    stream = make_stream(there, 12, max_errors=100)
    take_batches(stream, 2)
    assert set(stream.errors.values()) == {f"{s} bytes, more than the limit of 500" for s in large_sizes(here, 500)}


def large_sizes(source: ImageSource, limit: int) -> set[int]:
    return {size for i in range(len(source)) if (size := source.encoded_size(i)) > limit}


def test_caches_and_parts_of_it(server):
    here, there = both(server, "web", "web/train-{00..02}.tar")
    chosen = list(range(3, 30, 2))
    for options in ({"cache": "ram"}, {"cache": "ram", "cache_gb": 1e-6}, {}):
        streams = [make_stream(Subset(source, chosen), 7, **options) for source in (here, there)]
        batches = [concatenate(take_batches(stream, 3)) for stream in streams]
        assert equal_rows(*batches)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("web/train-{00..03}.tar", r"web/train-03\.tar: .*404|web/train-03\.tar: not found"),
        ("web/", r"is no \.tar file; expected the address of \.tar shards"),
        ("web/train.tar.gz", r"is no \.tar file"),
        ("nothing.tar", "nothing.tar: .*; check the address"),
    ],
)
def test_addresses_without_shards(server, pattern, message):
    with pytest.raises(UserError, match=message):
        open_source(f"{server.url}/{pattern}")


def test_shards_name_their_split(server):
    with pytest.raises(UserError, match=r"has no shard of 'val'; it has train"):
        web_source(server, split="val")


def test_other_schemes_of_fsspec(server):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in (server.folder / "web").iterdir():
        system.pipe(f"/web/{path.name}", path.read_bytes())
    here = open_source(str(server.folder / "web"))
    there = open_source("memory://web/train-{00..02}.tar")
    assert equal_rows(*(concatenate(take_batches(make_stream(source, 8), 5)) for source in (here, there)))


@pytest.fixture
def s3(server, monkeypatch):
    """Let s3:// mean the server: bucket web, whose objects it answers as S3 does."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # it would connect to the server of another test
    for name, value in (("ENDPOINT_URL", server.url), ("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "hush-hush")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return server


def test_shards_in_a_bucket(s3):
    here, there = open_source(str(s3.folder / "web")), open_source("s3://web/train-{00..02}.tar")
    assert there.digest() == here.digest()
    for workers in (0, 1):
        expected, found = (concatenate(take_batches(make_stream(s, 8, workers=workers), 5)) for s in (here, there))
        assert equal_rows(found, expected)
    assert all("Credential=me/" in part.authorization for part in s3.parts)


@pytest.mark.parametrize(
    ("failure", "reason"), [(404, "HTTP 404 Not Found"), (403, "(access denied|HTTP 403).*; check your cred")]
)
def test_buckets_that_refuse(s3, failure, reason):
    s3.fail = lambda request: failure
    with pytest.raises(UserError, match=rf"s3://web/train-00\.tar: {reason}") as error:
        open_source(DataConfig(source="s3://web/train-{00..02}.tar", tries=1))
    assert "hush" not in str(error.value)


def test_a_bucket_without_credentials(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"s3://web/train-00\.tar: Unable to locate credentials; .*FSSPEC_S3_ANON=true"):
        open_source("s3://web/train-00.tar")
    monkeypatch.setitem(pytest.importorskip("fsspec.config").conf, "s3", {"anon": True})  # as the variable sets it
    assert len(open_source("s3://web/train-00.tar")) == IMAGES


def test_where_a_process_begins_with_the_indexes_changes_nothing(server, monkeypatch):
    expected = open_source(str(server.folder / "web")).digest()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(server.folder / f"cache-{rank}"))
        monkeypatch.setenv("RANK", str(rank))
        assert web_source(server).digest() == expected


def test_headers_that_claim_to_be_enormous(server):
    with tarfile.open(server.folder / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        header = tarfile.TarInfo("comment")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
        tar.addfile(header)
        add_member(tar, "1.png", image(1))
    with pytest.raises(UserError, match=r"x\.tar cannot be read as \.tar \(a header of more than 16,777,216 bytes\)"):
        open_source(f"{server.url}/x.tar")
    assert sum(part.end - part.start for part in server.parts) < 1 << 17


def names_in(address: str) -> list[str]:
    """Return the names of the images at an address of one shard."""
    source = open_source(address)
    return [Path(source.name(i)).name for i in range(len(source))]


@pytest.mark.parametrize("header", ["ETag", "Last-Modified", "Content-MD5", "Digest", None])
def test_an_index_is_kept_if_the_server_says_when_the_shard_changes(server, caplog, header):
    caplog.set_level(logging.INFO, "addp")
    path, address = server.folder / "x.tar", f"{server.url}/x.tar"
    server.headers = lambda path: {header: f"{path.stat().st_mtime_ns}"} if header else {}
    write_tar(path, {"a.png": image(1)})
    assert names_in(address) == ["a.png"]
    server.requests.clear()
    assert names_in(address) == ["a.png"]
    assert len(server.parts) == (1 if header else 2)  # whether the server sends parts, and the headers
    size = path.stat().st_size
    write_tar(path, {"b.png": image(1)})
    assert path.stat().st_size == size
    assert names_in(address) == ["b.png"]
    said = "x.tar: no checksum or time of change is known of 1 shards; their headers are read at each start"
    assert caplog.text.count(said) == (0 if header else 3)


def test_shards_of_hugging_face_are_read_again_when_they_have_changed(server, monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    class Hub(fsspec.get_filesystem_class("memory")):
        """Files in memory, of which the hub's checksum is told only if it is asked for."""

        protocol = "hf"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("hf://", "memory://"))

        def info(self, path, expand_info=False, **options):
            found = {"name": path, "size": super().info(path)["size"], "type": "file"}
            return {**found, "blob_id": hash(self.cat(path)), "last_commit": None} if expand_info else found

    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "hf", Hub)
    for name in ("a.png", "b.png"):
        write_tar(server.folder / "x.tar", {name: image(1)})
        Hub().pipe("/datasets/me/set/x.tar", (server.folder / "x.tar").read_bytes())
        assert names_in("hf://datasets/me/set/x.tar") == [name]
    stored = (server.folder / "cache" / "addp" / "tars").iterdir()
    assert len([path for path in stored if path.suffix != ".lock"]) == 1


def test_shards_that_differ_behind_the_question_mark_only(server):
    for part in "01":
        write_tar(server.folder / f"{part}.tar", {f"{part}.png": image(1)})
    server.locate = lambda name, query: f"{query.removeprefix('part=')}.tar"
    server.headers = lambda path: {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    for part in "01":
        assert names_in(f"{server.url}/get.tar?part={part}") == [f"{part}.png"]
    with pytest.raises(UserError, match=r"2 of the shards are .*/get\.tar \(without what follows the \?\)"):
        open_source(f"{server.url}/get.tar?part={{0,1}}")


def test_names_below_an_address(server):
    write_tar(server.folder / "web" / "x.tar", {"../../out.png": image(1), "cat/1.png": image(2)})
    for address, names in (
        ("web/train-{00..02}.tar", [f"train-{s:02d}.tar/{i:03d}.png" for s in range(SHARDS) for i in range(IMAGES)]),
        ("web/x.tar?download=1", ["cat/1.png"]),
    ):
        assert open_source(f"{server.url}/{address}").names_below(f"{server.url}/{address}") == names


@pytest.mark.parametrize("workers", [0, 1])
def test_members_without_content_are_unreadable_images(s3, workers):
    write_tar(s3.folder / "web" / "train-01.tar", {**web_shard(1), "004.png": b"", "last.png": b"", "last.cls": b"1"})
    for root in (str(s3.folder / "web"), "s3://web/train-{00..02}.tar", f"{s3.url}/web/train-{{00..02}}.tar"):
        stream = make_stream(open_source(root), 9, workers=workers, max_errors=2)
        take_batches(stream, 5)
        assert set(stream.errors.values()) == {"the file is empty"}
        assert {Path(name).name for name in stream.errors} == {"004.png", "last.png"}
