"""The console command: `emor3 <program> …` is `python -m emor3_jax.<program> …`.

Without a program it lists them all. A name that is none is one line on stderr and exit status 2.
"""

import ast
import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = (
    "train",
    "sft",
    "evaluate",
    "infer",
    "serve",
    "export",
    "push",
    "compare",
    "replay",
    "inspect",
    "account",
    "compile",
)
"""Modules of the package that are programs, in the order in which they are listed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a program.

    Args:
      arguments: its name and its own arguments; None takes the command line's.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["help"]
    if name in ("help", "--help", "-h"):
        print(_overview())
        return
    program = name.removesuffix(".py")
    if program not in PROGRAMS:
        nearest = difflib.get_close_matches(program, PROGRAMS, n=1, cutoff=0.0)[0]
        known = ", ".join(PROGRAMS)
        print(
            f"error: {name!r} is no program (nearest: {nearest}); known are {known}",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = [f"emor3 {program}", *rest]
    # As of `python -m`: a config's own modules lie beside it.
    sys.path.insert(0, os.getcwd())
    runpy.run_module(f"emor3_jax.{program}", run_name="__main__", alter_sys=True)


def _overview() -> str:
    """Returns the programs, each with the first line of its docstring."""
    lines = ["usage: emor3 PROGRAM [arguments]; emor3 PROGRAM --help", ""]
    for program in PROGRAMS:
        source = (Path(__file__).parent / f"{program}.py").read_text(encoding="utf-8")
        lines.append(f"  {program:<10}{_first_line(source)}")
    return "\n".join(lines)


def _first_line(source: str) -> str:
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


if __name__ == "__main__":
    main()
