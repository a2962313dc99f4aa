import pytest

from prism_ray.config.base import Settings
from prism_ray.config.cli import parse_job


class Job(Settings):
    """A job."""

    lr: float = 1.0
    """Step size, 100% of it."""
    name: str = "job"
    """Name."""


def test_options_and_overrides_in_any_order(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("lr: 2")
    assert parse_job(["lr=3", "--config", str(path)], Job, "A job.").lr == 3
    assert parse_job([], Job, "A job.", default_config=path).lr == 2
    assert parse_job([], Job, "A job.").lr == 1


def test_several_files_are_laid_over_each_other_in_order(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 2\nname: base")
    second.write_text("lr: 3")
    job = parse_job(["--config", str(first), "--config", str(second)], Job, "A job.", default_config=tmp_path / "none")
    assert (job.lr, job.name) == (3, "base")
    assert parse_job(["--config", str(second), "lr=4", "--config", str(first)], Job, "A job.").lr == 4


def test_help_prints_every_setting_and_leaves_with_0(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_job(["--help"], Job, "A job that helps.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "A job that helps." in text and "lr: float = 1.0" in text and "Step size, 100% of it." in text


def test_a_bad_configuration_leaves_with_2_and_a_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_job(["lrr=3"], Job, "A job.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "There is no setting lrr; did you mean lr?\n"
