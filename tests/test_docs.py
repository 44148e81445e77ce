"""Commands of the docs: their programs, configs, fields and flags are there."""

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import emor3_jax
from configs.emoset import MACHINES
from emor3_jax import account
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.embedded.emoscenes.words import QUESTION
from emor3_jax.io.card import snippet
from emor3_jax.runtime import cli

ROOT = Path(emor3_jax.__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tpu/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
STANDS_FOR = {"MACHINE": "v5e-8", "configs/X.py": "configs/cpu_demo.py"}
"""Placeholders of commands → a value of theirs."""

OF_ALL = {"workdir", "help"}


def _commands(text: str) -> Iterator[list[str]]:
    """Yields program and arguments of each command in a block or between backticks.

    A command is `python -m module …`, or `emor3 program …`.
    """
    text = text.replace("\\\n", " ")
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    for line in (*lines, *re.findall(r"`([^`\n]+)`", text)):
        line = re.sub(r"^\s*(\.venv/bin/)?emor3 (?=[a-z])", "python -m emor3_jax.", line)
        if "python -m " not in line or line.lstrip().startswith("#"):
            continue
        words = shlex.split(line.split("python -m ", 1)[1], comments=True)
        yield [word for word in words if word not in ("&", "…")]


FOUND = sorted(
    {
        (str(page.relative_to(ROOT)), *words)
        for page in PAGES
        for words in _commands(page.read_text())
        if words[0].startswith(("emor3_jax", "benchmarks"))
    }
)


def _config(words: list[str]) -> ConfigDict | None:
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if not given or given[0] == "FILE":
        return None
    path, *options = given[0].split(":", 1)
    path = path if "/" in path else f"configs/{path}.py"
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return module.get_config(*options)


@pytest.mark.parametrize("command", FOUND, ids=lambda words: " ".join(words)[:120])
def test_every_command_of_the_docs_can_be_given(command: tuple[str, ...]) -> None:
    _, program, *words = command
    for placeholder, value in STANDS_FOR.items():
        words = [word.replace(placeholder, value) for word in words]
    spec = importlib.util.find_spec(program)
    assert spec is not None and spec.origin, program
    source = Path(spec.origin).read_text()
    if "account.define_flags()" in source:
        source += Path(account.__file__).read_text()
    if "infer.define_flags()" in source:
        source += (ROOT / "emor3_jax" / "infer.py").read_text()
    config = _config(words)
    if config is not None:
        # As the command line does: sets and terms of one's own.
        fields = [word.split("=", 1)[0] for word in words if word.startswith("--config.")]
        cli.add_entries(config, [field.removeprefix("--config.") for field in fields])
    for word in words:
        name = word.split("=", 1)[0].removeprefix("--")
        if not word.startswith("--") or name == "config" or name in OF_ALL:
            continue
        if name.startswith("config."):
            assert config is not None, command
            section: ConfigDict = config
            *sections, key = name.split(".")[1:]
            for each in sections:
                section = section[each]
            assert key in section, f"{name} of {command}"
        else:
            assert re.search(rf'["\-]{name}["{{]', source), f"--{name} of {command}"


def test_the_commands_of_the_docs_are_found() -> None:
    programs = {command[1] for command in FOUND}
    assert len(FOUND) > 50
    assert {"emor3_jax.train", "emor3_jax.compile", "emor3_jax.account"} <= programs


def test_the_lines_for_transformers_are_those_of_a_card() -> None:
    prompt = InferenceSettings().changed(question=QUESTION, template="tiny").prompt
    code = snippet("runs/demo/policy", "photo.jpg", prompt, 64)
    assert f"```python\n{code}\n```" in (ROOT / "docs/inference.md").read_text()


def test_every_target_of_make_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    pages = "".join(page.read_text() for page in PAGES)
    (targets,) = re.findall(r"^\.PHONY: (.*)", makefile, re.M)
    named = set(re.findall(r"`make ([a-z][a-z-]*)[`\s]", pages))
    for block in re.findall(r"```bash\n(.*?)```", pages, re.S):
        named |= set(re.findall(r"^make ([a-z][a-z-]*)", block, re.M))
    # A piece of a trace is named so.
    named.discard("batch")
    assert {"demo", "test", "docs"} <= named <= set(targets.split())


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_numbers_of_the_readme_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    results = (ROOT / "docs/results/cpu_demo.md").read_text()
    rows = re.findall(r"^\|[^|]*\| ((?:accuracy|decoupling) \|.*)", readme, re.M)
    assert len(rows) == 4 and all(row in results for row in rows)
    machines = dict(
        re.findall(r"^\|[^|]+\| `([^`]+)` \|(?:[^|]*\|){2} ([0-9]+ s) \|", readme, re.M)
    )
    train = (ROOT / "docs/train_3b.md").read_text()
    assert machines == dict(re.findall(r"^\|[^|]+\| `([^`]+)` \|.*\| ([0-9]+ s) \|$", train, re.M))
    assert set(machines) == set(MACHINES)


def test_the_table_of_machines_has_them_all() -> None:
    page = (ROOT / "docs/train_3b.md").read_text()
    assert set(re.findall(r"^\|[^|]+\| `([^`]+)` \|", page, re.M)) == set(MACHINES)
