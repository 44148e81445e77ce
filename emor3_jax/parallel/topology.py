"""TPU slices and machines with GPUs by name, described for the compiler: no device is needed.

A name is a kind and a size, `v4-32`; `2xv5e-16` is two slices that a slower network joins. v4, v5p
and 7x count cores, two to a chip; v5e and v6e count chips. XLA sees one device a chip, but two on
7x. `libtpu`, which brings the compiler, is `pip install 'emor3_jax[compile]'`. `h100-8` is one
machine with 8 GPUs; its compiler is `pip install 'emor3_jax[compile_gpu]'`.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from emor3_jax.errors import UserError
from emor3_jax.parallel.flags import GPU_MEMORY_FRACTION, set_flags


class TopologyError(UserError):
    """A topology that is not known, or a machine without its compiler."""


class Chip(NamedTuple):
    """One generation of TPUs, or a kind of GPU.

    Attributes:
      memory: GB of HBM of a chip, as its makers say.
      usable: bytes of HBM of a device that programs may use: on TPU what the compiler of libtpu
        0.0.52 says when one does not fit, on GPU the share that `parallel.flags` sets aside.
      devices: XLA's devices of a chip.
      units: what the number in a name counts, for each chip.
      prefix: the generation in the compiler's own names; "" for GPUs.
      options: further arguments of `get_topology_desc`.
      shapes: chips of each slice that there is → its grid.
    """

    memory: int
    usable: int
    devices: int
    units: int
    prefix: str
    options: dict[str, Any]
    shapes: dict[int, str]

    @property
    def platform(self) -> str:
        """The platform as `jax.Device.platform` names it: "tpu" or "gpu"."""
        return "tpu" if self.prefix else "gpu"


def _gib(size: float) -> int:
    return int(size * 2**30)


_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
}
_SQUARES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_HOST = {"chips_per_host_bounds": (2, 2, 1)}
_MEGACORE = {"chip_config_name": "megacore", **_HOST}

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
"""What XLA wants to know of a GPU that is not there, in its own text format; figures from NVIDIA's
data sheets and as devices report them."""

_HOPPER = {"shared": 233_472, "optin": 232_448, "cores": 132, "fpus": 128, "l2": 52_428_800}
_HOPPER |= {"clock": 1.98, "major": 9}
_AMPERE = {"shared": 167_936, "optin": 166_912, "cores": 108, "fpus": 64, "l2": 41_943_040}
_AMPERE |= {"clock": 1.41, "major": 8}


def _gpu(gigabytes: int, name: str, memory: int, bandwidth: int, kind: dict[str, Any]) -> Chip:
    target = _GPU.format(name=name, memory=memory, bandwidth=bandwidth, **kind)
    usable = int(memory * GPU_MEMORY_FRACTION)
    shapes = {n: f"1x1x{n}" for n in (1, 2, 4, 8)}
    return Chip(gigabytes, usable, 1, 1, "", {"target_config": target}, shapes)


CHIPS = {
    "v4": Chip(32, _gib(30.75), 1, 2, "v4", _MEGACORE, _CUBES),
    "v5p": Chip(95, _gib(95.73), 1, 2, "v5", _MEGACORE, _CUBES),
    "v5e": Chip(16, _gib(15.75), 1, 1, "v5e", _HOST, _SQUARES),
    "v6e": Chip(32, _gib(31.24), 1, 1, "v6e", _HOST, _SQUARES),
    "tpu7x": Chip(192, _gib(94.74), 2, 2, "tpu7x", _HOST, _CUBES),
    "a100": _gpu(80, "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000, _AMPERE),
    "h100": _gpu(80, "NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, _HOPPER),
    "h200": _gpu(141, "NVIDIA H200", 151_397_597_184, 4_800_000_000_000, _HOPPER),
}
"""Generation → what a chip is."""


MOST_SLICES = 256
"""More than any config cuts a batch into; the compiler is not asked for millions of devices."""


class Topology(NamedTuple):
    """One or more slices of a generation.

    Attributes:
      name: as the user wrote it.
      chip: of the generation.
      chips: of one slice.
      slices: how many.
    """

    name: str
    chip: Chip
    chips: int
    slices: int

    @property
    def device_count(self) -> int:
        """XLA's devices of all slices."""
        return self.chips * self.chip.devices * self.slices

    @property
    def kind(self) -> str:
        """The key of `CHIPS`."""
        return next(kind for kind, chip in CHIPS.items() if chip == self.chip)

    def devices(self) -> Sequence[Any]:
        """Returns devices to compile for, slice after slice.

        Raises:
          TopologyError: if the compiler is not installed.
        """
        need_compiler(self.chip.platform)
        # What is compiled here is compiled as it is there.
        set_flags(self.chip.platform)
        # Else it asks the network of Google Cloud where it runs, and lets one process in at a time.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # Else it prints that it knows none.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # Likewise of the machine that it runs on, which need not be what it compiles for.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        from jax.experimental import topologies

        chip = self.chip
        if chip.platform == "gpu":
            grid = chip.shapes[self.chips]
            return topologies.get_topology_desc(
                platform="cuda", topology=grid, **chip.options
            ).devices
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip.prefix}:{chip.shapes[self.chips]}",
            num_slices=self.slices,
            **chip.options,
        )
        return described.devices


def need_compiler(platform: str = "tpu") -> None:
    """Raises TopologyError, saying how to install it, if a platform's compiler is missing."""
    package, extra = {"tpu": ("libtpu", "compile"), "gpu": ("jax_cuda13_plugin", "compile_gpu")}[
        platform
    ]
    if importlib.util.find_spec(package) is None:
        raise TopologyError(
            f"compiling for {platform.upper()} needs the package {package}: pip install "
            f"'emor3_jax[{extra}]', or pip install -e '.[{extra}]' in a checkout; it runs on any "
            f"x86_64 Linux, without a {platform.upper()}"
        )


def names() -> list[str]:
    """Returns the names of all single slices."""
    return [f"{kind}-{chips * chip.units}" for kind, chip in CHIPS.items() for chips in chip.shapes]


def parse(name: str) -> Topology:
    """Returns the topology of a name; `v5litepod` reads as `v5e`.

    Args:
      name: such as "v4-32", or "2xv5e-16" for two slices.

    Raises:
      TopologyError: listing the names that are known.
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,2})x)?(v5litepod|\w+)-([1-9]\d{0,2})", name, re.ASCII)
    if match is not None:
        slices, kind, size = int(match[1] or 1), match[2], int(match[3])
        chip = CHIPS.get({"v5litepod": "v5e"}.get(kind, kind))
        most = MOST_SLICES if chip is not None and chip.platform == "tpu" else 1
        if chip is not None and size / chip.units in chip.shapes and slices <= most:
            return Topology(name, chip, size // chip.units, slices)
    raise TopologyError(
        f"topology={name!r}: must be one of {', '.join(names())}; several slices, up to "
        f"{MOST_SLICES}, are written 2xv5e-16"
    )
