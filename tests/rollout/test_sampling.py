import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_ray.config.rollout import RolloutSettings
from prism_ray.rollout.process import environment
from prism_ray.rollout.sampling import versions_of


class Span:
    def __init__(self, version, start, end):
        self.version, self.start, self.end = version, start, end


def test_every_token_gets_the_version_of_its_span():
    assert versions_of([Span("3", 0, 2), Span("4", 2, 5)], 5).tolist() == [3, 3, 4, 4, 4]


def test_a_response_without_tokens_has_no_versions():
    assert versions_of([], 0).tolist() == []


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(-3, 3).filter(bool))
def test_spans_that_do_not_cover_the_tokens_are_refused(lengths, error):
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    spans = [Span(str(i), a, b) for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))]
    assert len(versions_of(spans, edges[-1])) == edges[-1]
    with pytest.raises(RuntimeError, match="attributed"):
        versions_of(spans, edges[-1] + error)


def test_a_gap_between_spans_is_refused():
    with pytest.raises(RuntimeError, match="attributed"):
        versions_of([Span("0", 0, 2), Span("1", 3, 5)], 5)


def test_a_response_as_long_as_the_context_leaves_no_prompt():
    with pytest.raises(ValueError, match="max_model_len"):
        RolloutSettings(max_response_tokens=256, max_model_len=256)
    assert RolloutSettings(max_response_tokens=96, max_model_len=256).max_prompt_tokens == 160


def test_the_cpu_settings_stay_off_gpus():
    assert environment(RolloutSettings())["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment(RolloutSettings(gpus_per_engine=1))
