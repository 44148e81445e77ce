import concurrent.futures
import io
import itertools
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from emor3_jax import models
from emor3_jax.data import encode, pipeline
from emor3_jax.data.errors import DataError
from emor3_jax.data.generic import FilesSource
from emor3_jax.data.pipeline import BatchSpec, Parts, eval_batches, train_batches
from emor3_jax.data.prompts import render_prompt
from emor3_jax.data.sources import ParquetSource, Texts
from emor3_jax.data.views import Joined
from emor3_jax.models.processor import ImageSettings, Processor

TEMPLATE = "{question} {labels}"
BUCKETS = {"prompt_lengths": (160, 240), "image_windows": (1, 4)}
GOOD = 11


@pytest.fixture(scope="module")
def clean(tmp_path_factory, make):
    """11 usable rows."""
    path = tmp_path_factory.mktemp("clean") / "a.parquet"
    make["parquet"](path, [make["row"](i) for i in range(GOOD)])
    return ParquetSource(path)


def faulty_rows(make) -> dict[str, list[dict]]:
    """Rows by the reason for which they must be left out."""
    image = {"bytes": make["png"](0), "path": None}
    return {
        "missing_field": [
            make["row"](0, answer=None),
            make["row"](0, problem=None),
            make["row"](0, images=[]),
            make["row"](0, images=None),
            make["row"](0, images=[{"bytes": None, "path": "gone.png"}]),
        ],
        "outside_file": [
            make["row"](0, images=[{"bytes": None, "path": path}])
            for path in ("../x.png", "/etc/passwd")
        ],
        "several_images": [
            make["row"](0, images=[image, image]),
            make["row"](0, problem="<image><image>which ?"),
        ],
        "video": [make["row"](0, problem="<video>which ?")],
        "empty_question": [make["row"](0, problem="<image> \n")],
        "special_token": [make["row"](0, problem="which <|image_pad|> ?")],
        "unknown_answer": [make["row"](0, answer="rage"), make["row"](0, answer="")],
        "unreadable_image": [
            make["row"](0, images=[{"bytes": b"no image", "path": None}]),
            make["row"](0, images=[{"bytes": make["png"](0)[:-40], "path": None}]),
            make["row"](0, images=[{"bytes": make["png"](0, 1, 300), "path": None}]),
        ],
        "large_image": [make["row"](0, images=[{"bytes": make["png"](0, 8, 128), "path": None}])],
        "long_question": [make["row"](0, problem="<image>" + "which ? " * 200)],
    }


@pytest.fixture(scope="module")
def dirty(tmp_path_factory, make):
    """11 usable rows among 19 others."""
    bad = list(itertools.chain.from_iterable(faulty_rows(make).values()))
    rows = [make["row"](i) for i in range(GOOD)]
    rows[3:3] = bad[:9]
    rows[-2:-2] = bad[9:]
    path = tmp_path_factory.mktemp("dirty") / "a.parquet"
    make["parquet"](path, rows)
    return ParquetSource(path)


@pytest.fixture
def train(processor, make):
    def call(source, **changes):
        options = {"batch_size": 2, "seed": 0, **BUCKETS} | changes
        spec = BatchSpec(**{k: options.pop(k) for k in BatchSpec._fields if k in options})
        return train_batches(source, processor, TEMPLATE, make["labels"], spec, **options)

    return call


@pytest.fixture
def evaluation(processor, make):
    def call(source, **changes):
        options = {"batch_size": 4, **BUCKETS} | changes
        spec = BatchSpec(**{k: options.pop(k) for k in BatchSpec._fields if k in options})
        return eval_batches(source, processor, TEMPLATE, make["labels"], spec, **options)

    return call


def ids_of(batches, count: int) -> list[str]:
    return [row_id for _, ids in itertools.islice(batches, count) for row_id in ids]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(train, clean):
    ids = ids_of(train(clean, batch_size=1), 3 * GOOD)
    epochs = [ids[i : i + GOOD] for i in range(0, len(ids), GOOD)]
    everything = sorted(texts.id for texts in clean.texts())
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_alone(train, clean):
    first = ids_of(train(clean, seed=5), 12)
    assert ids_of(train(clean, seed=5), 12) == first
    assert ids_of(train(clean, seed=5, batch_size=3), 8) == first
    assert ids_of(train(clean, seed=6), 12) != first
    # Not merely the next epoch of another seed.
    assert (
        ids_of(train(clean, seed=1, batch_size=1), GOOD)
        != (ids_of(train(clean, seed=0, batch_size=1), 2 * GOOD)[GOOD:])
    )


