"""Scoring: pairs per second with shared beginnings against one sequence at a time and against padded batches.

    python benchmarks/scoring.py [--quick] [--groups N] [--rollouts N] [--budget TOKENS]

A pair is one view of one rollout against its reference; a group has a reference and 16 rollouts, two views each. The
judge is upcycled from the tiny model in its default size (4 experts, 2 active; float32). The ways take turns in one run
and the fastest turn counts, in processor seconds of one thread; all include making the batches, none the cutting of
texts into views.

`alone` scores each sequence by itself. `padded` puts sequences of similar length side by side up to the token budget
and shares nothing; `padded, images once` also finds equal sequences and encodes an image once for each batch. `shared`
is `score_sequences`. Responses: `testbed` are a careless annotator's, whose captions begin alike and repeat; `unlike`
are random tokens of the same lengths, so that only prompts and the own caption are shared; `long` are `unlike` eight
times as long. `trained` is a forward and a backward pass on the testbed's sequences, batches instead of `alone`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, finish, parse

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.testbed import NoiseSettings
from prism_ray.discriminator.model import Discriminator, build_discriminator
from prism_ray.discriminator.scorer import score_sequences
from prism_ray.discriminator.segments import (
    JudgedBatch,
    ViewSequence,
    distinct,
    judged_batches,
    judged_of,
    view_sequences,
)
from prism_ray.models.batch import collate, microbatches
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt
from prism_ray.testbed.noise import careless
from prism_ray.testbed.questions import EACH, random_question
from prism_ray.testbed.scene import draw, encode_png, random_cells
from prism_ray.testbed.teacher import teach
from prism_ray.testbed.words import vocabulary

Sequences = list[ViewSequence]


def testbed_sequences(encoder: Encoder, settings: DiscriminatorSettings, groups: int, rollouts: int) -> Sequences:
    """Of 2 x 3 cells and an "each" question: the teacher's response and a careless annotator's."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(groups):
        cells, question = random_cells(rng, 6), random_question(rng, EACH, 6)
        image = encode_png(draw(cells, 2, 3, 1.3, rng))
        message = {"role": "user", "content": f"<image>{question.text}"}
        prompt = encoder.prompt(Prompt(str(index), (message,), (image,)))
        texts = [teach(cells, question).text]
        texts += [careless(cells, question, NoiseSettings(), rng)[0].text for _ in range(rollouts)]
        for text in texts:
            found += view_sequences(prompt, text, encoder, settings).sequences.values()
    return found


def unlike(sequences: Sequences, encoder: Encoder, times: int) -> Sequences:
    """Random tokens instead of the responses', views `times` as long, the context of the second being the first."""
    rng = np.random.default_rng(1)
    allowed = np.setdiff1d(np.arange(len(encoder.tokenizer)), [*encoder.banned_ids, encoder.end_id])
    found = []
    for first, second in zip(sequences[::2], sequences[1::2], strict=True):
        context: tuple[int, ...] = ()
        labels: tuple[int, ...] = ()
        for sequence in (first, second):
            own = rng.choice(allowed, times * (sequence.stop - sequence.start)).tolist()
            ids, labels = (*context, *own, encoder.end_id), (*labels, *[sequence.row] * len(own))
            ends = {"start": len(context), "stop": len(ids) - 1}
            found.append(replace(sequence, token_ids=ids, labels=(*labels, sequence.row), **ends))
            context = ids[:-1]
    return found


def ways(sequences: Sequences, budget: int) -> dict[str, Callable[[], list[JudgedBatch]]]:
    """The batches of each way of scoring, made anew with every call."""

    def padded(some: Sequences) -> list[JudgedBatch]:
        return [judged_of(b, some) for b in microbatches([s.sample for s in some], budget)]

    apart = [replace(s, prompt=replace(s.prompt)) for s in sequences]  # other objects: nothing is known to be shared
    return {
        "alone": lambda: [judged_of(collate([s.sample]), [s]) for s in sequences],
        "padded": lambda: padded(apart),
        "padded, images once": lambda: padded(distinct(sequences)[0]),
        "shared": lambda: judged_batches(distinct(sequences)[0], budget),
    }


