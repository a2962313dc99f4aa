import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from prism_ray.verify.symbolic import Compared, SymbolicChecker


@pytest.fixture(scope="module")
def checker():
    made = SymbolicChecker(limit_s=0.4)
    yield made
    made.close()


BOMBS = ["10**10**10", "9^{9^{9^{9}}}", "1000000000!", "(" * 200, r"\sin(" * 50 + "x" + ")" * 50, "(x+1)^{10000}-1"]


def child_of(checker):
    return checker._child.pid


@pytest.mark.timeout(300)
def test_a_bomb_costs_no_more_than_the_limit_and_no_later_comparison(checker):
    """The limit is the kernel's: what it ends is said to be cut, and the next comparison finds a worker."""
    assert checker.compare("0.5", r"\frac12") == Compared(True)
    keeper = child_of(checker)
    compared = [checker.compare("7", bomb) for bomb in BOMBS]
    assert not any(c.same for c in compared)
    assert sum(c.cut for c in compared) > 2, "nothing met its limit, so nothing was tested"
    assert checker.compare(r"2\sqrt{3}", r"\sqrt{12}") == Compared(True)
    assert child_of(checker) == keeper, "the imports were paid for again"


@pytest.mark.parametrize("text", ["", "\x00\ud800", '"\n', r"\frac{1}{", "🙂"])
def test_what_cannot_be_read_is_only_different(checker, text):
    assert not checker.compare("7", text).same and not checker.compare(text, "7").same


def test_it_works_in_any_thread(checker):
    """math-verify's own limit raises outside the main thread."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(checker.compare("x+1", "1+x"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Compared(True)] * 3


def test_a_child_that_is_killed_is_replaced(checker):
    checker.compare("1", "1")
    os.kill(child_of(checker), signal.SIGKILL)
    assert checker.compare("x+1", "1+x").same or checker.compare("x+1", "1+x").same


def test_a_child_that_is_stopped_is_ended_from_here(monkeypatch):
    monkeypatch.setattr("prism_ray.verify.symbolic._GRACE_S", 0.1)
    checker = SymbolicChecker(limit_s=0.1)
    checker._started()
    os.killpg(child_of(checker), signal.SIGSTOP)
    assert checker.compare("x+1", "1+x") == Compared(False, cut=True)
    assert checker._child is None
    checker.close()


def test_the_child_does_not_outlive_whoever_asked():
    """Also not when that is killed while the child computes."""
    program = (
        "import threading, time\n"
        "from prism_ray.verify.symbolic import SymbolicChecker\n"
        "checker = SymbolicChecker(limit_s=0.2)\n"
        "checker.compare('1', '1')\n"
        "print(checker._child.pid, flush=True)\n"
        "checker.compare('7', '9^{9^{9^{9}}}')\n"
        "time.sleep(600)\n"
    )
    asker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(asker.stdout.readline())
    asker.kill()
    asker.wait()
    asker.stdout.close()
    while alive(child):
        time.sleep(0.1)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_started_before_it_is_asked():
    checker = SymbolicChecker()
    assert checker._child is None
    checker.close()


@pytest.mark.parametrize("limit", [0, -1, float("nan"), 1e9])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match="limit_s: .* is no number of seconds"):
        SymbolicChecker(limit)
