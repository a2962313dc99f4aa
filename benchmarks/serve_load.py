"""The endpoint under load, against the scorer that it serves called directly.

    python benchmarks/serve_load.py [--quick] [--seconds S] [--responses N] [--threads N]

The discriminator is upcycled from the tiny model in its default size (float32). A request is a prompt of the testbed
with its image and a careless annotator's responses, packed as msgpack. `direct` scores the same requests in this
process by `Served.cut` and `Served.score`, which is all a replica does to them: `alone` one after the other, `batched`
as many at a time as the endpoint's queue puts together. `served` goes over HTTP to one replica on a private Ray Serve:
so many callers ask, each again as soon as it has its answer. Overload is five times as many as there were at the
peak, by the Python client, which asks again when it was refused (503), after the time that the endpoint names; and then
rude ones: requests five times as often as the endpoint can answer, whether or not it does.

Server, callers and Ray share the machine, so that the callers' own work counts against the endpoint. `processor_s` is
what each of the processes worked meanwhile, and says what an answer and a refusal cost, however busy the machine is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from common import conditions, finish, parse

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.config.serve import QueueSettings, ReplicaSettings, ServeJobSettings
from prism_ray.config.testbed import NoiseSettings
from prism_ray.discriminator.model import create_discriminator
from prism_ray.endpoint.client import AsyncClient
from prism_ray.endpoint.wire import MSGPACK, SCORE, ScoreAnswer, body_of, pack
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt
from prism_ray.serve.deployment import INGRESS, SCORER
from prism_ray.serve.intake import Query
from prism_ray.serve.local import checked, listening
from prism_ray.serve.scoring import Served
from prism_ray.testbed.noise import careless
from prism_ray.testbed.questions import EACH, random_question
from prism_ray.testbed.scene import draw, encode_png, random_cells
from prism_ray.testbed.words import vocabulary

HEADERS = {"Content-Type": MSGPACK, "Accept": MSGPACK}
OVERLOAD = 5
ROLES = {"ProxyActor": "proxy", f":{INGRESS}": "ingress", f":{SCORER}": "scorer"}
"""How the endpoint's processes are called, and what they do."""


def make_queries(count: int, responses: int) -> list[Query]:
    """Requests of 2 x 3 cells and an "each" question."""
    rng = np.random.default_rng(0)
    queries = []
    for index in range(count):
        cells, question = random_cells(rng, 6), random_question(rng, EACH, 6)
        image = encode_png(draw(cells, 2, 3, 1.3, rng))
        texts = tuple(careless(cells, question, NoiseSettings(), rng)[0].text for _ in range(responses))
        message = {"role": "user", "content": f"<image>{question.text}"}
        queries.append(Query(Prompt(str(index), (message,), (image,)), texts))
    return queries


def direct(served: Served, queries: list[Query], together: int) -> float:
    """Requests per second of the scorer itself, so many at a time."""
    began = time.perf_counter()
    for first in range(0, len(queries), together):
        served.score([served.cut(query) for query in queries[first : first + together]])
    return len(queries) / (time.perf_counter() - began)


def batch_of(served: Served, queries: list[Query], budget: int) -> int:
    """How many such requests the endpoint's queue puts together."""
    return max(1, int(budget / np.mean([served.cut(query).cost for query in queries])))


class Callers:
    """Requests over HTTP, their latencies in seconds by status."""

    def __init__(self, url: str, plain: list[dict[str, Any]]) -> None:
        """`plain`: the requests as the Python client takes them."""
        self.url, self.plain, self.bodies = url, plain, [pack(body) for body in plain]

    async def closed(self, callers: int, seconds: float) -> dict[str, float]:
        """So many callers, each with one request under way at a time."""
        latencies: list[float] = []
        async with self._client() as client:
            end = time.perf_counter() + seconds

            async def one(number: int) -> None:
                while time.perf_counter() < end:
                    status, latency = await self._ask(client, number + len(latencies))
                    assert status == 200, f"the endpoint answered {status}"
                    latencies.append(latency)

            began = time.perf_counter()
            await asyncio.gather(*(one(number) for number in range(callers)))
            took = time.perf_counter() - began
        return {"requests_per_s": len(latencies) / took, "answers": len(latencies)} | quantiles(latencies)

    async def polite(self, callers: int, seconds: float) -> dict[str, Any]:
        """So many callers with the Python client; a latency is from the first attempt to the answer."""
        latencies: list[float] = []
        async with AsyncClient(self.url, "", timeout_s=120, connections=callers) as client:
            end = time.perf_counter() + seconds

            async def one(number: int) -> None:
                while time.perf_counter() < end:
                    began = time.perf_counter()
                    await client.ask(ScoreAnswer, SCORE, self.plain[(number + len(latencies)) % len(self.plain)])
                    latencies.append(time.perf_counter() - began)

            began = time.perf_counter()
            await asyncio.gather(*(one(number) for number in range(callers)))
            took = time.perf_counter() - began
        return {"answered_per_s": len(latencies) / took, "answered": quantiles(latencies)}

    async def open(self, rate: float, seconds: float) -> dict[str, Any]:
        """Requests at this rate whatever becomes of them."""
        async with self._client() as client:
            tasks = []
            began = time.perf_counter()
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                tasks.append(asyncio.create_task(self._ask(client, number)))
            asked = time.perf_counter() - began
            done = await asyncio.gather(*tasks)
            took = time.perf_counter() - began
        good = [latency for status, latency in done if status == 200]
        refused = [latency for status, latency in done if status == 503]
        return {
            "asked_per_s": len(done) / asked,
            "answered_per_s": len(good) / took,
            "statuses": {str(status): count for status, count in Counter(status for status, _ in done).items()},
            "answered": quantiles(good),
            "refused": quantiles(refused),
        }

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        return httpx.AsyncClient(base_url=self.url, headers=HEADERS, timeout=120, limits=limits)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> tuple[int, float]:
        began = time.perf_counter()
        answer = await client.post(SCORE, content=self.bodies[number % len(self.bodies)])
        return answer.status_code, time.perf_counter() - began


