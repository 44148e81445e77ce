"""A policy's folder, written whole or not at all."""

import shutil
from pathlib import Path

from emor3_jax.models import LoadedPolicy, save
from emor3_jax.parallel import hosts


def save_whole(policy: LoadedPolicy, folder: Path) -> None:
    """Writes a policy as `models.save`, beside the folder, and puts it into its place at the end.

    Args:
      policy: the policy; all processes call this.
      folder: replaced if it is there.

    Raises:
      Exception: what went wrong in writing; the folder is then as it was.
    """
    beside, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    if hosts.is_first():
        shutil.rmtree(beside, ignore_errors=True)
    try:
        save(policy, beside)
    except BaseException:
        if hosts.is_first():
            shutil.rmtree(beside, ignore_errors=True)
        raise
    if not hosts.is_first():
        return
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
