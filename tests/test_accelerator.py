"""The benchmark of a machine's limits: its programs take their arrays, its counts are right."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from emor3_jax import prepare
from emor3_jax.config import default

_GB = 1e9


@pytest.mark.parametrize(
    ("name", "unroll"), [*((name, False) for name in accelerator.PROGRAMS), ("decode", True)]
)
def test_the_programs_take_what_is_made_for_the_3b(name: str, unroll: bool) -> None:
    policy = accelerator.find_policy("3B")
    job = accelerator.make_job(name, policy, accelerator.Sizes(), unroll, "layers")
    result = jax.eval_shape(lambda *args: job.function(*args, **job.static), *job.args)
    again = job.again(result, job.args) if name == "update" else job.args
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, job.args)
    assert job.cost.flops > 1e13


def test_the_bytes_of_a_token_are_weights_prompts_and_what_each_response_has_cached() -> None:
    sizes = accelerator.Sizes()
    job = accelerator.make_job("decode", accelerator.find_policy("3B"), sizes, False, "layers")
    # 3.09 billion parameters of decoder and head; 36,864 bytes of keys and values a token.
    fixed = 2 * 3.086e9 + 16 * 512 * 36_864
    assert abs(job.bytes["asked for"] - fixed - 128 * 512 * 36_864) < 0.01 * _GB
    assert abs(job.bytes["least"] - fixed - 128 * 479.5 * 36_864) < 0.01 * _GB


def test_what_is_made_is_random_but_for_norms_biases_and_the_optimizer_s_state() -> None:
    leaf = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    tree = {name: {"kernel": leaf, "bias": leaf, "scale": leaf} for name in ("layer", "opt_state")}
    made = accelerator.fill(tree | {"mask": np.ones(3, bool), "nothing": None})
    spread = jax.tree.map(lambda x: (float(x.min()), float(x.max())), made)
    least, most = spread["layer"]["kernel"]
    assert -0.5 * 8**-0.5 <= least < 0 < most <= 0.5 * 8**-0.5
    assert spread["layer"]["bias"] == (0, 0) and spread["layer"]["scale"] == (1, 1)
    assert set(spread["opt_state"].values()) == {(0, 0)}
    assert made["mask"].dtype == bool and made["nothing"] is None


def test_the_update_is_the_default_config_s() -> None:
    policy = accelerator.find_policy("small")
    wanted = prepare.make_update_spec(default(), policy)
    found = accelerator.make_spec(policy, "layers")
    # Optimizers are functions, which cannot be compared.
    assert found == wanted._replace(optimizer=found.optimizer)
    assert (wanted.loss, wanted.kl_coef) == (accelerator.LOSS, accelerator.KL_COEF)
    assert (wanted.policy.compute.remat, wanted.logprobs.chunk) == ("layers", 1024)


def test_a_block_of_decoding_can_be_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert not accelerator.main(["--size=small", "--only=decode", "--runs=1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {4}
    assert rows[-1] == "| decode | kernels, all | no device events in the trace |"


def test_kernels_are_summed_by_name_on_the_streams_of_a_device_alone(tmp_path: Path) -> None:
    def named(kind: str, name: str, **place: int) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "args": {"name": name}, **place}

    def event(name: str, dur: float, pid: int, tid: int, **args: str) -> dict[str, Any]:
        return {"ph": "X", "name": name, "dur": dur, "pid": pid, "tid": tid, "args": args}

    events = [
        named("process_name", "/device:GPU:0", pid=1),
        named("process_name", "/host:CPU", pid=2),
        named("thread_name", "Stream #14(Compute)", pid=1, tid=3),
        named("thread_name", "XLA Ops", pid=1, tid=4),
        named("thread_name", "Stream #1", pid=2, tid=3),
        event("gemm", 2.0, 1, 3, hlo_op="dot.1"),
        event("gemm", 3.0, 1, 3, hlo_op="dot.2"),
        event("fusion", 6.0, 1, 3, hlo_op="fusion"),
        event("dot.1", 5.0, 1, 4),
        event("python", 9.0, 2, 3),
        {},
    ]
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "machine.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = accelerator.kernels(str(tmp_path))
    assert found == [(6.0, 1, "`fusion`"), (5.0, 2, "`gemm` (dot.1, dot.2)")]
    assert accelerator.kernels(str(tmp_path / "nothing")) == []
