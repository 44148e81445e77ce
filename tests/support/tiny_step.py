"""A step of a tiny policy, compiled for any mesh; as a program, for 8 devices of this machine.

The program prints JSON: for sound programs what `findings` says, or, with the argument `faults`,
for some with a fault put in.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from emor3_jax.compiler import hlo
from emor3_jax.compiler.record import Recorder, Report
from emor3_jax.compiler.step import step_programs
from emor3_jax.config import default
from emor3_jax.learner import gradients
from emor3_jax.models import decoder, params, policy, vision
from emor3_jax.models.policy import Policy
from emor3_jax.models.qwen2_5_vl import tower
from emor3_jax.parallel import mesh as meshes
from emor3_jax.rollout import rollout, slots
from support import tiny

# Widths unlike each other and unlike any length, so that a shape tells what it is.
POLICY = tiny.make_policy(
    vision=dataclasses.replace(
        tiny.VISION, depth=3, hidden_size=56, intermediate_size=72, out_hidden_size=96
    ),
    vocab_size=400,
    hidden_size=96,
    intermediate_size=208,
    num_layers=3,
    head_dim=24,
    mrope_section=(3, 4, 5),
    tie_word_embeddings=False,
)
SHAPES = POLICY.shapes
QUESTIONS = {"coherence": (6, 9), "consistency": (4, 7)}
_HEAD = {(SHAPES.hidden_size // n, SHAPES.vocab_size) for n in (1, 2)}
LAYERS = ("weight_sync", "decode", "reference", "update")
IN_FLIGHT = ("open_flight", "admit", "shrink", "shrink_slots", "take_out")


def make_config(length: int = 32) -> ConfigDict:
    """A step of 16 prompts, which come in two waves and are learned from in two parts."""
    config = default()
    config.data.prompt_lengths, config.data.image_windows = (40,), (2,)
    config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens = 16, 4, length
    config.rollout.slots, config.rollout.refill, config.rollout.block = 16, 8, 16
    config.reflect.text_lengths = (16,)
    config.policy_update.prompts, config.policy_update.micro_prompts = 8, 8
    # Logits of half the tokens of a device at once.
    config.policy_update.logprob_chunk = 64
    return config


def compile_tiny(
    mesh: Mesh, *only: str, attention: str = "xla", length: int = 32
) -> dict[str, Report]:
    """Compiles the programs of a step, all unless some are named; what follows is not traced."""
    record, sent = Recorder(mesh, lambda name: not only or name in only), None
    with jax.set_mesh(mesh):
        policy = POLICY.with_compute(attention=attention)
        programs = step_programs(mesh, make_config(length), policy, QUESTIONS)
        while not only or {report.name for report in record.reports} != set(only):
            try:
                sent = record(programs.send(sent))
            except StopIteration:
                break
    return {report.name: report for report in record.reports}


def findings(report: Report, mesh: Mesh) -> dict[str, Any]:
    """What a layout must not have.

    Returns:
      "kinds": of all collectives;
      "gathered": where weights are gathered; "stacked": where those of all layers at once are;
      "repeated": where a weight outside the layers is, more than once;
      "activations": bytes of the all-reduces of more than vectors; "heads": where attention gathers
      what is no weight; "head_over_data": how often the head's gradient is summed over `data`,
      of another size than `fsdp`; "passes": how often each layer of the decoder is gathered, told
      by one of its weights; "cache": where keys and values of all layers are gathered.
    """
    shapes = POLICY.param_shapes()
    leaves = jax.tree.leaves(shapes)
    cut = jax.tree.leaves(meshes.param_shardings(shapes, mesh, gathered=True))
    shapes = [x.shape for x in leaves]
    shapes += [s.shard_shape(x.shape) for x, s in zip(leaves, cut, strict=True)]
    layers = {SHAPES.num_layers, SHAPES.vision.depth}
    scanned = [s for s in shapes if len(s) == 3 and s[0] in layers]
    others = [s for s in shapes if len(s) == 2 and s[0] not in layers]
    found = report.collectives
    weights = hlo.weight_gathers(found, shapes)
    sums = [c for c in found if c.kind == "all-reduce"]
    return {
        "kinds": sorted({c.kind for c in found}),
        "gathered": [c.source for c in weights],
        "stacked": [c.source for c in hlo.weight_gathers(found, scanned, stacked=True)],
        "repeated": [
            c.source for c in hlo.weight_gathers(found, others, stacked=True) if c.times > 1
        ],
        "activations": sum(
            hlo.bytes_of(*shape) for c in sums for shape in c.shapes if len(shape[1]) > 1
        ),
        "heads": [
            c.source
            for c in found
            if c.kind == "all-gather" and "attn" in c.source and c not in weights
        ],
        "head_over_data": sum(
            c.times
            for c in sums
            if c.group == mesh.shape["data"] != mesh.shape["fsdp"]
            for shape in c.shapes
            if shape[1] in _HEAD
        ),
        "passes": sum(c.times for c in weights if "/layers/mlp/up_proj" in c.source)
        / SHAPES.num_layers,
        "cache": [
            c.source
            for c in found
            if c.kind == "all-gather"
            for _, shape in c.shapes
            if len(shape) > 4 and shape[0] == SHAPES.num_layers
        ],
    }


@contextlib.contextmanager
def weights_as_trained() -> Iterator[None]:
    """Decoding reads weights that are cut over `fsdp`."""
    with mock.patch.object(rollout, "weight_sync", params.cast_matrices):
        yield


@contextlib.contextmanager
def whole_stacks() -> Iterator[None]:
    """The tower's layers are gathered all at once."""
    encode = Policy.encode_images

    def faulty(self: Policy, params: Any, images: Any) -> jax.Array:
        whole = jax.lax.with_sharding_constraint(params["visual"], P())
        return encode(self, {**params, "visual": whole}, images)

    with mock.patch.object(Policy, "encode_images", faulty):
        yield


