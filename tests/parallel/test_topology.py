"""Slices by the names that users know."""

import importlib.util

import pytest

from emor3_jax.parallel import topology
from emor3_jax.parallel.topology import TopologyError


@pytest.mark.parametrize(
    ("name", "chips", "devices", "grid"),
    [
        # v4, v5p and 7x count cores, two a chip; v5e and v6e count chips.
        ("v4-8", 4, 4, "2x2x1"),
        ("v4-512", 256, 256, "4x8x8"),
        ("v5p-32", 16, 16, "2x2x4"),
        ("v5e-4", 4, 4, "2x2"),
        ("v5litepod-256", 256, 256, "16x16"),
        ("v6e-64", 64, 64, "8x8"),
        ("tpu7x-8", 4, 8, "2x2x1"),
        ("2xv5e-16", 16, 32, "4x4"),
        ("h100-1", 1, 1, "1x1x1"),
        ("a100-8", 8, 8, "1x1x8"),
    ],
)
def test_names(name: str, chips: int, devices: int, grid: str) -> None:
    found = topology.parse(name)
    assert (found.chips, found.device_count) == (chips, devices)
    assert found.chip.shapes[chips] == grid
    sides = [int(side) for side in grid.split("x")]
    product = 1
    for side in sides:
        product *= side
    assert product == chips


@pytest.mark.parametrize(
    "name",
    [
        *("v4-6", "v4", "v3-8", "v5e-512", "0xv5e-16", "-8", "v4-32x2", "2xh100-8", "h100-3"),
        *("00xv5e-16", "999xv5e-16", "99999999999xv5e-16", "v4-08", "v4-٨", "v4-" + "9" * 5000),
    ],
)
def test_an_unknown_name_is_told_the_known_ones(name: str) -> None:
    with pytest.raises(TopologyError, match=f"^topology='{name}': must be one of v4-8, v4-16"):
        topology.parse(name)
    assert "v4-512" in topology.names() and "tpu7x-8" in topology.names()


def test_without_the_compiler_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"pip install 'emor3_jax\[compile\]'"):
        topology.parse("v4-8").devices()
    with pytest.raises(TopologyError, match=r"GPU needs .* pip install 'emor3_jax\[compile_gpu\]'"):
        topology.parse("h200-1").devices()


def test_gpus_keep_a_share_of_their_memory_for_programs() -> None:
    chip = topology.parse("h200-1").chip
    assert (chip.platform, topology.parse("v4-8").chip.platform) == ("gpu", "tpu")
    # 92 % of what an H200 reports.
    assert chip.usable == 139_285_789_409


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the plugin is not installed"
)
def test_the_compiler_knows_gpus() -> None:
    devices = topology.parse("h100-8").devices()
    assert [device.platform for device in devices] == ["gpu"] * 8


@pytest.mark.loads_tpu_compiler
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_compiler_knows_every_kind() -> None:
    for name, kind in (
        ("v4-16", "TPU v4"),
        ("v5p-8", "TPU v5"),
        ("v5e-8", "TPU v5 lite"),
        ("v6e-4", "TPU v6 lite"),
        ("tpu7x-8", "TPU7x"),
        ("2xv5e-16", "TPU v5 lite"),
    ):
        wanted = topology.parse(name)
        devices = wanted.devices()
        assert len(devices) == wanted.device_count
        assert devices[0].device_kind == kind
        slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
        assert len(slices) == wanted.slices
