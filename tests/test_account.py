"""The program that prints the cost of a step."""

import json
import re
from pathlib import Path

import pytest
from support import program

from configs import gpu, qwen_vl, tpu_v5e
from emor3_jax import account
from emor3_jax.config import ConfigError, default
from emor3_jax.errors import UserError
from emor3_jax.flops import ShapeError
from emor3_jax.flops.seconds import Assumptions
from emor3_jax.parallel.mesh import MeshError


def test_the_program_refuses_what_it_cannot_know() -> None:
    config = default()
    config.policy.path = "someone/policy"
    with pytest.raises(ConfigError, match=r"policy\.path='someone/policy': .*Qwen2\.5-VL-3B"):
        account.step_costs(config, None, None)
    config.policy.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(ShapeError, match="prompt_tokens=170: the text of a prompt takes 170"):
        account.step_costs(config, 170, None)
    for wrong in (0, -5):
        with pytest.raises(ShapeError, match=f"response_tokens={wrong}: must be at least 1"):
            account.step_costs(config, None, wrong)


def test_a_judge_is_counted() -> None:
    config = qwen_vl.get_config()
    config.policy.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    policy, step, plain = account.step_costs(config, 1024, 256)
    assert "judge" not in plain and "Asked of" not in account.report(policy, step, plain)
    config.reflect.judge = "reference"
    _, _, costs = account.step_costs(config, 1024, 256)
    assert costs.pop("judge") == plain["vision"] + plain["prefill"] and costs == plain
    config.reflect.judge = "Qwen/Qwen3-VL-4B-Instruct"
    _, step, costs = account.step_costs(config, 1024, 256)
    # 3416 patches of 14 x 14 pixels are 654 tokens of 32 x 32, behind 16 of text.
    assert step.judge[2:5] == (670, 4 * 654, 670)
    assert costs["coherence"].flops > 1.2 * plain["coherence"].flops
    said = account.report(policy, step, costs)
    assert "Asked of Qwen/Qwen3-VL-4B-Instruct, which reads 670 tokens of each prompt, 654" in said
    assert re.search(r"\| judge \| 343,040 \| 512 \| 512 \|", said)
    config.reflect.judge = "someone/judge"
    with pytest.raises(ConfigError, match=r"reflect\.judge='someone/judge': is not on this"):
        account.step_costs(config, 1024, 256)


def test_the_program_prints_tables() -> None:
    command = ["emor3_jax.account", "--config=configs/qwen_vl.py"]
    command += ["--config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct"]
    done = program.run(*command, "--prompt_tokens=1024", "--response_tokens=256")
    assert done.returncode == 0, done.stderr
    assert "512 prompts of 1024 tokens, 854 of them an image of 3416 patches" in done.stdout
    assert re.search(r"\| sum \| 9,238,042 \| 2,560 \| 1,536 \|", done.stdout)
    assert "release" not in done.stdout
    done = program.run(*command, "--prompt_tokens=9")
    assert done.returncode == 2 and "error: prompt_tokens=9: " in done.stderr


def test_the_program_estimates_seconds_on_devices_that_are_not_here() -> None:
    command = ["emor3_jax.account", "--on=v5e-64"]
    done = program.run(*command, "--config=configs/tpu_v5e.py:3b,chips=64")
    assert done.returncode == 0, done.stderr
    said = re.match(r"An estimate, no measurement: (\d+) s a step on v5e-64\.", done.stdout)
    # The target of the release's settings on 64 chips.
    assert int(said[1]) <= 45


def test_the_estimate_of_the_program_before_is_that_of_a_simulation() -> None:
    """Of the engine's loop with a roofline, which has no waits for sums: 117 s."""
    config = tpu_v5e.get_config("3b,chips=64")
    # As slices were cut then.
    config.mesh.tensor, config.rollout.refill, config.policy_update.micro_prompts = 2, 64, 32
    # Without micro-batches of lengths of their own, refilled lanes and a ragged decode.
    then = "padding=0.13,lanes=0.38,fill=0.38,tail=0.001,places=20,chunk=32"
    before = account.estimate(config, "v5e-64", Assumptions().changed(then))
    roofline = sum(phase.seconds - phase.sums for phase in before.phases.values())
    assert roofline == pytest.approx(117, rel=0.1)


