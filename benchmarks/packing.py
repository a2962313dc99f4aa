"""Packing: share of the computed tokens that are of use, and tokens per second against padded micro-batches.

    python benchmarks/packing.py [--quick]

Efficiency is tokens / (ranks x sum over steps of the largest micro-batch of that step), fill is tokens / (micro-batches
x budget). Ranks get whole groups as the learner gives them, and in packed form equally many micro-batches. Lengths are
those of the testbed's encoded prompts with a careless annotator's responses (16 prompts x 8), and a realistic
distribution: log-normal, prompts of 300 to 2000 tokens and responses of 200 to 8000 (the limits lie two standard
deviations from the median and are clipped to), 32 prompts x 16.

Speed is forward and backward of the response log-probs with the tiny model on the same samples, packed and padded
taking turns; the fastest repetition counts. `masked` is packing by plain `sdpa` with a mask of [S, S].
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, finish, parse

from prism_ray.config.models import TinyModelSettings
from prism_ray.config.testbed import NoiseSettings
from prism_ray.learner.group import split_by_tokens
from prism_ray.models.attention import IMPLEMENTATION
from prism_ray.models.batch import Batch, Sample, microbatches, packed_microbatches
from prism_ray.models.encode import EncodedPrompt, Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.packing import efficiency, fill, pack
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt, Ticket
from prism_ray.testbed.noise import careless
from prism_ray.testbed.questions import EACH, random_question
from prism_ray.testbed.scene import draw, encode_png, random_cells
from prism_ray.testbed.words import vocabulary

Group = list[tuple[int, int]]
"""Of each rollout: tokens of the prompt, tokens of the response."""


def testbed_samples(encoder: Encoder, prompts: int, rollouts: int) -> list[list[Sample]]:
    """Groups of the testbed: 2 x 3 cells, an "each" question, and responses as varied as those of an SFT checkpoint."""
    rng = np.random.default_rng(0)
    groups = []
    for index in range(prompts):
        cells = random_cells(rng, 6)
        question = random_question(rng, EACH, 6)
        image = encode_png(draw(cells, 2, 3, 1.3, rng))
        message = {"role": "user", "content": f"<image>{question.text}"}
        prompt = encoder.prompt(Prompt(id=str(index), messages=(message,), images=(image,)))
        texts = [careless(cells, question, NoiseSettings(), rng)[0].text for _ in range(rollouts)]
        groups.append([Sample(prompt, torch.tensor(encoder.response(text))) for text in texts])
    return groups


def realistic_lengths(prompts: int, rollouts: int, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    prompt_P, response_PR = _log_normal(rng, 300, 2000, (prompts,)), _log_normal(rng, 200, 8000, (prompts, rollouts))
    return [[(int(p), int(r)) for r in row] for p, row in zip(prompt_P, response_PR, strict=True)]


def _log_normal(rng: np.random.Generator, least: int, most: int, shape: tuple[int, ...]) -> np.ndarray:
    middle, spread = np.log(least * most) / 2, np.log(most / least) / 4
    return np.clip(np.exp(rng.normal(middle, spread, shape)).round(), least, most).astype(int)


def packing_figures(groups: list[Group], token_budget: int, ranks: int) -> dict[str, float]:
    """Efficiency and fill, packed and padded."""
    tickets = [
        Ticket(i, str(i), i, None, tokens=sum(r for _, r in g), total_tokens=sum(p + r for p, r in g))
        for i, g in enumerate(groups)
    ]
    lengths = [[p + r for t in share for p, r in groups[t.id]] for share in split_by_tokens(tickets, ranks)]
    count = max(len(pack(own, token_budget)) for own in lengths)
    packed = [[sum(own[i] for i in b) for b in pack(own, token_budget, count)] for own in lengths]
    padded = [_padded_sizes(own, token_budget) for own in lengths]
    tokens = sum(map(sum, lengths))
    return {
        "packed_efficiency": efficiency(packed, tokens),
        "packed_fill": fill(tokens, count * ranks, token_budget),
        "padded_efficiency": efficiency(padded, tokens),
        "padded_fill": fill(tokens, sum(map(len, padded)), token_budget),
        "split_over_ranks": tokens / ranks / max(map(sum, lengths)),
    }


def _padded_sizes(lengths: Sequence[int], token_budget: int) -> list[int]:
    return [b.computed_tokens for b in microbatches([_blank(n) for n in lengths], token_budget)]


def _blank(length: int) -> Sample:
    """A sample that is nothing but its length."""
    none = torch.zeros(0, dtype=torch.int64)
    prompt = EncodedPrompt("", none[:1].new_zeros(1), torch.zeros(0, 1), none.reshape(0, 3), none.new_zeros(3, 1), none)
    return Sample(prompt, torch.zeros(length - 1, dtype=torch.int64))


def speed(model: Any, samples: list[Sample], token_budget: int, repetitions: int, masked: bool) -> dict[str, float]:
    """Tokens (without padding) per second of each way."""
    device = next(model.parameters()).device
    ways: dict[str, Callable[[], list[Batch]]] = {
        "packed": lambda: packed_microbatches(samples, token_budget),
        "padded": lambda: microbatches(samples, token_budget),
    }
    if masked:
        ways["masked"] = ways["packed"]
    fastest = dict.fromkeys(ways, float("inf"))
    for repetition in range(repetitions + 1):
        for way, batches in ways.items():
            model.set_attn_implementation("sdpa" if way == "masked" else IMPLEMENTATION)
            began = time.perf_counter()
            for batch in batches():
                response_logprobs(model, batch.to(device))[0].sum().backward()
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repetition:  # the first warms up
                fastest[way] = min(fastest[way], time.perf_counter() - began)
    tokens = sum(s.length for s in samples)
    return {way: tokens / seconds for way, seconds in fastest.items()}


def long_samples(groups: list[list[Sample]], lengths: list[Group], shrink: int) -> list[Sample]:
    """The testbed's prompts with responses of random tokens, as long as the realistic ones divided by `shrink`."""
    generator = torch.Generator().manual_seed(0)
    return [
        replace(group[0], response_ids=torch.randint(20, 60, (max(1, r // shrink),), generator=generator))
        for group, row in zip(groups, lengths, strict=False)
        for _, r in row
    ]


def main() -> None:
    quick = parse(__doc__).quick
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder), vocabulary(), TinyModelSettings(), seed=0)
        encoder, model = Encoder(folder, 512), load_policy(folder)
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    testbed = testbed_samples(encoder, 16, 8)
    realistic = realistic_lengths(32, 16)
    cases = {
        "testbed": (
            [[(len(s.prompt.token_ids), len(s.response_ids)) for s in g] for g in testbed],
            (1024, 4096),
            (1, 8),
        ),
        "realistic": (realistic, (10240, 32768), (1, 8)),
    }
    for name, (groups, budgets, worlds) in cases.items():
        for budget in budgets:
            for ranks in worlds:
                found = packing_figures(groups, budget, ranks)
                figures |= {f"{name}_{budget}_ranks{ranks}_{k}": round(v, 4) for k, v in found.items()}
                gain = found["packed_efficiency"] / found["padded_efficiency"]
                ratios[f"{name}_{budget}_ranks{ranks}_efficiency_packed_over_padded"] = round(gain, 3)
                print(
                    f"{name}, budget {budget}, {ranks} ranks:", {k: round(v, 4) for k, v in found.items()}, flush=True
                )
    for budget in cases["realistic"][1]:
        draws = [packing_figures(realistic_lengths(32, 16, s), budget, 8) for s in range(2 if quick else 20)]
        found = [d["packed_efficiency"] for d in draws]
        figures[f"realistic_{budget}_ranks8_packed_efficiency_mean_of_draws"] = round(sum(found) / len(found), 4)
        figures[f"realistic_{budget}_ranks8_packed_efficiency_least_of_draws"] = round(min(found), 4)
    repetitions = 1 if quick else 5
    long = long_samples(testbed, realistic[: 2 if quick else 8], 16)
    runs = {"testbed": ([s for g in testbed[: 4 if quick else 16] for s in g], 4096), "long": (long, 2048)}
    for name, (samples, budget) in runs.items():
        rates = speed(model, samples, budget, repetitions, masked=name == "long")
        figures |= {f"{name}_{way}_tokens_per_s": round(rate, 1) for way, rate in rates.items()}
        for other in rates.keys() - {"packed"}:
            ratios[f"{name}_tokens_per_s_packed_over_{other}"] = round(rates["packed"] / rates[other], 3)
        print(f"{name}, {len(samples)} samples, budget {budget}:", {k: round(v) for k, v in rates.items()}, flush=True)
    finish("packing", ratios, figures, conditions())


if __name__ == "__main__":
    main()
