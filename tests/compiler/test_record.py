"""What lies in memory while a program runs, counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_step

from emor3_jax.compiler.record import Recorder, device_bytes
from emor3_jax.compiler.step import step_programs
from emor3_jax.models.params import is_matrix
from emor3_jax.parallel import mesh as meshes
from emor3_jax.parallel.program import Program, along, by_prompts, whole


@pytest.fixture
def record() -> Recorder:
    return Recorder(meshes.make_mesh(1, -1, 1))


def array(record: Recorder, *shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
    return whole(record.mesh, jax.ShapeDtypeStruct(shape, dtype))


def test_each_array_counts_once_wherever_it_stands(record: Recorder) -> None:
    weights, cache, other = array(record, 10, 3), array(record, 5), array(record, 7)
    out = record(
        Program(
            "double",
            jax.jit(lambda params, x, n: (params["w"] @ x[:3] + n, x)),
            ({"w": weights}, cache, np.int32(2)),
            alive={"parameters": [weights, weights], "optimizer": [other], "cache": cache},
            calls=4,
        )
    )
    (report,) = record.reports
    assert report.resident == {"parameters": 120, "optimizer": 28, "cache": 20, "data": 0}
    assert (report.name, report.calls) == ("double", 4)
    # The results, 10 and 5 numbers, and what the compiler takes besides.
    assert report.made >= 60
    assert report.needed == 168 + report.made
    assert report.fits(report.needed) and not report.fits(report.needed - 1)
    assert [x.shape for x in out] == [(10,), (5,)]
    assert all(x.sharding is not None for x in out)


def test_what_no_kind_names_is_data_and_what_is_given_up_is_not_made(record: Recorder) -> None:
    x = array(record, 1000)
    record(Program("add", jax.jit(lambda x: x + 1, donate_argnums=0), (x,)))
    (report,) = record.reports
    assert report.resident["data"] == 4000
    assert report.made < 4000


def test_nothing_is_compiled_where_what_lies_there_is_too_much(record: Recorder) -> None:
    narrow = Recorder(record.mesh, usable=4003)
    add = jax.jit(lambda x: x + 1)
    small, large = array(record, 1000), array(record, 1001)
    narrow(Program("small", add, (small,)))
    out = narrow(Program("large", add, (large,), alive={"optimizer": large}))
    fits, report = narrow.reports
    assert fits.made is not None
    assert (report.made, report.needed, report.compiling) == (None, 4004, 0.0)
    assert not report.fits(4003) and out.shape == (1001,)


def test_a_program_that_is_not_wanted_only_gives_shapes(record: Recorder) -> None:
    wanted = Recorder(record.mesh, lambda name: name == "other")
    layout = partial(by_prompts, axis=1)
    cut = jax.jit(lambda x: x[:, :8])
    out = wanted(Program("this", cut, (array(record, 3, 16),), layout=layout))
    assert wanted.reports == []
    assert out.shape == (3, 8)
    assert out.sharding.spec == jax.sharding.PartitionSpec(None, ("data", "fsdp"))


def test_bytes_of_a_device() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4, 1), meshes.AXES)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None))
    assert device_bytes(jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=cut)) == 2 * 3 * 2
    assert device_bytes(jax.ShapeDtypeStruct((16, 3), jnp.float32)) == 16 * 3 * 4


def test_programs_are_sent_the_results_of_those_before(record: Recorder) -> None:
    x, held = array(record, 4), array(record, 6)
    double = jax.jit(lambda x: jnp.concatenate([x, x]))

    def programs():
        y = yield Program("first", double, (x,), alive={"cache": x})
        z = yield Program("second", double, (y,))
        return z.shape

    assert record.run(along(programs(), {"cache": held}, "a")) == (16,)
    assert [report.name for report in record.reports] == ["a.first", "a.second"]
    assert [report.resident["cache"] for report in record.reports] == [40, 24]
    assert [report.resident["data"] for report in record.reports] == [0, 32]


def test_adapters_take_their_own_memory_and_spare_the_optimizer() -> None:
    mesh = meshes.make_mesh(1, 1, 1)

    def sizes(rank: int) -> dict[str, dict[str, int]]:
        """Program → kind → bytes; nothing is compiled, as there is no memory at all."""
        config = tiny_step.make_config()
        config.policy.lora_rank = rank
        record = Recorder(mesh, usable=0)
        with jax.set_mesh(mesh):
            record.run(step_programs(mesh, config, tiny_step.POLICY, tiny_step.QUESTIONS))
        return {report.name: report.resident for report in record.reports}

    shapes = tiny_step.SHAPES
    width, layers = shapes.hidden_size, shapes.num_layers
    heads, kv_heads = shapes.num_heads * 24, shapes.num_kv_heads * 24
    # Query and output, key and value: [D, r] and [r, F] each.
    numbers = layers * (2 * (width + heads) + 2 * (width + kv_heads))
    kernels = layers * width * 2 * (heads + kv_heads)
    every = sum(x.size for x in jax.tree.leaves(tiny_step.POLICY.param_shapes()))
    full, small, large = sizes(0), sizes(4), sizes(8)
    # Two moments, Adam's count, and the gradient that micro-batches add to.
    assert full["update"]["optimizer"] == pytest.approx(12 * every, abs=16)
    for rank, found in ((4, small), (8, large)):
        assert found["update"]["optimizer"] == pytest.approx(12 * rank * numbers, abs=16)
    more = large["update"]["parameters"] - small["update"]["parameters"]
    assert more == 4 * 4 * numbers
    # While responses are sampled, merged kernels lie beside those of the base, in two bytes each:
    # on one device decoding reads them as they are.
    assert "weight_sync" in full and "weight_sync" not in small
    merged = small["decode"]["parameters"] - small["update"]["parameters"]
    assert merged == 2 * kernels
    # Matrices of the base too: none changes.
    leaves = jax.tree_util.tree_leaves_with_path(tiny_step.POLICY.param_shapes())
    matrices = sum(x.size for path, x in leaves if is_matrix(path[-1].key))
    adapters = 4 * 4 * numbers
    assert small["update"]["parameters"] == 4 * every - 2 * matrices + adapters
    assert full["weight_sync"]["parameters"] == full["update"]["parameters"]
