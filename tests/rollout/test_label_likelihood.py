"""Labels read behind a response: where it is cut, and against whole forward passes."""

import numpy as np

from emor3_jax.rollout.label_likelihood import cut_before_box, read_labels
from emor3_jax.rollout.likelihood import Candidates

PIECES = [b"", b"joy ", b"\\boxed{", b"fear", b"}", b".\\bo", b"xed{"]


def _cut(*tokens: int) -> int:
    row = np.array([[[*tokens, *[1] * (8 - len(tokens))]]])
    return int(cut_before_box(row, np.array([[len(tokens)]]), PIECES)[0, 0])


def test_responses_are_cut_before_their_last_box() -> None:
    assert _cut(1, 2, 3, 4, 0) == 1
    assert _cut(2, 3, 4, 1, 2, 3, 4, 0) == 4
    # A token that reaches into the box goes with it.
    assert _cut(1, 1, 5, 6, 3, 4) == 2
    # No box: all but what ends the response.
    assert _cut(1, 3, 0) == 2
    assert _cut(1, 3) == 2
    assert _cut(0) == 0


def test_labels_are_read_as_responses_that_go_on_with_them(setting) -> None:
    """Each label scored as part of a whole response, as `score_responses` does."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(16, 60, (2, 3, 5)).astype(np.int32)
    cut = np.array([[0, 2, 4], [3, 1, 4]], np.int32)
    candidates = Candidates(
        np.array([[11, 7, 0], [12, 13, 7], [14, 7, 0]], np.int32),
        np.array([2, 3, 2], np.int32),
        np.array([0, 1, 0], np.int32),
    )
    found = np.asarray(
        read_labels(
            setting.params,
            setting.batch,
            tokens,
            cut,
            candidates,
            setting.suppressed,
            policy=setting.policy,
            count=2,
            size=4,
        )
    )
    total = np.zeros((2, 3, 3))
    for i, n in enumerate(candidates.lengths):
        rows = np.zeros((2, 3, 8), np.int32)
        for b, g in np.ndindex(2, 3):
            row = [*tokens[b, g, : cut[b, g]], *candidates.tokens[i, :n]]
            rows[b, g, : len(row)] = row
        logprobs = np.asarray(setting.score(setting.params, rows, cut + n))
        for b, g in np.ndindex(2, 3):
            total[b, g, i] = logprobs[b, g, cut[b, g] : cut[b, g] + n].sum()
    share = np.exp(total) / np.exp(total).sum(axis=-1, keepdims=True)
    wanted = np.stack([share[..., 0] + share[..., 2], share[..., 1]], axis=-1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
