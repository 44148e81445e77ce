"""Fixtures of `support.hostile_texts`, shared by the reward tests."""

import functools
from collections.abc import Callable

import jax
import pytest
from support import hostile_texts
from support import oracle as reward_oracle
from support.hostile_texts import LABELS, TOKENIZERS, Speller, speller_of

from emor3_jax import rewards


@pytest.fixture(scope="session", params=list(TOKENIZERS))
def speller(request) -> Speller:
    """One tokenizer of single bytes, one split as Qwen2 splits, one whose tokens straddle tags."""
    return speller_of(request.param)


@pytest.fixture(scope="session")
def straddling() -> Speller:
    """The tokenizer whose tokens straddle tags."""
    return speller_of("unsplit")


@pytest.fixture(scope="session")
def labels() -> tuple[str, ...]:
    return LABELS


@pytest.fixture(scope="session")
def build_tables() -> Callable[[Speller], rewards.Tables]:
    """The reward tables of a tokenizer, built once."""
    return functools.cache(
        lambda speller: jax.device_put(rewards.Scorer(speller.tokenizer, LABELS).tables)
    )


@pytest.fixture(scope="session")
def build_scorer(straddling) -> Callable[..., rewards.Scorer]:
    """Scorers of the straddling tokenizer, each built once."""
    return functools.cache(functools.partial(rewards.Scorer, straddling.tokenizer, LABELS))


@pytest.fixture(scope="session")
def tables(speller, build_tables) -> rewards.Tables:
    return build_tables(speller)


@pytest.fixture(scope="session")
def tools():
    """The functions that make and read such texts."""

    class Tools:
        make_text = staticmethod(hostile_texts.make_text)
        well_formed = staticmethod(hostile_texts.well_formed)
        pad = staticmethod(hostile_texts.pad)
        read_all = staticmethod(hostile_texts.read_all)
        rows, width = hostile_texts.ROWS, hostile_texts.WIDTH

    return Tools


@pytest.fixture(scope="session")
def oracle():
    """The rules in plain Python."""
    return reward_oracle
