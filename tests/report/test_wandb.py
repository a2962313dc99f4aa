"""Weights & Biases for real, offline: what its files hold, which are what `wandb sync` sends."""

import sys

import pytest

from prism_ray.config.report import ReportSettings
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.wandb_run import WandbError
from tests.report.wandb_server import WandbServer

ONLINE = ReportSettings.model_validate({"wandb": {"mode": "online", "project": "tests"}})
OFFLINE = ReportSettings.model_validate({"wandb": {"mode": "offline", "project": "tests"}})
BLOCK, HEADER = 32768, 7


@pytest.fixture
def account(tmp_path, monkeypatch):
    """Takes the address of a server, which the client then knows with an account: it asks for both only once."""
    import wandb

    def known(url, key):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv("WANDB_API_KEY", raising=False)
        wandb.teardown()

    yield known
    wandb.teardown()


def records(folder):
    """The records of a run of Weights & Biases, in the order they were written: blocks of fragments after a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    data, at, whole = path.read_bytes(), HEADER, b""
    found = []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last fragment
            found.append(Record.FromString(whole))
            whole = b""
    return found


def history(folder):
    """The rows of a run: (number, {name: value as JSON})."""
    rows = [r.history for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [(row.step.num, {".".join(i.nested_key) or i.key: i.value_json for i in row.item}) for row in rows]


def parts(folder):
    return sorted(folder.glob("wandb/offline-run-*"))


def test_it_is_not_even_imported_by_default(tmp_path):
    before = "wandb" in sys.modules
    MetricsLog(tmp_path, ReportSettings()).close()
    assert ("wandb" in sys.modules) == before


def test_a_second_start_of_a_run_goes_on_with_the_same_run_and_all_stages_are_in_it(tmp_path):
    with MetricsLog(tmp_path / "tiny", OFFLINE, {"seed": 0}) as log:
        log.write("sft", 1, {"supervised/loss": 2.0})
        log.write("align", 1, {"policy/loss": 0.5})
    with pytest.raises(KeyError), MetricsLog(tmp_path / "tiny", OFFLINE, {"seed": 0}) as log:
        log.write("align", 2, {"policy/loss": 0.25})
        log.evaluated("prism", {"accuracy": 0.75})
        raise KeyError

    first, second = parts(tmp_path / "tiny")
    (begun,), (taken_up,) = (
        [r.run for r in records(p) if r.WhichOneof("record_type") == "run"] for p in parts(tmp_path / "tiny")
    )
    assert begun.run_id == taken_up.run_id == (tmp_path / "tiny" / "wandb" / "run_id").read_text()
    assert (begun.display_name, begun.project) == ("tiny", "tests")
    before, after = history(first), history(second)
    assert [row["align/policy/loss"] for _, row in before + after if "align/policy/loss" in row] == ["0.5", "0.25"]
    assert before[0][1]["sft/supervised/loss"] == "2" and after[0][1]["align/step"] == "2"
    numbers = [number for number, _ in before + after]
    assert numbers == sorted(set(numbers)), "what is sent later must not overwrite what was sent before"
    exits = [[r.exit.exit_code for r in records(p) if r.WhichOneof("record_type") == "exit"] for p in (first, second)]
    assert exits == [[0], [1]]
    summary = [i for r in records(second) if r.WhichOneof("record_type") == "summary" for i in r.summary.update]
    assert any("evaluate/prism/accuracy" in (i.key, *i.nested_key) and i.value_json == "0.75" for i in summary)


def test_a_folder_made_anew_is_another_run(tmp_path):
    ids = []
    for name in ("a", "b"):
        MetricsLog(tmp_path / name, OFFLINE).close()
        ids.append((tmp_path / name / "wandb" / "run_id").read_text())
    assert ids[0] != ids[1]


def test_without_an_account_a_run_that_is_to_be_online_says_what_to_do(tmp_path, account):
    account("http://127.0.0.1:9", None)
    with pytest.raises(WandbError, match="report.wandb.mode is online, but: No API key .* report.wandb.mode=offline"):
        MetricsLog(tmp_path / "tiny", ONLINE)
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_online_a_second_start_adds_to_what_the_server_has_of_the_run(tmp_path, account):
    with WandbServer() as server:
        account(server.url, "0" * 40)
        with MetricsLog(tmp_path / "tiny", ONLINE) as log:
            log.write("sft", 1, {"supervised/loss": 2.0})
            log.write("align", 1, {"policy/loss": 0.5})
        with pytest.raises(KeyError), MetricsLog(tmp_path / "tiny", ONLINE) as log:
            log.write("align", 2, {"policy/loss": 0.25})
            raise KeyError
    run = (tmp_path / "tiny" / "wandb" / "run_id").read_text()
    assert list(server.history) == [run]
    assert [row.get("align/policy/loss") for row in server.history[run]] == [None, 0.5, 0.25]
    assert [row["_step"] for row in server.history[run]] == [1, 2, 3]
    assert server.states == [(run, 0), (run, 1)]
