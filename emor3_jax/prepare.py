"""From a config to the objects of a run: policy, data, actors, optimizer."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import account
from emor3_jax.config import EMBEDDED, ConfigError, base_policy, reward_terms, uses_reference
from emor3_jax.data import generic
from emor3_jax.data.batch import Batch
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import label_map, label_set
from emor3_jax.data.pipeline import (
    EvalBatches,
    Parts,
    TrainBatches,
    eval_batches,
    train_batches,
)
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.data.sources import EmoScenesSource, ParquetSource, Source
from emor3_jax.data.views import Joined, Relabelled, Subset, balanced_subset, read_ids
from emor3_jax.embedded.emoscenes import builder, words
from emor3_jax.episode import Actor, Judgement, Replies, Scores, stop_ids
from emor3_jax.learner import LossOptions, ScoreOptions
from emor3_jax.models import Policy, find, load, read_config
from emor3_jax.models.lora import Lora, LoraError, init_adapters
from emor3_jax.models.qwen2_5_vl.processor import Processor
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import (
    check_policy,
    param_shardings,
    places,
    shard_batch,
    shard_rows,
)
from emor3_jax.rl.kl import adapt
from emor3_jax.rl.shaping import overlong
from emor3_jax.rl.update import make_optimizer
from emor3_jax.rollout import packing
from emor3_jax.rollout.engine import Plan
from emor3_jax.rollout.generate import Samples, SamplingRule
from emor3_jax.rollout.packing import Packing


class CompileCounter:
    """Counts the programs that XLA has compiled, or fetched from the cache, in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, _: float, **__: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def start_jax(cache: str) -> CompileCounter:
    """Joins the other processes, sets where compiled programs are kept, starts to count compiles.

    Args:
      cache: folder, made if needed; "" keeps none.

    Raises:
      MeshError: as `hosts.start`.
    """
    hosts.start()
    # The data sets' own notices would drown the progress of the run.
    for name in ("absl", "grain", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not hosts.is_first():
        # All know the same of the data; one says it.
        logging.getLogger("emor3_jax").setLevel(logging.ERROR)
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return CompileCounter()


def keep_config(config: ConfigDict, workdir: Path) -> None:
    """Writes what this run, or its continuation, was started with.

    That is `workdir/config.json` and, for each data set cut to a subset, the ids of its rows in
    `workdir/subsets/<name>.txt`, which `ids` of another run's data set reads.
    """
    if not hosts.is_first():
        return
    text = json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True)
    (workdir / "config.json").write_text(text + "\n")
    for name, (field, dataset) in data_sets(config).items():
        if dataset.subset:
            source, _ = open_source(config, field, dataset)
            path = workdir / "subsets" / f"{name}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{texts.id}\n" for texts in source.texts()))


def load_policy(config: ConfigDict, say: Callable[[str], None], mesh: Mesh) -> Policy:
    """Loads the policy onto the mesh, in float32, with the config's attention and picture sizes.

    Raises:
      ConfigError: if the picture sizes contradict each other, or the attention has no kernel here.
      FileNotFoundError, WeightsError: as `find_policy` and `emor3_jax.models.load`.
      MeshError: if the mesh cannot cut the policy.
    """
    folder = find_policy(config, say)
    check_policy(mesh, read_config(folder))
    policy = load(folder, shardings=lambda shapes: param_shardings(shapes, mesh))
    attention = attention_backend(config, mesh.devices.flat[0].platform)
    return Policy(
        dataclasses.replace(policy.config, attention=attention),
        policy.params,
        _sized(config, policy.processor),
    )


def read_policy(config: ConfigDict, say: Callable[[str], None]) -> Policy:
    """Returns what of the policy reads data, its shapes and processor, without parameters.

    Raises:
      ConfigError: if the picture sizes contradict each other.
      FileNotFoundError: as `find_policy`.
    """
    folder = find_policy(config, say)
    return Policy(read_config(folder), {}, _sized(config, Processor.from_folder(folder)))


