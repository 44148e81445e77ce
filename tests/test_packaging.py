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


def test_make_takes_no_environment_of_an_older_python(tmp_path: Path) -> None:
    old = tmp_path / "venv" / "bin" / "python"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for given in ([f"VENV={tmp_path / 'venv'}"], [f"VENV={tmp_path / 'new'}", f"PYTHON={old}"]):
        done = subprocess.run(["make", "setup", *given], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and not (tmp_path / "new").exists()
        assert f"{old} is no Python of 3.11 or later: name one" in done.stderr


def test_a_python_without_the_packages_says_so_in_one_line() -> None:
    # Without its site-packages; within the repository, as after a clone.
    for program in ("emor3_jax.train", "emor3_jax"):
        command = [sys.executable, "-S", "-E", "-m", program, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {sys.executable} lacks packages that this one needs")
    imported = [sys.executable, "-S", "-E", "-c", "import emor3_jax"]
    done = subprocess.run(imported, cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: " in done.stderr and ". .venv/bin/activate" in done.stderr


def test_an_old_python_is_named_with_its_version() -> None:
    told = emor3_jax._way_out((3, 9), ["jax"])
    assert told.startswith("this package needs Python 3.11 or later, and ") and " is 3.9: " in told
    assert emor3_jax._way_out((3, 11), []) == ""
