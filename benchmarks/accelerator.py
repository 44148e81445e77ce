"""How close the jitted programs of a step come to what a machine can do.

    python -m benchmarks.accelerator [--size=3B|small] [--only=step,decode,prefill,reference,update]

First whole steps through the program that users run (`benchmarks.whole_step`). Then it measures the
machine: the bytes a second of a large copy, read and written, and the rate of a
large bfloat16 product. Then each program, as the rollout and the learner call it, on random weights
and images made on the device:

* decode: a block of tokens of the engine, `--slots` prompts of G responses, with the keys of the
  prompts and a ring of cached tokens. The least that a token must move: decoder and head once, each
  prompt's keys once, and of each response the keys of the tokens so far. What we ask for: all
  places of the ring, since a mask says which count; a prompt's keys still once for its G responses,
  by one product (what the compiler makes of it is seen among the kernels).
* prefill, reference (log-probabilities) and update (loss, gradient and AdamW of float32 master
  weights, micro-batches accumulated): the FLOPs that the model needs (`emor3_jax.flops`), and
  with those that rematerialisation repeats, beside the measured product.

Then each runs once under the profiler, for its longest kernels. One table, row by row, so that a
run that is cut short leaves what was measured. `--dry` compiles and runs each program once only.
"""

import argparse
import glob
import gzip
import json
import os
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import whole_step
from benchmarks.options import whole
from emor3_jax import models
from emor3_jax.flops import Cost, StepShapes, peak_flops, phase_costs
from emor3_jax.flops.cost import decoder_flops
from emor3_jax.learner.gradients import (
    Coefficients,
    Cut,
    Metrics,
    UpdateSpec,
    add_metrics,
    add_micro_batch,
    apply_update,
    no_gradients,
    weigh,
    weighed,
)
from emor3_jax.learner.logprobs import LogprobSpec, planned_logprobs
from emor3_jax.learner.micro_batches import MicroBatch, Shape, StepPlan
from emor3_jax.models import Policy
from emor3_jax.models.cache import KV
from emor3_jax.models.params import unroll, weight_sync
from emor3_jax.rl.losses import PolicyLoss
from emor3_jax.rl.surrogates import Clip
from emor3_jax.rl.update import TrainState, make_optimizer
from emor3_jax.rollout.rollout import prefill
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import Admission, InFlight, Room, decode_block, open_flight
from emor3_jax.types import Batch, Experience, Samples

PROGRAMS = ("decode", "prefill", "reference", "update")
STEP = "step"
"""Beside them: whole steps of the method."""
DTYPE = jnp.dtype(jnp.bfloat16)
KERNELS, CHAIN = 8, 10
"""Kernels shown of each program; passes of a copy or product between two readings of the clock."""
LOSS = PolicyLoss(surrogate=Clip(0.2, 0.3, 3.0), kl="k3", mean="token", entropy=False)
KL_COEF = 1e-2
LOGPROBS = LogprobSpec(temperature=1.0, chunk=1024)
"""These three are the default config's, as is the optimizer."""
_START = 5
"""Where in a prompt the image begins."""
_NOMINAL = {"H200": 4.8e12, "H100 NVL": 3.9e12, "H100 PCIe": 2.0e12, "H100": 3.35e12}
"""Bytes a second by the data sheets, by what the device's kind holds; the first that fits."""


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
      side: of an image in pixels.
      prompt: P, tokens of a prompt but its last one.
      responses: G.
      places: of the ring, full when the block of decoding ends.
      block: tokens of a block.
      tokens: T of reference and update.
      slots: prompts that decode, and that are prefilled.
      micro, parts: prompts of a micro-batch, and micro-batches, of reference and update.
      copy: numbers that are copied, float32.
      matrix: side of the square matrices.
      runs: of which the median counts.
    """

    side: int = 448
    prompt: int = 512
    responses: int = 8
    places: int = 512
    block: int = 64
    tokens: int = 512
    slots: int = 16
    micro: int = 4
    parts: int = 2
    copy: int = 2**28
    matrix: int = 8192
    runs: int = 5


SMALL = Sizes(16, 24, 2, 8, 4, 8, 2, 1, 2, 2**16, 64, 3)


class Job(NamedTuple):
    """A jitted program and what it is called with.

    Attributes:
      function: the program.
      args: its arguments; what is abstract is made on the device (`fill`).
      static: its static arguments.
      cost: of one call.
      again: (result, args) → the arguments of the next call, where they were donated to this one.
      steps: how many tokens one after the other a call decodes, or 1.
      bytes: what → bytes of one step, where they bound it.
    """

    function: Any
    args: tuple
    static: dict[str, Any]
    cost: Cost
    again: Callable[[Any, tuple], tuple] = lambda result, args: args
    steps: int = 1
    bytes: dict[str, float] = {}  # noqa: RUF012


_SMALL_CONFIG = {
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    },
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "image_token_id": 70,
    "video_token_id": 71,
    "vision_start_token_id": 72,
    "vision_end_token_id": 73,
}
"""Two narrow layers, for machines without an accelerator."""


def find_policy(size: str) -> Policy:
    """Returns the policy of a size: "small", or a published one, such as "3B"."""
    if size == "small":
        return models.parse_config(_SMALL_CONFIG)
    return models.published(f"Qwen/Qwen2.5-VL-{size}-Instruct")


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(seed: int, middle: float, most: float, *, shape: tuple, dtype: Any) -> jax.Array:
    """Returns numbers up to `most` from the middle, of 256 kinds, by the device's own generator."""
    bits = jax.random.bits(jax.random.key(seed, impl="rbg"), shape, jnp.uint8)
    return (middle + (bits.astype(jnp.float32) / 127.5 - 1) * most).astype(dtype)


