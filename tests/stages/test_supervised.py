"""The supervised trainer: what it computes equals plain PyTorch, whatever dies on the way."""

import io
import json
import math
import os
import pickle
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prism_ray.config.corpora import CorporaSettings, SourceSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.supervised import SupervisedSettings
from prism_ray.config.testbed import TestbedSettings
from prism_ray.config.trainer import TrainerSettings
from prism_ray.corpora.quarantine import Quarantined
from prism_ray.corpora.reader import CorpusError, Pace, RowOrder, find_fragments, prompt_at
from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.tiny import build_tiny
from prism_ray.response import render
from prism_ray.stages import supervised_data
from prism_ray.stages.supervised import Phase, train_supervised
from prism_ray.stages.supervised_data import Course, Shard, entries
from prism_ray.stages.supervised_rank import starting_policy
from prism_ray.stages.supervised_tasks import CellTask, ResponseTask
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary

SIZES = dict.fromkeys(("pretrain", "base", "sft", "align", "rlvr", "evaluate", "evaluate_unseen"), 24)
PIXELS = 10**6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.set_num_threads(1)
    paths = write_corpora(folder, TestbedSettings(**SIZES), seed=0)
    build_tiny(folder / "tiny", vocabulary(), TinyModelSettings(layers=2), seed=0)
    return folder / "tiny", paths


def settings(steps, **changes):
    return SupervisedSettings(steps=steps, batch=4, lr=1e-3, weight_decay=0.01, warmup_share=0.2, **changes)


def course(world, steps=6, batch=4, split="sft"):
    model, paths = world
    task = CellTask(str(model), PIXELS) if split == "pretrain" else ResponseTask(str(model), 256, 256, PIXELS)
    return Course(split, task, RowOrder(find_fragments([paths[split]], task.required), 5), steps, batch)


def damaged(path, folder, rows):
    """A copy of the corpus in which the images of these rows do not decode."""
    table = pq.read_table(path)
    kept = table.to_pylist()
    for row in rows:
        kept[row]["images"][0]["bytes"] = b"no image"
    copy = folder / "damaged.parquet"
    pq.write_table(type(table).from_pylist(kept, schema=table.schema), copy)
    return copy


