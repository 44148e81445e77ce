"""What runs on a TPU's workers, on this machine: start, state, stop, buckets, installation."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.cloud import ROOT, StandIns

PROGRAM = """#!/usr/bin/env bash
trap 'echo stopping; exit 75' TERM
printf '%s\\n' "$@"
case "$1" in
  run) ;;
  deaf) trap '' TERM ;;
  end) exit "$2" ;;
  *) exit 0 ;;
esac
while true; do sleep 0.05; done
"""
"""Stands in for Python: ends with a status, or runs until it is asked to stop."""


class Worker:
    """A worker with its folder, as setup.sh leaves it."""

    def __init__(self, cloud: StandIns) -> None:
        self.cloud, self.folder = cloud, cloud.home / "emor3_jax"
        (self.folder / "tpu").mkdir(parents=True)
        self.script = self.folder / "tpu" / "worker.sh"
        shutil.copy(ROOT / "tpu" / "worker.sh", self.script)
        python = self.folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PROGRAM)
        python.chmod(0o755)

    def __call__(self, *arguments: str):
        """Runs worker.sh."""
        return self.cloud.run(self.script, *arguments)

    def state(self, wanted: str) -> str:
        """Returns the state once it is the wanted one, or as it stays."""
        for _ in range(100):
            said = self("state").stdout.removeprefix("run: ").rstrip()
            if said == wanted:
                break
            time.sleep(0.05)
        return said

    def pid(self) -> int:
        return int((self.folder / "logs" / "run.pid").read_text())

    def log(self) -> list[str]:
        return (self.folder / "logs" / "run.log").read_text().splitlines()


@pytest.fixture
def worker(tmp_path: Path):
    """A worker; what still runs there at the end is ended."""
    worker = Worker(StandIns(tmp_path))
    yield worker
    if "running" in worker("state").stdout:
        os.kill(worker.pid(), signal.SIGKILL)


def test_a_program_runs_on_and_leaves_its_status(worker) -> None:
    assert worker.state("none") == "none"
    assert worker("start", "end", "3").returncode == 0
    assert worker.state("ended 3") == "ended 3"
    assert worker.log() == ["end", "3"]
    # A later one takes its place, and its log is kept.
    worker("start", "end", "0", "two words", "(1, 2)")
    assert worker.state("ended 0") == "ended 0"
    assert worker.log() == ["end", "0", "two words", "(1, 2)"]
    assert (worker.folder / "logs" / "run.previous.log").read_text() == "end\n3\n"


def test_a_stop_is_told_from_an_end(worker) -> None:
    assert "nothing runs here" in worker("stop").stdout
    worker("start", "run")
    assert worker.state("running") == "running"
    assert worker("stop").returncode == 0
    assert worker.state("ended 75 asked") == "ended 75 asked"
    assert worker.log()[-1] == "stopping"
    # The next start forgets that it was asked.
    worker("start", "end", "0")
    assert worker.state("ended 0") == "ended 0"


def test_two_programs_never_run_side_by_side(worker) -> None:
    worker("start", "run")
    first = worker.pid()
    done = worker("start", "end", "0")
    assert done.returncode == 3 and "a program still runs here" in done.stderr
    assert worker.pid() == first
    assert worker("start", "--replace", "end", "0").returncode == 0
    assert worker.state("ended 0") == "ended 0"
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_program_that_does_not_listen_is_ended(worker, monkeypatch) -> None:
    worker("start", "deaf")
    assert worker.state("running") == "running"
    monkeypatch.setenv("PATIENCE", "1")
    done = worker("start", "--replace", "end", "0")
    assert done.returncode == 0 and "ended without a checkpoint after 1 seconds" in done.stderr
    assert worker.state("ended 0") == "ended 0"


def test_a_machine_that_was_restarted_has_no_program(worker) -> None:
    worker("start", "run")
    pid = worker.pid()
    # As after a restart: the process is gone and nobody noted its status.
    (parent,) = Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[:1]
    os.kill(int(parent), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    assert worker.state("gone") == "gone"


def test_buckets_are_mounted_and_reached_as_folders(worker) -> None:
    worker.cloud.add("gcsfuse")
    # The second bucket is mounted already.
    worker.cloud.add("mountpoint", '[[ "$2" == */gcs/there ]]')
    worker(
        *("start", "end", "0", "--workdir=gs://box/runs/a"),
        "--config.data.train.path=gs://there/a.parquet,gs://there/b.parquet",
    )
    assert worker.state("ended 0") == "ended 0"
    home = worker.cloud.home
    assert worker.log()[2:] == [
        f"--workdir={home}/gcs/box/runs/a",
        f"--config.data.train.path={home}/gcs/there/a.parquet,{home}/gcs/there/b.parquet",
    ]
    (mount,) = [call for call in worker.cloud.calls() if call[0] == "gcsfuse"]
    assert mount[-2:] == ["box", f"{home}/gcs/box"]
    assert {"--implicit-dirs", "--metadata-cache-ttl-secs=0"} <= set(mount)
    assert (home / "gcs" / "box").is_dir()


def test_a_bucket_that_cannot_be_mounted_stops_the_start(worker) -> None:
    worker.cloud.add("gcsfuse", "exit 1")
    worker.cloud.add("mountpoint", "exit 1")
    assert worker("start", "end", "0", "--workdir=gs://box/a").returncode == 1
    assert worker.state("none") == "none"


def test_the_installation_waits_for_a_busy_package_manager(worker) -> None:
    for name in ("curl", "sleep", "python3.11"):
        worker.cloud.add(name)
    worker.cloud.add("lsb_release", "echo jammy")
    # Refuses the first update, as while a new machine updates itself.
    worker.cloud.add(
        "sudo",
        """
        [[ "$1" != tee ]] || exec cat > /dev/null
        [[ "$*" != *update* || -e "$HOME/tried" ]] || { touch "$HOME/tried"; exit 100; }
        """,
    )
    done = worker("install")
    assert done.returncode == 0, done.stderr
    ran = [call for call in worker.cloud.calls() if call[0] in ("sudo", "python3.11")]
    assert ran[2:4] == [["sudo", "apt-get", "update", "-qq"]] * 2
    assert ran[4][-3:] == ["python3.11", "python3.11-venv", "gcsfuse"]
    assert ran[5] == ["python3.11", "-m", "venv", ".venv"]


def test_anything_else_is_refused(worker) -> None:
    for task, status in (("fly", 2), ("--help", 0)):
        done = worker(task)
        assert done.returncode == status and "tpu/worker.sh start" in done.stdout
