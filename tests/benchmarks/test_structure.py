"""What one step takes, counted by hand on a package of three files."""

import importlib
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import structure
from benchmarks.structure import Entry, StepDone, StepTrace, count_step, source_lines

LOOP = '''\
import threading

from toy_steps import parts


def train():
    """The loop."""
    setup()
    for step in range(2):
        parts.begin(step)
        parts.log()


def setup():
    return parts.double(1)
'''

PARTS = '''\
import threading
import jax


def plain(f):
    return f


def begin(step):
    """Two lines

    and one more.
    """
    thread = threading.Thread(target=aside)
    thread.start()
    thread.join()

    class Local:
        value = 3

    from toy_steps import late

    return double(step) + sum(late.square(i) for i in range(3))


def aside():
    return 1


@jax.jit
@plain
def double(x):
    return (
        x +
        x
    )


def unused():
    return 2


def log():
    return inner()


def inner():
    return 4
'''

LATE = "ONE = 1\nsquare = lambda x: x * x\n"


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepTrace:
    """The functions of the step of a package, which is imported and run."""
    package = tmp_path / "toy_steps"
    package.mkdir()
    for name, text in (("__init__", ""), ("loop", LOOP), ("parts", PARTS), ("late", LATE)):
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    loop = importlib.import_module("toy_steps.loop")
    begin, end = Entry("parts.py", "begin"), Entry("parts.py", "log")
    trace = StepTrace(package, begin, end, at_begin=jax.clear_caches)
    sys.setprofile(trace)
    try:
        with pytest.raises(StepDone):
            loop.train()
    finally:
        sys.setprofile(None)
        for name in ("toy_steps", "toy_steps.loop", "toy_steps.parts", "toy_steps.late"):
            sys.modules.pop(name, None)
    return trace


def test_functions_of_a_step_are_those_between_its_calls(trace: StepTrace) -> None:
    # Neither what ran before (setup), nor another thread (aside), nor the log; no class or module.
    # `double` was traced before the step, by `setup`, and is traced again.
    names = {code.co_qualname for code in trace.functions}
    assert names == {"train", "begin", "begin.<locals>.<genexpr>", "double", "<lambda>"}


def test_lines_of_functions_have_docstrings_and_decorators(trace: StepTrace) -> None:
    spans = {code.co_name: list(source_lines(code)) for code in trace.functions}
    assert spans["train"] == list(range(6, 12))
    assert spans["begin"] == list(range(9, 24))
    assert spans["double"] == list(range(30, 37))
    assert spans["<lambda>"] == [2]


def test_a_line_counts_once(trace: StepTrace) -> None:
    # The generator lies within `begin`.
    assert count_step(trace.functions) == {
        "files that one step takes": 3,
        "lines of functions that one step takes": 6 + 15 + 7 + 1,
        "lines of these files": len((LOOP + PARTS + LATE).splitlines()),
    }


def test_functions_of_the_steps_are_in_this_checkout() -> None:
    root = Path(structure.__file__).parents[1] / "emor3_jax"
    current = [step for step in structure.STEPS if (root / step[0].file).exists()]
    assert len(current) == 1
    for file, function in current[0]:
        module = importlib.import_module(f"emor3_jax.{file[:-3].replace('/', '.')}")
        holder, name = function.split(".")
        assert callable(getattr(getattr(module, holder), name))
