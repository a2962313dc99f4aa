"""What the discriminator's processes need, and what cannot be."""

import pytest

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import OptimiserSettings


def test_ranks_and_scorers_are_counted_with_what_each_reserves():
    settings = DiscriminatorSettings(
        ranks=2, cpus_per_rank=4, gpus_per_rank=1, scorers=3, cpus_per_scorer=2, gpus_per_scorer=0.5
    )
    assert settings.needs == {"CPU": 14, "GPU": 3.5}


def test_ranks_that_hold_parts_of_the_weights_need_scorers():
    optimiser = OptimiserSettings(zero_stage=3)
    with pytest.raises(ValueError, match=r"zero_stage is 3 but there are no scorers.*set discriminator\.scorers"):
        DiscriminatorSettings(optimiser=optimiser)
    assert DiscriminatorSettings(optimiser=optimiser, scorers=1).scorers == 1
