"""The notebooks: well formed, without outputs, and their part for a CPU run as it stands there."""

import ast
import glob
import importlib.util
import json
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
from support import tiny_run
from support.cloud import ROOT

FILES = {
    "colab": "tpu/notebooks/colab.ipynb",
    "tpu_vm": "tpu/notebooks/tpu_vm.ipynb",
    "method": "notebooks/method.ipynb",
}
# What a cell needs that a test has not: it is not run. A cell "parameters" is followed by the
# test's own.
NEEDS = {"network", "files", "accelerator"}


def read(name: str) -> list[dict]:
    """Returns the cells of a notebook, the text of each in one string."""
    notebook = json.loads((ROOT / FILES[name]).read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"]]


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", ()))


@pytest.mark.parametrize("name", FILES)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    cells = read(name)
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["source"].strip()
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert tags(cell) <= NEEDS | {"parameters"}
            # Lines for the shell and for the notebook itself are not Python.
            lines = [x for x in cell["source"].splitlines() if not x.startswith(("!", "%"))]
            compile("\n".join(lines), f"{name}:{cell['id']}", "exec")
        else:
            assert cell["cell_type"] == "markdown" and "outputs" not in cell


@pytest.mark.parametrize("name", FILES)
def test_what_a_notebook_names_is_there(name: str) -> None:
    text = "\n".join(cell["source"] for cell in read(name))
    for word in text.replace("`", " ").replace("(", " ").replace(")", " ").split():
        word = word.rstrip(".,:").removeprefix("--config=")
        if word.startswith(("configs/", "docs/", "emor3_jax/", "notebooks/", "tpu/")):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("name", FILES)
def test_what_a_notebook_imports_is_there(name: str) -> None:
    code = [cell["source"] for cell in read(name) if cell["cell_type"] == "code"]
    lines = [x for x in "\n".join(code).splitlines() if not x.startswith(("!", "%"))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("emor3_jax", "configs")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(inner), inner


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Fields that make the demo tiny: a random policy and a handful of scenes.

    The shapes are those of `test_train`, whose compiled programs can be taken from the cache.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    tiny_run.write_policy(folder / "policy")
    tiny_run.write_rows(folder / "rows.parquet", 4, 0)
    fields = {
        "policy.path": str(folder / "policy"),
        "steps": 3,
        "rollout.prompts": 4,
        "rollout.responses": 3,
        "rollout.max_tokens": 8,
        "reflect.text_lengths": (8,),
        "policy_update.prompts": 2,
        "policy_update.micro_prompts": 1,
        "policy_update.response_lengths": (8,),
        "evaluate.prompts": 4,
        "evaluate.likelihood": False,
        "reward.table_cache": str(folder / "tables"),
        "log.compile_cache": os.environ.get("JAX_COMPILATION_CACHE_DIR", ""),
    }
    return fields


def of_notebook(name: str, fields: dict) -> dict:
    """Returns the fields that make the run of a notebook tiny, all data sets read from one file."""
    sets = ("held_out",) if name == "method" else ("emoscenes", "shifted")
    found = dict(fields)
    rows = str(Path(fields["policy.path"]).parent / "rows.parquet")
    for each in ("data.train", *(f"evaluate.sets.{each}" for each in sets)):
        found |= {f"{each}.kind": "parquet", f"{each}.path": rows, f"{each}.split": ""}
    if name != "method":
        found["evaluate.sets.shifted.labels"] = "mikels8"
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_part_for_a_cpu_runs(name, settings, tmp_path, monkeypatch, capsys) -> None:
    shown: list[str] = []
    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, shown.append
    ipython = types.ModuleType("IPython")
    # Matplotlib asks for them.
    ipython.version_info, ipython.get_ipython = (9, 0, 0), lambda: None
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(ROOT)
    names: dict = {"__name__": "__main__"}
    ran = 0
    for cell in read(name):
        if cell["cell_type"] != "code" or tags(cell) & NEEDS:
            continue
        exec(compile(cell["source"], f"{name}:{cell['id']}", "exec"), names)
        ran += 1
        if "parameters" in tags(cell):
            names |= {"workdir": tmp_path / "run", "settings": of_notebook(name, settings)}
    assert ran >= 5
    run = tmp_path / "run" / ("run" if name == "method" else "")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    said = capsys.readouterr().out
    if name == "method":
        # The cells compare reward and advantage with sums by hand themselves.
        assert shown == [] and "groups whose rewards are all equal: " in said
        assert "\ndrawn to evoke: " in said and "→" in said
        return
    (report,) = shown
    assert "<h1>EMO-R3: run</h1>" in report
    assert ("emotion: " if name == "colab" else " chip-hours\n") in said


@pytest.mark.parametrize(
    ("device", "installed", "extras"),
    [
        # What the runtime has is kept, on a TPU too.
        ("/dev/vfio/0", ["0.10.2", "0.10.2"], ["."]),
        ("/dev/vfio/0", ["0.7.2", "0.10.2"], [".", ".[tpu]"]),
        ("/dev/nvidiactl", ["0.7.2", "0.10.2"], [".", ".[gpu]"]),
        ("", ["0.7.2", "0.10.2"], ["."]),
    ],
)
def test_colab_keeps_its_jax_where_it_can(device, installed, extras, tmp_path, monkeypatch) -> None:
    (cell,) = (cell for cell in read("colab") if "def install" in cell["source"])
    monkeypatch.chdir(tmp_path)
    calls: list[list[str]] = []

    def run(command: list[str], check: bool) -> None:
        calls.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    versions = iter(installed)
    found = types.SimpleNamespace
    monkeypatch.setattr(metadata, "distributions", lambda name: [found(version=next(versions))])
    monkeypatch.setattr(glob, "glob", lambda pattern: [x for x in [device] if pattern[:9] in x])
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda path: path == device if path.startswith("/dev") else exists(path)
    )
    exec(compile(cell["source"], "install", "exec"), {})
    assert calls[0][:2] == ["git", "clone"] and Path.cwd().name == "emor3_jax"
    assert [command[-1] for command in calls[1:]] == extras
