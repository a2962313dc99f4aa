"""Whether an answer says the same as the truth: the order of PRISM's published rules (arXiv 2604.28123), pure.

Several values, multiple choice, coordinates, equal text, numbers with units, words, then, where it is given, symbolic
mathematics. Where the published rules contradict themselves or mathematics, ours differ; `tests/verify/cases.csv`
marks the cases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prism_ray.verify.choice import LETTERS, option_of, picked
from prism_ray.verify.normalise import clean, closing, depth, split_values, top_level_commas, words
from prism_ray.verify.quantity import Quantity, quantity, same_quantity
from prism_ray.verify.units import split_unit

Symbolic = Callable[[str, str], bool]
"""`symbolic(truth, answer)`: whether two expressions, LaTeX or plain, are mathematically the same."""

MAX_ANSWER = 1024
"""An answer of this many characters or more is not compared: it is worth its format only, as published."""

MAX_SYMBOLIC = 256
"""Longest expression, in characters, that is worth a symbolic comparison."""

MAX_DEPTH = 16
"""Deepest nesting of brackets that is taken apart; what is nested deeper is compared as text only."""

_POINT = re.compile(r"(?:[A-Z]'?|\([a-z], ?[a-z]\)) ?=? ?(?=[(])")
_LABEL = re.compile(r"([^=<>≤≥≠]{1,40}?) ?= ?([^=].*)")
_VARIABLE = re.compile(r"(?:\\?[a-z](?:_?[0-9])?|[A-Z])'*")
_PHRASE = re.compile(r" (?:is|are|equals|measures)(?: equal to)?:? |: ?", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|isn't|never|no)\b|n't", re.IGNORECASE)
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}|\\[A-Za-z]+")
_FUNCTION = re.compile(r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|lg|exp|sqrt|pi|lim|max|min|gcd|lcm|mod|det")
_WORD = re.compile(r"[A-Za-z]{3,}")
_MATHEMATICS = re.compile(r"[0-9+*/^=<>\\|!-]|^[A-Za-z]$")
_NO_MATHEMATICS = re.compile(r"^[-+0-9. ]*[0-9] [-+]?[0-9][-+0-9. ]*$|(?<![0-9.])0[0-9]")  # lists without commas, dates
_DEGREES = re.compile(r"([0-9.]+) ?°")
_TRIGONOMETRY = re.compile(r"sin|cos|tan|cot|sec|csc")
_PLAIN_ROOT = re.compile(r"(?<!\\)sqrt ?\(([^()]*)\)")


@dataclass(frozen=True)
class Judged:
    """Whether an answer is right, and the rule that said so (`none` where no rule found it right)."""

    right: bool
    rule: str


def judge(answer: str, truth: str, symbolic: Symbolic | None = None, letters: str = LETTERS) -> Judged:
    """Compare an answer with the truth. `letters` are the options of a multiple choice, `""` for none.

    An answer that is empty, or of `MAX_ANSWER` characters or more, is wrong; so is any where there is no truth.
    """
    if not truth.strip() or not 0 < len(answer.strip()) < MAX_ANSWER or len(truth) >= MAX_ANSWER:
        return Judged(False, "none")
    given, wanted = clean(answer), clean(truth)
    if (option := option_of(wanted, letters)) is not None:
        return Judged(_text(given, wanted) or _chosen(given, *option, letters, symbolic), "choice")
    if _text(given, wanted):
        return Judged(True, "text")
    if max(depth(given), depth(wanted)) > MAX_DEPTH:
        return Judged(False, "none")
    for right in split_values(wanted):
        for values in split_values(given):
            if len(values) == len(right) > 1 and _all(values, right, symbolic, letters):
                return Judged(True, "values")
    if _several(given) or _several(wanted):
        return Judged(False, "values")
    return _one_value(given, wanted, symbolic)


def _chosen(given: str, letter: str, text: str, letters: str, symbolic: Symbolic | None) -> bool:
    """The letter decides; an answer that picks none may say what the option says."""
    if choice := picked(given, letters):
        return choice == letter
    return bool(text) and _one_value(given, clean(text), symbolic).right


def _all(values: list[str], wanted: list[str], symbolic: Symbolic | None, letters: str) -> bool:
    return all(judge(v, w, symbolic, letters).right for v, w in zip(values, wanted, strict=True))


def _several(text: str) -> bool:
    return all(len(values) > 1 for values in split_values(text))


def _one_value(given: str, wanted: str, symbolic: Symbolic | None) -> Judged:
    for rule in (_coordinates, _numbers):
        if (verdict := rule(given, wanted, symbolic)) is not None:
            return verdict
    if _text(given, wanted):
        return Judged(True, "text")
    for short, full in _shorter(given, wanted):
        return _one_value(short, full, symbolic)
    return _mathematics(given, wanted, symbolic)


def _text(given: str, wanted: str) -> bool:
    return given == wanted or (bool(words(wanted)) and words(given) == words(wanted))


def _coordinates(given: str, wanted: str, symbolic: Symbolic | None) -> Judged | None:
    """Points, vectors and intervals: the same brackets around as many values, all the same. None for anything else."""
    one, other = _tuple(given), _tuple(wanted)
    if one is None or other is None:
        return None
    (left, right, values), (wanted_left, wanted_right, expected) = one, other
    if len(values) != len(expected):
        return Judged(False, "coordinates")
    if (left, right) == (wanted_left, wanted_right) and _all(values, expected, symbolic, ""):
        return Judged(True, "coordinates")
    return Judged(False, "coordinates")


def _tuple(text: str) -> tuple[str, str, list[str]] | None:
    text = _POINT.sub("", text, count=1) if _POINT.match(text) else text
    if len(text) < 5 or text[0] not in "([" or text[-1] not in ")]" or closing(text, 0) != len(text) - 1:
        return None
    values = top_level_commas(text[1:-1])
    return (text[0], text[-1], values) if len(values) > 1 else None


def _numbers(given: str, wanted: str, symbolic: Symbolic | None) -> Judged | None:
    """Numbers with units; None where one of the two is none. Units that differ decide, whatever the numbers are."""
    one, other = quantity(given), quantity(wanted)
    if one is None or other is None:
        return None
    return Judged(same_quantity(one, other), "number")


def _shorter(given: str, wanted: str) -> Iterator[tuple[str, str]]:
    """The same comparison without a label (`x = 5`) or a phrase ("the area is 5") that only one side, or both, have."""
    (name, value), (wanted_name, expected) = _labelled(given), _labelled(wanted)
    if name and wanted_name:
        variables = _VARIABLE.fullmatch(name) and _VARIABLE.fullmatch(wanted_name)
        if name == wanted_name or (not variables and _primes(name) == _primes(wanted_name)):
            yield value, expected
    elif name or wanted_name:
        yield value, expected
    elif (said := _said(given)) != given or (_said(wanted)) != wanted:
        yield said, _said(wanted)


def _labelled(text: str) -> tuple[str, str]:
    """What stands left of the only equals sign of a text, if that is a name and no equation, and the rest."""
    match = _LABEL.fullmatch(text) if text.count("=") == 1 else None
    if match is None:
        return "", text
    name = match[1].strip()
    plain = _VARIABLE.fullmatch(name) or re.fullmatch(r"[a-z]'*\([a-z]\)|[A-Z]{2,4}|\\?[A-Za-z][A-Za-z ]+|°.*", name)
    return (name, match[2].strip()) if plain else ("", text)


def _said(text: str) -> str:
    """What follows the only "is" or colon of a sentence without digits before it; the text itself otherwise."""
    parts = _PHRASE.split(text)
    if len(parts) != 2 or not parts[1].strip() or not re.search("[A-Za-z]{2}", parts[0]):
        return text
    return text if re.search("[0-9]", parts[0]) or _NEGATION.search(text) else clean(parts[1])


def _mathematics(given: str, wanted: str, symbolic: Symbolic | None) -> Judged:
    (value, unit), (expected, wanted_unit) = _measured(given), _measured(wanted)
    if unit and wanted_unit and unit != wanted_unit:
        return Judged(False, "number")
    if (unit or wanted_unit) and value and _text(value, expected):
        return Judged(True, "number")
    if _primes(value) != _primes(expected):  # a parser passes over them
        return Judged(False, "none")
    if symbolic is None or not (_mathematical(value) and _mathematical(expected)):
        return Judged(False, "none")
    right = symbolic(_expression(expected), _expression(value))
    return Judged(right, "symbolic" if right else "none")


def _primes(text: str) -> int:
    return text.count("'")


def _measured(text: str) -> tuple[str, str]:
    return (text, "") if _TRIGONOMETRY.search(text) else split_unit(text)  # degrees of an angle in a function stay


def _mathematical(text: str) -> bool:
    """Whether a text may be an expression: words are none, though a parser would take `listen` for a product."""
    if len(text) > MAX_SYMBOLIC or not _MATHEMATICS.search(text) or _NO_MATHEMATICS.search(text):
        return False
    return all(_FUNCTION.fullmatch(word) for word in _WORD.findall(_COMMAND.sub(" ", text)))


def _expression(text: str) -> str:
    """The text as LaTeX that a parser reads as it is meant: degrees in radians, `sqrt(2)` as a command."""
    text = _PLAIN_ROOT.sub(r"\\sqrt{\1}", text).replace("**", "^")
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\1\\pi/180)", text)
    return text


def quantity_of(text: str) -> Quantity | None:
    """The quantity that a text is, whatever it is dressed in."""
    return quantity(clean(text))
