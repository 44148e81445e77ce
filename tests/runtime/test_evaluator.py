"""Evaluations of a run: what is watched between them takes no more than it must."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import cpu_demo
from emor3_jax.evaluation.evaluation import Extras
from emor3_jax.runtime import evaluator as module
from emor3_jax.runtime.evaluator import Evaluator


class _Console:
    """Keeps what is told of progress."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def task(self, name: str, total: int, unit: str) -> "_Console":
        self.told.append((name, total, unit))
        return self

    def advance(self, rows: int) -> None:
        self.told.append((rows,))

    def __enter__(self) -> "_Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.told.append(("closed",))


class _Batches(list):
    @property
    def size(self) -> int:
        return sum(bool(row_id) for prompts in self for row_id in prompts.ids)

    def take(self, limit: int) -> "_Batches":
        return _Batches(self[:1])


def test_labels_are_weighed_before_and_after_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cpu_demo.get_config()
    assert config.evaluate.likelihood
    full = Extras(likelihood=lambda *_: None, values={"a": {"valence": 1.0}})
    seen: list[Extras] = []

    def evaluate(_: Any, params: dict, batches: Any, seed: int, *, extras: Extras, **__: Any):
        seen.append(extras)
        for _batch in batches:
            looked.append("used")

    looked: list[str] = []
    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "with_groups", lambda found, groups: found)
    monkeypatch.setattr(module.prepare, "make_evaluation_rollout", lambda *_: None)
    monkeypatch.setattr(module.prepare, "make_label_likelihood", lambda *_: full.likelihood)
    monkeypatch.setattr(module.prepare, "stated_values", lambda *_: full.values)
    batches = _Batches([SimpleNamespace(ids=("a", "b", "c")), SimpleNamespace(ids=("d", "e", ""))])
    data = SimpleNamespace(
        evaluate={"emoscenes": batches}, labels={"emoscenes": ()}, sources={"emoscenes": None}
    )
    evaluator, say = Evaluator(config, None, data, None), _Console()
    evaluator({}, ("emoscenes",), tmp_path, say, look=lambda: looked.append("looked"))
    assert say.told == [("emoscenes", 5, "rows"), (3,), (2,), ("closed",)]
    assert looked == ["looked", "used"] * 2
    evaluator({}, ("emoscenes",), tmp_path, say, limit=3, likelihood=False)
    assert say.told[4:] == [("emoscenes", 3, "rows"), (3,), ("closed",)]
    evaluator({}, ("emoscenes",), tmp_path, say, limit=3)
    assert seen == [full, full._replace(likelihood=None), full]
