"""Watching over an actor: whoever waits for it learns within seconds that it died or hangs.

Ray reports an actor's death at once. A process that is stopped, or stuck, never dies: it is pinged, and treated as
dead when it does not answer. An actor that is watched offers `alive` in a concurrency group of its own
(`HEALTH_GROUP`), so that it answers while it computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

HEALTH = "health"
"""The concurrency group of an actor's `alive`."""

HEALTH_GROUP = {HEALTH: 1}
"""For `ray.remote(concurrency_groups=...)`. The actor's other methods still run one after the other, all in one thread,
which is not the one its constructor ran in: what is set per thread must be set by a method."""


FETCH_S = 300.0
"""Longest wait for an object of this cluster's store: it comes at the speed of the network, or not at all."""


class Lost(RuntimeError):
    """An actor died or hangs: what it held is gone. The message says which, and what it was to do."""


class Watched:
    """One actor under watch. Calls go through `answer`; `begin` starts the pings, `close` ends them."""

    def __init__(self, name: str, actor: Any, heartbeat_s: float):
        """`heartbeat_s`: an actor that does not answer a ping for so long is lost."""
        self.name, self.actor, self.heartbeat_s = name, actor, heartbeat_s
        self._lost: asyncio.Event = asyncio.Event()
        self._cause: Exception | None = None
        self._why = ""
        self._beating: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Ping from now on; to be called once the actor's constructor, which answers no ping, is known to be done."""
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())

    async def answer(self, call: Awaitable[Any], what: str, limit_s: float) -> Any:
        """The value of a call to the actor.

        Raises Lost if the actor died or hangs, TimeoutError if it lives but takes longer than `limit_s`, and what the
        method raised, without Ray's wrapping. `what` completes the sentence "… while it was to …".
        """
        value = asyncio.ensure_future(_value(call))
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({value, lost}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if value.done():
                return value.result()
            if lost.done():
                raise Lost(f"{self.name} {self._why} while it was to {what}") from self._cause
            raise TimeoutError(f"waited {limit_s:g} s for {self.name} to {what}")
        except RayActorError as error:
            self._lose("died", error)
            raise Lost(f"{self.name} died while it was to {what}: {_first_line(error)}") from error
        except RayTaskError as error:
            raise error.cause from None
        finally:
            lost.cancel()
            value.cancel()

    @property
    def is_lost(self) -> bool:
        """Whether the actor is known to be dead or to hang."""
        return self._lost.is_set()

    @property
    def loss(self) -> str:
        """Who was lost and how, or "" as long as nothing is known of it."""
        return f"{self.name} {self._why}" if self.is_lost else ""

    def close(self) -> None:
        """No more pings; the actor itself is not touched."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None

    def _lose(self, why: str, cause: Exception | None = None) -> None:
        if not self._lost.is_set():
            self._why, self._cause = why, cause
            self._lost.set()

    async def _beat(self) -> None:
        while True:
            try:
                # asyncio.timeout would leave the ping's future to be collected with an exception that nobody reads.
                ping = asyncio.ensure_future(_value(self.actor.alive.remote()))
                try:
                    done, _ = await asyncio.wait({ping}, timeout=self.heartbeat_s)
                finally:  # `close` too ends the wait
                    ping.cancel()
                if not done:
                    return self._lose(f"has not answered for {self.heartbeat_s:g} s")
                ping.result()
            except RayActorError as error:
                return self._lose("died", error)
            except RayTaskError as error:
                return self._lose(f"is not well ({error.cause})", error)
            await asyncio.sleep(self.heartbeat_s / 3)


async def fetch(reference: Any, what: str, limit_s: float = FETCH_S) -> Any:
    """What a reference stands for.

    Raises TimeoutError, which says `what` did not come, and what the store or the task that makes it raised.
    """
    value = asyncio.ensure_future(_value(reference))
    try:
        await asyncio.wait({value}, timeout=limit_s)
        if not value.done():
            raise TimeoutError(f"waited {limit_s:g} s for {what}; look into the log of the node or actor that has it")
        return value.result()
    except RayTaskError as error:
        raise error.cause from None
    finally:
        value.cancel()


def blocking_answer(call: Any, name: str, what: str, limit_s: float) -> Any:
    """The value of a call to an actor that nobody watches, where there is no event loop; raises as `Watched.answer`."""
    try:
        return ray.get(call, timeout=limit_s)
    except GetTimeoutError:
        raise TimeoutError(f"waited {limit_s:g} s for {name} to {what}") from None
    except RayActorError as error:
        raise Lost(f"{name} died while it was to {what}: {_first_line(error)}") from error
    except RayTaskError as error:
        raise error.cause from None


async def _value(call: Awaitable[Any]) -> Any:
    return await call


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
