"""A small web server: a page to drop a photograph on, and OpenAI's chat completions.

It is meant for the machine that it runs on. It answers one request at a time, has no accounts, and
lets nobody else's page use it: the `Host` of a request must be its own, and so must the `Origin` of
one that a page makes. Sizes are checked before anything is read, images before any is decoded.
"""

import http.server
import json
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emor3_jax.errors import UserError
from emor3_jax.files import parse_json, show
from emor3_jax.inference import images
from emor3_jax.inference.chat import (
    ChatError,
    Choice,
    completion,
    parse_request,
    respond,
    stream_events,
)
from emor3_jax.inference.predictor import Predictor

logger = logging.getLogger(__name__)

MODEL, SET_MODEL = "emor3", "emor3-set"
"""Models of the chat: messages as they are, or asked as in training, in steps."""

MAX_BODY_BYTES = 2**26
"""Of a chat's request; of an image on the page it is `images.MAX_FETCHED_BYTES`."""

BODY_SECONDS = 60.0
"""Within which a request must have sent its body."""

MAX_WAITING = 32
"""Requests that wait for the device; more are told to come again."""

_MAX_CONNECTIONS = 128
_LINGER_SECONDS = 5.0
"""How long a body that was refused is still taken in, so that who sends it reads why."""

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class BusyError(UserError):
    """Too many requests wait already."""


