"""A policy's folder, written whole or not at all."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from emor3_jax.models import LoadedPolicy, save
from emor3_jax.parallel import hosts


def save_whole(policy: LoadedPolicy, folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes a policy as `models.save`, beside the folder, and puts it into its place at the end.

    Args:
      policy: the policy; all processes call this.
      folder: replaced if it is there.
      texts: name of a further file in it → its contents.

    Raises:
      Exception: what went wrong in writing; the folder is then as it was.
    """
    beside, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    if hosts.is_first():
        shutil.rmtree(beside, ignore_errors=True)
    try:
        save(policy, beside)
        if hosts.is_first():
            for name, text in (texts or {}).items():
                (beside / name).write_text(text, encoding="utf-8")
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
