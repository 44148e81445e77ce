"""Flags of XLA with which tests compile several times faster, and compute the same up to rounding.

Most tests compile programs that then run for a millisecond.
"""

import os

FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def on_devices(count: int) -> str:
    """Returns the flags of a process that has several fake devices."""
    return f"{FAST} --xla_force_host_platform_device_count={count}"


def default() -> dict[str, str]:
    """Returns this process's environment with XLA as users run it."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
