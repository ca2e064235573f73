"""A server on this machine with the interface of OpenAI's chat completions, which answers as a test says."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def completion(text, status: int = 200, **headers) -> tuple[int, dict, bytes]:
    return status, headers, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class VlmServer:
    """Runs inside a `with` block.

    Args:
        reply: (the number of requests before, the request's JSON) -> (status, headers, body), or the text of an answer.
        seconds: that each reply takes.

    Attributes:
        url: the endpoint's address.
        requests: (path, headers, JSON) of each request.
        most: the largest number of requests at the same time.
    """

    def __init__(self, reply: Callable | str, seconds: float = 0):
        self.requests, self.most, self._now, lock = [], 0, 0, threading.Lock()
        answer = (lambda number, body: completion(reply)) if isinstance(reply, str) else reply

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    number = len(self.requests)
                    self.requests.append((handler.path, dict(handler.headers), body))
                    self._now += 1
                    self.most = max(self.most, self._now)
                time.sleep(seconds)
                status, headers, content = answer(number, body)
                with lock:
                    self._now -= 1
                try:
                    handler.send_response(status)
                    for name, value in {"Content_Length": str(len(content)), **headers}.items():
                        handler.send_header(name.replace("_", "-"), value)
                    handler.end_headers()
                    handler.wfile.write(content)
                except OSError:
                    pass  # the other side did not wait

            def log_message(handler, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


def picture_of(body: dict) -> Image.Image:
    """The picture in a request."""
    (address,) = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def question_of(body: dict) -> str:
    (text,) = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
    return text
