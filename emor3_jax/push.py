"""Uploads the policy of a run to the Hugging Face hub.

    emor3 push RUN owner/name [--private] [--revision=BRANCH] [--message=TEXT]

RUN is the workdir of a run, of which the newest state is taken, one of its checkpoints, or a folder
in Hugging Face's format. What would not load is refused before anything is sent. Log in by
`hf auth login`, or set HF_TOKEN. From Python:

    from emor3_jax.push import push
    print(push("runs/demo", "owner/name"))
"""

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from emor3_jax.data.inference_settings import FILE, InferenceSettings
from emor3_jax.errors import UserError
from emor3_jax.files import is_file, is_folder, read_text, show
from emor3_jax.inference.loading import PolicyPlace, find_policy, locate
from emor3_jax.io.card import CARD_FILE
from emor3_jax.io.console import Console
from emor3_jax.io.upload import check_name, check_token, upload
from emor3_jax.models import check_folder, vllm
from emor3_jax.parallel.devices import expected_platform
from emor3_jax.parallel.flags import set_flags
from emor3_jax.runtime import cli, job
from emor3_jax.runtime.card import card_of_run
from emor3_jax.runtime.policy_folder import save_whole

FLAGS = flags.FLAGS

LEFT_OUT = [".*", "*/.*", "*__pycache__*", "*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]
"""Files of a folder that are not uploaded: hidden ones, code, and pickles."""


def push(
    name: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    say: Callable[[str], None] | None = None,
    api: HfApi | None = None,
) -> str:
    """Uploads a policy.

    Args:
      name: a run, a checkpoint or a folder, see `inference.loading.find_policy`.
      repository: "owner/name"; made if it is not there.
      private, revision, api: as of `io.upload.upload`.
      message: of the commit; None says which policy it is.
      say: told what is done.

    Returns:
      Its address on the hub.

    Raises:
      UserError, FileNotFoundError: before any upload, if there is no such policy, it would not
        load, or name and token do not do; and for what the hub refuses.
      RunError: if the hub or the network fails.
    """
    say, api = say or (lambda line: None), api or HfApi()
    check_name(repository)
    check_token(api)
    place = locate(name)
    if place.folder is not None and not is_folder(place.folder):
        raise UserError(f"{show(name)} is on the hub; give a run, a checkpoint or a folder on disk")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_exported(place, name, say))
        check_folder(folder)
        for line in vllm.advice(folder):
            say(line)
        message = message or f"Upload the policy {_title(place, name)}"
        staged = stack.enter_context(_staged(folder, repository, say))
        say(f"uploading {place.folder or show(name)} to {api.endpoint}/{repository}")
        return upload(
            staged, repository, private=private, revision=revision, message=message, api=api
        )


def _title(place: PolicyPlace, name: str | Path) -> str:
    """Returns the name of a policy without the folders that it is in."""
    if place.run is None:
        return Path(name).absolute().name
    return place.run.absolute().name + ("" if place.step is None else f", step {place.step}")


@contextlib.contextmanager
def _exported(place: PolicyPlace, name: str | Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Returns the policy's folder; that of a checkpoint is written first, for the time."""
    if place.folder is not None:
        yield Path(place.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        found = find_policy(name, say=say)
        folder, config = Path(temporary) / "policy", job.read_config(place.run)
        settings = found.settings or InferenceSettings()
        family = found.policy.policy.family.model_type
        title = place.run.absolute().name
        card = card_of_run(title, "", config, family, found.step, settings)
        save_whole(found.policy, folder, {FILE: settings.to_json(), CARD_FILE: card})
        yield folder


@contextlib.contextmanager
def _staged(folder: Path, repository: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Returns a folder of links to what is uploaded, with the model card renamed."""
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if is_file(path)]
    wanted = list(filter_repo_objects(files, ignore_patterns=LEFT_OUT))
    if left := sorted(set(files) - set(wanted)):
        say(f"left out: {', '.join(map(show, left))}")
    with tempfile.TemporaryDirectory() as temporary:
        beside = Path(temporary)
        for name in wanted:
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            if name == CARD_FILE:
                card = renamed(read_text(folder / name, UserError), repository)
                (beside / name).write_text(card, encoding="utf-8")
            else:
                (beside / name).symlink_to((folder / name).absolute())
        yield beside


def renamed(card: str, repository: str) -> str:
    """Returns a model card of this package that names the policy as the hub does.

    Args:
      card: as of `io.card.model_card`; another one is returned as it is.
      repository: "owner/name".
    """
    card = re.sub(r"(?m)^(emor3 (?:infer|serve)) \S+", rf"\1 {repository}", card)
    return re.sub(r'(?m)^(folder, image = )"[^"\n]*"', rf'\1"{repository}"', card)


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    for name in ("emor3_jax", "absl", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    set_flags(expected_platform())
    with cli.errors_told():
        if len(arguments) != 3:
            raise UserError("give a policy and its name on the hub: emor3 push RUN owner/name")
        say = Console("push")
        address = push(
            *arguments[1:],
            private=FLAGS.private,
            revision=FLAGS.revision,
            message=FLAGS.message,
            say=say,
        )
        say("done")
        print(address, flush=True)


if __name__ == "__main__":
    flags.DEFINE_boolean("private", False, "A repository that only its owner sees.")
    flags.DEFINE_string("revision", None, "Branch, made if it is not there; main by default.")
    flags.DEFINE_string("message", None, "Of the commit.")
    app.run(main, flags_parser=cli.parse_flags)