def _sized(config: ConfigDict, processor: Processor) -> Processor:
    """Returns a processor with the config's picture sizes."""
    folder = processor.images
    least = config.data.min_pixels or folder.min_pixels
    most = config.data.max_pixels or folder.max_pixels
    if least > most:
        rule = f"is over data.max_pixels={most} (0 takes what the policy's folder says)"
        raise ConfigError("data.min_pixels", least, rule)
    images = dataclasses.replace(folder, min_pixels=least, max_pixels=most)
    return Processor(processor.tokenizer, images)


def attention_backend(config: ConfigDict, platform: str) -> str:
    """Returns the back end of the attention, with "auto" replaced by the platform's own.

    Args:
      config: of the run.
      platform: "cpu", "gpu" or "tpu", of the devices that the program is compiled for.

    Raises:
      ConfigError: if a kernel is asked for that the platform does not have.
    """
    chosen = config.policy.attention
    if chosen == "auto":
        cudnn = "cudnn" if config.policy.dtype == "bfloat16" else "xla"
        return {"tpu": "splash", "gpu": cudnn}.get(platform, "xla")
    home = {"splash": "tpu", "cudnn": "gpu"}.get(chosen, platform)
    if home != platform:
        rule = f"is a kernel of platform {home!r}, this is {platform!r}; use 'auto'"
        raise ConfigError("policy.attention", chosen, rule)
    return chosen


def find_policy(config: ConfigDict, say: Callable[[str], None]) -> Path:
    """Returns the policy's folder; trains the embedded base policy if that is asked for and absent.

    Args:
      config: of the run.
      say: announces stages.

    Raises:
      FileNotFoundError: if `policy.path` is neither a folder nor a policy on the hub.
    """
    path = config.policy.path
    with hosts.first_goes_first():
        if path == EMBEDDED:
            path = config.policy.embedded_folder
            if not (Path(path) / "config.json").is_file():
                if not hosts.is_first():
                    raise FileNotFoundError(
                        f"{path}: another host has made the base policy; give folders that all "
                        "hosts share, as policy.embedded_folder, data.folder and the workdir"
                    )
                say(f"no base policy in {path} yet: training one, about three minutes on 2 cores")
                with hosts.on_own_devices():
                    _train_base_policy(config, Path(path))
        return find(path)


def _train_base_policy(config: ConfigDict, folder: Path) -> None:
    from emor3_jax.embedded.base_policy import train

    base = base_policy()
    base.data.folder, base.data.size = config.data.folder, config.data.scene_size
    base.compile_cache = config.log.compile_cache
    train(base, folder)


class Data(NamedTuple):
    """The data of a run.

    Attributes:
      train: endless batches.
      evaluate: name → batches, in the config's order.
      labels: "train" and each name → label set.
      sources: likewise → rows.
    """

    train: TrainBatches
    evaluate: dict[str, EvalBatches]
    labels: dict[str, tuple[str, ...]]
    sources: dict[str, Source]

    def counters(self) -> dict[str, float]:
        """Returns `data/<reason>`: training rows left out so far, for each reason that occurred."""
        counts = self.train.stats.counts() | {"question_cut": self.train.stats.questions_cut}
        return {f"data/{reason}": float(count) for reason, count in counts.items() if count}

    def image(self, name: str) -> Callable[[str], bytes | None]:
        """Returns a function from a row id of a data set to its encoded image."""

        def find(row_id: str) -> bytes | None:
            source = self.sources[name]
            return source[source.find(row_id)].images[0]

        return find


PARQUET_LABELS = "mikels8"
"""The labels of data that does not say them: EmoSet's, as the release trains on."""


