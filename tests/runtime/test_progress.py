"""What a run tells of its progress: the phase at work, lines of steps and of evaluations."""

import jax.numpy as jnp

from emor3_jax.evaluation.records import Evaluation
from emor3_jax.runtime.progress import StepClock, evaluation_lines
from emor3_jax.runtime.step_log import progress_line

STEP = {
    "reward/overall": 0.5,
    "reward/format": 1.0,
    "reward/accuracy": 0.25,
    "reward/coherence": 0.125,
    "reward/consistency": 0.75,
    "policy/kl": 0.0625,
    "time/step_s": 7.5,
    "time/rollout_s": 3.0,
    "response/length_mean": 45.25,
}


def test_the_phase_at_work_is_told_in_the_order_of_the_step_before() -> None:
    told: list[str] = []
    clock = StepClock(lambda: None, told.append)
    clock.restart()
    for _ in range(2):
        for phase in ("rollout", "rollout", "update"):
            clock.mark(phase, jnp.zeros(1))
        clock.lap().read()
    clock.restart()
    clock.close()
    assert told[0] == "compiling" and told[1] == "rollout" and told[-1] == "rollout"
    # In the second step each end tells what follows.
    assert told[-7:-1] == ["rollout", "update", "rollout", "update", "update", "rollout"]


def test_a_line_of_a_step_fits_a_terminal() -> None:
    plain = progress_line(7, 100, STEP, "3m")
    assert plain == (
        "step 7/100  reward 0.500 (format 1.00  accuracy 0.25  coherence 0.12  consistency 0.75)  "
        "kl 0.062  7.50 s (rollout 3.00)  left 3m"
    )
    assert progress_line(7, 100, STEP, "3m", 60) == (
        "step   7/100    7.50 s  reward 0.500  accuracy 0.25"
    )
    assert progress_line(7, 100, STEP, "3m", 200).endswith(
        "consistency 0.75  kl 0.062  tokens 45.2"
    )
    tuning = {"policy/loss": 1.5, "time/step_s": 12.0, "response/length_mean": 9.0}
    assert progress_line(3, 5, tuning, "1s", 80) == "step 3/5   12.00 s  loss 1.500  tokens 9.0"


def test_a_line_of_an_evaluation_has_rows_and_interval() -> None:
    metrics = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "rows": 12.0}
    found = {"a": Evaluation(metrics | {"format": 1.0}, []), "b": Evaluation({"accuracy": 1.0}, [])}
    first = "a: accuracy 0.500 (95 % 0.250 to 0.750, 12 rows)"
    assert evaluation_lines(found) == [f"{first}  format 1.000", "b: accuracy 1.000"]
    assert evaluation_lines(found, len(first) + 13) == [first, "b: accuracy 1.000"]
