"""Evaluations of a run: what is watched between them takes no more than it must."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from configs import cpu_demo
from emor3_jax import evaluate, replay
from emor3_jax.errors import UserError
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.runtime import run as runtime


@pytest.mark.parametrize(("rows", "limit"), [(-1, 0), (50, 50), (0, None)])
def test_before_training_as_many_rows_are_evaluated_as_asked(rows: int, limit: int | None) -> None:
    config = cpu_demo.get_config()
    assert config.evaluate.before == -1
    config.evaluate.before = rows
    seen: list[tuple] = []

    def record(*given: Any) -> dict:
        seen.append(given)
        return {}

    fake = SimpleNamespace(
        config=config, say=lambda line: None, _evaluate=record, _say_evaluated=lambda found: None
    )
    assert runtime.Run._evaluate_before(fake, {}) == {}
    assert seen == ([] if limit is None else [({}, ("emoscenes", "shifted"), 0, limit)])


def test_a_run_keeps_its_report(tmp_path: Path) -> None:
    """Its folder is known by any of the files that an evaluation does not write."""
    for name in evaluate.OF_A_RUN:
        workdir = tmp_path / name
        (workdir / name).mkdir(parents=True)
        with pytest.raises(UserError, match=r"holds a run.* --config.policy.path= its policy's"):
            evaluate.main(cpu_demo.get_config(), workdir)


def test_lines_are_found_out_under_a_mesh_that_is_not_left_set() -> None:
    meshes = []

    def lines() -> Any:
        for line in "ab":
            meshes.append(jax.sharding.get_mesh())
            yield line

    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    for _ in replay._under(mesh, lines()):
        assert jax.sharding.get_mesh().empty
    assert meshes == [mesh, mesh]
    assert jax.sharding.get_mesh().empty
