"""Verifiers of a user's own, with every fault that one can have."""

import ctypes
import io
import os
import signal
import time

import gymnasium
from PIL import Image

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


class TalkingEnvironment(ResponseEnvironment):
    """Shows a picture after the first response, and pays for an odd number of letters in the second.

    `fault` is met in the second turn by the episode that begins with the seed `struck`: `raise`, `hang`, or `crash`
    (once, which the file `once` tells).
    """

    def __init__(self, fault="", struck=0, once=""):
        super().__init__()
        self.fault, self.struck, self.once = fault, struck, once

    def reset(self, *, seed=None, options=None):
        self.said, self.seed = [], seed
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, _, _, _, info = super().step(action)
        self.said.append(action)
        if len(self.said) == 1:
            picture = io.BytesIO()
            Image.new("RGB", (96, 64), (250, 90, 10)).save(picture, format="PNG")
            message = {"role": "user", "content": "<image> count of red"}
            return observation, 0.0, False, False, info | {"message": message, "images": (picture.getvalue(),)}
        if self.seed == self.struck:
            self._meet()
        right = float(len(action) % 2)
        return observation, right, True, False, info | {"accuracy": right, "letters": len("".join(self.said))}

    def _meet(self):
        if self.fault == "raise":
            raise RuntimeError("no idea")
        if self.fault == "hang":
            time.sleep(600)
        if self.fault == "crash" and not os.path.exists(self.once):
            open(self.once, "w").close()
            os._exit(1)

    def verify(self, text, prompt):
        return Reward(0.0, 0.0, 1.0, True)


for _name in ("Faulty", "Silent", "Wordy", "Lasting", "Parity", "Strict", "Talking"):
    gymnasium.register(id=f"prism-test/{_name}-v0", entry_point=globals()[f"{_name}Environment"])
