"""The command line of the programs: `--config`, mostly `--workdir`, and errors without a trace."""

import contextlib
import json
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

import emor3_jax
from emor3_jax.config import dataset, default, field_value, no_field, reward_term
from emor3_jax.errors import LASTING, RunError, UserError, os_error_text
from emor3_jax.files import is_file, is_folder, show
from emor3_jax.io.console import escape_what_cannot_be_shown, tell
from emor3_jax.io.fields import fields_of
from emor3_jax.runtime.stopping import STOPPED, Stopped


def run(
    program: Callable[[ConfigDict, Path], object],
    workdir: str | None = None,
    *,
    may_stop: bool = False,
) -> None:
    """Parses the command line and runs a program that writes to the folder of a run.

    Args:
      program: takes the config and the folder of the run.
      workdir: that folder where the command line names none; None requires that it does.
      may_stop: the program returns nothing where a signal stopped it after a step, and raises
        `Stopped` elsewhere; the exit status is `STOPPED`.
    """
    folder = flags.DEFINE_string("workdir", workdir, "Folder of the run.", required=workdir is None)

    def to_its_end(config: ConfigDict) -> None:
        try:
            result = program(config, local_folder(folder.value))
        except Stopped:
            result = None
        end(result, may_stop=may_stop)

    run_without_workdir(to_its_end)


def end(result: object, *, may_stop: bool) -> None:
    """Exits with `STOPPED` if a resumable program ended early, that is, without a result."""
    if may_stop and not result:
        sys.exit(STOPPED)


def local_folder(path: str) -> Path:
    """Returns the folder of a run.

    Args:
      path: as given on the command line.

    Raises:
      FileNotFoundError: if it is an address, such as gs://bucket/run, which would else become a
        folder of that name on this machine.
      UserError: if it is a file, or lies under one, or is nothing, as an unset variable of the
        shell, which would become the working directory.
    """
    if not path:
        raise UserError("--workdir='': names nothing; give a folder, '.' for this one")
    if "://" in path:
        rule = "must be a folder; mount the bucket (gcsfuse), or start through tpu/launch.sh"
        raise FileNotFoundError(f"--workdir={path!r}: {rule}")
    folder = Path(path)
    for each in (folder, *folder.parents):
        if os.path.exists(each) and not is_folder(each):
            raise UserError(f"--workdir={path!r}: {each} is a file; name a folder")
    return folder


def run_without_workdir(program: Callable[[ConfigDict], object]) -> None:
    """Parses the command line and runs a program that only prints.

    An unknown `--config.key` is refused by `config_flags`, which names the nearest key, with exit
    status 2. A `UserError`, of the program or of the config's file, or a `FileNotFoundError` of a
    path that the user gave, ends the program with its message and that status too: started again,
    it would end so again, as with a folder that may not be written. A `RunError`, such as that of
    a full disk, ends it with its message and status 1, after which `tpu/watch.sh` starts it again.

    Args:
      program: takes the config.
    """
    config = config_flags.DEFINE_config_file("config", None, "File that returns the config.")
    flags.FLAGS["config"].parser = _ConfigParser("config")
    flags.mark_flag_as_required("config")

    def main(arguments: Sequence[str]) -> None:
        with errors_told():
            _refuse_what_stands_alone(arguments[1:])
            program(config.value)

    app.run(main, flags_parser=parse_flags)


def _refuse_what_stands_alone(arguments: Sequence[str]) -> None:
    """Raises UserError for arguments that are no flags, which absl would pass over.

    So it would --config.reflect.enabled false, which it reads as true.
    """
    if arguments:
        rule = "belongs to no flag; write --name=value, without a space beside = or a comma"
        raise UserError(f"{arguments[0]!r}: {rule}")


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the process by one line on standard error, see `run_without_workdir`."""
    escape_what_cannot_be_shown()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python would complain of what is left.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, FileNotFoundError) as error:
        _refuse(error)
    except RunError as error:
        _refuse(error, status=1)
    except KeyboardInterrupt:
        # A run takes this signal itself: what is stopped here keeps nothing to go on from.
        _refuse(RunError("interrupted"), status=INTERRUPTED)
    except OSError as error:
        _refuse_missing_config(error)
        if error.errno is None or error.filename is None:
            raise
        where = error.filename2 or error.filename
        told = f"{show(where)}: {os_error_text(error.errno)}, or name another folder"
        _refuse(RunError(told), status=2 if error.errno in LASTING else 1)


def _nobody_reads() -> bool:
    """Recognises a standard output without a reader, as a pipe into a `head` that has ended."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


