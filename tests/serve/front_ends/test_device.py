"""One device process and its front ends, in threads of this process: what they share, and what strangers send."""

import gc
import os
import random
import socket
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("front ends need Linux", allow_module_level=True)

from devices import LIMITS, Running, running
from serving import until

from common.refusal import Refusal
from serve.front_ends import link as link_module
from serve.front_ends.device import _MOST_EACH
from serve.front_ends.link import Disconnected
from serve.front_ends.shared_memory import ANSWER, DONE
from serve.request.limits import Limits


def test_images_come_back_as_the_logits_of_the_model(runtime, pixels):
    with running(runtime) as it:
        remote = it.dial().connect()
        with remote.link as link:
            assert remote.model == runtime.model
            for num in (1, 5, 3):
                np.testing.assert_allclose(link.run(pixels[:num]), runtime(pixels[:num]), rtol=1e-5, atol=1e-5)
            many = np.concatenate([pixels] * 4)  # more than there are slots
            np.testing.assert_allclose(link.run(many), runtime(many), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(remote(pixels), runtime(pixels), rtol=1e-5, atol=1e-5)


def finish(link, num):
    """`num` flights, as they come."""
    flights = []
    while len(flights) < num:
        flights += link.receive(waits=True)
    return flights


def test_all_that_waits_is_one_batch_whoever_sent_it(gated, pixels):
    with running(gated) as it, it.dial(0).connect().link as one, it.dial(1).connect().link as other:
        one.send([("first", pixels[:1])])
        gated.wait()
        one.send([("a", pixels[:2]), ("b", pixels[2:3])])
        other.send([("c", pixels[3:5])])
        gated.open()
        flights = [*finish(one, 3), *finish(other, 1)]
        assert gated.batches == it.batches == [1, 5]
        expected = {"first": pixels[:1], "a": pixels[:2], "b": pixels[2:3], "c": pixels[3:5]}
        for link, flight in zip((one, one, one, other), flights, strict=True):
            logits, seconds = link.take([flight])
            np.testing.assert_allclose(logits, gated._runtime(expected[flight.owner]), rtol=1e-5, atol=1e-5)
            assert min(seconds) > 0


def test_no_batch_is_larger_than_it_may_be(gated, pixels):
    limits = Limits(max_images=5, max_queue=8, max_batch=2)
    with running(gated, limits) as it, it.dial().connect().link as link:
        gated.open()
        np.testing.assert_allclose(link.run(pixels), gated._runtime(pixels), rtol=1e-5, atol=1e-5)
        assert gated.batches == [2, 2, 1]


def test_a_model_that_fails_fails_its_batch_alone(gated, pixels):
    def fail(images):
        raise RuntimeError("out of memory")

    with running(gated) as it, it.dial().connect().link as link:
        gated.open()
        gated.spoil = fail
        with pytest.raises(RuntimeError, match="the model failed; the log of the device process says why"):
            link.run(pixels[:1])
        gated.spoil = None
        assert len(link.run(pixels)) == 5
        gated.spoil = lambda images: np.zeros((3, 1))  # logits of another shape
        with pytest.raises(RuntimeError):
            link.run(pixels[:1])


def test_images_of_two_batches_fail_if_the_first_of_them_fails(gated, pixels):
    def fail_once(images):
        gated.spoil = None
        raise RuntimeError("out of memory")

    limits = Limits(max_images=5, max_queue=8, max_batch=2)
    with running(gated, limits) as it, it.dial().connect().link as link:
        gated.open()
        gated.spoil = fail_once
        with pytest.raises(RuntimeError, match="the model failed"):
            link.run(pixels[:3])
        assert gated.batches == [2, 1]
        assert len(link.run(pixels)) == 5


def test_slots_are_refused_while_all_are_taken_and_free_once_they_are_answered(gated, pixels):
    with running(gated) as it, it.dial().connect().link as link:
        assert link.send([("a", pixels), ("b", pixels[:3]), ("c", pixels[:1])]) == ["c"]
        assert link.send([("d", pixels[:1])]) == ["d"]
        gated.open()
        link.take(finish(link, 2))
        assert link.send([("e", pixels), ("f", pixels[:3])]) == []
        finish(link, 2)


def test_an_image_of_another_size_takes_no_slot(runtime, pixels):
    with running(runtime) as it, it.dial().connect().link as link:
        for _ in range(9):
            with pytest.raises(ValueError, match="could not broadcast"):
                link.send([("a", np.zeros((1, 9, 9, 3), np.uint8))])
        assert len(link.run(pixels)) == 5


# What a front end sends that somebody has taken over


def request(*slots):
    return struct.pack(f"={len(slots)}I", *slots)


def raw(it):
    """A connection that leaves its memory alone."""
    return admitted(knock(it))


def knock(it, index=0):
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(it.door(index), [b"c"], [theirs.fileno()])
    return ours


def admitted(connection):
    _, (memory,), _, _ = socket.recv_fds(connection, 8, 1)
    os.close(memory)
    return connection


def answers(connection, num):
    return np.frombuffer(connection.recv(num * ANSWER.size, socket.MSG_WAITALL), np.uint32).tolist()


def is_cut_off(connection):
    with connection:
        try:
            while connection.recv(2**16):
                pass
        except ConnectionResetError:
            pass
    return True


def answers_others(it, pixels):
    with it.dial(1).connect().link as link:
        return len(link.run(pixels)) == len(pixels)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (request(8), "it names slot 8 of 8"),
        (request(2**32 - 1), "it names slot 4294967295 of 8"),
        (request(3, 3), "it wrote a slot twice before the answer"),
        (random.Random(3).randbytes(64) + b"\xff" * 8, "it "),
    ],
)
def test_a_message_that_makes_no_sense_ends_its_connection_alone(runtime, pixels, caplog, content, reason):
    with running(runtime) as it:
        connection = raw(it)
        connection.sendall(content)
        assert is_cut_off(connection)
        assert answers_others(it, pixels)
    assert f"a connection of a front end is closed: {reason}" in caplog.text


