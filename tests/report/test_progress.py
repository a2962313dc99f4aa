import io
import logging
import re

import pytest
from rich.console import Console

from prism_ray.report.progress import Progress, duration, setup_logging, telling


@pytest.fixture
def plain():
    yield Console(file=io.StringIO(), force_terminal=False, width=200)
    logger = logging.getLogger("prism_ray")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("prism_ray.report.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_plain_lines_with_step_numbers_and_time_left(tmp_path, plain, clock):
    setup_logging(tmp_path, plain)
    with Progress("align", 4, console=plain) as progress:
        for step in (1, 2, 3, 4):
            clock[0] += 6
            progress.update(step, **{"reward/mean": 0.5 + step, "policy/loss": 1e-9, "other/thing": 1.0})
    shown = plain.file.getvalue().splitlines()
    assert len(shown) == 4, "start, one line after 12 s, one at the end, and how it ended"
    assert "align: 4 steps" in shown[0]
    assert "align 2/4  reward 2.5  policy loss 1e-09  6.0 s/step  left 0:12" in shown[1]
    assert "align 4/4" in shown[2] and "left 0:00" in shown[2]
    assert "align: done at step 4 of 4 after 0:24" in shown[3]
    kept = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("prism_ray.progress: ")[1] for line in kept] == [line[9:] for line in shown]


def test_a_resumed_stage_does_not_count_the_steps_before(plain, clock):
    with Progress("align", 20, console=plain) as progress:
        clock[0] += 5
        progress.update(11)
        clock[0] += 5
        progress.update(12)
        assert "5.0 s/step  left 0:40" in progress.line()


def test_a_terminal_gets_a_live_panel():
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress("align", 2, console=terminal) as progress:
        progress.update(1, **{"staleness/max": 1.0, "discriminator/gap/perception": 0.25})
    text = terminal.file.getvalue()
    assert "align" in text and "1/2" in text and "gap (perception) 0.25" in plain_text(text)


def plain_text(shown):
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)


FULL = {
    "reward/mean": 0.5, "discriminator/gap/perception": 1.5, "discriminator/gap/reasoning": 2.5,
    "discriminator/gap/reasoning_held_out": 9.0, "discriminator/pair_accuracy/perception": 0.75,
    "discriminator/pair_accuracy/reasoning": 0.5, "discriminator/version": 12.0, "staleness/max": 1.0,
    "staleness/judge_max": 2.0, "rollout/tokens_per_second": 7094.2, "learner/wait_share": 0.34,
    "rollout/engine_tokens_per_second/1": 3594.2, "rollout/engine_tokens_per_second/0": 3500.0,
    "rollout/wait_share": 0.2, "judge/wait_share": 0.55, "policy/version": 11.0,
    "weights/paused_s": 0.1, "time/step_s": 1.0, "discriminator/alarm/chance/reasoning": 1.0,
    "discriminator/alarm/drift/reasoning": 0.0, "correction/ess": float("nan"),
}  # fmt: skip


def test_what_matters_of_a_step_is_told():
    assert telling(FULL) == [
        ("reward", "0.5"), ("gap (perception / reasoning)", "1.5 / 2.5"), ("pairs told apart", "0.75 / 0.5"),
        ("effective samples", "–"), ("policy version", "11"), ("judge version", "12"), ("policy staleness", "1"),
        ("judge staleness", "2"), ("tokens/s", "7094"), ("of each engine", "3500 / 3594"),
        ("learner waits for data", "34%"), ("engines wait for weights", "20%"), ("engines paused", "10%"),
        ("judge waits for rollouts", "55%"), ("alarm", "chance (reasoning)"),
    ]  # fmt: skip
    assert not {"judge version", "of each engine"} & set(dict(telling(FULL, brief=True)))
    held_out = {"discriminator/pair_accuracy/reasoning_held_out": 0.9}
    assert telling(held_out) == [("held-out pairs told apart (reasoning)", "0.9")]


def test_of_many_engines_the_slowest_and_the_fastest_are_told():
    rates = {f"rollout/engine_tokens_per_second/{index}": 100.0 + index for index in range(32)}
    assert telling(rates) == [("of each engine", "100 to 131")]
    assert telling({"rollout/engine_tokens_per_second/0": 5.0, "reward/mean": 1.0}) == [("reward", "1")]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_panel_fits_any_terminal_and_tells_the_same(width):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width)
    with Progress("align", 2, console=terminal) as progress:
        progress.update(1, **FULL)
        console = Console(file=io.StringIO(), width=width)
        console.print(progress._panel())
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(re.sub(r"[│╭╮╰╯─━╸╺]", " ", text).split())
    for told in ("judge version 12", "data 34%", "7094", "chance (reasoning)"):
        assert told in words


def test_the_time_left_follows_the_last_steps(plain, clock):
    with Progress("align", 200, console=plain) as progress:
        for step in range(1, 101):
            clock[0] += 60 if step <= 50 else 2
            progress.update(step)
        assert "2.0 s/step  left 3:20" in progress.line()


def test_a_stage_that_goes_back_to_its_checkpoint_still_knows_the_time_left(plain, clock):
    with Progress("align", 20, console=plain) as progress:
        for step in (1, 2, 3, 4, 3, 4):
            clock[0] += 4
            progress.update(step)
        assert "4.0 s/step  left 1:04" in progress.line()


def test_a_stage_that_fails_is_said_to_have_stopped(tmp_path, plain):
    setup_logging(tmp_path, plain)
    with pytest.raises(RuntimeError), Progress("sft", 3, console=plain) as progress:
        progress.update(1)
        raise RuntimeError
    assert "sft: stopped at step 1 of 3" in plain.file.getvalue()


def test_setting_up_logging_again_does_not_double_the_lines(tmp_path, plain):
    setup_logging(tmp_path, plain)
    setup_logging(tmp_path, plain)
    logging.getLogger("prism_ray.somewhere").warning("once")
    assert plain.file.getvalue().count("once") == 1
    assert (tmp_path / "log.txt").read_text().count("WARNING prism_ray.somewhere: once") == 1


def test_unknown_numbers_are_shown_where_none_is_known():
    assert telling({"a/b": 1.0}) == [("a/b", "1")]
    assert telling({"a/b": 1.0, "policy/loss": 2.0}) == [("policy loss", "2")]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (3723, "1:02:03")])
def test_durations_read_as_people_write_them(seconds, text):
    assert duration(seconds) == text
