"""Multiple choice: which option a truth names, and which one an answer picks."""

from __future__ import annotations

import re

LETTERS = "ABCDEFGH"
"""Options of the published rule; a truth that is one of these letters makes the question one of multiple choice."""

_TRUTH = re.compile(r"[(\[]?([A-Z])[)\]]?[.:]?")
_TRUTH_WITH_TEXT = re.compile(r"(?:\(([A-Z])\) ?|([A-Z])[.):] )(.+)")
_ALONE = re.compile(r"(?:(?:option|choice|answer) )?[(\[{]? ?([A-Za-z]) ?[)\]}]?[.:]?", re.IGNORECASE)
_PHRASE = re.compile(r"\b(?i:answer|option|choice)(?: is|:| is:)? (?:option |choice )?[(\[{]?([A-Z])\b(?! ?[-+=*/^'])")
_PHRASE_ANY = re.compile(r"\b(?i:answer|option|choice)(?: is|:| is:) [(\[{]([a-z])[)\]}]")
_BRACKETS = re.compile(r"(?<![A-Za-z0-9])\(([A-Za-z])\)(?![A-Za-z0-9])")
_LEADING = re.compile(r"([A-Z])[.):] ")
_DOTTED = re.compile(r"(?<![A-Za-z0-9.])([A-Z])[.)](?= |$)")


def option_of(truth: str, letters: str = LETTERS) -> tuple[str, str] | None:
    """The letter and the text (`""` if not given) of the option that a cleaned truth names; None if it names none.

    A letter alone, `(B) text`, `B. text`, `B) text` or `B: text`.
    """
    if (match := _TRUTH.fullmatch(truth)) is not None:
        return (match[1], "") if match[1] in letters else None
    match = _TRUTH_WITH_TEXT.fullmatch(truth)
    if match is None:
        return None
    letter = match[1] or match[2]
    return (letter, match[3].strip()) if letter in letters else None


def picked(answer: str, letters: str = LETTERS) -> str:
    """The letter that a cleaned answer picks; `""` if it picks none, or more than one.

    What counts, first to last: a letter alone, the option the answer begins with (`B. five`), "answer is B", `(B)`,
    `B.` anywhere. Where the first of these that occurs names two different letters, nothing is picked.
    """
    if (match := _ALONE.fullmatch(answer)) is not None:
        return _one({match[1].upper()}, letters)
    if (match := _LEADING.match(answer)) is not None and not _others(answer[match.end() :], match[1]):
        return _one({match[1]}, letters)
    phrased = {*_PHRASE.findall(answer), *(letter.upper() for letter in _PHRASE_ANY.findall(answer))}
    for found in (phrased, {letter.upper() for letter in _BRACKETS.findall(answer)}, set(_DOTTED.findall(answer))):
        if found:
            return _one(found, letters)
    return ""


def _others(rest: str, letter: str) -> bool:
    """Whether an answer that begins with one option goes on to name another."""
    return bool({*_PHRASE.findall(rest), *_BRACKETS.findall(rest), *_DOTTED.findall(rest)} - {letter, letter.lower()})


def _one(found: set[str], letters: str) -> str:
    return next(iter(found)) if len(found) == 1 and found <= set(letters) else ""
