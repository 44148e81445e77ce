"""A stand-in for the Hugging Face hub: the calls by which huggingface_hub makes and fills a
repository of models, as its source sends them and reads their answers."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from support.serving import serving

WRITES, READS = "hf_writes", "hf_reads"
"""Tokens of a user "someone": one that may write, one that may not."""


CODES = {"Repository not found": "RepoNotFound", "Invalid rev id": "RevisionNotFound"}
"""Message of an error → what the header X-Error-Code says."""


class Hub:
    """What the server holds, and how it is to fail.

    Attributes:
      files: repository → branch → path → contents.
      private: repositories that are not public.
      objects: sha256 → contents, of large files.
      commits: repository, branch and message of each commit.
      calls: method and path of each request.
      failing: (method, part of a path) → statuses with which the next such requests are answered; 0
        breaks the connection off in the middle of the body.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.calls: list[str] = []
        self.failing: dict[tuple[str, str], list[int]] = {}
        self.large: tuple[str, ...] = (".safetensors",)
        self.address = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Returns the status and what is sent as JSON."""
        if method == "PUT":  # an address that was given for one file, without a token
            return self._put(path.removeprefix("/lfs/"), body)
        if token not in (WRITES, READS):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/lfs/verify":
            asked = json.loads(body)
            return (200 if len(self.objects[asked["oid"]]) == asked["size"] else 422), {}
        if found := re.fullmatch(r"/(\S+)\.git/info/lfs/objects/batch", path):
            return self._batch(found[1], json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path)
        repository, verb, branch = found[1], found[2], unquote(found[3] or "main")
        if repository not in self.files:
            return 404, {"error": "Repository not found"}
        if token == READS and method != "GET":
            return 403, {"error": "Forbidden: this token may not write"}
        if verb == "branch":
            if branch in self.files[repository]:
                return 409, {"error": "Reference already exists"}
            self.files[repository][branch] = dict(self.files[repository]["main"])
            return 200, {}
        if branch not in self.files[repository]:
            return 404, {"error": f"Invalid rev id: {branch}"}
        there = self.files[repository][branch]
        if verb == "preupload":
            return 200, {"files": [self._mode(x, there) for x in json.loads(body)["files"]]}
        if verb == "commit":
            return self._commit(repository, branch, body.splitlines())
        return 200, {
            "_id": "0",
            "id": repository,
            "sha": "0" * 40,
            "private": repository in self.private,
            "siblings": [],
        }

    def _create(self, asked: dict[str, Any], token: str) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if token == READS or asked["organization"] != "someone":
            return 403, {"error": f"You may not make a model under {asked['organization']}"}
        if name in self.files:
            url = f"{self.address}/{name}"
            return 409, {"error": "You already created this model repo", "url": url}
        self.files[name] = {"main": {}}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(name)
        return 200, {"url": f"{self.address}/{name}", "name": name, "id": "0"}

    def _mode(self, file: dict[str, Any], there: dict[str, bytes]) -> dict[str, Any]:
        path, large = file["path"], file["path"].endswith(self.large)
        found: dict[str, Any] = {"path": path, "shouldIgnore": False}
        found["uploadMode"] = "lfs" if large else "regular"
        if path in there:
            data = there[path]
            blob = b"blob %d\0" % len(data) + data
            found["oid"] = (hashlib.sha256(data) if large else hashlib.sha1(blob)).hexdigest()
        return found

    def _batch(self, repository: str, asked: dict[str, Any]) -> tuple[int, Any]:
        objects = []
        for each in asked["objects"]:
            upload = {"href": f"{self.address}/lfs/{each['oid']}", "header": {}}
            verify = {"href": f"{self.address}/lfs/verify", "header": {}}
            new = each["oid"] not in self.objects
            actions = {"actions": {"upload": upload, "verify": verify}} if new else {}
            objects.append({"oid": each["oid"], "size": each["size"], **actions})
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, oid: str, body: bytes) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 422, {"error": "these bytes are others"}
        self.objects[oid] = body
        return 200, {}

    def _commit(self, repository: str, branch: str, lines: list[bytes]) -> tuple[int, Any]:
        header, *operations = map(json.loads, lines)
        assert header["key"] == "header"
        files = self.files[repository][branch]
        for each in operations:
            value = each["value"]
            if each["key"] == "lfsFile":
                data = self.objects[value["oid"]]
                assert len(data) == value["size"]
                files[value["path"]] = data
            else:
                assert (each["key"], value["encoding"]) == ("file", "base64")
                files[value["path"]] = base64.b64decode(value["content"])
        self.commits.append((repository, branch, header["value"]["summary"]))
        oid = f"{len(self.commits):040x}"
        return 200, {
            "commitUrl": f"{self.address}/{repository}/commit/{oid}",
            "commitOid": oid,
            "success": True,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.calls.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length", 0))
        status = 0
        for (method, part), statuses in hub.failing.items():
            if method == self.command and part in path and statuses:
                status = statuses.pop(0)
                if not status:
                    self.rfile.read(size // 2)
                    self.close_connection = True
                    self.connection.close()
                    return
        body = self.rfile.read(size)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(self._chunks())
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        answer = status, {"error": f"made to fail with {status}"}
        if not status:
            answer = hub.answer(self.command, path, token, body)
        data = json.dumps(answer[1]).encode()
        self.send_response(answer[0])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code := CODES.get(str(answer[1].get("error", "")).partition(":")[0]):
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _serve  # noqa: N815

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """Serves an empty hub at its `address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server):
        yield hub
