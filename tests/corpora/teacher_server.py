"""A local chat endpoint that behaves as badly as it is told to. Started by tests; speaks OpenAI's protocol."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prism_ray.response import render

USAGE = {"prompt_tokens": 100, "completion_tokens": 50}


def answer(index: int) -> str:
    return render("a picture", "look", str(index))


def completion(text, finish="stop", usage=USAGE) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "x", "choices": [choice]} | ({"usage": usage} if usage else {})


class TeacherServer:
    """`behave(index, nth)` names what happens to the nth request (from 1) for question `index`; "good" by default."""

    def __init__(self, behave: Callable[[int, int], str] | None = None) -> None:
        self.behave = behave or (lambda index, nth: "good")
        self.requests: list[dict] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.asked: Counter[int] = Counter()
        self.billed: Counter[int] = Counter()
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.slow_s = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                outer.handle(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        index = question_of(body)
        with self.lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.keys.add(handler.headers.get("Authorization", ""))
            self.asked[index] += 1
            nth = self.asked[index]
        action = self.behave(index, nth)
        if self.slow_s:
            time.sleep(self.slow_s)
        getattr(self, f"do_{action}")(handler, index)

    def bill(self, index: int) -> None:
        with self.lock:
            self.billed[index] += 1

    def send(self, handler, status: int, body: bytes, headers=(), length: int | None = None) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def good(self, index: int) -> bytes:
        self.bill(index)
        return json.dumps(completion(answer(index))).encode()

    def do_good(self, handler, index):
        self.send(handler, 200, self.good(index))

    def do_wrong(self, handler, index):
        self.bill(index)
        self.send(handler, 200, json.dumps(completion(render("a picture", "look", "no idea"))).encode())

    def do_malformed(self, handler, index):
        self.bill(index)
        self.send(handler, 200, json.dumps(completion("<caption>a</caption> the answer is 3")).encode())

    def do_cut(self, handler, index):
        self.bill(index)
        self.send(handler, 200, json.dumps(completion("<caption>a", "length")).encode())

    def do_empty(self, handler, index):
        self.bill(index)
        self.send(handler, 200, json.dumps(completion(None, "content_filter")).encode())

    def do_html(self, handler, index):
        self.send(handler, 200, b"<html>hello</html>")

    def do_silent_usage(self, handler, index):
        self.bill(index)
        self.send(handler, 200, json.dumps(completion(answer(index), usage=None)).encode())

    def do_busy(self, handler, index):
        self.send(handler, 429, b'{"error": {"message": "slow down"}}', [("Retry-After", "1")])

    def do_broken(self, handler, index):
        self.send(handler, 500, b'{"error": {"message": "oops"}}')

    def do_gateway(self, handler, index):
        self.bill(index)
        self.send(handler, 504, b"<html>timed out</html>")

    def do_echo(self, handler, index):
        words = f"no account for {handler.headers.get('Authorization')}"
        self.send(handler, 500, json.dumps({"error": {"message": words}}).encode())

    def do_key(self, handler, index):
        words = f"Incorrect API key provided: {handler.headers.get('Authorization')}"
        self.send(handler, 401, json.dumps({"error": {"message": words}}).encode())

    def do_quota(self, handler, index):
        self.send(handler, 429, b'{"error": {"message": "pay first", "code": "insufficient_quota"}}')

    def do_refused(self, handler, index):
        self.send(handler, 400, b'{"error": {"message": "this image is not allowed"}}')

    def do_hang(self, handler, index):
        self.bill(index)
        self.closing.wait(60)

    def do_drip(self, handler, index):
        body = self.good(index)
        self.send(handler, 200, b"", length=len(body) * 100)
        for byte in body:
            if self.closing.wait(0.05):
                return
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()

    def do_truncated(self, handler, index):
        body = self.good(index)
        self.send(handler, 200, body[: len(body) // 2], length=len(body))
        handler.close_connection = True

    def do_reset(self, handler, index):
        self.bill(index)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True


def question_of(body: dict) -> int:
    """The number in `what is N` of a request."""
    found = re.search(r"what is (\d+)", json.dumps(body["messages"]))
    assert found, body
    return int(found.group(1))
