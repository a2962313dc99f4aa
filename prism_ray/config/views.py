"""What the discriminator judges: the views of a response, as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings

Tag = Literal["caption", "think", "answer"]

TAGS: tuple[Tag, ...] = ("caption", "think", "answer")
"""The elements of a response, in order."""


class ViewSettings(Settings):
    """One view: the part of a response that one row of the discriminator's head judges."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """What it is called in verdicts and metrics (`discriminator/gap/<name>`); small letters, digits, underscores."""
    tags: tuple[Tag, ...]
    """Neighbouring elements of the response format that it consists of, tags included: of caption, think, answer."""
    weight: float = Field(default=1.0, ge=0)
    """Its share of the reward and of the advantage, relative to the other views' (the paper's alpha: two equal ones are
    0.5 each). 0 judges and reports a view without letting it move the policy."""
    context: Literal["none", "own", "reference"] = "own"
    """What its judge sees between prompt and view: the earlier views of the same response (`own`), nothing (`none`, as
    published), or the earlier views of the reference (`reference`: then a pair differs in nothing but this view).
    Without the caption a judge cannot tell whether the reasoning follows from what was seen, and rewards short thinks
    (measured on the testbed)."""

    @property
    def reads(self) -> tuple[str, tuple[str, ...], str]:
        """What of a view decides a score; its weight does not."""
        return self.name, self.tags, self.context

    @model_validator(mode="after")
    def _neighbours(self) -> Self:
        runs = [TAGS[i:j] for i in range(len(TAGS)) for j in range(i + 1, len(TAGS) + 1)]
        if self.tags not in runs:
            raise ValueError(
                f"the tags of view {self.name} are {', '.join(self.tags) or 'none'}; give neighbours out of "
                f"{', '.join(TAGS)}, in that order"
            )
        return self


DEFAULT_VIEWS = (
    ViewSettings(name="perception", tags=("caption",)),
    ViewSettings(name="reasoning", tags=("think", "answer")),
)
"""PRISM's two (arXiv 2604.28123), the reasoning judged after the response's own caption."""


def check_views(views: Sequence[ViewSettings]) -> None:
    """Raise ValueError, with one sentence, for views that cannot be judged side by side."""
    if not views:
        raise ValueError("views is empty; a discriminator needs at least one view")
    names = [view.name for view in views]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two views are called {twice}; give each a name of its own")
    tags = [tag for view in views for tag in view.tags]
    if shared := next((tag for tag in tags if tags.count(tag) > 1), None):
        owners = " and ".join(view.name for view in views if shared in view.tags)
        raise ValueError(f"the views {owners} both have the tag {shared}; a tag belongs to one view at most")
    if tags != sorted(tags, key=TAGS.index):
        raise ValueError(f"the views are in the order {', '.join(names)}; list them as they stand in a response")
    if not any(view.weight for view in views):
        raise ValueError("every view has weight 0, so that nothing would move the policy; raise one of them")


def shares_of(views: Sequence[ViewSettings]) -> dict[str, float]:
    """View -> its share of the reward and the advantage; they sum to 1."""
    total = sum(view.weight for view in views)
    return {view.name: view.weight / total for view in views}
