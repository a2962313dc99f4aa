"""Answers as text: without dress (LaTeX, Markdown, full-width characters), and cut into their values.

Every function takes time linear in its input: what is compared may have been written to hang us.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS = str.maketrans(
    _FULL_WIDTH
    | {ord(old): new for old, new in zip("。、【】“”‘’«»", '.,[]""\'\'""', strict=True)}
    | dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2009\u202f\u3000\t\r\n"), " ")
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"), None)
    | {
        0x2212: "-",  # minus sign
        0x00D7: r"\times ",
        0x00B7: r"\cdot ",
        0x22C5: r"\cdot ",
        0x00F7: "/",
        0x2044: "/",
        0x03C0: r"\pi ",
        0x221E: r"\infty ",
        0x2264: r"\le ",
        0x2265: r"\ge ",
        0x2260: r"\ne ",
        0x2248: r"\approx ",
        0x00B2: "^2",
        0x00B3: "^3",
        0x00BA: "°",
        0x02DA: "°",
        0x2103: "°C",
        0x2109: "°F",
        0xFFE5: "¥",
    }
)
_LATEX = (
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"\cfrac", r"\frac"),
    ("{,}", ","),
    ("~", " "),
    (r"\%", "%"),
    (r"\#", "#"),
    (r"\&", "&"),
    (r"^{\circ}", "°"),
    (r"^\circ", "°"),
    (r"\degree", "°"),
    (r"\leqslant", r"\le "),
    (r"\geqslant", r"\ge "),
    (r"\leq", r"\le "),
    (r"\geq", r"\ge "),
    (r"\neq", r"\ne "),
)
_THIN = re.compile(r"(?<=[0-9])(?:\\[,!]|[\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(r"(?<!\\)\\[ ,;:!]")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|limits|qquad|quad|bigl|bigr|Bigl|Bigr|big|Big)(?![A-Za-z])")
_FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname) ?\{([^{}]*)\}")
_ROOT = re.compile(r"√ ?(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+|[A-Za-z]))")
_QUOTES = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"))
_BOXES = (r"\boxed{", r"\fbox{", r"\text{", r"\mathrm{", r"\mathbf{", r"\textbf{")
_OPEN, _CLOSE = "([{", ")]}"

_MARKER = re.compile(r"\([0-9]{1,2}\)")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_QUOTED = re.compile(r"""(?<![\w)\]}'])(["'*_]{1,3})(?=\S)([^"'*_]+)(?<=\S)\1(?!\w)""")
_MARKS = re.compile(
    r"""(?<![0-9)\]}'!])(?<![0-9)\]}] )(?<!(?<![^\W\d_])[a-zα-ω])["'*!]+"""  # behind no number, bracket, single letter
    r"""|(?<![0-9)\]}])_+"""  # not the base of a number
    r"""|\*(?=[^\W\d_])"""  # a product that may go without it
    r"""|'(?=[^\W\d_]{3})"""  # o'clock
)
"""Marks that are no mathematics."""
_AND = re.compile(r"^(?:and|or) ", re.IGNORECASE)
_JOINED = re.compile(r" (?:and|or) ", re.IGNORECASE)


def clean(text: str) -> str:
    """The text without what only dresses it; its words, case and values stay as they are.

    Delimiters and boxes around the whole of it, LaTeX fonts and spacing, Unicode stand-ins for ASCII and LaTeX, surplus
    spaces and a final full stop are gone. Of a text with `\\boxed{…}` in it, what the last box holds is the answer.
    """
    text = _last_box(_THIN.sub("", text).translate(_CHARACTERS))
    for old, new in _LATEX:
        text = text.replace(old, new)
    text = _FONT.sub(r"\1", _DROPPED.sub("", _SPACE.sub(" ", text)))
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = " ".join(text.split())
    for _ in range(4):
        bare = _unwrapped(text)
        if bare == text:
            break
        text = bare
    return text


def split_values(text: str) -> Iterator[list[str]]:
    """The ways to read a cleaned answer as a list of values, the likeliest first.

    Parts marked (1) (2) …, parts between semicolons, between commas outside brackets, or joined by "and" or "or".
    A comma may also group thousands, so `1,234` is read as one value and then as two.
    """
    if marked := _marked(text):
        yield marked
        return
    if len(parts := _parts(text, ";")) > 1:
        yield parts
        return
    plain = _at_commas(text)
    grouped = _at_commas(_THOUSANDS.sub(lambda m: m[0].replace(",", "\x00"), text))
    if grouped != plain:
        yield [part.replace("\x00", ",") for part in grouped]
    yield plain


def words(text: str) -> str:
    """A cleaned text as words only: no case, no quotes, no punctuation between words, no article before the first.

    What may be a prime, a factorial, a product, a base or inches stays: `3!`, `f'(x)`, `2*3` are not `3`, `f(x)`, `23`.
    """
    text = text.casefold().replace("?", "")
    if "\\" not in text:
        text = _MARKS.sub("", _QUOTED.sub(r"\2", text))
    text = re.sub(r"(?<![0-9])[.,:;]|[.,:;](?![0-9])", " ", text)
    text = " ".join(text.split())
    return re.sub(r"^(?:the|an?) (?=[a-z]{3})", "", text)


def closing(text: str, start: int) -> int:
    """Where the bracket opened at `start` is closed; -1 if it is not."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in _OPEN) - (text[index] in _CLOSE)
        if depth == 0:
            return index
    return -1


def depth(text: str) -> int:
    """How deep the brackets of a text are nested."""
    deepest = level = 0
    for char in text:
        level = level + 1 if char in _OPEN else max(0, level - 1) if char in _CLOSE else level
        deepest = max(deepest, level)
    return deepest


def top_level_commas(text: str) -> list[str]:
    """The parts between the commas that stand outside brackets, stripped; empty parts are left out."""
    return _parts(text, ",")


def _last_box(text: str) -> str:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return text
    end = closing(text, start + 6)
    return text if end < 0 else text[start + 7 : end]


def _unwrapped(text: str) -> str:
    for left, right in _QUOTES:
        inner = text[len(left) : len(text) - len(right)]
        if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner:
            return inner.strip()
    for box in _BOXES:
        if text.startswith(box) and closing(text, len(box) - 1) == len(text) - 1:
            return text[len(box) : -1].strip()
    return text[:-1].rstrip() if text.endswith(".") and len(text) > 1 else text


def _marked(text: str) -> list[str]:
    found = list(_MARKER.finditer(text))
    if len(found) < 2 or found[0].start() > 2:
        return []
    ends = [m.start() for m in found[1:]] + [len(text)]
    parts = [text[m.end() : end].strip(" ,;") for m, end in zip(found, ends, strict=True)]
    return parts if all(parts) else []


def _at_commas(text: str) -> list[str]:
    parts = _parts(text, ",")
    if len(parts) > 1:
        return [_AND.sub("", part) for part in parts[:-1]] + _JOINED.split(_AND.sub("", parts[-1]))
    joined = [part.strip() for part in _JOINED.split(text)]
    return joined if all(joined) else [text]


def _parts(text: str, separator: str) -> list[str]:
    parts, start, depth = [], 0, 0
    for index, char in enumerate(text):
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth = max(0, depth - 1)
        elif char == separator and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [part for part in (*parts, text[start:].strip()) if part]