def fill(tree: Any) -> Any:
    """Makes what is abstract on the device, and puts the rest there.

    Norms are 1, biases and the optimizer's state 0; everything else is random, and small enough
    that no layer's results grow.
    """
    seeds = iter(range(10**6))

    def make(path: tuple, leaf: Any) -> jax.Array:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.asarray(leaf)
        name, size = jax.tree_util.keystr(path), (1, 1, *leaf.shape)
        plain = any(x in name for x in ("opt_state", "bias", "scale"))
        most = 0.0 if plain else 0.5 * size[-2 if "kernel" in name else -1] ** -0.5
        middle = float("scale" in name and "opt_state" not in name)
        return _random(next(seeds), middle, most, shape=leaf.shape, dtype=leaf.dtype)

    return jax.block_until_ready(jax.tree_util.tree_map_with_path(make, tree))


def parameters(policy: Policy) -> tuple[Any, Any]:
    """Returns the abstract parameters: float32, and as decoding and the reference read them."""
    full = policy.param_shapes()
    return full, weight_sync.eval_shape(full, DTYPE)


def make_batch(policy: Policy, sizes: Sizes, prompts: int) -> Batch:
    """Returns prompts of an image and random text; the patches are abstract."""
    shapes, side = policy.shapes, sizes.side // policy.shapes.vision.patch_size
    text = np.random.default_rng(0).integers(0, shapes.image_token_id, (prompts, sizes.prompt))
    text[:, _START - 1] = shapes.vision_start_token_id
    text[:, _START : _START + side**2 // shapes.merge_unit] = shapes.image_token_id
    pixels = np.zeros((prompts * side**2, shapes.vision.patch_dim), np.float32)
    prompt, images, following = models.pack(
        policy, text, np.ones_like(text), pixels, [(1, side, side)] * prompts
    )
    images = images._replace(patches=jax.ShapeDtypeStruct(images.patches.shape, DTYPE))
    # The last four are read by rewards and reflections alone.
    last, ones = text[:, -1].astype(np.int32), np.ones(prompts, np.int32)
    return Batch(prompt, last, following, images, ones, ones, ones, ones[:, None], ones)


def make_samples(policy: Policy, shape: tuple[int, int, int], length: int) -> Samples:
    """Returns `length` random tokens of T of each response, about as probable as they would be."""
    tokens = np.random.default_rng(1).integers(0, policy.shapes.image_token_id, shape, np.int32)
    logprobs = np.full(shape, -np.log(policy.shapes.vocab_size), np.float32)
    return Samples(
        tokens, logprobs, np.full(shape[:2], length, np.int32), np.zeros(shape[:2], bool)
    )


def decode(policy: Policy, sizes: Sizes, unrolled: bool) -> Job:
    """Returns a block of the rollout."""
    shapes = policy.shapes
    b, g, p, places = sizes.slots, sizes.responses, sizes.prompt, sizes.places
    age, longest, heads, d = places - sizes.block, 2 * places, shapes.num_kv_heads, shapes.head_dim
    params, layers = parameters(policy)[1], shapes.num_layers
    k, v = (jax.ShapeDtypeStruct((layers, b, heads, *x), DTYPE) for x in ((d, p), (p, d)))
    rows, samples = np.arange(b, dtype=np.int32), make_samples(policy, (b, g, longest), age)
    admission = Admission(rows, rows, rows, KV(k, v, np.ones((b, p), bool)))
    how = {"responses": g, "length": longest, "unroll": unrolled}
    opened = open_flight.eval_shape(admission, room=Room(1, b, b * g, places), **how)
    lanes = np.arange(b * g, dtype=np.int32)
    flight = InFlight(
        opened.slots._replace(
            row=rows,
            token=rows,
            position=np.full(b, p, np.int32),
            wave=np.zeros(b, np.int32),
            begun=np.full(b, g, np.int32),
            samples=samples,
            prefix=admission.prefix,
        ),
        opened.lanes._replace(
            cell=lanes,
            row=lanes // g,
            response=lanes % g,
            position=np.full(b * g, p, np.int32),
            token=samples.tokens[..., 0].reshape(-1),
            age=np.full(b * g, age, np.int32),
        ),
        np.int32(age),
    )

    def again(result: InFlight, args: tuple) -> tuple:
        slots = flight.slots._replace(prefix=result.slots.prefix)
        ring = flight.lanes._replace(k=result.lanes.k, v=result.lanes.v)
        return jax.device_put(InFlight(slots, ring, flight.cursor)), *args[1:]

    # Of an embedding that is not the head as well, a token reads a row.
    read_by_all = dict(params["model"]) | params.get("lm_head", {})
    if not shapes.tie_word_embeddings:
        del read_by_all["embed_tokens"]
    cached, token = age + (sizes.block - 1) / 2, 2 * layers * heads * d * DTYPE.itemsize
    fixed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read_by_all)) + b * p * token
    given = unroll.eval_shape(params) if unrolled else params
    sampling = Sampling(longest, 1.0, 1.0, ())
    return Job(
        decode_block,
        (flight, jax.random.key(0), given, np.zeros(shapes.vocab_size, bool)),
        {
            "policy": policy,
            "sampling": sampling,
            "block": sizes.block,
            "columns": g,
            "parts": 1,
        },
        decoder_flops(shapes, 1, before=p + cached, logits=1).times(b * g * sizes.block),
        again,
        sizes.block,
        {"least": fixed + b * g * cached * token, "asked for": fixed + b * g * places * token},
    )


