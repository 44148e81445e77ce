"""Jitted programs with the shapes that they are called with, for compiling without devices.

An object that calls jitted functions also yields them as `Program`s, in the order of a call and at
the largest shapes, and is sent the results as abstract arrays (`jax.ShapeDtypeStruct` with their
sharding). So a program that is compiled ahead of time is the one that runs.
"""

from collections.abc import Callable, Generator, Mapping
from functools import wraps
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emor3_jax.parallel.mesh import head_axis, param_shardings, row_axes

Layout = Callable[[Mesh, Any], Any]
"""From mesh and shapes to abstract arrays with their sharding."""


class Program(NamedTuple):
    """One jitted function and its arguments.

    Attributes:
      name: unique within a step.
      function: jitted.
      args: abstract arrays with their sharding, or trees of them.
      options: further arguments, static ones among them.
      alive: kind ("parameters", "optimizer", "cache", "data") → arrays that are in memory
        meanwhile; arguments that are in none count as data.
      layout: of the results, where the program is not compiled; by default the function's own
        (`laid_out`), or whole on every device.
      calls: number of calls in a step at most.
    """

    name: str
    function: Any
    args: tuple
    options: Mapping[str, Any] = {}
    alive: Mapping[str, Any] = {}
    layout: Layout | None = None
    calls: int = 1

    def results(self, mesh: Mesh) -> Any:
        """Returns the abstract results, laid out as the program would lay them out."""
        shapes = self.function.eval_shape(*self.args, **self.options)
        inner = getattr(self.function, "__wrapped__", None)
        return (self.layout or getattr(inner, "layout", whole))(mesh, shapes)


def laid_out(layout: Layout) -> Callable[[Callable], Callable]:
    """Decorates a function that is to be jitted: its results lie as `layout` says.

    Left alone, the compiler chooses. Then the next program would be compiled for another layout
    than foretold, and would be over or under the memory that was promised.

    Args:
      layout: of the results.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def constrained(*args: Any, **options: Any) -> Any:
            return lay_out(layout, function(*args, **options))

        constrained.layout = layout
        return constrained

    return decorate


def lay_out(layout: Layout, tree: Any) -> Any:
    """Returns arrays of a jitted program, laid out as `layout` says.

    Without a mesh (`jax.set_mesh`) there is nothing to do.

    Args:
      layout: of the arrays.
      tree: of arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(
        lambda x, wanted: jax.lax.with_sharding_constraint(x, wanted.sharding.spec),
        tree,
        layout(mesh, tree),
    )


Programs = Generator[Program, Any, Any]
"""Yields programs, is sent their abstract results, and returns the result of the whole."""


def along(
    programs: Programs, alive: Mapping[str, Any], family: str = "", calls: int = 1
) -> Programs:
    """Yields programs as a caller sees them.

    Args:
      programs: of what is called.
      alive: further arrays that are in memory meanwhile.
      family: put in front of their names: evaluate.decode.
      calls: number of times that each is called so often.
    """
    sent = None
    while True:
        try:
            program = programs.send(sent)
        except StopIteration as end:
            return end.value
        kinds = {*alive, *program.alive}
        both = {k: [alive.get(k), program.alive.get(k)] for k in kinds}
        name = f"{family}.{program.name}" if family else program.name
        sent = yield program._replace(name=name, alive=both, calls=calls * program.calls)


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
    """Returns abstract arrays whose axis of the prompts is sharded over `data` and `fsdp`.

    Where they do not divide it, the array is whole on every device.
    """

    def lay(x: Any) -> Any:
        spec = [None] * (axis % x.ndim) + [row_axes(mesh, x.shape[axis])]
        return _with(x, NamedSharding(mesh, P(*spec)))

    return jax.tree.map(lay, tree)


def as_params(mesh: Mesh, tree: Any) -> Any:
    """Returns abstract parameters or optimizer state, sharded as the rules say."""
    return jax.tree.map(_with, tree, param_shardings(tree, mesh))


def as_gathered_params(mesh: Mesh, tree: Any) -> Any:
    """Returns abstract parameters as decoding reads them, cut over `tensor` alone."""
    return jax.tree.map(_with, tree, param_shardings(tree, mesh, gathered=True))


def by_prompts_and_whole(mesh: Mesh, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns two trees: one as `by_prompts` does, the other, means and the like, as `whole`."""
    first, second = pair
    return by_prompts(mesh, first), whole(mesh, second)


def by_prompts_and_heads(mesh: Mesh, x: Any, axis: int, heads: int) -> Any:
    """Shards prompts over `data` and `fsdp`, and the heads of keys and values over `tensor`."""
    spec: list = [None] * x.ndim
    spec[axis] = row_axes(mesh, x.shape[axis])
    # Keys and values alone have so many axes: […, heads, head_dim, tokens], or the last swapped.
    if x.ndim >= 5:
        spec[-3] = head_axis(mesh, heads)
    return _with(x, NamedSharding(mesh, P(*spec)))


def first_rows(tree: Any, rows: int) -> Any:
    """Returns the shapes of some rows of abstract arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding), tree
    )


def _with(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
