"""Special tokens of generation: those that end a response, and those that never occur in one."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.models.errors import ProcessorError

_VISION = ("<|image_pad|>", "<|video_pad|>", *(f"<|vision_{x}|>" for x in ("start", "end", "pad")))


def suppressed_tokens(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Returns bool[V], ids that a response may never contain.

    These are the image and vision ids (a sampled image token has no image), the other special
    tokens that do not end a turn, and the ids of a padded vocabulary that stand for nothing. Tokens
    that were added as text, such as Qwen3's `<think>`, are text.

    Args:
      vocab_size: V, rows of the policy's embedding.
      tokenizer: of the policy.

    Raises:
      ProcessorError: if the tokenizer has an id that is no row of the embedding.
    """
    last = max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder)
    if last >= vocab_size:
        raise ProcessorError(
            f"the tokenizer has the id {last} ({tokenizer.convert_ids_to_tokens(last)!r}), but the "
            f"policy's vocab_size={vocab_size}: each id needs a row of the embedding; take the "
            "tokenizer that belongs to the weights, or resize the embedding with transformers "
            "(resize_token_embeddings)"
        )
    suppressed = np.ones(vocab_size, bool)
    suppressed[: len(tokenizer)] = False
    for i, token in tokenizer.added_tokens_decoder.items():
        suppressed[i] = token.special or token.content in _VISION
    suppressed[list(stop_ids(tokenizer))] = False
    return suppressed


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids that end a response: the end of the turn and the end of the text."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return tuple(i for i in ids if i is not None)
