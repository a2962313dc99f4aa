"""One vLLM engine: samples groups with the log-prob and the version of every token, takes new weights while it does.

The distribution it samples from, and reports log-probs of, is softmax(logits / temperature) over the tokens that are
not banned. `models.logprobs.response_logprobs` computes the same one when given the same temperature and banned ids.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from prism_ray.config.rollout import RolloutSettings
from prism_ray.models.encode import Encoder
from prism_ray.models.tokens import writer_of
from prism_ray.records import Prompt, Rollout
from prism_ray.rollout.partial import UNFINISHED, Piece, joined, nothing
from prism_ray.rollout.process import environment
from prism_ray.rollout.sampling import Request, check_rollouts, versions_of
from prism_ray.weights import files, gloo  # noqa: F401 - vLLM learns of the backend
from prism_ray.weights.shared_memory import load_files
from prism_ray.weights.transports import Link, Superseded, seen_by_vllm


class Engine:
    """A running vLLM engine that holds the weights of `version`."""

    def __init__(self, llm: AsyncLLM, encoder: Encoder, folder: Path, settings: RolloutSettings):
        self._llm, self._encoder, self._settings = llm, encoder, settings
        self._shapes = files.shapes_in(files.checkpoint_files(folder))
        self._ids = itertools.count()
        self._running: dict[str, _Run] = {}
        self._updating = asyncio.Lock()
        self._transfers, self._era = 0, 0
        self._asleep = False
        self._learner = ""  # whom the engine has a link to
        self.version = 0

    @classmethod
    async def start(cls, folder: str | Path, settings: RolloutSettings, seed: int, version: int) -> Engine:
        """Start vLLM on the Hugging Face checkpoint in `folder`, whose weights count as `version`."""
        os.environ.update(environment(settings))
        files.remove_orphans()
        encoder = Encoder(folder, settings.max_prompt_tokens)
        llm = AsyncLLM.from_engine_args(_arguments(folder, settings, seed))
        engine = cls(llm, encoder, Path(folder), settings)
        await llm.collective_rpc("prepare_for_rollouts", args=(encoder.banned_ids, os.getpid()))
        if settings.weights == "shared_memory":
            await llm.init_weight_transfer_engine(WeightTransferInitRequest({}))
        await engine._label(version)
        return engine

    async def generate(self, prompt: Prompt, request: Request, so_far: Sequence[Rollout] = ()) -> list[Rollout]:
        """Sample a group, going on from `so_far`. Unfinished rollouts (`end_all`) have finish reason `abort`.

        What is begun anew is one vLLM request, so that the prompt's images are processed and encoded once; a beginning
        becomes part of its request's prompt, and its tokens keep their log-probs and versions.
        """
        asked: Any = self._encoder.engine_prompt(prompt)
        finished = [r for r in so_far if r.finish_reason != UNFINISHED]
        begun = [r for r in so_far if r.finish_reason == UNFINISHED and len(r.token_ids)]
        fresh = sorted(set(range(request.sampling.n)) - {r.index for r in finished + begun})
        runs = [_Run(request.key, (r.index,), r) for r in begun]
        if fresh:
            runs.append(_Run(request.key, tuple(fresh)))
        try:
            sampled = await asyncio.gather(*(self._sample(prompt.id, asked, request, run) for run in runs))
        except VLLMClientError as error:  # the request's own fault, for which no engine should be replaced
            raise ValueError(f"prompt {prompt.id}: {error}") from None
        if finished:
            prompt_ids = self._encoder.prompt(prompt).token_ids.numpy().astype(np.int32)
            known = {"prompt_id": prompt.id, "prompt_token_ids": prompt_ids}
            sampled.append([replace(r, text=self._text(r.last_response), **known) for r in finished])
        rollouts = sorted(itertools.chain.from_iterable(sampled), key=lambda r: r.index)
        newest = self.version if request.era >= self._era else None
        check_rollouts(rollouts, request.sampling, len(self._encoder.pieces), newest)
        return rollouts

    def progress(self) -> dict[int, tuple[int, list[Piece]]]:
        """News of every group under way, by the key of its request: how many tokens it may still have to produce, and
        what its rollouts have since the last call.

        Read from vLLM's own bookkeeping of what it has put out, where each token is with its version: streaming the
        same would wake this process for every token.
        """
        news: dict[int, tuple[int, list[Piece]]] = {}
        for request_id, run in self._running.items():
            remaining, pieces = news.get(run.key, (0, []))
            sequences = list(self._sequences(request_id))
            for position, tokens, logp, spans, reason in sequences:
                if reason == UNFINISHED:
                    remaining += run.max_tokens - len(tokens)
                if len(tokens) > run.told.get(position, 0):
                    pieces.append(run.piece(position, tokens, logp, spans, reason))
            if not sequences:  # vLLM still prepares the prompt
                remaining += run.max_tokens * len(run.indices)
            news[run.key] = (remaining, pieces)
        return news

    async def end_all(self, before: int) -> None:
        """End all requests of eras before `before`, those on their way here too; each returns what it has."""
        self._era = max(self._era, before)
        ending = set(self._running)
        while ending := ending & self._running.keys():
            async with self._updating:
                await self._llm.abort(ending)
            await asyncio.sleep(0.01)  # vLLM knows a request only once its prompt is prepared

    async def update(self, weights: Any, version: int) -> dict[str, float]:
        """Go on with `weights` (a learner's arrays by name) as `version`. Returns how long decoding stood still."""
        label = f"weights of version {version}"
        with files.SharedFile() as shared:
            await asyncio.to_thread(shared.write, weights, self._shapes, label)
            return await self._transfer(lambda: self._take_files([shared.path]), version)

    async def receive(self, link: Link, version: int) -> dict[str, float]:
        """Go on with the weights that a learner offers over `link` as `version`; returns what `update` does.

        Superseded if the learner has newer ones by now, or is gone: the engine goes on with those it had, or (if they
        were replaced while it took them) stands still until the next call.
        """
        if self._learner != link.learner:
            await self._connect(link)
        updates = await link.updates()
        return await self._transfer(lambda: self._take_offered(link, updates), version)

    async def load(self, folder: str | Path, version: int) -> dict[str, float]:
        """Go on with the weights of a checkpoint folder of the same architecture as `version`; also with its chat
        template, where that is another."""
        found = files.checkpoint_files(folder)
        files.check_complete(files.shapes_in(found), self._shapes, str(folder))
        if (writer := writer_of(folder)) and writer != self._encoder.writer:
            self._encoder = await asyncio.to_thread(Encoder, folder, self._settings.max_prompt_tokens)
        return await self._transfer(lambda: self._take_files(found), version)

    async def sleep(self) -> None:
        """Decode nothing and give the GPU's memory back until new weights come (on a CPU vLLM gives nothing back)."""
        async with self._updating:
            await self._llm.sleep(self._settings.sleep_level, mode="keep")
            self._asleep = True

    async def health(self) -> dict[str, int]:
        """What the engine says of itself; raises if it cannot work any more."""
        await self._llm.check_health()
        running, asleep = self._llm.get_num_unfinished_requests(), await self._llm.is_sleeping()
        return {"version": self.version, "running": running, "asleep": int(asleep), "pid": os.getpid()}

    async def alive(self) -> None:
        """Answers once vLLM's own process has, which it does between two steps.

        It does not while weights are exchanged; that has a deadline of its own.
        """
        if not self._updating.locked():
            await self._llm.get_weight_version()

    def stop(self) -> None:
        self._llm.shutdown()

    async def _connect(self, link: Link) -> None:
        """Meet a learner: the first one, or the one that was rebuilt."""
        if self._learner:
            await self._llm.shutdown_weight_transfer_engine()
        self._learner = ""
        info = WeightTransferInitRequest(await link.prepare(max(1, self._settings.gpus_per_engine)))
        await asyncio.gather(self._llm.init_weight_transfer_engine(info), link.meet())
        self._learner = link.learner

    async def _take_offered(self, link: Link, updates: Sequence[dict[str, Any]]) -> None:
        async def take() -> None:
            for update in updates:
                await self._llm.update_weights(WeightTransferUpdateRequest(update))

        await self._llm.start_weight_update()
        try:
            await asyncio.gather(take(), link.send())
        except Superseded as error:  # vLLM cannot begin anew in the midst of an update
            raise RuntimeError(f"{error}, and had begun to") from error
        await self._llm.finish_weight_update()
        await link.confirm()

    async def _take_files(self, paths: Sequence[Path]) -> None:
        names = [str(path) for path in paths]
        if self._settings.weights != "shared_memory":
            await self._llm.collective_rpc("load_files", args=(names,))
            return
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest({"files": names}))
        await self._llm.finish_weight_update()

    async def _transfer(self, take: Callable[[], Awaitable[None]], version: int) -> dict[str, float]:
        """Exchange the weights between two decoding steps.

        A failure half-way leaves the engine paused with mixed weights: it must be thrown away.
        """
        recompute = self._settings.kv_on_update == "recompute"
        async with self._updating:
            began = time.perf_counter()
            if self._asleep:
                await self._llm.wake_up(["weights"])  # keys and values only once the weights' copy is gone again
            await self._llm.pause_generation(mode="keep", clear_cache=recompute)
            await take()
            if not recompute:
                await self._llm.reset_encoder_cache()  # the vision tower changed as well
            self._transfers += 1  # not the version: another stage's policy may have the same
            await self._label(version)
            if self._asleep:
                await self._llm.wake_up(["kv_cache"])
                self._asleep = False
            await self._llm.resume_generation()
            return {"paused_s": time.perf_counter() - began}

    async def _label(self, version: int) -> None:
        await self._llm.update_weight_version(str(version))
        self.version = version

    async def _sample(self, prompt_id: str, asked: Any, request: Request, run: _Run) -> list[Rollout]:
        request_id, sampling = str(next(self._ids)), request.sampling
        prefix = 0 if run.begun is None else len(run.begun.token_ids)
        run.max_tokens = sampling.max_tokens - prefix
        params = SamplingParams(
            n=len(run.indices),
            temperature=sampling.temperature,
            max_tokens=run.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=[self._encoder.end_id],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        full = asked if run.begun is None else self._encoder.going_on(asked, run.begun)
        # Blocks computed under other weights must not match.
        salted: Any = full | {"cache_salt": str(self._transfers)}
        if request.era < self._era:  # abandoned on its way here
            return [run.begun or nothing(prompt_id, i) for i in run.indices]
        self._running[request_id] = run
        final: Any = None
        try:
            async for output in self._llm.generate(salted, params, request_id=request_id):
                final = output
        finally:
            del self._running[request_id]
        expanded = np.asarray(final.prompt_token_ids, np.int32)
        prompt_ids = expanded[: len(expanded) - prefix]
        return [self._rollout(prompt_id, prompt_ids, completion, run) for completion in final.outputs]

    def _rollout(self, prompt_id: str, prompt_ids: np.ndarray, completion: Any, run: _Run) -> Rollout:
        token_ids = np.asarray(completion.token_ids, np.int32)
        logp = np.asarray(completion.logprobs.logprobs if completion.logprobs else [], np.float32)
        sampled = Rollout(
            prompt_id=prompt_id,
            index=run.indices[completion.index],
            prompt_token_ids=prompt_ids,
            token_ids=token_ids,
            logp=logp,
            versions=versions_of(completion.weight_versions or [], len(token_ids)),
            text="",
            finish_reason=completion.finish_reason,
        )
        whole = sampled if run.begun is None else joined(run.begun, sampled)
        return replace(whole, text=self._text(whole.last_response))

    def _text(self, token_ids: np.ndarray) -> str:
        return b"".join(self._encoder.pieces[i] for i in token_ids).decode(errors="replace")

    def _sequences(self, request_id: str) -> Iterator[tuple[int, list[int], list[float], Any, str]]:
        """Position, token ids, log-probs, version spans and finish reason of a request's sequences, as vLLM has them
        now: those under way, then those that wait for them."""
        outputs = self._llm.output_processor
        parent: Any = None
        for name in outputs.external_req_ids.get(request_id, ()):
            state: Any = outputs.request_states[name]
            logp = state.logprobs_processor.logprobs
            tokens = state.detokenizer.output_token_ids
            yield state.request_index, tokens, logp.logprobs if logp else [], state._weight_version_spans(), UNFINISHED
            parent = state.parent_req
        for done in (c for c in (parent.output_aggregator if parent else ()) if c):
            yield done.index, done.token_ids, done.logprobs.logprobs, done.weight_versions, done.finish_reason


@dataclass(eq=False)
class _Run:
    """One vLLM request: the rollouts it samples, what they go on from, and how many tokens of each were told."""

    key: int
    indices: tuple[int, ...]
    begun: Rollout | None = None
    max_tokens: int = 0
    told: dict[int, int] = field(default_factory=dict)

    def piece(self, position: int, tokens: list[int], logp: list[float], spans: Any, reason: str) -> Piece:
        """What is new of one sequence."""
        old, new = self.told.get(position, 0), len(tokens)
        self.told[position] = new
        start = old + (0 if self.begun is None else len(self.begun.token_ids))
        versions = versions_of(spans or [], new)[old:]
        ids, logps = np.asarray(tokens[old:], np.int32), np.asarray(logp[old:], np.float32)
        return Piece(self.indices[position], start, ids, logps, versions, reason)


class WorkerExtension:
    """Methods vLLM adds to its workers; being named as their extension also imports the weight-transfer backend."""

    model_runner: Any

    def prepare_for_rollouts(self, banned_ids: list[int], owner: int) -> None:
        """Make `banned_ids` impossible, and end this process with the process `owner`.

        The mask sits on the model's own logits, before temperature and sampling: one operation a step, no list in
        every request, and reported log-probs are normalised over what can be sampled.
        """
        banned = torch.tensor(banned_ids, dtype=torch.int64)

        def mask(module: Any, args: Any, logits: torch.Tensor | None) -> torch.Tensor | None:
            return None if logits is None else logits.index_fill_(-1, banned.to(logits.device), -torch.inf)

        heads = [m for m in self.model_runner.get_model().modules() if isinstance(m, LogitsProcessor)]
        if not heads:
            raise RuntimeError("found no logits processor in the model to ban tokens at")
        for head in heads:
            head.register_forward_hook(mask)
        _end_with(owner)

    def load_files(self, files: list[str]) -> None:
        """Load checkpoint files where the engine's own transport takes its weights from elsewhere."""
        load_files(self, files)


PR_SET_PDEATHSIG = 1


def _end_with(owner: int) -> None:
    """End this process when the process `owner` does: vLLM's own would outlive an actor that was killed.

    The kernel sees to it where `owner` is its parent, even if this process is stopped; a thread otherwise.
    """
    if owner == os.getppid():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while Path(f"/proc/{owner}").exists():
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if multiprocessing.parent_process() is not None:  # one of vLLM's processes, still on its way up
    _end_with(os.getppid())


def _arguments(folder: str | Path, settings: RolloutSettings, seed: int) -> AsyncEngineArgs:
    memory, transport = settings.kv_cache_gb, seen_by_vllm(settings)
    return AsyncEngineArgs(
        model=str(folder),
        dtype=settings.dtype,
        seed=seed,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_concurrent,
        max_num_batched_tokens=settings.max_batched_tokens,
        kv_cache_memory_bytes=None if memory is None else int(memory * 1e9),
        tensor_parallel_size=max(1, settings.gpus_per_engine),
        distributed_executor_backend=transport.executor,
        enforce_eager=settings.enforce_eager,
        enable_sleep_mode=settings.sleep_level > 0 and current_platform.is_sleep_mode_available(),
        enable_prefix_caching=settings.prefix_caching,
        limit_mm_per_prompt={"image": settings.max_images, "video": 0},
        # An image comes once an epoch. Without this cache no request can refer to an image that an update has dropped.
        mm_processor_cache_gb=0,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        weight_transfer_config={"backend": transport.backend},  # pyright: ignore[reportArgumentType]
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    )
