"""Every reward rule in plain Python, from the method: what the token tables must agree with."""

import re
from collections.abc import Sequence

from benchmarks.plain_rules import MARKS, boxed, format_score, normalise

__all__ = ["MARKS", "format_score", "normalise"]


def format_by_regex(text: str) -> int:
    """The rule word for word; takes very long on some texts."""
    pattern = ".*".join(map(re.escape, MARKS)) + ".*"
    return int(re.fullmatch(pattern, normalise(text), re.DOTALL) is not None)


def _index(text: str, labels: Sequence[str]) -> int:
    lowered = [label.lower() for label in labels]
    return lowered.index(text.lower()) if text.lower() in lowered else -1


def answer(text: str, labels: Sequence[str]) -> int:
    """Index of the boxed label, -1 if there is none."""
    return _index(boxed(normalise(text)), labels)


def reply_label(text: str, labels: Sequence[str]) -> int:
    """Index of the label that the reply is; -2 empty or `none`; -1 anything else."""
    return -2 if text.lower() in ("", "none") else _index(text, labels)


def yes_no(text: str) -> int:
    """1 if the reply contains `yes`; else 0 if it contains `no`; else -1."""
    return 1 if "yes" in text.lower() else 0 if "no" in text.lower() else -1


def coherence_text(text: str) -> str | None:
    """From the first `<step1>` to the end of the first `</step2>` after it."""
    found = re.search("<step1>.*?</step2>", text, re.DOTALL)
    return found and found[0].strip()


def consistency_text(text: str) -> str | None:
    """From the first `<step1>` up to the first `<step2>` after it."""
    found = re.search("<step1>.*?(?=<step2>)", text, re.DOTALL)
    return found and found[0].strip()


def scores(
    response: str,
    label: str,
    labels: Sequence[str],
    replies: tuple[str, str] | None,
    profile: str,
    coherence_target: str,
) -> dict[str, float]:
    """All scores of one response; `replies` are those to coherence and consistency, if asked."""
    paper = profile == "paper"
    boxed_label = answer(response, labels)
    out = {
        "format": float(format_score(response)),
        "accuracy": float(boxed_label >= 0 and labels[boxed_label].lower() == label.lower()),
    }
    base = 0.8 * out["accuracy"] + 0.1 * out["format"]
    if replies is None:
        out["coherence"] = out["consistency"] = 0.0 if paper else 1.0
        out["overall"] = base + (0.1 * out["accuracy"] if paper else 0.2)
        return out
    coherence, consistency = replies
    if coherence_text(response) is None:
        coherence = "" if paper else "None"
    if consistency_text(response) is None:
        consistency = "" if paper else "None"
    target = boxed_label if coherence_target == "answer" else _index(label, labels)
    if not paper and coherence.lower() in ("", "none"):
        out["coherence"] = 0.5
    else:
        out["coherence"] = float(target >= 0 and _index(coherence, labels) == target)
    said = yes_no(consistency)
    out["consistency"] = float(said) if said >= 0 else (0.0 if paper else 0.5)
    reflection = out["coherence"] + out["consistency"]
    out["overall"] = base + 0.1 * reflection / (2 if paper else 1)
    return out
