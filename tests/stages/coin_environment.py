"""A verifier for tests: an untrained policy's responses are right or wrong by their length, so every rate occurs."""

import gymnasium

from prism_ray.records import Prompt
from prism_ray.verify.environment import ResponseEnvironment
from prism_ray.verify.rewards import Reward


class CoinEnvironment(ResponseEnvironment):
    def verify(self, text: str, prompt: Prompt) -> Reward:
        right = float(len(text.split()) % 2)
        return Reward(0.8 * right + 0.2, right, 1.0, True)


gymnasium.register(id="tests/Coin-v0", entry_point=f"{__name__}:CoinEnvironment")