@pytest.mark.parametrize("source", ["clean", "dirty"])
@pytest.mark.parametrize("done", [0, 1, 8])
def test_resume_repeats_exactly(train, source, done, request):
    source = request.getfixturevalue(source)
    batches = train(source)
    ids_of(batches, done)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(9)]
    again = train(source)
    ids_of(again, 3)
    again.set_state(state)
    for batch, ids in expected:
        other, other_ids = next(again)
        assert ids == other_ids
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def test_epochs_of_whole_batches_resume_exactly(train, clean):
    # 11 rows in batches of 4: two batches an epoch.
    batches = train(clean, batch_size=4, drop_last=True)
    ids = ids_of(batches, 5)
    epochs = [ids[:8], ids[8:16], ids[16:]]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    state, expected = batches.get_state(), ids_of(batches, 2)
    again = train(clean, batch_size=4, drop_last=True)
    again.set_state(state)
    assert ids_of(again, 2) == expected
    with pytest.raises(DataError, match="order"):
        train(clean, batch_size=4).set_state(state)


def test_nothing_is_dropped_from_less_than_a_batch_or_from_groups(train, clean, caplog):
    assert ids_of(train(clean, batch_size=12, drop_last=True), 2) == ids_of(
        train(clean, batch_size=12), 2
    )
    assert "no batch is dropped" in caplog.text and "11 rows" in caplog.text


def test_resume_with_other_rows_or_seed_is_refused(train, clean, dirty, make, tmp_path):
    state = train(clean).get_state()
    with pytest.raises(DataError, match="seed=0, now it is 1"):
        train(clean, seed=1).set_state(state)
    make["parquet"](tmp_path / "b.parquet", [make["row"](i) for i in range(4)])
    with pytest.raises(DataError, match="rows=11, now it is 4"):
        train(ParquetSource(tmp_path / "b.parquet")).set_state(state)


@pytest.mark.parametrize("change", [-1, 1])
def test_image_tokens_that_are_not_the_features_name_the_row(train, clean, monkeypatch, change):
    def render(tokenizer, template, question, labels, n_image_tokens):
        return render_prompt(tokenizer, template, question, labels, n_image_tokens + change)

    monkeypatch.setattr(encode.prompts, "render_prompt", render)
    rule = f"a.parquet:.*has {4 + change} image tokens, but the image of 4 x 4 patches has 4"
    with pytest.raises(DataError, match=rule):
        next(train(clean))