def make_spec(policy: Policy, remat: str) -> UpdateSpec:
    """Returns the settings of the update."""
    policy = policy.with_compute(remat=remat)
    return UpdateSpec(policy, make_optimizer(2e-6), LOSS, LOGPROBS, KL_COEF)


def plan_of(batch: Batch, samples: Samples, parts: int) -> StepPlan:
    """Returns micro-batches of the largest shape, as many as there are parts."""
    b, _, t = samples.tokens.shape
    shape = Shape(batch.prompt.tokens.shape[1], batch.images.mask.shape[2], t)
    rows = np.split(np.arange(b, dtype=np.int32), parts)
    return StepPlan(t, (tuple(MicroBatch(each, shape, None) for each in rows),))


@partial(jax.jit, static_argnames=("policy", "parts"))
def reference(
    params: dict,
    batch: Batch,
    samples: Samples,
    suppressed: jax.Array,
    *,
    policy: Policy,
    parts: int,
) -> jax.Array:
    """Returns the log-probabilities of responses, all micro-batches in one program."""
    plan = plan_of(batch, samples, parts)
    found = planned_logprobs(params, batch, samples, plan, suppressed, policy=policy, spec=LOGPROBS)
    return found.logprobs


@partial(jax.jit, static_argnames=("spec", "parts"), donate_argnums=0)
def update(
    state: TrainState,
    experience: Experience,
    suppressed: jax.Array,
    *,
    spec: UpdateSpec,
    parts: int,
) -> tuple[TrainState, Metrics]:
    """Takes an optimizer step, all micro-batches in one program."""
    batch, samples = experience.batch, experience.samples
    plan = plan_of(batch, samples, parts)
    weights, (total,) = weigh(weighed(experience, spec.loss), plan.rows(1), loss=spec.loss)
    grads, metrics = no_gradients(state.params, policy=spec.policy), None
    for micro in plan.updates[0]:
        cut = Cut(experience, weights, micro.rows, None)
        grads, found = add_micro_batch(
            grads, state.params, cut, suppressed, Coefficients(), None, spec=spec, shape=micro.shape
        )
        metrics = found if metrics is None else add_metrics(metrics, found)
    return apply_update(state, grads, metrics, total, spec=spec)


