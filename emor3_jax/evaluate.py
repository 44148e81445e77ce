"""Evaluates a policy folder, or a checkpoint of a run, on the sets of a config.

    python -m emor3_jax.evaluate --config=configs/cpu_demo.py --config.policy.path=FOLDER \\
        --workdir=DIR [--config.evaluate.checkpoint=RUN] [--config.evaluate.votes=8]

It writes `DIR/evaluation.json`, `evaluation.md`, `report.html`, and every response to
`DIR/predictions/<data set>.jsonl`, beside the config. During training the same code runs before,
between and after.
"""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.errors import UserError
from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io import report
from emor3_jax.io.console import Console
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.prepare.checks import check_batches, validate
from emor3_jax.runtime import cli, job
from emor3_jax.runtime.evaluator import Evaluator
from emor3_jax.runtime.restore import load_evaluated, load_judge_of_evaluation

OF_A_RUN = ("checkpoints", "metrics.jsonl", "evaluations.json")
"""Files of a run that an evaluation does not write."""


def main(config: ConfigDict, workdir: str | Path) -> dict[str, Evaluation]:
    """Evaluates a policy on `config.evaluate.sets`; see the module's docstring."""
    workdir = Path(workdir)
    validate(config)
    if any((workdir / name).exists() for name in OF_A_RUN):
        raise UserError(
            f"--workdir={str(workdir)!r}: holds a run, whose report would be overwritten; give "
            "another folder, and --config.evaluate.checkpoint= the run's, or "
            "--config.policy.path= its policy's folder, to evaluate its policy"
        )
    say = Console("evaluate")
    job.start_jax(config.log.compile_cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        return _evaluate(config, workdir, mesh, say)


def _evaluate(
    config: ConfigDict, workdir: Path, mesh: jax.sharding.Mesh, say: Console
) -> dict[str, Evaluation]:
    check_batches(mesh, config, ("evaluate",))
    policy = load_evaluated(config, say, mesh)
    judge = load_judge_of_evaluation(config, policy, say, mesh)
    processor = judge and judge.processor
    judges = prepare.JudgeProcessors(evaluation=processor)
    data = prepare.open_data(config, policy, mesh, judges=judges)
    evaluator = Evaluator(config, policy, data, mesh, processor)
    names = tuple(data.evaluate)
    say(f"evaluating on {', '.join(names)}")
    results = evaluator(policy.params, names, workdir / "predictions", say, judge=judge)
    if hosts.is_first():
        job.write_config(config, workdir / "predictions" / "config.json")
        images = {name: data.image(name) for name in data.evaluate}
        title = f"Evaluation of {config.evaluate.checkpoint or config.policy.path}"
        title += report.judged_by(prepare.judge_names(config)[1])
        report.write_report(workdir, title, {}, results, images)
    say.block(report.before_after_table({}, results))
    return results


if __name__ == "__main__":
    cli.run(main)
