import operator

import pytest

from bench.lab.process import cost_of, in_fresh_process, memory_bytes
from common.files import read_whole
from common.refusal import Refusal

SIZE = 200_000_000


@pytest.mark.slow
def test_the_memory_of_the_work_is_not_that_of_the_imports_or_of_this_process():
    here = operator.mul(b"x", SIZE)
    cost = cost_of(("json",), operator.mul, b"x", SIZE)
    assert 0.9 * SIZE < cost["own_bytes"] < 1.2 * SIZE
    assert cost["imported_bytes"] < len(here) < memory_bytes("VmRSS")
    assert cost["seconds"] > 0


def test_what_is_refused_in_the_other_process_is_refused_here(tmp_path):
    with pytest.raises(Refusal, match="cannot read"):
        in_fresh_process(read_whole, tmp_path / "missing")
