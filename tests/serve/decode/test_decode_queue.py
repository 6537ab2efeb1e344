import subprocess
import sys
import threading

import pytest
from serving import ROOT

from serve.decode.pool import ImageQueue
from serve.decode.process import Budget, HostBudget


def test_the_earliest_due_comes_first_and_equal_ones_as_they_came():
    queue = ImageQueue()
    for due, owner in ((3, "c"), (1, "a"), (2, "b"), (1, "a, too")):
        queue.put(due, owner, 0)
    queue.end()
    assert [queue.get() for _ in range(5)] == [("a", 0), ("a, too", 0), ("b", 0), ("c", 0), None]


def test_what_is_dropped_has_no_turn():
    queue, gone, here = ImageQueue(), object(), object()
    for part in range(3):
        queue.put(0, gone, part)
        queue.put(1, here, part)
    queue.drop(gone)
    queue.end()
    assert [queue.get() for _ in range(4)] == [(here, 0), (here, 1), (here, 2), None]


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has locks that end with their file")


@pytest.mark.parametrize("of_host", [False, pytest.param(True, marks=LINUX)])
def test_a_budget_lets_in_what_fits(of_host, tmp_path):
    (tmp_path / "file").touch()
    budget = HostBudget(tmp_path / "file", 10) if of_host else Budget(10)
    entered, order = threading.Event(), []

    def take_the_rest():
        entered.set()
        with budget.taken(6):
            order.append("second")

    with budget.taken(5):
        thread = threading.Thread(target=take_the_rest)
        thread.start()
        assert entered.wait(60)
        with budget.taken(5):
            order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from serve.decode.process import HostBudget
with HostBudget(Path(sys.argv[2]), 10).taken(7):
    print("holds", flush=True)
    sys.stdin.readline()
"""


@LINUX
@pytest.mark.slow
def test_a_budget_of_the_host_takes_back_what_a_killed_process_held(tmp_path):
    file = tmp_path / "file"
    file.touch()
    argv = [sys.executable, "-c", HOLD, str(ROOT), str(file)]
    entered = threading.Event()

    def take():
        with HostBudget(file, 10).taken(4):
            entered.set()

    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        with HostBudget(file, 10).taken(2), HostBudget(file, 10).taken(1):  # what is left beside the seven
            thread = threading.Thread(target=take)
            thread.start()
        assert not entered.is_set()
        process.kill()
        assert entered.wait(60)
        thread.join(60)