def test_bad_rows_are_counted_by_reason_and_leave_no_holes(train, dirty, make):
    batches = train(dirty)
    ids = ids_of(batches, 4 * len(dirty) // 2)
    expected = {reason: len(rows) for reason, rows in faulty_rows(make).items()}
    # Only counted where accuracy is graded.
    expected["bad_distribution"] = 0
    # Only rows of VECBench have candidates.
    expected["unknown_candidate"] = 0
    # Only where responses are learned.
    expected["no_response"] = 0
    # Only where a judge reads images of its own.
    expected["judge_image"] = 0
    assert batches.stats.counts() == expected
    bad = {row_id for reason in encode.REASONS for row_id in batches.stats.ids(reason)}
    assert len(bad) == sum(expected.values())
    assert set(ids) == {texts.id for texts in dirty.texts()} - bad
    # A good row stands in for a bad one; the others keep their places, once in each epoch.
    turns = batches.rows
    epochs = [ids[i : i + turns] for i in range(0, len(ids) - turns + 1, turns)]
    assert turns > GOOD and len(epochs) > 1
    assert all(set(epoch) == set(ids) for epoch in epochs)


def test_another_row_of_its_group_stands_in_for_a_damaged_one(train, make, tmp_path):
    """The same one whatever else is read, so that the batches before and after stay as they are."""
    damaged = [{"bytes": b"no image", "path": None}]
    answers = ["joy", "joy", "joy", "fear", "fear", "fear"]
    rows = [make["row"](i, answer=answer) for i, answer in enumerate(answers)]
    paths = tmp_path / "whole.parquet", tmp_path / "damaged.parquet"
    make["parquet"](paths[0], rows)
    make["parquet"](paths[1], [*rows[:4], make["row"](4, answer="fear", images=damaged), rows[5]])
    parts = Parts((0, 6), (1.0,), (True,))
    found = []
    for path in paths:
        batches = train(ParquetSource(path), parts=parts)
        found.append([(ids, batch.answers) for batch, ids in itertools.islice(batches, 9)])
    replaced = 0
    for (ids, answers), (others, same) in zip(*found, strict=True):
        np.testing.assert_array_equal(answers, same)
        for mine, other in zip(ids, others, strict=True):
            if mine == "whole.parquet:4":
                assert other in ("damaged.parquet:3", "damaged.parquet:5")
                replaced += 1
            else:
                assert mine.split(":")[1] == other.split(":")[1]
    assert replaced == 3


def test_bad_rows_are_named_in_the_log_once(train, dirty, caplog):
    batches = train(dirty)
    ids_of(batches, 3 * len(dirty) // 2)
    messages = "\n".join(record.getMessage() for record in caplog.records)
    for reason in encode.REASONS:
        for row_id in batches.stats.ids(reason):
            assert len(re.findall(rf"{re.escape(row_id)}(?!\d)", messages)) == 1


def test_the_longest_prompt_that_fits_is_kept(train, processor, make, tmp_path):
    make["parquet"](tmp_path / "a.parquet", [make["row"](0)])
    source = ParquetSource(tmp_path / "a.parquet")
    question = source[0].texts.question
    # 16 x 16 pixels are 4 x 4 patches, so 4 image tokens.
    tokens = render_prompt(processor.tokenizer, TEMPLATE, question, make["labels"], 4)
    n = len(tokens) - 1
    batch, _ = next(train(source, prompt_lengths=(n,)))
    assert batch.prompt.mask.all() and batch.last_token.tolist() == [tokens[-1]] * 2
    with pytest.raises(DataError, match="1 long_question"):
        next(train(source, prompt_lengths=(n - 1,)))


def test_nothing_left_is_an_error_that_says_why(train, make, tmp_path):
    path = tmp_path / "a.parquet"
    make["parquet"](path, [make["row"](i, answer="rage") for i in range(5)])
    with pytest.raises(DataError, match=r"joy, Fear, anger: 5 unknown_answer .*parquet:0"):
        train(ParquetSource(path))
    make["parquet"](path, [])
    with pytest.raises(DataError, match="it has no rows"):
        train(ParquetSource(path))
    broken = [{"bytes": b"no", "path": None}]
    make["parquet"](path, [make["row"](i, images=broken) for i in range(5)])
    with pytest.raises(DataError, match="no usable row is left: 5 unreadable_image"):
        next(train(ParquetSource(path)))


def test_evaluation_has_every_row_once_in_order(evaluation, dirty):
    batches = evaluation(dirty, batch_size=3)
    for _ in range(2):
        out = list(batches)
        # A row that turns out bad leaves its place empty, so that the others keep theirs.
        assert [batch.last_token.shape for batch, _ in out] == [(3,)] * -(-batches.rows // 3)
        weights = np.concatenate([batch.weight for batch, _ in out])
        ids = [row_id for _, ids in out for row_id in ids]
        assert weights.sum() == GOOD and [bool(row_id) for row_id in ids] == (weights > 0).tolist()
        rows = [dirty.find(row_id) for row_id in ids if row_id]
        assert rows == sorted(rows) and len(set(rows)) == GOOD and ids[-1] == ""


def test_answers_are_compared_in_lower_case_and_stripped(evaluation, clean):
    answers = np.concatenate([batch.answers for batch, _ in evaluation(clean, batch_size=11)])
    assert answers.tolist() == [i % 3 for i in range(GOOD)]


def test_answers_are_worth_their_shares_where_that_is_asked(evaluation, train, make, tmp_path):
    shares = [
        [{"label": "Joy", "share": 6.0}, {"label": "anger", "share": 3.0}],
        [{"label": "fear", "share": 0.5}, {"label": "calm", "share": 0.5}],
        None,
        [{"label": "joy", "share": -1.0}, {"label": "fear", "share": 2.0}],
    ]
    rows = [make["row"](i, distribution=d) for i, d in enumerate(shares)]
    make["parquet"](tmp_path / "a.parquet", rows)
    source = ParquetSource(tmp_path / "a.parquet")
    # The third row has no shares and the fourth has a negative one.
    graded = evaluation(source, graded=True)
    assert graded.stats.ids("bad_distribution") == ["a.parquet:2", "a.parquet:3"]
    ((batch, _),) = graded
    assert batch.grades[:2].tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]
    ((batch, _),) = evaluation(source)
    assert batch.grades.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    with pytest.raises(DataError, match=r"bad_distribution.* or graded=False"):
        make["parquet"](tmp_path / "b.parquet", [make["row"](0)])
        train(ParquetSource(tmp_path / "b.parquet"), graded=True)


def test_a_limit_picks_the_same_rows_from_everywhere(evaluation, clean, make, tmp_path):
    batches = evaluation(clean, batch_size=2)
    few = batches.take(3)
    ids = ids_of(few, 99)
    assert len(ids) == 4 and ids[-1] == ""
    assert ids_of(few, 99) == ids == ids_of(evaluation(clean, batch_size=2, limit=3), 99)
    assert len(ids_of(few.take(8), 99)) == len(ids_of(few.take(0), 99)) == 4
    assert len(ids_of(batches.take(0), 99)) == 12
    make["parquet"](tmp_path / "b.parquet", [make["row"](i) for i in range(400)])
    big = ParquetSource(tmp_path / "b.parquet")
    rows = [big.find(row_id) for row_id in ids_of(evaluation(big, batch_size=40, limit=40), 99)]
    assert len(rows) == 40 and min(rows) < 40 and max(rows) > 360


def on_hosts(count: int, make_batches) -> list[list]:
    """What hosts read at the same time, in threads that stand for processes.

    `make_batches(host, exchange)` returns an iterable of batches.
    """
    barrier, given = threading.Barrier(count, timeout=60), [None] * count

    def read(host: int) -> list:
        def exchange(value):
            given[host] = json.dumps(value)
            barrier.wait()
            everything = [json.loads(text) for text in given]
            barrier.wait()
            return everything

        return list(make_batches(host, exchange))

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(read, range(count)))


def assert_parts_of(whole: list, parts: list[list], places: list[list[int]]) -> None:
    """Each host holds its rows of what one host would, and the ids of all."""
    for number, (batch, ids) in enumerate(whole):
        for own, part in zip(places, parts, strict=True):
            found, same_ids = part[number]
            assert same_ids == ids
            jax.tree.map(
                np.testing.assert_array_equal, found, jax.tree.map(lambda x, o=own: x[o], batch)
            )
    assert {len(part) for part in parts} == {len(whole)}


PLACES = [[0, 1, 4], [2, 3, 5]]
"""Rows of two hosts, as a mesh may lay them."""


@pytest.mark.parametrize("options", [{}, {"sort_by_size": True}, {"mixture": True}])
def test_hosts_read_the_parts_of_what_one_host_reads(train, clean, dirty, options):
    source, options = dirty, dict(options)
    if options.pop("mixture", False):
        source = Joined({"a": clean, "b": dirty})
        options["parts"] = Parts(source.starts, (1.0, 1.0), (False, True))

    def batches(**more):
        return itertools.islice(train(source, batch_size=6, **options, **more), 9)

    alone = train(source, batch_size=6, **options)
    whole = list(itertools.islice(alone, 9))
    stats = []

    def one_host(host, exchange):
        mine = train(source, batch_size=6, **options, host_rows=PLACES[host], exchange=exchange)
        stats.append(mine.stats)
        return itertools.islice(mine, 9)

    assert_parts_of(whole, on_hosts(2, one_host), PLACES)
    # What one of them left out, both have counted.
    assert [each.counts() for each in stats] == [alone.stats.counts()] * 2


def test_resume_with_another_number_of_hosts(train, dirty):
    one = train(dirty, batch_size=6)
    ids_of(one, 3)
    state = json.loads(json.dumps(one.get_state()))

    def one_host(host, exchange):
        mine = train(dirty, batch_size=6, host_rows=PLACES[host], exchange=exchange)
        mine.set_state(state)
        return itertools.islice(mine, 4)

    assert_parts_of(list(itertools.islice(one, 4)), on_hosts(2, one_host), PLACES)


@pytest.mark.parametrize("limit", [0, 2])
def test_hosts_share_an_evaluation(evaluation, dirty, limit):
    """Also where one of them has no row in the last batch, or in any."""
    whole = list(evaluation(dirty, batch_size=4, limit=limit))
    places = [[0, 1], [2, 3]]

    def one_host(host, exchange):
        options = {"limit": limit, "host_rows": places[host], "exchange": exchange}
        return evaluation(dirty, batch_size=4, **options)

    parts = on_hosts(2, one_host)
    assert_parts_of(whole, parts, places)
    if limit:
        assert parts[1][0][0].weight.sum() == 0


def test_worker_processes_give_the_same_batches(train, dirty):
    here, there = train(dirty), train(dirty, workers=1)
    try:
        for _ in range(8):
            (a, ids), (b, other_ids) = next(here), next(there)
            assert ids == other_ids
            jax.tree.map(np.testing.assert_array_equal, a, b)
        assert there.stats.counts() == here.stats.counts()
    finally:
        there.close()


def test_what_unblocks_signals_starts_before_the_first_worker(train, dirty, monkeypatch):
    started = []
    monkeypatch.setattr(pipeline.resource_tracker, "ensure_running", lambda: started.append(True))
    train(dirty)
    assert not started
    train(dirty, workers=1)
    assert started


def test_patches_in_bfloat16_come_out_of_worker_processes(processor, dirty, make):
    """One frame of each patch: a quarter of the bytes of what transformers' processor returns."""
    small = processor.with_dtype(jnp.bfloat16)
    spec = BatchSpec(2, **BUCKETS)
    batches = [
        train_batches(dirty, reader, TEMPLATE, make["labels"], each, seed=0)
        for reader, each in ((processor, spec), (small, spec._replace(workers=1)))
    ]
    try:
        (full, ids), (half, other_ids) = map(next, batches)
    finally:
        batches[1].close()
    assert ids == other_ids
    assert half.images.patches.dtype == jnp.bfloat16
    assert (
        half.images.patches.shape
        == full.images.patches.shape
        == (2, 1, *half.images.patches.shape[2:4], 48)
    )
    np.testing.assert_array_equal(half.images.patches, full.images.patches.astype(jnp.bfloat16))


def test_a_processor_of_another_policy_is_refused(clean, policy, tokenizer, make):
    other = Processor(tokenizer, ImageSettings(patch_size=14), policy.layout)
    with pytest.raises(DataError, match=r"patch_size: the processor has 14.*config\.json 4"):
        train_batches(clean, other, TEMPLATE, make["labels"], BatchSpec(1, **BUCKETS), seed=0)


def test_batch_gives_the_logits_of_the_arrays_of_transformers(
    tmp_path, policy, processor, evaluation, make
):
    """End to end: the padded prompt and its last token, against the hub's left-padded layout."""
    sizes = ((16, 16), (32, 24), (10, 30))
    rows = [
        make["row"](i, images=[{"bytes": make["png"](i, *size), "path": None}])
        for i, size in enumerate(sizes)
    ]
    make["parquet"](tmp_path / "a.parquet", rows)
    source = ParquetSource(tmp_path / "a.parquet")
    ((batch, _),) = evaluation(source, batch_size=3)
    params = policy.init(jax.random.key(0))
    features = policy.encode_images(params, batch.images)
    _, prefix = policy.read_prompt(params, batch.prompt, features)
    hidden, _ = policy.extend(
        params,
        prefix,
        batch.last_token[:, None, None],
        batch.next_position[:, None, None],
        jnp.ones((3, 1, 1), bool),
    )
    ours = policy.logits(params, hidden)[:, 0, 0]

    reader = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=256, max_pixels=1024)
    images = [Image.open(io.BytesIO(row["images"][0]["bytes"])) for row in rows]
    arrays = reader(images, return_tensors="np")
    prompts = [
        render_prompt(
            processor.tokenizer,
            TEMPLATE,
            source[i].texts.question,
            make["labels"],
            int(np.prod(grid)) // 4,
        )
        for i, grid in enumerate(arrays["image_grid_thw"])
    ]
    longest = max(map(len, prompts))
    theirs = models.forward_logits(
        models.LoadedPolicy(policy, params),
        np.array([[0] * (longest - len(tokens)) + tokens for tokens in prompts]),
        np.array([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts]),
        arrays["pixel_values"],
        arrays["image_grid_thw"],
    )
    np.testing.assert_allclose(ours, theirs[:, -1], atol=1e-4)


