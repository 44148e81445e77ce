"""The server: its doors, with a stand-in for the policy."""

import contextlib
import http.client
import json

import pytest
from support.stand_in import FOUND, StandIn, running

from emor3_jax.errors import UserError
from emor3_jax.inference import chat, images, server
from emor3_jax.inference.server import Server, Service


@pytest.fixture(scope="module")
def stand_in():
    return StandIn()


@pytest.fixture(scope="module")
def listening(stand_in):
    with running(Service(stand_in, "runs/demo")) as listening:
        yield listening


def send(listening, method: str, path: str, body=None, headers=None):
    """Returns status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", listening.server_port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_the_page_and_its_files_are_sent_with_a_policy_against_foreign_code(listening):
    for path, kind in (
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
    ):
        status, headers, body = send(listening, "GET", path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and len(body) > 500
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    page = send(listening, "GET", "/")[2].decode()
    # Which the policy would refuse to run.
    assert "<script>" not in page and "onclick" not in page and "<style" not in page


def test_the_page_sets_texts_never_as_html(listening):
    script = send(listening, "GET", "/page.js")[2].decode()
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert name not in script


def test_an_image_is_predicted(listening, stand_in):
    status, _, body = send(listening, "POST", "/api/predict?question=why%20%3F", b"image")
    assert status == 200 and json.loads(body)["label"] == "joy"
    assert stand_in.asked[-1] == (b"image", "why ?")
    send(listening, "POST", "/api/predict?question=", b"image")
    assert stand_in.asked[-1] == (b"image", None)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("GET", "/etc/passwd", None, {}, 404, "there is nothing at /etc/passwd"),
        ("GET", "/../serve.py", None, {}, 404, "there is nothing"),
        ("POST", "/", b"", {}, 404, "there is nothing at /"),
        ("POST", "/api/predict", b"bad", {}, 400, "cannot decode an image"),
        ("POST", "/api/predict", b"bug", {}, 500, "the server failed (ZeroDivisionError)"),
        ("POST", "/api/predict", None, {"Content-Length": "x"}, 411, "say the length"),
        ("POST", "/api/predict", None, {"Content-Length": "-1"}, 411, "say the length"),
        ("POST", "/api/predict", None, {"Content-Length": "9" * 5000}, 413, "the body is over"),
        # Sent whole before the answer is read, as clients do.
        ("POST", "/api/predict", bytes(2**25 + 1), {}, 413, "is over the"),
        ("POST", "/api/predict", iter([b"a"]), {"Transfer-Encoding": "chunked"}, 411, "the length"),
        ("POST", "/v1/chat/completions", b"{", {}, 400, "the body is no JSON"),
        ("POST", "/v1/chat/completions", b"\xff", {}, 400, "the body is no UTF-8"),
        ("POST", "/v1/chat/completions", b"[" * 10**5, {}, 400, "too many brackets"),
        ("POST", "/v1/chat/completions", b"[]", {}, 400, "must hold an object"),
        ("GET", "/", None, {"Host": "evil.example"}, 403, "this server is not evil.example"),
        ("GET", "/", None, {"Host": "[::1"}, 403, "this server is not [::1"),
        ("GET", "/", None, {"Origin": "http://[::1"}, 403, "may not use"),
        ("GET", "http://[::1/", None, {"Host": "localhost"}, 404, "nothing at http://[::1/"),
        ("PUT", "/", b"a", {}, 501, "Unsupported method ('PUT')"),
        ("POST", "/api/predict", b"a", {"Origin": "http://evil.example"}, 403, "may not use"),
        ("POST", "/api/predict", b"a", {"Origin": "null"}, 403, "may not use"),
    ],
)
def test_what_is_refused(listening, method, path, body, headers, status, message):
    found, _, said = send(listening, method, path, body, headers)
    assert found == status and message in json.loads(said)["error"]["message"]


def test_the_page_of_the_server_may_use_it(listening):
    origin = {"Origin": f"http://127.0.0.1:{listening.server_port}"}
    assert send(listening, "POST", "/api/predict", b"image", origin)[0] == 200


def test_a_body_that_does_not_come_is_given_up(listening, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(server.Handler, "timeout", 0.2)
    status, _, _ = send(listening, "POST", "/api/predict", b"ab", {"Content-Length": "9"})
    assert status == 408


def test_too_many_requests_are_told_to_come_again(stand_in, monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 0)
    with running(Service(stand_in, "policy")) as listening:
        status, _, body = send(listening, "POST", "/api/predict", b"image")
    assert status == 503 and "come again later" in json.loads(body)["error"]["message"]


def test_a_port_that_is_taken_is_named(listening):
    with pytest.raises(UserError, match=r"--port=\d+: Address already in use; give another"):
        Server(listening.service, port=listening.server_port)
    with pytest.raises(UserError, match="--port=70000"):
        Server(listening.service, port=70000)


def test_addresses_are_not_fetched_unless_asked_for(stand_in, monkeypatch):
    monkeypatch.setattr(images, "fetch", lambda url: url.encode())
    part = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/a"}}
    data = {"model": "emor3-set", "messages": [{"role": "user", "content": [part]}]}
    with pytest.raises(chat.ChatError, match="is not fetched"):
        Service(stand_in, "policy").chat(data)
    body, _ = Service(stand_in, "policy", fetch=True).chat(data)
    assert stand_in.asked[-1] == (b"http://10.0.0.1/a", None)
    assert body["choices"][0]["message"]["content"] == FOUND.response


@pytest.fixture(scope="module")
def client(listening):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{listening.address}/v1", api_key="none", max_retries=0)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aW1hZ2U="}}


def test_the_client_of_openai_lists_models_and_is_told_what_is_wrong(client):
    import openai

    assert [model.id for model in client.models.list()] == ["emor3", "emor3-set", "runs/demo"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="is asked about one image at a time"):
        client.chat.completions.create(
            model="emor3-set", messages=[{"role": "user", "content": "a"}]
        )


def test_the_client_of_openai_asks_as_in_training(client, stand_in):
    content = [IMAGE, {"type": "text", "text": "why ?"}]
    asked = {"model": "emor3-set", "messages": [{"role": "user", "content": content}]}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == FOUND.response
    assert answer.model_extra["emor3"]["label"] == "joy"
    assert stand_in.asked[-1] == (b"image", "why ?")
    pieces = client.chat.completions.create(**asked, stream=True)
    assert "".join(x.choices[0].delta.content or "" for x in pieces) == FOUND.response
