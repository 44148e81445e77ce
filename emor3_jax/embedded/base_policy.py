"""Trains the tiny base policy: a stand-in for a pretrained vision-language model, from scratch.

    python -m emor3_jax.embedded.base_policy --config=configs/base_policy.py --workdir=DIR

On 2 cores it takes about three minutes and leaves a Hugging Face folder that describes images,
answers yes or no to a description, names the emotion of a text, and gives SET responses of its own
that are mediocre (`emor3_jax.embedded.tasks`). It needs no download. Where seeing is the hard part,
as with real faces, the policy first learns to look (`emor3_jax.embedded.look`).
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from emor3_jax import cli
from emor3_jax.config import ConfigError
from emor3_jax.embedded import look, pretrain
from emor3_jax.embedded.courses import COURSES
from emor3_jax.embedded.teacher import Lessons, Teacher
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.io.console import Console, duration
from emor3_jax.models import Policy, load, save
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config, VisionConfig
from emor3_jax.models.qwen2_5_vl.processor import ImageSettings, Processor
from emor3_jax.rl.update import TrainState, apply_gradients, make_optimizer

WHITENED = 8192
"""Pictures whose patches say how to whiten."""

Sizes = tuple[pretrain.Size, pretrain.Size, pretrain.Size]


def model_config(config: ConfigDict, tokenizer: Any) -> Config:
    """Returns the shapes of the policy: Qwen2.5-VL's architecture, small."""
    width, heads = config.model.width, config.model.heads
    head_dim = width // heads
    vision = VisionConfig(
        depth=config.model.vision_layers,
        hidden_size=config.model.vision_width,
        intermediate_size=2 * config.model.vision_width,
        num_heads=config.model.vision_heads,
        patch_size=config.model.patch,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=config.model.window,
        fullatt_block_indexes=(config.model.vision_layers - 1,),
        out_hidden_size=width,
    )
    spatial = 3 * head_dim // 16
    return Config(
        vision=vision,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=config.model.layers,
        num_heads=heads,
        num_kv_heads=config.model.kv_heads,
        head_dim=head_dim,
        rope_theta=1e4,
        mrope_section=(head_dim // 2 - 2 * spatial, spatial, spatial),
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        **special_ids(tokenizer),
    )


@partial(jax.jit, static_argnames=("config", "sizes", "optimizer"), donate_argnames="state")
def train_step(
    state: TrainState,
    frame: pretrain.Frame,
    lessons: Lessons,
    *,
    config: Config,
    sizes: Sizes,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one optimizer step; returns the new state and `loss`, `exact`, `grad_norm`."""

    def loss_fn(params: dict) -> tuple[jax.Array, dict[str, Any]]:
        return _loss(config, sizes, params, frame, lessons)

    (value, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, applied = apply_gradients(state, grads, optimizer)
    return state, {"loss": value, **metrics, **applied}


@partial(jax.jit, static_argnames=("config", "sizes"))
def held_out(
    params: dict, frame: pretrain.Frame, lessons: Lessons, *, config: Config, sizes: Sizes
) -> list[jax.Array]:
    """Returns how often each kind of reply is exactly right, as in `pretrain.loss`."""
    return _loss(config, sizes, params, frame, lessons)[1]["exact"]


def _loss(
    config: Config, sizes: Sizes, params: dict, frame: pretrain.Frame, lessons: Lessons
) -> tuple[jax.Array, dict[str, Any]]:
    about_images = ((lessons.responses, sizes[0]), (lessons.questions, sizes[1]))
    about_text = (lessons.texts, sizes[2])
    return pretrain.loss(
        config, params, frame, lessons.images, about_images, about_text, lessons.names
    )


def train(config: ConfigDict, folder: Path) -> dict[str, float]:
    """Trains a base policy and saves it.

    Args:
      config: see `emor3_jax.config.base_policy`.
      folder: where the Hugging Face folder is written; `looked` in it is the policy between the two
        phases, which a run that was stopped goes on from.

    Returns:
      Shares of held-out replies that are exactly right: describe, consistency, coherence; and if
      the policy learned to look, of held-out pictures right after that: `look`, their label is
      named right, and `begin`, so is the first word of a description.

    Raises:
      ConfigError: if a field cannot be used.
    """
    say = Console("base policy")
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compile_cache).absolute()))
    _check(config)
    say("preparing the data and the tokenizer")
    course = COURSES[config.data.kind](config)
    looked = folder / "looked" if config.look.steps else None
    before = load(looked) if looked and (looked / "config.json").exists() else None
    if before:
        say(f"going on from {looked}; delete it to learn to look anew")
        tokenizer = before.processor.tokenizer
    else:
        tokenizer = train_tokenizer(course.corpus, config.model.vocab_size)
    pixels = config.data.size**2
    settings = ImageSettings(pixels, pixels, patch_size=config.model.patch)
    shapes = model_config(config, tokenizer)
    if before and before.config != shapes:
        raise ConfigError(
            "model", config.model.to_dict(), f"is not the shape of {looked}; delete that folder"
        )
    processor = Processor(tokenizer, settings)
    changes = {"strength": config.data.warp, "hide": config.look.erase}
    teacher = Teacher.of(course, processor, shapes, looks=bool(config.look.steps), **changes)
    params = model.init_params(shapes, jax.random.key(config.seed))
    count = sum(x.size for x in jax.tree.leaves(params))
    say(f"{count / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {len(course.images)} images")

    scores = {}
    if looked:
        if before:
            params = before.params
        else:
            params = learn_to_look(config, teacher, params, say)
            save(Policy(shapes, params, processor), looked)
        scores["look"], scores["begin"] = looked_right(config, teacher, params)
        say(f"held-out labels named right: {scores['look']:.3f}, begun: {scores['begin']:.3f}")
    params, found = learn_lessons(config, teacher, params, say)
    scores |= found
    say("held-out replies exactly right: " + "  ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    save(Policy(shapes, params, processor), folder)
    say(f"saved {folder}")
    return scores


def _check(config: ConfigDict) -> None:
    if config.data.kind not in COURSES:
        raise ConfigError("data.kind", config.data.kind, f"must be one of {', '.join(COURSES)}")
    token = 2 * config.model.patch
    if config.model.window % token:
        rule = f"must be a multiple of {token}, the side of a token (2 * model.patch)"
        raise ConfigError("model.window", config.model.window, rule)
    width, heads = config.model.vision_width, config.model.vision_heads
    if heads < 1 or width % (4 * heads) or width < 8 * heads:
        rule = f"must leave a head of model.vision_width={width} a multiple of 4, 8 or more"
        raise ConfigError("model.vision_heads", heads, rule)
    if config.look.mix < 0:
        raise ConfigError("look.mix", config.look.mix, "must be 0, for none, or more")
    if not 0 <= config.look.erase <= 1:
        raise ConfigError("look.erase", config.look.erase, "must be a chance, from 0 to 1")
    if config.rates.tower <= 0:
        raise ConfigError("rates.tower", config.rates.tower, "must be over 0")
    for path, phase in (("", config), ("look.", config.look)):
        if phase.steps <= phase.warmup_steps and (phase.steps or not path):
            rule = f"must be over {path}warmup_steps={phase.warmup_steps}"
            raise ConfigError(f"{path}steps", phase.steps, rule)


def learn_to_look(config: ConfigDict, teacher: Teacher, params: dict, say: Console) -> dict:
    """Returns parameters that name the emotion of a picture."""
    shapes = teacher.shapes
    phase = config.look
    batches = teacher.looks(phase.batch, config.seed)
    prompts = teacher.look_prompts(config.seed)
    images = [next(batches).images for _ in range(-(-WHITENED // phase.batch))]
    seen = np.concatenate([np.asarray(x.patches)[np.asarray(x.mask)] for x in images])
    visual = params["visual"]
    embed = {"kernel": look.whitened(visual["patch_embed"]["kernel"], seen)}
    qkv = look.local_heads(visual["blocks"]["attn"]["qkv"], shapes.vision, config.seed)
    blocks = visual["blocks"] | {"attn": visual["blocks"]["attn"] | {"qkv": qkv}}
    params = params | {"visual": visual | {"patch_embed": embed, "blocks": blocks}}
    optimizer = look.make_muon(
        phase.learning_rate, phase.warmup_steps, phase.steps, phase.weight_decay
    )

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        return look.look_step(
            *(state, next(prompts), next(batches)),
            config=shapes,
            optimizer=optimizer,
            mix=phase.mix,
            seed=config.seed,
        )

    return _fit("looking", phase.steps, step, TrainState.create(params, optimizer), say).params


def looked_right(config: ConfigDict, teacher: Teacher, params: dict) -> tuple[float, float]:
    """Returns how often a held-out picture's label is named right, and a description begun right.

    The opening follows the picture at once.
    """
    prompt = teacher.look_prompt()
    right = [
        look.named_right(params, prompt, looks, config=teacher.shapes)
        for looks in teacher.held_out_looks(config.look.batch)
    ]
    label, begun = np.mean(np.concatenate(right), axis=0)
    return float(label), float(begun)


def learn_lessons(
    config: ConfigDict, teacher: Teacher, params: dict, say: Console
) -> tuple[dict, dict[str, float]]:
    """Returns parameters that reply as the course's tasks do, and how often exactly so."""
    course, shapes = teacher.course, teacher.shapes
    frame = teacher.frame()
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.05 * config.learning_rate
    )

    def rate_of(path: tuple[Any, ...]) -> float:
        tower = path[0].key == "visual" and path[1].key != "merger"
        return config.rates.tower if tower else 1.0

    optimizer = make_optimizer(schedule, weight_decay=config.weight_decay, b2=0.98, rate_of=rate_of)
    batches = teacher.lessons(config.batch, config.seed)

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        return train_step(
            state, frame, next(batches), config=shapes, sizes=course.sizes, optimizer=optimizer
        )

    state = _fit("lessons", config.steps, step, TrainState.create(params, optimizer), say)
    exact = [
        held_out(state.params, frame, lessons, config=shapes, sizes=course.sizes)
        for lessons in teacher.held_out_lessons(256, config.seed)
    ]
    _, questions, texts = (np.mean(kind, axis=0) for kind in zip(*exact, strict=True))
    return state.params, {
        "describe": float(questions[0]),
        "consistency": float(np.mean(questions[1:])),
        "coherence": float(texts[0]),
    }


def _fit(
    what: str,
    steps: int,
    step: Callable[[TrainState], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    say: Console,
) -> TrainState:
    """Takes the steps, and tells of one in twenty."""
    say(f"{what}: compiling the training step")
    state, metrics = step(state)
    say(f"{what}: step 1/{steps}  loss {float(metrics['loss']):.3f}")
    started = time.perf_counter()
    for count in range(2, steps + 1):
        state, metrics = step(state)
        if count % 20 == 0 or count == steps:
            loss = float(metrics["loss"])
            pace = (time.perf_counter() - started) / (count - 1)
            left = duration(pace * (steps - count))
            say(f"{what}: step {count}/{steps}  loss {loss:.3f}  {pace:.2f} s/step  left {left}")
    return state


if __name__ == "__main__":
    cli.run(train)