@pytest.mark.parametrize("workers", [(0, 2), pytest.param((2, 1), marks=pytest.mark.long)])
def test_resume_with_another_number_of_workers(train, dirty, workers):
    """The position is a number of rows, whoever read them; batches end at bad rows too."""
    before, after = workers
    done = int(np.random.default_rng(workers[0]).integers(1, 9))
    batches, again = train(dirty, workers=before), train(dirty, workers=after)
    try:
        ids_of(batches, done)
        state = json.loads(json.dumps(batches.get_state()))
        again.set_state(state)
        for _ in range(7):
            (a, ids), (b, other_ids) = next(batches), next(again)
            assert ids == other_ids
            jax.tree.map(np.testing.assert_array_equal, a, b)
        assert batches.get_state() == again.get_state()
    finally:
        batches.close()
        again.close()


def test_a_mixture_takes_turns_by_weight_and_resumes(train, clean, dirty):
    joined = Joined({"few": clean, "many": dirty})
    parts = Parts(joined.starts, (3.0, 1.0), (False, True))
    batches = train(joined, parts=parts, batch_size=4)
    ids = ids_of(batches, 33)
    # Turns go to rows, bad ones included, so those left out change the shares a little.
    share = np.mean([row_id.startswith("few/") for row_id in ids])
    assert 0.7 < share < 0.85
    assert set(ids) >= {f"few/{texts.id}" for texts in clean.texts()}
    again = train(joined, parts=parts, batch_size=4)
    state = batches.get_state()
    again.set_state(state)
    assert ids_of(again, 5) == ids_of(batches, 5)
    with pytest.raises(DataError, match="order="):
        train(joined, parts=parts._replace(weights=(1.0, 1.0))).set_state(state)


