"""TPU slices by the names that users know, described for the compiler: no TPU is needed.

A name is a kind and a size, `v4-32`; `2xv5e-16` is two slices that a slower network joins. v4, v5p
and 7x count cores, two to a chip; v5e and v6e count chips. XLA sees one device a chip, but two on
7x. `libtpu`, which brings the compiler, is `pip install 'emor3_jax[compile]'`.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from emor3_jax.errors import UserError


class TopologyError(UserError):
    """A topology that is not known, or a machine without the TPU's compiler."""


class Chip(NamedTuple):
    """One generation of TPUs.

    Attributes:
      memory: GB of HBM of a chip, as its makers say.
      usable: bytes of HBM of a device that programs may use, as the compiler of libtpu 0.0.52 says
        when one does not fit.
      devices: XLA's devices of a chip.
      units: what the number in a name counts, for each chip.
      prefix: the generation in the compiler's own names.
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

CHIPS = {
    "v4": Chip(32, _gib(30.75), 1, 2, "v4", _MEGACORE, _CUBES),
    "v5p": Chip(95, _gib(95.73), 1, 2, "v5", _MEGACORE, _CUBES),
    "v5e": Chip(16, _gib(15.75), 1, 1, "v5e", _HOST, _SQUARES),
    "v6e": Chip(32, _gib(31.24), 1, 1, "v6e", _HOST, _SQUARES),
    "tpu7x": Chip(192, _gib(94.74), 2, 2, "tpu7x", _HOST, _CUBES),
}
"""Generation → what a chip is."""


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

    def devices(self) -> Sequence[Any]:
        """Returns devices to compile for, slice after slice.

        Raises:
          TopologyError: if the TPU's compiler is not installed.
        """
        need_compiler()
        # Else it asks the network of Google Cloud where it runs, and lets one process in at a time.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        chip = self.chip
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip.prefix}:{chip.shapes[self.chips]}",
            num_slices=self.slices,
            **chip.options,
        )
        return described.devices


def need_compiler() -> None:
    """Raises TopologyError, saying how to install it, if the TPU's compiler is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "compiling for TPU needs the package libtpu: pip install 'emor3_jax[compile]', or "
            "pip install -e '.[compile]' in a checkout; it runs on any x86_64 Linux, without a TPU"
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
    match = re.fullmatch(r"(?:(\d+)x)?(v5litepod|\w+)-(\d+)", name)
    if match is not None:
        slices, kind, size = match.groups()
        chip = CHIPS.get({"v5litepod": "v5e"}.get(kind, kind))
        chips = int(size) / chip.units if chip is not None else 0
        if chip is not None and chips in chip.shapes and slices != "0":
            return Topology(name, chip, int(chips), int(slices or 1))
    raise TopologyError(
        f"topology={name!r}: must be one of {', '.join(names())}; several slices are written "
        "2xv5e-16"
    )