def data_sets(config: ConfigDict) -> dict[str, tuple[str, ConfigDict]]:
    """Returns name → (field, data set) of all data sets of a config, "train" first.

    Those of `data.mix` are named "train.<name>", those of `evaluate.sets` by their own name.
    """
    found = {"train": ("data.train", config.data.train)}
    found |= {f"train.{name}": (f"data.mix.{name}", each) for name, each in config.data.mix.items()}
    sets = config.evaluate.sets
    return found | {name: (f"evaluate.sets.{name}", each) for name, each in sets.items()}


def open_source(
    config: ConfigDict, field: str, dataset: ConfigDict, labels: str = ""
) -> tuple[Source, str]:
    """Opens one data set: its rows in the wanted labels, all of them or a subset.

    Args:
      config: of the run.
      field: where in the config the data set stands.
      dataset: its description.
      labels: the label set to put it in instead of `dataset.labels`.

    Returns:
      The rows and their label set, as `label_set` takes it.

    Raises:
      ConfigError: if its kind is unknown, or its path or subset cannot be used.
      DataError: if it cannot be opened.
    """
    try:
        source, own = _open_kind(config, field, dataset)
        wanted = labels or dataset.labels or own or PARQUET_LABELS
        if own and wanted != own:
            source = Relabelled(source, label_map(own, wanted))
        if dataset.ids:
            source = Subset(source, read_ids(dataset.ids, source))
        if dataset.subset:
            texts, found = list(source.texts()), label_set(wanted)
            source = Subset(source, balanced_subset(texts, found, dataset.subset, config.seed))
    except DataError as error:
        raise DataError(f"config.{field}: {error}") from error
    return source, wanted


def _open_kind(config: ConfigDict, field: str, dataset: ConfigDict) -> tuple[Source, str]:
    """Returns the rows as they are and their own label set, "" where the data does not say it."""
    kind, path, question = dataset.kind, dataset.path, dataset.question
    if kind == "emoscenes":
        built = builder.prepare(config.data.folder, config.data.scene_size)
        source = EmoScenesSource(
            dataset.split,
            built.data_dir,
            question or words.QUESTION,
            responses=config.sft.target == "response",
        )
        return source, "emotion6" if dataset.split.startswith("shifted") else "mikels8"
    if kind == "parquet":
        if not path:
            rule = "name parquet files, a glob, or several joined by commas"
            raise ConfigError(f"{field}.path", path, rule)
        return ParquetSource(path), ""
    if kind == "jsonl":
        return generic.open_json_lines(path, question), ""
    if kind == "folders":
        source = generic.open_folders(path, dataset.split, question)
        return source, ",".join(source.labels)
    if kind == "huggingface":
        source = generic.HuggingFaceSource(path, dataset.split, question)
        return source, ",".join(source.labels)
    # tfds takes a second to import.
    from emor3_jax.data.datasets.catalog import BUILDERS, open_dataset

    if kind not in BUILDERS:
        known = ("emoscenes", "parquet", *BUILDERS, "folders", "jsonl", "huggingface")
        raise ConfigError(f"{field}.kind", kind, f"must be one of {', '.join(known)}")
    source = open_dataset(
        kind, path, dataset.split, config.data.folder, copy=dataset.copy, question=question
    )
    return source, source.labels


def load_templates(config: ConfigDict) -> PromptTemplates:
    """Reads the prompt templates of a config."""
    return PromptTemplates.load(**config.data.templates.to_dict())


