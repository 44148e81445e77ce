"""The batch of the step by which a guard ended a run, kept in `workdir/replay/<step>`.

`step.json` says which rows it was, what was answered, and why the run ended; `arrays.npz` has the
tokens, scores and advantages. Neither needs pickles. `emor3_jax.replay` reads them.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.errors import UserError
from emor3_jax.files import read_json
from emor3_jax.runtime.guards import GuardError
from emor3_jax.runtime.step_log import StepRecord
from emor3_jax.types import Samples, Scores

_SCORE = "score/"


class Origin(NamedTuple):
    """Where a batch comes from.

    Attributes:
      program: "train" or "sft".
      reason: why the run ended.
      labels: of the training data.
    """

    program: str
    reason: str
    labels: Sequence[str]


class Replay(NamedTuple):
    """A batch that was kept.

    Attributes:
      origin: where it comes from.
      step: its number.
      key: PRNG key data of the step.
      ids: of its rows.
      responses: texts, [B][G].
      answers: int32[B], index of the label.
      samples: the responses, [B, G, T], with 0 as their log-probabilities.
      scores: name → float32[B, G], before weights; {} for given responses.
      rewards, advantages: float32[B, G], or None.
    """

    origin: Origin
    step: int
    key: list[int]
    ids: tuple[str, ...]
    responses: list[list[str]]
    answers: np.ndarray
    samples: Samples
    scores: dict[str, np.ndarray]
    rewards: np.ndarray | None
    advantages: np.ndarray | None

    def as_scores(self) -> Scores:
        """Returns the scores as the learner takes them; all but three are custom terms."""
        own = ("overall", "format", "accuracy")
        nothing = np.zeros(self.samples.lengths.shape, np.int32)
        rest = {name: value for name, value in self.scores.items() if name not in own}
        return Scores(*(self.scores[name] for name in own), {}, nothing, nothing, rest)


def with_batch(
    error: GuardError,
    workdir: Path,
    record: StepRecord,
    origin: Origin,
    key: jax.Array,
    tokenizer: PreTrainedTokenizerBase,
) -> GuardError:
    """Keeps the batch of the step that ends a run; returns the error, which says where.

    Args:
      error: of the guard.
      workdir, record, origin, key, tokenizer: as of `write`.
    """
    try:
        place = write(workdir, record, origin, key, tokenizer)
    except OSError as failed:
        return GuardError(f"{error}. Its batch could not be kept: {failed}")
    return GuardError(f"{error}. To look into it: python -m emor3_jax.replay {place}")


def write(
    workdir: Path,
    record: StepRecord,
    origin: Origin,
    key: jax.Array,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Writes the batch of a step; returns its folder.

    Args:
      workdir: folder of the run.
      record: of the step, fetched.
      origin: where it comes from.
      key: of the step.
      tokenizer: of the policy.
    """
    observed, experience = record.observed, record.observed.experience
    tokens, lengths = experience.samples.tokens, experience.samples.lengths
    arrays = {
        "tokens": tokens,
        "lengths": lengths,
        "ended": experience.samples.ended,
        "answers": observed.answers,
        "rewards": observed.rewards,
        "advantages": experience.advantages,
    }
    if experience.scores is not None:
        arrays |= {_SCORE + name: x for name, x in experience.scores.named().items()}
    folder = workdir / "replay" / f"{record.step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "arrays.npz", **{k: np.asarray(x) for k, x in arrays.items() if x is not None}
    )
    said = {
        **origin._asdict(),
        "labels": list(origin.labels),
        "step": record.step,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "ids": list(observed.ids),
        "responses": [
            [tokenizer.decode(t[:n]) for t, n in zip(row, counts, strict=True)]
            for row, counts in zip(tokens, lengths, strict=True)
        ],
    }
    (folder / "step.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    return folder


def find(path: Path, step: int | None = None) -> Path:
    """Returns the folder of a batch.

    Args:
      path: a run's folder, or `replay/<step>` in one.
      step: which one of a run; None takes the last.

    Raises:
      UserError: if there is none; naming those that there are.
    """
    if (path / "step.json").is_file():
        return path
    found = {
        int(x.parent.name): x.parent
        for x in sorted(path.glob("replay/*/step.json"))
        if x.parent.name.isdecimal()
    }
    if step in found:
        return found[step]
    if not found or step is not None:
        there = ", ".join(map(str, found)) or "no"
        raise UserError(
            f"{path}: keeps {there} steps for a replay; name the folder of a run that a guard ended"
        )
    return found[max(found)]


def read(folder: Path) -> Replay:
    """Reads a batch.

    Raises:
      UserError: if its files are not what `write` has written.
    """
    try:
        said = read_json(folder / "step.json", UserError, dict, finite=False)
        with np.load(folder / "arrays.npz", allow_pickle=False) as file:
            arrays = dict(file)
        tokens = arrays["tokens"]
        logprobs = np.zeros(tokens.shape, np.float32)
        return Replay(
            Origin(said["program"], said["reason"], tuple(said["labels"])),
            said["step"],
            said["key"],
            tuple(said["ids"]),
            said["responses"],
            arrays["answers"],
            Samples(tokens, logprobs, arrays["lengths"], arrays["ended"]),
            {name[len(_SCORE) :]: x for name, x in arrays.items() if name.startswith(_SCORE)},
            arrays.get("rewards"),
            arrays.get("advantages"),
        )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: is no batch for a replay ({error!r})") from error
