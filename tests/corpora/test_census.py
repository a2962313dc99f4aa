"""Facts of rows, and what is found by them: duplicates, near duplicates, overlaps."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from prism_ray.corpora.census import SIGNATURE, facts_of, picture_of, signature_of
from prism_ray.corpora.files import Fragment
from prism_ray.corpora.likeness import find_pairs
from prism_ray.corpora.portrait import Portrait, Row, overlap, spread
from prism_ray.corpora.quarantine import Quarantine, Quarantined
from prism_ray.records import Prompt

LONG = (
    "A triangle has sides of 3, 4 and {0} units and a right angle between the shorter two. Its corners are called A, B "
    "and C, and a circle touches all of its sides. Which share of the triangle's area lies outside of the circle?"
)


def drawing(seed, size=(300, 200), kind="PNG", quality=60):
    """A picture with shapes, as diagrams have them."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (300, 200), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = rng.integers(0, [250, 150, 120, 90])
        pen.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    buffer = io.BytesIO()
    image.resize(size).save(buffer, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return buffer.getvalue()


def asking(text, *images, name="p"):
    return Prompt(name, ({"role": "system", "content": "s"}, {"role": "user", "content": "<image>" + text}), images)


def pairs(*prompts):
    facts = [facts_of(p) for p in prompts]
    return find_pairs(
        np.array([f.key for f in facts], np.uint64),
        np.stack([f.signature for f in facts]),
        np.stack([f.picture for f in facts]),
    )


def portrait(name, prompts, bad=()):
    made = Portrait(name, Quarantine(name, 0, 0.1))
    made.fragments = [Fragment(f"{name}.parquet", 0, 0, len(prompts))]
    for place, prompt in enumerate(prompts):
        made.take(0, place, Row(facts_of(prompt), prompt.data_source, 7, 0))
    for place in bad:
        made.take(0, place, Quarantined(f"{name}.parquet", place, "prompt: empty"))
    return made


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_equal_entries_estimate_the_share_of_common_shingles(share):
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 8)) for _ in range(3000)]
    estimates = []
    for start in range(0, 2400, 60):
        some, other = words[start : start + 60], words[::-1][start : start + 60]
        split = int(60 * share)
        first, second = " ".join(some), " ".join(some[:split] + other[split:])
        a = {first[i : i + 8] for i in range(len(first) - 7)}
        b = {second[i : i + 8] for i in range(len(second) - 7)}
        jaccard = len(a & b) / len(a | b)
        estimates.append((signature_of(first) == signature_of(second)).mean() - jaccard)
    assert abs(np.mean(estimates)) < 0.04
    assert np.std(estimates) < 1.2 * 0.5 / SIGNATURE**0.5


def test_what_layout_case_and_markers_are_does_not_matter():
    assert not len(pairs(asking("One two"), asking("one three")).exact)
    assert pairs(asking("One  two\n"), asking("one two")).exact.tolist() == [[0, 1]]
    assert not len(pairs(asking("one two", drawing(0)), asking("one two", drawing(1))).exact)


def test_every_copy_is_told_with_the_first_of_its_kind():
    texts = ["a", "b", "a", "c", "a", "b"]
    assert pairs(*(asking(t) for t in texts)).exact.tolist() == [[0, 2], [0, 4], [1, 5]]


def test_a_reworded_question_with_a_recompressed_image_is_a_near_duplicate():
    image, again = drawing(0), drawing(0, (280, 187), "JPEG")
    rows = (asking(LONG.format(5), image), asking("Hi! " + LONG.format(5) + "Thanks.", again))
    found = pairs(*rows, asking(LONG.format(5), drawing(1)), asking("something else entirely, said at length", image))
    assert found.near.tolist() == [[0, 1]] and not len(found.exact)
    assert pairs(*(asking(p.messages[1]["content"]) for p in rows)).near.tolist() == [[0, 1]], "without images, too"


