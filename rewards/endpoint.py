"""Asks a vision-language model behind an OpenAI-compatible endpoint about a picture."""

import base64
import io
import json
import os
from http.client import HTTPException
from time import sleep
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from rewards.errors import RewardError, first_line

TRIES = 5  # of one request
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two tries; the wait doubles from one to the next
BUSY = (408, 429)  # with all from 500 on, the HTTP states in which a server may do better the next time


class Endpoint:
    """A model behind `POST <url>/chat/completions`, as vLLM, SGLang and many services offer it.

    A request that meets a busy server, an error of the server, a broken connection or a time-out is repeated. The
    environment's proxies are used, but not for a server on this machine. The key is read from the environment for each
    request. It is not kept, and errors do not show it.

    Args:
        url: The address up to "/v1".
        model: The name of the model there.
        key_variable: The environment variable with the key. None: no key is sent.
        timeout: The longest wait for a part of a reply, in seconds.
        at_once: The most requests at the same time.
        group: The group of the options, to name in errors.

    Raises:
        RewardError: The address or the variable is not allowed.
    """

    def __init__(
        self, url: str, model: str, max_tokens: int, key_variable: str | None, timeout: float, at_once: int, group: str
    ):  # fmt: skip
        self.url = url.rstrip("/") + "/chat/completions"
        self.host = _host(url, f"{group}.endpoint")
        self.model, self.max_tokens, self.timeout, self.at_once = model, max_tokens, timeout, at_once
        self.key_variable, self.group = key_variable, group
        self.identity = (model, max_tokens)
        self._key()  # a missing key is found now

    def answer(self, picture: Any, question: str) -> str:
        """Returns the model's answer to a PIL picture, which is sent as PNG, and a question.

        Raises:
            RewardError: The endpoint refuses the request, cannot be reached, or answers with something else.
        """
        file = io.BytesIO()
        picture.save(file, format="PNG")
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        reply = self._post(json.dumps({**body, "temperature": 0, "max_tokens": self.max_tokens}).encode())
        try:
            text = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise self._error(f"sent no chat completion, but {self._shown(reply)}") from None
        return text if isinstance(text, str) else ""

    def _post(self, body: bytes) -> bytes:
        local = [ProxyHandler({})] if self.host in ("localhost", "127.0.0.1", "::1") else []
        opener = build_opener(_NoRedirect, *local)
        for tried in range(1, TRIES + 1):
            key = self._key()
            headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
            wait = FIRST_WAIT * 2 ** (tried - 1)
            try:
                with opener.open(Request(self.url, body, headers), timeout=self.timeout) as reply:
                    return reply.read()
            except HTTPError as error:
                reason = f"answered {error.code}: {self._shown(_body_of(error))}"
                if error.code not in BUSY and error.code < 500:
                    raise self._error(reason) from None
                asked = error.headers.get("Retry-After", "")
                wait = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait
            except (OSError, HTTPException) as error:  # time-outs are among the former
                reason = f"cannot be reached ({first_line(error)})"
            if tried < TRIES:
                sleep(wait)
        raise self._error(f"{reason}, {TRIES} times")

    def _key(self) -> str:
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            # Neither is shown, because what stands in the option may be the key itself.
            raise RewardError(
                f"{self.group}.api_key_variable must be the name of an environment variable that holds a key in one "
                "line of ASCII characters, and there is no such variable"
            )
        return key

    def _shown(self, reply: bytes) -> str:
        """Returns the beginning of a reply in one line, without the key, which some servers repeat."""
        text, key = reply.decode(errors="replace"), self._key()
        return beginning(text.replace(key, "…") if key else text)

    def _error(self, reason: str) -> RewardError:
        return RewardError(f"{self.group}.endpoint: the server {self.host} {reason}")


def _body_of(error: HTTPError) -> bytes:
    """Returns the beginning of the body of an error's reply, which may break off as any reply may."""
    try:
        return error.read(2000)
    except (OSError, HTTPException):
        return b""


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirection, because the key would go along, to whatever server it names."""

    def redirect_request(self, *arguments):
        return None


def _host(url: str, field: str) -> str:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise RewardError(f"{field} must not hold a name, a password or a key; api_key_variable names one's variable")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(f"{field}={url!r} is not allowed; it is an address such as 'http://127.0.0.1:8000/v1'")
    return parts.hostname


def beginning(text: str) -> str:
    """Returns the first 120 characters of a text, in quotes and in one line."""
    text = " ".join(text.split())
    return repr(text[:120] + "…" if len(text) > 120 else text)
