"""What a training step costs, counted from shapes; `python -m emor3_jax.account` prints it."""

from emor3_jax.account.cost import Cost, Number
from emor3_jax.account.peak import peak_flops, throughput
from emor3_jax.account.step import (
    LAYOUTS,
    PHASES,
    Question,
    ShapeError,
    Shapes,
    count,
    shapes_of,
    step_flops,
    total,
)

__all__ = [
    "LAYOUTS",
    "PHASES",
    "Cost",
    "Number",
    "Question",
    "ShapeError",
    "Shapes",
    "count",
    "peak_flops",
    "shapes_of",
    "step_flops",
    "throughput",
    "total",
]
