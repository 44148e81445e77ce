"""Measure the structure of a checkout: sizes, signatures, and the code that one step runs.

    python -m benchmarks.structure [CHECKOUT …]

Prints a markdown table with a column for each checkout, this one if none is named. Sizes are read
from its sources, without importing them. What a step takes is measured: a process in the checkout
runs the first step of the tiny run of its tests and notes every function of the package that is
called on the main thread, those traced by `jax.jit` included, from the rollout to the log.
docs/results/structure.md has a table of two commits.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

MAX_PARAMETERS = 9
"""Most parameters of a function, `self` and `cls` not counted."""


class Entry(NamedTuple):
    """A call of a function of a package.

    Attributes:
      file: relative to the package.
      function: its qualified name.
    """

    file: str
    function: str


STEPS = (
    (Entry("runtime/run.py", "Run.key"), Entry("runtime/run.py", "Run.record")),
    # Before `Run`, the loop began the log of a step with the position of the data.
    (Entry("rounds.py", "play"), Entry("data/pipeline.py", "TrainBatches.get_state")),
)
"""First call of a step, and the call that ends it, by generation of the code."""


def read_modules(root: Path) -> dict[str, ast.Module]:
    """Returns dotted name → syntax tree of every module of the package in a checkout."""
    found = {}
    for file in sorted((root / "emor3_jax").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text())
    return found


def count_lines(root: Path) -> int:
    """Returns the lines of the package."""
    return sum(len(file.read_text().splitlines()) for file in (root / "emor3_jax").rglob("*.py"))


def function_lines(module: ast.Module, name: str) -> int:
    """Returns the lines of a top-level function, its docstring included; 0 if it is not there."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (node.end_lineno or node.lineno) - node.lineno + 1
    return 0


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the number of parameters, `self` and `cls` not counted."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(each is not None and each.arg not in ("self", "cls") for each in named)


def long_signatures(modules: Mapping[str, ast.Module]) -> int:
    """Returns how many functions take more than `MAX_PARAMETERS`."""
    return sum(
        count_parameters(node) > MAX_PARAMETERS
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def imported(tree: ast.AST, modules: Mapping[str, ast.Module]) -> set[str]:
    """Returns the modules of the package that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from a import b` loads the module a.b if there is one, else a.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & modules.keys()


def knows_family(modules: Mapping[str, ast.Module]) -> int:
    """Returns how many modules outside `models` import a module of a family's folder."""
    models = "emor3_jax.models."
    return sum(
        any(name.startswith(models) and name.count(".") > 2 for name in imported(tree, modules))
        for module, tree in modules.items()
        if not module.startswith(models)
    )


class StepDone(BaseException):
    """Ends a traced run; not an error, so that nothing handles it."""


class StepTrace:
    """A profile function (`sys.setprofile`) that collects the functions of a package.

    Those that call the first function of the step are of the step too.

    Attributes:
      functions: their code objects; module and class bodies are not among them.
    """

    def __init__(
        self, package: Path, begin: Entry, end: Entry, at_begin: Callable[[], None] | None = None
    ) -> None:
        """Collects nothing yet.

        Args:
          package: folder of the sources.
          begin: the call that starts the step.
          end: the call that ends it, itself not of the step; raises `StepDone`.
          at_begin: called when the step starts.
        """
        self.functions: set[CodeType] = set()
        self._package, self._begin, self._end = str(package) + os.sep, begin, end
        self._at_begin, self._started = at_begin, False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Looks at one event of the interpreter."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._package):
            return
        call = Entry(code.co_filename.removeprefix(self._package), code.co_qualname)
        if not self._started:
            if call != self._begin:
                return
            self._started = True
            if self._at_begin is not None:
                self._at_begin()
            caller = frame.f_back
            while caller is not None:
                self._add(caller.f_code)
                caller = caller.f_back
        elif call == self._end:
            sys.setprofile(None)
            raise StepDone
        self._add(code)

    def _add(self, code: CodeType) -> None:
        # Bodies of modules and classes run when they are imported, and are not optimized.
        is_function = code.co_flags & inspect.CO_OPTIMIZED
        if is_function and code.co_filename.startswith(self._package):
            self.functions.add(code)


def source_lines(code: CodeType) -> Iterator[int]:
    """Yields the lines of a function, docstring, decorators and inner functions included."""
    yield from range(code.co_firstlineno, _last_line(code) + 1)


def _last_line(code: CodeType) -> int:
    own = (end or code.co_firstlineno for _, end, *_ in code.co_positions())
    inner = (_last_line(each) for each in code.co_consts if isinstance(each, CodeType))
    return max((code.co_firstlineno, *own, *inner))


def count_step(functions: set[CodeType]) -> dict[str, int]:
    """Returns how much source a step takes: files, their lines, and the lines of its functions.

    Args:
      functions: of the step. A line of two functions counts once.
    """
    files = {code.co_filename for code in functions}
    lines = {(code.co_filename, line) for code in functions for line in source_lines(code)}
    return {
        "files that one step takes": len(files),
        "lines of functions that one step takes": len(lines),
        "lines of these files": sum(len(Path(f).read_text().splitlines()) for f in files),
    }


def trace_step(root: Path) -> dict[str, int]:
    """Runs the first step of a tiny training of a checkout and returns `count_step` of it.

    Must run in a process of its own, which has not imported the package.
    """
    sys.path[:0] = [str(root), str(root / "tests"), str(root / "tests/support")]
    import jax
    import tiny_run

    from emor3_jax import train

    package = root / "emor3_jax"
    begin, end = next(step for step in STEPS if (package / step[0].file).exists())
    # The evaluation before the first step traced functions that the step needs too.
    trace = StepTrace(package, begin, end, at_begin=jax.clear_caches)
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_run.make_config(tiny_run.make_folder(Path(folder)))
        sys.setprofile(trace)
        try:
            train.train(config, Path(folder) / "run")
        except StepDone:
            return count_step(trace.functions)
        finally:
            sys.setprofile(None)
    raise RuntimeError(f"{root}: the run ended without a call of {end}")


def measure_step(root: Path) -> dict[str, int]:
    """Returns `trace_step` of a checkout, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", str(root)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(f"{root}: the step failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(roots: list[Path]) -> None:
    """Prints the table."""
    rows: dict[str, list[int]] = {}
    for root in roots:
        modules = read_modules(root)
        figures = {
            "lines of `train.train`": function_lines(modules["emor3_jax.train"], "train"),
            "lines of `train.py`": len((root / "emor3_jax/train.py").read_text().splitlines()),
            "lines of `sft.train`": function_lines(modules["emor3_jax.sft"], "train"),
            f"functions over {MAX_PARAMETERS} parameters": long_signatures(modules),
            "modules outside `models/` that import a family": knows_family(modules),
            **measure_step(root),
            "modules": len(modules),
            "lines of the package": count_lines(root),
        }
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    print(f"| | {' | '.join(str(root) for root in roots)} |")
    print(f"|---|{'---:|' * len(roots)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:,}' for value in values)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(trace_step(Path(sys.argv[2]).resolve())))
        sys.exit()
    main([Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1]])
