"""The reference: how it follows the policy, how it is kept, and the features of its images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from emor3_jax.config import default
from emor3_jax.learner import reference as module
from emor3_jax.learner.reference import Reference
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.params import cast_matrices
from emor3_jax.prepare import reference_settings
from emor3_jax.prepare.algorithm import make_reference


def make(**fields) -> Reference:
    config = default()
    config.reference.update(fields)
    return Reference(params(1.0), **reference_settings(config))


def params(value: float) -> dict:
    return {"a": {"kernel": jnp.full((2, 2), value)}, "b": {"scale": jnp.full(2, value)}}


def value(reference: Reference) -> float:
    (found,) = {float(x) for leaf in jax.tree.leaves(reference.params) for x in leaf.ravel()}
    return found


def test_a_frozen_reference_is_what_it_was_given():
    config, given = default(), params(1.0)
    config.policy.dtype = "float32"
    reference = Reference(given, **reference_settings(config))
    reference.follow(1, params(2.0))
    assert reference.params is given and not reference.follows


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, jnp.bfloat16),
        ({"reference.kind": "average"}, jnp.float32),
        ({"policy.lora_rank": 2}, jnp.float32),
        ({"reference.dtype": "float32"}, jnp.float32),
    ],
)
def test_its_matrices_are_kept_as_each_use_would_round_them(fields, kept):
    config = default()
    config.update_from_flattened_dict({"policy.dtype": "bfloat16"} | fields)
    found = Reference(params(1.0), **reference_settings(config)).params
    assert found["a"]["kernel"].dtype == kept and found["b"]["scale"].dtype == jnp.float32


def test_a_reference_is_refreshed_every_few_steps():
    reference = make(kind="refresh", every=3)
    seen = []
    for step in range(1, 8):
        now = params(float(step))
        reference.follow(step, now)
        # The next update gives the policy's memory up.
        jax.tree.map(lambda x: x.delete(), now)
        seen.append(value(reference))
    assert seen == [1, 1, 3, 3, 3, 6, 6]
    assert reference.follows


def test_an_average_by_hand():
    reference = make(kind="average", decay=0.75)
    for step, wanted in ((1, 0.75 + 0.25 * 5), (2, 0.75 * 2 + 0.25 * 5)):
        reference.follow(step, params(5.0))
        assert value(reference) == pytest.approx(wanted)


def test_no_reference_keeps_nothing():
    reference = make(kind="none")
    reference.follow(1, params(2.0))
    assert reference.params == {} and not reference.follows


@pytest.mark.parametrize("fields", [{"kl": "off"}, {"kl_coef": 0.0}])
@pytest.mark.parametrize("kind", ["frozen", "refresh", "average"])
def test_without_a_kl_no_reference_is_kept_cast_or_loaded(fields, kind, monkeypatch):
    config, given = default(), params(1.0)
    config.policy.dtype = "bfloat16"
    config.reference.kind, config.reference.image_cache = kind, 2**20
    config.policy_update.update(fields)
    monkeypatch.setattr(module, "cast_matrices", None)
    found = make_reference(config, LoadedPolicy(tiny.make_policy(), given))
    found.follow(1, given)
    assert found.params == {} and not found.follows and found.counters() == {}
    for programs in (found.cast_programs(given), found.follow_programs({}, given)):
        assert list(programs) == []


def test_matrices_alone_are_kept_in_bfloat16_and_share_no_memory():
    given = params(1.0 + 2**-10)
    found = cast_matrices(given, jnp.bfloat16)
    assert found["a"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["a"]["kernel"], np.ones((2, 2)))
    jax.tree.map(lambda x: x.delete(), given)
    np.testing.assert_array_equal(found["b"]["scale"], np.full(2, 1.0 + 2**-10, np.float32))
