"""Two processes do what one does; how a process finds out whether it is one of several."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_run import make_folder

from emor3_jax.models import load
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import MeshError

ROOT = Path(__file__).parents[2]


def run(folder: Path, workdir: Path, processes: int, *args: object, last_args=()) -> list[str]:
    """Runs the job on 4 devices in all; returns what each process printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        hosts.ADDRESS: f"localhost:{port}",
        hosts.COUNT: str(processes),
    }
    command = [sys.executable, str(Path(__file__).with_name("host_run.py"))]
    command += map(str, (folder, workdir, *args))
    logs = [workdir.with_suffix(f".{i}.log") for i in range(processes)]
    running = []
    for i, log in enumerate(logs):
        more = list(map(str, last_args)) if i == processes - 1 else []
        with log.open("w") as out:
            running.append(
                subprocess.Popen(
                    command + more,
                    env=environment | {hosts.INDEX: str(i)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [process.wait(timeout=600) for process in running]
    printed = [log.read_text() for log in logs]
    assert codes == [0] * processes, "\n".join(text[-3000:] for text in printed)
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def one(folder) -> Path:
    """A whole run of one process with four devices."""
    run(folder, folder / "one", 1, 3)
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder, one) -> tuple[Path, list[str]]:
    """The same by two processes with two devices each; what was compiled is at hand."""
    return folder / "two", run(folder, folder / "two", 2, 3)


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


def test_two_processes_run_the_job_as_one_does(one, two, folder):
    workdir, _ = two
    assert_same_run(workdir, one)
    # What makes the comparison worth something.
    base = load(folder / "policy").params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), load(workdir / "policy").params, base)
    assert max(jax.tree.leaves(moved)) > 1e-4
    left_out = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert left_out["data/unreadable_image"] == left_out["data/unknown_answer"] == 1


def test_one_of_two_processes_writes(one, two):
    workdir, printed = two
    assert "report:" in printed[0] and "[train" not in printed[1]
    names = [
        sorted(str(path.relative_to(each)) for path in each.rglob("*.html"))
        for each in (workdir, one)
    ]
    assert names[0] == names[1] and "report.html" in names[0]
    assert len(list((workdir / "events").iterdir())) == 1
    sheets = [(each / "samples" / "000001.html").read_text() for each in (workdir, one)]
    assert sheets[0] == sheets[1]


def test_a_signal_to_one_stops_both_after_the_same_step_and_one_process_goes_on(folder, one):
    workdir = folder / "stopped"
    printed = run(folder, workdir, 2, 3, last_args=(2,))
    assert [text.split()[-1] for text in printed] == ["stopped", "stopped"]
    assert [int(path.name) for path in (workdir / "checkpoints").iterdir()] == [1]
    assert "stopped after step 1" in printed[0]
    run(folder, workdir, 1, 3)
    assert_same_run(workdir, one)


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
