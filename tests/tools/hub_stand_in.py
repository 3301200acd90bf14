"""A stand-in for the Hugging Face Hub on this machine: the requests that huggingface_hub makes to create a repository,
upload files into it, list them and download them, over HTTP, with one token that may write.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
READ_ONLY = "hf_read_only"
COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """The server; `files` is what the repositories hold, by "owner/name" and path, `requests` what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body, path = self._body(), self._path()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if token != TOKEN:
            return self._error(403 if token == READ_ONLY else 401)
        if path == "/api/repos/create":
            options = json.loads(body)
            name = f"{options['organization']}/{options['name']}"
            if name in self.server.files:
                return self._error(409, {"url": f"{self.server.endpoint}/{name}"})
            self.server.files[name] = {}
            self.server.private[name] = options.get("private") or options.get("visibility") == "private"
            return self._json({"url": f"{self.server.endpoint}/{name}"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self._json({"files": modes})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[match[1]][line["value"]["path"]] = content
            url = f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}"
            return self._json({"commitUrl": url, "commitOid": COMMIT, "commitMessage": "", "hookOutput": ""})
        return self._error(404)

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/.*)?", path):
            if match[1] not in self.server.files:
                return self._error(404, code="RepoNotFound")
            files = self.server.files[match[1]]
            if "/tree/" in path:
                return self._json([{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in files])
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        return self._error(404)

    do_HEAD = do_GET

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _file(self, repository: str, name: str) -> None:
        if repository not in self.server.files:
            return self._error(404, code="RepoNotFound")
        content = self.server.files[repository].get(name)
        if content is None:
            return self._error(404, code="EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._answer(200, content, headers)

    def _json(self, content) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, content=None, code: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._answer(status, json.dumps(content or {"error": "refused"}).encode(), headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub():
    """Run the stand-in in a thread."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
