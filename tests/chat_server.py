"""A chat endpoint on 127.0.0.1 that does as it is told: `with ChatServer(reply) as server: server.url`.

reply(number, body) gives what the request number gets: words, a dict (the whole JSON body), bytes (sent as they are), an
int (that status), (status, headers), or a callable taking the handler, for anything else.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, probabilities: Mapping[str, float] | None = None, **message: Any) -> dict[str, Any]:
    """A well-formed chat completion; probabilities: of the alternatives of its first token, which is the text."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    if probabilities is not None:
        top = [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    return {"choices": [choice], "usage": {"total_tokens": 10}}


class ChatServer:
    """requests: the bodies received, in order; keys: the Authorization header of each; paths: where each was sent."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                    server.paths.append(self.path)
                answer = reply(number, body)
                if callable(answer):
                    answer(self)
                    return
                status, headers = (answer, {}) if isinstance(answer, int) else (200, {})
                if isinstance(answer, tuple):
                    status, headers = answer
                if isinstance(answer, str):
                    answer = completion(answer)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # clients that hang up are part of the tests
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
