from prism_ray.report.curves import ASYNCHRONY, MOST_OTHERS, TRAINING, curves, other_curves, waiting_table
from prism_ray.report.history import History


def row(stage, step, **numbers):
    return {"stage": stage, "step": step, **numbers}


def panels(html):
    return {p.split("</figcaption>")[0]: p for p in html.split("<figcaption>")[1:]}


def test_the_arms_share_a_plot_in_different_colours_apart_from_alignment():
    rows = [row(s, i, **{"reward/mean": i}) for s in ("align", "rlvr", "rlvr-sft") for i in (1, 2)]
    rows.append(row("align", 2, **{"discriminator/loss": 1.0}))
    found = panels(curves(TRAINING, History(rows)))
    rlvr = found["Reward in RLVR"]
    assert 'stroke="var(--c1)"' in rlvr and 'stroke="var(--c2)"' in rlvr and 'stroke="var(--c0)"' not in rlvr
    assert 'stroke="var(--c0)"' in found["Reward in alignment"]


def test_both_sides_of_staleness_and_who_waits_for_whom():
    numbers = {"staleness/max": 1.0, "staleness/mean": 0.5, "staleness/judge_max": 2.0, "learner/wait_share": 0.25,
               "rollout/wait_share": 0.4, "judge/wait_share": 0.7,
               "weights/paused_s": 0.1, "time/step_s": 2.0, "reward/dropped_share": 0.3}  # fmt: skip
    history = History([row("align", 1, **numbers), row("align", 2, **numbers)])
    found = panels(curves(ASYNCHRONY, history))
    assert "align, staleness/mean, step 1: 0.5" in found["Staleness of the policy"]
    assert "align, staleness/judge_max, step 2: 2" in found["Staleness of the judge"]
    assert "align, step 1: 0.25" in found["Learner waits for data"]
    assert "align, step 1: 0.05" in found["Engines paused for weights"]
    assert "align, step 2: 0.4" in found["Engines wait for weights"]
    assert "align, step 2: 0.7" in found["Judge waits for rollouts"]
    assert "align, step 2: 0.3" in panels(curves(TRAINING, history))["Groups dropped"]


def test_waiting_is_counted_in_time_and_not_in_steps():
    long = {"time/step_s": 9.0, "learner/wait_share": 0.5, "weights/paused_s": 0.9, "staleness/max": 1.0,
            "judge/wait_share": 0.0}  # fmt: skip
    short = {"time/step_s": 1.0, "learner/wait_share": 1.0, "weights/paused_s": 0.1, "staleness/max": 3.0,
             "judge/wait_share": 1.0}  # fmt: skip
    html = waiting_table(History([row("align", 1, **long), row("align", 2, **short), row("sft", 1, loss=1.0)]))
    cells = "".join(f"<td>{cell}</td>" for cell in ("align", "5.00 s", "55%", "–", "10%", "10%", "3", "–"))
    assert html.count("<tr>") == 2 and cells in html


def test_a_stage_whose_times_are_not_known_is_not_counted():
    assert waiting_table(History([row("align", 1, **{"time/step_s": None})])) == ""


def test_panels_without_data_are_left_out():
    assert curves(TRAINING, History([])) == "" and other_curves(History([]), set()) == ""


def test_other_metrics_are_drawn_up_to_a_number_and_counted_beyond():
    history = History([row("s", 1, **{f"m/{i:04d}": 1.0 for i in range(MOST_OTHERS + 5)}), row("s", 2, shown=1.0)])
    html = other_curves(history, {"shown"})
    assert f"All other metrics ({MOST_OTHERS} and 5 that are not drawn)" in html and "<figcaption>shown" not in html


def test_a_stage_nobody_foresaw_has_a_colour_and_a_name():
    html = curves(TRAINING, History([row("<new>", 1, **{"policy/loss": 1.0})]))
    assert "&lt;new&gt;" in html and "<new>" not in html
