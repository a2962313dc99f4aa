"""The learner's update: tokens per second against plain PyTorch, and where its time goes.

    python benchmarks/learner_step.py [--quick] [--ranks N] [--zero-stage Z] [--policy FOLDER] [--precision bfloat16]

Ours is an update as a learner rank does it: packed micro-batches, images encoded once, log-probs in chunks, DeepSpeed.
The other side is the textbook loop on the same samples: transformers' own forward on padded batches with an image for
every sample, all logits at once, PyTorch's AdamW. Both compute the same GRPO loss. They alternate in one process
(rank 0's; the textbook loop is only run with one rank), and the fastest of several steps counts.

`waiting` is a rank's time until the slowest reaches the optimiser step. On CUDA the model flops utilisation is given
as well, with 6 flops a parameter and token and those of causal attention.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, finish, parse
from PIL import Image

from prism_ray.config.learner import LearnerSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.learner.engine import TrainEngine, init_process_group
from prism_ray.learner.policy import trainable_policy
from prism_ray.learner.step import Recipe, update
from prism_ray.learner.work import Work, prepare
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout, Verdict
from prism_ray.testbed.words import vocabulary

RECIPE = Recipe(AdvantageSettings(estimator="grpo"), ObjectiveSettings(), CorrectionSettings())
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 peak by device name."""


