import os
import sys
from importlib.metadata import version

import pytest

from common.environment import num_cores, processor, versions


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not bound to cores")
def test_only_the_cores_count_that_this_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert num_cores() == len(before)


def test_a_processor_that_the_system_does_not_name_is_an_empty_string_at_worst():
    assert isinstance(processor(), str)


def test_versions_are_those_of_installed_packages_alone():
    assert versions("numpy", "no-such-package") == {"numpy": version("numpy")}
