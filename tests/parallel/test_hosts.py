"""Two processes do what one does; how a process finds out whether it is one of several."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from support import compiler_flags
from support.tiny_run import make_folder

from emor3_jax.models import load
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import MeshError

ROOT = Path(__file__).parents[2]


Job = tuple[Path, int, int]
"""Folder of a run, its steps, and the batch at which a process gets SIGTERM; 0 for none."""


def run(folder: Path, *jobs_of_each: list[Job]) -> list[list[str]]:
    """Runs jobs on 4 devices in all, shared by as many processes as there are lists.

    Returns:
      What each process printed of each job.
    """
    processes = len(jobs_of_each)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": compiler_flags.on_devices(4 // processes),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        hosts.ADDRESS: f"localhost:{port}",
        hosts.COUNT: str(processes),
    }
    command = [sys.executable, str(Path(__file__).with_name("host_run.py")), str(folder)]
    logs = [folder / f"{i}-of-{processes}.log" for i in range(processes)]
    running = []
    for i, (log, jobs) in enumerate(zip(logs, jobs_of_each, strict=True)):
        given = json.dumps([[str(workdir), *rest] for workdir, *rest in jobs])
        with log.open("w") as out:
            running.append(
                subprocess.Popen(
                    [*command, given],
                    env=environment | {hosts.INDEX: str(i)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [process.wait(timeout=600) for process in running]
    printed = [log.read_text() for log in logs]
    assert codes == [0] * processes, "\n".join(text[-3000:] for text in printed)
    return [re.split(r"^job .*$", text, flags=re.MULTILINE)[1:] for text in printed]


class Runs(NamedTuple):
    """Folders of the runs, and what the two processes printed of those that they shared.

    Attributes:
      one: a whole run of one process with four devices.
      two: the same by two processes with two devices each.
      stopped: another by two, one of which got a signal during the first step.
      checkpoints: steps of the checkpoints that were there then; one process went on from them.
      printed_two, printed_stopped: by each process.
    """

    one: Path
    two: Path
    stopped: Path
    checkpoints: list[int]
    printed_two: list[str]
    printed_stopped: list[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    one, two, stopped = (folder / name for name in ("one", "two", "stopped"))
    first, second = run(folder, *([(stopped, 2, at), (two, 2, 0)] for at in (0, 2)))
    checkpoints = [int(path.name) for path in (stopped / "checkpoints").iterdir()]
    run(folder, [(one, 2, 0), (stopped, 2, 0)])
    printed_stopped, printed_two = zip(first, second, strict=True)
    return Runs(one, two, stopped, checkpoints, list(printed_two), list(printed_stopped))


def assert_same_run(workdir: Path, other: Path) -> None:
    rows, wanted = (
        [json.loads(line) for line in (each / "metrics.jsonl").open()] for each in (workdir, other)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, expected in zip(rows, wanted, strict=True):
        for name in expected:
            if not name.startswith(("time/", "throughput/", "memory/", "compile/")):
                assert row[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-6), name
    ends = [json.loads((each / "evaluations.json").read_text()) for each in (workdir, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)
    ours, theirs = (load(each / "policy").params for each in (workdir, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_two_processes_run_the_job_as_one_does(runs, folder):
    assert_same_run(runs.two, runs.one)
    # What makes the comparison worth something.
    base = load(folder / "policy").params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), load(runs.two / "policy").params, base)
    assert max(jax.tree.leaves(moved)) > 1e-4
    left_out = json.loads((runs.two / "metrics.jsonl").read_text().splitlines()[-1])
    assert left_out["data/unreadable_image"] == left_out["data/unknown_answer"] == 1


def test_one_of_two_processes_writes(runs):
    printed = runs.printed_two
    assert "report:" in printed[0] and "[train" not in printed[1]
    names = [
        sorted(str(path.relative_to(each)) for path in each.rglob("*.html"))
        for each in (runs.two, runs.one)
    ]
    assert names[0] == names[1] and "report.html" in names[0]
    assert len(list((runs.two / "events").iterdir())) == 1
    galleries = [(each / "samples" / "000001.html").read_text() for each in (runs.two, runs.one)]
    assert galleries[0] == galleries[1]


def test_a_signal_to_one_stops_both_after_the_same_step_and_one_process_goes_on(runs):
    assert [text.split()[-1] for text in runs.printed_stopped] == ["stopped", "stopped"]
    assert runs.checkpoints == [1]
    assert "stopped as asked, saved after step 1" in runs.printed_stopped[0]
    assert_same_run(runs.stopped, runs.one)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        # A batch script, which does not run within a step.
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),
    ],
)
def test_a_cluster_is_recognised_where_there_is_one(monkeypatch, environment, found):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.append(given))
    hosts.start()
    assert asked == ([{"cluster_detection_method": found}] if found else [])


@pytest.mark.parametrize(
    ("count", "platforms", "found"),
    [(4, "tpu,cpu", "gcetpu"), (1, "tpu,cpu", None), (4, "cpu", None)],
)
def test_a_pod_is_joined_but_not_by_one_machine_nor_by_its_cpu(
    monkeypatch, count, platforms, found
):
    from jax._src.clusters import cloud_tpu_cluster

    tpu = cloud_tpu_cluster.GceTpuCluster
    monkeypatch.setattr(tpu, "is_env_present", lambda: True)
    monkeypatch.setattr(tpu, "get_process_count", lambda: count)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert hosts._recognise() == found
    finally:
        jax.config.update("jax_platforms", before)


def test_a_metadata_server_that_does_not_answer_is_no_cluster(monkeypatch, caplog):
    from jax._src.clusters import cloud_tpu_cluster

    def ask():
        raise ConnectionError("no route")

    monkeypatch.setattr(cloud_tpu_cluster.GceTpuCluster, "is_env_present", ask)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "")
    try:
        assert hosts._recognise() is None
    finally:
        jax.config.update("jax_platforms", before)
    assert "no route" in caplog.text


@pytest.mark.parametrize(
    "given",
    [
        {hosts.COUNT: "2"},
        {hosts.COUNT: "2", hosts.INDEX: "2", hosts.ADDRESS: "a:1"},
        {hosts.COUNT: "two", hosts.INDEX: "0", hosts.ADDRESS: "a:1"},
        {hosts.COUNT: "2", hosts.INDEX: "0", hosts.ADDRESS: "a"},
    ],
)
def test_variables_that_contradict_each_other_are_named(given):
    with pytest.raises(MeshError, match=f"{hosts.COUNT}=.*set all three"):
        hosts._by_hand(given)


def test_one_process_by_hand_goes_alone(monkeypatch):
    for name, value in ((hosts.COUNT, "1"), (hosts.INDEX, "0"), (hosts.ADDRESS, "a:1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", None)
    hosts.start()
    assert hosts.is_first() and hosts.exchange([1]) == [[1]] and not hosts.agree(False)
