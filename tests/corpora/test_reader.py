import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_ray.config.corpora import CorporaSettings
from prism_ray.corpora.quarantine import Quarantine, Quarantined
from prism_ray.corpora.reader import CorpusError, RowOrder, find_fragments, prompt_at, read_piece


def ids(order, start, stop):
    return [columns["answer"] for piece in order.pieces(start, stop) for _, _, columns in read_piece(piece)]


@pytest.fixture
def order(tmp_path, make):
    make.write(tmp_path / "a.parquet", map(make.row, range(20)), group=8)
    make.write(tmp_path / "b.parquet", map(make.row, range(20, 33)), group=5)
    return RowOrder(find_fragments([tmp_path]), seed=1)


def test_every_epoch_has_each_row_once_in_another_order(order):
    first, second = ids(order, 0, 33), ids(order, 33, 66)
    assert sorted(map(int, first)) == sorted(map(int, second)) == list(range(33))
    assert first != second and first != sorted(first, key=int)


def test_fragments_are_shuffled_anew_every_epoch(order):
    def places(epoch):
        return [(p.fragment.file, p.fragment.group) for p in order.pieces(33 * epoch, 33 * (epoch + 1))]

    assert len(places(0)) == 6
    assert len({tuple(places(epoch)) for epoch in range(4)}) > 1


def test_order_depends_on_the_seed_alone(order):
    again = RowOrder(order.fragments, seed=1)
    assert ids(again, 5, 50) == ids(order, 5, 50)
    assert ids(pickle.loads(pickle.dumps(order)), 5, 50) == ids(order, 5, 50)
    assert ids(RowOrder(order.fragments, seed=2), 0, 33) != ids(order, 0, 33)


def test_any_cut_of_the_stream_is_the_same_stream(order):
    whole = ids(order, 0, 100)
    for cut in (1, 7, 33, 40, 99):
        assert ids(order, 0, cut) + ids(order, cut, 100) == whole


def test_pieces_say_where_a_row_lies(order):
    for piece in order.pieces(0, 33):
        for place, in_file, columns in read_piece(piece):
            offset = 0 if piece.fragment.file.endswith("a.parquet") else 20
            assert columns["answer"] == str(in_file + offset)
            assert 0 <= place < 33


def test_missing_file_names_it_and_the_cure(tmp_path):
    with pytest.raises(CorpusError, match="gone.parquet: no Parquet file there; correct the path"):
        find_fragments([tmp_path / "gone.parquet"])
    with pytest.raises(CorpusError, match="no corpus given"):
        find_fragments([])


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_file_that_is_not_parquet_names_it_and_the_cure(tmp_path, damage, make):
    path = make.write(tmp_path / "a.parquet", map(make.row, range(9)))
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"id,prompt\n1,2\n", "empty": b""}[damage])
    with pytest.raises(CorpusError, match="a.parquet: not a readable Parquet file .*; download or write it again"):
        find_fragments([path])


def test_missing_column_and_no_rows(tmp_path, make):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a.parquet: no column prompt \(it has text\)"):
        find_fragments([tmp_path / "a.parquet"])
    make.write(tmp_path / "b.parquet", [])
    with pytest.raises(CorpusError, match="b.parquet: no rows"):
        find_fragments([tmp_path / "b.parquet"])


def test_a_row_group_too_large_to_be_read_at_once_is_refused_with_the_command_that_makes_smaller_ones(
    tmp_path, make, monkeypatch
):
    path = make.write(tmp_path / "a.parquet", map(make.row, range(40)), group=40)
    size = pq.ParquetFile(path).metadata.row_group(0).total_byte_size / 2**20
    find_fragments([path], settings=CorporaSettings(max_row_group_mb=size))
    with pytest.raises(CorpusError, match="a.parquet: row group 0 holds .* MB .corpora.max_row_group_mb is ") as caught:
        find_fragments([path], settings=CorporaSettings(max_row_group_mb=size / 4))
    command = shlex.split(str(caught.value).split("`")[1])
    assert command[0] == "python"
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert pq.read_table("a_small.parquet").equals(pq.read_table(path))
    small = find_fragments([tmp_path / "a_small.parquet"], settings=CorporaSettings(max_row_group_mb=size / 4))
    assert len(small) > 4 and sum(f.rows for f in small) == 40