def make_job(name: str, policy: Policy, sizes: Sizes, unrolled: bool, remat: str) -> Job:
    """Returns a program by its name; reference and update work on the same prompts."""
    policy = policy.with_compute(dtype=DTYPE)
    if name == "decode":
        return decode(policy, sizes, unrolled)
    b, g, t = sizes.micro * sizes.parts, sizes.responses, sizes.tokens
    b = sizes.slots if name == "prefill" else b
    full, cast = parameters(policy)
    batch, samples = make_batch(policy, sizes, b), make_samples(policy, (b, g, t), t)
    patches = batch.images.mask.sum() // b
    shared = _START + patches // policy.shapes.merge_unit
    shapes = StepShapes(b, g, sizes.prompt + 1, t, patches, shared)
    costs = phase_costs(policy.shapes, shapes, remat=remat == "layers")
    if name == "prefill":
        cost = costs["vision"] + costs["prefill"]
        return Job(prefill, (cast, batch), {"policy": policy}, cost)
    spec = make_spec(policy, remat)
    suppressed = np.zeros(policy.shapes.vocab_size, bool)
    if name == "reference":
        static = {"policy": spec.policy, "parts": sizes.parts}
        return Job(reference, (cast, batch, samples, suppressed), static, costs[name])
    state = jax.eval_shape(lambda x: TrainState.create(x, spec.optimizer), full)
    advantages = np.random.default_rng(2).normal(size=(b, g)).astype(np.float32)
    part = Experience(
        batch, samples, None, None, None, ref_logprobs=samples.logprobs, advantages=advantages
    )
    return Job(
        update,
        (state, part, suppressed),
        {"spec": spec, "parts": sizes.parts},
        costs[name],
        lambda result, args: (result[0], *args[1:]),
    )


def kernels(folder: str) -> list[tuple[float, int, str]]:
    """Returns microseconds, calls and names of the kernels of a trace, the longest first.

    A GPU's are on the lines of its streams; beside them the profiler draws others, of the same
    times by module and operation. A TPU's are on its line of operations. A CPU has none.
    """
    events, lines, found = [], {}, defaultdict(list)
    for path in glob.glob(f"{folder}/plugins/profile/*/*.trace.json.gz"):
        with gzip.open(path, "rt") as file:
            events += json.load(file)["traceEvents"]
    for event in events:
        if event.get("name") in ("process_name", "thread_name"):
            lines[event["pid"], event.get("tid") if event["name"] == "thread_name" else None] = (
                event["args"]["name"]
            )
    ours = {k: x for k, x in lines.items() if lines.get((k[0], None), "").startswith("/device:")}
    streams = {k for k, x in ours.items() if x.startswith("Stream")}
    wanted = streams or {k for k, x in ours.items() if x == "XLA Ops"}
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in wanted:
            source = event.get("args", {}).get("hlo_op", event["name"])
            found[event["name"]].append((event["dur"], source))
    summed = []
    for name, each in found.items():
        sources = sorted({source for _, source in each} - {name})
        told = f" ({', '.join(sources[:2])}{', …' * (len(sources) > 2)})" if sources else ""
        summed.append((sum(spent for spent, _ in each), len(each), f"`{name[:80]}`{told}"))
    return sorted(summed, reverse=True)


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _clock(function: Callable[[], Any], runs: int) -> float:
    """Returns the median seconds of a call that waits for its results, after one to warm up."""
    spent = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        function()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:])


