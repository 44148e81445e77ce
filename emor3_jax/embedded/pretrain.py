"""The loss and the arrays that the tiny base policy is trained with.

Everything asked about one image is a group: one vision pass and one pass over the shared prefix
(system turn and image), then each question with its reply continues from there. Questions
without an image continue from the constant text prefix, once for the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerBase

from emor3_jax.data.prompts import reflection_parts, render_prompt, shared_length
from emor3_jax.embedded.tasks import Task
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import KV, Images, Prompt
from emor3_jax.models.qwen2_5_vl.rope import prompt_positions

NAME_WEIGHT = 12.0
"""Weight of a picture's name, one token beside some hundred of its lessons."""


class Lesson(NamedTuple):
    """Questions and replies of one kind, `G` to each image.

    Attributes:
      tokens: int32[B, G, S], question and reply as they follow the prefix, right padded.
      lengths: int32[B, G].
      starts: int32[B, G], index of the reply's first token, over 0.
      weights: float32[B, G], loss weight of each of the reply's tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    weights: np.ndarray


class Size(NamedTuple):
    """Padded size of a lesson: S tokens, of which the reply takes at most R."""

    tokens: int
    reply: int


class Frame(NamedTuple):
    """What is the same for every image of one size: the prefixes, and the position after them.

    Attributes:
      prompt: the shared prefix with an image, B = 1; `image_slots` of the first image.
      position: the rope position that follows it.
      text: the shared prefix without an image, B = 1; its length is the position after it.
    """

    prompt: Prompt
    position: int
    text: Prompt


def make_frame(
    tokenizer: PreTrainedTokenizerBase,
    grid: tuple[int, int, int],
    slots: np.ndarray,
    config: Config,
) -> Frame:
    """Returns the constant prefixes for images of one grid.

    Args:
      tokenizer: of the policy.
      grid: (1, h, w) in patches.
      slots: int32[n], merged slot of each image token, as `window_layout` gives it.
      config: of the policy.
    """
    tokens = render_prompt(tokenizer, "{question}", "?", (), len(slots))
    tokens = tokens[: shared_length(tokenizer, tokens)]
    prompt, position = make_prompt(tokens, grid, slots, config)
    text = np.asarray(reflection_parts(tokenizer, "{text}", (), with_image=False)[0], np.int32)
    return Frame(
        prompt,
        position,
        Prompt(
            text[None],
            np.repeat(np.arange(len(text), dtype=np.int32)[None, :, None], 3, axis=-1),
            np.ones((1, len(text)), bool),
            np.full((1, len(text)), -1, np.int32),
        ),
    )


def make_prompt(
    tokens: Sequence[int], grid: tuple[int, int, int], slots: np.ndarray, config: Config
) -> tuple[Prompt, int]:
    """Returns tokens with one image as a prompt, B = 1, and the rope position that follows.

    Args:
      tokens: with one image token for each of `slots`.
      grid, slots, config: as of `make_frame`.
    """
    tokens = np.asarray(tokens, np.int32)
    positions, position = prompt_positions(tokens, [grid], config)
    image = tokens == config.image_token_id
    image_slots = np.full(len(tokens), -1, np.int32)
    image_slots[image] = slots
    prompt = Prompt(*(x[None] for x in (tokens, positions, np.ones_like(image), image_slots)))
    return prompt, position


def make_lesson(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], size: Size) -> Lesson:
    """Tokenises tasks about one image: what follows the prefix of `Frame`.

    Args:
      tokenizer: of the policy.
      tasks: G of them, all with or all without an image.
      size: what a question and its reply must fit.

    Returns:
      The lesson without the B axis.

    Raises:
      ValueError: if a task does not fit.
    """
    tail = reflection_parts(tokenizer, "{text}", (), with_image=False)[1]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = np.zeros((len(tasks), size.tokens), np.int32)
    lengths, starts = np.zeros(len(tasks), np.int32), np.zeros(len(tasks), np.int32)
    for g, task in enumerate(tasks):
        question, reply = tokenizer([task.question, task.reply], add_special_tokens=False).input_ids
        question, reply = [*question, *tail], [*reply, end]
        n = len(question) + len(reply)
        if n > size.tokens or len(reply) > size.reply:
            raise ValueError(
                f"a task of kind {task.kind!r} takes {n} tokens, {len(reply)} for the reply, over "
                f"{tuple(size)} of its lesson: {task.question!r} {task.reply!r}"
            )
        tokens[g, :n] = question + reply
        lengths[g], starts[g] = n, len(question)
    weights = np.asarray([task.weight for task in tasks], np.float32)
    return Lesson(tokens, lengths, starts, weights)


def see(
    config: Config,
    params: dict,
    prompt: Prompt,
    images: Images,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, KV]:
    """Runs tower and decoder over the same prompt with each of the images.

    Args:
      config, params: the policy.
      prompt: B = 1, with one image.
      images: one a row.
      dtype: compute type of the layers.

    Returns:
      As `model.forward_prompt`, a row for each image.
    """
    rows = images.mask.shape[0]
    merged = images.mask.shape[1] * images.mask.shape[2] // config.vision.spatial_merge_size**2
    slots = prompt.image_slots + merged * jnp.arange(rows)[:, None]
    alike = Prompt(*(jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in prompt))
    alike = alike._replace(image_slots=jnp.where(prompt.image_slots >= 0, slots, -1))
    features = model.encode_images(config, params, images, dtype=dtype)
    return model.forward_prompt(config, params, alike, features, dtype=dtype)


def loss(
    config: Config,
    params: dict,
    frame: Frame,
    images: Images,
    about_images: Sequence[tuple[Lesson, Size]],
    about_text: tuple[Lesson, Size],
    names: jax.Array | None = None,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean negative log-likelihood of the replies, and how often each is right.

    Args:
      config, params: the policy.
      frame: the constant prefixes.
      images: one image a row.
      about_images: lessons that continue from the image, with their sizes.
      about_text: the lesson that continues from the text prefix, with its size.
      names: int32[B], a token that the end of each image predicts too, so that a policy which has
        learned to look (`embedded.look`) does not forget it; None for none.
      dtype: compute type of the layers.

    Returns:
      The loss float32[], and `exact`: for each lesson float32[G], the share of replies whose every
      token is the likeliest one.
    """
    hidden, seen = see(config, params, frame.prompt, images, dtype=dtype)
    _, told = model.forward_prompt(config, params, frame.text, None, dtype=dtype)
    flat = Lesson(*(x.reshape(1, -1, *x.shape[2:]) for x in about_text[0]))
    parts = [(seen, frame.position, *lesson) for lesson in about_images]
    parts.append((told, frame.text.tokens.shape[1], flat, about_text[1]))
    total, weight, exact = 0.0, 0.0, []
    if names is not None:
        scores = model.logits(config, params, hidden[:, -1])
        wrong = optax.softmax_cross_entropy_with_integer_labels(scores, names)
        total, weight = NAME_WEIGHT * jnp.sum(wrong), NAME_WEIGHT * len(names)
    for prefix, position, lesson, size in parts:
        b, g, s = lesson.tokens.shape
        hidden, _ = model.forward_continuation(
            config,
            params,
            prefix,
            lesson.tokens[..., :-1],
            jnp.broadcast_to(position + jnp.arange(s - 1), (b, g, s - 1)),
            jnp.arange(s - 1) < lesson.lengths[..., None],
            dtype=dtype,
        )
        # Only replies are predicted, so only they are worth logits.
        place = lesson.starts[..., None] + jnp.arange(size.reply)
        weights = jnp.where(place < lesson.lengths[..., None], lesson.weights[..., None], 0.0)
        place = jnp.minimum(place, s - 1)
        wanted = jnp.take_along_axis(lesson.tokens, place, axis=-1)
        hidden = jnp.take_along_axis(hidden, place[..., None] - 1, axis=2)
        scores = model.logits(config, params, hidden)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(scores), wanted[..., None], axis=-1)
        total -= jnp.sum(weights * logprobs[..., 0])
        weight += jnp.sum(weights)
        right = (jnp.argmax(scores, axis=-1) == wanted) | (weights == 0)
        exact.append(jnp.mean(jnp.all(right, axis=-1), axis=0))
    exact[-1] = jnp.mean(exact[-1], keepdims=True)
    return total / weight, {"exact": exact}
