"""Keys and values that later tokens attend to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax.types import Array


class KV(NamedTuple):
    """Keys (after rope) and values of a prefix, held once per prompt and shared by its responses.

    Attributes:
      k: float[layers, B, kv_heads, head_dim, P]; with the positions last, a decoded token reads its
        keys without a transpose.
      v: float[layers, B, kv_heads, P, head_dim].
      mask: bool[B, P], True where a key may be attended to.
    """

    k: Array
    v: Array
    mask: Array


class Routing(NamedTuple):
    """Where single tokens, each a row of its own, meet the keys of their prompts.

    The rows are cut into parts, and so are the prompts; both only know others of their part.

    Attributes:
      rows: int32[parts, S * M], the row that each cell of a part's S prompts holds, M cells each; a
        number past the rows for none.
      cells: int32[parts, N], the cell of each row; a number past the cells for none.
    """

    rows: jax.Array
    cells: jax.Array

    @classmethod
    def of(cls, cells: jax.Array, count: int, parts: int) -> "Routing":
        """Returns the routing of rows by their cells, int32[B]; `count` is S * M."""
        cells = cells.reshape(parts, -1)
        number = cells.shape[1]

        def invert(own: jax.Array) -> jax.Array:
            empty = jnp.full(count, number, jnp.int32)
            return empty.at[own].set(jnp.arange(number, dtype=jnp.int32), mode="drop")

        return cls(jax.vmap(invert)(cells), cells)

    def to_prompts(self, x: jax.Array, prompts: int) -> jax.Array:
        """Moves rows [B, 1, …] to their prompts, [prompts, M, …]; a cell without a row is 0."""
        found = _pick(x[:, 0], self.rows)
        return found.reshape(prompts, -1, *x.shape[2:])

    def to_rows(self, x: jax.Array) -> jax.Array:
        """Moves cells [prompts, M, …] back to their rows, [B, 1, …]; a row without one is 0."""
        found = _pick(x.reshape(-1, *x.shape[2:]), self.cells)
        return found.reshape(-1, 1, *x.shape[2:])


class Cache(NamedTuple):
    """Keys and values of the continuations themselves, `C` slots for each.

    Attributes:
      k: float[layers, B, G, kv_heads, head_dim, C]; for unrolled layers (`params.unroll`) a tuple
        with one array for each.
      v: float[layers, B, G, kv_heads, C, head_dim], or such a tuple.
      mask: bool[B, G, C].
      routing: where the continuations, each a row of its own (G = 1), meet their prompts; None if
        row i has prompt i.
    """

    k: Array | tuple[jax.Array, ...]
    v: Array | tuple[jax.Array, ...]
    mask: Array
    routing: Routing | None = None


def _pick(x: jax.Array, at: jax.Array) -> jax.Array:
    """Picks within each part; an index out of range picks 0."""
    parts = len(at)

    def own(x: jax.Array, at: jax.Array) -> jax.Array:
        return x.at[at].get(mode="fill", fill_value=0)

    return jax.vmap(own)(x.reshape(parts, -1, *x.shape[1:]), at)
