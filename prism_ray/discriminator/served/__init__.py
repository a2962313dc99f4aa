"""A discriminator that is served elsewhere, as the judge of a run."""