class Timed:
    """A `TrainEngine` that notes where the time goes."""

    def __init__(self, engine: TrainEngine) -> None:
        self._engine, self.device = engine, engine.device
        self.seconds = dict.fromkeys(("forward", "backward", "waiting", "optimiser"), 0.0)

    @property
    def equal_forwards(self) -> bool:
        return self._engine.equal_forwards

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("forward", self._engine.run, *args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        self._timed("backward", self._engine.backward, loss)

    def over_ranks(self, values: Sequence[float], how: str) -> list[float]:
        return self._timed("waiting", self._engine.over_ranks, values, how)

    def step(self, part: float = 1.0) -> Any:
        self._timed("waiting", torch.distributed.barrier)
        return self._timed("optimiser", self._engine.step, part)

    def _timed(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        synchronise()
        self.seconds[what] += time.perf_counter() - began
        return result


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_groups(encoder: Encoder, count: int, size: int, response: tuple[int, int], side: int) -> list[Group]:
    """Groups on random images with random tokens, response lengths log-uniform between the two bounds."""
    rng = np.random.default_rng(0)
    allowed = np.setdiff1d(np.arange(len(encoder.tokenizer)), encoder.banned_ids)
    groups = []
    for number in range(count):
        picture = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(picture, format="PNG")
        prompt = Prompt(f"p{number}", ({"role": "user", "content": "<image> max of red"},), (picture.getvalue(),))
        prompt_ids = encoder.prompt(prompt).token_ids.numpy().astype(np.int32)
        rollouts, verdicts = [], []
        for index in range(size):
            tokens = int(np.exp(rng.uniform(*np.log(response))))
            ids, zeros = rng.choice(allowed, tokens).astype(np.int32), np.zeros(tokens, np.int32)
            logp = rng.normal(-5, 0.1, tokens).astype(np.float32)
            rollouts.append(Rollout(prompt.id, index, prompt_ids, ids, logp, zeros, "", "stop"))
            verdicts.append(Verdict(float(rng.normal()), True))
        groups.append(Group(number, prompt, tuple(rollouts), tuple(verdicts)))
    return groups


class Textbook:
    """The same update in plain PyTorch and transformers."""

    def __init__(self, folder: Path, settings: LearnerSettings, device: Any, micro_batch: int) -> None:
        dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        self.model = load_policy(folder, dtype).to(device)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, fused=True)
        self.device, self.micro_batch = device, micro_batch

    def update(self, work: Work, pad_id: int) -> None:
        advantage_NR = work.advantages(RECIPE.advantage, RECIPE.objective.max_response_tokens, None)
        tokens = work.mask_NR.sum()
        for first in range(0, len(work.samples), self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            logp_BR = self._logp(work, rows, pad_id)
            width = logp_BR.shape[1]
            mask_BR, advantage_BR = work.mask_NR[rows, :width], advantage_NR[rows, :width]
            behaviour_BR = work.behaviour_NR[rows, :width]
            mask_BR, advantage_BR, behaviour_BR = (t.to(self.device) for t in (mask_BR, advantage_BR, behaviour_BR))
            weight_BR = (logp_BR.detach() - behaviour_BR).exp().clamp(max=2.0)
            ratio_BR = (logp_BR - logp_BR.detach()).exp()
            (-(weight_BR * ratio_BR * advantage_BR * mask_BR).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def _logp(self, work: Work, rows: slice, pad_id: int) -> torch.Tensor:
        samples = work.samples[rows]
        ids = [torch.cat((s.prompt.token_ids, s.response_ids)) for s in samples]
        ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id).to(self.device)
        lengths_B = torch.tensor([len(i) for i in ids], device=self.device)
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": (torch.arange(ids_BT.shape[1], device=self.device) < lengths_B[:, None]).long(),
            "mm_token_type_ids": (ids_BT == self.model.config.image_token_id).long(),
            "pixel_values": torch.cat([s.prompt.pixel_values for s in samples]).to(self.device),
            "image_grid_thw": torch.cat([s.prompt.grid_thw for s in samples]).to(self.device),
        }
        self.model.model.rope_deltas = None
        logp_BTV = self.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
        logp_BT = logp_BTV[:, :-1].gather(2, ids_BT[:, 1:, None]).squeeze(2)
        start = len(samples[0].prompt.token_ids) - 1  # every prompt here is equally long
        return logp_BT[:, start : start + max(len(s.response_ids) for s in samples)]


def rank_main(rank: int, port: int, options: argparse.Namespace, folder: str, results: Any) -> None:
    """One rank: warm up, then time updates; rank 0 also runs the textbook loop between them."""
    torch.set_num_threads(1 if not torch.cuda.is_available() else 8)
    init_process_group(rank, options.ranks, "127.0.0.1", port, 600)
    settings = LearnerSettings(
        lr=1e-6,
        zero_stage=options.zero_stage,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
        micro_batch_tokens=options.micro_batch_tokens,
    )
    policy = options.policy or folder
    encoder = Encoder(policy, 100_000)
    groups = make_groups(encoder, options.groups, options.group_size, options.response, options.side)
    work = prepare(groups[rank :: options.ranks], encoder, DEFAULT_VIEWS)
    engine = TrainEngine(trainable_policy(policy, settings), settings)
    recipe = Recipe(
        RECIPE.advantage, RECIPE.objective, RECIPE.correction, micro_batch_tokens=options.micro_batch_tokens
    )
    compare = options.ranks == 1 and not options.ours_only
    per_batch = max(1, options.micro_batch_tokens // max(s.length for s in work.samples))
    textbook = Textbook(Path(policy), settings, engine.device, per_batch) if compare else None
    steps = []
    for _ in range(options.steps + 1):
        timed = Timed(engine)
        torch.distributed.barrier()
        began = time.perf_counter()
        update(timed, work, recipe, 0, encoder.banned_ids)
        synchronise()
        step = {"seconds": time.perf_counter() - began} | timed.seconds
        if textbook is not None:
            began = time.perf_counter()
            textbook.update(work, encoder.pad_id)
            synchronise()
            step["textbook"] = time.perf_counter() - began
        steps.append(step)
    tokens = sum(s.length for s in work.samples)
    flops = model_flops(engine.module, [s.length for s in work.samples])
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    results.put({"rank": rank, "steps": steps[1:], "tokens": tokens, "flops": flops, "memory": memory})


def model_flops(model: Any, lengths: list[int]) -> float:
    """Forward and backward: 6 per active text parameter and token, and causal attention."""
    text = model.config.get_text_config()
    dense = sum(p.numel() for n, p in model.named_parameters() if "language_model.layers" in n and ".experts." not in n)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    if experts:
        dense += experts * text.num_experts_per_tok / text.num_experts
    dense += text.hidden_size * text.vocab_size
    width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    attention = sum(6.0 * text.num_hidden_layers * width * n * n for n in lengths)
    return 6.0 * dense * sum(lengths) + attention


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--policy", default="", help="Hugging Face folder (default: the testbed's tiny model)")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--response", type=int, nargs=2, default=(30, 120), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--side", type=int, default=96, help="pixels of an image's side")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ours-only", action="store_true", help="leave the textbook loop out (large models)")
    options = parse(__doc__, parser)
    if options.quick:
        options.groups, options.steps = 4, 2
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        if not options.policy:
            build_tiny(Path(folder), vocabulary(), TinyModelSettings(), seed=0)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        arguments = [(rank, port, options, folder, results) for rank in range(options.ranks)]
        processes = [context.Process(target=rank_main, args=a, daemon=True) for a in arguments]
        for process in processes:
            process.start()
        ranks = sorted((results.get(timeout=1800) for _ in processes), key=lambda r: r["rank"])
        for process in processes:
            process.join()
    summarise(ranks, options)


def summarise(ranks: list[dict[str, Any]], options: argparse.Namespace) -> None:
    tokens = sum(r["tokens"] for r in ranks)
    best = min(range(options.steps), key=lambda i: max(r["steps"][i]["seconds"] for r in ranks))
    seconds = max(r["steps"][best]["seconds"] for r in ranks)
    figures: dict[str, Any] = {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds)}
    for name in ("forward", "backward", "optimiser", "waiting"):
        mean = sum(r["steps"][best][name] for r in ranks) / len(ranks)
        figures[f"{name}_share"] = round(mean / seconds, 3)
    ratios = {}
    if "textbook" in ranks[0]["steps"][0]:
        textbook = min(s["textbook"] for s in ranks[0]["steps"])
        figures["textbook_tokens_per_s"] = round(tokens / textbook)
        ratios["tokens_per_s_ours_over_textbook"] = round(textbook / seconds, 2)
    if torch.cuda.is_available():
        figures["peak_memory_gib"] = round(max(r["memory"] for r in ranks) / 2**30, 2)
        name = torch.cuda.get_device_name()
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        if peak is not None:
            figures["mfu"] = round(sum(r["flops"] for r in ranks) / seconds / peak / len(ranks), 3)
    shape = {k: v for k, v in vars(options).items() if k != "policy"}
    finish("learner_step", ratios, figures, conditions() | shape)


if __name__ == "__main__":
    main()
