"""Settings of the compilers and of the memory, by platform: the one place where they are.

They are environment variables that are read once, when JAX first looks for devices. `set_flags`
sets those that the environment does not set itself; a flag that is there, with whatever value,
stays, and EMOR3_FLAGS=0 leaves all as it is. `python -m emor3_jax.parallel.flags tpu` prints them.
"""

import argparse
import os
from collections.abc import MutableMapping
from typing import NamedTuple

GPU_MEMORY_FRACTION = 0.92
"""Share of a GPU's memory that programs may use; JAX's own 0.75 would leave 20 GB of 80 unused. The
rest is for CUDA itself, cuDNN and NCCL."""


class Flag(NamedTuple):
    """One setting.

    Attributes:
      variable: of the environment.
      value: for variables of several flags, one flag.
      reason: why it differs from the default.
    """

    variable: str
    value: str
    reason: str


_TPU, _XLA = "LIBTPU_INIT_ARGS", "XLA_FLAGS"
_MANY = (_TPU, _XLA)
"""Variables that hold several flags, with spaces between them."""

FLAGS: dict[str, tuple[Flag, ...]] = {
    "tpu": (
        Flag(
            _TPU,
            "--xla_tpu_overlap_compute_collective_tc=true",
            "products and collectives share the core in turns",
        ),
        Flag(
            _TPU,
            "--xla_enable_async_all_gather=true",
            "a gather has a start and an end, between which the scheduler puts products",
        ),
        Flag(
            _TPU,
            "--xla_tpu_data_parallel_opt_different_sized_ops=true",
            "gradients of different sizes are summed over `data` while others are computed",
        ),
    ),
    "gpu": (
        Flag(
            _XLA,
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "collectives run beside products",
        ),
        Flag(
            _XLA,
            "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
            "the loop over tokens is one CUDA graph: else the host starts every kernel of a token",
        ),
        Flag(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            str(GPU_MEMORY_FRACTION),
            "JAX's own 0.75 leaves a quarter unused",
        ),
    ),
    "cpu": (),
}
"""Platform → its settings. A TPU's compiler ends a process with a flag that it does not know; these
are known to libtpu 0.0.52 and jaxlib 0.10.2 (tests/parallel/test_flags.py). Whether collectives are
fused with the products beside them (`xla_tpu_enable_async_collective_fusion…`) is left to the
compiler: where they last over several products, it refuses every chip but the v5e."""


def set_flags(platform: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the flags of a platform, before JAX looks for devices.

    Args:
      platform: "tpu", "gpu" or "cpu"; another has none.
      environment: changed.
    """
    if environment.get("EMOR3_FLAGS") == "0":
        return
    for flag in FLAGS.get(platform, ()):
        there = environment.get(flag.variable, "")
        if flag.variable not in _MANY:
            environment.setdefault(flag.variable, flag.value)
        elif flag.value.partition("=")[0] not in {x.partition("=")[0] for x in there.split()}:
            environment[flag.variable] = f"{there} {flag.value}".strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints the flags of a platform.")
    parser.add_argument("platform", choices=FLAGS)
    for given in FLAGS[parser.parse_args().platform]:
        print(f"{given.variable}: {given.value}\n    {given.reason}")
