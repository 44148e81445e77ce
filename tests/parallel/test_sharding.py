"""The mesh and its rules; eight devices compute what one does."""

import json
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
    empty: bool = False


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("model/embed_tokens/embedding", (800, 64), P("tensor", "fsdp")),
        ("model/layers/self_attn/q_proj/kernel", (4, 64, 64), P(None, "fsdp", "tensor")),
        ("model/layers/self_attn/q_proj/bias", (4, 64), P(None, "tensor")),
        ("model/layers/self_attn/o_proj/kernel", (4, 64, 64), P(None, "tensor", "fsdp")),
        ("model/layers/mlp/down_proj/kernel", (4, 96, 64), P(None, "tensor", "fsdp")),
        ("model/layers/input_layernorm/scale", (4, 64), P()),
        # Scales of int8 kernels are cut where the outputs of these are.
        ("model/layers/self_attn/q_proj/kernel_scale", (4, 64), P(None, "tensor")),
        ("model/layers/self_attn/o_proj/kernel_scale", (4, 64), P(None, "fsdp")),
        ("model/layers/mlp/down_proj/kernel_scale", (4, 64), P(None, "fsdp")),
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


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.long)])
def eight(request) -> tuple[subprocess.CompletedProcess, bool]:
    """The program that has 8 devices, a process of its own; whether it tries all meshes."""
    root = Path(__file__).parents[2]
    program = str(Path(__file__).with_name("eight_devices.py"))
    every = request.param == "all"
    done = subprocess.run(
        [sys.executable, program, *(["--all"] if every else [])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return done, every


@pytest.mark.parametrize(
    ("name", "cases", "most"),
    [
        # Loss and gradients.
        ("score", (1, 3), 1e-4),
        ("score qwen3_vl", (1, 2), 1e-4),
        # Metrics and parameters after two updates, micro-batches planned on each part of the mesh.
        ("update", (1, 2), 1e-4),
        ("packed update", (1, 1), 1e-4),
        # Tokens of a greedy rollout with prompts in turns.
        ("rollout", (1, 3), 0.0),
        ("rollout qwen3_vl", (1, 1), 0.0),
        # What a judge of another family says of a text.
        ("judge", (0, 2), 1e-5),
        # Splash attention and its gradients: devices share prompts and heads.
        ("attention", (2, 4), 2e-5),
        # The kernel of decoded tokens: likewise.
        ("decode", (2, 4), 2e-6),
        # Weights quantised for decoding, bit for bit.
        ("quantise", (1, 3), 0.0),
        # Each device reads its own part of a checkpoint.
        ("checkpoint", (2, 3), 0.0),
    ],
)
def test_eight_devices_give_what_one_does(eight, name, cases, most):
    done, every = eight
    found = [json.loads(line) for line in done.stdout.splitlines()]
    differences = {tuple(sizes): value for part, sizes, value in found if part == name}
    assert len(differences) == cases[every], done.stderr[-2000:]
    assert all(value <= most for value in differences.values()), differences


def test_the_program_with_eight_devices_ends_well(eight):
    done, _ = eight
    assert done.returncode == 0, done.stderr[-2000:]
