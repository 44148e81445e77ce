"""What is installed holds configs, templates and the page too; which Python `make` takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emor3_jax

ROOT = Path(emor3_jax.__file__).parents[1]


def test_what_is_built_holds_configs_templates_and_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    package = tmp_path / "emor3_jax"
    configs = {file.name for file in (ROOT / "configs").glob("*.py")}
    assert {file.name for file in (package / "share" / "configs").iterdir()} == configs

    def others(folder: Path) -> set[str]:
        kinds = (".txt", ".j2", ".html", ".css", ".js", ".safetensors", ".jinja")
        files = (file for file in folder.rglob("*") if file.suffix in kinds)
        return {str(file.relative_to(folder)) for file in files}

    assert others(package) == others(ROOT / "emor3_jax") and len(others(package)) > 20
    assert "emor3 = emor3_jax.__main__:main" in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("found", ["python3", "python3.12", ""])
def test_make_takes_the_first_python_that_is_new_enough(tmp_path: Path, found: str) -> None:
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {int(name != found)}\n")
        (tmp_path / name).chmod(0o755)
    command = ["make", *(["-n"] if found else []), "setup", f"VENV={tmp_path / 'venv'}"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if found:
        assert f" || {found} -m venv " in done.stdout
    else:
        assert done.returncode == 2 and "no Python of 3.11 or later was found" in done.stderr
