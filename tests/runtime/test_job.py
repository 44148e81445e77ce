"""A run's folder: its lock, and settings that changed."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emor3_jax.config import default
from emor3_jax.errors import UserError
from emor3_jax.runtime import job

HOLD = """
import sys, time
from pathlib import Path
from emor3_jax.runtime.job import WorkdirLock
lock = WorkdirLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_told_who_is_at_work(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"process {holder.pid} on .* is at work there"):
        job.WorkdirLock(tmp_path)
    # Killed, it leaves no lock behind.
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 10
    while True:
        try:
            lock = job.WorkdirLock(tmp_path)
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            break
    lock.release()
    job.WorkdirLock(tmp_path).release()


def test_changed_settings_are_shown_and_need_a_word(tmp_path: Path) -> None:
    config = default()
    job.check_settings(config, tmp_path)
    job.keep_config(config, tmp_path)
    config.steps, config.log.every, config.mesh.fsdp = 7, 3, 2
    config.rollout.slots, config.policy_update.micro_prompts = 4, 2
    job.check_settings(config, tmp_path)
    config.profile, config.policy_update.kl_coef = "release", 0.5
    said = (
        r"other settings\n  policy_update.kl_coef: 0.01 before, 0.5 now\n  profile: \"paper\" bef"
    )
    with pytest.raises(UserError, match=said):
        job.check_settings(config, tmp_path)
    config.checkpoint.resume_changed = True
    job.check_settings(config, tmp_path)


def test_to_state_what_the_profile_decides_is_no_change(tmp_path: Path) -> None:
    config = default()
    config.reflect.max_tokens, config.data.templates.coherence = 8, "qwen"
    job.keep_config(config, tmp_path)
    config = default()
    job.check_settings(config, tmp_path)
    config.reflect.max_tokens = 9
    with pytest.raises(UserError, match=r"settings\n  reflect.max_tokens: 8 before, 9 now\ntake"):
        job.check_settings(config, tmp_path)
    config.profile, config.reflect.max_tokens = "release", 0
    with pytest.raises(UserError, match='coherence: "qwen" before, "" now\n  profile'):
        job.check_settings(config, tmp_path)


def test_what_an_older_version_did_not_know_is_no_change(tmp_path: Path) -> None:
    config = default()
    job.keep_config(config, tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    del written["policy_update"]["mu_dtype"]
    path.write_text(json.dumps(written))
    job.check_settings(config, tmp_path)
    # Keys that no config can have.
    path.write_text('{"a.b": 1, "mesh": 3}')
    job.check_settings(config, tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"null", b"[" * 100_000, b"\xff\xfe{\0", b"\xe9", b"\0" * 9]
)
def test_a_config_of_a_run_that_is_damaged_is_named(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"config.json .*; or delete it to go on unchecked"):
        job.check_settings(default(), tmp_path)
    with pytest.raises(UserError, match=r"config.json "):
        job.read_config(tmp_path)


@pytest.mark.parametrize("text", ['{"mesh": 3}', '{"evaluate": {"sets": []}}', '{"steps": "3"}'])
def test_a_section_of_another_kind_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json: is no config of this program"):
        job.read_config(tmp_path)


def test_what_is_no_file_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run; name the folder of one"):
        job.read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    for read in (job.read_config, lambda folder: job.check_settings(default(), folder)):
        with pytest.raises(UserError, match=r"config.json is a folder"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("name", "is_folder", "said"),
    [
        ("checkpoints", False, "a run keeps a folder of the name checkpoints there"),
        ("policy", False, "a run keeps a folder of the name policy there"),
        ("report.html", True, "a run keeps a file of the name report.html there"),
    ],
)
def test_a_folder_in_which_a_run_would_fail_late_is_refused(
    name: str, is_folder: bool, said: str, tmp_path: Path
) -> None:
    job.check_names(tmp_path)
    (tmp_path / name).mkdir() if is_folder else (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=said):
        job.check_names(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    job.check_names(tmp_path)


def test_platforms_that_are_not_here_are_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = logging.getLogger("jax._src.xla_bridge")
    monkeypatch.setattr(tried, "level", logging.NOTSET)
    seen = []

    def find_devices() -> str:
        seen.append(tried.getEffectiveLevel())
        return ""

    for name, stand_in in (
        ("find_devices", find_devices),
        ("keep_freed_memory", lambda: None),
        ("set_flags", lambda platform: None),
    ):
        monkeypatch.setattr(job, name, stand_in)
    monkeypatch.setattr(job.hosts, "start", lambda: None)
    job.start_jax("")
    assert seen == [logging.WARNING]