def measure_machine(sizes: Sizes) -> tuple[float, float]:
    """Returns bytes a second, read and written, of a copy, and FLOP/s of a bfloat16 product."""
    copy, product = jax.jit(lambda x: x + 1), jax.jit(lambda a, b: a @ b)

    def chained(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready([call() for _ in range(CHAIN)][-1])

    x = [jnp.zeros(sizes.copy, jnp.float32)]
    moved = CHAIN * 2 * x[0].nbytes / _clock(chained(lambda: copy(x[0])), sizes.runs)
    x.clear()
    a, b = (_random(i, 0.0, 1.0, shape=(sizes.matrix,) * 2, dtype=DTYPE) for i in (0, 1))
    done = CHAIN * 2 * sizes.matrix**3 / _clock(chained(lambda: product(a, b)), sizes.runs)
    return moved, done


def _shares(speed: float, measured: float, nominal: float | None) -> str:
    """Says what 10**12 a second are of the measured rate and of the data sheet's."""
    said = f"{speed / 1e12:.4g} T/s, {speed / measured:.1%} of measured"
    return said + (f", {speed / nominal:.1%} of nominal" if nominal else "")


def measure(name: str, job: Job, machine: tuple[float, float] | None, runs: int) -> None:
    """Compiles and runs a program, and prints its rows; without a machine's rates, once only."""
    started = time.perf_counter()
    program = job.function.lower(*job.args, **job.static).compile()
    _row(name, "compile", f"{time.perf_counter() - started:.1f} s")
    if (sizes := program.memory_analysis()) is not None:
        kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        kept -= sizes.alias_size_in_bytes
        temporary = sizes.temp_size_in_bytes / 1e9
        _row(name, "memory: arrays + temporary", f"{kept / 1e9:.2f} + {temporary:.2f} GB")
    args, spent = fill(job.args), []

    def run() -> None:
        nonlocal args
        started = time.perf_counter()
        result = jax.block_until_ready(program(*args))
        spent.append(time.perf_counter() - started)
        args = jax.block_until_ready(job.again(result, args))

    run()
    _row(name, "first run", f"{spent[0]:.3f} s")
    if machine is None:
        return
    for _ in range(runs):
        run()
    seconds, (bandwidth, rate) = statistics.median(spent[1:]), machine
    spread = f"{min(spent[1:]) * 1e3:.2f} to {max(spent[1:]) * 1e3:.2f}"
    _row(name, "a call, median", f"{seconds * 1e3:.2f} ms ({spread})")
    kind = jax.devices()[0].device_kind
    nominal = next((x for part, x in _NOMINAL.items() if part in kind), None)
    if job.bytes:
        _row(name, "a token of all responses, median", f"{seconds / job.steps * 1e3:.3f} ms")
    for what, size in job.bytes.items():
        shares = _shares(size * job.steps / seconds, bandwidth, nominal)
        _row(name, f"bytes a token, {what}", f"{size / 1e9:.4g} GB: {shares}")
    arithmetic = {"needed": job.cost.flops}
    if job.cost.recomputed and name == "update":
        arithmetic["with what is repeated"] = job.cost.executed
    for what, flops in arithmetic.items():
        shares = _shares(flops / seconds, rate, peak_flops(kind))
        _row(name, f"arithmetic, {what}", f"{flops / 1e12:.4g} TFLOP: {shares}")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        longest = kernels(folder)
    total = sum(each[0] for each in longest)
    said = f"{total / 1e3:.2f} ms of {spent[-1] * 1e3:.2f} ms under the profiler"
    _row(name, "kernels, all", said if longest else "no device events in the trace")
    for kernel, calls, told in longest[:KERNELS]:
        _row(name, f"{told} x {calls}", f"{kernel / 1e3:.2f} ms, {kernel / total:.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures machine and programs; returns 1 if a program failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="3B", choices=("3B", "small"))
    every = ",".join((STEP, *PROGRAMS))
    parser.add_argument("--only", default=every, help="programs, joined by commas")
    parser.add_argument("--unroll", action="store_true", help="decode with the layers apart")
    parser.add_argument("--attention", default="xla", choices=("xla", "cudnn", "splash"))
    parser.add_argument("--remat", default="layers", choices=("layers", "activations", "none"))
    parser.add_argument("--dry", action="store_true", help="compile and run each once only")
    for field in ("slots", "micro", "parts", "runs"):
        parser.add_argument(f"--{field}", type=whole(1), help="see `Sizes`")
    options = parser.parse_args(argv)
    names = options.only.split(",")
    if unknown := set(names) - {STEP, *PROGRAMS}:
        parser.error(f"--only={options.only}: {unknown} must be of {every}")
    failed = False
    if STEP in names:
        # In processes of their own, before this one takes the device's memory.
        names.remove(STEP)
        small = options.size == "small"
        failed = bool(whole_step.main(["--size=small", "--tiny"] if small else []))
    # Three quarters, the default, would not hold what an update of the 3B takes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    policy = find_policy(options.size).with_compute(attention=options.attention)
    sizes = SMALL if options.size == "small" else Sizes()
    given = {field: getattr(options, field) for field in ("slots", "micro", "parts", "runs")}
    sizes = sizes._replace(**{field: value for field, value in given.items() if value})
    device = jax.devices()[0]
    print(f"{date.today()}, {device.device_kind}, jax {jax.__version__}, {options.size}, bfloat16")
    print(f"attention {options.attention}, remat {options.remat}, unroll {options.unroll}")
    print(f"{sizes}\n\n| program | measure | value |\n|---|---|---|", flush=True)
    machine = None
    if not options.dry:
        machine = measure_machine(sizes)
        _row("machine", "copy, read and written", f"{machine[0] / 1e12:.4g} TB/s")
        _row("machine", "bfloat16 product", f"{machine[1] / 1e12:.4g} TFLOP/s")
    for name in names:
        try:
            job = make_job(name, policy, sizes, options.unroll, options.remat)
            measure(name, job, machine, sizes.runs)
        except Exception as error:
            # Of the others there is still something to learn.
            failed = True
            traceback.print_exc()
            _row(name, "failed", str(error).partition("\n")[0][:300])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
