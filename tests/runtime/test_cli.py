"""The command line of a program, beyond what its config checks."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags
from support import program

import emor3_jax
from configs import cpu_demo
from emor3_jax.config import base_policy, dataset, reward_term
from emor3_jax.errors import UserError
from emor3_jax.runtime import cli

ROOT = Path(emor3_jax.__file__).parents[1]


def test_a_bucket_is_no_folder() -> None:
    assert cli.local_folder("runs/a") == Path("runs/a")
    # As a folder it would be kept on the machine, and go with it.
    with pytest.raises(FileNotFoundError, match=r"--workdir='gs://box/a': must be a folder; mount"):
        cli.local_folder("gs://box/a")


def test_no_name_is_not_the_working_directory() -> None:
    with pytest.raises(UserError, match="--workdir='': names nothing; give a folder"):
        cli.local_folder("")
    assert cli.local_folder(".") == Path()


def test_who_reads_the_first_lines_alone_gets_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    printed = open(writer, "w")  # noqa: SIM115
    # Of another pipe it is an error.
    with pytest.raises(BrokenPipeError), cli.errors_told():
        raise BrokenPipeError
    monkeypatch.setattr(sys, "stdout", printed)
    with pytest.raises(SystemExit) as ended, cli.errors_told():
        print("a table")
    # As of a program that the signal ended.
    assert ended.value.code == 141
    with pytest.raises(BrokenPipeError):
        printed.close()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    for path in (tmp_path / "notes", tmp_path / "notes" / "run"):
        with pytest.raises(UserError, match=r"--workdir=.*notes is a file; name a folder"):
            cli.local_folder(str(path))


def test_a_name_that_is_too_long_is_one_line() -> None:
    folder = cli.local_folder("a" * 300)
    with pytest.raises(SystemExit) as ended, cli.errors_told():
        folder.mkdir()
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)]
)
def test_a_folder_that_cannot_be_written_is_one_line(
    number: int, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, cli.errors_told():
        raise OSError(number, os.strerror(number), "runs/a\nb/predictions")
    assert ended.value.code == status
    told = capfd.readouterr().err
    assert told.startswith(f"error: runs/a\\nb/predictions: {os.strerror(number)}; ")
    assert told.endswith("or name another folder\n") and told.count("\n") == 1


def test_output_that_the_terminal_cannot_show_is_written_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    with cli.errors_told():
        print("caf\udce9 → \u6f22", flush=True)
    assert shown.buffer.getvalue() == b"caf\\udce9 \\u2192 \\u6f22\n"


def test_ctrl_c_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, cli.errors_told():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capfd.readouterr().err == "error: interrupted\n"


def test_an_error_of_the_system_that_names_no_file_keeps_its_trace() -> None:
    with pytest.raises(ConnectionResetError), cli.errors_told():
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_a_stopped_run_is_told_by_its_exit_status() -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.end({}, may_stop=True)
    assert stopped.value.code == cli.STOPPED == 75
    cli.end({"before": {}, "after": {}}, may_stop=True)
    cli.end(None, may_stop=False)


@pytest.mark.parametrize("kind", ["UserError", "FileNotFoundError", "RunError", "KeyError"])
def test_what_the_user_can_mend_is_told_in_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict()\n"
    )
    lines = (
        "from emor3_jax.runtime import cli",
        "from emor3_jax.errors import RunError, UserError",
        "def program(config):",
        f"    raise {kind}('steps=-1: must be 0 or more')",
        "cli.run_without_workdir(program)",
    )
    config = f"--config={tmp_path / 'config.py'}"
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), config], capture_output=True, text=True
    )
    if kind == "KeyError":
        assert ran.returncode == 1 and "Traceback" in ran.stderr
    else:
        # tpu/watch.sh starts again what ended with another status than 2.
        assert ran.returncode == (1 if kind == "RunError" else 2)
        assert ran.stderr == "error: steps=-1: must be 0 or more\n"


def test_a_config_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = cli.configs_folder()
    assert (shipped / "tpu_v4.py").is_file()
    monkeypatch.chdir(tmp_path)
    for given in ("tpu_v4:7b,chips=32", "tpu_v4.py:7b,chips=32", "configs/tpu_v4.py:7b,chips=32"):
        assert cli.find_config(given) == f"{shipped}/tpu_v4.py:7b,chips=32"
    # One's own goes first, and what is neither is told as it was given.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tpu_v4.py").write_text("")
    (tmp_path / "own.py").write_text("")
    assert cli.find_config("tpu_v4") == "configs/tpu_v4.py"
    assert cli.find_config("own.py:a") == "own.py:a"
    for given in ("none", "runs/tpu_v5e.py", "other/cpu_demo"):
        assert cli.find_config(given) == given


def _account(*arguments: str) -> subprocess.CompletedProcess:
    return program.run("emor3_jax.account", *arguments)


def test_what_a_config_file_refuses_is_told_in_one_line() -> None:
    ran = _account("--config=configs/emoset.py:v9")
    assert ran.returncode == 2
    assert re.fullmatch(r"error: machine 'v9': must be one of v4-8, .*\n", ran.stderr)
    ran = _account("--config=configs/qwen_vl.py:3b")
    assert ran.returncode == 2
    assert ran.stderr == "error: --config: this file takes nothing behind a colon; leave it out\n"
    # Three chips are no two halves.
    ran = _account("--config=configs/tpu_v5e.py:3b,chips=3")
    assert ran.returncode == 2
    assert re.fullmatch(r"error: chips=3: must be a power of two .*\n", ran.stderr)


@pytest.mark.parametrize("arguments", ([], ["--config.steps=3"]))
def test_a_config_file_that_is_not_there_is_told_in_one_line(arguments: list[str]) -> None:
    ran = _account("--config=configs/none.py", *arguments)
    assert ran.returncode == 2
    assert re.fullmatch(r"error: --config: .*No such file.*'configs/none\.py'; .*\n", ran.stderr)


def test_a_fault_in_a_config_file_keeps_its_trace(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("def get_config():\n    return int('no number')\n")
    ran = _account(f"--config={tmp_path / 'config.py'}")
    assert ran.returncode == 2 and "line 2, in get_config" in ran.stderr


@pytest.mark.parametrize("arguments", ([], ["--config.steps=3"]))
def test_a_config_that_is_a_folder_is_told_in_one_line(
    arguments: list[str], tmp_path: Path
) -> None:
    ran = _account(f"--config={tmp_path}", *arguments)
    assert ran.returncode == 2
    assert re.fullmatch(r"error: --config: .*Is a directory.*; give a file.*\n", ran.stderr)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# A page\nof text", "line 2: invalid syntax; must be a file in Python\n"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("steps = 3", "has no attribute 'get_config'"),
        ("def get_config():\n    pass", "get_config() returns NoneType: must return a ConfigDict"),
        ("def get_config():\n    return 3", "get_config() returns int: must return a ConfigDict"),
    ],
)
def test_a_file_that_is_no_config_ends_with_the_status_of_a_wrong_config(
    text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.py").write_text(text)
    ran = _account(f"--config={tmp_path / 'config.py'}")
    assert ran.returncode == 2 and "error: --config" in ran.stderr and said in ran.stderr


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.stepz=3", "--config.stepz: there is no such field; the nearest one is steps"),
        ("--config.steps=many", "--config.steps='many': must be a whole number"),
        ("--config.steps=", "--config.steps='': must be a whole number, without a space beside ="),
        ("--stepz=3", "Unknown command line flag 'stepz'"),
        ("--steps=3", "Unknown command line flag 'steps'; a field of the config is given as --con"),
        ("runs/a", "'runs/a': belongs to no flag; write --name=value, without a space beside ="),
    ],
)
def test_a_wrong_flag_has_the_status_of_what_the_user_can_mend(flag: str, said: str) -> None:
    # tpu/watch.sh would start a program again that ended with another.
    ran = _account("--config=configs/qwen_vl.py", flag)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {said}") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            "flag --config.policy_update.kl_coef=much: could not convert string to float: 'much'",
            "--config.policy_update.kl_coef='much': must be a number",
        ),
        (
            "flag --config.reflect.enabled=no: ('Non-boolean argument to boolean flag', 'no')",
            "--config.reflect.enabled='no': must be true or false",
        ),
        (
            "flag --workdir=None: Flag --workdir must have a value other than None.\n"
            "flag --config=None: Flag --config must have a value other than None.",
            "--config is missing: give --config=…; --workdir is missing: give --workdir=…",
        ),
        (
            "Unknown command line flag 'learning_rate'",
            "Unknown command line flag 'learning_rate'; a field of the config is given as "
            "--config.policy_update.learning_rate=…",
        ),
        (
            "flag --leakage=hash: value should be one of <bytes|dhash|none>",
            "flag --leakage=hash: value should be one of <bytes|dhash|none>",
        ),
    ],
)
def test_a_wrong_command_line_is_told_in_plain_words(told: str, words: str) -> None:
    assert cli._in_plain_words(told) == words


def test_data_sets_and_reward_terms_are_added_by_the_command_line() -> None:
    config = cpu_demo.get_config()
    fields = ["evaluate.sets.mine.limit", "evaluate.sets.mine.kind", "data.mix.more.kind"]
    cli.add_entries(config, [*fields, "reward.terms.brief.pattern", "evaluate.sets.shifted.limit"])
    assert [*config.evaluate.sets] == ["emoscenes", "mine", "shifted"]
    assert config.evaluate.sets.mine == dataset() and [*config.data.mix] == ["more"]
    assert config.reward.terms.brief == reward_term()
    # A misspelt name makes none.
    with pytest.raises(UserError, match=r"shiftd: is new, so give .*\.kind=…; there are em"):
        cli.add_entries(config, ["evaluate.sets.shiftd.limit"])
    with pytest.raises(UserError, match=r"terms\.b: is new, so give .*pattern=… or .*function=…"):
        cli.add_entries(config, ["reward.terms.b.weight"])
    # A config of another program has no such sections.
    cli.add_entries(base_policy(), fields)


def test_overrides_of_a_new_set_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "--config.evaluate.sets.mine"
    file = f"--config={ROOT / 'configs' / 'cpu_demo.py'}"
    arguments = ["train", file, f"{given}.kind=jsonl", f"{given}.limit=3", "--config.steps=7"]
    monkeypatch.setattr(sys, "argv", arguments)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=arguments)
    values["config"].parser = cli._ConfigParser("config")
    values(arguments)
    config = values.config
    assert config.evaluate.sets.mine.to_dict() == dataset(kind="jsonl", limit=3).to_dict()
    assert config.steps == 7
