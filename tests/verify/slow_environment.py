"""A verifier of a user's own, with every fault that one can have."""

import os
import time

import gymnasium

from prism_ray.verify.environment import ResponseEnvironment
from prism_ray.verify.rewards import Reward


class FaultyEnvironment(ResponseEnvironment):
    def verify(self, text, prompt):
        if text == "hang":
            time.sleep(600)
        if text == "crash":
            os._exit(1)
        if text == "raise":
            raise RuntimeError("no idea")
        return Reward(1.0, 1.0, 1.0, True)


class SilentEnvironment(ResponseEnvironment):
    def step(self, action):
        return {}, 1.0, True, False, {"accuracy": 1.0}


class ParityEnvironment(ResponseEnvironment):
    """Right if the text has an odd number of letters: what an untrained model gets right half the time."""

    def verify(self, text, prompt):
        right = float(len(text) % 2)
        return Reward(right, right, 1.0, True)


gymnasium.register(id="prism-test/Parity-v0", entry_point=ParityEnvironment)
gymnasium.register(id="prism-test/Faulty-v0", entry_point=FaultyEnvironment)
gymnasium.register(id="prism-test/Silent-v0", entry_point=SilentEnvironment)