def fastest(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Processor seconds of each run's fastest turn, after one that warms up; other work beside it counts little so."""
    seconds = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if turn:
                seconds[name] = min(seconds[name], time.process_time() - began)
    return seconds


def scoring(model: Discriminator, sequences: Sequences, budget: int, turns: int) -> tuple[dict, dict, float]:
    """Seconds and computed tokens of each way, and the greatest difference between scores alone and shared,
    as a share of the score."""
    made = ways(sequences, budget)

    def score(batches: Callable[[], list[JudgedBatch]]) -> None:
        with torch.no_grad():
            for judged in batches():
                model(judged).score_B.tolist()

    runs: dict[str, Callable[[], Any]] = {name: lambda b=batches: score(b) for name, batches in made.items()}
    runs["shared"] = lambda: score_sequences(model, sequences)
    seconds = fastest(runs, turns)
    tokens = {name: sum(j.batch.computed_tokens for j in batches()) for name, batches in made.items()}
    unique = distinct(sequences)[0]
    prompts = {id(s.prompt): len(s.prompt.token_ids) for s in unique}
    tokens["if prompts alone were shared"] = sum(prompts.values()) + sum(len(s.token_ids) for s in unique)
    with torch.no_grad():
        alone = torch.cat([model(judged).score_B for judged in made["alone"]()])
    return seconds, tokens, float(((score_sequences(model, sequences) - alone) / alone).abs().max())


def training(model: Discriminator, sequences: Sequences, budget: int, turns: int) -> dict[str, float]:
    """Seconds of a forward and a backward pass of each way but the first."""

    def learn(batches: Callable[[], list[JudgedBatch]]) -> None:
        for judged in batches():
            model(judged).score_B.sum().backward()
        model.zero_grad()

    made = ways(sequences, budget)
    del made["alone"]
    return fastest({name: lambda b=batches: learn(b) for name, batches in made.items()}, turns)


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--groups", type=int, default=8)
    own.add_argument("--rollouts", type=int, default=16)
    own.add_argument("--budget", type=int, default=4096, help="tokens of a batch")
    own.add_argument("--turns", type=int, default=3)
    options = parse(__doc__, own)
    if options.quick:
        options.groups, options.turns = 2, 1
    torch.set_num_threads(1)
    settings = DiscriminatorSettings(micro_batch_tokens=options.budget)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder), vocabulary(), TinyModelSettings(), seed=0)
        encoder, model = Encoder(folder, 512), build_discriminator(folder, settings, seed=0).eval()
    testbed = testbed_sequences(encoder, settings, options.groups, options.rollouts)
    cases = {"testbed": testbed, "unlike": unlike(testbed, encoder, 1)}
    cases["long"] = unlike(testbed[: 2 * 2 * (options.rollouts + 1)], encoder, 8)
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for case, sequences in cases.items():
        seconds, tokens, difference = scoring(model, sequences, options.budget, options.turns)
        pairs = len(sequences) * options.rollouts / (options.rollouts + 1)
        for name, best in seconds.items():
            figures[f"{case}, {name}, pairs_per_s"] = round(pairs / best, 1)
            if name != "shared":
                ratios[f"{case}, pairs_per_s shared over {name}"] = round(best / seconds["shared"], 2)
        figures |= {f"{case}, {name}, tokens": count for name, count in tokens.items()}
        figures[f"{case}, greatest_difference"] = difference
        print(case, {name: round(pairs / best, 1) for name, best in seconds.items()}, tokens, difference, flush=True)
    seconds = training(model, testbed, options.budget, options.turns)
    for name in seconds.keys() - {"shared"}:
        ratios[f"trained, shared over {name}"] = round(seconds[name] / seconds["shared"], 2)
    finish("scoring", ratios, figures, conditions() | vars(options))


if __name__ == "__main__":
    main()
