"""Every format and layout comes to the same prompts, in the same order, from any position on."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.config.corpora import CorporaSettings, SourceSettings
from prism_ray.corpora import jsonlines
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.files import CorpusError
from prism_ray.corpora.identity import id_said
from prism_ray.corpora.quarantine import Quarantined
from prism_ray.corpora.reader import RowOrder, counted, find_fragments, prompt_at, read_piece
from prism_ray.corpora.rows import COLUMNS, ID_COLUMNS, STUDENT, BadRow
from prism_ray.corpora.stream import read_prompts
from prism_ray.response import render


@pytest.fixture
def small(monkeypatch):
    """Fragments of 200 bytes, so that lines lie across their edges."""
    monkeypatch.setattr(jsonlines, "FRAGMENT_BYTES", 200)


def line(index, **more):
    return {"id": f"row-{index}", "prompt": [{"role": "user", "content": f"what is {index}"}], "answer": index} | more


def write_lines(path, rows, newline="\n", encoding="utf-8"):
    path.write_bytes(newline.join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    return path


def prompts(source, seed=0):
    order = RowOrder(find_fragments([source]), seed)
    return [prompt_at(p.fragment.file, at, row) for p in order.pieces(0, order.rows) for _, at, row in read_piece(p)]


def answers(order, start, stop):
    return [int(row["answer"]) for piece in order.pieces(start, stop) for _, _, row in read_piece(piece)]


def bad(path, **needs):
    """Reason by place of what cannot be used."""
    order = RowOrder(find_fragments([path]), 0)
    items = [item for p in order.pieces(0, order.rows) for *_, item in read_prompts(p, Requirements(**needs))]
    return {item.row: item.reason for item in items if isinstance(item, Quarantined)}


@pytest.mark.parametrize("length", [1, 7, 40, 900])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_every_line_is_a_row_once_wherever_fragments_are_cut(tmp_path, small, length, newline):
    path = write_lines(tmp_path / "a.jsonl", [line(i, note="é" * (i * length % 311)) for i in range(50)], newline)
    order = RowOrder(find_fragments([path]), 1)
    assert len(order.fragments) > 10
    assert sorted(answers(order, 0, 50)) == sorted(answers(order, 50, 100)) == list(range(50))
    assert answers(order, 0, 50) != answers(order, 50, 100) and order.rows == 50


def test_the_columns_of_lines_are_those_of_the_first_rows_together(tmp_path, small, monkeypatch):
    rows = [line(0) | {"answer": None}, line(1), {"prompt": [], "picture": "a.png"}, *map(line, range(3, 90))]
    del rows[0]["answer"]
    path = write_lines(tmp_path / "a.jsonl", rows)
    read, lines = [], jsonlines._lines_of
    monkeypatch.setattr(jsonlines, "_lines_of", lambda file, part: read.append(part.group) or lines(file, part))
    assert len(find_fragments([path], ("prompt", "reward_model"))) > 10 and set(read) == {0}
    path.write_bytes(b'{"prompt": \n' + path.read_bytes())
    find_fragments([path], ("prompt", "reward_model"))
    with pytest.raises(CorpusError, match=r"no column labels \(it has id, prompt, answer"):
        find_fragments([path], ("labels",))


def test_of_the_first_fragment_few_rows_are_looked_at(tmp_path):
    rows = [{"prompt": []}] * 64 + [{"prompt": [], "answer": 1}]
    with pytest.raises(CorpusError, match=r"no column reward_model \(it has prompt\)"):
        find_fragments([write_lines(tmp_path / "a.jsonl", rows)], ("reward_model",))
    find_fragments([write_lines(tmp_path / "b.jsonl", rows[1:])], ("reward_model",))


def test_reading_starts_without_the_rest_of_the_file_and_any_cut_is_the_same_stream(tmp_path, small, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [line(i) for i in range(200)])
    read, lines = [], jsonlines._lines_of

    def watched(file, fragment):
        read.append(fragment.group)
        return lines(file, fragment)

    monkeypatch.setattr(jsonlines, "_lines_of", watched)
    order = RowOrder(find_fragments([path]), 3)
    answers(order, 0, 5)
    assert len(set(read)) <= 1 + 5 < len(order.fragments) / 4, "the first fragment of the file, and those of five rows"
    whole = answers(order, 0, 450)
    for cut in (1, 77, 199, 200, 333):
        again = RowOrder(find_fragments([path]), 3)
        assert answers(again, 0, cut) + answers(RowOrder(find_fragments([path]), 3), cut, 450) == whole


def test_a_copy_of_an_order_need_not_count_what_was_counted(tmp_path, small, monkeypatch):
    order = RowOrder(find_fragments([write_lines(tmp_path / "a.jsonl", [line(i) for i in range(60)])]), 3)
    order.count_to(150)
    copy = RowOrder.__new__(RowOrder)
    copy.__setstate__(order.__getstate__())
    monkeypatch.setattr("prism_ray.corpora.reader.count_rows", None)
    assert [p.rows.tolist() for p in copy.pieces(100, 150)] == [p.rows.tolist() for p in order.pieces(100, 150)]


def test_rows_are_estimated_from_a_few_fragments_and_counted_where_it_matters(tmp_path, small):
    path = write_lines(tmp_path / "a.jsonl", [line(i) for i in range(400)])
    order = RowOrder(find_fragments([path]), 0)
    assert 300 < order.about < 500 and order.about == RowOrder(find_fragments([path]), 0).about
    assert order.first(7) == 7 and order.first(10**6) == 400 and order.rows == 400
    assert sum(f.rows for f in counted(find_fragments([path]))) == 400


def test_array_and_lines_and_parquet_hold_the_same_rows(tmp_path, make):
    rows = [make.row(i, images=[]) | {"prompt": [{"role": "user", "content": f'{i} [{{"\\'}]} for i in range(30)]
    make.write(tmp_path / "a.parquet", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    parts = {name: prompts(tmp_path / name) for name in ("a.parquet", "a.json", "a.jsonl", "lines.json")}
    wanted = sorted(parts.pop("a.parquet"), key=lambda p: p.id)
    assert len(wanted) == 30
    for found in parts.values():
        assert sorted(found, key=lambda p: p.id) == wanted


def test_a_large_array_is_cut_into_fragments(tmp_path, small):
    (tmp_path / "a.json").write_text(json.dumps([line(i) for i in range(40)]))
    order = RowOrder(find_fragments([tmp_path / "a.json"]), 0)
    assert len(order.fragments) > 10 and sorted(answers(order, 0, 40)) == list(range(40))


def test_sharegpt_with_an_image_folder(tmp_path, make):
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(make.png(i))
    answer = render("a", "b", "7")
    said = [{"from": "human", "value": "<image><image>which?"}, {"from": "gpt", "value": answer}]
    row = {"conversations": said, "system": "be exact", "images": ["0.png", "1.png"]}
    (tmp_path / "sft.json").write_text(json.dumps([row]))
    (prompt,) = prompts(SourceSettings(path=tmp_path / "sft.json", images=tmp_path / "pictures"))
    assert prompt.messages == (
        {"role": "system", "content": "be exact"},
        {"role": "user", "content": "<image><image>which?"},
    )
    assert prompt.images == (make.png(0), make.png(1)) and prompt.reference == answer


def test_messages_with_several_turns_learn_the_last_answer(tmp_path):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", render("c", "t", "a2"))]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (prompt,) = prompts(write_lines(tmp_path / "a.jsonl", [row]))
    assert [m["content"] for m in prompt.messages] == ["q1", "a1", "q2"] and prompt.reference == turns[-1][1]


def test_warmup_pairs_keep_both_sides(tmp_path, make):
    (tmp_path / "a.png").write_bytes(make.png(3))
    row = {"id": 5, "image": "a.png", "question": "why?", "teacher_caption": "<caption>c</caption>"}
    row |= {"teacher_cot": "<think>t</think><answer>1</answer>", "student_caption": "<caption>d</caption>"}
    row |= {"student_cot": "<think>u</think><answer>2</answer>"}
    source = SourceSettings(path=write_lines(tmp_path / "w.jsonl", [row]), system="be exact")
    (prompt,) = prompts(source)
    assert prompt.id == "5" and prompt.images == (make.png(3),) and prompt.reference == render("c", "t", "1")
    assert [m["content"] for m in prompt.messages] == ["be exact", "<image>why?"]
    assert prompt.extra[STUDENT] == render("d", "u", "2")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_columns_are_mapped_by_config(tmp_path, make, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "0.png").write_bytes(make.png(1))
    rows = [{"problem": "why?", "picture": "0.png", "solution": {"final": "6"}, "kind": "geo"}]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = {"question": "problem", "image": "picture", "answer": "solution.final", "data_source": "kind"}
    (prompt,) = prompts(SourceSettings(path=path, columns=columns))
    assert prompt.messages[0]["content"] == "<image>why?" and prompt.images == (make.png(1),)
    assert (prompt.ground_truth, prompt.data_source) == ("6", "geo")
    with pytest.raises(CorpusError, match=r"no column prompt \(it has problem, picture, solution, kind\)"):
        find_fragments([path])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_another_name_is_mapped_from_no_longer_counts_under_its_own(tmp_path, kind):
    row = {"prompt": "why?", "id": "6", "messages": "read 1 times", "extra_info": {"id": "x", "final": "red"}}
    path = tmp_path / f"a.{kind}"
    write_lines(path, [row]) if kind == "jsonl" else pq.write_table(pa.Table.from_pylist([row]), path)
    columns = {"question": "prompt", "answer": "id", "system": "messages"}
    (prompt,) = prompts(SourceSettings(path=path, columns=columns))
    assert [turn["content"] for turn in prompt.messages] == ["read 1 times", "why?"]
    assert (prompt.ground_truth, prompt.id) == ("6", "x")
    (order,) = [RowOrder(find_fragments([SourceSettings(path=path, columns=columns)]), 0)]
    assert [id_said(r) for p in order.pieces(0, 1) for *_, r in read_piece(p, ID_COLUMNS)] == ["x"]
    inside = {"question": "prompt", "answer": "extra_info.final"}
    (prompt,) = prompts(SourceSettings(path=path, columns=inside | {"id": "id", "data_source": "messages"}))
    assert (prompt.ground_truth, prompt.id, prompt.extra["id"]) == ("red", "6", "x")
    with pytest.raises(CorpusError, match="no column reward_model"):
        find_fragments([SourceSettings(path=path, columns={"id": "extra_info"})], ("prompt", "reward_model"))


def test_several_images_may_be_mapped_to_the_name_of_one(tmp_path, make):
    (tmp_path / "0.png").write_bytes(make.png(1))
    path = write_lines(tmp_path / "a.jsonl", [{"question": "<image><image>?", "images": ["0.png", "0.png"]}])
    (prompt,) = prompts(SourceSettings(path=path, columns={"image": "images"}))
    assert prompt.images == (make.png(1),) * 2


def test_a_format_can_be_named_and_an_unknown_one_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.txt", [line(0)])
    with pytest.raises(CorpusError, match=r"a.txt: not known what .txt is .*name it as `format`"):
        find_fragments([path])
    assert [p.id for p in prompts(SourceSettings(path=path, format="jsonl"))] == ["row-0"]


def test_a_folder_holds_parquet_or_lines(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", [line(0)])
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [p.id for p in prompts(tmp_path)] == ["row-0"]
    make.write(tmp_path / "b.parquet", [make.row(9)])
    assert [p.id for p in prompts(tmp_path)] == ["row-9"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows; write the corpus again"),
        (b"\xef\xbb\xbf \n", "no rows; write the corpus again"),
        ('{"prompt": 1}'.encode("utf-16"), "it is UTF-16; write it as plain UTF-8"),
        (b"\x1f\x8b\x08\0", r"it is compressed \(gzip\)"),
        (b'{"text": "x"}\n', r"no column prompt \(it has text\); say which of them it is in `columns`"),
    ],
)
def test_lines_that_cannot_be_a_corpus_are_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match="a.jsonl: " + message):
        assert RowOrder(find_fragments([tmp_path / "a.jsonl"]), 0).rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": []}, {"prompt": ', "the array does not end, so the file is cut or broken"),
        ("[]", "no rows"),
        ("[1, 2]", "no rows"),
    ],
)
def test_arrays_that_cannot_be_a_corpus_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CorpusError, match="a.json: " + message):
        find_fragments([tmp_path / "a.json"])


def test_an_array_over_the_stated_size_says_how_to_convert_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([line(i) for i in range(40)]))
    message = r"0 MB in one JSON array \(corpora.max_json_mb is 0.001.*jq -c '\.\[\]' a.json > a.jsonl"
    with pytest.raises(CorpusError, match=message):
        find_fragments([tmp_path / "a.json"], settings=CorporaSettings(max_json_mb=0.001))


def test_bad_lines_are_named_by_the_byte_they_begin_at(tmp_path):
    lines = [json.dumps(line(0)).encode(), b'{"prompt": ', b'{"prompt": "\xff\xfe"}', b"[1]", b"[" * 10**5, b'"x"']
    lines += [b'{"prompt": [{"role": "user", "content": "\\ud800"}]}', json.dumps(line(1)).encode() + b"\r"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    found = bad(path)
    assert list(found.values()).count("line: not an object") == 2
    assert {"line: not JSON", "line: not UTF-8", "line: nested too deeply", "text: half of a surrogate pair"} < {
        *found.values()
    }
    assert len(found) == 6
    for place in found:
        assert path.read_bytes()[place:].split(b"\n")[0].rstrip(b"\r") in lines


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(jsonlines, "FRAGMENT_BYTES", 300)
    path = write_lines(tmp_path / "a.jsonl", [line(0), line(1, note="x" * 5000), line(2)])
    assert list(bad(path).values()) == ["line: too long"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": ""}, "question: empty"),
        ({"question": 4}, "question: not text"),
        ({"conversations": "hello"}, "conversations: not a list of turns"),
        ({"conversations": ["hello"]}, "conversations: a turn that is no object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages: a turn of nobody known"),
        ({"conversations": [{"from": "gpt", "value": "only an answer"}]}, "prompt: not a list of chat turns"),
        ({"question": "<image>?", "images": []}, "prompt: <image> markers and images differ in number"),
    ],
)
def test_rows_of_other_layouts_that_cannot_be_used_say_why(tmp_path, row, reason):
    assert list(bad(write_lines(tmp_path / "a.jsonl", [row])).values()) == [reason]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "link/secret.png", "a/../../secret.png"])
def test_image_paths_may_not_lead_out_of_the_folder(tmp_path, make, path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(make.png())
    (folder / "link").symlink_to(tmp_path)
    found = bad(write_lines(folder / "a.jsonl", [{"question": "?", "image": path}]))
    assert list(found.values()) == ["images: a path that leads out of the corpus's folder"]


def test_image_paths_that_name_no_usable_file(tmp_path, make, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "large.png").write_bytes(make.png())
    monkeypatch.setattr("prism_ray.corpora.rows.MAX_IMAGE_BYTES", 10)
    paths = ["folder", "large.png", "gone.png", "a\0b.png", "data:image/png;base64,***"]
    found = bad(write_lines(tmp_path / "a.jsonl", [{"question": "?", "image": path} for path in paths]))
    assert sorted(found.values()) == [
        "images: a data URI that is not base64",
        "images: a file that cannot be read",
        "images: a file that cannot be read",
        "images: a file that is too large",
        "images: a path that is no file",
    ]


def test_an_image_may_be_a_data_uri(tmp_path, make):
    import base64

    uri = "data:image/png;base64," + base64.b64encode(make.png(2)).decode()
    (prompt,) = prompts(write_lines(tmp_path / "a.jsonl", [{"question": "?", "image": uri}]))
    assert prompt.images == (make.png(2),)


def test_published_positions_of_parquet_stay_what_they_were(tmp_path, make):
    """Checkpoints of earlier versions hold them."""
    make.write(tmp_path / "a.parquet", map(make.row, range(20)), group=8)
    order = RowOrder(find_fragments([tmp_path]), seed=1)
    groups = np.random.default_rng([1, 0]).permutation(3)
    wanted = []
    for group in groups:
        rows = 8 if group < 2 else 4
        wanted += [8 * int(group) + int(r) for r in np.random.default_rng([1, 0, int(group)]).permutation(rows)]
    assert answers(order, 0, 20) == wanted


def test_broken_row_is_raised_by_whoever_wants_its_prompt():
    with pytest.raises(BadRow, match="line: not JSON"):
        prompt_at("a.jsonl", 0, BadRow("line: not JSON"))


def test_a_gif_named_jpg_is_no_jpeg(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "GIF")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    path = write_lines(tmp_path / "a.jsonl", [{"question": "?", "image": "a.jpg"}])
    assert list(bad(path).values()) == ["images: does not decode"]


def test_a_column_that_no_row_has_cannot_be_mapped():
    with pytest.raises(ValueError, match="quesiton is nothing that a row says; name some of id, data_source"):
        SourceSettings(path=Path("a"), columns={"quesiton": "q"})


def test_other_data_sources_and_missing_students_are_quarantined(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [line(0, data_source="mine"), line(1, data_source="theirs")])
    assert list(bad(path, data_sources=("mine",)).values()) == ["data_source: not one of corpora.data_sources"]
    assert list(bad(path, student=True).values()) == ["student_caption, student_cot: missing"] * 2


def test_an_id_is_the_same_whatever_else_is_read_of_its_row(tmp_path):
    """Who goes on with a corpus reads only the ids of what came before."""
    said = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": render(" red", " max", " 1")}]
    rows = [
        {"uid": 7, "question": "a"},
        {"uid": "bad", "question": ["not text"]},
        {"extra_info": {"id": "inside"}, "conversations": said},
        {"uid": None, "extra_info": "{", "question": "b"},
        {"uid": "\ud800", "question": "c"},
        {"uid": "bad", "question": " "},
        {"question": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    flat = [{"uid": str(i), "question": "" if i % 2 else "q", "extra_info": "{"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "b.parquet")
    for name, wanted in (("a.jsonl", ["", "", "", "", "7", "bad", "bad", "inside"]), ("b.parquet", list("0123"))):
        source = SourceSettings(path=tmp_path / name, columns={"id": "uid"})
        pieces = RowOrder(find_fragments([source], ()), 0).pieces(0, len(wanted))
        whole, only = ([id_said(r) for p in pieces for *_, r in read_piece(p, c)] for c in (COLUMNS, ID_COLUMNS))
        assert whole == only and sorted(whole) == wanted
