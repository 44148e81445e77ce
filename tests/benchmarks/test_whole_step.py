"""The benchmark of whole steps: its runs are configs that there are, and it fails when they do."""

import math
import runpy
from pathlib import Path

import pytest

from benchmarks import accelerator, whole_step
from emor3_jax.prepare.checks import validate

GOOD = {"policy/loss": 0.5, "policy/grad_norm": 2.0, "time/step_s": 3.0}


@pytest.mark.parametrize("tiny", [True, False])
def test_its_flags_make_a_sound_config(tiny: bool, tmp_path: Path) -> None:
    given = whole_step.flags(tmp_path, "run", **whole_step.sizes(tiny))
    name, workdir, *fields = given
    assert workdir == f"--workdir={tmp_path / 'run'}"
    file = tmp_path / "config.py"
    assert name == f"--config={file}"
    config = runpy.run_path(str(file))["get_config"]()
    for field in fields:
        key, _, _ = field.removeprefix("--config.").partition("=")
        section, _, last = key.rpartition(".")
        holder = config
        for part in filter(None, section.split(".")):
            holder = holder[part]
        assert last in holder, key
    for key, value in whole_step.sizes(tiny).items():
        section, last = key.split(".")
        config[section][last] = value
    config.data.train.path = config.evaluate.sets.validation.path = "rows.parquet"
    validate(config)


@pytest.mark.parametrize(("loss", "agrees"), [(0.501, True), (0.55, False)])
def test_agreement_is_within_the_rounding_of_bfloat16(
    loss: float, agrees: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def run(program: str, arguments: list[str], platform: str = "") -> list[dict[str, float]]:
        asked.append((program, platform))
        return [GOOD if platform == "cpu" else GOOD | {"policy/loss": loss}]

    monkeypatch.setattr(whole_step, "run", run)
    assert whole_step.agreement(tmp_path, tiny=True) == agrees
    assert asked == [("sft", ""), ("sft", "cpu")]


@pytest.mark.parametrize(
    ("metrics", "good"),
    [
        ([GOOD] * 3, True),
        ([GOOD] * 2, False),
        ([GOOD | {"policy/grad_norm": 0.0}] * 3, False),
        ([GOOD, GOOD | {"policy/loss": math.nan}, GOOD], False),
    ],
)
def test_a_step_that_is_missing_or_not_finite_fails(
    metrics: list[dict[str, float]],
    good: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(whole_step, "run", lambda *_: metrics)
    assert whole_step.step(tmp_path, tiny=True) == good
    assert "| step | time/step_s | 3 |" in capsys.readouterr().out


def test_whole_steps_come_before_the_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(whole_step, "main", lambda argv: asked.append(argv) or 1)
    # Its failure is that of the whole, and nothing else was asked for.
    assert accelerator.main(["--size=small", "--only=step", "--dry"]) == 1
    assert asked == [["--size=small", "--tiny"]]


def test_vowels_tell_responses_apart() -> None:
    assert whole_step.share_of_vowels("aeb?", "joy") == 0.5
    assert whole_step.share_of_vowels("", "joy") == 0.0
