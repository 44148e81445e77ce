"""Images by their names and addresses; what is fetched is bounded in kind, size and time."""

import http.server
import time

import pytest
from PIL import Image
from support.serving import serving

from emor3_jax.errors import UserError
from emor3_jax.inference.images import expand, fetch, image_bytes


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image")
        elif self.path == "/file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
        elif self.path == "/gone":
            self.send_response(404)
        elif self.path == "/slow":
            # A head that never ends, each piece in time.
            for _ in range(20):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: b\r\n" if not _ else b"X-B: c\r\n")
                time.sleep(0.05)
            return
        else:
            self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * (3000 if self.path == "/large" else 8))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}"


def test_an_address_is_fetched_where_it_was_moved_to(address):
    assert fetch(f"{address}/image") == fetch(f"{address}/moved") == image_bytes(f"{address}/image")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone", "answers 404"),
        ("/large", "sends over 2000 bytes"),
        ("/slow", "has not sent its image within 0.4 s"),
        ("/file", "is not allowed"),
    ],
)
def test_what_is_not_fetched_is_named(address, path, message):
    with pytest.raises(UserError, match=message) as raised:
        fetch(address + path, most=2000, seconds=0.4)
    assert path in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data://x"])
def test_other_kinds_of_addresses_are_refused(name):
    with pytest.raises(UserError, match="only addresses of http"):
        image_bytes(name)


def test_nothing_listens():
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("http://127.0.0.1:1/a", seconds=2.0)


def test_a_folder_is_walked_in_order(tmp_path):
    for name in ("b.png", "a.jpg", ".hidden.png", "notes.txt", "within/c.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [each.name for each in expand([str(tmp_path), tmp_path / "b.png"])]
    assert [name.removeprefix(f"{tmp_path}/") for name in names] == [
        *("a.jpg", "b.png", "within/c.PNG"),
        "b.png",
    ]
    assert next(expand([Image.new("RGB", (4, 4))])).read().startswith(b"\x89PNG")
