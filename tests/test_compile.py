"""The program that compiles a config for TPU slices: what it refuses and what it prints."""

import errno
import importlib.util
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from support import program

import emor3_jax
from configs import emoset, gpu, tpu_v4, tpu_v5e, tpu_v5p, tpu_v6e, tpu_v7x
from configs.qwen_vl import POLICIES, Layout, on_slice
from emor3_jax import prepare
from emor3_jax.compile import check_output, find_place, listed, matches, write_output
from emor3_jax.errors import RunError, UserError
from emor3_jax.models import published
from emor3_jax.parallel import topology
from emor3_jax.parallel.mesh import axis_sizes, check_policy
from emor3_jax.prepare.checks import check_batches, validate

ROOT = Path(emor3_jax.__file__).parents[1]

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def _compile(*arguments: str) -> subprocess.CompletedProcess:
    return program.run("emor3_jax.compile", *arguments)


def test_an_unknown_slice_is_refused_with_the_known_ones() -> None:
    done = _compile("--config=configs/tpu_v4.py", "--topology=v4-7")
    assert done.returncode == 2
    assert "error: topology='v4-7': must be one of v4-8, v4-16" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (["--json=no/such/folder/out.json"], "json='no/such/folder/out.json': the folder is not"),
        (["--json=/"], "json='/': is a folder; name a file"),
        (["--search", "--only=update"], "only='update': --search compiles what it needs"),
        (["--search", "--json=out.json"], "json='out.json': --search compiles what it needs"),
        (["--only=,"], "only=',': names no program; leave it out to compile all"),
        (["--only=help,decode"], "only='help,decode': help lists the names"),
        (["--only=help", "--json=out.json"], "only='help': help lists the names"),
        (["--only=decode,", "update"], "'update': belongs to no flag; write --name=value"),
    ),
)
def test_flags_that_would_come_to_nothing_are_refused_before_a_compile(
    flags: list[str], said: str
) -> None:
    done = _compile("--config=configs/tpu_v4.py", "--topology=v4-8", *flags)
    assert done.returncode == 2 and f"error: {said}" in done.stderr


def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    (tmp_path / "there.json").write_text("{}")
    check_output(tmp_path / "there.json")
    assert (tmp_path / "there.json").read_text() == "{}"
    with pytest.raises(RunError, match="json='/dev/full': No space left on device; make room"):
        write_output(Path("/dev/full"), "{}")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"out\.json': Read-only file system; mend that"):
        check_output(tmp_path / "out.json")


@needs_compiler
def test_a_mesh_that_the_slice_does_not_have_is_refused() -> None:
    done = _compile("--config=configs/tpu_v4.py", "--topology=v4-8", "--config.mesh.fsdp=3")
    assert done.returncode == 2
    assert "error: mesh.data=1, mesh.fsdp=3" in done.stderr


@needs_compiler
def test_an_unknown_program_is_refused_with_the_known_ones() -> None:
    done = _compile("--config=configs/tpu_v4.py", "--topology=v4-8", "--only=decode_all")
    assert done.returncode == 2
    assert "error: only='decode_all': no program of this config. Programs: " in done.stderr
    assert " decode, " in done.stderr and " evaluate.decode, " in done.stderr
    assert "Whole families: evaluate." in done.stderr
    # It is told before anything is compiled, and the TPU's compiler says nothing of its own.
    assert "compil" not in done.stderr.partition("error: ")[0]
    assert "accelerator type" not in done.stderr


def test_the_names_of_programs_are_listed() -> None:
    said = listed(["weight_sync", "decode", "evaluate.decode", "evaluate.prefill"])
    assert said == (
        "Programs: weight_sync, decode, evaluate.decode, evaluate.prefill. "
        "Whole families: evaluate."
    )


def test_a_name_stands_for_its_program_or_its_family() -> None:
    assert matches("decode", "decode") and matches("evaluate", "evaluate.decode")
    assert matches("evaluate.decode", "evaluate.decode") and matches("shrink", "shrink.64x3")
    assert not matches("decode", "evaluate.decode") and not matches("dec", "decode")


@needs_compiler
@pytest.mark.loads_tpu_compiler
def test_the_kernels_of_a_run_are_compiled() -> None:
    config = tpu_v4.get_config()
    config.data.train.path = "train.parquet"
    policy = find_place(config, "v4-8").policy
    assert policy == prepare.with_attention(policy, config, "tpu")
    assert (policy.compute.attention, policy.compute.decode_attention) == ("splash", "ragged")


