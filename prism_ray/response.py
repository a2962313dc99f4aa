"""The response format: `<caption>…</caption><think>…</think><answer>…</answer>`.

Rendering, strict parsing, and where each view lies in a response's tokens. Parsing never raises on model output: a
response that breaks the format is a value with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from prism_ray.config.views import TAGS, ViewSettings

_TAG = re.compile(rb"<(/?)(caption|think|answer)>")
_EXPECTED = tuple((slash, tag.encode()) for tag in TAGS for slash in (b"", b"/"))


@dataclass(frozen=True)
class Parsed:
    """A parsed response. `parts` maps tag to inner text, `spans` maps the name of each view asked for to its half-open
    span.

    From `parse` the spans count UTF-8 bytes of the text; from `locate` they count tokens. Both are empty when
    `valid` is False, and `reason` then says what is wrong.
    """

    valid: bool
    reason: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def render(caption: str, think: str, answer: str) -> str:
    """The response with these parts, exactly as the format wants it; a part that contains a tag is refused."""
    for name, part in zip(TAGS, (caption, think, answer), strict=True):
        if _TAG.search(part.encode()):
            raise ValueError(f"the {name} contains one of the format's own tags; remove it before rendering")
    return f"<caption>{caption}</caption><think>{think}</think><answer>{answer}</answer>"


def parse(text: str, views: Sequence[ViewSettings] = ()) -> Parsed:
    """Parse a response: the three elements in order, once each, nothing outside them but whitespace."""
    return _parse_bytes(text.encode(errors="replace"), views)


def _parse_bytes(data: bytes, views: Sequence[ViewSettings]) -> Parsed:
    found = list(_TAG.finditer(data))
    kinds = tuple((m.group(1), m.group(2)) for m in found)
    if kinds != _EXPECTED:
        return Parsed(False, _what_is_wrong(kinds))
    outside = [data[: found[0].start()], data[found[5].end() :]]
    outside += [data[found[i].end() : found[i + 1].start()] for i in (1, 3)]
    if any(gap.decode(errors="replace").strip() for gap in outside):
        return Parsed(False, "text outside the tags")
    parts = {
        tag: data[found[2 * i].end() : found[2 * i + 1].start()].decode(errors="replace") for i, tag in enumerate(TAGS)
    }
    edges = {tag: (found[2 * i].start(), found[2 * i + 1].end()) for i, tag in enumerate(TAGS)}
    spans = {view.name: (edges[view.tags[0]][0], edges[view.tags[-1]][1]) for view in views}
    return Parsed(True, "", parts, spans)


def _what_is_wrong(kinds: tuple[tuple[bytes, bytes], ...]) -> str:
    for slash, tag in _EXPECTED:
        count = kinds.count((slash, tag))
        name = f"<{slash.decode()}{tag.decode()}>"
        if count == 0:
            return f"missing {name}"
        if count > 1:
            return f"more than one {name}"
    return "tags out of order"


def locate(pieces: Sequence[bytes], views: Sequence[ViewSettings]) -> Parsed:
    """Parse a response given as the bytes of each token, in one pass; spans count tokens. Views come in order.

    A token belongs to a view if it overlaps it; one that overlaps two belongs to the earlier. `pieces` comes from
    indexing `piece_table` with the response's token ids.
    """
    parsed = _parse_bytes(b"".join(pieces), views)
    if not parsed.valid:
        return parsed
    found = list(parsed.spans.items())
    owned: dict[str, list[int]] = {view: [] for view in parsed.spans}
    start, current = 0, 0
    for index, piece in enumerate(pieces):
        end = start + len(piece)
        while current < len(found) and found[current][1][1] <= start:
            current += 1
        if current == len(found):
            break
        view, (low, high) = found[current]
        if piece and start < high and end > low:
            owned[view].append(index)
        start = end
    if any(not tokens for tokens in owned.values()):
        return Parsed(False, "a view shares all of its tokens with another")
    spans = {view: (tokens[0], tokens[-1] + 1) for view, tokens in owned.items()}
    return Parsed(True, "", parsed.parts, spans)


def piece_table(tokenizer: Any) -> list[bytes]:
    """The bytes of every token of a byte-level BPE tokenizer, by id; special tokens are empty.

    Joining the pieces of a response gives the bytes of its decoded text, so no prefix is ever decoded again.
    """
    decoder = {char: byte for byte, char in _byte_alphabet().items()}
    special = set(tokenizer.all_special_ids)
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    table: list[bytes] = []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if index in special:
            table.append(b"")
        elif index in added or token is None:
            table.append(added.get(index, "").encode())
        else:
            table.append(bytes(decoder[c] for c in token))
    return table


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[int, str]:
    """Byte-level BPE's printable stand-in for each byte: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
