"""A hub on loopback: the parts of its protocol that huggingface_hub's downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories as dicts of contents; files of 200 bytes and more are kept in LFS.

    Args:
        repos: owner/name -> path -> content.
        cut: paths whose next download stops half way.
        spoilt: paths whose download has other bytes than stated.
        downloads: (path, first byte) of every GET.
    """

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    licence: str = "apache-2.0"
    cut: set[str] = field(default_factory=set)
    spoilt: set[str] = field(default_factory=set)
    downloads: list[tuple[str, int]] = field(default_factory=list)

    def info(self, repo: str) -> dict[str, object]:
        """The answer of /api/models/REPO/revision/REV?blobs=True."""
        siblings: list[dict[str, object]] = []
        for name, content in self.repos[repo].items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": git_oid(content)}
            if len(content) >= 200:
                sibling["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": {"license": self.licence}, "tags": []}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run it on a free port; ``hub.url`` is where."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            if path.startswith("api/models/"):
                repo = path.removeprefix("api/models/").split("/revision/")[0]
                if repo not in hub.repos:
                    return self.fail("RepoNotFound")
                return self.reply(json.dumps(hub.info(repo)).encode(), {"Content-Type": "application/json"}, body)
            repo, _, name = path.partition(f"/resolve/{COMMIT}/")
            content = hub.repos.get(repo, {}).get(name)
            if content is None:
                return self.fail("EntryNotFound")
            etag = sha256(content) if len(content) >= 200 else git_oid(content)
            self.file(name, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)

        def file(self, name: str, content: bytes, headers: dict[str, str], body: bool) -> None:
            if not body:
                return self.reply(content, headers, False)
            first = 0
            if (wanted := self.headers.get("Range", "")).startswith("bytes="):
                first = int(wanted.removeprefix("bytes=").split("-")[0] or 0)
            hub.downloads.append((name, first))
            sent = bytes(len(content)) if name in hub.spoilt else content
            self.send_response(206 if wanted else 200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content) - first))
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if name in hub.cut:
                self.wfile.write(sent[first : len(content) // 2])
                self.close_connection = True
                return None
            self.wfile.write(sent[first:])
            return None

        def reply(self, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def fail(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