@needs_compiler
def test_decoding_of_the_3b_fits_a_v4_8(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = _compile(
        "--config=configs/tpu_v4.py",
        "--topology=v4-8",
        "--only=weight_sync,decode",
        f"--json={out}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiling decode\ncompiled decode: " in done.stderr
    assert "v4-8: 4 devices, each with 30.75 GiB for programs (32 GB a chip)" in done.stdout
    assert "\nfits, as far as compiled (2 of " in done.stdout
    found = json.loads(out.read_text())
    programs = {program["name"]: program for program in found["programs"]}
    assert list(programs) == ["weight_sync", "decode"]
    decode = programs["decode"]
    # 64 prompts and 128 responses of 2048 tokens of 36,864 bytes, on 4 devices, and their tokens.
    keys = (64 + 128) * 2048 * 36_864 // 4
    assert keys < decode["resident"]["cache"] < 1.01 * keys
    # AdamW's two moments of 3,754,622,976 parameters in float32; norms and biases are not cut.
    moments = 8 * 3_754_622_976 // 4
    assert moments < decode["resident"]["optimizer"] < 1.01 * moments
    # No token moves a weight. Each of the 128 tokens of a block sums the features of 64 lanes over
    # two devices, twice in 36 layers and where it is embedded, and gathers half of the logits.
    assert set(decode["moved"]) == {"all-reduce", "all-gather"}
    sums = 128 * (2 * 36 + 1) * 64 * 2048 * 2
    assert decode["moved"]["all-reduce"] == pytest.approx(sums, rel=0.01)
    logits = 128 * 64 * 151_936 / 2 * 4
    assert decode["moved"]["all-gather"] == pytest.approx(logits, rel=0.01)
    # Of the half of the bfloat16 weights that a device decodes with, half is its own already.
    assert programs["weight_sync"]["moved"]["all-gather"] == pytest.approx(
        2 * 3_754_622_976 / 4, rel=0.01
    )


LAYOUTS = {"3b": Layout(chips=4, tensor=2, most=4, slots=3, lanes=5, refill=2, micro=1)}


def test_a_config_follows_the_chips() -> None:
    config = on_slice("3b,chips=16", LAYOUTS)
    # 16 chips, two of which share a part of the batch.
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, -1, 2)
    assert (config.rollout.slots, config.rollout.lanes, config.rollout.refill) == (48, 80, 16)
    assert (config.policy_update.micro_prompts, config.evaluate.prompts) == (8, 256)
    assert (config.evaluate.slots, config.evaluate.refill) == (48, 16)
    assert config.policy.path == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert (config.rollout.prompts, config.rollout.responses) == (512, 8)
    assert on_slice("chips=16,slices=2", LAYOUTS).mesh.data == 2
    # Of more than 16 parts, more chips share one, up to four; those that are left hold copies.
    meshes = [(config.mesh.tensor, config.mesh.data) for config in _on(32, 64, 128, 256)]
    assert meshes == [(2, 1), (4, 1), (4, 2), (4, 4)]
    assert on_slice("chips=128,slices=2", LAYOUTS).mesh.data == 2
    # tensor stays within a slice, also where that has fewer chips.
    small = on_slice("chips=4,slices=4", LAYOUTS).mesh
    assert (small.tensor, small.data) == (1, 4)
    many = on_slice("chips=128,slices=64", LAYOUTS).mesh
    assert (many.tensor, many.data) == (2, 64)
    assert tpu_v4.get_config("7b,chips=32").policy.path == "Qwen/Qwen2.5-VL-7B-Instruct"


def _on(*chips: int) -> Iterator[ConfigDict]:
    for count in chips:
        yield on_slice(f"chips={count}", LAYOUTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("13b", "13b: must be of 3b, lora, chips=…, slices=…"),
        ("chips=0", "chips=0: must be of"),
        ("chips=12", "chips=12: must be a power of two .* divide the 256 prompts"),
        ("chips=3,slices=2", "chips=3: must be a power of two"),
        (
            "slices=3",
            "slices=3: must be a power of two that divides the 4 chips .*chips=8,slices=2",
        ),
        ("slices=8", "slices=8: must be a power of two that divides the 4 chips"),
        ("chips=²", "chips=²: must be of"),
        ("chips=٤", "chips=٤: must be of"),
        ("chips=" + "9" * 5000, "chips=9+: must be of"),
    ],
)
def test_an_unknown_option_of_a_config_is_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_slice(options, LAYOUTS)


