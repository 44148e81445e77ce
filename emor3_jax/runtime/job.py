"""Starting and recording a run."""

import json
import logging
from pathlib import Path

import jax
from ml_collections import ConfigDict

from emor3_jax.config import ConfigError
from emor3_jax.parallel import hosts
from emor3_jax.parallel.devices import expected_platform, find_devices
from emor3_jax.parallel.flags import set_flags
from emor3_jax.prepare.data import data_sets, open_source


class CompileCounter:
    """Counts the programs that XLA has compiled, or fetched from the cache, in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, _: float, **__: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def start_jax(cache: str, *, devices: bool = True) -> CompileCounter:
    """Sets the platform's flags, joins the other processes, says what devices there are.

    Also sets where compiled programs are kept, and starts to count compiles.

    Args:
      cache: folder, made if needed; "" keeps none.
      devices: they will be used; a program that only reads leaves them to others.

    Raises:
      MeshError: as `hosts.start`.
      DeviceError: if a platform is asked for that is not here.
    """
    set_flags(expected_platform())
    hosts.start()
    if devices and (found := find_devices()) and hosts.is_first():
        print(found, flush=True)
    # The data sets' own notices would drown the progress of the run.
    for name in ("absl", "grain", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not hosts.is_first():
        # All know the same of the data; one says it.
        logging.getLogger("emor3_jax").setLevel(logging.ERROR)
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return CompileCounter()


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
