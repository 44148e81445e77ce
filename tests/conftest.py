"""What all tests share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from support import compiler_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", compiler_flags.FAST)
# Where compiled programs are kept, small ones too: many tests and their processes call the same.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest

# No test is timed: two of them at once, on a busy machine, are slow.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# XLA has read its flags now. The TPU's compiler ends a process with a flag that it does not know.
jax.devices()
del os.environ["XLA_FLAGS"]

MAPPINGS = 10_000
"""Linux lets a process have 65,530 memory mappings, and XLA crashes where it gets no more."""


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_what_programs_keep(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees the programs of the tests so far where they are many: each maps some pages.

    No run leaves its mesh set, which would reach the tests of the next file, and no file loads the
    TPU's compiler without saying so.
    """
    before = _mapped()
    yield
    assert jax.sharding.get_mesh().empty
    mapped = _mapped()
    if mapped.count("\n") > MAPPINGS:
        jax.clear_caches()
    if "libtpu" in mapped and "libtpu" not in before:
        assert request.path in _loading(request.session.items), "mark it: loads_tpu_compiler"


def _mapped() -> str:
    """Returns the files that this process maps to memory, "" where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_text() if maps.exists() else ""


def pytest_collection_finish() -> None:
    """Leaves modules out of every later search for garbage."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files that load the TPU's compiler last: JAX's profiler crashes in a process with it.

    Whole files, since processes that share the tests take them file by file (`--dist loadfile`).
    """
    loading = _loading(items)
    items.sort(key=lambda item: item.path in loading)


def _loading(items: list[pytest.Item]) -> set[Path]:
    """Returns the files of which a test is marked so."""
    return {item.path for item in items if item.get_closest_marker("loads_tpu_compiler")}
