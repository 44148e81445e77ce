"""No program moves more than its layout needs: the collectives of compiled programs are read.

On 8 fake CPU devices, and compiled for TPU. Each check is shown to fail on a program with a fault;
those of the CPU by `make test-long`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from support import compiler_flags, tiny_step

from emor3_jax.compiler.record import Report
from emor3_jax.parallel import mesh as meshes
from emor3_jax.parallel import topology

ROOT = Path(__file__).parents[2]


def _find(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {
        "XLA_FLAGS": compiler_flags.on_devices(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "support.tiny_step", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `tiny_step` finds on 8 devices."""
    return _find()


MESHES = ("1x8x1", "2x2x2")


@pytest.mark.parametrize("mesh", MESHES)
def test_decoding_gathers_no_weights(found: dict[str, Any], mesh: str) -> None:
    assert found[mesh]["decode"]["gathered"] == []
    # They are gathered before, once a step.
    assert found[mesh]["weight_sync"]["gathered"]


def test_what_is_in_flight_stays_on_its_part(found: dict[str, Any]) -> None:
    """Prompts enter and leave, and idle lanes go, without a collective."""
    for program in tiny_step.IN_FLIGHT:
        assert found["2x2x2"][program]["kinds"] == [], program


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("program", ["update", "reference"])
def test_layers_are_gathered_one_by_one(found: dict[str, Any], mesh: str, program: str) -> None:
    assert found[mesh][program]["stacked"] == []
    # Single layers are, in their loop: what is checked is there to be seen.
    assert found[mesh][program]["gathered"]


@pytest.mark.parametrize("mesh", MESHES)
def test_what_lies_outside_the_layers_is_gathered_once(found: dict[str, Any], mesh: str) -> None:
    for program in ("update", "reference"):
        assert found[mesh][program]["repeated"] == []


@pytest.mark.parametrize("mesh", MESHES)
def test_a_layer_is_gathered_once_for_prompts_and_responses(
    found: dict[str, Any], mesh: str
) -> None:
    # The program is one micro-batch.
    assert found[mesh]["reference"]["passes"] == 1


def test_heads_stay_where_they_are(found: dict[str, Any]) -> None:
    """With `tensor`, attention needs nothing of another device."""
    assert found["2x2x2"]["reference"]["heads"] == []


def test_a_cache_of_fewer_heads_than_parts_stays_where_it_is(found: dict[str, Any]) -> None:
    """Two key heads over four parts of `tensor`: no token gathers the cache."""
    assert found["1x2x4"]["decode"]["cache"] == []


def test_activations_stay_with_their_prompts(found: dict[str, Any]) -> None:
    """Without `tensor`, nothing of a forward pass is summed over devices."""
    assert found["1x8x1"]["reference"]["activations"] == 0


def test_the_gradient_of_the_head_is_summed_over_data_once_an_update(found: dict[str, Any]) -> None:
    assert _sums_of_the_head(found["4x2x1"]) == [0, 1]


def _sums_of_the_head(programs: dict[str, Any]) -> list[int]:
    return [programs[name]["head_over_data"] for name in ("update", "apply")]


@pytest.mark.long
def test_every_check_fails_on_a_program_with_its_fault() -> None:
    faults = _find("faults")
    references = {case: found.get("reference") for case, found in faults.items()}
    assert faults["weights_as_trained"]["decode"]["gathered"]
    for program, found in faults["rows_from_anywhere"].items():
        assert found["kinds"], program
    assert references["whole_stacks"]["stacked"]
    assert references["prompts_first"]["passes"] == 2
    assert references["parts_first"]["heads"]
    assert references["features_cut"]["activations"] > 0
    assert _sums_of_the_head(faults["head_summed_each_time"]) == [1, 0]
    assert faults["heads_cut"]["decode"]["cache"]


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(scope="module")
def for_tpu() -> tuple[dict[str, Report], Any]:
    """The same programs for the four chips of a v4-8, and what is found in them."""
    mesh = meshes.make_mesh(1, 4, 1, topology.parse("v4-8").devices())
    reports = tiny_step.compile_tiny(mesh, "weight_sync", "decode", "reference")
    jax.clear_caches()
    with tiny_step.head_in_the_loop():
        reports["fault"] = tiny_step.compile_tiny(mesh, "reference")["reference"]
    jax.clear_caches()
    return reports, {name: tiny_step.findings(report, mesh) for name, report in reports.items()}


@needs_compiler
@pytest.mark.loads_tpu_compiler
@pytest.mark.long
def test_programs_for_tpu_move_no_more_either(for_tpu: tuple[dict[str, Report], Any]) -> None:
    reports, found = for_tpu
    assert found["decode"]["gathered"] == []
    assert found["reference"]["activations"] == 0
    assert found["reference"]["stacked"] == found["reference"]["repeated"] == []
    assert found["fault"]["repeated"]
    assert all(report.made is not None for report in reports.values())


@needs_compiler
@pytest.mark.loads_tpu_compiler
@pytest.mark.long
def test_the_update_of_prompts_that_share_rows_compiles_for_tpu() -> None:
    """With splash attention, whose mask is data; weights are gathered layer by layer, and once."""
    mesh = meshes.make_mesh(1, 4, 1, topology.parse("v4-8").devices())
    name = "update_packed"
    report = tiny_step.compile_tiny(mesh, name, attention="splash", length=256)[name]
    found = tiny_step.findings(report, mesh)
    assert report.made is not None
    # Gradients of layers are scattered, not summed whole.
    assert report.moved["reduce-scatter"] > report.moved["all-reduce"]
    assert found["stacked"] == found["repeated"] == []
    assert found["gathered"]
