import operator
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench.lab.rounds import Failure, alternate
from bench.runtimes.racers import THREAD_VARIABLES, Worker, median_call_ms, peak_bytes
from common.spec import ImageSpec
from fold.image_sets import random_images

IMAGES = random_images(ImageSpec(2, 3, 1, (0.5,), (0.5,), resize=None), 4)


def open_fake(kind: str, folder: Path, num_threads: int):
    """A contender without a library: sums of pixels as logits, or what can go wrong."""
    if kind == "cannot open":
        raise ValueError("no such runtime\nsecond line")

    def answer(images):
        if kind == "dies in batches" and len(images) > 1:
            os._exit(7)
        if kind == "fails in batches" and len(images) > 1:
            raise MemoryError("no room")
        if kind == "environment":
            return np.array([[int(os.environ[name]) for name in THREAD_VARIABLES]])
        return images.reshape(len(images), -1).sum(axis=1, dtype=np.int64)[:, None] + num_threads

    return answer


@pytest.fixture
def start(tmp_path):
    workers = []

    def start(kind: str, num_threads: int = 1) -> Worker:
        workers.append(Worker(partial(open_fake, kind), tmp_path, num_threads))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_a_worker_answers_images_and_times_calls(start):
    worker = start("sums", num_threads=3)
    worker.wait()
    expected = IMAGES.reshape(4, -1).sum(axis=1, dtype=np.int64)[:, None] + 3
    assert (worker.ask(operator.call, IMAGES) == expected).all()
    assert worker.ask(median_call_ms, IMAGES[:2], 1e-9) > 0
    assert worker.ask(peak_bytes) > 1e6


@pytest.mark.slow
def test_the_number_of_threads_is_set_before_libraries_load_and_only_there(start):
    before = dict(os.environ)
    workers = [start("environment", num_threads=num) for num in (1, 2)]
    assert dict(os.environ) == before
    for num, worker in enumerate(workers, start=1):
        worker.wait()
        assert worker.ask(operator.call, IMAGES[:1]).tolist() == [[num] * len(THREAD_VARIABLES)]


def test_a_contender_that_cannot_open_says_why_in_one_line(start):
    assert start("cannot open").wait() == Failure("ValueError: no such runtime")


@pytest.mark.slow
def test_a_contender_that_fails_or_dies_ends_its_row_and_no_other(start):
    kinds = ("sums", "fails in batches", "dies in batches")
    workers = {kind: start(kind) for kind in kinds}
    for worker in workers.values():
        worker.wait()
        worker.ask(operator.call, IMAGES[:1])
    racers = {kind: partial(worker.ask, median_call_ms, IMAGES[:2], 1e-9) for kind, worker in workers.items()}
    results = alternate(racers, batch_size=2, num_rounds=2)
    assert len(results["sums"]["round_ms"]) == 2
    assert results["fails in batches"] == "MemoryError: no room"
    assert results["dies in batches"] == "its process ended with status 7"
    found = workers["dies in batches"].ask(operator.call, IMAGES[:1])
    assert found == Failure("its process ended with status 7")


def test_a_contender_that_hangs_is_ended(start, monkeypatch):
    worker = start("sums")
    worker.wait()
    monkeypatch.setattr("bench.runtimes.racers.PATIENCE_S", 0)
    assert worker.ask(median_call_ms, IMAGES[:1], 60.0) == Failure("its process does not answer within 0 s")
