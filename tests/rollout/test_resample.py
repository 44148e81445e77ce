"""Dynamic sampling: useless groups give way to useful ones of further batches, within bounds."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.data.batch import Prompts
from emor3_jax.learner.scoring import compare_groups, terms_of
from emor3_jax.parallel.mesh import make_mesh, shard_batch
from emor3_jax.rollout.resample import resample
from emor3_jax.types import Batch, Experience, Images, Prompt, Samples, Scores

B, G = 4, 2


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


def prompts(number: int) -> Batch:
    """A batch whose every row holds its own number, counted over all batches."""
    own = np.arange(B, dtype=np.int32) + B * number
    patches = np.broadcast_to(own[:, None, None, None, None].astype(np.float32), (B, 1, 1, 4, 2))
    images = Images(patches, np.zeros((B, 1, 1, 4, 2), np.int32), np.ones((B, 1, 1, 4), bool))
    slots = np.stack([np.full(B, -1), np.zeros(B)], axis=1).astype(np.int32)
    column = np.repeat(own[:, None], 2, axis=1)
    prompt = Prompt(column, np.zeros((B, 2, 3), np.int32), np.ones((B, 2), bool), slots)
    grades = np.zeros((B, 2), np.float32)
    return Batch(prompt, own, own, images, own, own, own, grades, np.ones(B, np.float32))


def rolled_out(batch: Batch, rewards: Sequence[Sequence[float]]) -> Experience:
    """An experience whose arrays hold the numbers of their rows."""
    own = jnp.repeat(jnp.asarray(batch.last_token)[:, None], G, axis=1)
    value = own.astype(jnp.float32)
    reflections = {"coherence": value, "consistency": value}
    scores = Scores(value, value, value, reflections, own, own, {"mine": value})
    samples = Samples(own[..., None], value[..., None], own, own > 0)
    return Experience(batch, samples, None, scores, jnp.float32(rewards), value[:, :1])


def named(number: int) -> Prompts:
    return Prompts(prompts(number), tuple(f"row {i}" for i in number * B + np.arange(B)))


def stream() -> Iterator[Prompts]:
    for number in range(1, 10):
        yield named(number)


EQUAL, USEFUL = [0.5, 0.5], [0.0, 1.0]


def run(mesh, rounds: Sequence[Sequence[Sequence[float]]], tries: int):
    """Resamples the first of some rollouts, given by their rewards, from the others."""
    waiting, keys = iter(rounds[1:]), []
    put = partial(shard_batch, mesh=mesh)

    def again(batch, key):
        keys.append(jax.random.key_data(key).tolist())
        return rolled_out(batch, next(waiting))

    first = named(0)
    key = jax.random.key(0)

    def compare(experience):
        return compare_groups(terms_of(experience, [("mine", 1.0)]), name="grpo")

    found, experience, counts = resample(
        first, rolled_out(put(first.batch), rounds[0]), again, stream(), key, tries, put, compare
    )
    # Neither the first rollout's key nor one of those that it is split into.
    own = [jax.random.key_data(k).tolist() for k in (key, *jax.random.split(key, 4))]
    assert len({*map(tuple, keys), *map(tuple, own)}) == len(keys) + len(own)
    return found, experience, counts


def check_rows(found: Prompts, experience: Experience, rows: Sequence[int]) -> None:
    """Every array is of these rows, on the host and on the devices."""
    assert found.ids == tuple(f"row {i}" for i in rows)
    for batch in (found.batch, experience.batch):
        np.testing.assert_array_equal(batch.last_token, rows)
        np.testing.assert_array_equal(batch.images.patches[:, 0, 0, 0, 0], rows)
        np.testing.assert_array_equal(batch.prompt.tokens[:, 0], rows)
        np.testing.assert_array_equal(batch.prompt.image_slots[:, 1], np.zeros(B))
    scores = experience.scores
    for array in (experience.samples.lengths, scores.answer, scores.terms["mine"]):
        np.testing.assert_array_equal(array[:, 0], rows)
    np.testing.assert_array_equal(experience.greedy[:, 0], rows)


def test_all_equal_groups_are_replaced_in_place(mesh):
    rounds = [
        [USEFUL, EQUAL, EQUAL, USEFUL],
        [EQUAL, EQUAL, EQUAL, USEFUL],
        [USEFUL, EQUAL, USEFUL, EQUAL],
    ]
    found, experience, counts = run(mesh, rounds, tries=5)
    check_rows(found, experience, [0, 7, 8, 3])
    np.testing.assert_array_equal(experience.rewards, [USEFUL] * B)
    # 2 of the first round, 3 of the second, 2 of the third; one useful group had no place.
    assert counts["resample/rounds"] == 3
    assert counts["resample/dropped"] == 7
    assert counts["resample/surplus"] == 1
    assert counts["resample/left"] == 0
    assert counts["resample/reward_all"] == pytest.approx(0.5)


def test_a_useful_batch_is_left_alone(mesh):
    found, experience, counts = run(mesh, [[USEFUL] * B], tries=3)
    check_rows(found, experience, [0, 1, 2, 3])
    assert counts["resample/rounds"] == 1 and counts["resample/dropped"] == 0


def test_it_ends_where_no_group_is_ever_useful(mesh):
    found, experience, counts = run(mesh, [[EQUAL] * B] * 4, tries=3)
    check_rows(found, experience, [0, 1, 2, 3])
    assert counts["resample/rounds"] == 4
    assert counts["resample/dropped"] == 3 * B
    assert counts["resample/left"] == B


def test_it_goes_on_with_what_it_has(mesh):
    found, experience, counts = run(mesh, [[EQUAL] * B, [EQUAL, USEFUL, EQUAL, EQUAL]], tries=1)
    check_rows(found, experience, [5, 1, 2, 3])
    assert counts["resample/left"] == 3 and counts["resample/dropped"] == 4
