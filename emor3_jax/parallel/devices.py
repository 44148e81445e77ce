"""The devices of a run: found, or missed in one line, and described in another."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax

from emor3_jax.errors import UserError

_NAMES = {"cuda": "gpu", "rocm": "gpu"}
"""Names in JAX_PLATFORMS → the platform."""


class DeviceError(UserError):
    """A platform was asked for that is not on this machine."""


def expected_platform(
    environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> str:
    """Returns the platform that JAX will choose, told without asking it: "tpu", "gpu" or "cpu".

    Args:
      environment: JAX_PLATFORMS, its first platform, decides.
      devices: folder of the machine's devices, which decide otherwise.
    """
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if asked:
        return _NAMES.get(asked, asked)
    if (devices / "nvidiactl").exists():
        return "gpu"
    slots = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    return "tpu" if slots else "cpu"


def find_devices() -> str:
    """Returns a line that names the platform, the devices and their memory.

    Raises:
      DeviceError: if JAX_PLATFORMS asks for a platform that is not here.
    """
    try:
        return describe(jax.devices())
    # JAX asserts that there is a platform, where it knows none of those that were asked for.
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).split("\n")[0] or "JAX has no plugin for it"
        raise DeviceError(
            f"JAX_PLATFORMS={asked!r}: no such device answers on this machine ({reason}). Unset it "
            "to take what is there, set it to cpu, or install the extra of the platform: "
            "pip install 'emor3_jax[tpu]' or 'emor3_jax[gpu]'"
        ) from error


def describe(devices: list[jax.Device]) -> str:
    """Returns a line such as "platform tpu: 4 devices TPU v4 with 30.8 GiB each, 1 process"."""
    first, count = devices[0], len(devices)
    processes = len({device.process_index for device in devices})
    limit = _memory(next((d for d in devices if d.process_index == jax.process_index()), first))
    number = f"{count} device{'s' * (count > 1)}"
    kind = "" if first.device_kind == first.platform else f" {first.device_kind}"
    size = f" with {limit / 2**30:.1f} GiB {'each' if count > 1 else ''}".rstrip() if limit else ""
    if first.platform == "cpu" and limit:
        size = f" of a machine with {limit / 2**30:.1f} GiB"
    hosts = f", {processes} processes" if processes > 1 else ""
    return f"platform {first.platform}: {number}{kind}{size}{hosts}"


def _memory(device: jax.Device) -> int | None:
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None
