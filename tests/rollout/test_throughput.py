import pytest

from prism_ray.rollout.life import Throughput


def test_each_engine_has_its_rate_and_all_have_their_sum():
    throughput = Throughput()
    for index, tokens in ((0, 100), (1, 300), (0, 200)):
        throughput.add(index, tokens)
    metrics = throughput.metrics(3)
    total = metrics.pop("rollout/tokens_per_second")
    rates = [metrics.pop(f"rollout/engine_tokens_per_second/{index}") for index in range(3)]
    assert metrics == {} and rates[0] == pytest.approx(rates[1]) and rates[2] == 0
    assert sum(rates) == pytest.approx(total) and total > 0


def test_what_was_told_is_not_told_again():
    throughput = Throughput()
    throughput.add(0, 5)
    throughput.metrics(1)
    assert set(throughput.metrics(1).values()) == {0.0}
