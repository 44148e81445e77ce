"""Labels that no response could earn are named before the first step."""

import dataclasses

import numpy as np
import pytest
from transformers import AddedToken

from emor3_jax.config import ConfigError
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.prepare.reachable import check_reachable
from emor3_jax.rewards import Reward, Scorer, Term
from emor3_jax.rewards.rules import LabelError
from emor3_jax.rollout.reflect import Reflection
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.tokens import suppressed_tokens

LABELS = ("joy", "a mild contentment")


def make_rollout(tokenizer, reply: int = 32, *, soft: bool = False, **fields: object) -> Rollout:
    sampling = Sampling(reply, 1.0, 1.0, ())
    return Rollout(
        None,
        Scorer(tokenizer, LABELS, reward=Reward(**fields)),
        suppressed_tokens(len(tokenizer), tokenizer),
        sampling,
        reflection=Reflection((), sampling, (8,), soft),
    )


@pytest.fixture
def tokenizer():
    return train_tokenizer(["joy, contentment and a quiet street: yes"] * 4, 320)


@pytest.mark.parametrize("fields", [{}, {"profile": "release"}, {"format": "boxed"}])
def test_ordinary_labels_can_be_earned(tokenizer, fields, caplog):
    term = Term("own", 1.0, text=lambda text, label: 1 / 0)
    check_reachable(make_rollout(tokenizer, terms=(term,), **fields))
    # 32 tokens are too few for three steps and a box.
    said = "rollout.max_tokens=32: the three steps" in caplog.text
    assert said == (fields.get("format") != "boxed")
    check_reachable(dataclasses.replace(make_rollout(tokenizer), reflection=None))


def test_a_reply_that_is_cut_is_named_with_the_length_that_it_needs(tokenizer):
    needed = len(tokenizer.encode(LABELS[1]))
    rule = rf"reflect.max_tokens={needed}: cuts the reply 'a mild .* give {needed + 1} or more"
    with pytest.raises(ConfigError, match=rule):
        check_reachable(make_rollout(tokenizer, needed))
    # Probabilities of replies need no room.
    check_reachable(make_rollout(tokenizer, needed, soft=True))
    check_reachable(make_rollout(tokenizer, needed + 1))


def test_a_label_that_the_sampler_cannot_spell_is_named(tokenizer):
    tokenizer.add_tokens([AddedToken("joy", special=True)])
    with pytest.raises(LabelError, match=r"label 'joy': the sampler cannot draw the token"):
        check_reachable(make_rollout(tokenizer))


def test_tags_that_are_tokens_added_as_text_can_be_earned(tokenizer):
    tags = [f"<{slash}step{i}>" for slash in ("", "/") for i in (1, 2, 3)]
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in tags])
    rollout = make_rollout(tokenizer)
    assert not np.any(rollout.suppressed[tokenizer.convert_tokens_to_ids(tags)])
    check_reachable(rollout)
