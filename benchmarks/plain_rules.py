"""Format, accuracy and a pattern as functions of text, for peers whose rewards are that."""

import re

MARKS = ("<step1>", "</step1>", "<step2>", "</step2>", "<step3>", "</step3>", "\\boxed{", "}")


def _normalise(text: str) -> str:
    return re.sub(r"\s*([<>/])\s*", r"\1", text)


def format_score(text: str) -> float:
    """Returns 1 if the text opens with `<step1>` and has all marks in their order, else 0."""
    text, at = _normalise(text), 0
    if not text.startswith(MARKS[0]):
        return 0.0
    for mark in MARKS:
        at = text.find(mark, at)
        if at < 0:
            return 0.0
        at += len(mark)
    return 1.0


def accuracy_score(text: str, answer: str) -> float:
    """Returns 1 if the last box of the text holds the answer, else 0."""
    _, mark, rest = _normalise(text).rpartition("\\boxed{")
    depth = 1
    for i, char in enumerate(rest if mark else ""):
        depth += (char == "{") - (char == "}")
        if not depth:
            return float(rest[:i].strip().lower() == answer.lower())
    return 0.0


def pattern_score(text: str, pattern: str) -> float:
    """Returns 1 if the regular expression occurs in the text, else 0."""
    return float(re.search(pattern, text) is not None)
