"""The form in which labels and answers are compared, in Python and in the tables of the rewards."""

import re
import unicodedata

_AROUND = re.compile(r"\s*([<>/])\s*")


def tidy(label: str) -> str:
    """Returns a label with its letters composed (NFC), and without space around it or at a slash.

    The tables of the rewards leave out the space beside `<`, `>` and `/` in what they read, so a
    label with such space could never be right.
    """
    return _AROUND.sub(r"\1", unicodedata.normalize("NFC", label)).strip()


def normalize(label: str) -> str:
    """Returns a label or an answer as they are compared: tidied and lower-cased."""
    return tidy(label).lower()