def test_a_slot_is_not_written_again_before_its_answer(gated):
    with running(gated) as it:
        connection = raw(it)
        connection.sendall(request(0))
        gated.wait()
        connection.sendall(request(0))
        gated.open()
        # What waits while the model runs is read after the answer: then the slot is free, and this its next turn.
        assert answers(connection, 2) == [0, DONE, 0, DONE]
        connection.close()


def test_half_a_message_waits_for_its_other_half(runtime):
    with running(runtime) as it, raw(it) as connection:
        for part in (request(0)[:3], request(0)[3:]):
            connection.sendall(part)
        assert answers(connection, 1) == [0, DONE]


def test_nobody_can_resize_the_memory_of_a_connection(runtime, pixels):
    with running(runtime) as it:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(it.door(), [b"c"], [theirs.fileno()])
            _, (memory,), _, _ = socket.recv_fds(ours, 8, 1)
            for num_bytes in (0, 2**20):
                with pytest.raises(PermissionError):
                    os.ftruncate(memory, num_bytes)
            os.close(memory)
            assert answers_others(it, pixels)


def test_who_does_not_read_answers_is_cut_off(runtime, caplog):
    with running(runtime) as it:
        connection = raw(it)
        (peer,) = until(lambda: it.device._peers)
        try:
            for num in range(1, 100_000):
                connection.sendall(request(0))
                until(lambda num=num: not peer.is_open or (len(it.batches) >= num and not peer._num_busy))
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert is_cut_off(connection)
    assert "it does not read its answers" in caplog.text


def test_a_front_end_has_so_many_connections_and_others_still_have_theirs(runtime, pixels, caplog):
    with running(runtime) as it:
        held = [raw(it) for _ in range(_MOST_EACH)]
        assert is_cut_off(knock(it))
        assert answers_others(it, pixels)
        for connection in held:
            connection.close()
    assert "it has too many" in caplog.text


@pytest.fixture
def allocation(monkeypatch):
    """Shared memory is allocated as soon as `go` is set; `sizes` are those that were asked for."""
    allocation = SimpleNamespace(go=threading.Event(), sizes=SimpleQueue())
    allocate = os.posix_fallocate

    def wait(file, start, num_bytes):
        allocation.sizes.put(num_bytes)
        assert allocation.go.wait(60)
        allocate(file, start, num_bytes)

    def begin():
        monkeypatch.setattr(os, "posix_fallocate", wait)

    allocation.begin = begin
    yield allocation
    allocation.go.set()


