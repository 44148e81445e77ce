"""Peak FLOP/s of known accelerators, and utilisation."""

import pytest

from emor3_jax.flops import peak_flops, throughput


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
    ],
)
def test_known_accelerators_have_their_peak(kind: str, tera: float) -> None:
    assert peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "TPU v4 lite", "NVIDIA GeForce RTX 4090"])
def test_unknown_devices_have_no_utilisation(kind: str) -> None:
    assert peak_flops(kind) is None
    assert throughput(3e12, 2.0, kind, 1) == {"throughput/tflops_per_s": 1.5}


def test_utilisation_is_the_share_of_all_devices() -> None:
    # 550e12 in 4 s on two devices of 275e12 FLOP/s.
    assert throughput(550e12, 4.0, "TPU v4", 2) == {
        "throughput/tflops_per_s": 137.5,
        "throughput/mfu": 0.25,
    }
