"""Tiny policies, dense and mixture, and what a learner of two ranks makes of them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prism_ray.config.models import TinyModelSettings
from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy, save_policy
from prism_ray.models.tiny import build_tiny
from prism_ray.models.upcycle import Upcycling, upcycle
from prism_ray.records import Prompt

WORDS = ["max", "of", "red", *(str(i) for i in range(20))]
TRAINED = (("dense", "float32"), ("mixture", "float32"), ("mixture", "bfloat16"))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """A dense policy and a mixture upcycled from it, as folders."""
    dense, mixture = (tmp_path_factory.mktemp(name) for name in ("dense", "mixture"))
    build_tiny(dense, WORDS, TinyModelSettings(layers=2, embedding_std=0.3), seed=0)
    moe = upcycle(load_policy(dense), Upcycling(experts=4, top_k=2, expert_noise=0.05, router_init=0.5, seed=0))
    save_policy(moe, mixture, like=dense)
    return {"dense": dense, "mixture": mixture}


@pytest.fixture(scope="session")
def trained(policies, tmp_path_factory):
    """Where `rank_program.py` left each of TRAINED."""
    out = tmp_path_factory.mktemp("trained")
    places = {pair: out / "-".join(pair) for pair in TRAINED}
    jobs = [{"policy": str(policies[kind]), "precision": p, "out": str(place)} for (kind, p), place in places.items()]
    (out / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("rank_program.py")
    done = subprocess.run(
        [sys.executable, str(program), str(out / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return places


@pytest.fixture(params=TRAINED, ids="-".join)
def place(request, trained):
    return trained[request.param]


@pytest.fixture
def seen(place):
    return torch.load(place / "seen.pt", weights_only=False)


@pytest.fixture(scope="session")
def batch(policies):
    """Two responses to prompts with images of different sizes."""
    samples = []
    encoder = Encoder(policies["dense"], 300)
    for seed, width in enumerate((96, 64)):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        prompt = Prompt("p", ({"role": "user", "content": "<image> max of red"},), (buffer.getvalue(),))
        samples.append(Sample(encoder.prompt(prompt), torch.arange(260, 272 - seed)))
    return collate(samples)
