"""A real HTTP server on loopback that keeps models and datasets as the Hugging Face hub does, as far as they are asked."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds and was asked.

    Attributes:
        url: its address.
        files: per repository its files; those of all branches together. A data set's name begins with `datasets/`.
        private: per repository whether it was made so.
        commits: per commit (repository, branch, first line of its message).
        fails_with: a status that every call gets; 0 = none.
        gated: names of data sets that nobody without the token may read.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    fails_with: int = 0
    gated: set[str] = field(default_factory=set)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serves until the context is left."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
            if hub.fails_with:
                self._send(hub.fails_with, {"error": "as the test wants it"})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, {"error": "Invalid username or password."})
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                is_new = name not in hub.files
                hub.files.setdefault(name, {})
                if is_new:
                    hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
                self._send(200 if is_new else 409, {"url": f"{hub.url}/{name}", "name": name})
            elif self.path == "/api/validate-yaml":  # the header of a card
                self._send(200, {"warnings": [], "errors": []})
            elif re.match(r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.path):
                self._send(200, {})
            elif found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/", self.path):
                asked = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                self._send(200, {"files": modes})
            elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/([^?]+)", self.path):
                repo, branch = found.groups()
                lines = [json.loads(line) for line in body.splitlines()]
                hub.commits.append((repo, branch, lines[0]["value"]["summary"]))
                for line in lines[1:]:
                    if line["key"] == "deletedFile":
                        del hub.files[repo][line["value"]["path"]]
                    else:
                        hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._send(200, {"commitUrl": f"{hub.url}/{repo}/commit/{SHA}", "commitOid": SHA})
            else:
                self._send(404, {"error": self.path})

        def do_GET(self) -> None:
            if hub.fails_with:
                self._send(hub.fails_with, {"error": "as the test wants it"})
            elif found := re.match(r"(?:/api)?/(datasets/[^/]+/[^/]+)(/.*)?$", self.path):
                self._get_data_set(found[1], found[2] or "")
            elif (found := re.match(r"/api/models/([^/]+/[^/]+)(/revision/.+)?$", self.path)) and found[1] in hub.files:
                siblings = [{"rfilename": name} for name in hub.files[found[1]]]
                self._send(200, {"id": found[1], "sha": SHA, "siblings": siblings, "private": False, "tags": []})
            elif found := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
                self._send(200, [_entry(name, data) for name, data in hub.files[found[1]].items()])
            elif found := re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
                data = hub.files[found[1]][found[2]]
                self._send(200, data, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
            else:
                self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _get_data_set(self, name: str, asked: str) -> None:
            files = hub.files.get(name)
            if name in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            elif files is None:
                self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif found := re.match(r"/tree/[^/?]+/?([^?]*)", asked):
                below = f"{found[1]}/" if found[1] else ""
                inside = {path: data for path, data in files.items() if path.startswith(below)}
                direct = {path: data for path, data in inside.items() if "/" not in path.removeprefix(below)}
                folders = {below + path.removeprefix(below).partition("/")[0] for path in inside.keys() - direct.keys()}
                named = [{"type": "directory", "path": path, "size": 0, "oid": SHA} for path in sorted(folders)]
                listed = inside if "recursive=true" in asked.lower() else direct
                self._send(200, [*named, *(_entry(path, data) for path, data in listed.items())])
            elif found := re.match(r"/resolve/[^/]+/([^?]+)", asked):
                if found[1] not in files:
                    self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                    return
                data = files[found[1]]
                if part := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                    data = data[int(part[1]) : int(part[2]) + 1]
                self._send(206 if part else 200, data, {"X-Repo-Commit": SHA, "ETag": '"0"'})
            else:
                self._send(200, {"id": name.removeprefix("datasets/"), "sha": SHA, "private": False, "tags": []})

        def _chunks(self) -> bytes:
            data = b""
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                data += self.rfile.read(size)
                self.rfile.readline()
            return data

        def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
