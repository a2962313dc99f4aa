"""Verifiers of a user's own, with every fault that one can have."""

import ctypes
import os
import signal
import time

import gymnasium

from prism_ray.verify.environment import ResponseEnvironment
from prism_ray.verify.rewards import Reward


class FaultyEnvironment(ResponseEnvironment):
    """Does what the response says. `once` names a file: a fault is then met only while that file is not there."""

    def __init__(self, once=None):
        super().__init__()
        self.once = once

    def verify(self, text, prompt):
        if self.once is None:
            self._meet(text)
        elif text != "fine" and not os.path.exists(self.once):
            open(self.once, "w").close()
            self._meet(text)
        return Reward(float(text) if text in ("nan", "inf") else 1.0, 1.0, 1.0, True)

    def _meet(self, fault):
        if fault == "hang":
            time.sleep(600)
        if fault == "hang deep":
            ctypes.PyDLL(None).sleep(600)  # holds the lock that every other thread of the process needs
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "crash":
            os._exit(1)
        if fault == "raise":
            raise RuntimeError("no idea")


class SilentEnvironment(ResponseEnvironment):
    def step(self, action):
        return {}, 1.0, True, False, {"accuracy": 1.0}


class WordyEnvironment(ResponseEnvironment):
    """Gives words where numbers are promised, and a part that is none."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, info | {"accuracy": "high"}

    def verify(self, text, prompt):
        return Reward(1.0, 1.0, 1.0, True)


class LastingEnvironment(ResponseEnvironment):
    """Wants another turn."""

    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        return observation, reward, False, False, info

    def verify(self, text, prompt):
        return Reward(1.0, 1.0, 1.0, True)


class ParityEnvironment(ResponseEnvironment):
    """Right if the text has an odd number of letters: what an untrained model gets right half the time."""

    def verify(self, text, prompt):
        right = float(len(text) % 2)
        return Reward(right, right, 1.0, True)


class StrictEnvironment(ResponseEnvironment):
    """Right if the text is at least so long, which `verify.options` says."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def verify(self, text, prompt):
        right = float(len(text) >= self.length)
        return Reward(right, right, 1.0, True)


for _name in ("Faulty", "Silent", "Wordy", "Lasting", "Parity", "Strict"):
    gymnasium.register(id=f"prism-test/{_name}-v0", entry_point=globals()[f"{_name}Environment"])