PACKAGE = Path(emor3_jax.__file__).parent

INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a program that Ctrl-C ended, as shells tell it."""


def _refuse(error: Exception, status: int = 2) -> NoReturn:
    tell(f"error: {error}")
    sys.exit(status)


def configs_folder() -> Path:
    """Returns the folder of the package's configs: in a wheel its own, else the repository's."""
    shipped = PACKAGE / "share" / "configs"
    return shipped if is_folder(shipped) else PACKAGE.parent / "configs"


def find_config(given: str, folder: Path | None = None) -> str:
    """Returns a config's file, which may be given by its name alone.

    Args:
      given: a file such as "configs/tpu_v4.py", or a name, "tpu_v4"; options behind a colon stay.
      folder: of the package's configs, by default `configs_folder()`.

    Returns:
      The file in the working directory if there is one, else that of the package; what names
      neither is returned as it is.
    """
    folder = folder or configs_folder()
    path, colon, options = given.partition(":")
    if is_file(path):
        return given
    name = path.removeprefix("configs/").removesuffix(".py")
    for place in (Path("configs"), folder):
        if "/" not in name and is_file(place / f"{name}.py"):
            return f"{place / name}.py{colon}{options}"
    return given


class _ConfigParser(ConfigFileFlagParser):
    """Reads a config's file, and makes the entries that the command line names and it has not."""

    def parse(self, path: str) -> ConfigDict:
        """Returns the config."""
        try:
            config = super().parse(path)
        except SyntaxError as error:
            at = f"{show(error.filename)}, line {error.lineno}: {error.msg}"
            raise UserError(f"--config={path!r}: {at}; must be a file in Python") from error
        except (TypeError, ValueError):
            # These have their trace in the message, see `parse_flags`.
            raise
        except Exception as error:
            trace = traceback.format_exc()
            raise UserError(f"--config={path!r}: the file fails:\n\n{trace}") from error
        if isinstance(config, ConfigDict):
            fields = _overridden(sys.argv)
            add_entries(config, fields)
            _check_fields(config, fields)
        elif not hasattr(config, "_ReportError"):
            # A file that could not be read is an object that says so when it is first used.
            kind = type(config).__name__
            rule = "must return a ConfigDict; start from emor3_jax.config.default()"
            raise UserError(f"--config={path!r}: get_config() returns {kind}: {rule}")
        return config


def _overridden(arguments: Sequence[str]) -> list[str]:
    """Returns the fields that overrides on the command line name, "evaluate.every" for example."""
    names = (re.match(r"--?(?:no)?config\.([\w.]+)(?:=|$)", argument) for argument in arguments)
    return [name[1] for name in names if name]


def _check_fields(config: ConfigDict, fields: Sequence[str]) -> None:
    """Raises UserError for a field that a config has not, naming the nearest one."""
    known = [field for field, _ in fields_of(json.loads(config.to_json_best_effort()))]
    for field in fields:
        if not any(x == field or x.startswith(f"{field}.") for x in known):
            try:
                field_value(config, field)
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"--config.{field}: {no_field(field, known)}") from None


_ENTRIES = {
    "evaluate.sets": (dataset, ("kind",)),
    "data.mix": (dataset, ("kind",)),
    "reward.terms": (reward_term, ("pattern", "function", "text")),
}
"""Field of entries with names of one's own → what makes one, and what it cannot be without."""