@pytest.mark.parametrize("size", POLICIES)
@pytest.mark.parametrize("kind", [tpu_v4, tpu_v5e, tpu_v5p, tpu_v6e])
def test_chips_that_are_no_power_of_two_are_refused_by_name(kind: ModuleType, size: str) -> None:
    for chips in (3, 6, 12, 48, 96):
        with pytest.raises(ValueError, match=f"chips={chips}: must be a power of two"):
            kind.get_config(f"{size},chips={chips}")


@pytest.mark.parametrize("size", POLICIES)
@pytest.mark.parametrize("kind", [tpu_v4, tpu_v5e, tpu_v5p, tpu_v6e, tpu_v7x])
def test_every_slice_has_a_config_for_every_policy(kind, size):
    config = kind.get_config(size)
    assert config.policy.path == POLICIES[size]
    layout = kind.LAYOUTS[size]
    validate(config)
    for chips in (layout.chips, 16, 64, 256):
        config = kind.get_config(f"{size},chips={chips}")
        sizes = axis_sizes(config.mesh.to_dict(), chips * layout.devices, 1, "are others")
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        # Heads, widths and batches divide: these raise where a run would.
        check_policy(mesh, published(config.policy.path).shapes)
        check_batches(mesh, config)
    small, large = kind.get_config(f"{size},chips=64"), kind.get_config(f"{size},chips=64,lora")
    assert small.policy.path == large.policy.path and large.policy.lora_rank == 64
    # The largest image of a prompt of 2048 tokens, all of them of the image.
    policy = published(config.policy.path)
    patches = 2048 * policy.shapes.merge_unit
    side = int(patches**0.5) // 2 * 2
    windows = policy.layout.bucket((1, side, side))
    assert windows <= max(config.data.image_windows) <= windows + 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", ["gpus=8", "gpus=1", "gpus=1,memory=141"])
def test_the_config_of_gpus_is_sound_for_every_policy(policy: str, options: str) -> None:
    config = gpu.get_config(f"{options},{policy}")
    config.data.train.path = config.evaluate.sets.validation.path = "RELEASE"
    validate(config)
    assert config.policy.path == POLICIES[policy]
    gpus, rollout = config.mesh.fsdp, config.rollout
    held = [x for x in (rollout.slots, rollout.refill, rollout.lanes) if x]
    assert not any(x % gpus for x in (rollout.prompts, config.policy_update.micro_prompts, *held))
    # Three or four times the cache of the 3B for a token.
    assert (rollout.lanes < 128 * gpus) == policy.startswith("qwen3_vl")
    assert bool(config.policy.lora_rank) == (
        options == "gpus=1" or ("gpus=1" in options and policy in ("7b", "qwen3_vl_8b"))
    )


@pytest.mark.parametrize("machine", emoset.MACHINES)
def test_the_config_of_every_machine_is_sound_on_its_devices(machine: str) -> None:
    config = emoset.get_config(machine)
    config.data.train.path = config.evaluate.sets.emoset.path = "EmoSet-118K"
    config.evaluate.sets.emotion6.path = "Emotion6"
    validate(config)
    found = topology.parse(machine)
    sizes = [size for size in config.mesh.to_dict().values() if size != -1]
    assert found.device_count % math.prod(sizes) == 0
    parts = found.device_count // config.mesh.tensor
    for size in (
        *(config.rollout.prompts, config.rollout.slots, config.rollout.refill),
        *(config.policy_update.prompts, config.policy_update.micro_prompts),
        config.evaluate.prompts,
    ):
        assert size % parts == 0
    # 16 GB chips and one GPU of 80 GB hold adapters alone.
    assert bool(config.policy.lora_rank) == (machine in ("v5e-8", "h100-1"))


def test_the_page_of_the_3b_names_each_machine() -> None:
    page = (ROOT / "docs" / "train_3b.md").read_text()
    named = re.findall(r"^\|[^|]*\| `([\w-]+)` \|", page, re.MULTILINE)
    assert sorted(named) == sorted(emoset.MACHINES)


def test_an_unknown_machine_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="machine 'v5e-1': must be one of v4-8, v5e-8"):
        emoset.get_config("v5e-1")
    config = emoset.get_config("v5e-64,qwen3_vl_4b")
    assert config.policy.path == "Qwen/Qwen3-VL-4B-Instruct" and config.mesh.tensor == 4
    with pytest.raises(ValueError, match="gpus must be 1 or 8"):
        gpu.get_config("gpus=3")
    assert gpu.get_config("gpus=8,lora").policy.lora_rank == 64
