"""Trains the tiny base policy: a stand-in for a pretrained vision-language model, from scratch.

    python -m emor3_jax.embedded.base_policy --config=configs/base_policy.py --workdir=DIR

On 2 cores it takes about three minutes and leaves a Hugging Face folder that describes images,
answers yes or no to a description, names the emotion of a text, and gives SET responses of its own
that are mediocre (`emor3_jax.embedded.tasks`). It needs no download.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from emor3_jax import cli
from emor3_jax.config import ConfigError
from emor3_jax.data.labels import normalize
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.data.sources import ParquetSource
from emor3_jax.embedded import faces, pretrain, tasks
from emor3_jax.embedded.emoscenes import builder
from emor3_jax.embedded.emoscenes.scene import Scene
from emor3_jax.embedded.tasks import Task
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.io.console import Console, duration
from emor3_jax.models import Policy, save
from emor3_jax.models.qwen2_5_vl import layout, model
from emor3_jax.models.qwen2_5_vl.config import Config, VisionConfig
from emor3_jax.models.qwen2_5_vl.processor import ImageSettings, Processor
from emor3_jax.rl.update import TrainState, apply_gradients, make_optimizer

Sizes = tuple[pretrain.Size, pretrain.Size, pretrain.Size]


class Course(NamedTuple):
    """What a base policy is trained on.

    Attributes:
      images: random access source of encoded images.
      tasks: (row, rng) -> the five tasks about that image.
      corpus: texts for the tokenizer.
      sizes: of the lessons: SET responses, other questions about an image, texts to judge.
      held_out: how many rows at the end are kept for the report.
    """

    images: Sequence[bytes]
    tasks: Callable[[int, np.random.Generator], list[Task]]
    corpus: list[str]
    sizes: Sizes
    held_out: int = 256


def emoscenes_course(config: ConfigDict) -> Course:
    """Returns the course on both pretraining splits of EmoScenes, drawing them first if needed."""
    built = builder.prepare(config.data.folder, config.data.size)
    rows = [
        row
        for split in ("pretrain", "shifted_pretrain")
        for row in builder.load(split, built.data_dir)
    ]
    order = np.random.default_rng(config.seed).permutation(len(rows))[: config.data.limit]
    rows = [rows[i] for i in order]
    scenes = [Scene.from_json(bytes(row["scene"]).decode()) for row in rows]
    return Course(
        [bytes(row["image"]) for row in rows],
        lambda i, rng: tasks.tasks(scenes[i], rng),
        tasks.text_corpus(),
        (pretrain.Size(100, 56), pretrain.Size(44, 16), pretrain.Size(64, 4)),
    )


def faces_course(config: ConfigDict) -> Course:
    """Returns the course on labelled faces, such as FER-2013's, from parquet files."""
    source = ParquetSource(config.data.path)
    order = np.random.default_rng(config.seed).permutation(len(source))[: config.data.limit]
    rows = [source[int(i)] for i in order]
    rows = [row for row in rows if normalize(row.texts.answer or "") in faces.LABELS]
    templates = PromptTemplates.load(set="tiny", coherence="tiny", consistency="tiny")
    questions = sorted({row.texts.question for row in rows})

    def about(i: int, rng: np.random.Generator) -> list[Task]:
        texts = rows[i].texts
        return faces.tasks(normalize(texts.answer), texts.question, templates, rng)

    return Course(
        [row.images[0] for row in rows],
        about,
        faces.corpus(questions, templates),
        (pretrain.Size(152, 64), pretrain.Size(44, 20), pretrain.Size(64, 4)),
    )