def processor_s() -> dict[str, float]:
    """Seconds of processor time that callers (this process) and the endpoint's processes have used."""
    own = psutil.Process()
    used = {"callers": sum(own.cpu_times()[:2])} | dict.fromkeys(ROLES.values(), 0.0)
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(child.cmdline())
            for mark, role in ROLES.items():
                if mark in title:
                    used[role] += sum(child.cpu_times()[:2])
    return used


def measured(load: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """What became of a load, and what it cost."""
    before = processor_s()
    figures = asyncio.run(load)
    return figures | {"processor_s": {role: round(s - before[role], 3) for role, s in processor_s().items()}}


def endpoints_s(figures: dict[str, Any]) -> float:
    """What all processes of the endpoint worked for a load."""
    return sum(s for role, s in figures["processor_s"].items() if role != "callers")


def quantiles(latencies: list[float]) -> dict[str, float]:
    """In milliseconds."""
    if not latencies:
        return {}
    return {f"p{q}_ms": round(float(np.percentile(latencies, q)) * 1000, 1) for q in (50, 95, 99)}


def costs(peak: dict[str, Any], overload: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the endpoint's processor time for an answer, at the peak, and for a refusal: what the overload
    took beyond its answers."""
    answer = endpoints_s(peak) / peak["answers"]
    counts = overload["statuses"]
    refusals = endpoints_s(overload) - answer * counts.get("200", 0)
    refusal = refusals / counts["503"] if counts.get("503") else 0.0
    return {"answer": round(1000 * answer, 2), "refusal": round(1000 * refusal, 2)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--seconds", type=float, default=15.0, help="of each load")
    own.add_argument("--responses", type=int, default=8, help="of each request")
    own.add_argument("--prompts", type=int, default=64, help="different requests")
    own.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    own.add_argument("--threads", type=int, default=1, help="of the scorer")
    options = parse(__doc__, own)
    if options.quick:
        options.seconds, options.prompts, options.callers = 2.0, 8, [1, 4]
    torch.set_num_threads(options.threads)
    logging.getLogger("ray").setLevel(logging.ERROR)
    queries = make_queries(options.prompts, options.responses)
    plain = [body_of(query.prompt, list(query.texts)) for query in queries]
    figures: dict[str, Any] = {"body_bytes": int(np.mean([len(pack(body)) for body in plain]))}
    with tempfile.TemporaryDirectory() as folder:
        policy, judge = Path(folder) / "policy", Path(folder) / "judge"
        build_tiny(policy, vocabulary(), TinyModelSettings(), seed=0)
        create_discriminator(policy, judge, DiscriminatorSettings(), seed=0)
        # No memory of prompts on either side: every request is computed as if it were new.
        queue = QueueSettings(prompt_cache_mb=0, requests=64)
        served = Served(judge, 512, queue.batch_tokens, 0)
        together = batch_of(served, queries, queue.batch_tokens)
        direct(served, queries[:together], together)
        figures["direct"] = {"alone": direct(served, queries, 1), "batched": direct(served, queries, together)}
        print("direct", figures["direct"], "requests/s, together:", together, flush=True)
        settings = ServeJobSettings(
            checkpoint=judge,
            port=free_port(),
            queue=queue,
            replicas=ReplicaSettings(cpus=options.threads),
            cluster=ClusterSettings(cpus=4),
        )
        with listening(checked(settings), threading.Event()) as url:
            callers = Callers(url, plain)
            asyncio.run(callers.closed(2, options.seconds / 5))  # warm up
            for count in options.callers:
                figures[f"served, {count} callers"] = measured(callers.closed(count, options.seconds))
                print(count, figures[f"served, {count} callers"], flush=True)
            rates = {count: figures[f"served, {count} callers"]["requests_per_s"] for count in options.callers}
            busiest = max(rates, key=lambda count: rates[count])
            peak = rates[busiest]
            figures["polite overload"] = measured(callers.polite(OVERLOAD * busiest, options.seconds))
            print("polite overload", figures["polite overload"], flush=True)
            figures["overload"] = measured(callers.open(OVERLOAD * peak, options.seconds))
            print("overload", figures["overload"], flush=True)
            figures["after overload, 1 caller"] = asyncio.run(callers.closed(1, options.seconds / 3))
    first, best = (figures[f"served, {count} callers"] for count in (options.callers[0], busiest))
    figures["processor_ms"] = costs(best, figures["overload"])
    ratios = {
        "requests_per_s, direct batched over served": figures["direct"]["batched"] / peak,
        "latency of one caller, served over direct": first["p50_ms"] / 1000 * figures["direct"]["alone"],
        "answered_per_s, at polite overload over peak": figures["polite overload"]["answered_per_s"] / peak,
        "answered_per_s, at overload over peak": figures["overload"]["answered_per_s"] / peak,
        "p99 of answered, at overload over one caller": figures["overload"]["answered"]["p99_ms"] / first["p99_ms"],
    }
    shown = {name: round(ratio, 3) for name, ratio in ratios.items()}
    finish("serve_load", shown, figures, conditions() | vars(options) | {"requests_together": together})


if __name__ == "__main__":
    main()
