"""Questions put together on the device, and prefixes shared by a mask."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from emor3_jax.rollout import reflect
from emor3_jax.rollout.sampling import Sampling

S = 5
join = jax.jit(reflect.join_text)


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.lists(st.integers(1, 99), max_size=S), min_size=6, max_size=6),
    with_head=st.booleans(),
)
def test_join_is_head_text_tail(texts, with_head):
    head, tail = ([101, 102] if with_head else []), [103, 104, 105]
    padded = np.zeros((2, 3, S), np.int32)
    for i, text in enumerate(texts):
        padded[i // 3, i % 3, : len(text)] = text
    lengths = np.asarray([len(t) for t in texts], np.int32).reshape(2, 3)
    tokens, total = join(np.asarray(head, np.int32), padded, lengths, np.asarray(tail, np.int32))
    for i, text in enumerate(texts):
        wanted = head + text + tail
        row = np.asarray(tokens)[i // 3, i % 3]
        assert total[i // 3, i % 3] == len(wanted)
        assert row.tolist() == wanted + [0] * (len(row) - len(wanted))


def test_shared_prefix_hides_what_follows_the_image(setting):
    prefix = setting.prefix()
    shared = reflect.shared_prefix(prefix, jnp.asarray([5, 3]))
    assert shared.mask.sum(axis=1).tolist() == [5, 3]
    assert shared.k is prefix.k


def test_replies_do_not_depend_on_who_else_is_asked(setting):
    rng = np.random.default_rng(2)
    text = rng.integers(8, 60, (2, 3, S)).astype(np.int32)
    lengths = np.asarray([[5, 2, 4], [1, 5, 3]], np.int32)
    rule = Sampling(4, 0.0, 1.0, (7,))
    head, tail = jnp.asarray([11, 12]), jnp.asarray([13])

    def ask(prompts, text, lengths):
        asked = reflect.Asked(*prompts, head, tail, text, lengths)
        return reflect.ask(
            setting.policy,
            setting.params,
            asked,
            jax.random.key(0),
            jnp.arange(2),
            rule,
            setting.suppressed,
            size=S,
        )

    coherence = partial(ask, (None, None, None))
    shared = jnp.asarray([5, 5])
    consistency = partial(ask, (jax.jit(setting.prefix)(), shared, shared))
    for ask in (coherence, consistency):
        together = ask(text, lengths)
        for g in range(3):
            alone = ask(text[:, g : g + 1], lengths[:, g : g + 1])
            np.testing.assert_array_equal(together.tokens[:, g], alone.tokens[:, 0])
            np.testing.assert_allclose(together.logprobs[:, g], alone.logprobs[:, 0], atol=1e-5)
