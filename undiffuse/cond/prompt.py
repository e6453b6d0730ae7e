"""Prompts as people write them: weights on words, and what the picture must not be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from undiffuse.types import InputError

_PLAIN = r"write \( and \) for plain parentheses"
_NO = "--no"


@dataclass(frozen=True)
class Prompt:
    """A text, the weight of each of its characters (1: as it is), and the prompt to be guided against, if any."""

    text: str
    weights: tuple[float, ...]
    negative: Prompt | None = None

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.text):
            raise InputError(f"{len(self.weights)} weights for a text of {len(self.text)} characters")


def plain(text: str | Prompt) -> Prompt:
    """A text word for word, with the weight 1 everywhere."""
    if isinstance(text, Prompt):
        return text
    if not isinstance(text, str):
        raise InputError(f"a text must be a string, got {text!r}")
    return Prompt(text, (1.0,) * len(text))


def prompt(text: str) -> Prompt:
    r"""What "a (red:1.3) car --no (wheels:2), people" means: `(words:weight)` multiplies the tokens of these words by a
    weight >= 0, nested ones by the product, and words after `--no` are what guidance leads away from.

    Parentheses that are meant are written \( and \), a backslash \\. InputError for a parenthesis without an end or a
    beginning, and for a weight that is missing, not a number, or negative.

    >>> found = prompt("a (red:1.5) car --no wheels")
    >>> found.text, sorted(set(found.weights)), found.negative.text
    ('a red car', [1.0, 1.5], 'wheels')
    """
    words, *rest = text.split(f" {_NO} ") if not text.startswith(f"{_NO} ") else ["", text[len(_NO) + 1 :]]
    if len(rest) > 1 or text.rstrip().endswith(_NO):
        raise InputError(f"prompt {text!r}: {_NO} is followed once by all that must not be, with commas between")
    return Prompt(*_weighted(words, text), negative=Prompt(*_weighted(rest[0], text)) if rest else None)


def _weighted(text: str, whole: str) -> tuple[str, tuple[float, ...]]:
    """(text without marks, weight of each character)."""
    found: list[str] = []
    weights: list[float] = []
    starts: list[int] = []  # in `found`, of the parentheses that are open
    i = 0
    while i < len(text):
        c = text[i]
        if c == "\\" and text[i + 1 : i + 2] in ("(", ")", "\\") and i + 1 < len(text):
            found.append(text[i + 1])
            weights.append(1.0)
            i += 2
            continue
        i += 1
        if c == "(":
            starts.append(len(found))
        elif c == ")":
            if not starts:
                raise InputError(f"prompt {whole!r}: a ) without its (; {_PLAIN}")
            start = starts.pop()
            colon = max((k for k in range(start, len(found)) if found[k] == ":"), default=None)
            inside = "".join(found[start:])
            if colon is None:
                raise InputError(f"prompt {whole!r}: ({inside}) has no weight: write ({inside}:1.3), or {_PLAIN}")
            weight = _number("".join(found[colon + 1 :]), inside, whole)
            del found[colon:], weights[colon:]
            weights[start:] = [w * weight for w in weights[start:]]
        else:
            found.append(c)
            weights.append(1.0)
    if starts:
        raise InputError(f"prompt {whole!r}: a ( without its ); {_PLAIN}")
    return "".join(found), tuple(weights)


def _number(word: str, inside: str, whole: str) -> float:
    try:
        weight = float(word)
    except ValueError as error:
        raise InputError(f"prompt {whole!r}: the weight {word!r} of ({inside}) is no number") from error
    if not 0 <= weight < math.inf:
        raise InputError(f"prompt {whole!r}: the weight {word!r} of ({inside}) must be a finite number >= 0")
    return weight
