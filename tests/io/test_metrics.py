"""Metrics and checkpoints of a run that is stopped and goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import duration
from emor3_jax.io.metrics import MetricWriter, PhaseClock, memory
from emor3_jax.io.sinks import SINKS
from emor3_jax.io.sinks.tensorboard import read_events
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import make_mesh

FILES = "jsonl", "tensorboard"


def test_a_run_that_goes_on_drops_later_and_torn_lines(tmp_path):
    writer = MetricWriter(tmp_path, FILES)
    for step in range(4):
        writer.write(step, {"reward/overall": step / 2, "policy/kl": float("nan")})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    writer = MetricWriter(tmp_path, FILES, first_step=2)
    writer.write(2, {"reward/overall": 9.0})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1] == {"step": 1, "reward/overall": 0.5, "policy/kl": None}
    assert rows[2]["reward/overall"] == 9.0


def test_damaged_lines_are_counted_and_dropped(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "a": "\u2028"}\n'.encode()
    bad = (b"\0" * 40, b"[" * 100_000, b'{"step": 1, "\xe9": 0}', b"[]", b'{"step": null}')
    path.write_bytes(good + b"\n".join(bad) + b'\n{"step": 2, "re')
    SINKS["jsonl"](tmp_path, 2).amend(1, {"b": 1})
    assert "dropped 5 lines that are damaged" in caplog.text
    assert [json.loads(x) for x in path.read_text("utf-8").split("\n") if x] == [
        {"step": 1, "a": "\u2028", "b": 1}
    ]


def test_the_file_is_closed_after_each_step(tmp_path):
    # A mounted bucket keeps a file when it is closed: what is written next goes to a new one.
    writer = MetricWriter(tmp_path, FILES)
    writer.write(0, {"policy/kl": 1.0})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "first.jsonl")
    writer.write(1, {"policy/kl": 2.0})
    writer.close()
    for name, step in (("first", 0), ("metrics", 1)):
        (line,) = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(line) == {"step": step, "policy/kl": step + 1.0}


def test_what_is_made_up_for_is_added_to_the_last_step(tmp_path):
    (tmp_path / "none").mkdir()
    writer = MetricWriter(tmp_path, FILES)
    for step in range(2):
        writer.write(step, {"policy/kl": 1.0})
    writer.close()
    for _ in range(2):
        # The second time after a kill.
        writer = MetricWriter(tmp_path, FILES, first_step=2)
        writer.amend(1, {"eval/test/f1": 0.5, "eval/test/uar": float("nan")})
        writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert rows[1] == {"step": 1, "policy/kl": 1.0, "eval/test/f1": 0.5, "eval/test/uar": None}
    assert len(rows) == 2 and scalars(tmp_path)[2:] == [(1, "eval/test/f1", 0.5)]
    # Where somebody has taken the lines away.
    MetricWriter(tmp_path / "none", ("jsonl",)).amend(2, {"eval/test/f1": 0.5})
    line = (tmp_path / "none" / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 2, "eval/test/f1": 0.5}


class ListSink:
    """Holds what was written, in place of a custom sink."""

    def __init__(self, workdir, first_step):
        self.rows, self.opened, self.closed = [], (workdir, first_step), False

    def write(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.closed = True


def test_all_sinks_are_written_and_further_values_leave_the_json_lines_alone(tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(SINKS, "list", lambda *given: made.append(ListSink(*given)) or made[-1])
    writer = MetricWriter(tmp_path, ("jsonl", "list"), first_step=3)
    writer.write(3, {"policy/kl": float("inf"), "reward/overall": np.float32(0.5)})
    writer.add_events(3, {"evaluate/accuracy": 0.25, "evaluate/f1": None})
    writer.close()
    (sink,) = made
    assert sink.opened == (tmp_path, 3) and sink.closed
    assert sink.rows == [
        (3, {"policy/kl": None, "reward/overall": 0.5}),
        (3, {"evaluate/accuracy": 0.25, "evaluate/f1": None}),
    ]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "policy/kl": null, "reward/overall": 0.5}\n'
    assert not (tmp_path / "events").exists()


def scalars(workdir) -> list[tuple[int, str, float]]:
    """The values of all event files, those left out that a later start purged."""
    kept = []
    for event in read_events(workdir / "events"):
        if event.HasField("session_log"):
            kept = [value for value in kept if value[0] < event.step]
        kept += [(event.step, x.tag, x.simple_value) for x in event.summary.value]
    return kept


def test_events_are_on_the_disk_after_each_step_and_none_is_there_twice(tmp_path):
    writer = MetricWriter(tmp_path, ("tensorboard",))
    for step in range(4):
        writer.write(step, {"policy/kl": step / 2, "policy/loss": float("nan")})
    # Killed now, and cut short: nothing was closed.
    (path,) = (tmp_path / "events").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert scalars(tmp_path) == [(step, "policy/kl", step / 2) for step in range(3)]
    for _ in range(2):
        # The second time after its last step: the evaluation is not written again.
        writer = MetricWriter(tmp_path, ("tensorboard",), first_step=2)
        writer.write(2, {"policy/kl": 9.0})
        writer.add_events(2, {"eval/test/f1": 0.5})
        writer.close()
    writer = MetricWriter(tmp_path, ("tensorboard",), first_step=3)
    writer.add_events(2, {"eval/test/f1": 0.5, "eval/test/uar": 0.25})
    writer.close()
    wanted = [(0, "policy/kl", 0), (1, "policy/kl", 0.5), (2, "policy/kl", 9)]
    assert scalars(tmp_path) == [*wanted, (2, "eval/test/f1", 0.5), (2, "eval/test/uar", 0.25)]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    writer = MetricWriter(tmp_path, FILES)
    writer.write(0, {"policy/kl": 1.0})
    writer.add_events(0, {"policy/kl": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_phases_are_counted_by_lap_while_the_next_lap_goes_on():
    clock = PhaseClock()
    clock.mark("rollout", jnp.zeros(1))
    clock.mark("rollout", [jnp.zeros(1)])
    clock.mark("update", ())
    first = clock.lap()
    clock.mark("update", jnp.zeros(1))
    assert set(first.read()) == {"rollout", "update"}
    assert all(value >= 0 for value in first.read().values())
    assert set(clock.lap().read()) == {"update"}
    assert clock.lap().read() == {}
    clock.close()


def test_what_went_wrong_on_the_device_is_not_lost():
    clock = PhaseClock()
    deleted = jnp.zeros(1)
    deleted.delete()
    clock.mark("rollout", deleted)
    with pytest.raises(RuntimeError, match="deleted"):
        clock.lap().read()
    clock.close()


def test_memory_is_that_of_the_process():
    found = memory()
    assert 1e7 < found["memory/host_bytes"] <= found["memory/host_peak_bytes"] < 1e12


def test_durations():
    assert [duration(s) for s in (0.4, 59, 61, 3661)] == ["0s", "59s", "1m01s", "1h01m"]


def test_checkpoints_keep_the_newest_and_come_back_as_they_were(tmp_path):
    state = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "count": jnp.int32(3)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        moved = jax.tree.map(lambda x, step=step: x + step, state)
        checkpoints.save(step, moved, {"data": {"rows": step}})
    checkpoints.save(3, state, {"data": {}})  # already there: kept as it is
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == 3
    restored, progress = again.restore(3, state, make_mesh())
    again.close()
    np.testing.assert_array_equal(restored["params"]["kernel"], np.arange(6.0).reshape(2, 3) + 3)
    assert restored["count"] == 6 and progress == {"data": {"rows": 3}}
