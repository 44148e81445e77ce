"""Checkpoints of a train state: what comes back, what stays, what a killed run leaves."""

import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emor3_jax.io import checkpoints as module
from emor3_jax.io.checkpoints import CheckpointError, Checkpoints, release
from emor3_jax.parallel.mesh import make_mesh, param_shardings
from emor3_jax.rl.update import TrainState, apply_gradients, make_optimizer


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def optimizer(request) -> optax.GradientTransformation:
    """With the first moment in either type."""
    return make_optimizer(optax.linear_schedule(1e-2, 0.0, 10), mu_dtype=request.param)


def make_state(optimizer: optax.GradientTransformation) -> TrainState:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    params = {"model": {"embed_tokens": {"embedding": kernel}, "norm": {"scale": jnp.ones(6)}}}
    return TrainState.create(params, optimizer)


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


def step(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """An update whose gradient depends on the parameters and on how many there were."""
    grads = jax.tree.map(lambda x: jnp.sin(x) + state.updates, state.params)
    return apply_gradients(state, grads, optimizer)[0]


def test_a_restored_state_goes_on_exactly(tmp_path, optimizer):
    state = step(step(make_state(optimizer), optimizer), optimizer)
    progress = {"data": {"epoch": 1, "row": 7}, "evaluations": {"test": {"accuracy": 0.1}}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, progress)
    checkpoints.close()

    again, mesh = Checkpoints(tmp_path), make_mesh()
    fresh = make_state(optimizer)
    restored, told = again.restore(2, fresh, mesh)
    again.close()
    assert told == progress
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    wanted = param_shardings(fresh, mesh)
    assert jax.tree.map(lambda x: x.sharding, restored) == wanted
    ours, theirs = step(restored, optimizer), step(state, optimizer)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_restored_state_takes_the_place_of_the_fresh_one(tmp_path):
    optimizer = make_optimizer(1e-2)
    params = {"model": {"norm": {"scale": jnp.ones(100_000)}}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, TrainState.create(params, optimizer), {})
    # What is being written is held until it is.
    checkpoints.wait()
    # Parameters of its own, as what was just loaded.
    fresh = TrainState.create(jax.tree.map(jnp.zeros_like, params), optimizer)
    whole = live_bytes()
    shapes = release(fresh)
    # Parameters and two moments in float32.
    assert whole - live_bytes() == pytest.approx(3 * 400_000, abs=100)
    restored, _ = checkpoints.restore(1, shapes, make_mesh())
    checkpoints.close()
    assert live_bytes() == whole
    assert jax.tree.map(lambda x: x.shape, restored) == jax.tree.map(lambda x: x.shape, shapes)
    np.testing.assert_array_equal(restored.params["model"]["norm"]["scale"], np.ones(100_000))


def test_a_checkpoint_of_another_layout_is_not_read(tmp_path, optimizer, monkeypatch):
    state, mesh = make_state(optimizer), make_mesh()
    monkeypatch.setattr(module, "LAYOUT", 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {})
    assert checkpoints.restore(2, state, mesh)[1] == {}
    monkeypatch.undo()
    for read in (
        lambda: checkpoints.restore(2, state, mesh),
        lambda: checkpoints.restore_params(2, state.params, mesh),
    ):
        with pytest.raises(CheckpointError, match=r"checkpoints/2: .* version 1, .* reads 2; exp"):
            read()
    checkpoints.close()


def test_a_checkpoint_of_other_arrays_is_refused_naming_the_first(tmp_path, optimizer):
    state = make_state(optimizer)
    checkpoints, mesh = Checkpoints(tmp_path), make_mesh()
    checkpoints.save(1, state, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    wider = jax.tree.map(jnp.copy, state)
    wider.params["model"]["norm"]["scale"] = jnp.ones(8)
    rule = r"checkpoints/1: params/model/norm/scale is \(6,\), and in this run \(8,\); keep"
    with pytest.raises(CheckpointError, match=rule):
        checkpoints.restore(1, wider, mesh)
    # Adapters in the place of the weights; more than was saved, and less.
    with pytest.raises(CheckpointError, match="lora_a is not there, and in this run"):
        params = {"model": {"lora_a": jnp.ones((4, 2))}}
        checkpoints.restore_params(1, params, mesh)
    with pytest.raises(CheckpointError, match=r"opt_state/.* is .*, and in this run not there"):
        checkpoints.restore(1, state._replace(opt_state=()), mesh)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    # Reading a part of the parameters is no fault.
    part = {"model": {"norm": state.params["model"]["norm"]}}
    found = checkpoints.restore_params(1, part, mesh)
    np.testing.assert_array_equal(found["model"]["norm"]["scale"], jnp.ones(6))
    checkpoints.close()


@pytest.mark.parametrize("lost", ["", "state", "progress", "progress/metadata"])
def test_half_a_checkpoint_is_refused_naming_it(tmp_path, optimizer, lost):
    checkpoints, state = Checkpoints(tmp_path), make_state(optimizer)
    checkpoints.save(1, state, {})
    checkpoints.close()
    gone = tmp_path / "checkpoints/1" / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    (tmp_path / "checkpoints/1").mkdir(exist_ok=True)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoints/1: is not a whole checkpoint; delete"):
        checkpoints.restore(1, state, make_mesh())
    checkpoints.close()


def test_only_the_newest_stay_also_across_runs(tmp_path, optimizer):
    state = make_state(optimizer)
    for steps in ((1, 2, 3), (5, 8)):
        checkpoints = Checkpoints(tmp_path, keep=2)
        for number in steps:
            checkpoints.save(number, state._replace(updates=jnp.int32(number)), {})
        assert checkpoints.latest() == steps[-1]
        checkpoints.close()
        kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
        assert kept == list(steps[-2:])
    again = Checkpoints(tmp_path, keep=2)
    for number in (5, 8):
        assert again.restore(number, state, make_mesh())[0].updates == number
    again.close()


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path, optimizer):
    state = make_state(optimizer)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, state, {"data": {"row": 4}})
    checkpoints.close()
    # What a run that is killed while it writes step 6 leaves behind.
    torn = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "d").write_bytes(b"half")
    again = Checkpoints(tmp_path)
    assert again.latest() == 4
    assert again.restore(4, state, make_mesh())[1] == {"data": {"row": 4}}
    # The repeated step is written as if nothing had been there.
    again.save(6, state, {"data": {"row": 6}})
    assert again.latest() == 6
    assert again.restore(6, state, make_mesh())[1] == {"data": {"row": 6}}
    again.close()


def test_a_checkpoint_is_that_of_its_step_though_the_state_is_donated_meanwhile(
    tmp_path, optimizer, monkeypatch
):
    """Saving returns before the disk has it; the next update may take the memory."""
    written, go_on = [], threading.Event()
    checkpoints = Checkpoints(tmp_path)
    state = make_state(optimizer)
    kernel = np.array(state.params["model"]["embed_tokens"]["embedding"])
    donating = jax.jit(lambda state: step(state, optimizer), donate_argnums=0)
    manager = checkpoints._manager
    finalize = manager._finalize

    def held(*args):
        assert go_on.wait(60)
        written.append(args[0])
        return finalize(*args)

    monkeypatch.setattr(manager, "_finalize", held)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = donating(state)
    jax.block_until_ready(state)
    assert written == []
    go_on.set()
    assert checkpoints.latest() == 1 and written == [1]
    restored, _ = checkpoints.restore(1, make_state(optimizer), make_mesh())
    found = restored.params["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found, kernel)
    assert restored.updates == 0 and state.updates == 3
    checkpoints.close()
