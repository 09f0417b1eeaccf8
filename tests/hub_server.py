"""A model hub on loopback: it makes repositories and takes commits, and remembers both."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """What was asked of it.

    Attributes:
        repositories: what each was made with, by name.
        files: bytes by repository and path.
        tokens: of all requests.
        refuses: the status that making a repository is answered with; 0 = it is made.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision/")[0].partition("?")[0]
        if name in self.server.repositories:
            self._answer(200, {"sha": "0" * 40, "siblings": [], "id": name})
        else:
            self._answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            self._commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._answer(404, {"error": self.path})

    def _create(self, asked: dict[str, Any]) -> None:
        if self.server.refuses:
            self._answer(self.server.refuses, {"error": "you may not"})
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.server.repositories[name] = asked
        self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.server.files[name, item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        about = {"commitUrl": f"{self.server.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
        self._answer(200, about)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers for the length of the context."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
