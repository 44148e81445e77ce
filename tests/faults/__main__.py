"""Tries all faults and prints a table, see `faults.table`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support import compiler_flags

    # As the victims.
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiler_flags.FAST}
    from faults.table import main

    main()
