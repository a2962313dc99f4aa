import asyncio
import contextlib
from dataclasses import replace

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

ANSWER = "prism/Answer-v0"
FAULTY = "slow_environment:prism-test/Faulty-v0"
SILENT = "slow_environment:prism-test/Silent-v0"
STRICT = "slow_environment:prism-test/Strict-v0"

pytestmark = pytest.mark.usefixtures("cluster")


def ticket(*texts):
    empty = np.zeros(0, np.int32)
    rollouts = tuple(
        Rollout("p", i, empty, empty, np.zeros(0, np.float32), empty, text, "stop") for i, text in enumerate(texts)
    )
    prompt = Prompt("p", ({"role": "user", "content": "how many?"},), ground_truth="5")
    return Ticket(7, "p", 3, ray.put(Group(7, prompt, rollouts)), tokens=9, stats={"rollout/tokens": 9.0})


@contextlib.contextmanager
def pool_of(environment, **settings):
    pool = VerifierPool(VerifySettings(environment=environment, **{"timeout_s": 60.0} | settings))
    try:
        yield pool
    finally:
        pool.shutdown()


def judge(environment, *texts, **settings):
    with pool_of(environment, **settings) as pool:
        judged = asyncio.run(pool.judge(ticket(*texts)))
        return judged, ray.get(judged.ref)


def test_group_is_judged():
    judged, group = judge(ANSWER, render("c", "t", "5"), render("c", "t", "6"), "5")
    assert [v.reward for v in group.verdicts] == pytest.approx([1.0, 0.2, 0.0])
    assert [v.valid for v in group.verdicts] == [True, True, False]
    assert group.verdicts[0].parts == {"accuracy": 1.0, "format": 1.0, "cut": 0.0}
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


@pytest.mark.parametrize(
    ("text", "reason", "limits"),
    [
        ("hang", "verifier took longer than 2 s", {"timeout_s": 2.0}),
        ("hang deep", "verifier crashed: verifier 0 has not answered for 2 s", {"heartbeat_s": 2.0}),
        ("crash", "verifier crashed: verifier 0 died", {}),
    ],
)
def test_a_response_that_hangs_or_crashes_its_verifier_costs_itself_alone(text, reason, limits, caplog):
    judged, group = judge(FAULTY, "fine", text, "fine", **limits)
    assert [v.reward for v in group.verdicts] == [1.0, 0.0, 1.0]
    assert group.verdicts[1].reason.startswith(reason)
    assert judged.stats["verify/failed"] == pytest.approx(1 / 3)
    assert "judge group 7" in caplog.messages[0] and "judged again" in caplog.messages[0]
    assert "response 1 of group 7, which is worth 0" in caplog.messages[1] and len(caplog.messages) == 2


def test_what_happens_to_a_verifier_by_chance_costs_nothing(tmp_path, caplog):
    """It is replaced, and its group judged again, once."""
    judged, group = judge(FAULTY, "fine", "stop", options={"once": str(tmp_path / "met")}, heartbeat_s=2.0)
    assert [v.reward for v in group.verdicts] == [1.0, 1.0]
    assert judged.stats["verify/failed"] == 0.0 and judged.stats["rollout/tokens"] == 9.0
    assert len(caplog.messages) == 1


def test_a_verifier_that_died_between_two_groups_is_replaced_before_the_next(caplog):
    with pool_of(ANSWER, heartbeat_s=3.0) as pool:

        async def drive():
            await pool.judge(ticket(render("c", "t", "5")))
            dead = next(iter(pool._desks)).watched
            ray.kill(dead.actor)
            while not dead.is_lost:
                await asyncio.sleep(0.05)
            return await pool.judge(ticket(render("c", "t", "5")))

        assert asyncio.run(drive()).stats["verify/reward"] == 1.0
    assert caplog.messages == ["verifier 0 died; it is replaced"], "nothing was judged twice"


def test_a_group_that_has_verdicts_is_judged_anew():
    with pool_of(STRICT, options={"length": 3}) as pool:

        async def drive():
            judged = await pool.judge(ticket("12", "123"))
            stale = replace(judged, stats=judged.stats | {"verify/reward": -7.0})
            return await pool.judge(stale)

        again = asyncio.run(drive())
        assert [v.reward for v in ray.get(again.ref).verdicts] == [0.0, 1.0]
        assert again.stats["verify/reward"] == 0.5
        assert pool.version == again.judge_version == 0 and not pool.wants_ratios


def test_the_pool_grows_and_shrinks_while_it_judges():
    with pool_of(STRICT, options={"length": 3}) as pool:

        async def drive():
            judging = [asyncio.create_task(pool.judge(ticket("12", "123"))) for _ in range(6)]
            await asyncio.sleep(0)
            await pool.resize(3)
            assert len(pool._desks) == 3
            await asyncio.sleep(0)
            await pool.resize(1)
            judged = await asyncio.gather(*judging)
            assert len(pool._desks) == 1
            with pytest.raises(ValueError, match="workers: a pool of 0 verifiers judges nothing"):
                await pool.resize(0)
            return judged

        assert [j.stats["verify/reward"] for j in asyncio.run(drive())] == [0.5] * 6


def test_whoever_stops_waiting_leaves_the_verifier_free(caplog):
    with pool_of(FAULTY, timeout_s=20.0) as pool:

        async def drive():
            await pool.judge(ticket("fine"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pool.judge(ticket("hang")), 1)
            return await pool.judge(ticket("fine"))

        assert asyncio.run(drive()).stats["verify/reward"] == 1.0
    assert not caplog.messages, "the next group waited for what nobody waits for"


def test_a_process_that_cannot_start_is_an_error_and_no_verdict(tmp_path, monkeypatch):
    """An environment that this process can make and the workers cannot."""
    (tmp_path / "only_here.py").write_text(
        "import gymnasium\nfrom slow_environment import ParityEnvironment\n"
        "gymnasium.register(id='prism-test/Here-v0', entry_point=ParityEnvironment)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        pool_of("only_here:prism-test/Here-v0") as pool,
        pytest.raises(RuntimeError, match="verifier 0 died 3 times while it was to start"),
    ):
        asyncio.run(pool.judge(ticket("fine")))


def test_verifier_that_raises_costs_its_rollout():
    _, group = judge(FAULTY, "raise", "fine")
    assert [v.reward for v in group.verdicts] == [0.0, 1.0]
    assert group.verdicts[0].reason == "verifier failed: RuntimeError: no idea"


def test_environment_without_the_promised_info_fails_with_a_sentence():
    with pytest.raises(ValueError, match=r"SilentEnvironment.step gives no info\['format'\]; keep to the contract"):
        judge(SILENT, "fine")


def test_unknown_environment_fails_when_the_pool_is_made():
    with pytest.raises(ValueError, match=r"verify.environment: prism/None-v0 cannot be made .*module:namespace/Name"):
        VerifierPool(VerifySettings(environment="prism/None-v0"))


def test_rules_do_not_learn():
    with pool_of(ANSWER) as pool:
        assert asyncio.run(pool.learn([], 1)) == {}
