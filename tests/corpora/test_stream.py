import asyncio
import io
import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from ray.data._internal.stats import get_or_create_stats_actor

from prism_ray.config.corpora import CorporaSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.corpora import identity
from prism_ray.corpora import stream as stream_module
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.reader import CorpusError, Pace, RowOrder, find_fragments, prompt_at, read_piece
from prism_ray.corpora.stream import PromptReader, PromptStream
from prism_ray.models.ahead import TokenCounter
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt
from prism_ray.stages.batches import needs_of
from prism_ray.testbed.words import vocabulary

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


def test_all_that_a_stream_reads_is_one_dataset_to_ray(cluster, tmp_path, make):
    """Ray keeps a log file and fifty gauges for each that it has seen: in a long run they would be gigabytes."""

    def known() -> set[str]:
        return set(ray.get(get_or_create_stats_actor().get_datasets.remote()))

    path = make.write(tmp_path / "a.parquet", map(make.row, range(20)))
    before = known()

    async def run():
        streams = [PromptStream([path], NEEDS, SETTINGS, seed=seed) for seed in (0, 1)]
        for stream in streams:
            await take(stream, 3 * 20)  # some nine executions
            stream.shutdown()

    asyncio.run(run())
    assert len(known() - before) == 2


def test_reading_tasks_are_few_rows_at_first_and_then_what_their_size_allows(cluster, tmp_path, make, monkeypatch):
    images = [{"bytes": make.png(1, (64, 64)), "path": None}]  # 12 KB
    path = make.write(tmp_path / "a.parquet", [make.row(number, images=images) for number in range(400)], group=100)
    settings = CorporaSettings(look_ahead=8, rows_per_task=1000, task_mb=0.25)
    reader = PromptReader(RowOrder(find_fragments([path]), 0), NEEDS, settings, "a", None)
    tasks, tasks_of = [], reader._tasks
    monkeypatch.setattr(reader, "_tasks", lambda *given: (tasks.append(task) or task for task in tasks_of(*given)))
    _, *prompts = reader.next(0, 400)
    reader._rows.close()
    assert len(prompts) == 400
    first, second, *later = (task["stop"] - task["start"] for task in tasks)
    assert first == second == 64
    assert later and all(15 <= rows <= 21 for rows in later), later


def test_a_reading_task_takes_no_more_rows_than_it_may_whatever_their_size():
    pace = Pace(CorporaSettings(rows_per_task=100, task_mb=1))
    pace.note(10, 10)
    assert pace.rows == 100
    for _ in range(30):
        pace.note(100, 100 * 2**16)
    assert 16 <= pace.rows <= 17, "what came long ago no longer counts"
    pace.note(1000, 1000 * 2**24)
    assert pace.rows == 1


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


def test_prompts_come_with_their_ids_and_with_images_of_the_size_that_the_policy_sees(cluster, tmp_path, make):
    build_tiny(tmp_path / "policy", vocabulary(), TinyModelSettings(layers=1), seed=0)
    images = [{"bytes": make.png(i, size), "path": None} for i, size in enumerate([(70, 50), (64, 64), (400, 300)])]
    several = [{"role": "system", "content": "max"}, {"role": "user", "content": "<image>a<image> red<image>"}]
    rows = [
        make.row(0),
        make.row(1, images=images, prompt=several),
        make.row(2, images=[], prompt=[{"role": "user", "content": "count of red"}]),
    ]
    path = make.write(tmp_path / "a.parquet", rows)
    rollout = RolloutSettings(max_images=3)
    needs = needs_of(TokenCounter(tmp_path / "policy", rollout.max_prompt_tokens), rollout, SETTINGS)

    async def run():
        stream = PromptStream([path], needs, SETTINGS, seed=0)
        taken = ray.get([ref for _, _, ref in await take(stream, 3)])
        stream.shutdown()
        return taken

    encoder = Encoder(tmp_path / "policy", rollout.max_prompt_tokens)
    (piece,) = RowOrder(find_fragments([path]), 0).pieces(0, 3)
    written = [prompt_at(str(path), at, row) for _, at, row in read_piece(piece)]
    for prompt, came in zip(written, asyncio.run(run()), strict=True):
        assert list(came.token_ids) == encoder.engine_prompt(prompt)["prompt_token_ids"]
        assert came == encoder.fitted(encoder.tokenised(prompt))
        one, other = encoder.prompt(prompt), encoder.prompt(came)
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.position_ids, other.position_ids)
        torch.testing.assert_close(one.pixel_values, other.pixel_values, atol=1e-6, rtol=0)
        for data in came.images:
            assert data.startswith(b"\x89PNG") and all(side % 32 == 0 for side in Image.open(io.BytesIO(data)).size)