def test_damage_inside_a_file_names_it(tmp_path, make):
    path = make.write(tmp_path / "a.parquet", map(make.row, range(40)), group=40)
    data = bytearray(path.read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)
    path.write_bytes(bytes(data))
    order = RowOrder(find_fragments([path]), 0)
    with pytest.raises(CorpusError, match="a.parquet: row group 0 is damaged .*; download or write the file again"):
        ids(order, 0, 40)


def test_quarantine_counts_writes_and_stops(tmp_path):
    bad = Quarantine("corpus", rows=100, max_share=0.02)
    bad.add([Quarantined("a", 1, "images: does not decode"), Quarantined("a", 2, "prompt: empty")])
    bad.add([Quarantined("a", 1, "images: does not decode")])
    assert len(bad) == 2 and bad.counts["prompt: empty"] == 1
    assert bad.summary() == "corpus: 2 of 100 rows quarantined (images: does not decode: 1, prompt: empty: 1)"
    bad.write(tmp_path / "q.parquet")
    with pytest.raises(CorpusError, match="more than 2.0% of its 100 rows .*raise corpora.max_bad_share"):
        bad.add([Quarantined("a", 3, "prompt: empty", "no text")])
    bad.write(tmp_path / "q.parquet")
    kept = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert [k["row"] for k in kept] == [1, 2, 3] and kept[2]["detail"] == "no text"


@pytest.fixture
def written(tmp_path):
    """A quarantine of one row, and the file that it was written to."""
    bad, path = Quarantine("corpus", rows=100, max_share=0.02), tmp_path / "q.parquet"
    bad.add([Quarantined("a", 1, "prompt: empty")])
    bad.write(path)
    return bad, path


def test_a_torn_quarantine_is_set_aside_and_written_anew(written, tmp_path, caplog):
    bad, path = written
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    bad.write(path)
    assert [k["row"] for k in pq.read_table(path).to_pylist()] == [1]
    assert (tmp_path / "q.parquet.unreadable").read_bytes() == whole[: len(whole) // 2]
    assert "q.parquet cannot be read" in caplog.text and len(list(tmp_path.iterdir())) == 2


def test_a_quarantine_is_replaced_as_a_whole_or_not_at_all(written, monkeypatch):
    bad, path = written
    before = path.read_bytes()

    def killed(table, place):
        Path(place).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    bad.add([Quarantined("a", 2, "prompt: empty")])
    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        bad.write(path)
    assert path.read_bytes() == before


def test_no_bad_rows_no_file(tmp_path):
    Quarantine("corpus", 10, 0.1).write(tmp_path / "q.parquet")
    assert not (tmp_path / "q.parquet").exists()


def test_rows_without_an_id_are_called_by_their_file_and_by_its_folder_where_names_repeat(tmp_path, make):
    for name in ("a/part", "b/part", "c/d/part", "c/other"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make.write(tmp_path / f"{name}.parquet", [make.row(i, extra_info=None) for i in range(2)])

    def ids(*sources):
        pieces = RowOrder(find_fragments(sources), 0).pieces(0, 8 if len(sources) > 1 else 2)
        return {prompt_at(p.fragment.file, at, row).id for p in pieces for _, at, row in read_piece(p)}

    assert ids(tmp_path / "a" / "part.parquet") == {"part:0", "part:1"}
    names = ("a/part", "b/part", "d/part", "other")
    assert ids(*(tmp_path / folder for folder in "abc")) == {f"{name}:{i}" for name in names for i in range(2)}
