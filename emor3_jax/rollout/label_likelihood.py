"""Likelihood of each label behind a response's own reasoning, without sampling any.

The response is cut before its last box, and `\\boxed{label}` of each label is read there: which
share of the likelihood of all labels does each have?

Deviations, numbered:
 1. Beyond the method; off by default. The prompts are read once more, since evaluation does not
    keep their keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.params import cast_for_decoding, weight_sync
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.program import Program, Programs, by_prompts, laid_out, mesh_of
from emor3_jax.rewards.automaton import token_bytes
from emor3_jax.rollout.generate import Opening
from emor3_jax.rollout.likelihood import Candidates, make_candidates, probabilities
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.types import Batch, Samples

_BOX = b"\\boxed{"


@dataclass(frozen=True)
class LabelLikelihood:
    """Reads labels behind responses.

    Attributes:
      policy: the policy.
      candidates: spellings of the labels, boxed.
      count: K, number of labels.
      suppressed: bool[V], ids of probability zero.
      pieces: the bytes of each token, empty of special ones.
    """

    policy: Policy
    candidates: Candidates
    count: int
    suppressed: np.ndarray
    pieces: Sequence[bytes] = ()

    @classmethod
    def of_rollout(cls, rollout: Rollout) -> "LabelLikelihood":
        """Spells the labels of a rollout in the tokens of its policy."""
        tokenizer, labels = rollout.scorer.tokenizer, rollout.scorer.labels
        boxed = [[f"\\boxed{{{x}}}" for x in (label, label.capitalize())] for label in labels]
        candidates = make_candidates(tokenizer, boxed)
        pieces = token_bytes(tokenizer)
        return cls(rollout.policy, candidates, len(labels), rollout.suppressed, pieces)

    def __call__(self, params: dict, batch: Batch, samples: Samples) -> jax.Array:
        """Returns float32[B, G, K], the share of each label in the likelihood of all.

        Args:
          params: of the policy.
          batch: the prompts, on the devices.
          samples: the responses to them.
        """
        tokens, lengths = hosts.fetch((samples.tokens, samples.lengths))
        cut = cut_before_box(tokens, lengths, self.pieces)
        # Few sizes, so that few programs are compiled.
        size = min(1 << int(cut.max()).bit_length(), tokens.shape[-1])
        params = cast_for_decoding(params, self.policy.dtype)
        args, options = self._call(params, batch, samples.tokens, cut, size)
        return read_labels(*args, **options)

    def programs(self, params: Any, batch: Batch, samples: Samples) -> Programs:
        """Yields the program of a call behind an evaluation's rollout, at its largest shapes.

        Args:
          params: master parameters, abstract.
          batch: B prompts in the largest buckets, abstract.
          samples: the responses to them, abstract.

        Returns:
          The abstract shares.
        """
        dtype = jnp.dtype(self.policy.dtype)
        # The rollout's own program casts them.
        cast = Program("weight_sync", weight_sync, (params, dtype)).results(mesh_of(batch))
        cut = np.zeros(samples.lengths.shape, np.int32)
        args, options = self._call(cast, batch, samples.tokens, cut, samples.tokens.shape[-1])
        return (yield Program("read_labels", read_labels, args, options, {"parameters": cast}))

    def _call(
        self, params: Any, batch: Batch, tokens: Any, cut: np.ndarray, size: int
    ) -> tuple[tuple, dict]:
        args = (params, batch, tokens, cut, self.candidates, self.suppressed)
        return args, {"policy": self.policy, "count": self.count, "size": size}


def cut_before_box(tokens: np.ndarray, lengths: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """Returns int32[B, G], how many tokens of each response stand before its last box.

    Without a box, those before the tokens that end the response. A token that begins before the
    box and reaches into it is cut off too.

    Args:
      tokens: int32[B, G, T].
      lengths: int32[B, G].
      pieces: the bytes of each token, empty of special ones.
    """
    found = np.zeros(lengths.shape, np.int32)
    for at in np.ndindex(lengths.shape):
        said = [pieces[token] for token in tokens[at][: lengths[at]]]
        while said and not said[-1]:
            said.pop()
        box = b"".join(said).rfind(_BOX)
        ends = np.cumsum([len(piece) for piece in said])
        found[at] = len(said) if box < 0 else np.searchsorted(ends, box, side="right")
    return found


@partial(jax.jit, static_argnames=("policy", "count", "size"))
@laid_out(by_prompts)
def read_labels(
    params: dict,
    batch: Batch,
    tokens: jax.Array,
    cut: jax.Array,
    candidates: Candidates,
    suppressed: jax.Array,
    *,
    policy: Policy,
    count: int,
    size: int,
) -> jax.Array:
    """Returns `LabelLikelihood.__call__`, jitted.

    Args:
      params: of the policy.
      batch: B prompts.
      tokens: int32[B, G, T], the responses.
      cut: int32[B, G], how many tokens of each are read, at most `size`.
      candidates: spellings of the labels.
      suppressed: bool[V], ids of probability zero.
      policy: the policy.
      count: K, number of labels.
      size: padded length of what is read.
    """
    last = jnp.broadcast_to(batch.last_token[:, None, None], (*cut.shape, 1))
    opening = Opening(
        policy.prefill(params, batch.prompt, batch.images),
        jnp.concatenate([last, tokens[..., :size]], axis=-1),
        cut + 1,
        jnp.broadcast_to(batch.next_position[:, None], cut.shape),
    )
    return probabilities(policy, params, opening, candidates, count, suppressed)
