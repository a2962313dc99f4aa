from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from prism_ray.config import yaml12
from prism_ray.config.base import Settings
from prism_ray.config.describe import describe, fields
from prism_ray.config.load import ConfigError, changed, load_config, to_yaml
from prism_ray.config.run import RunSettings


class Inner(Settings):
    """Inside."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    kind: Literal["off", "online"] = "off"
    """A word that YAML 1.1 takes for a boolean."""
    sizes: tuple[int, ...] = (1, 2)
    """Several."""


class Checked(Settings):
    """Fields that must agree."""

    low: int = 0
    """Least."""
    high: int = 1
    """Most."""

    @model_validator(mode="after")
    def _ordered(self) -> "Checked":
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Outer(Settings):
    """Outside."""

    checked: Checked = Checked()
    """Fields that must agree."""

    learner: Inner = Inner(lr=2e-3)
    """The learner."""
    maybe: Inner | None = None
    """Optional section."""
    name: str = "tiny"
    """Name."""
    on: bool = False
    """A switch."""
    folder: Path = Path("runs")
    """A path."""
    limit: float = float("inf")
    """May be infinite."""

    @model_validator(mode="after")
    def _named(self) -> "Outer":
        if self.name == "bad":
            raise ValueError("name is bad, choose another name")
        return self


class Outermost(Settings):
    """Further outside."""

    outer: Outer = Outer(learner=Inner(lr=7))
    """Holds the others."""
    weights: dict[str, float] = {}
    """A table."""


def problems(**kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, **kwargs)
    return caught.value.problems


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_which_wins_over_defaults(tmp_path):
    path = write(tmp_path, "learner: {lr: 1e-2, kind: online}\nname: file\n")
    settings = load_config(Outer, path, ["learner.lr=3e-4", "on=true", "learner.sizes=[4,5]", "maybe.lr=1"])
    assert settings.learner == Inner(lr=3e-4, kind="online", sizes=(4, 5))
    assert (settings.name, settings.on, settings.maybe) == ("file", True, Inner(lr=1.0))


def test_a_later_file_wins_setting_by_setting(tmp_path):
    base = write(
        tmp_path, "learner: {lr: 1, kind: online, sizes: [1, 2, 3]}\nname: base\nmaybe: {lr: 2}\n", "base.yaml"
    )
    over = write(tmp_path, "learner: {lr: 5, sizes: [9]}\nmaybe: null\non: true\n", "over.yaml")
    settings = load_config(Outer, [base, over], ["learner.kind=off"])
    assert settings.learner == Inner(lr=5, kind="off", sizes=(9,)), "a list is taken whole"
    assert (settings.name, settings.maybe, settings.on) == ("base", None, True)
    assert load_config(Outer, [over, base]).learner == Inner(lr=1, kind="online", sizes=(1, 2, 3))
    assert load_config(Outer, []) == Outer()


def test_a_table_that_is_no_section_is_taken_whole(tmp_path):
    base, over = write(tmp_path, "weights: {a: 1, b: 2}\n", "a.yaml"), write(tmp_path, "weights: {c: 3}\n", "b.yaml")
    assert load_config(Outermost, [base, over]).weights == {"c": 3.0}


def test_a_problem_names_the_file_whose_value_counts(tmp_path):
    base = write(tmp_path, "learner: {lr: -1}\nname: 3\n", "base.yaml")
    over = write(tmp_path, "learner: {lr: -2}\n", "over.yaml")
    found = problems(files=[base, over])
    assert any(p.startswith(f"{over}: The setting learner.lr is -2 but should be") for p in found)
    assert any(p.startswith(f"{base}: The setting name is 3 but should be") for p in found)
    assert problems(files=[over], overrides=["learner.lr=-3"])[0].startswith("The setting learner.lr is -3")
    both = problems(files=[write(tmp_path, "checked: {low: 2}\n", "x.yaml"), write(tmp_path, "checked: {high: 1}\n")])
    assert both == [f"{tmp_path}/x.yaml, {tmp_path}/c.yaml: The setting checked cannot be used: low is above high."]


def test_naming_one_field_of_a_section_leaves_the_others_as_the_parent_has_them():
    assert load_config(Outer) == Outer()
    assert load_config(Outer, None, ["learner.kind=online"]).learner == Inner(lr=2e-3, kind="online")
    assert load_config(Outermost, None, ["outer.learner.kind=online"]).outer.learner == Inner(lr=7, kind="online")


def test_unknown_keys_are_named_in_full_with_the_nearest_valid_name(tmp_path):
    path = write(tmp_path, "learner: {lrr: 1}\n")
    assert problems(files=path) == [f"{path}: There is no setting learner.lrr; did you mean learner.lr?"]
    assert problems(overrides=["lr=1"]) == ["There is no setting lr; did you mean learner.lr or maybe.lr?"]
    assert problems(overrides=["lerner.kind=off"]) == ["There is no setting lerner; did you mean learner?"]
    assert problems(overrides=["maybe.kid=off"]) == ["There is no setting maybe.kid; did you mean maybe.kind?"]
    assert problems(overrides=["zzzz=1"]) == ["There is no setting zzzz; --help lists every setting."]


def test_every_problem_is_told_at_once_with_value_and_default():
    found = problems(overrides=["learner.lr=-1", "learner.kind=sometimes", "on=perhaps", "bogus=1"])
    assert len(found) == 4
    assert "The setting learner.lr is -1 but should be greater than 0 (default: 0.002)." in found
    assert any(p.startswith("The setting learner.kind is \"sometimes\" but should be 'off' or 'online'") for p in found)


def test_a_validators_own_sentence_is_kept():
    assert problems(overrides=["name=bad"]) == ["name is bad, choose another name."]


def test_malformed_overrides_and_files_are_refused_with_a_cure(tmp_path):
    assert "not of the form name=value" in problems(overrides=["learner.lr"])[0]
    assert "not of the form name=value" in problems(overrides=["learner..lr=1"])[0]
    assert "not valid YAML" in problems(overrides=["name=[1"])[0]
    assert "remove one" in problems(files=write(tmp_path, "learner: 3\n"), overrides=["learner.lr=1"])[0]
    assert "cannot be read" in problems(files=tmp_path / "missing.yaml")[0]
    assert "not valid YAML" in problems(files=write(tmp_path, "a: [1\n"))[0]
    assert "holds a list" in problems(files=write(tmp_path, "- 1\n"))[0]
    assert "'on' stands here twice" in problems(files=write(tmp_path, "on: true\non: false\n"))[0]
    assert load_config(Outer, write(tmp_path, "# nothing\n")) == Outer()


def test_what_is_written_reads_back_equal(tmp_path):
    settings = Outer(learner=Inner(lr=1e-12, sizes=()), name="3e-4", maybe=Inner(), folder=Path("a/b"))
    assert load_config(Outer, write(tmp_path, to_yaml(settings))) == settings


def test_changed_lists_dotted_names_with_default_and_value():
    assert changed(Outer()) == {}
    settings = Outer(learner=Inner(lr=5.0), maybe=Inner())
    assert changed(settings) == {"learner.lr": (2e-3, 5.0), "maybe": (None, Inner())}


def test_describe_tells_every_field_with_type_default_and_docstring():
    text = describe(Outer)
    for field in fields(Outer):
        assert field.name in text
        assert field.doc and field.doc in text
    assert "learner.lr: float > 0 = 0.002" in text
    assert "learner.kind: 'off' | 'online' = off" in text
    assert "learner.sizes: tuple[int, ...] = (1, 2)" in text


def test_the_defaults_that_are_told_are_those_that_a_run_gets():
    settings = RunSettings()
    for field in fields(RunSettings):
        value = settings
        for name in field.name.split("."):
            value = getattr(value, name, None)  # None: inside a section that is unset
        if value is not None:
            assert field.default == value, field.name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),
        ("off", "off"),
        ("12:30", "12:30"),
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        (".inf", float("inf")),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_scalars_mean_what_people_mean(text, value):
    parsed = yaml12.parse(text)
    assert parsed == value and type(parsed) is type(value)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(
    st.recursive(_SCALARS, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=3), max_leaves=8)
)
def test_dump_and_parse_are_inverse(value):
    assert yaml12.parse(yaml12.dump(value)) == value