def test_while_memory_is_allocated_others_are_answered(runtime, pixels, allocation):
    with running(runtime) as it, it.dial(1).connect().link as link:
        allocation.begin()
        with knock(it) as waiting, ThreadPoolExecutor(1) as thread:
            assert allocation.sizes.get(timeout=60)
            assert np.array_equal(link.run(pixels[:2]), runtime(pixels[:2]))
            reload = thread.submit(it.dial().reload)
            assert allocation.sizes.get(timeout=60)  # is there room for all?
            assert np.array_equal(link.run(pixels[:2]), runtime(pixels[:2]))
            allocation.go.set()
            assert reload.result(60)
            admitted(waiting)


def test_a_connection_that_waits_for_its_memory_counts_and_keeps_no_reload_away(runtime, allocation, caplog):
    with running(runtime) as it, ThreadPoolExecutor(1) as thread:
        allocation.begin()
        waiting = [knock(it, index) for index in range(2) for _ in range(_MOST_EACH)]
        assert is_cut_off(knock(it))
        assert "it has too many" in caplog.text
        reload = thread.submit(it.dial(1).reload)
        allocation.go.set()
        assert reload.result(60)
        for connection in waiting:
            admitted(connection).close()


def test_a_check_takes_memory_for_its_own_images(runtime, pixels, allocation):
    with running(runtime) as it:
        remote = it.dial().connect()
        allocation.go.set()
        allocation.begin()
        with remote.link:
            assert np.array_equal(remote(pixels[:2]), runtime(pixels[:2]))
            assert np.array_equal(remote(np.repeat(pixels, 4, axis=0)), runtime(np.repeat(pixels, 4, axis=0)))
        slot_bytes, other_bytes = it.device._shape.slot.itemsize, len(it.device._greeting)
        for num_slots in (2, 8):  # of 20 images
            assert allocation.sizes.get(timeout=60) == num_slots * slot_bytes + other_bytes


def test_a_front_end_that_cannot_map_its_memory_leaves_no_connection(runtime, monkeypatch):
    def fail(*args):
        raise OSError(12, "Cannot allocate memory")

    with running(runtime) as it:
        monkeypatch.setattr(link_module, "Area", fail)
        with pytest.raises(OSError, match="Cannot allocate memory") as kept:
            it.dial().connect()
        until(lambda: not (it.device._peers or it.device._tasks))
    assert kept


def test_a_count_that_fails_fails_its_batch_and_nothing_else(runtime, pixels):
    def fail(num_images):
        raise OSError(28, "No space left on device")

    with running(runtime) as it, it.dial().connect().link as link:
        it.device.observe_batch = fail
        with pytest.raises(RuntimeError, match="the model failed"):
            link.run(pixels[:1])
        it.device.observe_batch = it.batches.append
        assert np.array_equal(link.run(pixels[:1]), runtime(pixels[:1]))


def test_what_is_put_before_the_door_and_is_not_known_there_is_left_aside(runtime, pixels, tmp_path):
    with running(runtime) as it, open(tmp_path / "file", "wb") as file:
        socket.send_fds(it.door(), [b"c"], [file.fileno()])
        it.door().send(b"c")
        it.door().send(b"many words")
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(it.door(), [b"?"], [theirs.fileno()])
        assert is_cut_off(ours)
        assert answers_others(it, pixels)


def test_memory_ends_with_its_connection(runtime):
    def mapped():
        with open("/proc/self/maps") as maps:
            return sum("diracnet-slots" in line for line in maps)

    gc.collect()  # of other tests
    before = mapped()
    with running(runtime) as it:
        connection = raw(it)
        connection.sendall(request(0))
        assert answers(connection, 1) == [0, DONE]
        assert mapped() == before + 1
        connection.close()
        assert len(it.dial().connect().link.end()) == 0  # whose turn comes after the end of the other
        until(lambda: mapped() <= before)


def test_more_memory_than_there_is_is_refused(monkeypatch, runtime):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        Refusal, match=r"^cannot allocate 3,776 bytes of shared memory for pixels \(no space left on device"
    ):
        Running(runtime, LIMITS)


def test_a_link_says_when_its_device_process_has_ended(gated, pixels):
    with running(gated) as it, it.dial().connect().link as link:
        link.send([("a", pixels[:1])])
        gated.wait()
        it.cut()
        with pytest.raises(Disconnected):
            link.receive(waits=True)
        assert [flight.owner for flight in link.end()] == ["a"]
        with pytest.raises(Disconnected):
            link.send([("b", pixels[:1])])
        gated.open()