def test_labels_have_equal_turns_where_that_is_asked(train, make, tmp_path):
    # Eight of joy, one of each other.
    rows = [make["row"](i, answer="joy") for i in range(8)]
    rows += [make["row"](8, answer="fear"), make["row"](9, answer="anger")]
    make["parquet"](tmp_path / "a.parquet", rows)
    source = ParquetSource(tmp_path / "a.parquet")
    parts = Parts((0, 10), (1.0,), (True,))
    batches = train(source, parts=parts, batch_size=3)
    answers = [sorted(next(batches)[0].answers.tolist()) for _ in range(8)]
    assert answers == [[0, 1, 2]] * 8


def test_rows_of_like_size_share_a_batch(train, make, tmp_path):
    # Half the images take four windows, half one.
    def image(i: int) -> list[dict]:
        side = 16 if i % 2 else 32
        return [{"bytes": make["png"](i, side, side), "path": None}]

    make["parquet"](tmp_path / "a.parquet", [make["row"](i, images=image(i)) for i in range(96)])
    source = ParquetSource(tmp_path / "a.parquet")

    def windows(**options) -> list[int]:
        batches = train(source, batch_size=4, **options)
        return [next(batches)[0].images.mask.shape[2] for _ in range(24)]

    # By chance a batch of four holds a large one in 15 of 16 cases.
    assert windows().count(1) < 6
    assert windows(sort_by_size=True).count(1) >= 10
    ids = ids_of(train(source, batch_size=4, sort_by_size=True), 24)
    assert len(set(ids[:64])) == 64
    batches = train(source, batch_size=4, sort_by_size=True)
    ids_of(batches, 5)
    again = train(source, batch_size=4, sort_by_size=True, workers=2)
    again.set_state(batches.get_state())
    try:
        assert ids_of(again, 20) == ids_of(batches, 20)
    finally:
        again.close()


