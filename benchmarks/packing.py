"""Packing: share of the computed tokens that are of use, and tokens per second against padded micro-batches.

    python benchmarks/packing.py [--quick]

Tokens are real (every sample's prompt and response), computed (what goes through the model: `shared` leaves out what
samples of one prompt begin with in common, `padded` adds padding) or paid: ranks x sum over steps of the largest
micro-batch of that step, for ranks go in step. Efficiency is useful / paid; useful are the computed tokens of `shared`,
the real ones of `padded`. Fill is useful / (micro-batches x budget). Ranks get whole groups as the learner gives them,
and in shared form equally many micro-batches.

Lengths are those of the testbed's encoded prompts with a careless annotator's responses (16 prompts x 8), and a
realistic distribution: log-normal, prompts of 300 to 2000 tokens and responses of 200 to 8000 (the limits lie two
standard deviations from the median and are clipped to), 32 prompts x 16. Realistic responses share nothing but the
prompt.

Speed is forward and backward of the response log-probs with the tiny model on the same samples, the ways taking turns;
the fastest repetition counts, and tokens are real ones. `masked` is `shared` by plain `sdpa` with a mask of [S, S].
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, finish, parse

from prism_ray.config.models import TinyModelSettings
from prism_ray.config.testbed import NoiseSettings
from prism_ray.learner.group import split_by_tokens
from prism_ray.models.attention import IMPLEMENTATION
from prism_ray.models.batch import Batch, Sample, microbatches, shared_microbatch_count, shared_microbatches
from prism_ray.models.encode import EncodedPrompt, Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt, Ticket
from prism_ray.testbed.noise import careless
from prism_ray.testbed.questions import EACH, random_question
from prism_ray.testbed.scene import draw, encode_png, random_cells
from prism_ray.testbed.words import vocabulary


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


def realistic_lengths(prompts: int, rollouts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompts [P] and of the responses [P, R]."""
    rng = np.random.default_rng(seed)
    return _log_normal(rng, 300, 2000, (prompts,)), _log_normal(rng, 200, 8000, (prompts, rollouts))


def realistic_samples(seed: int = 0) -> list[list[Sample]]:
    """Samples that are nothing but their lengths; responses of one prompt differ from their first token on."""
    groups = []
    for tokens, row in zip(*realistic_lengths(32, 16, seed), strict=True):
        none, ids = torch.zeros(0, dtype=torch.int64), torch.zeros(int(tokens), dtype=torch.int64)
        prompt = EncodedPrompt("", ids, torch.zeros(0, 1), none.reshape(0, 3), ids.expand(3, -1), none)
        groups.append([Sample(prompt, torch.full((int(n),), first)) for first, n in enumerate(row)])
    return groups


def _log_normal(rng: np.random.Generator, least: int, most: int, shape: tuple[int, ...]) -> np.ndarray:
    middle, spread = np.log(least * most) / 2, np.log(most / least) / 4
    return np.clip(np.exp(rng.normal(middle, spread, shape)).round(), least, most).astype(int)


def packing_figures(groups: list[list[Sample]], token_budget: int, ranks: int) -> dict[str, float]:
    """Efficiency and fill of both ways, and what sharing saves in computed and in paid tokens."""
    tickets = []
    for i, group in enumerate(groups):
        responses = sum(len(s.response_ids) for s in group)
        total = responses + len(group[0].prompt.token_ids)
        tickets.append(Ticket(i, str(i), i, None, tokens=responses, total_tokens=total))
    shares = [[s for t in share for s in groups[t.id]] for share in split_by_tokens(tickets, ranks)]
    count = max(shared_microbatch_count(own, token_budget) for own in shares)
    cuts = [shared_microbatches(own, token_budget, min(count, len(own))) for own in shares]
    shared = [[b.computed_tokens for b in cut] for cut in cuts]
    padded = [[b.computed_tokens for b in microbatches(own, token_budget)] for own in shares]
    real, computed, loads = sum(s.length for g in groups for s in g), sum(map(sum, shared)), list(map(sum, shared))
    return {
        "shared_efficiency": computed / paid(shared),
        "shared_fill": computed / (count * ranks * token_budget),
        "shared_computed_over_real": computed / real,
        "padded_efficiency": real / paid(padded),
        "padded_fill": real / (sum(map(len, padded)) * token_budget),
        "paid_padded_over_shared": paid(padded) / paid(shared),
        "split_over_ranks": computed / ranks / max(loads),
    }


def paid(ranks: list[list[int]]) -> int:
    """`ranks[r][s]` is what rank r computes in step s: all pay for the largest; a rank that has none left idles."""
    return len(ranks) * sum(map(max, zip_longest(*ranks, fillvalue=0)))


def speed(model: Any, samples: list[Sample], token_budget: int, repetitions: int) -> dict[str, float]:
    """Real tokens per second of each way."""
    device = next(model.parameters()).device
    ways: dict[str, Callable[[], list[Batch]]] = {
        "shared": lambda: shared_microbatches(samples, token_budget),
        "padded": lambda: microbatches(samples, token_budget),
        "masked": lambda: shared_microbatches(samples, token_budget),
    }
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


def long_samples(groups: list[list[Sample]], lengths_PR: np.ndarray, shrink: int) -> list[Sample]:
    """The testbed's prompts with responses of random tokens, as long as the realistic ones divided by `shrink`."""
    generator = torch.Generator().manual_seed(0)
    return [
        replace(group[0], response_ids=torch.randint(20, 60, (max(1, int(r) // shrink),), generator=generator))
        for group, row in zip(groups, lengths_PR, strict=False)
        for r in row
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
    cases = {"testbed": (testbed, (1024, 4096)), "realistic": (realistic_samples(), (10240, 32768))}
    for name, (groups, budgets) in cases.items():
        for budget, ranks in product(budgets, (1, 8)):
            found = {k: round(v, 4) for k, v in packing_figures(groups, budget, ranks).items()}
            figures |= {f"{name}_{budget}_ranks{ranks}_{k}": v for k, v in found.items()}
            ratios[f"{name}_{budget}_ranks{ranks}_paid_padded_over_shared"] = found["paid_padded_over_shared"]
            print(f"{name}, budget {budget}, {ranks} ranks:", found, flush=True)
    draws = [realistic_samples(seed) for seed in range(2 if quick else 20)]
    for budget in cases["realistic"][1]:
        found = [packing_figures(groups, budget, 8)["shared_efficiency"] for groups in draws]
        figures[f"realistic_{budget}_ranks8_shared_efficiency_mean_of_draws"] = round(sum(found) / len(found), 4)
        figures[f"realistic_{budget}_ranks8_shared_efficiency_least_of_draws"] = round(min(found), 4)
    repetitions = 1 if quick else 5
    long = long_samples(testbed, realistic_lengths(32, 16)[1][: 2 if quick else 8], 16)
    runs = {"testbed": ([s for g in testbed[: 4 if quick else 16] for s in g], 4096), "long": (long, 2048)}
    for name, (samples, budget) in runs.items():
        rates = speed(model, samples, budget, repetitions)
        figures |= {f"{name}_{way}_tokens_per_s": round(rate, 1) for way, rate in rates.items()}
        for other in ("padded", "masked"):
            ratios[f"{name}_tokens_per_s_shared_over_{other}"] = round(rates["shared"] / rates[other], 3)
        print(f"{name}, {len(samples)} samples, budget {budget}:", {k: round(v) for k, v in rates.items()}, flush=True)
    finish("packing", ratios, figures, conditions())


if __name__ == "__main__":
    main()