def with_repeated_ids(make):
    """Twenty rows: 3 and 11 have one id, 4, 12 and 17 another, 5 that of 6, which cannot be used; 8 and 9 say none."""
    called = {11: "row-3", 12: "row-4", 17: "row-4", 5: "row-6"}
    rows = [make.row(i, extra_info=json.dumps({"id": called.get(i, f"row-{i}")})) for i in range(20)]
    rows[6]["images"] = [{"bytes": b"no", "path": None}]
    for index in (8, 9):
        rows[index]["extra_info"] = None
    return rows


def first_of_each_id(path, rows, count):
    """Places of the first so many rows that are to be used, over the epochs, by the rule written out."""
    order, ids = RowOrder(find_fragments([path]), 3), {}
    places = [at for piece in order.pieces(0, count) for _, at, _ in read_piece(piece)]
    for at in places[:20]:
        said = json.loads(rows[at]["extra_info"] or "{}").get("id")
        ids.setdefault(said or at, at)
    return [(position, at) for position, at in enumerate(places) if at in ids.values() and at != 6]


def test_of_the_rows_of_one_id_the_first_is_used_in_every_epoch_wherever_reading_begins(cluster, tmp_path, make):
    rows = with_repeated_ids(make)
    path = make.write(tmp_path / "a.parquet", rows, group=6)
    wanted = first_of_each_id(path, rows, 70)
    settings = SETTINGS.model_copy(update={"max_bad_share": 0.5})

    async def run(position, count, kill=0):
        stream = PromptStream([path], NEEDS, settings, 3, position, tmp_path / "q.parquet")
        taken = await take(stream, kill)
        if kill:
            ray.kill(stream._reader, no_restart=False)
        taken += await take(stream, count - kill)
        stream.shutdown()
        return [(at, prompt_id) for prompt_id, at, _ in taken]

    ids = [json.loads(row["extra_info"] or "{}").get("id") or f"a:{at}" for at, row in enumerate(rows)]
    called = [(position, ids[at]) for position, at in wanted]
    assert asyncio.run(run(0, 48)) == called[:48], "three epochs"
    kept = {k["row"]: k for k in pq.read_table(tmp_path / "q.parquet").to_pylist()}
    used = {at for _, at in wanted}
    assert set(kept) == set(range(20)) - used and len(kept) == 5
    for at, item in kept.items():
        if at == 6:
            assert item["reason"] == "images: does not decode"
        else:
            first = next(a for a in used if ids[a] == ids[at]) if at != 5 else 6
            assert item["reason"] == "id: used before"
            assert item["detail"] == f"{ids[at]}, first seen at row {first} of {path}"
    for position, kill in ((7, 0), (19, 3), (20, 0), (33, 9)):
        rest = [one for one in called if one[0] >= position][:15]
        assert asyncio.run(run(position, 15, kill)) == rest, "what remained, also where the first one came before"


def test_repeated_ids_count_as_unusable_and_a_file_named_twice_is_refused(cluster, tmp_path, make):
    rows = [make.row(i, extra_info=json.dumps({"id": f"row-{i % 4}"})) for i in range(20)]
    path = make.write(tmp_path / "a.parquet", rows)
    stream = PromptStream([path], NEEDS, SETTINGS, 0)
    with pytest.raises(CorpusError, match=r"more than 20.0% of its 20 rows cannot be used \(id: used before: 5"):
        asyncio.run(take(stream, 20))
    stream.shutdown()
    with pytest.raises(CorpusError, match="a.parquet: named twice; .* name it once"):
        PromptStream([path, path], NEEDS, SETTINGS, 0)


def test_ids_are_compared_over_files_and_formats_and_in_bounded_memory(tmp_path, make, monkeypatch):
    monkeypatch.setattr(identity, "_RECENT", 3)
    ids = identity.Ids()
    for row in range(1000):
        assert ids.again(f"p{row}", "a.parquet", row, "row") is None
    assert len(ids._digests) + len(ids._recent) == 1000 and len(ids._recent) < 3
    assert ids._digests.nbytes + ids._places.nbytes <= 16 * 1000
    for row in range(1000):
        assert ids.again(f"p{row}", "a.parquet", row, "row") is None, "the same row in another epoch"
        again = ids.again(f"p{row}", "b.jsonl", 90 * row, "byte")
        assert (again.file, again.row, again.unit) == ("b.jsonl", 90 * row, "byte")
        assert again.detail == f"p{row}, first seen at row {row} of a.parquet"
    assert ids.again("", "b.jsonl", 1, "byte") is None and ids.again("", "b.jsonl", 2, "byte") is None


def test_missing_file_fails_before_anything_starts(tmp_path):
    with pytest.raises(CorpusError, match="correct the path"):
        PromptStream([tmp_path / "gone.parquet"], NEEDS, SETTINGS, 0)
