"""MNN's processes: what they answer together, how they fail, and that none is left behind."""

import os
import select
import signal
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from serving import children_of

from common.child import Child, ProcessFailed
from common.refusal import Refusal
from export.runtimes.mnn_module import MnnModule
from serve.config import ServeConfig
from serve.model.choose import choose

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which processes one has started")
ROOT = Path(__file__).resolve().parents[3]


def started():
    """The processes of MNN that this one has started and that run, in the order of their start."""
    return sorted(children_of("self", "mnn_module"))


@pytest.fixture(autouse=True)
def workers():
    """`workers()`: those of this test. Whatever it does with its modules, they end with them."""
    before = {*started()}

    def workers():
        return [pid for pid in started() if pid not in before]

    yield workers
    assert workers() == []


@pytest.fixture
def path(write_onnx):
    return write_onnx()[1]


@pytest.fixture
def in_the_middle(monkeypatch):
    """`in_the_middle(act)`: `act()` runs in the next call, when its images are sent and no answer is read."""
    receive = Child.receive

    def in_the_middle(act):
        def interrupted(worker, *patience):
            monkeypatch.setattr(Child, "receive", receive)
            act()
            return receive(worker, *patience)

        monkeypatch.setattr(Child, "receive", interrupted)

    return in_the_middle


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("num_images", [1, 2, 3, 33])
def test_a_batch_is_shared_out_and_put_together_again(path, images, num_images, workers):
    one, three = MnnModule(path, num_threads=1), MnnModule(path, num_threads=3)
    pixels = images(num_images)
    expected = np.concatenate([one(part) for part in np.array_split(pixels, min(num_images, 3))])
    np.testing.assert_array_equal(three(pixels), expected)
    assert len(workers()) == 4


def test_parts_larger_than_a_socket_holds_arrive_in_any_layout(write_onnx, images):
    _, path = write_onnx(family="pooled", size=64)
    one, two = MnnModule(path, num_threads=1), MnnModule(path, num_threads=2)
    pixels = images(120, 64)[::2].transpose(0, 2, 1, 3)  # 0.4 MB for each of two
    np.testing.assert_array_equal(two(pixels), np.concatenate([one(pixels[:30]), one(pixels[30:])]))


def test_images_of_another_size_are_an_error(path, images):
    with pytest.raises(ValueError, match=r"images must be \[N, 8, 8, 3\], got \[4, 9, 9, 3\]"):
        MnnModule(path)(images(size=9))


def test_other_threads_go_on_while_it_computes(path, images, in_the_middle, workers):
    """A worker that stands still computes for ever: whoever lets it go on must be free to."""
    module, waits, answers = MnnModule(path, num_threads=2), threading.Event(), []
    expected = module(images())
    os.kill(workers()[0], signal.SIGSTOP)
    in_the_middle(waits.set)
    caller = threading.Thread(target=lambda: answers.append(module(images())))
    caller.start()
    assert waits.wait(60)
    assert not answers
    os.kill(workers()[0], signal.SIGCONT)
    caller.join(60)
    np.testing.assert_array_equal(answers, [expected])


def test_two_threads_take_turns(path, images):
    module, pixels, answers = MnnModule(path, num_threads=2), images(64), {}
    expected = [module(pixels[start : start + 4]) for start in range(0, 64, 4)]
    callers = [
        threading.Thread(target=lambda index=index: answers.update({index: module(pixels[4 * index : 4 * index + 4])}))
        for index in range(16)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    np.testing.assert_array_equal([answers[index] for index in range(16)], expected)


@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_process_fails_its_call_and_the_next_one_starts_anew(path, images, in_the_middle, index, workers):
    module, pixels = MnnModule(path, num_threads=2), images(5)
    expected, before = module(pixels), workers()

    def kill_before_it_answers():
        os.kill(workers()[index], signal.SIGSTOP)
        in_the_middle(lambda: kill(workers()[index]))

    for act in (lambda: kill(workers()[index]), kill_before_it_answers):
        act()
        with pytest.raises(ProcessFailed, match="a process of MNN ended with status -9"):
            module(images(7))
        assert workers() == []
        np.testing.assert_array_equal(module(pixels), expected)
    assert len(workers()) == 2
    assert not {*before} & {*workers()}


def test_no_call_gets_the_answer_of_an_earlier_one(path, images, in_the_middle):
    module = MnnModule(path, num_threads=2)
    expected = module(images()[::-1])

    def interrupt():
        raise KeyboardInterrupt

    in_the_middle(interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(images())
    np.testing.assert_array_equal(module(images()[::-1]), expected)


def test_a_file_that_mnn_does_not_load_is_refused(path, monkeypatch, tmp_path):
    converted = tmp_path / "plain.mnn"
    monkeypatch.setattr("export.runtimes.mnn_module._convert", lambda *arguments: FileIO(converted))
    for content in (b"", b"text", bytes(4096)):
        converted.write_bytes(content)
        with pytest.raises(Refusal, match=r"plain\.onnx cannot be loaded by MNN: a process of MNN ended with status"):
            MnnModule(path, num_threads=2)


def test_a_model_that_cannot_be_opened_once_it_is_converted_is_refused(path, monkeypatch):
    def full(name):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("export.runtimes.mnn_module.FileIO", full)
    with pytest.raises(Refusal, match=r"plain\.onnx cannot be loaded by MNN: .*Too many open files"):
        MnnModule(path)


def test_a_process_that_crashes_or_does_not_start_refuses_the_file(path, monkeypatch):
    for program, reason in (
        ("import os; os.kill(os.getpid(), 11)", "a process of MNN ended with status -11"),
        ("import threading; threading.Event().wait()", "a process of MNN does not answer within 0.1 s"),
    ):
        monkeypatch.setattr("common.child.PROGRAM", program)
        with pytest.raises(Refusal, match=rf"{reason}; use --runtime onnxruntime"):
            MnnModule(path, num_threads=2)
        monkeypatch.setattr("export.runtimes.mnn_module._START_S", 0.1)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setattr("export.runtimes.mnn_module._convert", lambda path, *arguments: FileIO(path))
    with pytest.raises(Refusal, match=r"cannot be loaded by MNN: .*No such file or directory"):
        MnnModule(path)


PROGRAM = """
import os, sys
from pathlib import Path
from export.runtimes.mnn_module import MnnModule
module = MnnModule(Path(sys.argv[1]), num_threads=2)
print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
def test_they_end_with_their_parent_however_it_ends(path, end):
    argv = [sys.executable, "-c", PROGRAM, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0) as parent:
        assert parent.stdout
        files = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(files) == 2
        if end:
            os.killpg(parent.pid, end)  # as Ctrl-C does; theirs is another group
        errors = parent.communicate(timeout=60)[1]
    assert errors.count(b"Traceback") == (end == signal.SIGINT)  # the parent's own
    for file in files:
        assert select.select([file], [], [], 60)[0], "a process of MNN has outlived its parent"
        os.close(file)


@pytest.mark.slow
def test_a_choice_leaves_none_of_its_candidates_running(path, workers):
    _, reason = choose(ServeConfig((path,), model_threads=2, max_batch=2))
    assert "the next of 2" in reason
    assert workers() == []
