"""The rules on a whole train state, and what a batch's size must be."""

import re

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.parallel import mesh as meshes
from emor3_jax.rl.update import TrainState, make_optimizer


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """A mesh of no devices: enough to work out shardings."""
    return AbstractMesh((data, fsdp, tensor), meshes.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """Shapes of a tiny policy with an untied head and of its optimizer state."""
    config = tiny.make_config(tie_word_embeddings=False)
    optimizer = make_optimizer(optax.linear_schedule(1e-3, 0.0, 5))

    def create():
        return TrainState.create(model.init_params(config, jax.random.key(0)), optimizer)

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


def test_an_axis_that_fits_nowhere_leaves_the_policy_whole(state):
    assert all(not any(spec) for spec in specs(state, abstract_mesh(1, 7, 11)).values())


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
