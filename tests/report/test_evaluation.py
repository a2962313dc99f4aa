import numpy as np
import pytest

from prism_ray.records import Group, Prompt, Rollout
from prism_ray.report.evaluation import clustered_interval, evaluation_metrics
from prism_ray.report.intervals import wilson


def group(name, *texts):
    def rollout(index, text):
        tokens = np.zeros(len(text), np.int32)
        return Rollout(name, index, tokens[:0], tokens, np.zeros(len(text), np.float32), tokens, text, "stop")

    return Group(0, Prompt(name, (), ground_truth="y"), tuple(rollout(i, t) for i, t in enumerate(texts)))


def truth(text, prompt):
    return {"answer": float(prompt.ground_truth in text), "format": float(text != "-"), "cell_accuracy": 0.5}


def test_metrics_of_the_contract():
    sampled = [group("a", "y", "nn"), group("b", "-", "nnn"), group("c", "y", "y")]
    greedy = [group("a", "y"), group("b", "n"), group("c", "y")]
    metrics = evaluation_metrics(sampled, greedy, truth)
    assert metrics["n"] == 3
    assert metrics["accuracy"]["mean"] == pytest.approx(0.5)
    assert metrics["accuracy_greedy"] == wilson(2, 3)._asdict()
    assert metrics["format"] == pytest.approx(5 / 6) and metrics["cell_accuracy"] == 0.5
    assert metrics["mean_tokens"] == pytest.approx((1.5 + 2 + 1) / 3)
    assert "caption_exact" not in metrics, "the truth does not know it"


def test_interval_counts_prompts_where_rollouts_of_a_prompt_are_alike():
    alike = clustered_interval([[1.0] * 8] * 30 + [[0.0] * 8] * 70)
    assert (alike["low"], alike["high"]) == pytest.approx(wilson(30, 100)[1:])


def test_interval_counts_rollouts_where_they_are_independent():
    rng = np.random.default_rng(0)
    values = (rng.random((2000, 4)) < 0.3).astype(float)
    found, ideal = clustered_interval(values.tolist()), wilson(values.sum(), values.size)
    assert found["high"] - found["low"] == pytest.approx(ideal.high - ideal.low, rel=0.1)


def test_interval_covers_the_truth_of_clustered_rollouts():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        rates = rng.beta(0.5, 0.5, size=60)
        values = (rng.random((60, 8)) < rates[:, None]).astype(float)
        found = clustered_interval(values.tolist())
        covered += found["low"] <= 0.5 <= found["high"]
    assert covered / 300 > 0.9


@pytest.mark.parametrize(("value", "edge"), [(0.0, "low"), (1.0, "high")])
def test_all_wrong_and_all_right_still_have_an_interval(value, edge):
    found = clustered_interval([[value] * 4] * 10)
    assert found["mean"] == found[edge] == value and found["high"] - found["low"] > 0.2


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluation_metrics([], [], truth)
    with pytest.raises(ValueError, match="prompt a: no rollouts"):
        evaluation_metrics([group("a")], [group("a", "y")], truth)
