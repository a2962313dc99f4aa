"""Responses a person can read beside their image: samples of each checkpoint, judged rollouts, the judge's worst pairs.

Everything that a model wrote is escaped; images are made small, so that the page stays light.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from html import escape
from typing import Any

from PIL import Image

from prism_ray.report.sections import fixed

Row = Mapping[str, Any]
"""A row of samples.jsonl or worst_pairs.jsonl; whatever it lacks is left out."""

LARGEST_SIDE = 320
"""Pixels of the longer side of an image on the page."""
MOST_PIXELS = 64_000_000
"""A larger image is not opened."""
MOST_CHARACTERS = 6000
"""Of one response on the page."""
MOST_CARDS = 60
"""Of one kind (samples, judged groups, worst pairs of a view)."""
_ELEMENT = re.compile(r"<(\w+)>(.*?)</\1>", re.DOTALL)


def sample_cards(samples: Sequence[Row]) -> str:
    """Held-out questions, each with what every checkpoint answered, in the order of the checkpoints."""
    questions: dict[tuple[str, str], list[Row]] = {}
    for sample in samples:
        questions.setdefault((str(sample.get("question", "")), str(sample.get("image") or "")), []).append(sample)
    cards = [_question_card(question, image, rows) for (question, image), rows in questions.items()]
    return _cards(cards)


def _question_card(question: str, image: str, rows: Sequence[Row]) -> str:
    wanted = next((row["ground_truth"] for row in rows if row.get("ground_truth")), None)
    right = f'<p class="meaning">right answer: {escape(str(wanted))}</p>' if wanted else ""
    answers = "".join(
        f"<section><h4>{escape(str(row.get('label', '')))}</h4>{_response(row.get('response'))}"
        f"<p>{_truth_chips(row.get('truth'))}</p></section>"
        for row in rows
    )
    return _card(image, f'<p class="question">{_plain(question)}</p>{right}', answers)


def judged_cards(groups: Sequence[Row]) -> str:
    """Groups as the judge saw them while the loop ran: the reference and some of the rollouts, with their scores."""
    cards = []
    for group in groups:
        rollouts = [r for r in group.get("rollouts") or () if isinstance(r, Mapping)]
        head = f"group {group.get('group')}, update {group.get('version')}"
        if group.get("judge_version"):
            head += f", judge version {group['judge_version']}"
        sides = [("reference", group.get("reference"), _score_chips(group.get("reference_scores")))]
        for rollout in rollouts:
            chips = _score_chips(rollout.get("scores") or rollout.get("parts"))
            reward = f'<span class="chip">reward {fixed(rollout.get("reward"))}</span>'
            reason = f'<span class="chip bad">{escape(str(rollout["reason"]))}</span>' if rollout.get("reason") else ""
            sides.append((f"rollout {rollout.get('index')}", rollout.get("response"), reward + chips + reason))
        body = "".join(
            f"<section><h4>{escape(title)}</h4>{_response(text)}<p>{chips}</p></section>"
            for title, text, chips in sides
            if text
        )
        question = f'<p class="meaning">{escape(head)}</p><p class="question">{_plain(str(group.get("question")))}</p>'
        cards.append(_card(str(group.get("image") or ""), question, body))
    return _cards(cards)


def worst_pair_cards(pairs: Sequence[Row]) -> str:
    """Of each view the held-out pairs that the discriminator is most wrong about, in the order they are given."""
    views: dict[str, list[Row]] = {}
    for pair in pairs:
        views.setdefault(str(pair.get("view", "")), []).append(pair)
    shown = {f"{view} ({len(rows)} pairs)": _cards([_pair(row) for row in rows]) for view, rows in views.items()}
    return "".join(f"<details><summary>{escape(title)}</summary>{html}</details>" for title, html in shown.items())


def _pair(row: Row) -> str:
    gap = row.get("gap")
    wrong = isinstance(gap, (int, float)) and gap < 0
    word = "the rollout is preferred" if wrong else "the reference is preferred"
    head = (
        f'<p class="question">{_plain(str(row.get("question", "")))}</p>'
        f'<p><span class="chip {"bad" if wrong else "good"}">gap {fixed(gap)}: {word}</span></p>'
    )
    sides = (("reference", row.get("reference_score"), row.get("reference")),
             (f"rollout {row.get('rollout', '')}", row.get("rollout_score"), row.get("response")))  # fmt: skip
    texts = _marked(str(sides[0][2] or ""), str(sides[1][2] or ""))
    body = "".join(
        f'<section><h4>{escape(title)} <span class="chip">score {fixed(score)}</span></h4>{text}</section>'
        for (title, score, _), text in zip(sides, texts, strict=True)
    )
    return _card(str(row.get("image") or ""), head, body)


def _cards(cards: Sequence[str]) -> str:
    more = len(cards) - MOST_CARDS
    rest = f'<p class="none">{more} more are in the run\'s folder.</p>' if more > 0 else ""
    return f'<div class="cards">{"".join(cards[:MOST_CARDS])}</div>{rest}' if cards else ""


def _card(image: str, head: str, body: str) -> str:
    return f'<article>{picture(image)}<div>{head}<div class="answers">{body}</div></div></article>'


@lru_cache(maxsize=256)
def picture(data: str) -> str:
    """An encoded image (base64) as an HTML image no larger than the page needs; a word where it cannot be shown."""
    if not data:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                if image.width * image.height > MOST_PIXELS:
                    return '<p class="none">image too large</p>'
                small = image.convert("RGB")
                small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # PIL raises SyntaxError for a bad PNG
        return '<p class="none">image cannot be shown</p>'
    shown = io.BytesIO()
    small.save(shown, "PNG", optimize=True)
    if shown.tell() > 60_000:  # a photograph
        shown = io.BytesIO()
        small.save(shown, "JPEG", quality=80)
    kind = "jpeg" if shown.getvalue()[:2] == b"\xff\xd8" else "png"
    encoded = base64.b64encode(shown.getvalue()).decode()
    return f'<img alt="the image of the question" src="data:image/{kind};base64,{encoded}">'


def _response(text: Any) -> str:
    """A response by its elements (caption, think, answer), each under its name; one without elements as it is."""
    text = str(text or "")
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + " …"
    found = list(_ELEMENT.finditer(text))
    if not found or _ELEMENT.sub("", text).strip():  # something stands outside of the elements: show all there is
        return f"<pre>{escape(text)}</pre>"
    return "".join(f"<pre><b>{escape(match[1])}</b>{escape(match[2].strip())}</pre>" for match in found)


def _marked(*texts: str) -> list[str]:
    """Two responses with the words marked in which they differ."""
    if max(map(len, texts)) > MOST_CHARACTERS:
        return [_response(text) for text in texts]
    words = [re.split(r"(\s+)", _ELEMENT.sub(r"\1: \2\n", text)) for text in texts]
    shown: list[list[str]] = [[], []]
    for what, *ends in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (low, high) in enumerate((ends[:2], ends[2:])):
            part = escape("".join(words[side][low:high]))
            shown[side].append(part if what == "equal" or not part.strip() else f"<mark>{part}</mark>")
    return [f"<pre>{''.join(parts)}</pre>" for parts in shown]


def _plain(question: str) -> str:
    return escape(question.replace("<image>", "").strip())


def _truth_chips(truth: Any) -> str:
    items: Iterable[tuple[Any, Any]] = truth.items() if isinstance(truth, Mapping) else []
    return "".join(_truth_chip(str(name), value) for name, value in items)


def _truth_chip(name: str, value: Any) -> str:
    if value in (0, 1):  # also True, False and 0.0, 1.0
        return f'<span class="chip {"good" if value else "bad"}">{"✓" if value else "✗"} {escape(name)}</span>'
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f'<span class="chip">{escape(name)} {escape(shown)}</span>'


def _score_chips(scores: Any) -> str:
    items: Iterable[tuple[Any, Any]] = scores.items() if isinstance(scores, Mapping) else []
    return "".join(f'<span class="chip">{escape(str(name))} {fixed(value)}</span>' for name, value in items)
