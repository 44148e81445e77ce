"""The mesh and its rules; eight devices compute what one does."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import pytest
from jax.sharding import PartitionSpec as P

from emor3_jax.parallel import mesh as meshes


class FakeMesh(NamedTuple):
    """Axis sizes alone."""

    shape: Mapping[str, int] = MappingProxyType({"data": 2, "fsdp": 2, "tensor": 4})


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("model/embed_tokens/embedding", (800, 64), P("tensor", "fsdp")),
        ("model/layers/self_attn/q_proj/kernel", (4, 64, 64), P(None, "fsdp", "tensor")),
        ("model/layers/self_attn/q_proj/bias", (4, 64), P(None, "tensor")),
        ("model/layers/self_attn/o_proj/kernel", (4, 64, 64), P(None, "tensor", "fsdp")),
        ("model/layers/mlp/down_proj/kernel", (4, 96, 64), P(None, "tensor", "fsdp")),
        ("model/layers/input_layernorm/scale", (4, 64), P()),
        ("visual/blocks/attn/proj/kernel", (3, 32, 32), P(None, "tensor", "fsdp")),
        # 6 does not divide by 4: a bias stays whole.
        ("model/layers/self_attn/k_proj/bias", (4, 6), P(None, None)),
        # Optimizer state is cut like its parameter.
        ("1/0/mu/model/embed_tokens/embedding", (800, 64), P("tensor", "fsdp")),
    ],
)
def test_rules(path, shape, spec):
    assert meshes.spec_of(path, shape, FakeMesh()) == spec


def test_a_matrix_that_would_stay_whole_is_refused():
    with pytest.raises(meshes.MeshError, match=r"tensor=4: .* dimension 2 of .*k_proj.*1, 2, 3 or"):
        meshes.spec_of("model/layers/self_attn/k_proj/kernel", (4, 64, 6), FakeMesh())


def test_a_mesh_that_does_not_fit_the_devices_names_fields_and_devices():
    with pytest.raises(
        meshes.MeshError, match=r"mesh.tensor=7.*there (is 1 device|are \d+ devices) \(cpu, cpu\)"
    ):
        meshes.make_mesh(1, 1, 7)
    with pytest.raises(meshes.MeshError, match="set one axis to -1"):
        meshes.make_mesh(-1, -1, 1)
    for sizes in ((0, 1, 1), (-1, 0, 1), (-2, -2, 1)):
        with pytest.raises(meshes.MeshError, match=f"mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}"):
            meshes.make_mesh(*sizes)
    assert meshes.make_mesh(-1, 1, 1).size == jax.device_count()


def test_a_batch_that_does_not_divide_names_the_field_and_sizes_that_do():
    with pytest.raises(meshes.MeshError, match=r"rollout.prompts=6.*multiple of .* 4; 4 or 8"):
        meshes.check_batch(FakeMesh(), "rollout.prompts", 6)
    meshes.check_batch(FakeMesh(), "rollout.prompts", 8)


@pytest.mark.parametrize(
    ("program", "cases", "most"), [("sharded_score.py", 4, 1e-4), ("sharded_rollout.py", 2, 0.0)]
)
def test_eight_devices_give_what_one_does(program, cases, most):
    """Loss and gradients; the tokens of a greedy rollout with prompts in turns."""
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == cases
    for line in lines:
        assert float(line.split()[-1]) <= most, line
