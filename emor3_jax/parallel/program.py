"""Jitted programs with the shapes that they are called with, for compiling without devices.

An object that calls jitted functions also yields them as `Program`s, in the order of a call and at
the largest shapes, and is sent the results as abstract arrays (`jax.ShapeDtypeStruct` with their
sharding). So a program that is compiled ahead of time is the one that runs.
"""

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emor3_jax.parallel.mesh import BATCH, head_axis, param_shardings

Layout = Callable[[Mesh, Any], Any]


class Program(NamedTuple):
    """One jitted function and its arguments.

    Attributes:
      name: unique within a step.
      function: jitted.
      args: abstract arrays with their sharding, or trees of them.
      options: further arguments, static ones among them.
      alive: kind ("parameters", "optimizer", "cache", "data") → arrays that are in memory
        meanwhile; arguments that are in none count as data.
      layout: from mesh and shapes to abstract results, where the program is not compiled.
      calls: number of calls in a step at most.
    """

    name: str
    function: Any
    args: tuple
    options: Mapping[str, Any] = {}
    alive: Mapping[str, Any] = {}
    layout: Layout | None = None
    calls: int = 1


Programs = Generator[Program, Any, Any]
"""Yields programs, is sent their abstract results, and returns the result of the whole."""


def along(programs: Programs, alive: Mapping[str, Any], prefix: str = "") -> Programs:
    """Yields programs with further arrays in memory, and names that begin with a prefix."""
    sent = None
    while True:
        try:
            program = programs.send(sent)
        except StopIteration as end:
            return end.value
        kinds = {*alive, *program.alive}
        both = {k: [alive.get(k), program.alive.get(k)] for k in kinds}
        sent = yield program._replace(name=prefix + program.name, alive=both)


def switched(
    programs: Programs, name: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Programs:
    """Yields programs with further arrays in memory, others from the program of a name on."""
    sent, alive = None, before
    while True:
        try:
            program = programs.send(sent)
        except StopIteration as end:
            return end.value
        alive = after if program.name == name else alive
        sent = yield from along(single(program), alive)


def single(program: Program) -> Programs:
    """Yields one program; returns its results."""
    return (yield program)


def mesh_of(tree: Any) -> Mesh:
    """Returns the mesh of abstract arrays."""
    return jax.tree.leaves(tree)[0].sharding.mesh


def whole(mesh: Mesh, tree: Any) -> Any:
    """Returns abstract arrays that every device holds whole."""
    return jax.tree.map(lambda x: _with(x, NamedSharding(mesh, P())), tree)


def by_prompts(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Returns abstract arrays whose axis of the prompts is sharded over `data` and `fsdp`."""

    def lay(x: Any) -> Any:
        return _with(x, NamedSharding(mesh, P(*[None] * (axis % x.ndim), BATCH[0])))

    return jax.tree.map(lay, tree)


def as_params(mesh: Mesh, tree: Any, *, gathered: bool = False) -> Any:
    """Returns abstract parameters or optimizer state, sharded as the rules say."""
    return jax.tree.map(_with, tree, param_shardings(tree, mesh, gathered=gathered))


def by_prompts_and_heads(mesh: Mesh, x: Any, axis: int, heads: int) -> Any:
    """Shards prompts over `data` and `fsdp`, and the heads of keys and values over `tensor`."""
    axis %= x.ndim
    spec = [None] * x.ndim
    spec[axis] = BATCH[0]
    if axis == 1:
        spec[x.ndim - 3] = head_axis(mesh, heads)
    return _with(x, NamedSharding(mesh, P(*spec)))


def first_rows(tree: Any, rows: int) -> Any:
    """Returns the shapes of some rows of abstract arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding), tree
    )


def _with(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
