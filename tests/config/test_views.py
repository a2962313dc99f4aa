"""Views as data: what may be asked for, what may not, and what the weights mean."""

from __future__ import annotations

import pytest

from prism_ray.config.describe import describe
from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.run import RunSettings
from prism_ray.config.views import DEFAULT_VIEWS, ViewSettings, shares_of

GAD = "[{name: whole, tags: [caption, think, answer]}]"
THREE = "[{name: seen, tags: [caption]}, {name: thought, tags: [think], weight: 2}, {name: said, tags: [answer]}]"


def loaded(views: str) -> tuple[ViewSettings, ...]:
    return load_config(RunSettings, overrides=[f"discriminator.views={views}"]).discriminator.views


def test_the_default_is_prisms_two_equal_views_in_their_own_context():
    assert DiscriminatorSettings().views == DEFAULT_VIEWS
    assert [(v.name, v.tags, v.context) for v in DEFAULT_VIEWS] == [
        ("perception", ("caption",), "own"),
        ("reasoning", ("think", "answer"), "own"),
    ]
    assert shares_of(DEFAULT_VIEWS) == {"perception": 0.5, "reasoning": 0.5}


def test_one_view_and_three_come_from_one_override():
    assert [v.name for v in loaded(GAD)] == ["whole"] and shares_of(loaded(GAD)) == {"whole": 1.0}
    assert shares_of(loaded(THREE)) == {"seen": 0.25, "thought": 0.5, "said": 0.25}
    assert [v.name for v in loaded("[{name: seen, tags: [caption]}]")] == ["seen"], (
        "not all of a response need be judged"
    )


@pytest.mark.parametrize(
    ("views", "sentence"),
    [
        ("[]", "views is empty; a discriminator needs at least one view"),
        ("[{name: a, tags: []}]", "the tags of view a are none; give neighbours out of caption, think, answer"),
        ("[{name: a, tags: [caption, answer]}]", "the tags of view a are caption, answer; give neighbours"),
        ("[{name: a, tags: [answer, think]}]", "the tags of view a are answer, think; give neighbours"),
        ("[{name: a, tags: [caption]}, {name: a, tags: [think]}]", "two views are called a; give each a name"),
        (
            "[{name: a, tags: [caption, think]}, {name: b, tags: [think, answer]}]",
            "the views a and b both have the tag think; a tag belongs to one view at most",
        ),
        ("[{name: a, tags: [answer]}, {name: b, tags: [think]}]", "in the order a, b; list them as they stand"),
        ("[{name: a, tags: [think], weight: 0}]", "every view has weight 0, so that nothing would move the policy"),
        (
            "[{name: a, tags: [thought]}]",
            "views.0.tags.0 is \"thought\" but should be 'caption'",
        ),
        ("[{name: A b, tags: [think]}]", "discriminator.views.0.name"),
        ("[{tags: [think]}]", "The setting discriminator.views.0.name is missing"),
        ("[{name: a, tags: [think], alpha: 1}]", "There is no setting discriminator.views.0.alpha"),
        ("[{name: a, tags: [think], context: caption}]", "should be 'none', 'own' or 'reference'"),
    ],
)
def test_each_bad_definition_is_one_clear_sentence(views, sentence):
    with pytest.raises(ConfigError) as error:
        loaded(views)
    assert len(error.value.problems) == 1 and sentence in error.value.problems[0], error.value.problems


def test_a_dense_judge_cannot_route_by_view():
    with pytest.raises(ConfigError, match="a dense backbone has no router; set it to token"):
        load_config(RunSettings, overrides=["discriminator.backbone=dense", "discriminator.routing=view"])


def test_help_shows_what_a_view_consists_of():
    text = describe(DiscriminatorSettings)
    after = text[text.index("views: tuple[ViewSettings, ...] = name='perception' tags=('caption',)") :]
    assert "      - tags: tuple['caption' | 'think' | 'answer', ...] = (required)" in after
    assert "      - context: 'none' | 'own' | 'reference' = own\n          What its judge sees" in after
