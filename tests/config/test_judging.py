"""What cannot be of the discriminator's processes."""

import pytest

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import OptimiserSettings


def test_ranks_that_hold_parts_of_the_weights_need_scorers():
    optimiser = OptimiserSettings(zero_stage=3)
    with pytest.raises(ValueError, match=r"zero_stage is 3 but there are no scorers.*set discriminator\.scorers"):
        DiscriminatorSettings(optimiser=optimiser)
    assert DiscriminatorSettings(optimiser=optimiser, scorers=1).scorers == 1
