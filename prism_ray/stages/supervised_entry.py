"""Where Ray enters the supervised trainer: what its controller and small actors load, hence without torch's company."""

from __future__ import annotations

import pickle
from typing import Any

from ray.train import UserCallback

from prism_ray.runtime.supervision import blocking_answer

INBOX_S = 60.0
"""Longest wait for the inbox, which only keeps messages; it is idle but for moments."""


class Inbox:
    """Ray actor through which the ranks speak to the driver: `("metrics", phase, step, row)`, `("bad", phase, rows)`,
    `("broken", sentence)`, `("listening",)`; the controller to the driver: `("lost", ranks)`, by their reasons; and the
    driver to the ranks: stop."""

    def __init__(self) -> None:
        self._messages: list[tuple[Any, ...]] = []
        self._stop = False

    def put(self, message: tuple[Any, ...]) -> bool:
        """Leave a message; True if the ranks shall stop."""
        self._messages.append(message)
        return self._stop

    def take(self) -> list[tuple[Any, ...]]:
        """The messages since the last call."""
        taken, self._messages = self._messages, []
        return taken

    def stop(self) -> None:
        """Let the ranks save and end after the step they are at."""
        self._stop = True


def ask_inbox(call: Any, what: str) -> Any:
    """The answer of an `Inbox`; raises, naming it, where it died or hangs."""
    return blocking_answer(call, "the actor that passes the ranks' messages on", what, INBOX_S)


class Losses(UserCallback):
    """Tells the driver which ranks were lost: Ray Train starts them again and says so nowhere that a person looks."""

    def __init__(self, inbox: Any) -> None:
        self._inbox = inbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        reasons = {rank: str(error).strip().partition("\n")[0] for rank, error in worker_exceptions.items()}
        self._inbox.put.remote(("lost", reasons))  # not waited for: the controller has ranks to start


def train_rank(config: dict[str, Any]) -> None:
    """Train all phases, from the last checkpoint if there is one, and write the Hugging Face folder.

    `config` holds the pickled `job` and the handle of the `inbox`.
    """
    from prism_ray.stages.supervised_rank import Rank  # here, so that the controller need not load DeepSpeed

    Rank(pickle.loads(config["job"]), config["inbox"]).run()
