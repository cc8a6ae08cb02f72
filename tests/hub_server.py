"""A hub on loopback: what huggingface_hub asks of one, with the faults that tests order."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the one commit").hexdigest()
PIECE = 1 << 16


def commit_of(branch: str) -> str:
    """The commit that a branch is at."""
    return hashlib.sha1(branch.encode()).hexdigest()


@dataclass
class Repository:
    """Files of one repository, and what to do instead of serving them.

    Args:
        files: content by name.
        large: names that lie in large-file storage, with a SHA-256.
        claimed: sizes to claim instead of the real ones.
        refuse: status and X-Error-Code to answer everything with.
        refuse_files: the same, for files alone.
        refuse_headers: of such an answer.
        n_refusals: how often, before it serves; None is always.
        gone: names that are listed and not there.
        token: what a file's request must carry.
        branches: other revisions.
        lfs: what is said of a file in large-file storage, beside its size and SHA-256.
    """

    files: dict[str, bytes]
    large: set[str] = field(default_factory=set)
    claimed: dict[str, int] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None
    refuse_files: tuple[int, str] | None = None
    refuse_headers: dict[str, str] = field(default_factory=dict)
    n_refusals: int | None = None
    gone: set[str] = field(default_factory=set)
    token: str | None = None
    branches: dict[str, "Repository"] = field(default_factory=dict)
    lfs: dict[str, Any] = field(default_factory=lambda: {"pointerSize": 130})


class Hub(ThreadingHTTPServer):
    """Serves repositories, and counts.

    After `cut_after` bytes of content, the connection is cut and every later request fails until
    `heal` is called. `pause_after` first keeps the connection open until then.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.Lock()
        self.served = 0
        self.bytes_of: dict[str, int] = {}
        self.ranges: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.cut_after: int | None = None
        self.pause_after: int | None = None
        self.paused, self.go_on = threading.Event(), threading.Event()
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def heal(self) -> None:
        """Work again, with all counts at zero."""
        self.cut_after = self.pause_after = None
        self.broken = False
        self.go_on.set()
        self.served = 0
        self.bytes_of, self.ranges, self.requests = {}, [], []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.broken:
            return self._refuse(503, "")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        repository = self.server.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self._refuse(404, "RepoNotFound")
        revision = match[3] if api else match[2]
        if repository.refuse and self._still_refuses(repository):
            return self._refuse(*repository.refuse, repository.refuse_headers)
        commit = COMMIT
        for name, branch in repository.branches.items():
            if revision in (name, commit_of(name)):
                repository, commit, revision = branch, commit_of(name), None
                break
        if revision not in (None, "main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._list(match[1], repository, commit, tree=api[2] == "tree")
        if repository.refuse_files and self._still_refuses(repository):
            return self._refuse(*repository.refuse_files, repository.refuse_headers)
        if repository.token and self.headers["Authorization"] != f"Bearer {repository.token}":
            return self._refuse(401, "GatedRepo")
        if match[3] not in repository.files or match[3] in repository.gone:
            return self._refuse(404, "EntryNotFound")
        return self._serve(repository, match[3], commit, with_body=with_body)

    def _still_refuses(self, repository: Repository) -> bool:
        with self.server.lock:
            if repository.n_refusals is not None:
                repository.n_refusals -= 1
                return repository.n_refusals >= 0
        return True

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, name: str, repository: Repository, commit: str, *, tree: bool) -> None:
        files = []
        for path, data in repository.files.items():
            size = repository.claimed.get(path, len(data))
            entry: dict[str, Any] = {"size": size}
            entry |= {"type": "file", "path": path} if tree else {"rfilename": path}
            entry["oid" if tree else "blobId"] = hashlib.sha1(data).hexdigest()
            if path in repository.large:
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": size} | repository.lfs
                entry["lfs"].setdefault("oid" if tree else "sha256", sha256)
            files.append(entry)
        answer = files if tree else {"id": name, "sha": commit, "siblings": files}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _serve(self, repository: Repository, name: str, commit: str, *, with_body: bool) -> None:
        data = repository.files[name]
        digest = hashlib.sha256 if name in repository.large else hashlib.sha1
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{digest(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if not with_body:
            return
        hub = self.server
        hub.ranges.append((name, start))
        for at in range(start, len(data), PIECE):
            piece = data[at : at + PIECE]
            with hub.lock:
                cuts = hub.cut_after is not None and hub.served >= hub.cut_after
                pauses = hub.pause_after is not None and hub.served >= hub.pause_after
                hub.broken = hub.broken or cuts
            if pauses:
                hub.paused.set()
                hub.go_on.wait(600)
            if cuts or pauses:
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(piece)
            with hub.lock:
                hub.served += len(piece)
                hub.bytes_of[name] = hub.bytes_of.get(name, 0) + len(piece)


def read_repository(
    folder: Path, *, large: tuple[str, ...] = (".safetensors", ".v3")
) -> Repository:
    """A repository with the files of a folder."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return Repository(files, {name for name in files if name.endswith(large)})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub at work in a thread; leaving it closes its port."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
