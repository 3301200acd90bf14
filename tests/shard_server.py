"""A web server on this machine for the tests of shards at an address: it serves a folder, and fails as it is told."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Request:
    """A GET or HEAD that the server has received."""

    method: str
    name: str
    start: int
    end: int  # not included
    authorization: str = ""
    query: str = ""


@dataclass
class ShardServer:
    """What is served and how. `fail` returns for a request an HTTP status, "drop", "silence", or None to answer it."""

    folder: Path
    url: str = ""
    fail: Callable[[Request], int | str | None] = lambda request: None
    ranges: bool = True
    locate: Callable[[str, str], str] = lambda name, query: name  # the file below the folder that is sent
    headers: Callable[[Path], dict[str, str]] = lambda path: {
        "ETag": f'"{path.stat().st_size}-{path.stat().st_mtime_ns}"'
    }
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)  # ends the silences

    @property
    def parts(self) -> list[Request]:
        """The requests for parts of files."""
        return [request for request in self.requests if request.method == "GET"]


@contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    """Serve a folder at `url` within the block."""
    shards = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            name, _, query = self.path.lstrip("/").partition("?")
            path = shards.folder / shards.locate(name, query)
            size = path.stat().st_size if path.is_file() else 0
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if shards.ranges else None
            start, end = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
            request = Request(self.command, name, start, end, self.headers.get("Authorization", ""), query)
            shards.requests.append(request)
            failure = shards.fail(request) if path.is_file() else 404
            if failure == "silence":
                shards.released.wait(30)
            if failure in ("drop", "silence"):
                # in the middle of the content, where there is any
                self.close_connection = True
                if self.command == "HEAD" or failure == "silence":
                    return
            elif failure is not None:
                self.send_response(int(failure))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if match else 200)
            self.send_header("Content-Length", str(end - start))
            for key, value in shards.headers(path).items():
                self.send_header(key, value)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            if self.command == "GET":
                with path.open("rb") as file:
                    file.seek(start)
                    content = file.read(end - start)
                self.wfile.write(content[: len(content) // 2] if failure == "drop" else content)

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    shards.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield shards
    finally:
        shards.released.set()
        server.shutdown()
        server.server_close()
