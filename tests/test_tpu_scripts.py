"""The scripts for TPU VMs: what they would run, and what they refuse."""

import shlex
import subprocess
from pathlib import Path

import pytest

import emor3_jax

ROOT = Path(emor3_jax.__file__).parents[1]
SCRIPTS = ("create", "setup", "launch", "logs", "delete")
WHERE = ["tiny", "--zone", "us-central2-b"]


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "tpu" / f"{script}.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def _printed(script: str, *arguments: str) -> list[list[str]]:
    """The commands that a script prints with --dry-run, each in words."""
    done = _run(script, *WHERE, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    # Bash writes line breaks as $'…\n…', which shlex does not know.
    quoted = "for each in {}; do printf '%s\\0' \"$each\"; done"
    out = []
    for line in done.stdout.splitlines():
        words = subprocess.run(["bash", "-c", quoted.format(line)], capture_output=True, text=True)
        out.append(words.stdout.split("\0")[:-1])
    return out


@pytest.mark.parametrize("script", [*SCRIPTS, "common"])
def test_bash_accepts_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "tpu" / f"{script}.sh")], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_stops_at_the_first_error_and_explains_itself(script: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / "tpu" / f"{script}.sh").read_text()
    done = _run(script, "--help")
    assert done.returncode == 0
    assert f"tpu/{script}.sh NAME --zone ZONE" in done.stdout
    assert "--dry-run" in done.stdout
    done = _run(script, "--zone", "z")
    assert done.returncode == 2
    assert "the name of the TPU VM is missing" in done.stderr
    done = _run(script, *WHERE, "--dry-run", "--wrong")
    assert done.returncode == 2
    assert "unknown argument: --wrong" in done.stderr


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_the_type_with_its_runtime(kind: str, version: str) -> None:
    (words,) = _printed("create", "--type", kind)
    assert words == [
        *("gcloud", "compute", "tpus", "tpu-vm", "create", "tiny", "--zone=us-central2-b"),
        *(f"--accelerator-type={kind}", f"--version={version}"),
    ]


def test_create_takes_spot_machines_a_project_and_a_runtime() -> None:
    (words,) = _printed(
        "create", "--type", "v7-8", "--version", "mine", "--spot", "--project", "our"
    )
    assert "--spot" in words and "--project=our" in words and "--version=mine" in words
    done = _run("create", *WHERE, "--dry-run", "--type", "v7-8")
    assert done.returncode == 2 and "give --version" in done.stderr


def test_setup_copies_and_installs_on_all_workers() -> None:
    archive, copy, install = _printed("setup")
    assert archive[:4] == ["git", "-C", str(ROOT), "archive"] and archive[-1] == "HEAD"
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[6] == "tiny:emor3_jax.tar.gz" and "--worker=all" in copy
    assert "--worker=all" in install
    script = install[-1].removeprefix("--command=")
    assert "python3.11 -m venv .venv" in script
    assert 'pip install --quiet --editable ".[tpu]"' in script
    subprocess.run(["bash", "-n", "-c", script], check=True)


def test_launch_starts_the_program_on_all_workers_in_the_background() -> None:
    program = ["-m", "emor3_jax.train", "--config=configs/tpu_v4.py", "--config.data.x=(1, 2)"]
    (words,) = _printed("launch", "--", *program)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "tiny"]
    assert "--worker=all" in words
    script = words[-1].removeprefix("--command=")
    subprocess.run(["bash", "-n", "-c", script], check=True)
    (line,) = [line for line in script.splitlines() if line.startswith("nohup")]
    started, _, rest = line.partition(" > ")
    assert shlex.split(started) == ["nohup", ".venv/bin/python", *program]
    assert rest == "logs/run.log 2>&1 < /dev/null &"
    assert "echo $! > logs/run.pid" in script
    done = _run("launch", *WHERE, "--dry-run")
    assert done.returncode == 2 and "the program is missing" in done.stderr


def test_logs_shows_the_end_of_the_log() -> None:
    (words,) = _printed("logs")
    assert words[-2:] == ["--worker=0", "--command=tail --lines=50 emor3_jax/logs/run.log"]
    (words,) = _printed("logs", "--worker", "all", "--follow")
    assert words[-2:] == [
        "--worker=all",
        "--command=tail --lines=50 --follow emor3_jax/logs/run.log",
    ]


def test_delete_lets_gcloud_ask_unless_told_not_to() -> None:
    (words,) = _printed("delete")
    assert words == [
        *("gcloud", "compute", "tpus", "tpu-vm", "delete", "tiny", "--zone=us-central2-b"),
    ]
    (words,) = _printed("delete", "--yes")
    assert words[-1] == "--quiet"
