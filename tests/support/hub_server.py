"""A hub on loopback for the real client: repositories from directories, with everything that can go wrong."""

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".gguf")  # what the hub keeps in large file storage, known by its SHA-256


@dataclass
class Repository:
    """The files of a model or data set at one commit, and how the hub misbehaves about them."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    gated: bool = False
    corrupt: Counter[str] = field(default_factory=Counter)  # how often a file is served with other content
    cut: Counter[str] = field(default_factory=Counter)  # how often the connection ends half-way
    pause: float = 0.0  # seconds between two pieces of a file
    sizes: dict[str, int] = field(default_factory=dict)  # what the listing says in place of the truth

    @classmethod
    def of(cls, directory: Path) -> "Repository":
        return cls({path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()})

    def listing(self) -> dict[str, Any]:
        return {"id": "any", "sha": self.commit, "siblings": [self._sibling(name) for name in self.files]}

    def _sibling(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        size = self.sizes.get(name, len(content))
        found: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_id(content)}
        if name.endswith(LARGE):
            found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        return found


def git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """A running server. `requests` are (method, path, Range header) in order; `tokens` all Authorization headers."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    address: str = ""

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            path.partition("/resolve/")[2].partition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that leave, and all of what goes wrong here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port for as long as the block lasts."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        api = next((prefix for prefix in ("/api/models/", "/api/datasets/") if path.startswith(prefix)), None)
        if api is not None:
            name, _, revision = path.removeprefix(api).partition("/revision/")
            self._with_repository(name, revision or "main", None)
        else:
            name, _, rest = path.removeprefix("/").removeprefix("datasets/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._with_repository(name, revision, file)

    def _with_repository(self, name: str, revision: str, file: str | None) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        elif revision not in {"main", repository.commit}:
            self._refuse(404, "RevisionNotFound")
        elif file is None:
            self._send(json.dumps(repository.listing()).encode(), {"Content-Type": "application/json"})
        elif file not in repository.files:
            self._refuse(404, "EntryNotFound")
        else:
            self._send_file(repository, file)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _send_file(self, repository: Repository, file: str) -> None:
        content = repository.files[file]
        etag = hashlib.sha256(content).hexdigest() if file.endswith(LARGE) else git_id(content)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-") or 0)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self._send_content(repository, file, content, start)

    def _send_content(self, repository: Repository, file: str, content: bytes, start: int) -> None:
        if repository.corrupt[file] > 0:
            repository.corrupt[file] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        end = len(content)
        if repository.cut[file] > 0:
            repository.cut[file] -= 1
            end = (start + end) // 2
            self.close_connection = True
        for place in range(start, end, 1 << 18):
            self.wfile.write(content[place : min(end, place + (1 << 18))])
            time.sleep(repository.pause)
