import signal

import pytest

from common.child import Child, ProcessFailed

pytestmark = pytest.mark.slow


@pytest.fixture
def child():
    child = Child("serve.decode.worker", name="a decoder")
    assert child.receive(120) == b""
    yield child
    child.close()


def test_one_that_is_killed_is_named_with_its_status(child):
    child.kill()
    with pytest.raises(ProcessFailed, match=r"^a decoder ended with status -9$") as caught:
        child.receive(120)
    assert caught.value.status == -signal.SIGKILL


def test_one_that_says_nothing_is_waited_for_as_long_as_asked(child):
    with pytest.raises(ProcessFailed, match=r"^a decoder does not answer within 0\.01 s$") as caught:
        child.receive(0.01)
    assert caught.value.status is None
    assert child.process.poll() is None


def test_one_that_is_closed_leaves_no_process_and_no_connection(child):
    child.close()
    assert child.process.returncode == -signal.SIGKILL
    assert child._connection.closed