def rank_processes():
    """Ray Train workers among this process's descendants."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines())
                names[int(entry.name)] = (entry / "cmdline").read_text()
                parents[int(entry.name)] = int(status["PPid"])
            except (OSError, ValueError, KeyError):
                continue

    def ours(pid):
        while pid in parents:
            if pid == os.getpid():
                return True
            pid = parents[pid]
        return False

    return sorted(pid for pid, name in names.items() if "RayTrainWorker" in name and ours(pid))


def plain_training(world, courses, phases):
    """The same in one process of plain PyTorch: losses by phase and step, and the weights."""
    policy, losses = load_policy(world[0]), {}
    for data, phase in zip(courses, phases, strict=True):
        s = phase.settings
        torch.manual_seed(0)
        module = data.task.module(policy)
        optimiser = torch.optim.AdamW(module.parameters(), lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)
        warmup = round(s.warmup_share * s.steps)
        for step in range(s.steps):
            done = (step - warmup) / (s.steps - warmup)
            factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
            optimiser.param_groups[0]["lr"] = s.lr * factor
            samples = data.task.prepare(entries(data, step * s.batch, (step + 1) * s.batch))
            total, _ = data.task.loss(module, data.task.collate(samples))
            loss = total / sum(map(data.task.size, samples))
            losses[data.name, step + 1] = float(loss.detach())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), s.grad_clip)
            optimiser.step()
    return losses, policy


@pytest.mark.long
def test_two_ranks_of_which_one_is_killed_equal_plain_training(cluster, world, tmp_path, caplog):
    model, paths = world
    phases = (
        Phase("pretrain", (paths["pretrain"],), settings(3), "cells"),
        Phase("sft", (paths["sft"],), settings(9)),
    )
    seen, killed = [], []

    def on_metrics(phase, step, row):
        seen.append((phase, step, row["supervised/loss"]))
        if (phase, step) == ("sft", 6) and not killed:
            killed.extend(rank_processes()[-1:])
            os.kill(killed[0], signal.SIGKILL)

    trainer = TrainerSettings(ranks=2, micro_batch=1, checkpoint_every=4, log_every=1, zero_stage=1)
    out, state = tmp_path / "out", tmp_path / "state"
    done = train_supervised("base", model, phases, out, state, trainer, CorporaSettings(), 5, on_metrics)

    courses = (course(world, 3, split="pretrain"), course(world, 9))
    losses, policy = plain_training(world, courses, phases)
    assert killed, "nothing was killed, so nothing was resumed"
    assert "rank 1: " in caplog.text and "was lost; Ray Train starts the ranks again" in caplog.text
    restart = next(i for i in range(1, len(seen)) if seen[i][:2] <= seen[i - 1][:2])
    assert seen[restart][:2] in (("sft", 2), ("sft", 6)), "checkpoints are at steps 4 and 8 of all"
    assert {(phase, step) for phase, step, _ in seen} == set(losses)
    for phase, step, loss in seen:
        assert loss == pytest.approx(losses[phase, step], rel=1e-4), (phase, step)
    assert done.steps == 12 and not list(state.iterdir())
    written = load_file(out / "model.safetensors")
    for name, weight in policy.named_parameters():
        if name != "lm_head.weight":
            assert (written[name] - weight).abs().mean() < 1e-5, name
    assert load_policy(out) is not None


class Enough(Exception):
    pass


def test_interrupted_run_saves_goes_on_and_quarantines(cluster, world, tmp_path):
    model, paths = world
    corpus = damaged(paths["sft"], tmp_path, rows=[3])
    seen = []

    def on_metrics(phase, step, row):
        seen.append(step)
        if len(seen) == 2:
            raise Enough

    trainer = TrainerSettings(checkpoint_every=100, log_every=1)
    arguments = ("sft", model, (Phase("sft", (corpus,), settings(40)),), tmp_path / "out", tmp_path / "state", trainer)
    more = (CorporaSettings(max_bad_share=0.1), 5, on_metrics, tmp_path / "quarantine.parquet")
    with pytest.raises(Enough):
        train_supervised(*arguments, *more)
    assert not (tmp_path / "out").exists()
    stopped = seen[-1]
    assert stopped < 40, "the run was not stopped"
    done = train_supervised(*arguments, *more)
    resumed = seen[seen.index(stopped) + 1 :]
    assert resumed == list(range(resumed[0], 41)) and resumed[0] - stopped in (1, 2)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    kept = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert [(k["row"], k["reason"]) for k in kept] == [(3, "images: does not decode")]
    assert done.seconds > 0


def test_too_many_bad_rows_end_the_run_with_a_sentence(cluster, world, tmp_path):
    model, paths = world
    corpus = damaged(paths["sft"], tmp_path, rows=range(0, 24, 2))
    phases = (Phase("sft", (corpus,), settings(40)),)
    with pytest.raises(CorpusError, match="^sft: more than 2.0% of its 24 rows .*images: does not decode"):
        train_supervised(
            "sft", model, phases, tmp_path / "out", tmp_path / "state", TrainerSettings(), CorporaSettings(), 5
        )
    assert not (tmp_path / "out").exists()


def test_damaged_file_ends_the_run_with_a_sentence(cluster, world, tmp_path):
    model, paths = world
    pq.write_table(pq.read_table(paths["sft"]), tmp_path / "a.parquet", compression="zstd")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    phases = (Phase("sft", (tmp_path / "a.parquet",), settings(40)),)
    with pytest.raises(CorpusError, match="^[^ ]*a.parquet: row group 0 is damaged"):
        train_supervised(
            "sft", model, phases, tmp_path / "out", tmp_path / "state", TrainerSettings(), CorporaSettings(), 5
        )


@pytest.mark.parametrize(
    ("phase", "error"),
    [
        (Phase("sft", ("gone.parquet",), settings(1)), "gone.parquet: no Parquet file there"),
        (Phase("sft", ("{pretrain}",), settings(1)), "no column prompt, teacher_response"),
        (Phase("sft", ("{sft}",), settings(1).model_copy(update={"batch": 3})), "sft: a batch of 3 .* 2 ranks"),
    ],
)
def test_bad_input_fails_before_anything_starts(world, tmp_path, phase, error):
    model, paths = world
    corpus = tuple(str(c).format(**paths) for c in phase.corpora)
    given = (Phase(phase.name, corpus, phase.settings),)
    with pytest.raises(ValueError, match=error):
        train_supervised("sft", model, given, tmp_path, tmp_path, TrainerSettings(ranks=2), CorporaSettings(), 5)


def test_ranks_share_a_step_and_any_cut_gives_the_same_rows(world):
    whole = course(world, steps=15)

    def rows(rank, ranks, first_step):
        shard = Shard((whole,), rank, ranks, 4, CorporaSettings(rows_per_task=8))
        steps = [portion for task in shard._tasks(first_step, Pace(shard.settings)) for portion in shard._prepare(task)]
        assert [s["step"] for s in steps] == list(range(first_step, 15))
        return len(steps)

    assert rows(0, 1, 0) == rows(0, 2, 0) == 15 and rows(1, 2, 11) == 4
    one = [e[1] for e in entries(whole, 20, 24)]
    two = [e[1] for e in entries(whole, 20, 22)] + [e[1] for e in entries(whole, 22, 24)]
    assert one == two


def test_phases_follow_each_other_from_any_step(world):
    shard = Shard((course(world, 3, split="pretrain"), course(world, 4)), 0, 1, 4, CorporaSettings(rows_per_task=8))

    def tasks(first_step):
        return [(t["phase"], t["first"], t["last"]) for t in shard._tasks(first_step, Pace(shard.settings))]

    assert [(t["phase"], t["first"], t["last"]) for t in shard._tasks(0, Pace(shard.settings))] == [
        (0, 0, 2),
        (0, 2, 3),
        (1, 0, 2),
        (1, 2, 4),
    ]
    assert [(t["phase"], t["first"], t["last"]) for t in shard._tasks(4, Pace(shard.settings))] == [
        (1, 1, 3),
        (1, 3, 4),
    ]
    assert list(shard._tasks(7, Pace(shard.settings))) == []


def seen_by(data, rank, ranks, first_step):
    """Names of the rows that a rank learns from, by step."""
    shard = Shard((data,), rank, ranks, 1, CorporaSettings(rows_per_task=4))
    made = [row for task in shard._tasks(first_step, Pace(shard.settings)) for row in shard._prepare(task)]
    return {row["step"]: [s.prompt.id for m in pickle.loads(row["portion"]).micro for s in m] for row in made}


@pytest.mark.parametrize("bad", [[3], [3, 4, 5, 6, 7]])
def test_a_rank_whose_share_of_a_step_is_bad_takes_the_next_good_row_wherever_reading_begins(world, tmp_path, bad):
    model, paths = world
    corpus = damaged(paths["sft"], tmp_path, rows=bad)
    task = ResponseTask(str(model), 256, 256, PIXELS)
    data = Course("sft", task, RowOrder(find_fragments([corpus], task.required), 5), 6, 4)
    names = [getattr(getattr(s, "prompt", None), "id", "") for s in task.prepare(entries(data, 0, 48))]
    for rank in range(4):
        whole = seen_by(data, rank, 4, 0)
        assert all(len(ids) == 1 for ids in whole.values()) and len(whole) == 6
        for step, (name,) in whole.items():
            assert name == next(filter(None, names[4 * step + rank :]))
            assert seen_by(data, rank, 4, step)[step] == [name]


@pytest.mark.parametrize("split", ["sft", "pretrain"])
def test_a_corpus_without_a_good_row_far_and_wide_says_so(world, tmp_path, split):
    corpus = damaged(world[1][split], tmp_path, rows=range(24))
    task = course(world, split=split).task
    data = Course("sft", task, RowOrder(find_fragments([corpus], task.required), 5), 6, 4)
    with pytest.raises(CorpusError, match="sft: 1,024 rows in a row cannot be used .images: .*; repair the corpus"):
        seen_by(data, 1, 4, 0)


def test_steps_are_prepared_together_as_far_as_their_size_allows(world, monkeypatch):
    taken = []

    def prepared(tasks, work, settings):
        for task in tasks:
            taken.append(task["last"] - task["first"])
            yield from work(task)

    monkeypatch.setattr(supervised_data, "prepared", prepared)
    for task_mb, wanted in ((64, [2, 2, 1]), (1e-6, [2, 1, 1, 1])):
        taken.clear()
        shard = Shard((course(world, 5),), 0, 1, 4, CorporaSettings(rows_per_task=8, task_mb=task_mb))
        assert len(list(shard.portions(0))) == 5 and taken == wanted


def test_rows_that_do_not_fit_are_quarantined(world):
    whole = course(world)
    rows = entries(whole, 0, 3)
    short = ResponseTask(whole.task.model, 256, 10, PIXELS).prepare(rows)
    assert {s.reason for s in short} == {"teacher_response: too long"}
    tight = ResponseTask(whole.task.model, 8, 256, PIXELS).prepare(rows)
    assert {s.reason for s in tight} == {"prompt: too long"}
    file, row, columns = rows[1]
    rows[1] = (file, row, {**columns, "images": [{"bytes": b"x", "path": None}]})
    mixed = whole.task.prepare(rows)
    assert [isinstance(m, Quarantined) for m in mixed] == [False, True, False]
    assert (mixed[1].file, mixed[1].row, mixed[1].reason) == (file, row, "images: does not decode")


def test_prompts_go_to_the_ranks_tokenised_and_with_encoded_images_of_the_size_that_is_seen(world, tmp_path):
    rows = pq.read_table(world[1]["sft"])
    kept = rows.to_pylist()[:3]
    for row, size in zip(kept, ((70, 50), (64, 64), (400, 300)), strict=True):
        row["images"][0]["bytes"] = photograph(size)
    pq.write_table(type(rows).from_pylist(kept, schema=rows.schema), tmp_path / "a.parquet")
    task = ResponseTask(str(world[0]), 256, 256, PIXELS)
    data = Course("sft", task, RowOrder(find_fragments([tmp_path / "a.parquet"], task.required), 0), 1, 3)
    shard = Shard((data,), 0, 1, 3, CorporaSettings())
    (task_of_step,) = shard._tasks(0, Pace(shard.settings))
    (made,) = shard._prepare(task_of_step)
    (micro,) = pickle.loads(made["portion"]).micro
    encoder, asked = Encoder(world[0], 256), {p.id: p for p in (prompt_at(*e) for e in entries(data, 0, 3))}
    before = []
    for sample in micro:
        prompt = asked[sample.prompt.id]
        assert list(sample.prompt.token_ids) == encoder.engine_prompt(prompt)["prompt_token_ids"]
        assert all(side % 32 == 0 for side in Image.open(io.BytesIO(sample.prompt.images[0])).size)
        before.append(Sample(encoder.prompt(prompt), torch.tensor(encoder.response(prompt.reference))))
    batch, wanted = task.collate(micro), collate(before)
    for name in ("input_ids_BT", "position_ids_3BT", "response_ids_BR", "grid_thw", "visual_positions_V"):
        assert torch.equal(getattr(batch, name), getattr(wanted, name)), name
    torch.testing.assert_close(batch.pixel_values, wanted.pixel_values, atol=1e-6, rtol=0)
    assert len(made["portion"]) < batch.pixel_values.nbytes / 4


def photograph(size):
    """Smooth, as photographs are; noise would not become smaller by being encoded."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_labels_must_fit_the_image(world):
    cells = course(world, split="pretrain")
    file, row, columns = entries(cells, 0, 1)[0]
    fits, short, none = cells.task.prepare(
        [(file, row, columns), (file, row, columns | {"labels": [0, 1, 2]}), (file, row, columns | {"labels": None})]
    )
    assert tuple(fits.labels.shape) == (6, 2)
    assert short.reason == none.reason == "labels: do not fit the image"


