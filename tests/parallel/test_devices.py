"""What a run says of its devices, or of those that are missing."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from emor3_jax.parallel.devices import describe, expected_platform


def device(platform: str, kind: str, limit: int | None, process: int = 0) -> SimpleNamespace:
    stats = None if limit is None else {"bytes_limit": limit}
    return SimpleNamespace(
        platform=platform, device_kind=kind, process_index=process, memory_stats=lambda: stats
    )


def test_platform_devices_and_memory_are_named() -> None:
    chips = [device("tpu", "TPU v4", 33_017_561_088, process) for process in (0, 0, 1, 1)]
    said = describe(chips)
    assert said == "platform tpu: 4 devices TPU v4 with 30.8 GiB each, 2 processes"
    one = [device("gpu", "NVIDIA H200", 139_285_789_409)]
    assert describe(one) == "platform gpu: 1 device NVIDIA H200 with 129.7 GiB"
    assert describe([device("gpu", "NVIDIA H200", None)]) == "platform gpu: 1 device NVIDIA H200"
    assert describe(jax.devices()).startswith("platform cpu: 1 device of a machine with ")


@pytest.mark.parametrize(
    ("asked", "files", "platform"),
    [
        ("cpu", ["nvidiactl"], "cpu"),
        ("cuda,cpu", [], "gpu"),
        ("tpu", [], "tpu"),
        ("", ["nvidiactl", "accel0"], "gpu"),
        ("", ["accel0"], "tpu"),
        ("", ["vfio/0"], "tpu"),
        ("", ["vfio/vfio"], "cpu"),
        ("", [], "cpu"),
    ],
)
def test_the_platform_is_foretold_without_jax(
    asked: str, files: list[str], platform: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert expected_platform({"JAX_PLATFORMS": asked} if asked else {}, tmp_path) == platform


def test_a_platform_that_is_not_here_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "emor3_jax.train", "--config=configs/cpu_demo.py"),
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: JAX_PLATFORMS='cuda': no such device answers on this machine")
    assert "Traceback" not in done.stderr
