"""A tiny policy and judged groups for the learner's tests."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prism_ray.config.models import TinyModelSettings
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout, Verdict

WORDS = ["max", "of", "red", "green", "blue", *"ABC", *(str(i) for i in range(10))]

torch.set_num_threads(1)


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_group(encoder: Encoder, number: int, size: int = 4, image: int = 1, version: int = 0) -> Group:
    """A judged group with rollouts of several lengths, the last of them invalid; `image` is how many the prompt has."""
    rng = np.random.default_rng(number)
    images = tuple(picture(number + 100 * i) for i in range(image))
    prompt = Prompt(f"p{number}", ({"role": "user", "content": "<image>" * image + " max of red"},), images)
    prompt_ids = encoder.prompt(prompt).token_ids.numpy().astype(np.int32)
    rollouts, verdicts = [], []
    for index in range(size):
        valid = index < size - 1
        text = f"<caption> A red {number % 10}" + " B blue" * int(rng.integers(0, 6))
        text += f"</caption><think> max {index}</think><answer> {index}</answer>" if valid else ""
        ids = np.array(encoder.response(text), np.int32)
        logp = rng.normal(-5, 0.5, len(ids)).astype(np.float32)
        versions = np.full(len(ids), version, np.int32)
        rollouts.append(Rollout(prompt.id, index, prompt_ids, ids, logp, versions, text, "stop" if valid else "length"))
        scores = {"perception": float(rng.normal()), "reasoning": float(rng.normal())} if valid else {}
        zeros = dict.fromkeys(scores, 0.0)
        verdicts.append(Verdict(float(rng.normal()), valid, scores=scores, reference_scores=zeros, parts={"format": 1}))
    return Group(number, prompt, tuple(rollouts), tuple(verdicts))


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    build_tiny(folder, WORDS, TinyModelSettings(layers=2, embedding_std=0.3), seed=0)
    return folder


@pytest.fixture(scope="session")
def encoder(policy_folder):
    return Encoder(policy_folder, 100)


@pytest.fixture(name="make_group", scope="session")
def _make_group(encoder):
    return lambda *args, **kwargs: make_group(encoder, *args, **kwargs)


@pytest.fixture(name="run_ranks", scope="session")
def _run_ranks(tmp_path_factory):
    """Run a scenario of rank_program.py on `world` processes; returns what each rank computed."""

    def run(scenario: str, world: int, inputs: dict) -> list:
        folder = tmp_path_factory.mktemp(scenario)
        torch.save(inputs, folder / "inputs.pt")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program = Path(__file__).with_name("rank_program.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(program), scenario, str(rank), str(world), str(port), str(folder)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        said = [rank.communicate(timeout=180)[0] for rank in ranks]
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)[-4000:]
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run
