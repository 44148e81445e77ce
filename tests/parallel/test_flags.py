"""Flags by platform: what is set, what is left, and that the compilers know them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from emor3_jax.parallel.flags import FLAGS, GPU_MEMORY_FRACTION, set_flags


def test_flags_are_added_to_those_that_are_there() -> None:
    environment = {
        "XLA_FLAGS": "--xla_dump_to=/tmp/x --xla_gpu_enable_latency_hiding_scheduler=false",
        "OTHER": "1",
    }
    set_flags("gpu", environment)
    flags = environment["XLA_FLAGS"].split()
    # What the user has set stays, and comes once.
    assert flags[:2] == ["--xla_dump_to=/tmp/x", "--xla_gpu_enable_latency_hiding_scheduler=false"]
    assert "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL" in flags[2:]
    assert sum("latency_hiding" in flag for flag in flags) == 1
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == str(GPU_MEMORY_FRACTION)
    assert environment["OTHER"] == "1" and "LIBTPU_INIT_ARGS" not in environment
    before = dict(environment)
    set_flags("gpu", environment)
    assert environment == before


def test_a_platform_without_flags_and_a_user_who_wants_none_are_left_alone() -> None:
    for platform, environment in (("cpu", {}), ("metal", {}), ("tpu", {"EMOR3_FLAGS": "0"})):
        before = dict(environment)
        set_flags(platform, environment)
        assert environment == before


def test_every_flag_has_a_reason() -> None:
    flags = [flag for platform in FLAGS.values() for flag in platform]
    assert flags and all(flag.reason and flag.value for flag in flags)


DESCRIBE = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from emor3_jax.parallel import mesh, topology
m = mesh.make_mesh(1, -1, 1, topology.parse(NAME).devices())
x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(m, P("fsdp")))
jax.config.update("jax_enable_compilation_cache", False)
print(jax.jit(lambda x: x @ x).lower(x).compile().memory_analysis().temp_size_in_bytes)
"""


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_compiler_of_tpus_takes_its_flags_for_every_chip() -> None:
    # A gather of weights beside products: of what a flag enables, some chips have nothing.
    names = ("v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8")
    done = _run("\n".join(DESCRIBE.replace("NAME", repr(name)) for name in names))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == len(names)
    # It ends the process with one that it does not know: these were read.
    unknown = DESCRIBE.replace("NAME", "'v5e-4'")
    assert _run(unknown, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true").returncode != 0


def test_xla_knows_the_flags_of_gpus() -> None:
    code = "import jax; jax.devices()"
    given = " ".join(flag.value for flag in FLAGS["gpu"] if flag.variable == "XLA_FLAGS")
    assert _run(code, XLA_FLAGS=given).returncode == 0
    assert _run(code, XLA_FLAGS=f"{given} --xla_gpu_no_such_flag=true").returncode != 0
