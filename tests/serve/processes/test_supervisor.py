"""When the place of a process is filled again: by a clock and processes of the test."""

import signal
from types import SimpleNamespace

import pytest

from serve.processes import supervisor


class Worker:
    """A process that lives and is ready as it is told."""

    exitcode = -9

    def __init__(self, number):
        self.pid = number
        self.is_alive, self.answers, self.is_up, self.was_killed = True, True, False, False
        self.process = SimpleNamespace(is_alive=lambda: self.is_alive, join=lambda: None)

    def start(self):
        pass

    def is_ready(self, timeout_s):
        return self.is_up

    def ping(self, timeout_s):
        return self.answers

    def kill(self):
        self.was_killed = True


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0, dead=[])
    monkeypatch.setattr(supervisor, "monotonic", lambda: clock.now)
    monkeypatch.setattr(supervisor, "mark_process_dead", clock.dead.append)
    return clock


@pytest.fixture
def place():
    made = []

    def make():
        made.append(Worker(len(made) + 1))
        return made[-1]

    place = supervisor._Place("worker", make)
    place.look_after()
    return place


def wait_of(place, clock):
    """Seconds until the next process starts."""
    begin = clock.now
    place.look_after()
    while place.worker is None:
        clock.now += 0.5
        place.look_after()
    return clock.now - begin


def serve(place, clock, seconds):
    place.worker.is_up = True
    place.look_after()
    assert place.is_ready
    clock.now += seconds


def end(place):
    place.worker.is_alive = False
    place.look_after()


def test_one_that_served_for_long_is_replaced_at_once_and_others_later_and_later(place, clock):
    waits = []
    for seconds in (10, 1, 1, 1, 1, 1, 1, 1, 10, 1):
        serve(place, clock, seconds)
        end(place)
        waits.append(wait_of(place, clock))
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 0, 1]
    assert clock.dead == [*range(1, 11)]  # what they held is no longer counted


def test_one_that_never_served_is_not_replaced_at_once(place, clock):
    waits = []
    for _ in range(3):
        end(place)
        assert place.has_failed
        waits.append(wait_of(place, clock))
    assert waits == [1, 1, 2]
    serve(place, clock, 1)
    end(place)
    assert not place.has_failed


def test_one_that_does_not_answer_or_is_not_ready_in_time_is_killed(place, clock):
    serve(place, clock, 100)
    hanging = place.worker
    place.look_after()
    assert not hanging.was_killed
    hanging.answers = False
    place.look_after()
    assert hanging.was_killed
    wait_of(place, clock)
    slow = place.worker
    clock.now += 120
    place.look_after()
    assert not slow.was_killed
    clock.now += 1
    place.look_after()
    assert slow.was_killed
    assert place.has_failed


def test_a_signal_between_two_looks_ends_it_without_another_one(monkeypatch):
    """Ctrl-C ends the workers too, which would be started again."""
    kinds = {"worker": [lambda: pytest.fail("a worker is started")]}
    watching = supervisor.Supervisor(kinds, drain_s=1, say_ready=lambda: None)
    monkeypatch.setattr(supervisor, "sleep", lambda seconds: watching._end(signal.SIGINT, None))
    assert watching._watch()
