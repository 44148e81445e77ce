"""The kernel of decoded tokens, compiled for TPUs that need not be there."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emor3_jax.compiler.record import Recorder
from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.decode_attention import attend_ring, make_ring
from emor3_jax.parallel import topology
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.parallel.program import Program


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.loads_tpu_compiler
@pytest.mark.parametrize(
    ("name", "tensor"), [("v4-8", 1), ("v5e-4", 2), ("v6e-4", 4)], ids=lambda x: str(x)
)
def test_the_kernel_compiles_for_tpu_and_copies_no_cache(name, tensor):
    """Qwen2.5-VL-3B, 8 slots of 8 lanes a part; with tensor=4, each has a repeated key head."""
    mesh = make_mesh(1, -1, tensor, topology.parse(name).devices())
    slots, heads = 8 * mesh.shape["fsdp"], max(2, tensor)

    def array(shape: tuple[int, ...], *spec: Any, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    prefix = KV(
        array((36, slots, heads, 128, 1024), None, "fsdp", "tensor"),
        array((36, slots, heads, 1024, 128), None, "fsdp", "tensor"),
        array((slots, 1024), "fsdp", dtype=bool),
    )
    cache = Cache(
        array((36, slots, 8, heads, 128, 2048), None, "fsdp", None, "tensor"),
        array((36, slots, 8, heads, 2048, 128), None, "fsdp", None, "tensor"),
        array((slots, 8, 2048), "fsdp", dtype=bool),
    )
    tokens = [array((slots, 8, n, 128), "fsdp", None, None) for n in (16, heads, heads)]
    lengths = array((slots, 8), "fsdp", dtype=jnp.int32)

    def layers(prefix, cache, lengths, slot, q, k, v):
        ring = make_ring(prefix, cache, lengths, slot)

        def layer(q, number):
            return attend_ring(q, k, v, ring, number), None

        return jax.lax.scan(layer, q, jnp.arange(36))[0]

    record = Recorder(mesh)
    args = prefix, cache, lengths, array((), dtype=jnp.int32), *tokens
    with jax.set_mesh(mesh):
        record(Program("layers", jax.jit(layers), args))
    (report,) = record.reports
    assert sum(report.resident.values()) > 2**31
    assert report.made < 2**23 and not report.moved
