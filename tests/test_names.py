"""Unique class names, one base for all errors, and at most nine parameters to a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import emor3_jax
from emor3_jax import errors
from emor3_jax.config import ConfigError
from emor3_jax.data.errors import DataError

PACKAGE = Path(emor3_jax.__file__).parent
MAX_PARAMETERS = 9


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text())


def _classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Yields the file and the definition of every public top-level class."""
    for file, tree in _trees():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield file, node


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the number of parameters, `self` and `cls` excluded."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(each is not None and each.arg not in ("self", "cls") for each in named)


def test_no_two_modules_define_a_public_class_of_one_name() -> None:
    files: dict[str, list[str]] = {}
    for file, node in _classes():
        files.setdefault(node.name, []).append(file)
    shared = {name: where for name, where in files.items() if len(where) > 1}
    assert shared == {}


def test_no_function_takes_more_than_nine_parameters() -> None:
    found = {
        f"{file}:{node.name}": _parameters(node)
        for file, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and _parameters(node) > MAX_PARAMETERS
    }
    assert found == {}


def test_parameters_of_every_form_are_counted() -> None:
    (function,) = ast.parse("def f(self, a, /, b, *c, d=1, **e): ...").body
    assert isinstance(function, ast.FunctionDef)
    assert _parameters(function) == 5


def test_every_error_of_the_package_is_a_user_error() -> None:
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for file, node in _classes()
        if node.name.endswith("Error")
    }
    assert bases.pop("UserError") == ["ValueError"]
    # What lies outside of the program and of what it was given.
    assert bases.pop("RunError") == ["RuntimeError"]
    assert len(bases) > 10
    assert {name for name, base in bases.items() if base != ["UserError"]} == set()


@pytest.mark.parametrize("error", [ConfigError("steps", -1, "must be 0 or more"), DataError("x")])
def test_a_user_error_is_a_value_error(error: errors.UserError) -> None:
    assert isinstance(error, errors.UserError) and isinstance(error, ValueError)
