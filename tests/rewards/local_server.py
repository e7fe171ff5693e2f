"""A server on this machine whose POSTs a test answers, and which counts how many it has at a time."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LocalServer:
    """Serves from the start until `close`; a subclass gives `answer`, and `listed` where GETs have an answer.

    `most` is the greatest number of POSTs at a time; `over` is set at the end, for an answer that would never come.
    """

    def __init__(self) -> None:
        self.busy = self.most = 0
        self.lock, self.over = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.listed(self)

            def do_POST(self):
                with outer.lock:
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                try:
                    outer.answer(self)
                finally:
                    with outer.lock:
                        outer.busy -= 1

            def log_message(self, format, *args):
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                """A client that gave up is no news."""

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler: Any) -> Any:
        """Answers a POST."""
        raise AssertionError("this server answers no POST")

    def listed(self, handler: Any) -> Any:
        """Answers a GET."""
        handler.send_error(501)

    def close(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


def send(handler: Any, status: int, reply: Any, cut: int = 0, **headers: str) -> None:
    """Sends a reply, bytes or JSON, without its last `cut` bytes."""
    data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) - cut])
