"""Programs of the package, as `python -m` runs them, by processes that need not import it anew."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Imported once; each program is a fork of that process, in which JAX has no devices yet.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["emor3_jax.prepare", "emor3_jax.runtime.run"])


def run(
    module: str,
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Runs a module as a program.

    Args:
      module: its name.
      arguments: of the command line.
      cwd: folder to run in.
      env: variables to add, none of which is read while the package is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        given = module, arguments, str(cwd), dict(os.environ) | dict(env or {}), files
        process = _CONTEXT.Process(target=_run, args=given)
        process.start()
        process.join()
        out, err = (file.read_text() for file in files)
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, out, err)


def _run(
    module: str, arguments: tuple[str, ...], cwd: str, env: dict[str, str], files: list[Path]
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    # Signals as a shell leaves them, and the path as `-m` sets it.
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = [module, *arguments]
    # Of the module, which other modules may have imported.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
