"""Requests to an OpenAI-compatible endpoint, against a server of this file's own on loopback."""

import json
import pickle
import socket
import threading

import pytest
from PIL import Image

from rewards.endpoint import Endpoint, beginning
from tests.helpers.refusals import error_of
from tests.helpers.vlm_server import VlmServer, completion, picture_of, question_of

KEY = "sk-a-secret-of-mine"
PICTURE = Image.effect_noise((20, 12), 80).convert("RGB")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Waits are counted, not waited for."""
    waits = []
    monkeypatch.setattr("rewards.endpoint.sleep", waits.append)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return waits


def endpoint(url, key_variable=None, timeout=20.0):
    return Endpoint(url, "a-model", 64, key_variable, timeout, 4, "vlm_judge")


def test_a_request_has_the_picture_the_question_and_the_model():
    with VlmServer("seven") as server:
        assert endpoint(server.url + "/").answer(PICTURE, "How good?\nÜ") == "seven"
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("a-model", 64, 0)
    assert [message["role"] for message in body["messages"]] == ["user"]
    sent = picture_of(body)
    assert (sent.format, sent.size, sent.tobytes()) == ("PNG", PICTURE.size, PICTURE.tobytes())
    assert question_of(body) == "How good?\nÜ"


# ---- what passes


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(status, hurried):
    with VlmServer(lambda number, body: completion("later", status if number < 2 else 200)) as server:
        assert endpoint(server.url).answer(PICTURE, "?") == "later"
    assert len(server.requests) == 3 and hurried == [1, 2]


def test_it_waits_as_long_as_the_server_says_but_not_for_ever(hurried):
    waits = iter(("7", "100000", "soon"))
    reply = lambda number, body: completion("x", 429, Retry_After=next(waits)) if number < 3 else completion("x")  # noqa: E731
    with VlmServer(reply) as server:
        assert endpoint(server.url).answer(PICTURE, "?") == "x"
    assert hurried == [7, 60, 4]


def test_a_server_that_stays_busy_is_one_line(hurried):
    with VlmServer(lambda number, body: (503, {}, b"<h1>try\nlater</h1>")) as server:
        message = error_of(endpoint(server.url).answer, PICTURE, "?")
    assert message == ("vlm_judge.endpoint: the server 127.0.0.1 answered 503: '<h1>try later</h1>', 5 times")
    assert len(server.requests) == 5 and hurried == [1, 2, 4, 8]


def test_a_server_that_hangs_is_one_line_after_its_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        message = error_of(endpoint(url, timeout=0.1).answer, PICTURE, "?")
    assert "cannot be reached (timed out), 5 times" in message


def test_a_time_out_is_followed_by_another_try(monkeypatch):
    stuck = threading.Event()

    def reply(number, body):
        if number == 0:
            stuck.wait(5)
        return completion("9")

    with VlmServer(reply) as server:
        assert endpoint(server.url, timeout=0.3).answer(PICTURE, "?") == "9"
        stuck.set()
    assert len(server.requests) == 2


def test_a_server_that_is_not_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/v1"
    assert "the server 127.0.0.1 cannot be reached (" in error_of(endpoint(url).answer, PICTURE, "?")


def test_a_connection_that_breaks_is_tried_again():
    with VlmServer(
        lambda number, body: completion("x", Content_Length="999") if number == 0 else completion("x")
    ) as server:
        assert endpoint(server.url, timeout=1.0).answer(PICTURE, "?") == "x"
    assert len(server.requests) == 2


def test_an_error_whose_text_never_comes_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def serve():
            for _ in range(5):
                connections.append(server.accept()[0])
                connections[-1].recv(1)
                connections[-1].sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 99\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        message = error_of(endpoint(url, timeout=0.2).answer, PICTURE, "?")
    assert message.endswith("answered 503: '', 5 times")


# ---- what does not pass


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_a_refusal_is_one_line_at_once(status, hurried):
    with VlmServer(lambda number, body: (status, {}, b'{"error": "no such model"}')) as server:
        message = error_of(endpoint(server.url).answer, PICTURE, "?")
    assert f'answered {status}: \'{{"error": "no such model"}}\'' in message
    assert len(server.requests) == 1 and not hurried


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>hello</html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"\xff\xfe"],
)
def test_garbage_is_one_line(body):
    with VlmServer(lambda number, request: (200, {}, body)) as server:
        message = error_of(endpoint(server.url).answer, PICTURE, "?")
    assert "sent no chat completion, but " in message and len(message) < 300


def test_an_answer_without_text_is_empty():
    with VlmServer(lambda number, body: completion(None)) as server:
        assert endpoint(server.url).answer(PICTURE, "?") == ""


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirection_is_followed(status, monkeypatch):
    """The key would be sent along."""
    monkeypatch.setenv("MY_KEY", KEY)
    with VlmServer("5") as other, VlmServer(lambda n, b: (status, {"Location": other.url}, b"")) as server:
        assert f"answered {status}" in error_of(endpoint(server.url, "MY_KEY").answer, PICTURE, "?")
    assert not other.requests


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a/v1", "file:///etc/passwd", "http://", "http:///v1"])
def test_an_address_that_is_none_is_one_line(url):
    message = error_of(endpoint, url)
    assert message.startswith(f"vlm_judge.endpoint={url!r} is not allowed")


@pytest.mark.parametrize("url", [f"https://me:{KEY}@host/v1", f"https://{KEY}@host/v1", f"https://host/v1?key={KEY}"])
def test_an_address_with_a_secret_is_refused_without_showing_it(url):
    message = error_of(endpoint, url)
    assert KEY not in message and "api_key_variable" in message


# ---- the key


def test_the_key_is_sent_and_kept_nowhere(monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with VlmServer("7") as server:
        asked = endpoint(server.url, "MY_KEY")
        asked.answer(PICTURE, "?")
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
        assert KEY.encode() not in pickle.dumps(asked) and KEY not in json.dumps(asked.identity)
        monkeypatch.setenv("MY_KEY", "another")  # it is read for each request
        asked.answer(PICTURE, "?")
        assert server.requests[1][1]["Authorization"] == "Bearer another"


def test_a_wrong_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with VlmServer(lambda number, body: (401, {}, f"Incorrect API key provided: {KEY}.".encode())) as server:
        message = error_of(endpoint(server.url, "MY_KEY").answer, PICTURE, "?")
    assert "answered 401: 'Incorrect API key provided: ….'" in message and KEY not in message
    with VlmServer(lambda number, body: (200, {}, KEY.encode())) as server:
        assert KEY not in error_of(endpoint(server.url, "MY_KEY").answer, PICTURE, "?")


@pytest.mark.parametrize("value", [None, "", "  ", "a\nb", "ключ"])
def test_a_key_that_cannot_be_sent_is_found_at_once_and_not_shown(value, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    message = error_of(endpoint, "http://127.0.0.1/v1", "MY_KEY")
    assert message.startswith("vlm_judge.api_key_variable must be the name of an environment variable")
    assert not (value or "").strip() or value not in message


def test_a_key_in_the_place_of_its_variables_name_is_not_shown():
    assert KEY not in error_of(endpoint, "http://127.0.0.1/v1", KEY)


# ---- proxies


def test_another_host_is_reached_through_the_proxy_and_this_one_without(monkeypatch):
    with VlmServer("from the proxy") as proxy, VlmServer("direct") as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert endpoint("http://judge.invalid/v1").answer(PICTURE, "?") == "from the proxy"
        assert endpoint(server.url).answer(PICTURE, "?") == "direct"
    assert [path for path, *_ in proxy.requests] == ["http://judge.invalid/v1/chat/completions"]


def test_a_beginning_is_short_and_one_line():
    assert beginning(" a\n b ") == "'a b'" and len(beginning("word " * 100)) < 130
