"""Many processes, one program: who they are, which rows each reads, who writes, what all know.

Every process (one a host, on TPU) runs the same program on the same global arrays and must take
the same decisions, so what decides is either computed by all alike, fetched whole (`fetch`), or
agreed upon (`exchange`). A process reads only the rows of a batch that its devices hold
(`mesh.host_rows`); the first one alone writes what is not cut over the processes (`is_first`).

`exchange` goes through JAX's coordination service, from host to host: it does not wait for what
the devices are computing, as a collective would.

With one process each function does the obvious thing and nothing else.
"""

import collections
import contextlib
import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emor3_jax.parallel.mesh import MeshError, make_mesh

logger = logging.getLogger(__name__)

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables of a cluster that is started by hand: "host:port" of the first process, how
many processes there are, and which of them this one is, from 0."""

_CLUSTERS = ("slurm", "gketpu", "gcetpu")
"""JAX's names of the clusters that are joined without being told; others only by hand."""

_FAKE, _CPU_THREADS = "xla_force_host_platform_device_count", 32
"""The flag that makes several devices of a CPU, and the threads that its client then gets."""

_SERVICE = "JAX_ENABLE_PREEMPTION_SERVICE"
"""Set to 1, JAX takes SIGTERM and finds the step after which all hosts stop (`reached_sync_point`);
else a run does so itself, and hears the signal between steps too."""

_PATIENCE_MS = 6 * 3600 * 1000
"""How long a process waits for the others: the first one may be drawing data or training the base
policy meanwhile. One that has died is noticed by JAX itself, within two minutes."""


def start() -> None:
    """Joins the processes of a cluster, if this one belongs to any; before JAX touches a device.

    By hand: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Without them,
    steps of Slurm (`srun`) and TPU pods are recognised. A laptop, a single TPU VM, a batch script
    of Slurm outside `srun`, and a TPU VM that is told to use its CPU go alone.

    Raises:
      MeshError: if the variables contradict each other, or the others do not come.
    """
    if distributed.global_state.client is not None:
        return
    if _FAKE in os.environ.get("XLA_FLAGS", "") or COUNT in os.environ:
        # XLA's CPU client has a thread for each core or device, and in it both a collective waits
        # and a program that finds the queue full: with few threads they wait for each other.
        os.environ.setdefault("NPROC", str(max(_CPU_THREADS, os.cpu_count() or 1)))
    given = _by_hand(os.environ)
    if given is None:
        name = _recognise()
        join = {"cluster_detection_method": name} if name else None
    else:
        address, count, index = given
        here = {"coordinator_address": address, "num_processes": count, "process_id": index}
        join = here | {"cluster_detection_method": "deactivate"} if count > 1 else None
    if join is None:
        return
    # It takes SIGTERM for itself, also in programs that do not ask it.
    wanted = os.environ.get(_SERVICE, "").lower() in ("1", "true", "on", "yes")
    jax.config.update("jax_enable_preemption_service", wanted)
    try:
        jax.distributed.initialize(**join)
    except jax.errors.JaxRuntimeError as error:
        raise MeshError(
            f"{join}: the processes did not find each other; is each of them started, and can it "
            f"reach the first one's address and port? ({error})"
        ) from error


def _by_hand(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Returns address, number of processes and index of this one, None where they are not given."""
    if COUNT not in environment and INDEX not in environment:
        return None
    values = {name: environment.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
    try:
        count, index = int(values[COUNT]), int(values[INDEX])
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count or ":" not in values[ADDRESS]:
        found = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise MeshError(
            f"{found}: set all three, as 'host:port' of the first process, the number of processes "
            "and the index of this one, from 0; or none"
        )
    return values[ADDRESS], count, index


def _recognise() -> str | None:
    """Returns JAX's name of the cluster that this process belongs to, None if it is alone."""
    platforms = jax.config.jax_platforms or ""
    for kind in ClusterEnv._cluster_types:
        if kind.name not in _CLUSTERS:
            continue
        if kind.name.endswith("tpu") and platforms and "tpu" not in platforms:
            continue
        try:
            if kind.is_env_present():
                return kind.name if kind.get_process_count() > 1 else None
        # The metadata server of a TPU VM is asked by HTTP.
        except (OSError, RuntimeError) as error:
            logger.warning("whether this is a cluster (%s) cannot be found out: %s", kind, error)
    return None


def is_first() -> bool:
    """Returns whether this is the process that writes."""
    return distributed.global_state.process_id == 0


_turns: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)


def exchange(value: Any, channel: str = "main") -> list[Any]:
    """Returns what each process gives, in their order; all must call this, as often as each other.

    Args:
      value: plain data that fits JSON. It takes about a millisecond; devices are not waited for.
      channel: calls are counted by it; a thread of its own needs one of its own.
    """
    state = distributed.global_state
    if state.num_processes == 1:
        return [value]
    client, turn, index = state.client, next(_turns[channel]), state.process_id
    name = f"emor3_jax/{channel}"
    if turn > 1:
        # All have passed the barrier after that turn, so all have read it.
        client.key_value_delete(f"{name}/{turn - 2}/{index}")
    client.key_value_set(f"{name}/{turn}/{index}", json.dumps(value))
    client.wait_at_barrier(name, _PATIENCE_MS)
    found = client.key_value_dir_get(f"{name}/{turn}/")
    said = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in found}
    return [said[i] for i in range(state.num_processes)]


def agree(wish: bool) -> bool:
    """Returns on all processes whether any of them wishes it."""
    return any(exchange(wish))


def jax_takes_sigterm() -> bool:
    """Returns whether JAX's preemption service runs."""
    return distributed.global_state.preemption_sync_manager is not None


def reached_sync_point(step: int) -> bool:
    """Returns whether JAX's preemption service wants all hosts to stop after this step.

    Args:
      step: that is done; all hosts must ask after each.
    """
    return jax_takes_sigterm() and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Lets the first process do something before the others do the same.

    For what leaves a result on disk that the others then find: data sets, the base policy, a
    download. Where the first one fails, the others come to the same error by themselves.
    """
    if not is_first():
        exchange(None)
    try:
        yield
    finally:
        if is_first():
            exchange(None)


def on_own_devices() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which programs run on this process's first device alone.

    Its mesh has the axes of all meshes, which programs ask for by name.
    """
    return jax.set_mesh(make_mesh(1, 1, 1, jax.local_devices()[:1]))


def everywhere(tree: Any) -> Any:
    """Returns arrays that every process can read whole; does not wait until they are there.

    All processes must call this at the same point. Arrays that are readable as they are, as all are
    with one process, are returned unchanged.
    """
    leaves, structure = jax.tree.flatten(tree)
    cut = [i for i, x in enumerate(leaves) if not _readable(x)]
    if cut:
        whole = NamedSharding(leaves[cut[0]].sharding.mesh, P())
        for i, x in zip(cut, _identity(whole)([leaves[i] for i in cut]), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def fetch(tree: Any) -> Any:
    """Returns arrays whole on the host, on every process; all must call this at the same point."""
    return jax.device_get(everywhere(tree))


def start_fetch(tree: Any) -> Any:
    """Lets arrays travel to the host once they are computed; returns them, and waits for nothing.

    `jax.device_get` then finds them there.

    Args:
      tree: of arrays that `everywhere` returned; leaves of other types are left alone.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return tree


def _readable(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


@functools.cache
def _identity(sharding: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)
