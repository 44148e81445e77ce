"""The host runs ahead: what it does while the device updates, proven by an update that waits."""

import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_run import make_config, make_folder, read_metrics

from emor3_jax.data import pipeline
from emor3_jax.learner.learner import Learner
from emor3_jax.rollout import rollout
from emor3_jax.runtime import job, run
from emor3_jax.runtime.run import Run
from emor3_jax.train import train

PATIENCE = 60.0
"""Seconds until the held update ends by itself; the test then fails instead of hanging."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("overlap"))


def test_the_next_step_is_on_its_way_before_the_update_ends(folder, monkeypatch):
    """The update of step 2 ends only when the first program of step 3 was dispatched.

    If the host waited for it anywhere on the way there, it would not end.
    """
    config, workdir = make_config(folder), folder / "held"
    config.evaluate.every, config.checkpoint.every = 10, 10
    events, opened = [], threading.Event()

    def hold() -> np.ndarray:
        events.append("updated" if opened.wait(PATIENCE) else "gave up")
        return np.float32(0)

    @jax.jit
    def busy(x):
        return jax.lax.fori_loop(0, 1000, lambda _, x: x @ x * 1e-3, x)

    @jax.jit
    def held(x):
        return 0 * x[0, 0] + jax.pure_callback(hold, jax.ShapeDtypeStruct((), np.float32))

    @jax.jit
    def after(zero, tree):
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)

    # On CPU a program whose arguments are there is run at once, on the host's own thread: this one
    # has to wait for `busy`, so it is queued as a device would.
    square = jax.numpy.ones((300, 300))
    held.lower(square).compile()

    update, put, collate, prefill = (
        Learner.update,
        run.shard_batch,
        pipeline.collate,
        rollout.prefill,
    )

    def slow_update(self, state, part):
        state, metrics = update(self, state, part)
        # Two updates a step: this is the last one of step 2.
        if events.append("update") or events.count("update") == 4:
            return after(held(busy(square)), (state, metrics))
        return state, metrics

    def note(name, function):
        def noted(*args, **options):
            result = function(*args, **options)
            events.append(name)
            return result

        return noted

    def dispatched(*args, **options):
        result = prefill(*args, **options)
        if events.count("update") == 4 and not opened.is_set():
            events.append(f"dispatched, logged {read_metrics(workdir)[-1]['step']}")
            opened.set()
        return result

    monkeypatch.setattr(Learner, "update", slow_update)
    monkeypatch.setattr(run, "shard_batch", note("put", put))
    monkeypatch.setattr(pipeline, "collate", note("collated", collate))
    monkeypatch.setattr(rollout, "prefill", dispatched)
    assert train(config, workdir)
    begun = [i for i, event in enumerate(events) if event == "update"][3]
    before, meanwhile = events[:begun], events[begun + 1 : events.index("updated")]
    # Those of the first two steps; an evaluation puts its own.
    assert before.count("put") == 2
    assert [x for x in meanwhile if x != "collated"] == ["put", "dispatched, logged 1"]
    # By a thread, meanwhile or before.
    assert (before + meanwhile).count("collated") >= 2 + 3
    assert [row["step"] for row in read_metrics(workdir)] == [0, 1, 2, 3]


def test_logging_launches_nothing_on_the_device(folder, monkeypatch):
    """Of an emptied cache of programs, whatever is launched must be compiled, and is counted."""
    config = make_config(folder)
    config.steps, config.evaluate.every, config.checkpoint.every = 2, 10, 10
    config.policy_update.kl_place, config.policy_update.kl_target = "reward", 1e-3
    record, put, counter, launched = Run.record, run.shard_batch, job.CompileCounter(), []

    def putting(*args):
        with jax.transfer_guard("allow"):
            return put(*args)

    def recorded(self, step, *args):
        if step == 1:  # there is no step before it to log
            record(self, step, *args)
            return
        jax.clear_caches()
        before = counter.count
        # Nor is anything sent to it but the next batch.
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            record(self, step, *args)
        launched.append(counter.count - before)

    monkeypatch.setattr(Run, "record", recorded)
    monkeypatch.setattr(run, "shard_batch", putting)
    assert train(config, folder / "quiet")
    assert launched == [0]
    # The count is worth something.
    jax.clear_caches()
    before = counter.count
    jax.numpy.mean(np.ones(3, np.float32))
    assert counter.count > before
