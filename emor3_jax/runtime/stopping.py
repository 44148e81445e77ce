"""Requests to stop: signals, and the cloud's notices that the machine will be taken away.

A run looks whether it was asked to stop where nothing is half done: between the pieces of its
start, between the batches of an evaluation, between the phases of a step, and after a step. What
takes longer than a stated time, such as compiling a program, is not waited for: a thread then saves
what can be saved and ends the process.

Programs that install a handler of SIGTERM in C, as libtpu does when it finds its devices, take the
signal away from Python; `StopSignal.listen` takes it back.
"""

import contextlib
import http.client
import math
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from emor3_jax.io.console import tell
from emor3_jax.parallel import hosts

STOPPED = 75
"""Exit status of a run that was asked to stop before its last step: the same command goes on."""

NUMBERS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Signals that ask to stop; SIGHUP only where it is not ignored, as under nohup."""

_NOTICE = b"\0"
_SENT_SEVERAL_TIMES = signal.SIGHUP
"""Ends nothing, however often it comes: a terminal that closes sends several."""

_ONE_REQUEST = 1.0
"""Seconds in which further signals belong to the first: a whole process group is sent one, and make
passes its own on to the run, which has had one already."""

_ASKED = "asked to stop: what is under way is finished and saved; a later signal ends at once"


class Stopped(Exception):  # noqa: N818
    """A run was asked to stop, and did so where nothing was half done."""


class StopSignal:
    """Turns the first SIGTERM, SIGINT or SIGHUP into a request to stop; a later one ends at once.

    Attributes:
      requested: whether it came.
      rescue: saves what can be saved; called by a thread once the time is over.
    """

    def __init__(self, seconds: float) -> None:
        """Begins to listen; only in the main thread.

        Args:
          seconds: after the request, until a thread calls `rescue` and ends the process with the
            status `STOPPED`, whatever the program is doing.
        """
        self.requested = False
        self.rescue: Callable[[], None] = lambda: None
        self._seconds, self._handled = seconds, math.inf
        # Python calls handlers between two of its own instructions, which an hour of compiling is.
        # What it writes to this socket is written at once.
        self._heard, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._numbers = tuple(
            number
            for number in NUMBERS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        )
        self._before = {number: signal.signal(number, self._handle) for number in self._numbers}
        threading.Thread(target=self._watch, name="stop signal", daemon=True).start()

    def listen(self) -> None:
        """Takes back the signals that a library has taken; not SIGTERM where JAX is to have it."""
        for number in self._numbers[hosts.jax_takes_sigterm() :]:
            signal.signal(number, self._handle)

    def request(self) -> None:
        """Asks to stop, as a signal does."""
        # It was closed or holds many of them: nobody listens, or the first one was heard.
        with contextlib.suppress(OSError):
            self._written.send(_NOTICE)

    def check(self) -> None:
        """Stops where any host was asked to; all must call this at the same points.

        Raises:
          Stopped: then.
        """
        if hosts.agree(self.requested):
            raise Stopped

    def restore(self) -> None:
        """Restores the handlers of before; nothing is listened to any more."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup)
        self._written.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if _ends(number, self._handled):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._handled == math.inf:
            self.requested, self._handled = True, time.monotonic()
            # Other event loops of this thread may have had the socket's place.
            self.request()

    def _watch(self) -> None:
        """Waits for the first request, then for the time to be over, a later one or `restore`."""
        # A machine whose end the cloud has told sends its own signal seconds later, for the first
        # time: only a signal after another one is a later request.
        first = signalled = math.inf
        with self._heard:
            while True:
                # Of a longer time the system's clocks know nothing.
                left = min(first + self._seconds - time.monotonic(), threading.TIMEOUT_MAX)
                self._heard.settimeout(None if first == math.inf else max(left, 0.0))
                try:
                    heard = self._heard.recv(1)
                except TimeoutError:
                    break
                if not heard:
                    return
                if heard != _NOTICE and heard[0] not in self._numbers:
                    continue
                if first == math.inf:
                    self.requested, first = True, time.monotonic()
                    tell(_ASKED)
                if heard != _NOTICE:
                    if _ends(heard[0], signalled):
                        os._exit(128 + heard[0])
                    signalled = min(signalled, time.monotonic())
        self._end()

    def _end(self) -> None:
        """Ends the process without the main thread, which is busy with something long."""
        tell(f"not waited for after {self._seconds:g} seconds: saving what is finished")
        try:
            self.rescue()
        except Exception as error:
            tell(f"that failed: {error!r}")
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(STOPPED)


def _ends(number: int, first: float) -> bool:
    """Returns whether a signal ends the process at once, because it is a later request.

    Args:
      number: of the signal.
      first: when the first signal came, in seconds of `time.monotonic`; infinite if none did.
    """
    return number != _SENT_SEVERAL_TIMES and time.monotonic() - first > _ONE_REQUEST


_METADATA = "GCE_METADATA_HOST"
_PRODUCT = Path("/sys/class/dmi/id/product_name")


class MaintenanceWatch:
    """Asks the metadata server of Google Cloud whether the machine is to be taken away.

    A spot machine is told of it there (`instance/preempted`). So is one whose host is maintained
    and that cannot be moved meanwhile (`instance/maintenance-event`), as no TPU or GPU can.
    """

    def __init__(self, notify: Callable[[], None], every: float = 5.0) -> None:
        """Begins to ask, in a thread; on machines of Google Cloud, elsewhere nothing is asked.

        Args:
          notify: called once, at the first notice.
          every: seconds between two questions.
        """
        self._notify, self._every, self._closed = notify, every, threading.Event()
        self._host = os.environ.get(_METADATA, "metadata.google.internal")
        if _METADATA in os.environ or _is_google_cloud():
            threading.Thread(target=self._ask, name="maintenance", daemon=True).start()

    def close(self) -> None:
        """Asks no more."""
        self._closed.set()

    def _ask(self) -> None:
        while not self._closed.is_set():
            preempted = self._read("preempted") == "TRUE"
            if preempted or self._read("maintenance-event").startswith("TERMINATE"):
                self._notify()
                return
            self._closed.wait(self._every)

    def _read(self, name: str) -> str:
        """Returns a value, "" if there is none, or nobody answers in HTTP and text."""
        address = f"http://{self._host}/computeMetadata/v1/instance/{name}"
        try:
            request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=2) as answer:
                return answer.read().decode().strip()
        # An answer that is none must not end the thread, which the next one may tell.
        except (OSError, http.client.HTTPException, ValueError):
            return ""


def _is_google_cloud() -> bool:
    try:
        return _PRODUCT.read_text().startswith("Google")
    except OSError:
        return False