@contextlib.contextmanager
def head_in_the_loop() -> Iterator[None]:
    """Every chunk of logits gathers the head anew; shown for TPU, as the CPU's compiler sees it."""
    logits = policy._logits

    def cut(function: Callable, weight: jax.Array, path: str, *rows: jax.Array) -> Any:
        spec = meshes.spec_of(path, weight.shape, jax.sharding.get_abstract_mesh())
        own = functools.partial(function, axis=None)
        specs = spec, *[meshes.BATCH] * len(rows)
        run = jax.shard_map(own, in_specs=specs, out_specs=meshes.BATCH, check_vma=False)
        return run(weight, *rows)

    def gathered(tied: bool, head: jax.Array, hidden: jax.Array) -> jax.Array:
        # The sampler's logits are none of a loop over chunks.
        if "fsdp" in jax.sharding.get_abstract_mesh().manual_axes:
            head = jax.lax.all_gather(head, "fsdp", tiled=True)
        return logits(tied, head, hidden)

    with (
        mock.patch.object(policy, "by_rows", cut),
        mock.patch.object(policy, "_logits", gathered),
    ):
        yield


@contextlib.contextmanager
def features_cut() -> Iterator[None]:
    """Activations are cut as the compiler likes."""
    with (
        mock.patch.object(decoder, "keep_rows", lambda x: x),
        mock.patch.object(tower, "keep_rows", lambda x: x),
    ):
        yield


@contextlib.contextmanager
def parts_first() -> Iterator[None]:
    """The tower's fused projection has all queries first, as on the hub."""

    def faulty(qkv: jax.Array, heads: int) -> jax.Array:
        return jax.numpy.moveaxis(qkv.reshape(*qkv.shape[:-1], 3, heads, -1), -3, 0)

    with mock.patch.object(vision, "_split", faulty):
        yield


@contextlib.contextmanager
def prompts_first() -> Iterator[None]:
    """The layers run over the prompts, and then anew over the responses."""

    def faulty(
        self: Policy, params: Any, prompt: Any, features: Any, *rest: Any, **options: Any
    ) -> jax.Array:
        _, prefix = self.read_prompt(params, prompt, features)
        return self.extend(params, prefix, *rest)[0]

    with mock.patch.object(Policy, "extend_group", faulty):
        yield


@contextlib.contextmanager
def head_summed_each_time() -> Iterator[None]:
    """Each micro-batch sums the gradient by the head over `data`."""
    with mock.patch.object(gradients, "num_data", lambda: 1):
        yield


@contextlib.contextmanager
def rows_from_anywhere() -> Iterator[None]:
    """Prompts and lanes that stay or leave are picked from all parts together."""

    def faulty(tree: Any, axes: Any, at: jax.Array, _: int) -> Any:
        return slots._map_arrays(lambda axis, x: jax.numpy.take(x, at, axis), axes, tree)

    with mock.patch.object(slots, "_pick", faulty):
        yield


@contextlib.contextmanager
def heads_cut() -> Iterator[None]:
    """Keys of fewer heads than `tensor` has parts are cut as the compiler likes."""
    with mock.patch.object(decoder, "share_heads", lambda x: x):
        yield


FAULTS = {
    rows_from_anywhere: ((2, 2, 2), "shrink", "shrink_slots", "take_out"),
    weights_as_trained: ((1, 8, 1), "weight_sync", "decode"),
    whole_stacks: ((1, 8, 1), "reference"),
    features_cut: ((1, 8, 1), "reference"),
    parts_first: ((2, 2, 2), "reference"),
    prompts_first: ((1, 8, 1), "reference"),
    head_summed_each_time: ((4, 2, 1), "update", "apply"),
    heads_cut: ((1, 2, 4), "weight_sync", "decode"),
}
"""What is done wrong → the mesh and the programs that show it."""


def main() -> None:
    """Prints what is found."""

    def find(sizes: tuple[int, int, int], *programs: str) -> dict[str, Any]:
        mesh = meshes.make_mesh(*sizes)
        return {
            name: findings(report, mesh) for name, report in compile_tiny(mesh, *programs).items()
        }

    if sys.argv[1:] == ["faults"]:
        found = {}
        for fault, case in FAULTS.items():
            # Programs that were traced with another fault do not count.
            jax.clear_caches()
            with fault():
                found[fault.__name__] = find(*case)
    else:
        found = {
            "1x8x1": find((1, 8, 1), *LAYERS),
            "2x2x2": find((2, 2, 2), *LAYERS, *IN_FLIGHT),
            "4x2x1": find((4, 2, 1), "update", "apply"),
            "1x2x4": find((1, 2, 4), "weight_sync", "decode"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
