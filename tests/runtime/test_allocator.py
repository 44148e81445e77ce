"""Freed memory stays with a process that asks for it, and with no other."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from emor3_jax.runtime.allocator import keep_freed_memory

ROOT = Path(__file__).parents[2]

_FREED = """
import sys
import numpy as np
from emor3_jax.runtime.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
array = np.ones(2**24)  # 128 MiB
assert resident() - before > 2**26
del array
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
@pytest.mark.parametrize(("how", "kept"), [("keep", True), ("leave", False)])
def test_what_is_freed_stays_with_the_process(how: str, kept: bool) -> None:
    ours = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    printed = subprocess.run(
        [sys.executable, "-c", _FREED, how],
        env=ours | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert (int(printed) > 2**26) == kept


def test_what_the_environment_says_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    library = SimpleNamespace(mallopt=lambda *option: asked.append(option) or 1)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert keep_freed_memory(library) and (-1, -1) in asked
    asked.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory(library) and not asked


def test_an_allocator_without_options_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert not keep_freed_memory(SimpleNamespace())
