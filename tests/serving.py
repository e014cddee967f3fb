"""A real server on loopback that answers as badly as a test wishes."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """What to send, and how to fail at it."""

    raw: bytes = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False
    """Promise more bytes than are sent."""
    silent: bool = False
    """Close the connection with nothing said."""
    drip: bool = False
    """Send a space every few milliseconds, for ever."""


def completion(text, **message):
    body = {
        "choices": [
            {"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4},
    }
    return Answer(json.dumps(body).encode())


def failure(status, message="no", **about):
    headers = about.pop("headers", {})
    return Answer(json.dumps({"error": {"message": message, **about}}).encode(), status, headers)


def last_text(body):
    """The text of the last message, whatever form it has."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class Server:
    """Answers by ``behave(body, count)``, where count tells how often this body came before."""

    def __init__(self, behave):
        self.behave = behave
        self.seen, self.headers, self.times, self.most = [], [], [], 0
        self._now, self._lock, self.ended = 0, threading.Lock(), threading.Event()

    def serve(self, handler):
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(raw)
        with self._lock:
            count = self.seen.count(body)
            self.seen.append(body)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            answer = self.behave(body, count)
            if isinstance(answer, str):
                answer = completion(answer)
            self.ended.wait(answer.delay)
            # before the answer is sent: whoever has it may ask again before this thread goes on
            with self._lock:
                self._now -= 1
            self.send(handler, answer)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True

    def send(self, handler, answer):
        if answer.silent:
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if answer.drip:
            handler.close_connection = True
            handler.end_headers()
            while not self.ended.wait(0.02):
                handler.wfile.write(b" ")
        handler.send_header("Content-Length", str(len(answer.raw) + 50 * answer.cut))
        handler.end_headers()
        handler.wfile.write(answer.raw)
        handler.close_connection = answer.cut


class Listener(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that went away is what some tests are about."""


@contextmanager
def serving(behave):
    """Serve on a free port of loopback; the server says what it saw."""
    server = Server(behave)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def do_POST(self):
            server.path = self.path
            server.serve(self)

        def log_message(self, *args):
            pass

    listener = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    try:
        yield server
    finally:
        server.ended.set()
        listener.shutdown()
        listener.server_close()
        thread.join()
