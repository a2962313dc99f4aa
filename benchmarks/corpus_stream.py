"""Reading a corpus: prompts per second, memory, and how long the first prompt takes, at one size and at ten times it.

    python benchmarks/corpus_stream.py [--rows 3000] [--quick]

A corpus of photo-like JPEGs (320 x 240, a few dozen distinct ones) with a question and a reference each is written as
Parquet (images inside, row groups of 256 rows) and as JSON Lines (image files beside it). `PromptStream` reads one
epoch of each as a run does: every row is checked, every image decoded, prompts handed to a consumer that drops them.

Memory is what the driver and all of Ray's worker processes have of their own (resident less shared), its highest sum,
plus the most bytes in the object store, each less what it was when Ray had just started.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from common import conditions, finish, parse
from PIL import Image, ImageFilter

from prism_ray.config.corpora import CorporaSettings
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.references import row_of, writing
from prism_ray.corpora.stream import PromptStream
from prism_ray.records import Prompt
from prism_ray.response import render

DISTINCT = 40
MB = 2**20


def photos() -> list[bytes]:
    """JPEGs that weigh what photographs of their size do."""
    made = []
    for seed in range(DISTINCT):
        noise = np.random.default_rng(seed).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def prompts(rows: int, images: list[bytes]) -> Iterator[Prompt]:
    """Rows that differ in their text."""
    for number in range(rows):
        asked = {"role": "user", "content": f"<image>Which of the {number} things in the picture is the largest?"}
        reference = render("A blur of many colours. " * 20, f"I look at thing {number}. " * 40, str(number))
        yield Prompt(f"r{number}", (asked,), (images[number % DISTINCT],), reference, str(number), "benchmark")


def write(folder: Path, rows: int, kind: str) -> Path:
    """The corpus as a file of this kind."""
    images = photos()
    if kind == "parquet":
        with writing(folder / f"{rows}.parquet") as file:
            for prompt in prompts(rows, images):
                file.write(row_of(prompt))
        return folder / f"{rows}.parquet"
    for number, image in enumerate(images):
        (folder / f"{number}.jpg").write_bytes(image)
    path = folder / f"{rows}.jsonl"
    with path.open("w") as file:
        for number, prompt in enumerate(prompts(rows, images)):
            row = row_of(prompt) | {"images": [f"{number % DISTINCT}.jpg"]}
            file.write(json.dumps(row) + "\n")
    return path


def own_memory() -> float:
    """Bytes that this process and Ray's workers have of their own, and those in the object store."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            name = process.cmdline()[:1]
            if process.pid == psutil.Process().pid or (name and name[0].startswith("ray::")):
                memory = process.memory_info()
                total += memory.rss - memory.shared
        except psutil.Error:
            continue
    resources = ray.cluster_resources().get("object_store_memory", 0), ray.available_resources()
    return total + resources[0] - resources[1].get("object_store_memory", 0)


@contextmanager
def watched() -> Iterator[list[float]]:
    """The highest memory so far, in a list of one, measured five times a second."""
    highest, over = [own_memory()], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            highest[0] = max(highest[0], own_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()


async def read(path: Path, rows: int) -> tuple[float, float]:
    """Seconds to the first prompt, and prompts per second over one epoch from then on."""
    began = time.perf_counter()
    needs = Requirements(reference=True, ground_truth=True)
    stream = PromptStream([path], needs, CorporaSettings(), seed=0)
    try:
        await stream.take()
        first = time.perf_counter()
        for _ in range(rows - 1):
            await stream.take()
        return first - began, (rows - 1) / (time.perf_counter() - first)
    finally:
        stream.shutdown()


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--rows", type=int, default=3000, help="rows of the smaller corpus")
    options = parse(__doc__, own)
    if options.quick:
        options.rows = 200
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=600 * MB, logging_level=logging.ERROR,
        log_to_driver=False,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        warm = write(Path(folder), 50, "parquet")
        asyncio.run(read(warm, 50))  # starts the worker processes
        base = own_memory()
        for kind in ("parquet", "jsonl"):
            for size in (1, 10):
                rows = size * options.rows
                path = write(Path(folder), rows, kind)
                with watched() as highest:
                    first, speed = asyncio.run(read(path, rows))
                name = f"{kind}, {size}x"
                figures[f"{name}, file_mb"] = round(path.stat().st_size / MB, 1)
                figures[f"{name}, first_prompt_s"] = round(first, 2)
                figures[f"{name}, rows_per_s"] = round(speed, 1)
                figures[f"{name}, memory_mb"] = round((highest[0] - base) / MB, 1)
                print(name, {key: value for key, value in figures.items() if key.startswith(name)}, flush=True)
                path.unlink()
            for what in ("rows_per_s", "memory_mb", "first_prompt_s"):
                before, after = figures[f"{kind}, 1x, {what}"], figures[f"{kind}, 10x, {what}"]
                ratios[f"{kind}, {what} 10x over 1x"] = round(after / max(before, 1e-9), 2)
    ray.shutdown()
    finish("corpus_stream", ratios, figures, conditions() | vars(options))


if __name__ == "__main__":
    main()
