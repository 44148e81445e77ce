"""Servers of tests, each in a thread of its own."""

import contextlib
import threading
from collections.abc import Iterator
from socketserver import TCPServer


@contextlib.contextmanager
def serving(server: TCPServer) -> Iterator[None]:
    """Lets a server answer, and closes it afterwards."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
