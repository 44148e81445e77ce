"""Trains the tiny base policy from scratch: a stand-in for a pretrained vision-language model.

    python -m emor3_jax.embedded.base_policy --config=configs/base_policy.py --workdir=DIR

The one of the package (`emor3_jax/embedded/policy`) was made by this program, in bfloat16:

    python -m emor3_jax.embedded.base_policy --config=configs/base_policy.py --workdir=DIR \\
        --config.dtype=bfloat16

On 2 cores it takes some minutes and leaves a Hugging Face folder that describes images,
answers yes or no to a description, names the emotion of a text, and gives mediocre SET responses
(`embedded.emoscenes.tasks`, `embedded.faces.tasks`). It needs no download. Where seeing is the hard
part, as with real faces, vision pretraining comes first (`embedded.faces.vision_pretraining`).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from emor3_jax import config as configs
from emor3_jax.config import ConfigError, check_complete, check_numbers
from emor3_jax.embedded import pretrain
from emor3_jax.embedded.dataset import PretrainDataset
from emor3_jax.embedded.emoscenes.dataset import drawn_scenes
from emor3_jax.embedded.faces.captions import CaptionLoader, caption_targets
from emor3_jax.embedded.faces.dataset import labelled_faces
from emor3_jax.embedded.faces.images import read_images
from emor3_jax.embedded.faces.vision_pretraining import evaluate_captions, pretrain_vision
from emor3_jax.embedded.loader import ExampleLoader, QABatch
from emor3_jax.embedded.tokenizer import SMALLEST_VOCABULARY, special_ids, train_tokenizer
from emor3_jax.io.console import Console
from emor3_jax.models import FAMILIES, LoadedPolicy, Policy, load, parse_config, save
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.models.shapes import SmallSizes
from emor3_jax.rl.update import TrainState, apply_gradients, make_optimizer
from emor3_jax.runtime import cli

DATASETS: dict[str, Callable[[ConfigDict], PretrainDataset]] = {
    "emoscenes": drawn_scenes,
    "faces": labelled_faces,
}
"""`data.kind` → the dataset of a config."""

Sizes = tuple[pretrain.Size, pretrain.Size, pretrain.Size]


def small_policy(config: ConfigDict, tokenizer: Any) -> Policy:
    """Returns a small policy of the config's family.

    Args:
      config: see `emor3_jax.config.base_policy`.
      tokenizer: of the policy.
    """
    c = config.model
    sizes = SmallSizes(
        vocab_size=len(tokenizer),
        width=c.width,
        layers=c.layers,
        heads=c.heads,
        kv_heads=c.kv_heads,
        vision_width=c.vision_width,
        vision_layers=c.vision_layers,
        vision_heads=c.vision_heads,
        patch=c.patch,
        window=c.window,
        image=config.data.size,
    )
    return parse_config(FAMILIES[c.family].small_config(sizes) | special_ids(tokenizer))


@partial(jax.jit, static_argnames=("policy", "sizes", "optimizer"), donate_argnames="state")
def train_step(
    state: TrainState,
    prefixes: pretrain.Prefixes,
    batch: QABatch,
    *,
    policy: Policy,
    sizes: Sizes,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one optimizer step; returns the new state and `loss`, `exact`, `grad_norm`."""

    def loss_fn(params: dict) -> tuple[jax.Array, dict[str, Any]]:
        return _loss(policy, sizes, params, prefixes, batch)

    (value, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, applied = apply_gradients(state, grads, optimizer)
    return state, {"loss": value, **metrics, **applied}


@partial(jax.jit, static_argnames=("policy", "sizes"))
def exact_replies(
    params: dict, prefixes: pretrain.Prefixes, batch: QABatch, *, policy: Policy, sizes: Sizes
) -> list[jax.Array]:
    """Returns the share of exactly right replies of each kind, as in `pretrain.loss`."""
    return _loss(policy, sizes, params, prefixes, batch)[1]["exact"]


def _loss(
    policy: Policy, sizes: Sizes, params: dict, prefixes: pretrain.Prefixes, batch: QABatch
) -> tuple[jax.Array, dict[str, Any]]:
    about_images = ((batch.responses, sizes[0]), (batch.questions, sizes[1]))
    about_text = (batch.texts, sizes[2])
    return pretrain.loss(
        policy, params, prefixes, batch.images, about_images, about_text, batch.labels
    )


def train(config: ConfigDict, folder: str | Path) -> dict[str, float]:
    """Trains a base policy and saves it.

    Args:
      config: see `emor3_jax.config.base_policy`.
      folder: the Hugging Face folder to write; `looked` in it is the policy between the two stages,
        which a run that was stopped continues from.

    Returns:
      Shares of held-out replies that are exactly right: describe, consistency, coherence; and, with
      vision pretraining, shares of held-out images right after it: `look`, the label is predicted,
      and `begin`, the first token of the description is predicted.

    Raises:
      ConfigError: if a field cannot be used.
    """
    folder = Path(folder)
    say = Console("base policy")
    _check(config)
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compile_cache).absolute()))
    say("preparing the data and the tokenizer")
    dataset = DATASETS[config.data.kind](config)
    count, kept = len(dataset.images), dataset.held_out
    if count - kept < config.batch:
        rule = (
            f"leaves {max(count - kept, 0)} images to learn from, under batch={config.batch}: of "
            f"{count} the last {kept} are held out"
        )
        raise ConfigError("data.limit", config.data.limit, rule)
    # The policy between the two stages, which a run that was stopped continues from.
    pretrained = folder / "looked" if config.look.steps else None
    before = load(pretrained) if pretrained and (pretrained / "config.json").exists() else None
    if before:
        say(f"continuing from {pretrained}; delete it to repeat vision pretraining")
        tokenizer = before.processor.tokenizer
    else:
        tokenizer = train_tokenizer(dataset.corpus, config.model.vocab_size)
    pixels = config.data.size**2
    settings = ImageSettings(pixels, pixels, patch_size=config.model.patch)
    policy = small_policy(config, tokenizer)
    if before and before.policy != policy:
        raise ConfigError(
            "model", config.model.to_dict(), f"is not the shape of {pretrained}; delete that folder"
        )
    processor = Processor(tokenizer, settings, policy.layout)
    targets = caption_targets(dataset, tokenizer) if pretrained else None
    images = read_images(dataset.images, processor)
    labels = None if targets is None else targets[:, 0]
    loader = ExampleLoader(dataset, processor, policy, images, labels, config.data.warp)
    params = policy.init(jax.random.key(config.seed))
    count = sum(x.size for x in jax.tree.leaves(params))
    say(f"{count / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {len(dataset.images)} images")

    scores = {}
    if pretrained:
        captions = CaptionLoader(loader, targets, config.look.erase)
        if before:
            params = before.params
        else:
            params = pretrain_vision(config, captions, params, say)
            save(LoadedPolicy(policy, params, processor), pretrained)
        scores["look"], scores["begin"] = evaluate_captions(config, captions, params)
        say(f"held-out labels right: {scores['look']:.3f}, first words: {scores['begin']:.3f}")
    params, found = pretrain_qa(config, loader, params, say)
    scores |= found
    say("held-out replies exactly right: " + "  ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    stored = jax.tree.map(lambda x: x.astype(config.dtype), params)
    save(LoadedPolicy(policy, stored, processor), folder)
    if dataset.settings is not None:
        dataset.settings.write(folder)
    say(f"saved {folder}")
    return scores


_AT_LEAST = {
    "seed": 0,
    "steps": 1,
    "batch": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "data.limit": 1,
    "data.size": 1,
    "data.warp": 0,
    "model.vocab_size": 1,
    "model.patch": 1,
    "model.window": 1,
    "model.vision_width": 8,
    "model.vision_layers": 1,
    "model.vision_heads": 1,
    "model.width": 1,
    "model.layers": 1,
    "model.heads": 1,
    "model.kv_heads": 1,
    "look.steps": 0,
    "look.batch": 1,
    "look.warmup_steps": 0,
    "look.weight_decay": 0,
    "look.mix": 0,
    "look.erase": 0,
}
"""Field → the least that it may be."""

_DTYPES = ("float32", "bfloat16")
_OVER_0 = ("learning_rate", "look.learning_rate", "rates.tower")


def _check(config: ConfigDict) -> None:
    check_complete(config, configs.base_policy)
    check_numbers(config, _AT_LEAST, _OVER_0)
    if config.data.kind not in DATASETS:
        raise ConfigError("data.kind", config.data.kind, f"must be one of {', '.join(DATASETS)}")
    family = config.model.family
    if family not in FAMILIES:
        raise ConfigError("model.family", family, f"must be one of {', '.join(FAMILIES)}")
    token = 2 * config.model.patch
    if config.model.window % token:
        rule = f"must be a multiple of {token}, the side of a token (2 * model.patch)"
        raise ConfigError("model.window", config.model.window, rule)
    width, heads = config.model.vision_width, config.model.vision_heads
    if heads < 1 or width % (4 * heads) or width < 8 * heads:
        rule = f"must leave a head of model.vision_width={width} a multiple of 4, 8 or more"
        raise ConfigError("model.vision_heads", heads, rule)
    width, heads = config.model.width, config.model.heads
    if width % (2 * heads):
        rule = f"must leave a head of model.width={width} a multiple of 2"
        raise ConfigError("model.heads", heads, rule)
    if heads % config.model.kv_heads:
        rule = f"must divide model.heads={heads}"
        raise ConfigError("model.kv_heads", config.model.kv_heads, rule)
    if config.model.vocab_size < SMALLEST_VOCABULARY:
        rule = f"must be at least {SMALLEST_VOCABULARY}, all bytes and the special tokens"
        raise ConfigError("model.vocab_size", config.model.vocab_size, rule)
    if config.dtype not in _DTYPES:
        raise ConfigError("dtype", config.dtype, f"must be one of {', '.join(_DTYPES)}")
    if config.look.erase > 1:
        raise ConfigError("look.erase", config.look.erase, "must be a chance, from 0 to 1")
    for path, stage in (("", config), ("look.", config.look)):
        if stage.steps <= stage.warmup_steps and (stage.steps or not path):
            rule = f"must be over {path}warmup_steps={stage.warmup_steps}"
            raise ConfigError(f"{path}steps", stage.steps, rule)


def pretrain_qa(
    config: ConfigDict, loader: ExampleLoader, params: dict, say: Console
) -> tuple[dict, dict[str, float]]:
    """Trains on the QA examples of a dataset.

    Args:
      config: see `emor3_jax.config.base_policy`.
      loader: the data.
      params: of the policy.
      say: the console.

    Returns:
      The new parameters, and the shares of exactly right held-out replies: describe, consistency,
      coherence.
    """
    sizes, policy = loader.dataset.sizes, loader.policy
    prefixes = loader.prefixes()
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.05 * config.learning_rate
    )

    mergers = policy.shapes.vision.mergers

    def rate_of(path: tuple[Any, ...]) -> float:
        tower = path[0].key == "visual" and path[1].key not in mergers
        return config.rates.tower if tower else 1.0

    optimizer = make_optimizer(schedule, weight_decay=config.weight_decay, b2=0.98, rate_of=rate_of)
    batches = loader.batches(config.batch, config.seed)

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        return train_step(
            state, prefixes, next(batches), policy=policy, sizes=sizes, optimizer=optimizer
        )

    state = TrainState.create(params, optimizer)
    state = pretrain.fit("QA examples", config.steps, step, state, say)
    exact = [
        exact_replies(state.params, prefixes, batch, policy=policy, sizes=sizes)
        for batch in loader.held_out_batches(256, config.seed)
    ]
    _, questions, texts = (np.mean(kind, axis=0) for kind in zip(*exact, strict=True))
    return state.params, {
        "describe": float(questions[0]),
        "consistency": float(np.mean(questions[1:])),
        "coherence": float(texts[0]),
    }


if __name__ == "__main__":
    cli.run(train)