def open_data(config: ConfigDict, policy: Policy, mesh: Mesh | None = None) -> Data:
    """Opens the training data and all evaluation sets.

    Args:
      config: of the run.
      policy: its processor and config shape the batches.
      mesh: says which rows of each batch this host reads; None is all.

    Raises:
      ConfigError, DataError: naming the field or file, the value and the way out.
    """
    template = load_templates(config).set
    shapes = {
        "prompt_lengths": tuple(config.data.prompt_lengths),
        "image_windows": tuple(config.data.image_windows),
        "workers": config.data.workers,
        "cut_questions": config.data.long_prompts == "cut",
        "read_ahead": config.data.read_ahead,
    }
    sources, named = {}, {}
    # What is built is there for the other hosts.
    with hosts.first_goes_first():
        for name, (field, dataset) in data_sets(config).items():
            # What is mixed in answers in the labels of `data.train`.
            labels = named["train"] if name.startswith("train.") else ""
            sources[name], named[name] = open_source(config, field, dataset, labels)
    parts = _mix(config, sources)
    labels = {name: label_set(named[name]) for name in sources}

    def rows(name: str) -> tuple:
        return sources[name], policy.config, policy.processor, template, labels[name]

    def own(size: int) -> dict[str, np.ndarray | None]:
        return {"places": None if mesh is None else places(mesh, size)}

    return Data(
        train_batches(
            *rows("train"),
            **own(config.rollout.prompts),
            batch_size=config.rollout.prompts,
            seed=config.seed,
            graded=config.data.train.graded,
            parts=parts,
            sort_by_size=config.data.sort_by_size,
            **shapes,
        ),
        {
            name: eval_batches(
                *rows(name),
                **own(config.evaluate.prompts),
                batch_size=config.evaluate.prompts,
                limit=config.evaluate.sets[name].limit,
                graded=config.evaluate.sets[name].graded,
                **shapes,
            )
            for name in config.evaluate.sets
        },
        labels,
        sources,
    )


def _mix(config: ConfigDict, sources: dict[str, Source]) -> Parts:
    """Joins the training sets into `sources["train"]`; returns how they take turns."""
    described = {"train": config.data.train, **config.data.mix}
    parts = {"train": sources["train"]}
    parts |= {name: sources.pop(f"train.{name}") for name in config.data.mix}
    if len(parts) > 1:
        sources["train"] = Joined(parts)
    starts = np.cumsum([0, *map(len, parts.values())])
    weights = [dataset.weight for dataset in described.values()]
    return Parts(starts, weights, [dataset.balance == "class" for dataset in described.values()])


def make_actor(
    config: ConfigDict, policy: Policy, labels: tuple[str, ...], *, training: bool = False
) -> Actor:
    """Returns the actor for a label set.

    Args:
      config: of the run.
      policy: its config and tokenizer.
      labels: the label set.
      training: whether it answers to learn; evaluation may reflect where training does not.
    """
    asks = config.reflect.enabled or (config.evaluate.reflect and not training)
    rule = SamplingRule(
        config.reflect.max_tokens,
        config.reflect.temperature,
        config.reflect.top_p,
        stop_ids(policy.processor.tokenizer),
    )
    return Actor(
        policy.config,
        policy.processor.tokenizer,
        labels,
        load_templates(config),
        profile=config.profile,
        coherence_target=config.reward.coherence_target,
        lambda_reflect=config.reward.lambda_reflect,
        lambda_format=config.reward.lambda_format,
        reflect_rule=rule if asks else None,
        text_lengths=tuple(config.reflect.text_lengths),
        dtype=jnp.dtype(config.policy.dtype),
        soft=config.reflect.soft,
        terms=reward_terms(config),
        format=config.reward.format,
        reflection=config.reward.reflection,
        table_cache=config.reward.table_cache,
    )


def place_batch(batch: Batch, mesh: Mesh, config: ConfigDict) -> Batch:
    """Puts a batch on the devices, its pictures in the type of the arithmetic.

    The first product of the vision tower rounds them so; before it, they take half the memory.

    Args:
      batch: host arrays.
      mesh: the mesh.
      config: of the run.
    """
    placed, dtype = shard_batch(batch, mesh), jnp.dtype(config.policy.dtype)
    if placed.images.patches.dtype == dtype:
        return placed
    patches = _round(placed.images.patches, dtype)
    return placed._replace(images=placed.images._replace(patches=patches))