def test_an_estimate_refuses_the_collectives_of_other_devices(tmp_path: Path) -> None:
    config = tpu_v5e.get_config("3b,chips=64")
    file = tmp_path / "out.json"
    with pytest.raises(UserError, match="no such file"):
        account.estimate(config, "v5e-64", Assumptions(), file)
    program = {"name": "update", "calls": 2, "moved": {"all-gather": 35e9, "all-reduce": 35e9}}
    file.write_text(json.dumps({"topology": "v5e-64", "programs": [program]}))
    found = account.estimate(config, "v5e-64", Assumptions(links_share=1.0), file)
    # 70 GB each at 100 GB/s.
    update = found.phases["update"]
    assert update.links == update.sums == pytest.approx(0.7)
    with pytest.raises(UserError, match="is of v5e-64, not of on='v4-8'"):
        account.estimate(config, "v4-8", Assumptions(), file)
    # What was not compiled, or has no compiled text since it does not fit, is counted.
    counted = account.estimate(config, "v5e-64", Assumptions(links_share=1.0))
    assert found.phases["reference"] == counted.phases["reference"]
    assert "| compiled collectives | update | as given; others are counted |" in found.table()
    over = json.dumps({"topology": "v5e-64", "programs": [program | {"fits": False, "moved": {}}]})
    file.write_text(over)
    found = account.estimate(config, "v5e-64", Assumptions(links_share=1.0), file)
    assert found.phases == counted.phases
    for field, value in (("policy", "Qwen/Qwen2.5-VL-7B-Instruct"), ("micro_prompts", 64)):
        file.write_text(json.dumps({"topology": "v5e-64", "programs": [program], field: value}))
        with pytest.raises(UserError, match=f"is of {field}={value!r}, not of this config's"):
            account.estimate(config, "v5e-64", Assumptions(), file)
    wrong = '{"topology": "v5e-64", "programs": [{"name": "a", "calls": "x", "moved": {"b": 3}}]}'
    for text in (
        "# a page",
        "[]",
        wrong,
        '{"topology": "v5e-64"}',
        '{"programs": [{"name": "update"}]}',
    ):
        file.write_text(text)
        with pytest.raises(
            UserError, match=r"out\.json.*(must be a file that|is no JSON|must hold)"
        ):
            account.estimate(config, "v5e-64", Assumptions(), file)


def test_an_estimate_needs_devices_that_the_mesh_fits() -> None:
    with pytest.raises(MeshError, match=r"mesh\.fsdp=8.*there are 1 devices in h100-1"):
        account.estimate(gpu.get_config("gpus=8"), "h100-1", Assumptions())
    config = tpu_v5e.get_config("3b,chips=8")
    with pytest.raises(MeshError, match=r"config\.rollout\.refill=8: must be a multiple of"):
        account.estimate(config, "v5e-64", Assumptions())


def test_an_estimate_has_no_longer_texts_than_its_config() -> None:
    config = gpu.get_config("gpus=1")
    found = account.estimate(config, "h100-1", Assumptions())
    assert found.assumed.prompt_tokens == max(config.data.prompt_lengths) == 896
    assert "| prompt_tokens | 896 | the longest that the config allows |" in found.table()
    with pytest.raises(UserError, match=r"assume=prompt_tokens=1000: .*prompt_lengths, 896; lower"):
        account.estimate(config, "h100-1", Assumptions(prompt_tokens=1000))
    config.rollout.max_tokens = 128
    short = account.estimate(config, "h100-1", Assumptions())
    assert short.seconds < found.seconds and short.assumed.lengths.average < 128
    assert "once cut at 128 |" in short.table()
    assert account.shown_seconds(0.0123) == "0.012" and account.shown_seconds(35.4) == "35"


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (["--assume=padding=0.5"], "assume='padding=0.5': is of an estimate; name devices, --on"),
        (["--compiled=x.json"], "compiled='x.json': is of an estimate; name devices, --on"),
        (["--on=v5e-8", "--prompt_tokens=9"], "prompt_tokens=9: an estimate takes mean lengths"),
    ),
)
def test_flags_without_effect_are_refused(flags: list[str], said: str) -> None:
    command = ["emor3_jax.account", "--config=configs/emoset.py:v5e-8"]
    done = program.run(*command, *flags)
    assert done.returncode == 2 and f"error: {said}" in done.stderr
