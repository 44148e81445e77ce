"""Measure the structure of a checkout: sizes, signatures, and knowledge of a model family.

    python -m benchmarks.structure [CHECKOUT …]

Prints a markdown table with a column for each checkout, this one if none is named. Nothing of them
is imported: their sources are read. docs/results/structure.md has a table of two commits.
"""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

MAX_PARAMETERS = 9
"""Most parameters of a function, `self` and `cls` not counted."""


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
        any(name.startswith(f"{models}qwen2_5_vl") for name in imported(tree, modules))
        for module, tree in modules.items()
        if not module.startswith(models)
    )


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
    main([Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1]])
