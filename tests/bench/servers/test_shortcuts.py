"""The server without one of its shortcuts answers as with all; a page says what each brings."""

import pytest

from bench import shortcuts
from bench.lab.server import IMAGE
from bench.shortcuts import WITHOUT, start_without


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_a_server_without_a_shortcut_still_answers(name):
    with start_without(name) as server:
        assert server.predict(IMAGE.read_bytes()) == 200


def test_ratios_are_those_of_the_same_round():
    whole = [{"requests_per_s": 100.0, "p99_ms": 2.0}, {"requests_per_s": 50.0, "p99_ms": 4.0}]
    less = [{"requests_per_s": 90.0, "p99_ms": 3.0}, {"requests_per_s": 45.0, "p99_ms": 6.0}]
    results = {"all": {"1": whole, "64": whole}, "gc.freeze": {"1": less, "64": whole}}
    page = shortcuts.page({"command": "", "machine": {}, "results": results})
    assert "| 0.90 (0.90–0.90) | 1.50 (1.50–1.50) | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |" in page
