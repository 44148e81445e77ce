"""A step of a tiny policy, compiled for any mesh; as a program, for 8 devices of this machine.

Run so it prints, for each program, the all-gathers of weights: those of stacked weights, and all of
them. With a word behind it, a fault is put in that the tests must see.
"""

import dataclasses
import json
import sys
from functools import partial
from unittest import mock

import jax
import tiny
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.compiler import hlo
from emor3_jax.compiler.record import Recorder, Report
from emor3_jax.compiler.step import abstract_state, compile_step
from emor3_jax.config import default
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.parallel import mesh as meshes
from emor3_jax.prepare import make_update

# Widths unlike each other and unlike any length, so that a shape tells what it is.
VISION = dataclasses.replace(
    tiny.VISION, depth=3, hidden_size=48, intermediate_size=72, out_hidden_size=96
)
POLICY = tiny.make_config(
    vision=VISION,
    vocab_size=400,
    hidden_size=96,
    intermediate_size=208,
    num_layers=3,
    head_dim=24,
    mrope_section=(3, 4, 5),
    tie_word_embeddings=False,
)
QUESTIONS = ((6, 9), (4, 7))


def config() -> ConfigDict:
    """A step of 16 prompts, which come in two waves and are learned from in two parts."""
    config = default()
    config.data.prompt_lengths, config.data.image_windows = (40,), (2,)
    config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens = 16, 4, 32
    config.rollout.slots, config.rollout.refill, config.rollout.block = 16, 8, 16
    config.reflect.text_lengths = (16,)
    config.policy_update.prompts, config.policy_update.micro_prompts = 16, 8
    config.policy_update.prompts = 8
    config.policy_update.logprob_chunk = 64
    return config


def compile_tiny(mesh: Mesh, *only: str, attention: str = "xla") -> dict[str, Report]:
    """Compiles the programs of a step, all unless some are named."""
    record = Recorder(mesh, lambda name: not only or name in only)
    policy = dataclasses.replace(POLICY, attention=attention)
    with jax.set_mesh(mesh):
        compile_step(record, config(), policy, QUESTIONS)
    return {report.name: report for report in record.reports}


def weight_shapes(mesh: Mesh) -> list[tuple[int, ...]]:
    """Shapes of the weights on a device, once whole and once cut over `tensor`."""
    params = abstract_state(mesh, POLICY, make_update(config())[0]).params
    cut = meshes.param_shardings(params, mesh, gathered=True)
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(cut), strict=True))
    return [x.shape for x, _ in leaves] + [s.shard_shape(x.shape) for x, s in leaves]


def stacked_shapes(mesh: Mesh) -> list[tuple[int, ...]]:
    """Those of scanned layers."""
    layers = {POLICY.num_layers, VISION.depth}
    return [s for s in weight_shapes(mesh) if len(s) == 3 and s[0] in layers]


def gathers(report: Report, mesh: Mesh) -> dict[str, list[str]]:
    """Where a program gathers weights: stacked ones, and any."""
    found = report.collectives
    return {
        "stacked": [
            c.source for c in hlo.weight_gathers(found, stacked_shapes(mesh), stacked=True)
        ],
        "any": [c.source for c in hlo.weight_gathers(found, weight_shapes(mesh))],
        "looped": [
            c.source
            for c in hlo.weight_gathers(found, [(POLICY.vocab_size, POLICY.hidden_size)])
            + hlo.weight_gathers(found, [(POLICY.hidden_size, POLICY.vocab_size)])
            if c.times > 2
        ],
    }


def with_fault(fault: str) -> mock._patch:
    """Returns what puts a fault into the programs."""
    if fault == "weights-as-trained":
        return mock.patch.object(model, "gather", lambda x, path: x)
    if fault == "whole-stacks":
        return mock.patch.object(model, "encode_images", _gather_first(model.encode_images))
    return mock.patch.object(model, "_unused", None, create=True)


def _gather_first(function):
    def encode(config, params, images, **options):
        whole = jax.lax.with_sharding_constraint(params["visual"], jax.sharding.PartitionSpec())
        return function(config, {**params, "visual": whole}, images, **options)

    return encode


def main(fault: str = "") -> None:
    """Prints what is found on three meshes."""
    found = {}
    programs = partial(compile_tiny) if not fault else partial(compile_tiny)
    for sizes in ((1, 8, 1), (2, 2, 2)) if not fault else ((1, 8, 1),):
        mesh = meshes.make_mesh(*sizes)
        with with_fault(fault):
            reports = programs(mesh, "decode", "update", "reference")
        found[str(sizes)] = {name: gathers(report, mesh) for name, report in reports.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
