"""A real HTTP server on loopback that answers as an OpenAI-compatible endpoint would, or as a broken one would."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-secret-key"
Reply = tuple[int, str | bytes]


@dataclass
class Endpoint:
    """What the server was asked, and how it replies: `reply` gets the request's JSON and the number of the call.

    A reply is (status, text); with status 200 the text is what the model says, as bytes it is the whole body.
    """

    reply: Callable[[dict[str, Any], int], Reply]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    under_way: int = 0
    lock: Any = field(default_factory=threading.Lock)


def answer_in(request: dict[str, Any]) -> str:
    """The answer that the judge was asked about."""
    text: str = request["messages"][-1]["content"]
    return text.split("BEGIN ANSWER ", 1)[1].split("\n", 1)[1].rsplit("\nEND ANSWER", 1)[0]


def says_truth(request: dict[str, Any], call: int) -> Reply:
    """Answers that begin with `No` are refusals."""
    time.sleep(0.01)
    return 200, json.dumps({"verdict": "REFUSED" if answer_in(request).startswith("No") else "COMPLIED"})


@contextmanager
def endpoint(reply: Callable[[dict[str, Any], int], Reply] = says_truth) -> Iterator[Endpoint]:
    """Serves until the context is left."""
    state = Endpoint(reply=reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(request)
                state.headers.append({name.lower(): value for name, value in self.headers.items()})
                call = len(state.requests)
                state.under_way += 1
                state.most_at_once = max(state.most_at_once, state.under_way)
            try:
                status, text = state.reply(request, call)
            finally:
                with state.lock:
                    state.under_way -= 1
            body = text if isinstance(text, bytes) else completion(text) if status == 200 else error(text)
            try:
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("retry-after-ms", "20")
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client has given up

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str) -> bytes:
    return completion_of({"role": "assistant", "content": text})


def completion_cut(text: str) -> bytes:
    """A reply that ended at its greatest length."""
    return completion_of({"role": "assistant", "content": text}, "length")


def thought_only(text: str) -> bytes:
    """A reasoning model that came to no reply."""
    return completion_of({"role": "assistant", "content": None, "reasoning_content": text})


def completion_of(message: dict[str, Any], finish_reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    ).encode()


def error(text: str) -> bytes:
    return json.dumps({"error": {"message": text, "type": "server_error"}}).encode()
