"""Dependencies point one way: models know nothing of rewards, rewards nothing of models, rl of
neither, data nothing of the embedded policy, no library of a program; nothing outside `models`
knows a model family, and there is no circle."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import emor3_jax

PACKAGE = Path(emor3_jax.__file__).parent


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


BELOW = {
    "parallel": {"errors"},
    "models": {"errors", "files", "types", "parallel"},
    "rewards": {"errors", "spelling", "types", "parallel"},
    "rl": set(),
    "data": {"errors", "files", "spelling", "types", "parallel", "models"},
    "rollout": {"types", "parallel", "models", "data", "rewards", "rl"},
    "learner": {"types", "parallel", "models", "data", "rl"},
    "evaluation": {"files", "types", "parallel", "data", "rewards", "rollout"},
    "io": {"errors", "parallel", "evaluation"},
    "flops": {"errors", "types", "models"},
    # The embedded base policy is a program of its own.
    "embedded": {"types", "config", "models", "data", "rl", "io", "runtime"},
    "prepare": {
        *("types", "config", "parallel", "models", "data", "rewards", "rl", "rollout", "learner"),
        *("files", "io", "flops", "embedded"),
    },
    "runtime": {
        *(
            "errors",
            "files",
            "types",
            "config",
            "parallel",
            "models",
            "data",
            "rewards",
            "rl",
            "rollout",
        ),
        *("learner", "evaluation", "io", "flops", "prepare"),
    },
    "inference": {
        *("errors", "files", "types", "config", "parallel", "models", "data", "rewards", "rollout"),
        *("io", "prepare", "runtime"),
    },
    "compiler": {
        *("types", "parallel", "models", "data", "rewards", "rl", "rollout", "learner", "flops"),
        "prepare",
    },
}
"""Room → what it may import."""


def test_every_room_has_its_rule() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(BELOW)


@pytest.mark.parametrize("part", BELOW)
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    for file in files:
        assert _imports(file) <= BELOW[part] | {part}, file


def test_only_models_know_a_family() -> None:
    families = [path.parent.name for path in (PACKAGE / "models").glob("*/family.py")]
    assert families
    for file in sorted(PACKAGE.rglob("*.py")):
        if (PACKAGE / "models") in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            names += [getattr(node, "module", None) or ""]
            parts = {part for name in names for part in str(name).split(".")}
            assert not parts & set(families), file


def test_types_are_the_ground() -> None:
    assert _imports(PACKAGE / "types.py") == {"parallel"}
    assert _imports(PACKAGE / "errors.py") == _imports(PACKAGE / "spelling.py") == set()
    assert _imports(PACKAGE / "files.py") == {"errors"}


def _modules() -> dict[str, Path]:
    """Returns dotted name → file of every module of the package."""
    root = PACKAGE.parent
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def _loaded(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Returns module → modules of the package that importing it loads by a statement of its own.

    Imports inside functions are left out: they run later, when a circle does no harm.
    """

    def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child
            elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from statements(child)

    found = {}
    for module, file in modules.items():
        names = set()
        for node in statements(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            else:
                # `from a import b` loads the module a.b if there is one, else a.
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else str(node.module) for name in members}
        found[module] = names & modules.keys()
    return found


def _circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Returns the strongly connected components; one node counts if it has an edge to itself."""

    def reachable(node: str) -> set[str]:
        seen: set[str] = set()
        todo = [node]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {node: reachable(node) for node in graph}
    found: list[set[str]] = []
    for node in graph:
        circle = {other for other in reach[node] if node in reach[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = _loaded(_modules())
    assert len(graph) > 100 and "emor3_jax.config" in graph["emor3_jax.prepare.checks"]
    assert _circles(graph) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert _circles(graph) == [{"b", "c"}, {"e"}]


def test_imports_are_found_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import emor3_jax.rl.losses\nfrom emor3_jax import models\n"
        "def f():\n    from emor3_jax.rewards.rules import LabelError\n"
    )
    assert _imports(file) == {"rl", "models", "rewards"}
