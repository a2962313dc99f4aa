import asyncio

import numpy as np
import pytest
import ray

from prism_ray.config.runtime import HIGHEST, LOWEST, LoopSettings
from prism_ray.config.verify import VerifySettings
from prism_ray.records import Group, Prompt, Rollout
from prism_ray.response import render
from prism_ray.runtime.informative import Informative
from prism_ray.runtime.protocols import Ticket
from prism_ray.verify.pool import VerifierPool

ANSWER = "prism_ray.verify.answer:prism/Answer-v0"
FAULTY = "slow_environment:prism-test/Faulty-v0"
SILENT = "slow_environment:prism-test/Silent-v0"


pytestmark = pytest.mark.usefixtures("cluster")


def ticket(*texts):
    empty = np.zeros(0, np.int32)
    rollouts = tuple(
        Rollout("p", i, empty, empty, np.zeros(0, np.float32), empty, text, "stop") for i, text in enumerate(texts)
    )
    prompt = Prompt("p", ({"role": "user", "content": "how many?"},), ground_truth="5")
    return Ticket(7, "p", 3, ray.put(Group(7, prompt, rollouts)), tokens=9, stats={"rollout/tokens": 9.0})


def judge(environment, *texts, timeout_s=30.0):
    pool = VerifierPool(VerifySettings(environment=environment, timeout_s=timeout_s))
    judged = asyncio.run(pool.judge(ticket(*texts)))
    return judged, ray.get(judged.ref)


def test_group_is_judged():
    judged, group = judge(ANSWER, render("c", "t", "5"), render("c", "t", "6"), "5")
    assert [v.reward for v in group.verdicts] == pytest.approx([1.0, 0.2, 0.0])
    assert [v.valid for v in group.verdicts] == [True, True, False]
    assert group.verdicts[0].parts == {"accuracy": 1.0, "format": 1.0}
    assert group.verdicts[2].reason == "missing <caption>"
    assert (judged.id, judged.position, judged.tokens) == (7, 3, 9)
    assert judged.stats["verify/accuracy"] == pytest.approx(1 / 3)
    assert judged.stats["verify/format"] == pytest.approx(2 / 3)
    assert judged.stats["rollout/tokens"] == 9.0


def test_the_ticket_tells_how_far_apart_the_verdicts_of_its_group_are():
    """What `loop.dynamic_sampling` looks at."""
    mixed, _ = judge(ANSWER, render("c", "t", "5"), render("c", "t", "6"))
    wrong, _ = judge(ANSWER, render("c", "t", "6"), render("c", "t", "7"))
    settings = LoopSettings(dynamic_sampling="accuracy")
    assert (mixed.stats[f"{LOWEST}accuracy"], mixed.stats[f"{HIGHEST}accuracy"]) == (0.0, 1.0)
    assert (mixed.stats[f"{LOWEST}reward"], mixed.stats[f"{HIGHEST}reward"]) == pytest.approx((0.2, 1.0))
    assert mixed.stats[f"{LOWEST}format"] == mixed.stats[f"{HIGHEST}format"] == 1.0
    assert Informative(settings).keeps(mixed) and not Informative(settings).keeps(wrong)


@pytest.mark.parametrize(("text", "reason"), [("hang", "took longer than 5 s"), ("crash", "verifier crashed")])
def test_verifier_that_hangs_or_crashes_costs_its_group(text, reason):
    judged, group = judge(FAULTY, text, "fine", timeout_s=5.0)
    assert [v.reward for v in group.verdicts] == [0.0, 0.0]
    assert reason in group.verdicts[0].reason
    assert judged.stats["verify/failed"] == 1.0


def test_verifier_that_raises_costs_its_rollout():
    _, group = judge(FAULTY, "raise", "fine")
    assert [v.reward for v in group.verdicts] == [0.0, 1.0]
    assert group.verdicts[0].reason == "verifier failed: RuntimeError: no idea"


def test_environment_without_the_promised_info_fails_with_a_sentence():
    with pytest.raises(ValueError, match=r"SilentEnvironment.step gives no info\['format'\]; keep to the contract"):
        judge(SILENT, "fine")


@pytest.mark.parametrize("environment", ["prism/None-v0", "no_such_module:prism/X-v0", "no id at all"])
def test_unknown_environment_fails_when_the_pool_is_made(environment):
    with pytest.raises(ValueError, match=r"verify.environment: .* cannot be made .*module:namespace/Name-v0"):
        VerifierPool(VerifySettings(environment=environment))


def test_rules_do_not_learn():
    assert asyncio.run(VerifierPool(VerifySettings(environment=ANSWER)).learn([], 1)) == {}
