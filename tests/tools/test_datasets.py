"""`addp data`: public datasets from a local server that drops connections, and what is refused."""

import errno
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from addp_core.recipes.cli import main
from addp_core.recipes.config import load_recipe, recipes_of
from tools.datasets import archives, data


class DroppingHandler(BaseHTTPRequestHandler):
    """Serves the files of `server.folder`; of each answer, at most `server.most` bytes arrive.

    The first answers are those of `server.failures`: a status of HTTP, or bytes that are no answer.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.server.failures:
            failure = self.server.failures.pop(0)
            if isinstance(failure, int):
                return self.send_error(failure)
            self.wfile.write(failure)
            self.close_connection = True
            return None
        path = self.server.folder / self.path.strip("/")
        if not path.is_file():
            return self.send_error(404)
        content, start = path.read_bytes(), 0
        if ranged := self.headers.get("Range"):
            start = int(ranged.removeprefix("bytes=").removesuffix("-"))
        self.server.starts.append(start)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.most])
        self.close_connection = True
        return None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """A server of the files in tmp_path/served."""
    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), DroppingHandler)
    server.folder, server.most, server.starts, server.failures = tmp_path / "served", 1 << 30, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def settings_for(served: Path, out: Path, *names: str) -> list[str]:
    """Return the arguments that fetch archives, with their checksums."""
    digests = {name: hashlib.md5((served / name).read_bytes()).hexdigest() for name in names}
    addresses = {name: f"http://127.0.0.1:9/{name}" for name in names}
    return ["data", f"out={out}", f"archives={json.dumps(addresses)}", f"md5={json.dumps(digests)}"]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != data.STATE
    }


def test_a_download_continues_after_dropped_connections(server, tmp_path, capsys):
    images = {f"set/train/{i}.jpg": np.random.default_rng(i).bytes(3000) for i in range(20)}
    write_tar(server.folder / "set.tgz", images)
    write_zip(server.folder / "more.zip", {"set/val/0.jpg": b"image", "set/val/": b""})
    server.most = 10_000
    out = tmp_path / "out"
    line = [*settings_for(server.folder, out, "set.tgz", "more.zip"), "strip=1", f"mirror={url_of(server)}"]
    assert main(line) == 0
    expected = {name.removeprefix("set/"): content for name, content in images.items()}
    assert files_below(out) == expected | {"val/0.jpg": b"image"}
    assert server.starts[:4] == [0, 10_000, 20_000, 30_000]
    requests = len(server.starts)
    assert main(line) == 0  # nothing is fetched again
    assert len(server.starts) == requests
    assert "set.tgz: unpacked before" in capsys.readouterr().err


def test_a_stopped_download_is_continued_by_the_next_command(server, tmp_path, monkeypatch):
    write_tar(server.folder / "set.tgz", {"a/b.jpg": np.random.default_rng(0).bytes(50_000)})
    out = tmp_path / "out"
    line = [*settings_for(server.folder, out, "set.tgz"), f"mirror={url_of(server)}"]
    server.most = 20_000
    with monkeypatch.context() as patch:
        patch.setattr(archives, "TRIES", 1)

        def interrupt(*arguments):
            raise KeyboardInterrupt

        patch.setattr(archives.log, "warning", interrupt)
        assert main(line) == 1
    assert (out / "set.tgz.part").stat().st_size == 20_000
    server.most = 1 << 30
    assert main(line) == 0
    assert server.starts == [0, 20_000]
    assert list(files_below(out)) == ["a/b.jpg"]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "failure",
    [408, 425, 429, 500, 503, b"no HTTP\r\n\r\n", b"", CHUNKED + b"8\r\nimage", CHUNKED + b"no number\r\nimage"],
)
def test_what_may_pass_is_tried_again(server, tmp_path, failure, caplog):
    write_zip(server.folder / "set.zip", {"a.jpg": b"image"})
    server.failures = [failure]
    line = [*settings_for(server.folder, tmp_path / "out", "set.zip"), f"mirror={url_of(server)}"]
    assert main(line) == 0
    assert "another try" in caplog.text
    assert not server.failures


def test_errors_of_the_network_while_bytes_arrive_are_not_those_of_the_disk(server, tmp_path, monkeypatch, caplog):
    write_zip(server.folder / "set.zip", {"a.jpg": b"image"})
    line = [*settings_for(server.folder, tmp_path / "out", "set.zip"), f"mirror={url_of(server)}"]
    read, failures = archives.http.client.HTTPResponse.read, [OSError(errno.EHOSTUNREACH, "No route to host")]

    def fail_once(response, amount=None):
        if failures:
            raise failures.pop()
        return read(response, amount)

    monkeypatch.setattr(archives.http.client.HTTPResponse, "read", fail_once)
    assert main(line) == 0
    assert "No route to host; another try" in caplog.text


def test_a_full_disk_is_not_tried_again(server, tmp_path, monkeypatch, capsys):
    write_zip(server.folder / "set.zip", {"a.jpg": b"image"})
    line = [*settings_for(server.folder, tmp_path / "out", "set.zip"), f"mirror={url_of(server)}"]

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.disk_usage", full)
    assert main(line) == 2
    assert "set.zip.part: cannot be written (No space left on device)" in capsys.readouterr().err
    assert len(server.starts) == 1


def test_archives_of_a_folder_stay_there(tmp_path):
    write_zip(tmp_path / "set.zip", {"a.jpg": b"image"})
    line = [*settings_for(tmp_path, tmp_path / "out", "set.zip"), f"mirror={tmp_path}"]
    assert main(line) == 0
    assert (tmp_path / "set.zip").exists()
    assert files_below(tmp_path / "out") == {"a.jpg": b"image"}


def test_cifar10_as_images(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    records = [bytes([i % 2]) + image.tobytes() for i, image in enumerate(images)]
    folder = "cifar-10-batches-bin/"
    files = {f"{folder}data_batch_1.bin": b"".join(records[:2]), f"{folder}data_batch_2.bin": records[2]}
    files |= {f"{folder}test_batch.bin": b"".join(records[3:]), f"{folder}batches.meta.txt": b"cat\ndog\n\n"}
    write_tar(tmp_path / "cifar.tar.gz", files)
    line = [*settings_for(tmp_path, tmp_path / "out", "cifar.tar.gz"), f"mirror={tmp_path}", "layout=cifar10"]
    assert main(line) == 0
    expected = ["test/cat/00001.png", "test/dog/00000.png", "train/cat/00000.png", "train/cat/00002.png",
                "train/dog/00001.png"]  # fmt: skip
    assert list(files_below(tmp_path / "out")) == expected
    read = np.asarray(Image.open(tmp_path / "out" / "test" / "cat" / "00001.png"))
    assert np.array_equal(read.transpose(2, 0, 1), images[4])


@pytest.mark.parametrize("write", [write_tar, write_zip])
@pytest.mark.parametrize("name", ["../escaped.txt", "/escaped.txt", "a/../../escaped.txt", "..\\escaped.txt"])
def test_no_member_leaves_the_folder(tmp_path, capsys, write, name):
    write(tmp_path / "set.bin", {name: b"bad"})
    assert main([*settings_for(tmp_path, tmp_path / "out", "set.bin"), f"mirror={tmp_path}"]) == 2
    assert "which would be written outside of" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*escaped*"))


def test_links_are_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert main([*settings_for(tmp_path, tmp_path / "out", "set.tar"), f"mirror={tmp_path}"]) == 0
    assert files_below(tmp_path / "out") == {}


def test_what_cannot_be_had_is_one_line(server, tmp_path, capsys, monkeypatch):
    write_zip(server.folder / "set.zip", {"a.jpg": b"image"})
    line = settings_for(server.folder, tmp_path / "out", "set.zip")

    def error(*settings: str) -> str:
        assert main([*line, *settings]) == 2
        (message,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("addp: ")]
        return message

    advice = "fetch it in another way and name its folder: mirror=<folder with set.zip>"
    monkeypatch.setattr(archives, "TRIES", 2)
    assert "http://127.0.0.1:9/set.zip: cannot be reached" in (message := error())
    assert message.endswith(advice)
    assert "found 404 Not Found" in error(f"mirror={url_of(server)}/nothing")
    assert "mirror: " in error(f"mirror={tmp_path}/nowhere")
    for address in ("http://host/my sets", "http://host:port", "http://host/bücher", f"http://{'a' * 64}.org"):
        assert f"mirror: found '{address}/set.zip', expected an address" in error(f"mirror={address}")
    assert "archives: found 'http://a b/set.zip', expected an address" in error(
        "archives={set.zip: 'http://a b/set.zip'}"
    )
    assert "found MD5 " in error(f"mirror={url_of(server)}", "md5={set.zip: '0'}")
    assert "md5: found none for set.zip" in error("md5={}")
    (tmp_path / "file").touch()
    assert "cannot be written" in error(f"out={tmp_path / 'file'}")
    (server.folder / "set.zip").write_bytes(b"no archive")
    line = [*settings_for(server.folder, tmp_path / "new", "set.zip"), f"mirror={server.folder}"]
    assert "damaged, or no zip or tar archive" in error()


def test_the_named_datasets():
    names = recipes_of(data)
    assert set(names) >= {"cifar10", "imagenette", "coco", "ade20k", "imagenet", "imagenet_a", "imagenet_c"}
    for name in names:
        recipe = load_recipe(data, name, ["out=x"])
        assert bool(recipe.archives) != bool(recipe.by_hand)
        assert all(len(digest) == 32 for digest in recipe.md5.values())


def test_what_needs_an_account_is_said(tmp_path, capsys):
    assert main(["data", "imagenet", f"out={tmp_path}"]) == 2
    message = capsys.readouterr().err.strip()
    assert "needs an account at https://image-net.org" in message
    assert "\n" not in message
    assert main(["data", f"out={tmp_path}"]) == 2
    assert "found no archives, expected a dataset, as in addp data cifar10" in capsys.readouterr().err
