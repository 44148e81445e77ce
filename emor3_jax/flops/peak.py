"""Achieved FLOP/s of a step, and the peak of known accelerators to compare them with."""

_TERA = 10**12

# Dense bfloat16 FLOP/s of one jax device, by prefix of its kind, longest prefix first. TPU: Google
# Cloud's pages on system architecture, whose figures are per chip. A device is a chip, but half a
# chip of 7x. NVIDIA: the data sheets of A100 (312), H100
# (1979 SXM, 1513 PCIe, 1671 NVL) and H200 (1979 SXM, 1671 NVL); figures with sparsity are halved.
_PEAKS = (
    ("TPU v4 lite", None),
    ("TPU v4", 275 * _TERA),
    ("TPU v5 lite", 197 * _TERA),
    ("TPU v5e", 197 * _TERA),
    ("TPU v5", 459 * _TERA),
    ("TPU v6 lite", 918 * _TERA),
    ("TPU v6e", 918 * _TERA),
    ("TPU7x", 2307 * _TERA // 2),
    ("NVIDIA A100", 312 * _TERA),
    ("NVIDIA H100 NVL", 835 * _TERA),
    ("NVIDIA H100 PCIe", 756 * _TERA),
    ("NVIDIA H100", 989 * _TERA),
    ("NVIDIA H200 NVL", 835 * _TERA),
    ("NVIDIA H200", 989 * _TERA),
)


def peak_flops(device_kind: str) -> int | None:
    """Returns the dense bfloat16 peak of one jax device in FLOP/s; None if unknown.

    Args:
      device_kind: as `jax.Device.device_kind` names it: "TPU v4", "NVIDIA H100 80GB HBM3", …
    """
    return next((peak for name, peak in _PEAKS if device_kind.startswith(name)), None)


def throughput(
    flops: float, seconds: float, device_kind: str, device_count: int
) -> dict[str, float]:
    """Returns the metrics of achieved FLOP/s.

    Args:
      flops: that the model needs for one step, on all devices together (`step_flops`).
      seconds: duration of the step, over 0.
      device_kind: of every device.
      device_count: at least 1.

    Returns:
      `throughput/tflops_per_s`, 10**12 FLOP/s of all devices together, and `throughput/mfu`, their
      share of the bfloat16 peak, in [0, 1]; left out where the peak is unknown, as on CPU.
    """
    metrics = {"throughput/tflops_per_s": flops / seconds / _TERA}
    if (peak := peak_flops(device_kind)) is not None:
        metrics["throughput/mfu"] = flops / seconds / (peak * device_count)
    return metrics
