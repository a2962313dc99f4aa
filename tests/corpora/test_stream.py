import asyncio
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
import ray

from prism_ray.config.corpora import CorporaSettings
from prism_ray.corpora import stream as stream_module
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.reader import CorpusError, RowOrder, find_fragments, read_piece
from prism_ray.corpora.stream import PromptStream
from prism_ray.records import Prompt

SETTINGS = CorporaSettings(look_ahead=8, rows_per_task=7, max_bad_share=0.2)
NEEDS = Requirements(reference=True, ground_truth=True)


async def take(stream, count):
    return [await stream.take() for _ in range(count)]


def expected(path, seed, start, stop):
    pieces = RowOrder(find_fragments([path]), seed).pieces(start, stop)
    return [f"row-{columns['answer']}" for piece in pieces for _, _, columns in read_piece(piece)]


def test_stream_is_endless_ordered_and_resumes_at_the_remaining_rows(cluster, tmp_path, make):
    path = make.write(tmp_path / "a.parquet", map(make.row, range(20)))
    wanted = expected(path, 3, 0, 45)

    async def run():
        stream = PromptStream([path], NEEDS, SETTINGS, seed=3)
        first = await take(stream, 23)
        assert stream.position == 23
        stream.shutdown()
        resumed = PromptStream([path], NEEDS, SETTINGS, seed=3, position=stream.position)
        rest = await take(resumed, 22)
        resumed.shutdown()
        return first + rest

    taken = asyncio.run(run())
    assert [prompt_id for prompt_id, _, _ in taken] == wanted
    assert [position for _, position, _ in taken] == list(range(45))
    prompts = ray.get([ref for _, _, ref in taken])
    assert all(isinstance(p, Prompt) and p.id == i for p, (i, _, _) in zip(prompts, taken, strict=True))


def test_bad_rows_are_skipped_and_quarantined_and_a_killed_reader_goes_on(cluster, tmp_path, make, caplog):
    rows = [make.row(i) if i not in (4, 9) else make.row(i, teacher_response="x", teacher_cot=None) for i in range(20)]
    path = make.write(tmp_path / "a.parquet", rows)
    wanted = [i for i in expected(path, 0, 0, 40) if i not in ("row-4", "row-9")]

    async def run():
        stream = PromptStream([path], NEEDS, SETTINGS, 0, quarantine=tmp_path / "q.parquet")
        taken = await take(stream, 10)
        ray.kill(stream._reader, no_restart=False)
        taken += await take(stream, 26)
        stream.shutdown()
        return taken

    taken = asyncio.run(run())
    assert [prompt_id for prompt_id, _, _ in taken] == wanted
    assert caplog.text.count("a.parquet died; another one went on from position") == 1
    kept = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert sorted(k["row"] for k in kept) == [4, 9]
    assert {k["reason"] for k in kept} == {"teacher_response: not in the format"}
    assert {k["file"] for k in kept} == {str(path)}


def test_a_reader_that_hangs_is_replaced_and_nothing_is_left_out(cluster, tmp_path, make, caplog, monkeypatch):
    monkeypatch.setattr(stream_module, "HEALTH_S", 3.0)
    path = make.write(tmp_path / "a.parquet", map(make.row, range(20)))

    async def run():
        stream = PromptStream([path], NEEDS, SETTINGS, seed=3)
        taken = await take(stream, 6)
        os.kill(await process_of(stream), signal.SIGSTOP)
        taken += await take(stream, 20)
        stream.shutdown()
        return taken

    taken = asyncio.run(run())
    assert [prompt_id for prompt_id, _, _ in taken] == expected(path, 3, 0, 26)
    assert "the reader of " in caplog.text and "a.parquet hangs; another one goes on from position 12" in caplog.text


def test_a_reader_that_only_waits_is_not_replaced_but_named(cluster, tmp_path, make, monkeypatch):
    monkeypatch.setattr(stream_module, "HEALTH_S", 2.0)
    path = make.write(tmp_path / "a.parquet", map(make.row, range(20)))

    async def run():
        stream = PromptStream([path], NEEDS, SETTINGS, seed=3)
        await take(stream, 1)
        stream._reader.__ray_call__.remote(lambda _: time.sleep(60))
        stream._timeout_s = 5.0
        try:
            await take(stream, 20)
        finally:
            stream.shutdown()

    with pytest.raises(TimeoutError, match="waited 5 s for prompts of .*a.parquet; does the cluster have"):
        asyncio.run(run())


def test_a_reader_that_dies_again_and_again_is_named(cluster, tmp_path, make):
    path = make.write(tmp_path / "a.parquet", map(make.row, range(20)))

    async def run():
        stream = PromptStream([path], NEEDS, SETTINGS, seed=3)
        await take(stream, 1)
        ray.kill(stream._reader)
        await take(stream, 20)

    with pytest.raises(RuntimeError, match="the reader of .*a.parquet died more than 3 times"):
        asyncio.run(run())


async def process_of(stream):
    return await stream._reader.__ray_call__.remote(lambda _: os.getpid())


def test_too_many_bad_rows_stop_the_run_with_a_sentence(cluster, tmp_path, make):
    path = make.write(tmp_path / "a.parquet", [make.row(i, images=[{"bytes": b"no", "path": None}]) for i in range(20)])
    stream = PromptStream([path], NEEDS, SETTINGS, 0, quarantine=tmp_path / "q.parquet")
    with pytest.raises(CorpusError, match=r"more than 20.0% of its 20 rows .*images: does not decode: 5"):
        asyncio.run(take(stream, 1))
    stream.shutdown()
    assert len(pq.read_table(tmp_path / "q.parquet")) == 5


def test_damaged_file_stops_the_run_with_a_sentence(cluster, tmp_path, make):
    path = make.write(tmp_path / "a.parquet", map(make.row, range(40)), group=40)
    data = bytearray(path.read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)
    path.write_bytes(bytes(data))
    stream = PromptStream([path], NEEDS, SETTINGS, 0)
    with pytest.raises(CorpusError, match="^[^ ]*a.parquet: row group 0 is damaged"):
        asyncio.run(take(stream, 1))
    stream.shutdown()


def test_missing_file_fails_before_anything_starts(tmp_path):
    with pytest.raises(CorpusError, match="correct the path"):
        PromptStream([tmp_path / "gone.parquet"], NEEDS, SETTINGS, 0)
