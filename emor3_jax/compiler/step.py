"""The programs of one training step, in its order, on arrays that have shapes and layouts alone.

These are the jitted functions that `train` runs, not copies: what is compiled here is what runs.
Every padded size is the largest that the config allows, so no step of a run needs more.

Assumptions, numbered:
 1. The tokenizer is not read. Where the policy's folder is absent, the texts around pictures and
    judged texts are as long as Qwen2.5-VL's are on the built-in templates, and the reward tables
    are as large as those of a vocabulary of 151,936 ids, 23 MB.
 2. Terms of one's own among the rewards are left out.
 3. Evaluation is left out: it takes the same programs for `evaluate.prompts` at once.
 4. All parameters are trained: with adapters (`policy.lora_rank`) a step needs less. ReMax's greedy
    responses and the further rounds of `rollout.resample` take the same programs again.
 5. Decoding loops over the layers, whatever `rollout.unroll` says.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from emor3_jax import episode, learner, prepare
from emor3_jax.compiler.record import Recorder
from emor3_jax.config import uses_reference
from emor3_jax.data import batch as batches
from emor3_jax.data.labels import label_set
from emor3_jax.models.cache import KV
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.shapes import Config
from emor3_jax.parallel import mesh as meshes
from emor3_jax.parallel.mesh import param_shardings
from emor3_jax.rewards import Tables
from emor3_jax.rewards.automaton import Automaton
from emor3_jax.rewards.spans import SpanTables
from emor3_jax.rl import advantages
from emor3_jax.rl.update import TrainState
from emor3_jax.rollout import engine
from emor3_jax.rollout.generate import SamplingRule
from emor3_jax.rollout.likelihood import Candidates
from emor3_jax.types import Batch, Images, Prompt, Samples

_STOP = (151645, 151643)
"""Ids that end a response; their values are nothing to the compiler."""


Around = tuple[int, int]
"""Tokens of a question before and behind the judged text."""


def compile_step(
    record: Recorder, config: ConfigDict, policy: Config, texts: tuple[Around, Around]
) -> None:
    """Compiles every program of a step.

    Args:
      record: compiles them, and keeps the reports.
      config: of the run.
      policy: its shapes, with the attention of the platform.
      texts: around the judged text, of the coherence and the consistency question.
    """
    dtype = jnp.dtype(config.policy.dtype)
    merge = policy.vision.merge_unit
    update_options = config.policy_update
    optimizer, loss = prepare.make_update(config)
    state = abstract_state(record.mesh, policy, optimizer)
    batch = abstract_batch(record, config, policy)
    tables = record.whole(abstract_tables(policy.vocab_size))
    banned = record.whole(jax.ShapeDtypeStruct((policy.vocab_size,), bool))
    key = record.whole(jax.eval_shape(partial(jax.random.key, 0)))
    b = config.rollout.prompts
    always = {"optimizer": state.opt_state, "data": [batch, tables]}

    # The reference, once a run; it replaces the float32 parameters that were loaded.
    reference = state.params
    if uses_reference(config):
        reference = record(
            "reference weights",
            model.cast_matrices,
            state.params,
            dtype,
            alive={"parameters": state.params},
            rows=partial(_as_params, record.mesh),
        )
    kept = [state.params, reference if uses_reference(config) else []]

    decoding = record(
        "hand-over",
        model.lay_out_for_decoding,
        state.params,
        dtype,
        alive={**always, "parameters": kept},
        rows=partial(_as_params, record.mesh, gathered=True),
    )
    always = {**always, "parameters": [*kept, decoding]}
    samples, replies = _compile_rollout(
        record, config, policy, texts, batch, tables, banned, key, decoding, always
    )

    always = {**always, "parameters": kept, "data": [batch, tables, samples, replies]}
    scores = record(
        "reward",
        episode._score,
        tables,
        batch.answers,
        batch.grades,
        samples,
        replies,
        {},
        alive=always,
        rows=record.by_rows,
        **episode.score_options(
            config.profile,
            config.reward.coherence_target,
            config.reward.lambda_reflect,
            config.reward.lambda_format,
        ),
    )
    advantage = record(
        "advantage",
        jax.jit(partial(advantages.grpo, std=prepare.group_std(config))),
        scores.overall,
        alive=always,
        rows=record.by_rows,
    )

    # At the longest responses, of which no two share a row.
    scoring = prepare.score_options(config)
    parts, micro = (
        b // update_options.prompts,
        update_options.prompts // update_options.micro_prompts,
    )
    size = {"config": policy, "options": scoring}
    ref_logprobs = None
    for name, params in (("reference", reference), ("old", state.params)):
        if name == "reference" and not uses_reference(config):
            continue
        if name == "old" and update_options.old_logprobs != "recompute":
            continue
        logprobs = record(
            name,
            learner.response_logprobs,
            params,
            batch,
            samples,
            None,
            banned,
            alive=always,
            rows=record.by_rows,
            count=parts * micro,
            **size,
        )
        ref_logprobs = logprobs if name == "reference" else ref_logprobs
    cut = [batch]
    if parts > 1:
        part = record(
            "take part",
            batches._take_part,
            batch,
            np.int32(0),
            # The last one is cut while the others are there.
            alive={**always, "data": [always["data"], *_others(batch, parts - 1, parts)]},
            rows=record.by_rows,
            calls=parts,
            parts=parts,
            merge=merge,
        )
        cut = [part, *_others(batch, parts - 1, parts)]
    of_part = [samples, advantage, ref_logprobs]
    if parts > 1:
        of_part = record.by_rows(_first_rows(of_part, update_options.prompts))
    record(
        "update",
        learner.update,
        state,
        cut[0],
        of_part[0],
        None,
        *of_part[1:],
        banned,
        alive={**always, "data": [cut, tables, samples, replies, of_part]},
        calls=parts,
        optimizer=optimizer,
        loss=loss,
        count=micro,
        **size,
    )


def _compile_rollout(
    record: Recorder,
    config: ConfigDict,
    policy: Config,
    texts: tuple[Around, Around],
    batch: Batch,
    tables: Tables,
    banned: Any,
    key: Any,
    params: Any,
    always: dict[str, Any],
) -> tuple[Any, Any]:
    """The part of `Actor.run`, from prompts to responses and what was said of them."""
    dtype, merge = jnp.dtype(config.policy.dtype), policy.vision.merge_unit
    b, g, t = config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens
    plan = prepare.rollout_plan(config)
    size = min(plan.slots or b, b)
    refill = min(plan.refill or size, size)
    waves, block = b // refill, min(plan.block, t)
    rule = SamplingRule(t, config.rollout.temperature, config.rollout.top_p, _STOP)
    picked = np.zeros(refill, np.int32)

    def slots_like(x: Any) -> Any:
        return engine._map_rows(lambda axis, leaf: record.by_rows(leaf, axis), x)._replace(
            cursor=record.whole(x.cursor)
        )

    def with_data(*trees: Any) -> dict[str, Any]:
        return {**always, "data": [always["data"], *trees]}

    # What is in flight, at its largest: shapes first, since prompts come in beside it.
    slots = _full_slots(
        record, policy, b=size, g=g, t=t, p=batch.prompt.tokens.shape[1], dtype=dtype
    )
    part = batch
    if refill < b:
        part = record(
            "take wave",
            batches._take_part,
            batch,
            np.int32(0),
            alive={**always, "cache": slots},
            rows=record.by_rows,
            calls=waves,
            parts=waves,
            merge=merge,
        )
    in_flight = slots if refill < size else None
    prefix = record(
        "prefill",
        episode._prefill,
        params,
        part,
        alive={**with_data(part), "cache": in_flight},
        rows=lambda x: _prefix_rows(record, x),
        calls=waves,
        config=policy,
        dtype=dtype,
    )
    opening = engine.Opening(
        record.by_rows(jax.ShapeDtypeStruct((refill,), jnp.int32)),
        part.last_token,
        part.next_position,
        prefix,
    )
    new = record(
        "begin",
        engine._begin,
        opening,
        alive={**with_data(part), "cache": [in_flight, prefix]},
        rows=slots_like,
        calls=waves,
        responses=g,
        length=t,
    )
    record(
        "open slots",
        engine._widen,
        new,
        size,
        block,
        alive={**with_data(part), "cache": new},
        rows=slots_like,
        calls=1 if refill < size else waves,
    )
    sizes = engine._ring_sizes(block, t)
    if len(sizes) > 1:
        small = _full_slots(
            record,
            policy,
            b=size,
            g=g,
            t=t,
            p=batch.prompt.tokens.shape[1],
            dtype=dtype,
            places=sizes[-2],
        )
        record(
            "grow cache",
            engine._resize_jitted,
            small.cache,
            small.cursor,
            alive={**always, "cache": [small.cache, small.prefix]},
            places=sizes[-1],
        )
    if refill < size:
        slots = record(
            "fill slots",
            engine._insert,
            slots,
            new,
            picked,
            alive={**with_data(part), "cache": [slots, new]},
            rows=slots_like,
            calls=waves,
        )
    slots = record(
        "decode",
        engine._decode,
        slots,
        key,
        np.int32(0),
        params,
        banned,
        alive={**always, "cache": slots},
        rows=slots_like,
        calls=-(-b // size) * -(-t // block),
        config=policy,
        rule=rule,
        block=block,
        dtype=dtype,
    )
    prefix, samples = slots.prefix, slots.samples
    if refill < size:
        prefix, samples = record(
            "take out",
            engine._gather,
            slots,
            picked,
            alive={**always, "cache": slots},
            rows=lambda x: (_prefix_rows(record, x[0]), record.by_rows(x[1])),
            calls=waves,
        )
    replies = _compile_reflections(
        record, config, policy, texts, part, tables, banned, key, params,
        prefix, samples, {**with_data(samples), "cache": [slots, prefix]}, waves,
    )  # fmt: skip
    if refill == b:
        return samples, replies
    whole = record.by_rows(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), (samples, replies))
    )
    return whole


def _compile_reflections(
    record: Recorder,
    config: ConfigDict,
    policy: Config,
    texts: tuple[Around, Around],
    part: Batch,
    tables: Tables,
    banned: Any,
    key: Any,
    params: Any,
    prefix: KV,
    samples: Samples,
    alive: dict[str, Any],
    waves: int,
) -> Any:
    """The part of `Actor.reflect`: both questions about each response, at the longest texts."""
    if not config.reflect.enabled:
        return None
    rule = SamplingRule(
        config.reflect.max_tokens, config.reflect.temperature, config.reflect.top_p, _STOP
    )
    spans = record(
        "spans", episode._spans, tables, samples, alive=alive, rows=record.by_rows, calls=waves
    )
    sizes = (*config.reflect.text_lengths, config.rollout.max_tokens)
    longest = episode.bucket(config.rollout.max_tokens, sizes)
    text = jax.ShapeDtypeStruct((*samples.lengths.shape, longest), jnp.int32)
    coherence, consistency = ((record.by_rows(text), span.lengths) for span in spans)
    rows = record.by_rows(jax.ShapeDtypeStruct(samples.lengths.shape[:1], jnp.int32))
    options = {"banned": banned, "dtype": jnp.dtype(config.policy.dtype)}
    parts = [tuple(np.zeros(n, np.int32) for n in each) for each in texts]
    of_image = prefix, part.shared_length, part.shared_position
    found = [span.found for span in spans], [span.lengths for span in spans]
    compiled = {
        "alive": alive,
        "rows": record.by_rows,
        "calls": waves,
    }
    if config.reflect.soft:
        labels = len(label_set(config.data.train.labels))
        candidates = [_candidates(2 * labels, labels), _candidates(4, 2)]
        said = (
            record(
                "coherence", episode._judge_coherence, policy, params, *parts[0], *coherence,
                candidates[0], meanings=labels, **compiled, **options,
            ),
            record(
                "consistency", episode._judge_consistency, policy, params, *of_image, *parts[1],
                *consistency, candidates[1], **compiled, **options,
            ),
        )  # fmt: skip
        return episode.ReplyProbs(*said, *found[0], *found[1])
    said = (
        record(
            "coherence", episode._ask_coherence, policy, params, *parts[0], *coherence,
            key, rows, rule, **compiled, **options,
        ),
        record(
            "consistency", episode._ask_consistency, policy, params, *of_image, *parts[1],
            *consistency, key, rows, rule, **compiled, **options,
        ),
    )  # fmt: skip
    return episode.Replies(*said, *found[0], *found[1])


def _first_rows(tree: Any, rows: int) -> Any:
    """Returns the shapes of some rows of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), tree)


