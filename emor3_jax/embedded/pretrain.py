"""The loss, the arrays and the loop that train the tiny base policy.

All questions about one image are a group: one vision pass and one pass over the shared prefix
(system turn and image), then each question with its reply continues from there. Questions
without an image continue from the constant text prefix, once for the batch.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerBase

from emor3_jax.data.prompts import reflection_parts, render_prompt, shared_length
from emor3_jax.embedded.tasks import QAExample
from emor3_jax.io.console import Console, duration
from emor3_jax.models import Policy
from emor3_jax.models.cache import KV
from emor3_jax.rl.update import TrainState
from emor3_jax.types import Images, Prompt

LABEL_WEIGHT = 12.0
"""Loss weight of an image's label, one token beside some hundred reply tokens."""


class QATokens(NamedTuple):
    """Tokenised QA examples of one kind, `G` to each image.

    Attributes:
      tokens: int32[B, G, S], question and reply as they follow the prefix, right-padded.
      lengths: int32[B, G].
      starts: int32[B, G], index of the reply's first token, over 0.
      weights: float32[B, G], loss weight of each of the reply's tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    weights: np.ndarray


class Size(NamedTuple):
    """Padded size of examples of one kind: S tokens, of which the reply takes at most R."""

    tokens: int
    reply: int


class Prefixes(NamedTuple):
    """The constant prefixes for all images of one size.

    Attributes:
      prompt: the shared prefix with an image, B = 1; `image_slots` of the first image.
      position: the RoPE position that follows it.
      text: the shared prefix without an image, B = 1; its length is the position after it.
    """

    prompt: Prompt
    position: int
    text: Prompt


def make_prefixes(
    tokenizer: PreTrainedTokenizerBase,
    grid: tuple[int, int, int],
    slots: np.ndarray,
    policy: Policy,
) -> Prefixes:
    """Returns the constant prefixes for images of one grid.

    Args:
      tokenizer: of the policy.
      grid: (1, h, w) in patches.
      slots: int32[n], merged slot of each image token, as `window_layout` gives it.
      policy: the policy.
    """
    tokens = render_prompt(tokenizer, "{question}", "?", (), len(slots))
    tokens = tokens[: shared_length(tokenizer, tokens)]
    prompt, position = make_prompt(tokens, grid, slots, policy)
    text = np.asarray(reflection_parts(tokenizer, "{text}", (), with_image=False)[0], np.int32)
    return Prefixes(
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
    tokens: Sequence[int], grid: tuple[int, int, int], slots: np.ndarray, policy: Policy
) -> tuple[Prompt, int]:
    """Returns tokens with one image as a prompt, B = 1, and the RoPE position that follows.

    Args:
      tokens: with one image token for each of `slots`.
      grid, slots, policy: as of `make_prefixes`.
    """
    tokens = np.asarray(tokens, np.int32)
    positions, position = policy.layout.positions(tokens, [grid])
    image = tokens == policy.shapes.image_token_id
    image_slots = np.full(len(tokens), -1, np.int32)
    image_slots[image] = slots
    prompt = Prompt(*(x[None] for x in (tokens, positions, np.ones_like(image), image_slots)))
    return prompt, position


def tokenize_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[QAExample], size: Size
) -> QATokens:
    """Tokenises examples about one image, without the prefix of `Prefixes`.

    Args:
      tokenizer: of the policy.
      examples: G of them, all with or all without an image.
      size: the padded size.

    Returns:
      The tokens without the B axis.

    Raises:
      ValueError: if an example does not fit `size`.
    """
    tail = reflection_parts(tokenizer, "{text}", (), with_image=False)[1]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = np.zeros((len(examples), size.tokens), np.int32)
    lengths, starts = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.int32)
    for g, example in enumerate(examples):
        texts = [example.question, example.reply]
        question, reply = tokenizer(texts, add_special_tokens=False).input_ids
        question, reply = [*question, *tail], [*reply, end]
        n = len(question) + len(reply)
        if n > size.tokens or len(reply) > size.reply:
            raise ValueError(
                f"an example of kind {example.kind!r} takes {n} tokens, {len(reply)} for the "
                f"reply, over its size {tuple(size)}: {example.question!r} {example.reply!r}"
            )
        tokens[g, :n] = question + reply
        lengths[g], starts[g] = n, len(question)
    weights = np.asarray([example.weight for example in examples], np.float32)
    return QATokens(tokens, lengths, starts, weights)


def forward_images(
    policy: Policy,
    params: dict,
    prompt: Prompt,
    images: Images,
) -> tuple[jax.Array, KV]:
    """Runs vision tower and decoder over the same prompt with each of the images.

    Args:
      policy, params: the policy.
      prompt: B = 1, with one image.
      images: one a row.

    Returns:
      As `Policy.read_prompt`, a row for each image.
    """
    rows = len(images.mask)
    alike = Prompt(*(jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in prompt))
    return policy.read_prompt(params, alike, policy.encode_images(params, images))


def loss(
    policy: Policy,
    params: dict,
    prefixes: Prefixes,
    images: Images,
    about_images: Sequence[tuple[QATokens, Size]],
    about_text: tuple[QATokens, Size],
    labels: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean negative log-likelihood of the replies, and the share of correct ones.

    Args:
      policy, params: the policy.
      prefixes: the constant prefixes.
      images: one image a row.
      about_images: examples that continue from the image, with their sizes.
      about_text: examples that continue from the text prefix, with their size.
      labels: int32[B], a token to predict at the end of each image too, so that the policy does
        not forget its vision pretraining (`embedded.faces.vision_pretraining`); None for none.

    Returns:
      The loss float32[], and `exact`: for each kind of example float32[G], the share of replies of
      which every token is the likeliest one.
    """
    hidden, image_kv = forward_images(policy, params, prefixes.prompt, images)
    _, text_kv = policy.read_prompt(params, prefixes.text, None)
    flat = QATokens(*(x.reshape(1, -1, *x.shape[2:]) for x in about_text[0]))
    groups = [(image_kv, prefixes.position, *each) for each in about_images]
    groups.append((text_kv, prefixes.text.tokens.shape[1], flat, about_text[1]))
    total, weight, exact = 0.0, 0.0, []
    if labels is not None:
        logits = policy.logits(params, hidden[:, -1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        total, weight = LABEL_WEIGHT * jnp.sum(losses), LABEL_WEIGHT * len(labels)
    for prefix, position, examples, size in groups:
        b, g, s = examples.tokens.shape
        hidden, _ = policy.extend(
            params,
            prefix,
            examples.tokens[..., :-1],
            jnp.broadcast_to(position + jnp.arange(s - 1), (b, g, s - 1)),
            jnp.arange(s - 1) < examples.lengths[..., None],
        )
        # Only replies are predicted, so only they need logits.
        index = examples.starts[..., None] + jnp.arange(size.reply)
        weights = jnp.where(index < examples.lengths[..., None], examples.weights[..., None], 0.0)
        index = jnp.minimum(index, s - 1)
        targets = jnp.take_along_axis(examples.tokens, index, axis=-1)
        hidden = jnp.take_along_axis(hidden, index[..., None] - 1, axis=2)
        logits = policy.logits(params, hidden)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        total -= jnp.sum(weights * logprobs[..., 0])
        weight += jnp.sum(weights)
        correct = (jnp.argmax(logits, axis=-1) == targets) | (weights == 0)
        exact.append(jnp.mean(jnp.all(correct, axis=-1), axis=0))
    exact[-1] = jnp.mean(exact[-1], keepdims=True)
    return total / weight, {"exact": exact}


def fit(
    stage: str,
    steps: int,
    step: Callable[[TrainState], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    say: Console,
) -> TrainState:
    """Takes all steps of a stage, and prints the loss of every twentieth.

    Args:
      stage: its name, for the console.
      steps: number of steps, at least 1.
      step: takes one; its metrics hold `loss`.
      state: the initial one.
      say: the console.
    """
    say(f"{stage}: compiling the training step")
    state, metrics = step(state)
    say(f"{stage}: step 1/{steps}  loss {float(metrics['loss']):.3f}")
    started = time.perf_counter()
    for count in range(2, steps + 1):
        state, metrics = step(state)
        if count % 20 == 0 or count == steps:
            loss = float(metrics["loss"])
            pace = (time.perf_counter() - started) / (count - 1)
            left = duration(pace * (steps - count))
            say(f"{stage}: step {count}/{steps}  loss {loss:.3f}  {pace:.2f} s/step  left {left}")
    return state
