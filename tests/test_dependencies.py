"""Dependencies point one way: models know nothing of rewards, rewards nothing of models, rl of
neither, and no library of a program."""

import ast
from pathlib import Path

import pytest

import emor3_jax

PACKAGE = Path(emor3_jax.__file__).parent
# Top-level modules that every part may import.
GROUND = {"errors"}
PROGRAMS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} - GROUND
# A program that lies beside what it shows; no library may import it.
INSPECT = PACKAGE / "data" / "inspect.py"


def _imports(file: Path) -> set[str]:
    """Parts of the package that a file imports, such as "models" or "train"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("emor3_jax.")}
    return found


RULES = {
    "models": {"rewards", "rl", "rollout", "data", "embedded", "io"},
    "rewards": {"models", "rl", "rollout", "data", "embedded", "io"},
    "rl": {"models", "rewards", "rollout", "data", "embedded", "io"},
    "parallel": {"models", "rewards", "rl", "rollout", "data", "embedded", "io"},
    "rollout": {"rewards", "rl", "embedded", "io"},
    "data": {"rewards", "rl", "rollout", "io"},
}


@pytest.mark.parametrize("part", RULES)
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    for file in files:
        if file != INSPECT:
            assert not _imports(file) & (RULES[part] | PROGRAMS), file
            assert "data.inspect" not in file.read_text(), file


def test_imports_are_found_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import emor3_jax.rl.losses\nfrom emor3_jax import models\n"
        "def f():\n    from emor3_jax.rewards.rules import LabelError\n"
    )
    assert _imports(file) == {"rl", "models", "rewards"}
