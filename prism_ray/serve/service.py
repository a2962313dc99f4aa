"""What a replica does: keep a discriminator, score queries with it in batches, take up a new one without a pause."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prism_ray.config.serve import ServeSettings
from prism_ray.endpoint.wire import EndpointError, Judge, ModelAnswer, ScoreAnswer, ViewAnswer
from prism_ray.serve.batching import Batcher, too_late
from prism_ray.serve.intake import Query
from prism_ray.serve.scoring import Cut, Said, Served, version_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Job:
    served: Served
    cut: Cut


class Service:
    """One discriminator behind a queue. Use it from one event loop."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._served: Served | None = None
        self._failure = ""
        self._open = 0
        self._cutting = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._loading = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        queue = settings.queue
        self.batcher: Batcher[_Job, Said] = Batcher(_score, queue.batch_tokens, queue.waiting_tokens)

    async def load(self, folder: str | Path) -> None:
        """Load the discriminator in `folder` beside the one that is served, then serve it in its place. Queries that
        were read for the old one are answered by it.

        Raises ValueError or FileNotFoundError if there is none to go on with; else the old one stays, and `describe`
        says why.
        """
        path = Path(folder)
        async with self._loading:
            try:
                served = await asyncio.to_thread(self._load, path)
            except Exception as error:
                self._failure = f"{path.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                log.error("%s is not served (%s)", path, error)
                if self._served is None:
                    raise
                return
            self._served, self._failure = served, ""
            log.info("serving %s, version %s", path, served.version)
        if self._settings.watch_s and self._watching is None:
            self._watching = asyncio.create_task(self._watch(self._settings.watch_s))

    async def score(self, query: Query, time_left_s: float) -> ScoreAnswer:
        """What the discriminator says of a query, within this time. EndpointError where it cannot."""
        served, most = self._current, self._settings.queue.requests
        if self._open >= most:
            what = f"{most} requests are being worked on, and no more may be; ask again later"
            raise EndpointError(503, "overloaded", what, self.batcher.retry_after())
        self._open += 1
        try:
            async with asyncio.timeout(time_left_s):
                deadline = time.monotonic() + time_left_s
                self.batcher.admit(1, deadline)
                loop = asyncio.get_running_loop()
                cut = await loop.run_in_executor(self._cutting, served.cut, query)
                said = await self.batcher.submit(_Job(served, cut), cut.cost, deadline, kind=served)
        except TimeoutError:
            raise too_late() from None
        finally:
            self._open -= 1
        return ScoreAnswer(model=self._judge(served), results=list(said.results), reference=said.reference)

    async def describe(self) -> ModelAnswer:
        """What is served, and how it is doing."""
        served, limits = self._current, self._settings.limits
        views = [
            ViewAnswer(name=v.name, tags=list(v.tags), share=served.shares[v.name], context=v.context)
            for v in served.settings.views
        ]
        return ModelAnswer(
            model=self._judge(served),
            views=views,
            needs_reference=served.needs_reference,
            sees_images=served.settings.sees_images,
            backbone=served.settings.backbone,
            temperature=served.settings.temperature,
            limits=limits.model_dump(),
            waiting_tokens=self.batcher.waiting_tokens,
            tokens_per_s=self.batcher.tokens_per_s,
            reload_failure=self._failure,
        )

    async def close(self) -> None:
        """Answer what waits, then end the threads."""
        if self._watching is not None:
            self._watching.cancel()
        await self.batcher.close()
        self._cutting.shutdown(wait=False)

    @property
    def _current(self) -> Served:
        if self._served is None:
            raise EndpointError(503, "not_ready", "the discriminator is being loaded", 5.0)
        return self._served

    def _load(self, path: Path) -> Served:
        queue, limit = self._settings.queue, self._settings.limits.prompt_tokens
        return Served(path, limit, queue.batch_tokens, int(queue.prompt_cache_mb * 2**20))

    def _judge(self, served: Served) -> Judge:
        return Judge(name=self._settings.name, version=served.version)

    async def _watch(self, every_s: float) -> None:
        """Load what is new in the checkpoint's place; what cannot be loaded is tried again when it has changed."""
        tried = self._current.version
        while True:
            await asyncio.sleep(every_s)
            folder = self._current.folder
            try:
                version = await asyncio.to_thread(version_of, folder)
            except OSError as error:
                self._failure = f"{folder.name}: {error}"
                continue
            if version not in (tried, self._current.version):
                tried = version
                await self.load(folder)


def _score(jobs: Sequence[_Job]) -> list[Said]:
    """A batch; all of it is of one discriminator."""
    return jobs[0].served.score([job.cut for job in jobs])
