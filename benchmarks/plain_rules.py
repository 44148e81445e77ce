"""The rules of format and accuracy in plain Python, for what the benchmarks run beside."""

import re

MARKS = ("<step1>", "</step1>", "<step2>", "</step2>", "<step3>", "</step3>", "\\boxed{", "}")


def normalise(text: str) -> str:
    """Returns the text without whitespace beside `<`, `>` and `/`."""
    return re.sub(r"\s*([<>/])\s*", r"\1", text)


def format_score(text: str) -> float:
    """Returns 1 if the text opens with `<step1>` and has all marks in their order, else 0."""
    text, at = normalise(text), 0
    if not text.startswith(MARKS[0]):
        return 0.0
    for mark in MARKS:
        at = text.find(mark, at)
        if at < 0:
            return 0.0
        at += len(mark)
    return 1.0


def boxed(text: str) -> str:
    """Returns the content of the last box of a normalised text, "None" without one."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, char in enumerate(rest if mark else ""):
        depth += (char == "{") - (char == "}")
        if not depth:
            return rest[:i].strip()
    return "None"


def accuracy_score(text: str, answer: str) -> float:
    """Returns 1 if the last box of the text holds the answer, else 0."""
    return float(boxed(normalise(text)).lower() == answer.lower())


def pattern_score(text: str, pattern: str) -> float:
    """Returns 1 if the regular expression occurs in the text, else 0."""
    return float(re.search(pattern, text) is not None)