def test_a_question_that_is_too_long_loses_its_end(train, processor, make, tmp_path):
    long, short = "which emotion " * 60, "which ?"
    rows = [make["row"](0, problem=long), make["row"](0, problem=short)]
    make["parquet"](tmp_path / "a.parquet", rows)
    source = ParquetSource(tmp_path / "a.parquet")
    batches = train(source, cut_questions=True, prompt_lengths=(160,))
    batch, ids = next(batches)
    at = ids.index("a.parquet:0")
    text = processor.tokenizer.decode(batch.prompt.tokens[at][batch.prompt.mask[at]])
    assert "<|vision_end|>which emotion which" in text
    # The labels and the end of the turn stay; the prompt is as long as it may be, or nearly.
    assert text.endswith("joy, Fear, anger<|im_end|>\n<|im_start|>assistant")
    assert 155 < batch.prompt.mask[at].sum() <= 160
    assert batches.stats.questions_cut == 1 and batches.stats.counts()["long_question"] == 0
    # Where not even an empty question fits, the row is left out.
    with pytest.raises(DataError, match="2 long_question"):
        next(train(source, cut_questions=True, prompt_lengths=(40,)))


def test_the_next_batch_is_made_before_it_is_asked_for(train, dirty):
    """By one thread, and no more than one; what it leaves out counts when it is used."""
    asked, made = [], threading.Semaphore(0)

    def exchange(note):
        asked.append([row_id for _, row_id in note["rows"]])
        made.release()
        return [note]

    batches = train(dirty, exchange=exchange)
    _, first = next(batches)
    assert made.acquire(timeout=60) and made.acquire(timeout=60)
    assert len(asked) == 2 and asked[0] == list(first)
    assert batches.get_state()["position"] == 2
    skipped = dict(batches.stats.counts())
    _, second = next(batches)
    assert asked[1] == list(second)
    batches.close()
    # A position is that of what was used, whatever was made.
    again = train(dirty)
    again.set_state(train(dirty).get_state() | {"position": 2})
    assert next(again)[1] == second
    again.close()
    assert sum(skipped.values()) <= sum(batches.stats.counts().values())