@partial(jax.jit, static_argnames="dtype")
def _round(patches: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return shard_rows(0, patches.astype(dtype))


def rollout_rule(config: ConfigDict, policy: Policy) -> SamplingRule:
    """Returns how training samples responses."""
    stop = stop_ids(policy.processor.tokenizer)
    return SamplingRule(
        config.rollout.max_tokens, config.rollout.temperature, config.rollout.top_p, stop
    )


def rollout_plan(config: ConfigDict) -> Plan:
    """Returns how much of a training step's rollout is in flight at once."""
    c = config.rollout
    return Plan(c.slots, c.refill, c.block, c.halvings, c.unroll)


def group_std(config: ConfigDict) -> str:
    """Returns which standard deviation of a group the profile divides by."""
    return "sample" if config.profile == "release" else "population"


def evaluation_plan(config: ConfigDict) -> Plan:
    """Returns the same for evaluation: a batch of it is in flight all at once."""
    c = config.rollout
    return Plan(block=c.block, halvings=c.halvings, unroll=c.unroll)


def plan_packing(
    config: ConfigDict, policy: Policy, lengths: np.ndarray, scored: Samples
) -> Packing | None:
    """Returns how a step's responses share rows, or None if each has one of its own.

    Args:
      config: of the run.
      policy: kernels of its attention know nothing of responses within a row.
      lengths: int[B, G].
      scored: the responses, trimmed to T.
    """
    c = config.policy_update
    if not c.pack or policy.config.attention != "xla":
        return None
    return packing.plan(lengths, scored.tokens.shape[-1], c.response_lengths)


def evaluation_rule(config: ConfigDict, policy: Policy) -> SamplingRule:
    """Returns how evaluation samples responses."""
    return rollout_rule(config, policy)._replace(
        temperature=config.evaluate.temperature, top_p=config.evaluate.top_p
    )


def make_update(config: ConfigDict) -> tuple[optax.GradientTransformation, LossOptions]:
    """Returns the optimizer and the loss of `config.policy_update`."""
    c = config.policy_update
    updates = max(config.steps * (config.rollout.prompts // c.prompts), 1)
    final = c.learning_rate if c.schedule == "constant" else 0.0
    rate = optax.linear_schedule(c.learning_rate, final, max(updates - c.warmup_steps, 1))
    if c.warmup_steps:
        rise = optax.linear_schedule(
            c.learning_rate / c.warmup_steps, c.learning_rate, c.warmup_steps
        )
        rate = optax.join_schedules([rise, rate], [c.warmup_steps])

    def in_vision_tower(path: tuple) -> bool:
        return getattr(path[0], "key", None) == "visual"

    factors = c.rates.to_dict()

    def rate_of(path: tuple) -> float:
        return factors[_group(path)]

    optimizer = make_optimizer(
        rate,
        weight_decay=c.weight_decay,
        max_grad_norm=c.max_grad_norm,
        frozen=in_vision_tower if config.policy.freeze_vision_tower else None,
        rate_of=None if set(factors.values()) == {1.0} else rate_of,
    )
    return optimizer, LossOptions(
        c.clip_low,
        c.clip_high,
        c.clip_dual,
        c.kl_coef,
        c.mean,
        c.entropy,
        c.ratio,
        # In the reward it needs no estimate in the loss; the name would only compile anew.
        "k3" if c.kl == "off" else c.kl,
        config.rollout.max_tokens if c.mean == "constant" else None,
        c.mask_truncated,
    )


def _group(path: tuple) -> str:
    """Returns which of `policy_update.rates` a parameter belongs to."""
    keys = [getattr(part, "key", None) for part in path]
    if keys[0] == "visual":
        return "merger" if keys[1] == "merger" else "tower"
    return "embedding" if "embed_tokens" in keys or keys[0] == "lm_head" else "decoder"


def make_lora(config: ConfigDict, params: dict) -> Lora | None:
    """Returns the base of adapters, or None where the weights themselves are trained."""
    rank = config.policy.lora_rank
    return Lora(params, jnp.float32(config.policy.lora_alpha / rank)) if rank else None


def trained_params(config: ConfigDict, params: dict) -> dict:
    """Returns what training changes: adapters of the config's modules, or the parameters.

    Args:
      config: of the run.
      params: of the policy, or their shapes; returned as they are without adapters.

    Raises:
      ConfigError: if a module does not exist.
    """
    if not config.policy.lora_rank:
        return params
    modules, key = config.policy.lora_modules, jax.random.key(config.seed)
    try:
        return init_adapters(params, modules, config.policy.lora_rank, key)
    except LoraError as error:
        raise ConfigError("policy.lora_modules", modules, str(error)) from error


def check_hosts(config: ConfigDict) -> None:
    """Checks that nothing is asked for that works on one host alone.

    Raises:
      ConfigError: with several hosts, which do not hold each other's rows.
    """
    if jax.process_count() == 1:
        return
    for section, key in (("rollout", "resample"), ("reference", "image_cache")):
        if value := config[section][key]:
            raise ConfigError(f"{section}.{key}", value, "works on one host alone; set it to 0")


def make_shaping(config: ConfigDict) -> Callable[[Scores, Samples], jax.Array]:
    """Returns a function from scores and responses to the rewards that advantages compare."""
    buffer, weight = config.reward.overlong, config.reward.overlong_weight
    if not buffer or not weight:
        return lambda scores, samples: scores.overall
    limit = config.rollout.max_tokens

    def shaped(scores: Scores, samples: Samples) -> jax.Array:
        return scores.overall + weight * overlong(samples.lengths, limit=limit, buffer=buffer)

    return jax.jit(shaped)


def make_kl_control(config: ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Returns a function from coefficient and KL of a step to the coefficient of the next.

    None where the coefficient is fixed.
    """
    c = config.policy_update
    if not c.kl_target:
        return None
    responses = config.rollout.prompts * config.rollout.responses
    return jax.jit(partial(adapt, target=c.kl_target, responses=responses, horizon=c.kl_horizon))


def make_meter(
    config: ConfigDict, policy: Policy, actor: Actor
) -> Callable[[Batch, np.ndarray, Replies | Judgement | None], float]:
    """Returns a function from what a step did to the FLOPs that the model needs for it.

    It takes this host's prompts as host arrays, and of all hosts the lengths of the responses
    int[B, G] and the replies.
    """
    parts = actor.coherence_parts, actor.consistency_parts

    def questions(replies: Replies | Judgement) -> Iterator[account.Question]:
        texts = replies.coherence_length, replies.consistency_length
        soft = isinstance(replies, Judgement)
        said = actor.candidates if soft else (replies.coherence, replies.consistency)
        for (head, tail), text, reply in zip(parts, texts, said, strict=True):
            yield account.Question(
                len(head),
                float(np.mean(text)),
                len(tail),
                float(np.mean(reply.lengths)),
                len(reply.lengths) if soft else 1,
            )

    def flops(batch: Batch, lengths: np.ndarray, replies: Replies | Judgement | None) -> float:
        asked = () if replies is None else questions(replies)
        shapes = account.shapes_of(batch, lengths, *asked)
        # Hosts hold as many rows each, so the mean over all rows is that of their means.
        names = "prompt_tokens", "patches", "shared_tokens"
        means = hosts.exchange([getattr(shapes, name) for name in names])
        shapes = shapes._replace(**dict(zip(names, np.mean(means, axis=0), strict=True)))
        recompute = config.policy_update.old_logprobs == "recompute"
        return account.step_flops(
            policy.config,
            shapes,
            reference=uses_reference(config),
            # As in all epochs but the first.
            kept=config.reference.image_cache > 0,
            old=recompute,
        )

    return flops


def score_options(config: ConfigDict) -> ScoreOptions:
    """Returns how reference and update score responses."""
    return ScoreOptions(
        config.rollout.temperature,
        jnp.dtype(config.policy.dtype),
        config.policy_update.remat,
        config.policy_update.logprob_chunk,
    )