def test_hashes_of_unlike_drawings_are_far_apart():
    hashes = [picture_of(drawing(i)) for i in range(20)]
    distances = [np.bitwise_count(a ^ b).sum() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 30


@pytest.mark.parametrize("text", ["", "é", "数学" * 3, "a" * 100_000])
def test_any_text_has_a_signature(text):
    assert signature_of(text).shape == (SIGNATURE,) and signature_of(text).dtype == np.uint32
    assert (signature_of(text) == signature_of(text)).all()


def test_a_portrait_tells_counts_lengths_and_duplicates():
    prompts = [asking("a", drawing(0), name="x"), asking("a", drawing(0), name="y"), asking("bcd", name="x")]
    told = portrait("sft", prompts, bad=(7, 8)).described()
    assert (told["rows"], told["usable"], told["quarantined"]) == (5, 3, {"prompt: empty": 2})
    assert told["images_per_prompt"] == {"0": 1, "1": 2} and told["image width"]["most"] == 300
    assert told["prompt tokens"] == {"mean": 7.0, "least": 7, "median": 7, "p90": 7, "p99": 7, "most": 7}
    assert told["duplicates"]["exact"] == {"count": 1, "examples": [["row 0 of sft.parquet", "row 1 of sft.parquet"]]}
    assert told["duplicate_ids"] == {"count": 1, "examples": [["row 0 of sft.parquet", "row 2 of sft.parquet"]]}


def test_held_out_rows_that_were_trained_on_are_told():
    held_out = [asking(LONG.format(i), drawing(i)) for i in range(4)]
    trained = [asking("other", drawing(9)), held_out[2], held_out[2], asking(LONG.format(1) + ".", drawing(1))]
    trained += [trained[0]]
    told = overlap(portrait("align", trained), portrait("evaluate", held_out))
    assert (told["exact"], told["near"]) == (1, 1)
    assert told["examples"][0] == ["row 2 of evaluate.parquet", "row 1 of align.parquet"]
    assert overlap(portrait("align", trained[:1]), portrait("evaluate", held_out))["exact"] == 0


def test_every_held_out_row_that_was_trained_on_counts_whatever_else_equals_it():
    again = asking(LONG.format(0) + " Thanks.", drawing(0), name="again")
    held_out = [asking(LONG.format(0), drawing(0)), asking(LONG.format(0), drawing(0)), again, asking("other")]
    trained = [asking("mine"), held_out[0], held_out[0]]
    told = overlap(portrait("align", trained), portrait("evaluate", held_out))
    assert (told["exact"], told["near"]) == (2, 1)
    reworded = [asking(LONG.format(0) + "!", drawing(0)), asking(LONG.format(0) + "!!", drawing(0))]
    told = overlap(portrait("align", reworded), portrait("evaluate", held_out))
    assert (told["exact"], told["near"]) == (0, 3)
    assert told["examples"][0][0] == "row 0 of evaluate.parquet"


def test_near_rows_are_found_among_many_that_are_alike_on_one_side():
    """What is sorted between a held-out row and its like must not hide it."""
    held_out = [asking(LONG.format(0) + f" Take case {i}.", drawing(0)) for i in range(30)]
    told = overlap(portrait("align", [asking(LONG.format(0) + " Take care.", drawing(0))]), portrait("e", held_out))
    assert (told["exact"], told["near"]) == (0, 30)


def test_spread_is_made_of_values_that_occur():
    assert spread([1, 2, 3, 100]) == {"mean": 26.5, "least": 1, "median": 2, "p90": 100, "p99": 100, "most": 100}


def test_candidates_must_be_alike_as_a_whole():
    signature = np.arange(SIGNATURE, dtype=np.uint32)
    half = np.where(np.arange(SIGNATURE) < SIGNATURE // 2, signature, 99).astype(np.uint32)
    near, far = np.array([0, 0, 0, 0b1111], np.uint64), np.array([0, 0, 0, 2**63 - 1], np.uint64)
    same = np.zeros(4, np.uint64)

    def found(text, picture):
        keys = np.array([1, 2], np.uint64)
        return len(find_pairs(keys, np.stack([signature, text]), np.stack([same, picture])).near)

    assert (found(signature, near), found(signature, far), found(half, near)) == (1, 0, 0)