def _others(batch: Batch, count: int, parts: int) -> list[Batch]:
    """Returns `count` parts of a batch beside the one that is worked on."""

    def part(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (x.shape[0] // parts, *x.shape[1:]), x.dtype, sharding=x.sharding
        )

    return [jax.tree.map(part, batch) for _ in range(count)]


def abstract_state(mesh: Mesh, policy: Config, optimizer: Any) -> TrainState:
    """Returns the train state of a policy, cut as `parallel.mesh.RULES` say."""

    def create() -> TrainState:
        return TrainState.create(model.init_params(policy, jax.random.key(0)), optimizer)

    return _as_params(mesh, jax.eval_shape(create))


def abstract_batch(record: Recorder, config: ConfigDict, policy: Config) -> Batch:
    """Returns a step's prompts in the largest buckets of the config."""
    b, p, w = config.rollout.prompts, config.data.prompt_lengths[-1], config.data.image_windows[-1]
    v = policy.vision
    labels = len(label_set(config.data.train.labels or prepare.PARQUET_LABELS))

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return record.by_rows(jax.ShapeDtypeStruct((b, *shape), dtype))

    return Batch(
        prompt=Prompt(array(p), array(p, 3), array(p, dtype=bool), array(p)),
        last_token=array(),
        next_position=array(),
        images=Images(
            array(w, v.window_patches, v.patch_dim, dtype=jnp.dtype(config.policy.dtype)),
            array(w, v.window_patches, 2),
            array(w, v.window_patches, dtype=bool),
        ),
        shared_length=array(),
        shared_position=array(),
        answers=array(),
        grades=array(labels, dtype=jnp.float32),
        weight=array(dtype=jnp.float32),
    )


def abstract_tables(vocabulary: int) -> Tables:
    """Returns reward tables in the sizes that a vocabulary of Qwen's size gives."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def automaton(classes: int, *states: int) -> Automaton:
        return Automaton(
            tuple(array(n, classes) for n in states),
            array(vocabulary + 1),
            tuple(array(n) for n in states),
        )

    one = array(60, 145)
    spans = SpanTables(
        *(one, array(60, 145), array(60, 145), array(2), array(60), array(2)),
        *(array(vocabulary + 1), array(vocabulary + 1), array(vocabulary // 2, 31)),
    )
    return Tables(automaton(169, 167, 181), automaton(101, 60), automaton(20, 8), spans)


def _as_params(mesh: Mesh, tree: Any, gathered: bool = False) -> Any:
    """Returns abstract parameters or optimizer state, cut as the rules say."""
    shardings = param_shardings(tree, mesh, gathered=gathered)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _full_slots(
    record: Recorder,
    policy: Config,
    *,
    b: int,
    g: int,
    t: int,
    p: int,
    dtype: Any,
    places: int | None = None,
) -> engine.Slots:
    """Returns slots that are all taken, with a cache of `places`, by default of all T."""
    layers, heads, d = policy.num_layers, policy.num_kv_heads, policy.head_dim
    prefix = model.KV(
        jax.ShapeDtypeStruct((layers, b, heads, d, p), dtype),
        jax.ShapeDtypeStruct((layers, b, heads, p, d), dtype),
        jax.ShapeDtypeStruct((b, p), bool),
    )
    row = jax.ShapeDtypeStruct((b,), jnp.int32)
    opening = engine.Opening(row, row, row, prefix)
    new = engine._begin.eval_shape(opening, responses=g, length=t)
    slots = engine._widen.eval_shape(new, b, places or t)
    laid = engine._map_rows(
        lambda axis, x: _rows_and_heads(record, x, axis, heads), slots._replace(cursor=None)
    )
    return laid._replace(cursor=record.whole(slots.cursor))


def _prefix_rows(record: Recorder, prefix: model.KV) -> model.KV:
    heads = prefix.v.shape[2]
    return model.KV(
        *(
            _rows_and_heads(record, x, axis, heads)
            for x, axis in zip(prefix, (1, 1, 0), strict=True)
        )
    )


def _rows_and_heads(record: Recorder, x: Any, axis: int, heads: int) -> Any:
    """Cuts prompts over `data` and `fsdp`, and the heads of keys and values over `tensor`."""
    cut = meshes.head_axis(record.mesh, heads)
    axis %= x.ndim
    spec = [None] * x.ndim
    spec[axis] = meshes.BATCH[0]
    if axis == 1:
        spec[x.ndim - 3] = cut
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(record.mesh, P(*spec)))


def _candidates(n: int, meanings: int) -> Candidates:
    length = 4
    return Candidates(
        np.zeros((n, length), np.int32),
        np.full(n, length, np.int32),
        np.arange(n, dtype=np.int32) % meanings,
    )
