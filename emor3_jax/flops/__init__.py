"""FLOPs model: the cost of a training step, counted from its shapes."""

from emor3_jax.flops.cost import Cost
from emor3_jax.flops.peak import peak_flops, throughput
from emor3_jax.flops.step import (
    PHASES,
    JudgeShapes,
    QuestionTokens,
    ShapeError,
    StepShapes,
    mean_judge_shapes,
    mean_shapes,
    phase_costs,
    step_flops,
    total,
)

__all__ = [
    "PHASES",
    "Cost",
    "JudgeShapes",
    "QuestionTokens",
    "ShapeError",
    "StepShapes",
    "mean_judge_shapes",
    "mean_shapes",
    "peak_flops",
    "phase_costs",
    "step_flops",
    "throughput",
    "total",
]
