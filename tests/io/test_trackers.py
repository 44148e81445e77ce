"""Weights & Biases and MLflow, offline: what a run that was stopped and goes on leaves there."""

import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

from emor3_jax.config import ConfigError, default
from emor3_jax.errors import UserError
from emor3_jax.io.sinks import SINKS, mlflow
from emor3_jax.prepare.checks import validate

CONFIG = {"steps": 4, "reward": {"terms": {"format": {"weight": 0.1}}}, "labels": []}


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/server")
    # Its newer stores need a database library that is no part of the small package.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # The sink sets it where it is not there.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "run"


def run_twice(name: str, workdir: Path) -> None:
    """Steps 0 to 2, then from 2 on again, with an evaluation after step 3."""
    for first, last in ((0, 2), (2, 3)):
        sink = SINKS[name](workdir, first)
        for step in range(first, last + 1):
            sink.write(step, {"reward/overall": step + first / 10, "policy/kl": None})
        sink.amend(last, {"eval/test/accuracy": 0.5})
        sink.close()
        # W&B names the folder of a start by its second.
        time.sleep(1.1 if name == "wandb" else 0)


def records(path: Path) -> Iterator[Record]:
    """Yields what W&B wrote: a log as LevelDB's, after a header of 7 bytes."""
    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield Record.FromString(part)
            part = b""


def test_wandb_goes_on_with_its_run(workdir: Path) -> None:
    run_twice("wandb", workdir)
    first, second = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    found, configs, names = [], [], set()
    for record in [*records(first), *records(second)]:
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            row = {name: json.loads(value) for name, value in row.items() if name[0] != "_"}
            found.append(row)
        if record.HasField("run"):
            names.add((record.run.run_id, record.run.display_name, record.run.project))
            configs.append({x.key: json.loads(x.value_json) for x in record.run.config.update})
    assert [row["step"] for row in found] == [0, 1, 2, 2, 2, 3, 3]
    assert found[2] == {"step": 2, "reward/overall": 2.0}
    assert found[4] == {"step": 2, "reward/overall": 2.2}
    assert found[6] == {"step": 3, "eval/test/accuracy": 0.5}
    assert names == {((workdir / "wandb_id").read_text(), "run", "emor3_jax")}
    assert configs[0]["steps"] == 4 and configs[0]["reward"] == CONFIG["reward"]


def test_mlflow_goes_on_with_its_run(workdir: Path) -> None:
    run_twice("mlflow", workdir)
    client = MlflowClient()
    run = client.get_run((workdir / "mlflow_run").read_text())
    found = client.get_metric_history(run.info.run_id, "reward/overall")
    assert [(x.step, x.value) for x in found] == [(0, 0), (1, 1), (2, 2), (2, 2.2), (3, 3.2)]
    assert run.data.metrics["eval/test/accuracy"] == 0.5
    assert "policy/kl" not in run.data.metrics
    assert run.data.params == {"steps": "4", "reward.terms.format.weight": "0.1", "labels": "[]"}
    assert run.info.status == "FINISHED" and run.info.run_name == "run"


def test_an_mlflow_server_that_fails_later_loses_values_alone(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink, tried = SINKS["mlflow"](workdir, 0), []
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"

    def fail(*given: object, **named: object) -> None:
        tried.append(named)
        raise MlflowException("no route to the server")

    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    sink.write(0, {"a": 1.0})
    sink.write(1, {"a": 1.0})
    sink.close()
    # The second step does not wait for the server again.
    assert len(tried) == 1
    assert caplog.text.count("is not written: no route") == 1
    assert "mlflow lacks 2 steps; metrics.jsonl has all" in caplog.text


def test_a_tracker_that_refuses_is_named_with_the_way_out(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "mlflow_run").write_text("no such run")
    with pytest.raises(UserError, match=r"log\.sinks='mlflow': .*set MLFLOW_TRACKING_URI.*delete"):
        mlflow.MlflowSink(workdir, 0)
    # Refused as the default is, a database that the small package cannot open.
    (workdir / "mlflow_run").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    with pytest.raises(UserError, match=r"'mlflow': .*MLFLOW_ALLOW_FILE_STORE=true$"):
        mlflow.MlflowSink(workdir, 0)

    def refuse(**settings: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nSee the docs.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"'wandb': No API key .*; .*WANDB_MODE=offline"):
        SINKS["wandb"](workdir, 0)

    def misread(**settings: object) -> None:
        raise ValueError("1 validation error for Settings\nmode\n  must be 'online' or 'offline'")

    monkeypatch.setattr(wandb, "init", misread)
    with pytest.raises(UserError, match=r"'wandb': 1 .* mode must be 'online' or 'offline'; log"):
        SINKS["wandb"](workdir, 0)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default()
    config.log.sinks = ("jsonl", "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.sinks=.*'wandb' is not installed.*pip install"):
        validate(config)
