"""Starting and recording a run."""

import contextlib
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from emor3_jax.config import ConfigError, default
from emor3_jax.errors import UserError
from emor3_jax.files import is_file, is_folder, read_json
from emor3_jax.io.fields import fields_of
from emor3_jax.parallel import hosts
from emor3_jax.parallel.devices import expected_platform, find_devices
from emor3_jax.parallel.flags import set_flags
from emor3_jax.prepare import profile
from emor3_jax.prepare.data import data_sets, open_source
from emor3_jax.runtime.allocator import keep_freed_memory


class CompileCounter:
    """Counts the programs that XLA has compiled, or fetched from the cache, in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, _: float, **__: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def start_jax(cache: str, *, devices: bool = True) -> CompileCounter:
    """Sets the platform's flags, joins the other processes, says what devices there are.

    Also sets where compiled programs are kept, and starts to count compiles. On a CPU, memory that
    is freed stays with the process (`runtime.allocator`).

    Args:
      cache: folder, made if needed; "" keeps none.
      devices: they will be used; a program that only reads leaves them to others.

    Raises:
      MeshError: as `hosts.start`.
      DeviceError: if a platform is asked for that is not here.
    """
    platform = expected_platform()
    set_flags(platform)
    if devices and platform == "cpu":
        # Before JAX starts its threads, each of which would have a heap of its own.
        keep_freed_memory()
    # Notices of the data sets would drown the progress of the run, and of platforms that are not
    # here, which JAX tries, would look like errors.
    for name in ("absl", "grain", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(_is_no_notice_of_tfds)
    hosts.start()
    if devices and (found := find_devices()) and hosts.is_first():
        print(found, flush=True)
    if not hosts.is_first():
        # All know the same of the data; one says it.
        logging.getLogger("emor3_jax").setLevel(logging.ERROR)
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).absolute()))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return CompileCounter()


def _is_no_notice_of_tfds(record: logging.LogRecord) -> bool:
    """Returns False for what tfds says of each builder of ours: its config is none of its list."""
    return not str(record.msg).startswith("Using custom data configuration")


def check_hosts(config: ConfigDict) -> None:
    """Checks that nothing is asked for that works on one host alone.

    Raises:
      ConfigError: with several hosts, which do not hold each other's rows.
    """
    if jax.process_count() == 1:
        return
    for section, key in (("rollout", "resample"), ("reference", "image_cache")):
        if value := config[section][key]:
            raise ConfigError(f"{section}.{key}", value, "works on one host alone; set it to 0")


FOLDERS = ("checkpoints", "damaged", "events", "policy", "predictions", "replay", "samples")
FILES = ("config.json", "emor3.json", "evaluation.json", "metrics.jsonl", "report.html")
"""Names in the folder of a run."""


def check_names(workdir: Path) -> None:
    """Refuses a folder in which a run would fail late: what is to be written there is another kind.

    Raises:
      UserError: naming the first.
    """
    for names, there, kind in ((FOLDERS, is_file, "folder"), (FILES, is_folder, "file")):
        if wrong := [name for name in names if there(workdir / name)]:
            raise UserError(
                f"--workdir={str(workdir)!r}: a run keeps a {kind} of the name {wrong[0]} there, "
                "which is none; move it away, or give another folder"
            )


class WorkdirLock:
    """Keeps a second run out of a folder while a first one is at work in it.

    The lock is the operating system's: it ends with the process, however that ends. Where the file
    system knows no locks, as some mounted buckets, nothing is locked.
    """

    def __init__(self, workdir: Path) -> None:
        """Takes the lock of a folder.

        Raises:
          UserError: if another process has it.
        """
        self._file = (workdir / ".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"--workdir={str(workdir)!r}: {holder} is at work there; wait for its end, stop "
                "it, or give another folder"
            ) from None
        except OSError as error:
            logging.getLogger(__name__).warning("%s cannot be locked: %s", workdir, error)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Gives the lock back."""
        self._file.close()


_MAY_CHANGE = (
    "steps",
    "log.",
    "checkpoint.",
    "guard.",
    "evaluate.",
    "mesh.",
    "data.workers",
    "data.read_ahead",
    "data.folder",
    "policy.attention",
    "policy.decode_attention",
    "policy.embedded_",
    "reward.table_cache",
    "reference.image_cache",
    "rollout.slots",
    "rollout.refill",
    "rollout.lanes",
    "rollout.block",
    "rollout.halvings",
    "policy_update.micro_prompts",
    "policy_update.logprob_chunk",
    "policy_update.remat",
)
"""Beginnings of settings that a run may go on with changed: they change no result but by rounding,
or, as `steps`, are there to be changed."""


def check_settings(config: ConfigDict, workdir: Path) -> None:
    """Compares the config with that of the run that is in a folder.

    Raises:
      UserError: if settings differ that decide what is learned, unless
        `checkpoint.resume_changed` says that this is wanted.
    """
    path = workdir / "config.json"
    if not path.exists():
        return

    def refuse(message: str) -> UserError:
        return UserError(f"{message}; or delete it to go on unchecked")

    before = read_json(path, refuse, dict, finite=False)
    now = json.loads(config.to_json_best_effort())
    old, new = dict(fields_of(before)), dict(fields_of(now))
    stated_old, stated_new = _stated(before), _stated(now)
    changed = [
        f"  {key}: {json.dumps(old[key])} before, {json.dumps(new[key])} now"
        for key in sorted(old.keys() & new.keys())
        if old[key] != new[key]
        and stated_old[key] != stated_new[key]
        and not key.startswith(_MAY_CHANGE)
    ]
    if changed and not config.checkpoint.resume_changed:
        raise UserError(
            f"--workdir={str(workdir)!r}: holds a run with other settings\n"
            + "\n".join(changed)
            + "\ntake those or another folder, or go on with these by "
            "--config.checkpoint.resume_changed=true"
        )


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config of the run in a folder; what it does not say is as in `config.default`.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    path = workdir / "config.json"
    config = default()
    if not path.exists():
        raise UserError(f"{path}: there is no run; name the folder of one")
    saved = read_json(path, UserError, dict, finite=False)
    try:
        with config.unlocked():
            config.update(saved)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no config of this program ({error})") from error
    return config


def _stated(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns field → value, where what a config leaves to its profile is said."""
    # A config of another version may lack a field; it is compared by what it has.
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        settings = profile.stated(ConfigDict(settings)).to_dict()
    return dict(fields_of(settings))


def keep_config(config: ConfigDict, workdir: Path) -> None:
    """Writes what this run, or its continuation, was started with.

    That is `workdir/config.json` and, for each data set cut to a subset, the ids of its rows in
    `workdir/subsets/<name>.txt`, which `ids` of another run's data set reads.
    """
    if not hosts.is_first():
        return
    write_config(config, workdir / "config.json")
    for name, (field, dataset) in data_sets(config).items():
        if dataset.subset:
            source, _ = open_source(config, field, dataset)
            path = workdir / "subsets" / f"{name}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{texts.id}\n" for texts in source.texts()))


def write_config(config: ConfigDict, path: Path) -> None:
    """Writes a config as JSON, its keys sorted."""
    text = json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True)
    path.write_text(text + "\n")