def model_config(config: ConfigDict, tokenizer: Any) -> Config:
    """Returns the shapes of the policy: Qwen2.5-VL's architecture, small."""
    width, heads = config.model.width, config.model.heads
    head_dim = width // heads
    vision = VisionConfig(
        depth=config.model.vision_layers,
        hidden_size=config.model.vision_width,
        intermediate_size=2 * config.model.vision_width,
        num_heads=config.model.vision_width // 32,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
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


class Lessons(NamedTuple):
    """One batch: images and the three lessons about them."""

    images: model.Images
    responses: pretrain.Lesson
    questions: pretrain.Lesson
    texts: pretrain.Lesson


def make_row(
    course: Course, processor: Processor, config: Config, row: int, rng: np.random.Generator
) -> tuple[layout.WindowLayout, tuple[pretrain.Lesson, ...]]:
    """Returns one image in window layout and its lessons."""
    patches, grid = processor.patches(course.images[row])
    found = course.tasks(row, rng)
    kinds = (
        [t for t in found if t.kind == "set"],
        [t for t in found if t.with_image and t.kind != "set"],
        [t for t in found if not t.with_image],
    )
    lessons = tuple(
        pretrain.make_lesson(processor.tokenizer, group, size)
        for group, size in zip(kinds, course.sizes, strict=True)
    )
    return layout.window_layout(patches, grid, config.vision), lessons


def stack(rows: Sequence[tuple[layout.WindowLayout, tuple[pretrain.Lesson, ...]]]) -> Lessons:
    """Returns a batch of rows."""
    images = layout.pad_images([image for image, _ in rows], len(rows[0][0].mask))
    lessons = (
        jax.tree.map(lambda *x: np.stack(x), *group)
        for group in zip(*(r[1] for r in rows), strict=True)
    )
    return Lessons(images, *lessons)


def batches(
    course: Course, processor: Processor, model_config: Config, batch: int, seed: int
) -> Iterator[Lessons]:
    """Returns endless batches, prepared in threads while the policy trains."""
    dataset = (
        grain.MapDataset.range(len(course.images) - course.held_out)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(lambda row, rng: make_row(course, processor, model_config, row, rng))
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch)
    return iter(dataset.to_iter_dataset(options).batch(batch, batch_fn=stack))


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

    def loss_fn(params):
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


def _loss(config: Config, sizes: Sizes, params: dict, frame: pretrain.Frame, lessons: Lessons):
    about_images = ((lessons.responses, sizes[0]), (lessons.questions, sizes[1]))
    about_text = (lessons.texts, sizes[2])
    return pretrain.loss(config, params, frame, lessons.images, about_images, about_text)


def train(config: ConfigDict, folder: Path) -> dict[str, float]:
    """Trains a base policy and saves it.

    Args:
      config: see `emor3_jax.config.base_policy`.
      folder: where the Hugging Face folder is written.

    Returns:
      Shares of held-out replies that are exactly right: describe, consistency, coherence.
    """
    say = Console("base policy")
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compile_cache).absolute()))
    say("preparing the data and the tokenizer")
    if config.data.kind not in COURSES:
        raise ConfigError("data.kind", config.data.kind, f"must be one of {', '.join(COURSES)}")
    if config.steps <= config.warmup_steps:
        rule = f"must be over warmup_steps={config.warmup_steps}"
        raise ConfigError("steps", config.steps, rule)
    course = COURSES[config.data.kind](config)
    tokenizer = train_tokenizer(course.corpus, config.model.vocab_size)
    pixels = config.data.size**2
    processor = Processor(tokenizer, ImageSettings(min_pixels=pixels, max_pixels=pixels))
    shapes = model_config(config, tokenizer)
    params = model.init_params(shapes, jax.random.key(config.seed))
    count = sum(x.size for x in jax.tree.leaves(params))
    say(f"{count / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {len(course.images)} images")

    patches, grid = processor.patches(course.images[0])
    slots = layout.window_layout(patches, grid, shapes.vision).slot_of_token
    frame = pretrain.make_frame(tokenizer, grid, slots, shapes)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.05 * config.learning_rate
    )
    optimizer = make_optimizer(schedule, weight_decay=config.weight_decay, b2=0.98)
    state = TrainState.create(params, optimizer)
    data = batches(course, processor, shapes, config.batch, config.seed)
    say("compiling the training step")
    started = time.perf_counter()
    for step in range(1, config.steps + 1):
        state, metrics = train_step(
            state, frame, next(data), config=shapes, sizes=course.sizes, optimizer=optimizer
        )
        if step == 1 or step % 20 == 0 or step == config.steps:
            loss = float(metrics["loss"])
            spent = time.perf_counter() - started
            left = duration(spent / step * (config.steps - step))
            pace = f"{spent / step:.2f} s/step  left {left}"
            say(f"step {step}/{config.steps}  loss {loss:.3f}  {pace}")

    rng = np.random.default_rng(config.seed)
    total = len(course.images)
    test = [
        make_row(course, processor, shapes, row, rng)
        for row in range(total - course.held_out, total)
    ]
    _, questions, texts = held_out(
        state.params, frame, stack(test), config=shapes, sizes=course.sizes
    )
    scores = {
        "describe": float(questions[0]),
        "consistency": float(np.mean(questions[1:])),
        "coherence": float(texts[0]),
    }
    say("held-out replies exactly right: " + "  ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    save(Policy(shapes, state.params, processor), folder)
    say(f"saved {folder}")
    return scores


COURSES: dict[str, Callable[[ConfigDict], Course]] = {
    "emoscenes": emoscenes_course,
    "faces": faces_course,
}

if __name__ == "__main__":
    cli.run(train)
