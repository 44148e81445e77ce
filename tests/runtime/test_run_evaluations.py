"""Evaluations of a run: what is watched between them takes no more than it must."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import cpu_demo
from emor3_jax.evaluation.evaluation import Extras
from emor3_jax.runtime import run as runtime


def test_labels_are_weighed_before_and_after_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cpu_demo.get_config()
    assert config.evaluate.likelihood
    config.evaluate.groups = ConfigDict()
    seen: list[Extras] = []

    def evaluate(*_: Any, extras: Extras, **__: Any) -> None:
        seen.append(extras)

    monkeypatch.setattr(runtime, "evaluate", evaluate)
    monkeypatch.setattr(runtime, "with_groups", lambda found, groups: found)
    full = Extras(likelihood=lambda *_: None, values={"a": {"valence": 1.0}})
    fake = SimpleNamespace(
        workdir=tmp_path,
        config=config,
        data=SimpleNamespace(evaluate={"emoscenes": SimpleNamespace(take=lambda limit: [])}),
        put=None,
        _extras={"emoscenes": full},
        _rollouts={"emoscenes": None},
        _judges=SimpleNamespace(of_evaluation=lambda learner: None),
        _learner=None,
        _until_stopped=lambda rows: rows,
    )
    runtime.Run._evaluate(fake, {}, ("emoscenes",), 0)
    runtime.Run._evaluate(fake, {}, ("emoscenes",), 20, 200)
    assert seen == [full, full._replace(likelihood=None)]
