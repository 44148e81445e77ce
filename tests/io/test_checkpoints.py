"""Checkpoints of a train state: what comes back, what stays, what a killed run leaves."""

import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emor3_jax.io import checkpoints as module
from emor3_jax.io.checkpoints import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    checksums,
    release,
)
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
    rule = r"1: has float32\[6\] as params/model/norm/scale, and this run needs float32\[8\]"
    with pytest.raises(CheckpointError, match=rule):
        checkpoints.restore(1, wider, mesh)
    # Adapters in the place of the weights; more than was saved, and less.
    with pytest.raises(CheckpointError, match="has nothing as params/model/lora_a, and this"):
        params = {"model": {"lora_a": jnp.ones((4, 2))}}
        checkpoints.restore_params(1, params, mesh)
    with pytest.raises(CheckpointError, match=r"as opt_state/.*, and this run needs nothing"):
        checkpoints.restore(1, state._replace(opt_state=()), mesh)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    # Reading a part of the parameters is no fault.
    part = {"model": {"norm": state.params["model"]["norm"]}}
    found = checkpoints.restore_params(1, part, mesh)
    np.testing.assert_array_equal(found["model"]["norm"]["scale"], jnp.ones(6))
    checkpoints.close()


@pytest.mark.parametrize("lost", ["", "state", "progress", "progress/metadata"])
def test_half_a_checkpoint_is_damaged(tmp_path, optimizer, lost):
    checkpoints, state = Checkpoints(tmp_path), make_state(optimizer)
    checkpoints.save(1, state, {})
    checkpoints.close()
    gone = tmp_path / "checkpoints/1" / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    (tmp_path / "checkpoints/1").mkdir(exist_ok=True)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(DamagedError, match=r"checkpoints/1: cannot be read"):
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


def flip(file: Path, place: float, bit: int = 3) -> None:
    """Flips one bit of a file, at a share of its length."""
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run with checkpoints of steps 1 and 2, closed."""
    optimizer = make_optimizer(1e-2)
    state = make_state(optimizer)
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        state = step(state, optimizer)
        checkpoints.save(number, state, {"data": {"row": number}})
    checkpoints.close()
    return tmp_path


def read_newest(workdir: Path) -> int:
    """Restores as a run does, and compares; returns the step that was taken."""
    optimizer = make_optimizer(1e-2)
    wanted = [make_state(optimizer)]
    for _ in range(2):
        wanted.append(step(wanted[-1], optimizer))
    checkpoints = Checkpoints(workdir)
    shapes = make_state(make_optimizer(1e-2))
    try:
        while True:
            latest = checkpoints.latest()
            try:
                state, _ = checkpoints.restore(latest, shapes, make_mesh())
            except DamagedError as error:
                checkpoints.give_up(latest, error)
            else:
                jax.tree.map(np.testing.assert_array_equal, state, wanted[latest])
                checkpoints.set_aside()
                return latest
    finally:
        checkpoints.close()


def test_a_checksum_tells_every_flipped_bit_and_exchanged_elements():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_):
        x = jnp.asarray(rng.integers(0, 2, (3, 5)), dtype)
        (before,) = checksums([x])
        raw = np.array(x)
        for place in range(15):
            flat = raw.copy().reshape(-1)
            if dtype == jnp.bool_:
                flat[place] ^= True
            else:
                flat.view(np.uint8)[place * x.dtype.itemsize] ^= 1 << (place % 8)
            assert checksums([jnp.asarray(flat.reshape(3, 5))])[0] != before
    pair = jnp.array([1.0, 2.0])
    assert checksums([pair])[0] != checksums([pair[::-1]])[0]


def test_no_flipped_bit_is_restored(saved):
    """Wherever in a checkpoint: it is named, and the one before it is used, or nothing changed."""
    wanted = saved / "wanted"
    shutil.copytree(saved / "checkpoints", wanted)
    rng, taken = np.random.default_rng(0), []
    files = files_of(saved / "checkpoints" / "2")
    for trial in range(40):
        file = files[trial % len(files)]
        if file.stat().st_size == 0:
            continue
        flip(file, rng.random(), int(rng.integers(8)))
        taken.append(read_newest(saved))
        shutil.rmtree(saved / "checkpoints")
        shutil.copytree(wanted, saved / "checkpoints")
    # What was read is what was written: some bits are of no consequence, as those of timestamps.
    assert set(taken) == {1, 2}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shutil.rmtree(folder / "state"),
        lambda folder: shutil.rmtree(folder / "progress"),
        lambda folder: [path.write_bytes(b"") for path in files_of(folder / "progress")],
        lambda folder: [path.write_bytes(path.read_bytes()[:7]) for path in files_of(folder)],
        lambda folder: (folder.with_name("999")).mkdir(),
        lambda folder: shutil.copytree(folder, folder.with_name("7")),
    ],
    ids=["no state", "no progress", "empty progress", "cut short", "empty 999", "copied as 7"],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(saved, caplog, damage):
    damage(saved / "checkpoints" / "2")
    intact = not any(path.name in ("7", "999") for path in (saved / "checkpoints").iterdir())
    assert read_newest(saved) == (1 if intact else 2)
    assert "the one before it is used" in caplog.text
    assert len(list((saved / "damaged").iterdir())) == 1
    # Its step can be written again.
    checkpoints = Checkpoints(saved)
    state = make_state(make_optimizer(1e-2))
    checkpoints.save(3, state, {})
    assert checkpoints.latest() == 3
    checkpoints.close()


def test_where_none_can_be_read_nothing_begins_anew(saved):
    for number in ("1", "2"):
        shutil.rmtree(saved / "checkpoints" / number / "progress")
    checkpoints = Checkpoints(saved)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints 1, 2 can be read"):
        checkpoints.latest()
    checkpoints.close()


def test_a_checkpoint_of_other_settings_is_no_damaged_one(saved):
    checkpoints = Checkpoints(saved)
    other = make_state(make_optimizer(1e-2, mu_dtype="bfloat16"))
    with pytest.raises(CheckpointError, match=r"has float32.* needs bfloat16.*policy.lora_rank"):
        checkpoints.restore(2, other, make_mesh())
    smaller = {"model": {"norm": {"scale": jnp.ones(3)}}}
    with pytest.raises(CheckpointError, match=r"has float32\[6\] as params/model/norm/scale"):
        checkpoints.restore_params(2, smaller, make_mesh())
    checkpoints.close()