def test_what_goes_wrong_in_making_a_batch_is_raised_when_it_is_asked_for(train, dirty):
    calls = itertools.count()

    def exchange(note):
        if next(calls) == 1:
            raise OSError("the disk is gone")
        return [note]

    batches = train(dirty, exchange=exchange)
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    batches.close()


def test_a_row_is_asked_with_its_candidates(tmp_path, make, processor):
    (tmp_path / "x.png").write_bytes(make["png"](1))
    asked = [("Fear", "joy"), ("joy", "rage"), ("joy", "anger"), ()]
    texts = [Texts("which ?", "Fear", str(i), candidates=each) for i, each in enumerate(asked)]
    source = FilesSource("x", [tmp_path / "x.png"] * 4, texts)
    spec = BatchSpec(2, **BUCKETS)
    batches = eval_batches(source, processor, TEMPLATE, make["labels"], spec)
    # A candidate that is no label, an answer that is no candidate.
    assert batches.stats.counts()["unknown_candidate"] == 2
    ((batch, ids),) = batches
    assert ids == ("0", "3")
    tokens = batch.prompt.tokens
    shown = [
        processor.tokenizer.decode(row[mask])
        for row, mask in zip(tokens, batch.prompt.mask, strict=True)
    ]
    assert "which ? Fear, joy" in shown[0] and "which ? joy, Fear, anger" in shown[1]
    # The answer is the label's number in the whole set.
    assert batch.answers.tolist() == [1, 1]
