"""Flags of XLA with which tests compile several times faster, and compute the same up to rounding.

Most tests compile programs that then run for a millisecond.
"""

FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true"
)

DEFAULT = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""Options of `jax.jit` that compile one program as users do."""


def on_devices(count: int) -> str:
    """Returns the flags of a process that has several fake devices."""
    return f"{FAST} --xla_force_host_platform_device_count={count}"
