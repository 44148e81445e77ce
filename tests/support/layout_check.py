"""Prints where the layout that a program's results are foretold in is not the compiled one.

On 8 fake devices, for every program of a tiny step: JSON of [program, place, foretold, compiled].
"""

import json
import sys
from typing import Any

import jax

from emor3_jax.compiler.record import Recorder
from emor3_jax.compiler.step import step_programs
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.parallel.program import Program
from support import real_step, tiny_step


class Comparison(Recorder):
    """Compiles everything, and compares.

    Attributes:
      unlike: what is not as foretold.
      compared: names of the programs.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.unlike, self.compared = [], []

    def __call__(self, program: Program) -> Any:
        foretold, compiled = program.results(self.mesh), super().__call__(program)
        self.compared.append(program.name)

        def compare(path: tuple, x: Any, y: Any) -> None:
            if not x.sharding.is_equivalent_to(y.sharding, x.ndim):
                place = jax.tree_util.keystr(path)
                self.unlike.append((program.name, place, str(x.sharding), str(y.sharding)))

        jax.tree_util.tree_map_with_path(compare, foretold, compiled)
        return compiled


def main(case: str, sizes: str) -> None:
    """Compiles a case on a mesh, such as "2x2x2", and prints."""
    config = tiny_step.make_config()
    config.policy.dtype = "bfloat16"
    config.rollout.prompts, config.rollout.slots, config.rollout.refill = 32, 16, 8
    config.evaluate.prompts = 8
    real_step.CASES.get(case, lambda config: None)(config)
    mesh = make_mesh(*map(int, sizes.split("x")))
    record = Comparison(mesh)
    with jax.set_mesh(mesh):
        record.run(step_programs(mesh, config, tiny_step.POLICY, tiny_step.QUESTIONS))
    print("\n" + json.dumps({"unlike": record.unlike, "compared": record.compared}))


if __name__ == "__main__":
    main(*sys.argv[1:])