class Service:
    """What the server answers, without HTTP.

    Attributes:
      predictor: asks the policy.
      name: of the policy.
    """

    def __init__(self, predictor: Predictor, name: str, *, fetch: bool = False) -> None:
        """Takes a predictor.

        Args:
          predictor: asks the policy.
          name: of the policy, a further name of the model.
          fetch: fetch images by their addresses, which lets a request reach what this machine can
            reach.
        """
        self.predictor, self.name = predictor, name
        self._fetch = images.fetch if fetch else None
        self._device, self._waiting = threading.Lock(), threading.Semaphore(MAX_WAITING)

    def about(self) -> dict[str, Any]:
        """Returns name, labels and question of the policy, and the limit of an image's bytes."""
        settings = self.predictor.settings
        return {
            "policy": self.name,
            "labels": list(settings.labels),
            "question": settings.question,
            "max_bytes": images.MAX_FETCHED_BYTES,
        }

    def models(self) -> dict[str, Any]:
        """Returns the list of models, as OpenAI's."""
        names = dict.fromkeys((MODEL, SET_MODEL, self.name))
        data = [{"id": x, "object": "model", "created": 0, "owned_by": "emor3_jax"} for x in names]
        return {"object": "list", "data": data}

    def predict(self, image: bytes, question: str | None) -> dict[str, Any]:
        """Returns the prediction for an image; raises UserError."""
        return self._alone(lambda: self.predictor.predict(image, question).to_json())

    def chat(self, data: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
        """Answers a chat.

        Args:
          data: the parsed body of the request.

        Returns:
          The body of the answer, and its events if they were asked for.

        Raises:
          UserError: if it cannot be answered.
        """
        predictor = self.predictor
        request = parse_request(data, predictor.settings.max_tokens, self._fetch)
        if request.model == SET_MODEL:
            if len(request.images) != 1 or request.choices != 1:
                rule = "is asked about one image at a time, with n=1"
                raise ChatError(f"model={SET_MODEL!r} {rule}", "messages")
            question = request.last_text or None
            found = self._alone(lambda: predictor.predict(request.images[0], question))
            tokens = len(predictor.policy.processor.tokenizer.encode(found.response))
            body = completion(request, [Choice(found.response, tokens, found.complete)], 0)
            body["emor3"] = found.to_json()
        elif request.model in (MODEL, self.name):
            body = completion(request, *self._alone(lambda: respond(predictor, request)))
        else:
            known = ", ".join(each["id"] for each in self.models()["data"])
            raise ChatError(
                f"there is no model {request.model!r}; known are {known}",
                "model",
                "model_not_found",
                404,
            )
        events = stream_events(body, request.stream_usage) if request.stream else None
        return body, events

    def _alone(self, work: Callable[[], Any]) -> Any:
        if not self._waiting.acquire(blocking=False):
            raise BusyError(f"{MAX_WAITING} requests wait already; come again later")
        try:
            with self._device:
                return work()
        finally:
            self._waiting.release()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests; `server` is a `Server`."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "emor3_jax", ""
    timeout = 30.0
    server: "Server"

    def do_GET(self) -> None:
        """Sends the page, its files, and what is told of the policy."""
        path = _split(self.path).path
        if not self._is_own():
            return
        if path in _FILES:
            name, kind = _FILES[path]
            self._send(200, (_PAGE / name).read_bytes(), kind)
        elif path == "/api/about":
            self._send_json(200, self.server.service.about())
        elif path == "/v1/models":
            self._send_json(200, self.server.service.models())
        elif path == "/health":
            self._send_json(200, {"status": "ok"})
        else:
            self._refuse(404, f"there is nothing at {show(path or self.path)}")

    def do_POST(self) -> None:
        """Answers about an image, or a chat."""
        address = _split(self.path)
        most = {"/api/predict": images.MAX_FETCHED_BYTES, "/v1/chat/completions": MAX_BODY_BYTES}
        if not self._is_own():
            return
        if address.path not in most:
            self._refuse(404, f"there is nothing at {show(address.path)}")
            return
        body = self._read_body(most[address.path])
        if body is None:
            return
        try:
            if address.path == "/api/predict":
                asked = urllib.parse.parse_qs(address.query).get("question", [""])[0].strip()
                self._send_json(200, self.server.service.predict(body, asked or None))
                return
            text = body.decode("utf-8")
            data = parse_json(text, "the body", ChatError, dict)
            answer, events = self.server.service.chat(data)
        except UnicodeDecodeError:
            self._refuse(400, "the body is no UTF-8")
        except BusyError as error:
            self._refuse(503, str(error), code="overloaded")
        except ChatError as error:
            self._refuse(error.status, str(error), error.param, error.code)
        except UserError as error:
            self._refuse(400, str(error))
        except Exception as error:
            logger.exception("a request failed")
            self._refuse(500, f"the server failed ({type(error).__name__}); its log says more")
        else:
            self._send_chat(answer, events)

    def _send_chat(self, answer: dict[str, Any], events: list[dict[str, Any]] | None) -> None:
        if events is None:
            self._send_json(200, answer)
            return
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self._send(200, "".join(lines).encode(), "text/event-stream; charset=utf-8")

    def _is_own(self) -> bool:
        """Refuses what another site's page asks for, under its name or from it."""
        host = self.headers.get("Host", "")
        name = _split(f"//{host}").hostname or ""
        if self.server.is_local and name not in _LOCAL:
            self._refuse(403, f"this server is not {show(host)}", close=True)
            return False
        origin = self.headers.get("Origin")
        if origin is not None and _split(origin).netloc != host:
            self._refuse(403, f"pages of {show(origin)} may not use this server", close=True)
            return False
        return True

    def _read_body(self, most: int) -> bytes | None:
        """Returns the body; None where the request was refused."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or self.headers.get("Transfer-Encoding"):
            self._refuse(411, "say the length of the body (Content-Length)", close=True)
            return None
        # Compared as a text first: a number of a million digits is not read.
        if len(length) > 12 or int(length) > most:
            self._refuse(413, f"the body is over the {most} bytes that are read", close=True)
            return None
        body, until = bytearray(), time.monotonic() + BODY_SECONDS
        try:
            while len(body) < int(length) and time.monotonic() < until:
                piece = self.rfile.read1(min(2**16, int(length) - len(body)))
                if not piece:
                    break
                body += piece
        except OSError:
            pass
        if len(body) < int(length):
            self._refuse(408, "the body did not come whole", close=True)
            return None
        return bytes(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuses what is no request, or of another method, as all else is."""
        self._refuse(code, message or "the request cannot be read", close=True)

    def _refuse(
        self, status: int, message: str, param: str = "", code: str = "", *, close: bool = False
    ) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": param or None, "code": code or None}
        self._send_json(status, {"error": error}, close=close)

    def _send_json(self, status: int, data: dict[str, Any], *, close: bool = False) -> None:
        body = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")
        self._send(status, body, "application/json; charset=utf-8", close=close)

    def _send(self, status: int, body: bytes, kind: str, *, close: bool = False) -> None:
        try:
            self.send_response(status)
            headers = _HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}
            # What was not read of a body would be taken for the next request.
            if close:
                headers["Connection"] = "close"
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            if close:
                self._drain()
        except OSError:
            # Who asked is gone.
            self.close_connection = True

    def _drain(self) -> None:
        """Takes in what is still sent: closed at once, the connection would lose the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1.0)
        until = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < until and self.connection.recv(2**16):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Logs a line about a request, what it says escaped."""
        logger.info("%s %s", self.address_string(), show(format % args))


def _split(address: str) -> urllib.parse.SplitResult:
    """Returns the parts of an address, all empty if it is none, as with half of a bracket."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError:
        return urllib.parse.urlsplit("")


class Server(http.server.ThreadingHTTPServer):
    """Listens; a thread for each connection, of which there are not too many.

    Attributes:
      service: answers.
      is_local: it can be reached from this machine alone.
    """

    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Opens the port.

        Args:
          service: answers.
          host: name or address to listen on; 0.0.0.0 can be reached from other machines.
          port: 0 takes any that is free.

        Raises:
          UserError: if it cannot be opened.
        """
        self.service, self.is_local = service, host in _LOCAL
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--host={host} --port={port}: {reason}; give another, or 0 for any that is free"
            ) from error

    @property
    def address(self) -> str:
        """Of the page."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers a connection in a thread of its own; closes it where there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As of the base class; lets the next connection in at the end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs an error of a connection, not of an answer: mostly that it was closed."""
        logger.debug("a connection failed", exc_info=True)
