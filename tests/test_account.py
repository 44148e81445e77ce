"""The program that prints the cost of a step."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import emor3_jax
from emor3_jax import account
from emor3_jax.config import ConfigError, default
from emor3_jax.flops import ShapeError

ROOT = Path(emor3_jax.__file__).parents[1]


def test_the_program_refuses_what_it_cannot_know() -> None:
    config = default()
    config.policy.path = "someone/policy"
    with pytest.raises(ConfigError, match=r"policy\.path='someone/policy': .*Qwen2\.5-VL-3B"):
        account.step_costs(config, None, None)
    config.policy.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(ShapeError, match="prompt_tokens=170: the text of a prompt takes 170"):
        account.step_costs(config, 170, None)


def test_the_program_prints_tables() -> None:
    command = [sys.executable, "-m", "emor3_jax.account", "--config=configs/qwen2_5_vl_3b.py"]
    command += ["--config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct"]
    done = subprocess.run(
        [*command, "--prompt_tokens=1024", "--response_tokens=256"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "512 prompts of 1024 tokens, 854 of them an image of 3416 patches" in done.stdout
    assert re.search(r"\| sum \| 9,238,042 \| 2,560 \| 1,536 \|", done.stdout)
    assert "release" not in done.stdout
    done = subprocess.run(
        [*command, "--prompt_tokens=9"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "error: prompt_tokens=9: " in done.stderr
