"""One vLLM engine: samples groups with the log-prob and the version of every token, takes new weights while it does.

The distribution it samples from, and reports log-probs of, is softmax(logits / temperature) over the tokens that are
not banned. `models.logprobs.response_logprobs` computes the same one when given the same temperature and banned ids.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from prism_ray.config.rollout import RolloutSettings
from prism_ray.models.encode import Encoder
from prism_ray.records import Prompt, Rollout
from prism_ray.rollout.process import environment
from prism_ray.rollout.sampling import Sampling, versions_of
from prism_ray.weights import files
from prism_ray.weights.shared_memory import BACKEND


class Engine:
    """A running vLLM engine that holds the weights of `version`."""

    def __init__(self, llm: AsyncLLM, encoder: Encoder, folder: Path, settings: RolloutSettings):
        self._llm, self._encoder, self._settings = llm, encoder, settings
        self._shapes = files.shapes_in(files.checkpoint_files(folder))
        self._ids = itertools.count()
        self._updating = asyncio.Lock()
        self.version, self._transfers = 0, 0

    @classmethod
    async def start(cls, folder: str | Path, settings: RolloutSettings, seed: int, version: int) -> Engine:
        """Start vLLM on the Hugging Face checkpoint in `folder`, whose weights count as `version`."""
        os.environ.update(environment(settings))
        encoder = Encoder(folder, settings.max_prompt_tokens)
        llm = AsyncLLM.from_engine_args(_arguments(folder, settings, seed))
        engine = cls(llm, encoder, Path(folder), settings)
        await llm.collective_rpc("prepare_for_rollouts", args=(encoder.banned_ids, os.getpid()))
        await llm.init_weight_transfer_engine(WeightTransferInitRequest({}))
        await engine._label(version)
        return engine

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """Sample a group. One request, so that the prompt's images are processed and encoded once."""
        request: Any = self._encoder.engine_prompt(prompt)
        request["cache_salt"] = str(self._transfers)  # blocks computed under other weights must not match
        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=[self._encoder.end_id],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final: Any = None
        async for output in self._llm.generate(request, params, request_id=str(next(self._ids))):
            final = output
        prompt_ids = np.asarray(final.prompt_token_ids, np.int32)
        return [self._rollout(prompt.id, prompt_ids, completion) for completion in final.outputs]

    async def update(self, weights: Any, version: int) -> dict[str, float]:
        """Go on with `weights` (a learner's arrays by name) as `version`. Returns how long decoding stood still."""
        label = f"weights of version {version}"
        file = await asyncio.to_thread(files.write_shared, weights, self._shapes, label)
        try:
            return await self._transfer([file], version)
        finally:
            file.unlink(missing_ok=True)

    async def load(self, folder: str | Path, version: int) -> dict[str, float]:
        """Go on with the weights of a checkpoint folder of the same architecture as `version`."""
        found = files.checkpoint_files(folder)
        files.check_complete(files.shapes_in(found), self._shapes, str(folder))
        return await self._transfer(found, version)

    async def health(self) -> dict[str, int]:
        """Raises if the engine cannot work any more."""
        await self._llm.check_health()
        return {"version": self.version, "running": self._llm.get_num_unfinished_requests(), "pid": os.getpid()}

    def stop(self) -> None:
        self._llm.shutdown()

    async def _transfer(self, paths: Sequence[Path], version: int) -> dict[str, float]:
        """Exchange the weights between two decoding steps.

        A failure half-way leaves the engine paused with mixed weights: it must be thrown away.
        """
        recompute = self._settings.kv_on_update == "recompute"
        async with self._updating:
            began = time.perf_counter()
            await self._llm.pause_generation(mode="keep", clear_cache=recompute)
            await self._llm.start_weight_update()
            update = WeightTransferUpdateRequest({"files": [str(path) for path in paths]})
            await self._llm.update_weights(update)
            await self._llm.finish_weight_update()
            if not recompute:
                await self._llm.reset_encoder_cache()  # the vision tower changed as well
            self._transfers += 1  # not the version: another stage's policy may have the same
            await self._label(version)
            await self._llm.resume_generation()
            return {"paused_s": time.perf_counter() - began}

    async def _label(self, version: int) -> None:
        await self._llm.update_weight_version(str(version))
        self.version = version

    def _rollout(self, prompt_id: str, prompt_ids: np.ndarray, completion: Any) -> Rollout:
        token_ids = np.asarray(completion.token_ids, np.int32)
        logp = np.asarray(completion.logprobs.logprobs if completion.logprobs else [], np.float32)
        return Rollout(
            prompt_id=prompt_id,
            index=completion.index,
            prompt_token_ids=prompt_ids,
            token_ids=token_ids,
            logp=logp,
            versions=versions_of(completion.weight_versions or [], len(token_ids)),
            text=b"".join(self._encoder.pieces[i] for i in token_ids).decode(errors="replace"),
            finish_reason=completion.finish_reason,
        )


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


def _end_with(owner: int) -> None:
    """End this process when the process `owner` does: vLLM's own would outlive an actor that was killed."""

    def watch() -> None:
        while Path(f"/proc/{owner}").exists():
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if multiprocessing.parent_process() is not None:  # one of vLLM's processes, still on its way up
    _end_with(os.getppid())


def _arguments(folder: str | Path, settings: RolloutSettings, seed: int) -> AsyncEngineArgs:
    memory = settings.kv_cache_gb
    return AsyncEngineArgs(
        model=str(folder),
        dtype=settings.dtype,
        seed=seed,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_concurrent,
        max_num_batched_tokens=settings.max_batched_tokens,
        kv_cache_memory_bytes=None if memory is None else int(memory * 1e9),
        tensor_parallel_size=max(1, settings.gpus_per_engine),
        distributed_executor_backend="mp" if settings.gpus_per_engine > 1 else "uni",
        enforce_eager=settings.enforce_eager,
        enable_prefix_caching=settings.prefix_caching,
        limit_mm_per_prompt={"image": settings.max_images, "video": 0},
        # An image comes once an epoch. Without this cache no request can refer to an image that an update has dropped.
        mm_processor_cache_gb=0,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        weight_transfer_config={"backend": BACKEND},  # pyright: ignore[reportArgumentType]
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    )
