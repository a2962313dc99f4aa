"""Peak memory and time of response log-probs and their gradients: in chunks over the output layer, against all at once.

    python benchmarks/logprob_memory.py [--quick]

The output layer has Qwen3-VL's vocabulary (151,936). Each case runs in a process of its own, because a peak cannot be
taken back; memory is what the case needs on top of its inputs. `training` is log-probs, entropies and backward;
`recompute` the proximal policy's log-probs alone. The results of both forms are compared. `twice_the_tokens` is what
the chunked form needs for twice as many tokens: its memory is the chunk's, so about 1.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import conditions, finish, parse
from torch import Tensor, nn

from prism_ray.models.logprobs import token_logprobs

VOCABULARY = 151_936
CASES = ("training", "recompute")


def naive(head: nn.Linear, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Every logit at once, as most trainers do."""
    logp_NV = head(hidden_ND).float().log_softmax(-1)
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N


def chunked(head: nn.Linear, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    logp_N, entropy_N = token_logprobs(head, hidden_ND, targets_N, entropy=True)
    assert entropy_N is not None
    return logp_N, entropy_N


def child(form: str, case: str, tokens: int, width: int, file: str) -> None:
    """Run one case and write its figures and results to `file`."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    head = nn.Linear(width, VOCABULARY, bias=False).to(device, dtype)
    hidden_ND = torch.randn(tokens, width).to(device, dtype).requires_grad_(case == "training")
    targets_N = torch.randint(0, VOCABULARY, (tokens,)).to(device)
    function = {"naive": naive, "chunked": chunked}[form]
    if case == "training":  # where gradients go is not what is compared
        head.weight.grad = torch.zeros_like(head.weight)
    function(head, hidden_ND[:64], targets_N[:64])  # libraries allocate at first use
    before, began = peak(device, reset=True), time.perf_counter()
    with torch.set_grad_enabled(case == "training"):
        logp_N, entropy_N = function(head, hidden_ND, targets_N)
    if case == "training":
        logp_N.mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    gradient = hidden_ND.grad if case == "training" else torch.zeros(0)
    results = {"logp": logp_N.detach().cpu(), "entropy": entropy_N.cpu(), "gradient": gradient.cpu() * tokens}
    torch.save({"bytes": peak(device) - before, "seconds": seconds, "dtype": str(dtype), "results": results}, file)


def peak(device: str, reset: bool = False) -> int:
    """Greatest memory of this process so far (on CUDA: since the last reset, and what is held now with `reset`)."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(form: str, case: str, tokens: int, width: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.pt"
        command = [sys.executable, __file__, "--child", form, case, str(tokens), str(width), str(file)]
        subprocess.run(command, check=True)
        return torch.load(file)


def main() -> None:
    arguments = parse(__doc__)
    tokens, width = (512, 64) if arguments.quick else (2048, 512)
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for case in CASES:
        done = {form: run(form, case, tokens, width) for form in ("naive", "chunked")}
        for form, one in done.items():
            figures[f"{case}_{form}_peak_mib"] = round(one["bytes"] / 2**20, 1)
            figures[f"{case}_{form}_s"] = round(one["seconds"], 2)
        for quantity in ("bytes", "seconds"):
            ratios[f"{case}_{quantity}_chunked_over_naive"] = round(
                done["chunked"][quantity] / done["naive"][quantity], 3
            )
        twice = run("chunked", case, 2 * tokens, width)["bytes"] / done["chunked"]["bytes"]
        ratios[f"{case}_bytes_chunked_twice_the_tokens"] = round(twice, 3)
        pairs = [(done["chunked"]["results"][k], v) for k, v in done["naive"]["results"].items()]
        figures[f"{case}_largest_difference"] = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
        print(json.dumps({k: v for k, v in figures.items() if k.startswith(case)}, indent=1))
    shape = {"tokens": tokens, "hidden_size": width, "vocabulary": VOCABULARY, "dtype": done["naive"]["dtype"]}
    finish("logprob_memory", ratios, figures, conditions() | shape)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        form, case, tokens, width, file = sys.argv[2:]
        child(form, case, int(tokens), int(width), file)
    else:
        main()
