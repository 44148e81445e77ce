"""Compiles programs one after the other and keeps what the compiler says of each.

HBM of a device while a program runs is what lies there already (its arguments, and what it does not
read but the step still needs) plus what it makes: results that reuse no argument's memory, and
temporaries. The first is counted from shapes and layouts, the second is the compiler's own figure.
"""

import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from emor3_jax.compiler import hlo
from emor3_jax.parallel.program import Program, Programs

_ARRAYS = (jax.ShapeDtypeStruct, jax.Array, np.ndarray)

KINDS = ("parameters", "optimizer", "cache", "data")


class Report(NamedTuple):
    """The compiler's findings for one program; bytes are those of one device.

    Attributes:
      name: of the program.
      calls: how often a step runs it at most.
      resident: kind → bytes that lie there already; `KINDS` in order.
      made: bytes of temporaries and results; None if there is no memory for them, by the compiler
        or because what lies there already takes it all.
      needed: bytes in all; at least so many where `made` is None.
      moved: kind of collective → bytes received in one call.
      lowering, compiling: seconds.
      collectives: all of them.
    """

    name: str
    calls: int
    resident: dict[str, int]
    made: int | None
    needed: int
    moved: dict[str, int] = {}  # noqa: RUF012
    lowering: float = 0.0
    compiling: float = 0.0
    collectives: tuple[hlo.Collective, ...] = ()

    def fits(self, usable: int) -> bool:
        """Returns whether it runs in so many bytes."""
        return self.made is not None and self.needed <= usable


class Recorder:
    """Compiles programs for a mesh, in the order of a step.

    Attributes:
      reports: of each program so far.
    """

    def __init__(
        self,
        mesh: Mesh,
        wanted: Callable[[str], bool] = lambda name: True,
        say: Callable[[Report], None] = lambda report: None,
        usable: float = math.inf,
    ) -> None:
        """Begins.

        Args:
          mesh: of the devices to compile for.
          wanted: whether to compile a program; others only give the shapes of their results.
          say: told of each report.
          usable: bytes of a device; where less is left than what lies there, nothing is compiled.
        """
        self.mesh, self.reports = mesh, []
        self._wanted, self._say, self._usable = wanted, say, usable

    def run(self, programs: Programs) -> Any:
        """Compiles all programs; returns the result of the whole."""
        sent = None
        while True:
            try:
                sent = self(programs.send(sent))
            except StopIteration as end:
                return end.value

    def __call__(self, program: Program) -> Any:
        """Compiles a program.

        Returns:
          The results as abstract arrays, sharded as the compiled program shards them.
        """
        foretold = program.results(self.mesh)
        if not self._wanted(program.name):
            return foretold
        resident = self._resident(program.alive, program.args)
        total = sum(resident.values())

        def report(made: int | None, needed: int, **found: Any) -> Report:
            return Report(program.name, program.calls, resident, made, needed, **found)

        if total > self._usable:
            self._keep(report(None, total))
            return foretold
        started = time.perf_counter()
        lowered = program.function.lower(*program.args, **program.options)
        lowering = time.perf_counter() - started
        try:
            compiled, text = _compile(lowered, self.mesh.devices.flat[0].platform)
        except jax.errors.JaxRuntimeError as error:
            used = _used(str(error))
            if used is None:
                raise
            seconds = time.perf_counter() - started - lowering
            beside = total - sum(self._resident({}, program.args).values())
            self._keep(report(None, beside + used, lowering=lowering, compiling=seconds))
            return foretold
        seconds = time.perf_counter() - started - lowering
        stats = compiled.memory_analysis()
        made = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        collectives = hlo.collectives(text, self.mesh.size)
        self._keep(
            report(
                made,
                total + made,
                moved=hlo.moved_bytes(collectives),
                lowering=lowering,
                compiling=seconds,
                collectives=tuple(collectives),
            )
        )
        return jax.tree.map(_laid_out, foretold, compiled.output_shardings)

    def _keep(self, report: Report) -> None:
        self.reports.append(report)
        self._say(report)

    def _resident(self, alive: Mapping[str, Any], args: Any) -> dict[str, int]:
        """Returns kind → bytes of a device; an argument that `alive` does not name is data."""
        totals, seen = dict.fromkeys(KINDS, 0), set()
        for kind, tree in (*alive.items(), ("data", args)):
            for leaf in jax.tree.leaves(tree):
                # Each array is one object, whoever holds it.
                if id(leaf) not in seen and isinstance(leaf, _ARRAYS):
                    seen.add(id(leaf))
                    totals[kind] += device_bytes(leaf)
        return totals


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """Compiles; returns the program and its text."""
    kept = jax.config.jax_enable_compilation_cache
    # The cache of programs cannot read those of devices that are not here.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        if platform != "tpu":
            compiled = lowered.compile()
            return compiled, compiled.as_text()
        # The TPU's compiler is newer than JAX's reader of programs, which does not know all that
        # it writes for some chips; what it writes itself is its own text.
        with tempfile.TemporaryDirectory() as folder:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = lowered.compile(compiler_options=options)
            (text,) = Path(folder).glob("*.after_optimizations.txt")
            return compiled, text.read_text()
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def device_bytes(x: Any) -> int:
    """Returns the bytes that one device holds of an abstract or concrete array."""
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(shape)
    return math.prod(shape) * x.dtype.itemsize


def _laid_out(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _used(message: str) -> int | None:
    """Returns the bytes that a program would need, from the compiler's refusal; None if other."""
    match = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]?) of", message
    )
    if match is None:
        return None
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
