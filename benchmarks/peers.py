"""Other programs as processes that take turns with the benchmark, each in an environment of theirs.

`PEER_PYTHON` names the Python that has them (`pip install 'emor3_jax[peers]'`); by default the one
that runs the benchmark.
"""

import json
import os
import subprocess
import sys
from typing import Any

MALLOC = {
    "MALLOC_TOP_PAD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
"""Settings of glibc's allocator under which torch is fastest on CPU: no memory goes back."""


class Peer:
    """A process that answers every line with a JSON object."""

    def __init__(self, module: str, job: dict[str, Any]) -> None:
        """Starts `python -m module JOB` and waits until it is ready.

        Args:
          module: of the benchmarks.
          job: what the module is to do.
        """
        self._process = subprocess.Popen(
            [os.environ.get("PEER_PYTHON", sys.executable), "-m", module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "PEER_QUIET" in os.environ else None,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"} | MALLOC,
        )
        self.facts = self._read()

    def turn(self) -> dict[str, Any]:
        """Lets the process do one unit of its work; returns what it says of it."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            # Libraries print too; answers are marked.
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"the peer ended with status {self._process.wait()}")


def say(value: dict[str, Any]) -> None:
    """Writes one answer, in the peer's process."""
    print("@" + json.dumps(value), flush=True)
