"""Tokens whose probability has moved too far have no gradient, by hand."""

import math

import pytest
from support.one_token import one_token

from emor3_jax.rl.surrogates import DppoKl, DppoTv, Ipo


@pytest.mark.parametrize(
    ("kind", "old", "ratio", "advantage", "kept"),
    [
        # 0.5 → 0.6 and 0.8: up by 0.1 and 0.3.
        (DppoTv, 0.5, 1.2, 1.0, True),
        (DppoTv, 0.5, 1.6, 1.0, False),
        # A bad response may rise, and a good one fall.
        (DppoTv, 0.5, 1.6, -1.0, True),
        (DppoTv, 0.5, 0.4, 1.0, True),
        (DppoTv, 0.5, 0.4, -1.0, False),
        # A rare token: ten times as likely, but hardly anything has moved.
        (DppoTv, 0.001, 10.0, 1.0, True),
        # KL of (0.5, 0.5) from (0.8, 0.2) is 0.223, of (0.6, 0.4) 0.020.
        (DppoKl, 0.5, 1.6, 1.0, False),
        (DppoKl, 0.5, 1.2, 1.0, True),
        (DppoKl, 0.5, 1.6, -1.0, True),
        (Ipo, 0.5, 1.6, 1.0, False),
        (Ipo, 0.5, 1.6, -1.0, False),
        (Ipo, 0.5, 0.4, 1.0, False),
        (Ipo, 0.5, 1.2, -1.0, True),
    ],
)
def test_by_hand(kind, old, ratio, advantage, kept):
    loss, slope, metrics = one_token(kind(0.2, 0.2), ratio, advantage, old)
    wanted = -ratio * advantage if kept else 0.0
    assert slope == pytest.approx(wanted, rel=1e-4)
    assert loss == pytest.approx(wanted * math.log(old * ratio), rel=1e-4)
    masked = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert masked == (not kept)


def test_the_ratio_is_bounded():
    assert one_token(DppoTv(clip_dual=3.0), 10.0, 1.0, 0.001)[1] == pytest.approx(-3.0, rel=1e-5)