def add_entries(config: ConfigDict, fields: Sequence[str]) -> None:
    """Makes data sets and reward terms that overrides name and a config has not.

    Args:
      config: of a program; gets new entries with their defaults.
      fields: that are overridden, "evaluate.sets.mine.kind" for example.

    Raises:
      UserError: for an entry without the field that makes it one, as a misspelt name is.
    """
    for where, (make, wanted) in _ENTRIES.items():
        section, _, name = where.partition(".")
        beginning = f"{where}."
        if section not in config or name not in config[section]:
            continue
        there = config[section][name]
        given = [x.removeprefix(beginning).split(".") for x in fields if x.startswith(beginning)]
        for entry in dict.fromkeys(path[0] for path in given if len(path) == 2):
            if entry in there:
                continue
            if not any([entry, field] in given for field in wanted):
                rule = " or ".join(f"--config.{beginning}{entry}.{field}=…" for field in wanted)
                known = f"; there are {', '.join(there)}" if there else ""
                raise UserError(f"--config.{beginning}{entry}: is new, so give {rule}{known}")
            with there.unlocked():
                there[entry] = make()


def _with_config_file(arguments: Sequence[str]) -> list[str]:
    """Returns the command line with the config's file in the place of its name."""
    found, is_value = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if is_value:
            argument = find_config(argument)
        elif equals and flag in ("--config", "-config"):
            argument = f"{flag}={find_config(value)}"
        is_value = argument in ("--config", "-config")
        found.append(argument)
    return found


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parses the command line; what the config's file refuses is one line, without its trace."""
    arguments = _with_config_file(arguments)
    # Configs import each other as `configs.<name>`.
    if (root := str(configs_folder().parent)) not in sys.path:
        sys.path.append(root)
    try:
        return flags.FLAGS(list(arguments))
    except OSError as error:
        _refuse_missing_config(error)
        raise
    except flags.Error as error:
        # `config_flags` wraps what a file raises, once with its trace as the message.
        refused, cause = None, error.__context__
        while cause is not None:
            if _takes_no_options(cause):
                refused = UserError(
                    "--config: this file takes nothing behind a colon; leave it out"
                )
            refused = cause if isinstance(cause, UserError) else refused
            cause = cause.__context__
        if refused is not None:
            _refuse(refused)
        # A fault of the config's file has its trace in the message.
        _refuse(UserError(_in_plain_words(str(error))))


_RULES = (
    (r"invalid literal for int\(\)", "must be a whole number"),
    (r"could not convert string to float", "must be a number"),
    (r"\('Non-boolean argument", "must be true or false"),
)
"""How Python refuses a value → the rule."""


def _in_plain_words(told: str) -> str:
    """Words absl's message about a wrong command line as the other errors are worded.

    Args:
      told: by absl; of several flags that are missing, a line for each.
    """
    missing = re.findall(r"^flag --(\S+)=None: Flag --\1 must have a value", told, re.MULTILINE)
    if missing:
        return "; ".join(f"--{name} is missing: give --{name}=…" for name in sorted(missing))
    if unknown := re.match(r"Unknown command line flag '(?:no)?([^']+)'", told):
        name = unknown[1]
        fields = [x for x, _ in fields_of(json.loads(default().to_json_best_effort()))]
        found = [x for x in fields if x == name or x.endswith(f".{name}")]
        given = " or ".join(f"--config.{field}=…" for field in found)
        return f"{told}; a field of the config is given as {given}" if found else told
    if wrong := re.match(r"flag --([\w.]+)=(.*?): (.*)", told, re.DOTALL):
        name, value, why = wrong.groups()
        for pattern, rule in _RULES:
            if re.match(pattern, why):
                way_out = "" if value else ", without a space beside ="
                return f"--{name}={value!r}: {rule}{way_out}"
    return told


def _takes_no_options(error: BaseException) -> bool:
    """Looks for the call of a config's `get_config` that has no parameter."""
    return isinstance(error, TypeError) and str(error).startswith(
        "get_config() takes 0 positional arguments"
    )


def _refuse_missing_config(error: OSError) -> None:
    """Exits if the error is that of `config_flags` when a config is used that cannot be read."""
    cause = str(error.__cause__)
    if str(error).startswith("Configuration is not available"):
        reason = re.sub(r"^\[Errno \d+\] ", "", cause.splitlines()[-1].strip())
        names = ", ".join(sorted(file.stem for file in configs_folder().glob("*.py")))
        rule = f"give a file, or the name of a config of the package: {names}"
        _refuse(UserError(f"--config: {reason}; {rule}"))
