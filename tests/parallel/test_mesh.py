"""The rules on a whole train state, and what a batch's size must be."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from support import tiny

from emor3_jax.models import published
from emor3_jax.parallel import mesh as meshes
from emor3_jax.rl.update import TrainState, make_optimizer


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """A mesh of no devices: enough to work out shardings."""
    return AbstractMesh((data, fsdp, tensor), meshes.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """Shapes of a tiny policy with an untied head and of its optimizer state."""
    policy = tiny.make_policy(tie_word_embeddings=False)
    optimizer = make_optimizer(optax.linear_schedule(1e-3, 0.0, 5))

    def create():
        return TrainState.create(policy.init(jax.random.key(0)), optimizer)

    return jax.eval_shape(create)


def specs(state: TrainState, mesh: AbstractMesh) -> dict[str, P]:
    found = jax.tree_util.tree_leaves_with_path(meshes.param_shardings(state, mesh))
    return {jax.tree_util.keystr(path): sharding.spec for path, sharding in found}


def test_every_matrix_is_cut_and_moments_as_their_parameter(state):
    found = specs(state, abstract_mesh(2, 2, 2))
    params = {k.removeprefix(".params"): v for k, v in found.items() if k.startswith(".params")}
    assert len(params) > 30
    for path, spec in params.items():
        axes = {axis for axis in spec if axis}
        if "patch_embed" in path:
            assert axes == {"fsdp"}, path
        elif "kernel" in path or "embedding" in path or "lm_head" in path:
            assert axes == {"fsdp", "tensor"}, path
        else:
            assert axes <= {"tensor"}, path
    for moment in (".mu", ".nu"):
        moments = {k.split(moment)[1]: v for k, v in found.items() if moment in k}
        assert moments == params


def test_matrices_that_write_the_residual_stream_are_cut_along_their_input(state):
    """Then a layer sums its partial products once, after `o_proj` and after `down_proj`."""
    found = specs(state, abstract_mesh(1, 2, 4))
    block = ".params['model']['layers']"
    for inner, outer in (
        ("['self_attn']['q_proj']", "['self_attn']['o_proj']"),
        ("['mlp']['up_proj']", "['mlp']['down_proj']"),
    ):
        assert found[f"{block}{inner}['kernel']"] == P(None, "fsdp", "tensor")
        assert found[f"{block}{outer}['kernel']"] == P(None, "tensor", "fsdp")


@pytest.mark.parametrize(
    ("sizes", "said", "advice"),
    [
        # 16 heads, 2 of them keys', towers of 3420 hidden units.
        ((1, 1, 8), "mesh.tensor=8: .* vision_config.intermediate_size=3420", "1, 2 or 4 would"),
        ((1, 1, 3), "num_attention_heads=16.*num_key_value_heads=2 ", "1, 2 or 4 would"),
        ((1, 48, 1), "mesh.fsdp=48: .* hidden_size=2048, vision_config.hidden_size=1280", "128 or"),
    ],
)
def test_a_policy_that_cannot_be_cut_is_told_which_sizes_do(sizes, said, advice):
    shapes = published("Qwen/Qwen2.5-VL-3B-Instruct").shapes
    with pytest.raises(meshes.MeshError, match=f"{said}.*; .*{advice}"):
        meshes.check_policy(abstract_mesh(*sizes), shapes)
    # More devices than heads of keys share one.
    meshes.check_policy(abstract_mesh(3, 256, 4), shapes)
    meshes.check_policy(abstract_mesh(1, 4, 2), tiny.make_policy().shapes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as its place in a mesh needs."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "a chip"


@pytest.mark.parametrize("sizes", [(-1, 2, 2), (2, 4, 1), (4, 1, -1)])
def test_data_runs_over_slices_and_the_rest_stays_within(sizes):
    # As a runtime may list them: slices in turns.
    chips = [Chip(i, i % 2) for i in range(8)]
    mesh = meshes.make_mesh(*sizes, devices=chips)
    assert mesh.size == 8 and {chip.id for chip in mesh.devices.flat} == set(range(8))
    for replica in mesh.devices:
        assert len({chip.slice_index for chip in replica.flat}) == 1
    slices = [replica.flat[0].slice_index for replica in mesh.devices]
    assert slices == sorted(slices)


def test_a_slice_is_not_cut_through_by_fsdp():
    chips = [Chip(i, i // 4) for i in range(8)]
    with pytest.raises(meshes.MeshError, match=r"2 slices, and mesh.data=1 .* divide the 4 dev"):
        meshes.make_mesh(1, -1, 1, devices=chips)


def test_devices_that_are_not_there_are_named_with_the_way_to_check_without_them():
    chips = [Chip(i, 0, i // 4) for i in range(8)]
    with pytest.raises(meshes.MeshError) as caught:
        meshes.make_mesh(1, 16, 1, devices=chips)
    said = str(caught.value)
    assert "mesh.fsdp=16" in said and "8 devices (gpu, a chip) in 2 processes" in said
    assert "python -m emor3_jax.compile --config=" in said and "--topology=" in said


def test_a_batch_is_cut_along_its_first_axis_alone():
    mesh = meshes.make_mesh()
    batch = {"a": np.zeros((4 * mesh.size, 3)), "b": np.arange(4 * mesh.size)}
    placed = meshes.shard_batch(batch, mesh)
    assert all(x.sharding.spec == P(("data", "fsdp")) for x in placed.values())
    np.testing.assert_array_equal(placed["b"], batch["b"])


@pytest.mark.parametrize(("size", "advice"), [(6, {4, 8}), (2, {4}), (9, {8, 12})])
def test_a_batch_size_that_does_not_divide_is_told_which_ones_do(size, advice):
    mesh = abstract_mesh(2, 2, 2)
    with pytest.raises(meshes.MeshError) as caught:
        meshes.check_batch(mesh, "policy_update.prompts", size)
    said = str(caught.value)
    assert said.startswith(f"config.policy_update.prompts={size}: ")
    assert "mesh.data * mesh.fsdp = 4" in said
    numbers = [int(x) for x in re.findall(r"\d+", said.split(";")[1])]
    assert sorted(numbers) == sorted(advice)
    for good in advice:
        meshes.check_batch(mesh, "policy_update.prompts", good)