def test_loss_counts_response_tokens_only(world):
    responses = course(world)
    samples = responses.task.prepare(entries(responses, 0, 2))
    policy = load_policy(world[0])
    total, _ = responses.task.loss(policy, responses.task.collate(samples))
    by_hand = 0.0
    for sample in samples:
        prompt = Encoder(world[0], 256).prompt(sample.prompt)
        ids = torch.cat((prompt.token_ids, torch.from_numpy(sample.response_ids)))[None]
        kinds = (ids == policy.config.image_token_id).int()
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw}
        logits = policy(input_ids=ids, mm_token_type_ids=kinds, **images).logits[0]
        start = len(prompt.token_ids)
        by_hand += torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").item()
    assert float(total.detach()) == pytest.approx(by_hand, rel=1e-5)
    assert sum(map(responses.task.size, samples)) == sum(len(s.response_ids) for s in samples)


def test_gradient_checkpointing_holds_less_for_the_same_loss(world):
    responses = course(world)
    batch = responses.task.collate(responses.task.prepare(entries(responses, 0, 2)))
    losses, held = [], []
    for checkpointing in (False, True):
        policy = starting_policy(world[0], TrainerSettings(gradient_checkpointing=checkpointing))
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = responses.task.loss(policy, batch)
        losses.append(float(loss.detach()))
        held.append(sum(kept.values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert held[1] < 0.75 * held[0]


def test_frozen_parameters_leave_training_as_they_came(cluster, world, tmp_path):
    model, paths = world
    trainer = TrainerSettings(freeze=(r"^model\.visual\.",))
    phases = (Phase("sft", (paths["sft"],), settings(2)),)
    train_supervised("sft", model, phases, tmp_path / "out", tmp_path / "state", trainer, CorporaSettings(), 5)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {name for name in after if "visual." in name}


def test_sharegpt_rows_are_demonstrations_and_bad_lines_are_named_by_their_byte(world, tmp_path):
    model, paths = world
    picture = pq.read_table(paths["sft"]).to_pylist()[0]["images"][0]["bytes"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture)
    said = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": render(" red", " max", " 1")}]
    row = json.dumps({"conversations": said, "images": ["0.png"]})
    (tmp_path / "a.jsonl").write_text("\n".join([row, "{", json.dumps({"conversations": said[:1]})]))
    task = ResponseTask(str(model), 256, 256, PIXELS)
    source = SourceSettings(path=tmp_path / "a.jsonl", images=tmp_path / "images")
    order = RowOrder(find_fragments([source], task.required), 0)
    prepared = task.prepare(entries(Course("sft", task, order, 1, 3), 0, 3))
    (sample,) = [item for item in prepared if not isinstance(item, Quarantined)]
    assert len(sample.prompt.images) == 1 and task.size(sample) > 5
    bad = {item.row: (item.unit, item.reason) for item in prepared if isinstance(item, Quarantined)}
    place = len(row) + 1
    assert bad[place] == ("byte", "line: not JSON")
    assert bad[place + 2] == ("byte", "prompt: <image> markers and images differ in number")
