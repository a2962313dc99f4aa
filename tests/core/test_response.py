"""The format: strict, never raising, and located in one pass over the tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_ray.config.views import DEFAULT_VIEWS, TAGS, ViewSettings
from prism_ray.response import locate, parse, render

inner = st.text(max_size=30).filter(lambda s: "<" not in s)
GOOD = "<caption> a</caption><think> b</think><answer> c</answer>"


@given(inner, inner, inner, st.lists(st.sampled_from(["", " ", "\n", "\t\n "]), min_size=4, max_size=4))
def test_what_is_rendered_is_parsed_back_whatever_the_whitespace_around(caption, think, answer, gaps):
    whole = render(caption, think, answer)
    spaced = whole.replace("</caption><", f"</caption>{gaps[0]}<").replace("</think><", f"</think>{gaps[1]}<")
    parsed = parse(gaps[2] + spaced + gaps[3])
    encodable = [part.encode(errors="replace").decode() for part in (caption, think, answer)]
    assert parsed.valid, parsed.reason
    assert list(parsed.parts.values()) == encodable


@given(
    st.text(max_size=80)
    | st.lists(st.sampled_from(["<caption>", "</caption>", "<think>", "x", "</answer>"])).map("".join)
)
def test_parsing_never_raises_and_invalid_says_why(text):
    parsed = parse(text)
    assert parsed.valid or (parsed.reason and not parsed.parts and not parsed.spans)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing <caption>"),
        (GOOD + "!", "outside"),
        ("hm " + GOOD, "outside"),
        (GOOD.replace("</think>", "</think> so "), "outside"),
        (GOOD + GOOD, "more than one <caption>"),
        (GOOD.replace("</answer>", ""), "missing </answer>"),
        ("<think> b</think><caption> a</caption><answer> c</answer>", "order"),
        ("<caption> a<think></caption> b</think><answer> c</answer>", "order"),
    ],
)
def test_each_way_to_break_the_format_is_named(text, reason):
    parsed = parse(text)
    assert not parsed.valid
    assert reason in parsed.reason


@given(inner, inner, inner, st.integers(0, 2**32))
def test_token_spans_cover_the_views_whatever_the_tokenisation(caption, think, answer, seed):
    import random

    data = render(caption, think, answer).encode(errors="replace")
    generator, pieces, at = random.Random(seed), [], 0
    while at < len(data):
        size = generator.randint(0, 5)
        pieces.append(data[at : at + size])
        at += size
    located = locate(pieces + [b""], DEFAULT_VIEWS)
    assert located.valid
    low, high = located.spans["perception"]
    start, end = located.spans["reasoning"]
    assert 0 <= low < high <= start < end <= len(pieces)
    assert b"".join(pieces[low:high]).startswith(b"<caption>") or b"<caption>" in b"".join(
        pieces[: low + 2] + pieces[low:high]
    )
    assert b"</answer>" in b"".join(pieces[start:end])
    assert b"".join(pieces[:low]) == b"" and b"".join(pieces[end:]) == b""


def test_a_token_that_straddles_two_views_belongs_to_the_earlier():
    located = locate([b"<caption> a</cap", b"tion><think>", b" b</think><answer>", b" c</answer>", b""], DEFAULT_VIEWS)
    assert located.spans == {"perception": (0, 2), "reasoning": (2, 4)}


def test_whitespace_between_views_belongs_to_neither():
    located = locate(
        [b"<caption>", b"</caption>", b"\n", b"<think></think>", b"<answer>", b"</answer>", b"\n", b""], DEFAULT_VIEWS
    )
    assert located.spans == {"perception": (0, 2), "reasoning": (3, 6)}


def test_a_view_without_a_token_of_its_own_is_invalid_not_an_error():
    located = locate([GOOD.encode()], DEFAULT_VIEWS)
    assert not located.valid and "shares" in located.reason


def test_rendering_refuses_a_tag_inside():
    with pytest.raises(ValueError, match="caption contains"):
        render("<think>", "", "")


def test_views_are_whatever_tags_they_are_given():
    whole = [ViewSettings(name="whole", tags=TAGS)]
    each = [ViewSettings(name=name, tags=(tag,)) for name, tag in zip("abc", TAGS, strict=True)]
    said = [ViewSettings(name="said", tags=("answer",))]
    pieces = [b"<caption>", b" a", b"</caption>", b"\n", b"<think>", b" b</think>", b"<answer> c", b"</answer>", b""]
    assert locate(pieces, whole).spans == {"whole": (0, 8)}
    assert locate(pieces, each).spans == {"a": (0, 3), "b": (4, 6), "c": (6, 8)}
    assert locate(pieces, said).spans == {"said": (6, 8)}
    assert parse(GOOD).spans == {} and parse(GOOD, whole).spans == {"whole": (0, len(GOOD))}
    assert parse(GOOD, said).spans == {"said": (GOOD.index("<answer>"), len(GOOD))}
