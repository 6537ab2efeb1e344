"""One device process and its front ends, in threads of this process: what they share, and what strangers send."""

import os
import random
import socket
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("front ends need Linux", allow_module_level=True)

from devices import LIMITS, Running, running

from common.refusal import Refusal
from serve.front_ends.device import _MOST_EACH
from serve.front_ends.link import Disconnected
from serve.front_ends.shared_memory import ANSWER_BYTES, DONE, Shape, make_memory, shape_of
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


def request(*pairs):
    return b"".join(struct.pack("=II", slot, generation) for slot, generation in pairs)


def raw(it, num_slots=None, file=None):
    """A connection that has shared memory of `num_slots`, or another file."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(it.door(), [b"c"], [theirs.fileno()])
    (length,) = struct.unpack("=I", ours.recv(4))
    assert len(ours.recv(length, socket.MSG_WAITALL)) == length
    shape = it.device._model.shape
    shape = replace(shape, num_slots=num_slots or shape.num_slots)
    memory = make_memory(shape) if file is None else file
    socket.send_fds(ours, [struct.pack("=I", shape.num_slots)], [memory])
    os.close(memory)
    return ours


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
        (request((8, 1)), "it names slot 8 of 8"),
        (request((2**32 - 1, 1)), "it names slot 4294967295 of 8"),
        (request((3, 1), (3, 2)), "it wrote a slot twice before the answer"),
        (request((3, 1), (3, 1)), "it wrote a slot twice before the answer"),
        (request((3, 0)), "it names a slot as it was at another time"),
        (request((3, 2)), "it names a slot as it was at another time"),
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


def test_a_slot_is_not_written_again_before_its_answer(gated, caplog):
    with running(gated) as it:
        connection = raw(it)
        connection.sendall(request((0, 1)))
        gated.wait()
        connection.sendall(request((0, 2)))
        gated.open()
        # What waits while the model runs is read after the answer: then the slot is free, and this its next turn.
        answers = np.frombuffer(connection.recv(2 * ANSWER_BYTES, socket.MSG_WAITALL), np.uint32)
        assert answers.tolist() == [0, 1, DONE, 0, 2, DONE]
        connection.sendall(request((0, 2)))  # an old one, once more
        assert is_cut_off(connection)
    assert "as it was at another time" in caplog.text


def test_half_a_message_waits_for_its_other_half(runtime):
    with running(runtime) as it, raw(it) as connection:
        for part in (request((0, 1))[:3], request((0, 1))[3:]):
            connection.sendall(part)
        answers = np.frombuffer(connection.recv(ANSWER_BYTES, socket.MSG_WAITALL), np.uint32)
        assert answers.tolist() == [0, 1, DONE]


def test_generations_begin_anew_after_the_last_number(runtime):
    with running(runtime) as it, raw(it) as connection:
        connection.sendall(request((0, 1)))
        assert connection.recv(ANSWER_BYTES, socket.MSG_WAITALL)
        (peer,) = it.device._peers
        peer._next[0] = 0
        connection.sendall(request((0, 0)))
        assert connection.recv(ANSWER_BYTES, socket.MSG_WAITALL)


def memory_of(num_bytes, seals=True):
    shape = Shape(1, (1, 1, num_bytes - 8), 1)
    file = make_memory(shape)
    assert os.fstat(file).st_size == num_bytes
    if seals:
        return file
    os.close(file)
    file = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, num_bytes)
    return file


@pytest.mark.parametrize(
    ("num_slots", "make_file", "reason"),
    [
        (8, lambda size: memory_of(size + 4), "its memory has"),
        (8, lambda size: memory_of(size - 4), "its memory has"),
        (8, lambda size: memory_of(size, seals=False), "and seals 0, not"),
        (8, lambda size: os.open("/dev/zero", os.O_RDWR), "what it sent is not memory"),
        (9, lambda size: memory_of(size), "it has 9 slots, and may have 1 to 8"),
        (2**31, lambda size: memory_of(size), "it has 2147483648 slots, and may have 1 to 8"),
    ],
)
def test_memory_that_is_not_what_it_should_be_ends_its_connection(
    runtime, pixels, caplog, num_slots, make_file, reason
):
    with running(runtime) as it:
        size = shape_of(runtime.model, LIMITS).num_bytes
        assert is_cut_off(raw(it, num_slots, make_file(size)))
        assert answers_others(it, pixels)
    assert reason in caplog.text


def test_a_connection_that_sends_no_memory_is_closed(runtime, pixels, caplog):
    with running(runtime) as it:
        for content in (b"\0", b"\1\0\0\0"):
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(it.door(), [b"c"], [theirs.fileno()])
            ours.sendall(content)
            assert is_cut_off(ours)
        assert answers_others(it, pixels)
    assert "it sent 1 bytes and 0 files in place of its memory" in caplog.text


def test_who_does_not_read_answers_is_cut_off(runtime, caplog):
    with running(runtime) as it:
        connection = raw(it)
        connection.setblocking(True)
        (peer,) = it.device._peers
        try:
            for generation in range(1, 100_000):
                connection.sendall(request((0, generation)))
                while peer.is_open and (peer._area is None or peer._next[0] <= generation or peer._is_busy[0]):
                    pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert is_cut_off(connection)
    assert "it does not read its answers" in caplog.text


def test_a_front_end_has_so_many_connections_and_others_still_have_theirs(runtime, pixels, caplog):
    with running(runtime) as it:
        held = [raw(it) for _ in range(_MOST_EACH)]
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(it.door(), [b"c"], [theirs.fileno()])
        assert is_cut_off(ours)
        assert answers_others(it, pixels)
        for connection in held:
            connection.close()
    assert "it has too many" in caplog.text


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

    with running(runtime) as it:
        connection = raw(it)
        connection.sendall(request((0, 1)))
        assert connection.recv(ANSWER_BYTES, socket.MSG_WAITALL)
        assert mapped() == 1
        connection.close()
        assert len(it.dial().connect().link.end()) == 0  # whose turn comes after the end of the other
        while mapped():
            pass


def test_more_memory_than_there_is_is_refused(monkeypatch, runtime):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        Refusal, match=r"^3,776 bytes of shared memory for pixels cannot be had \(no space left on device"
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
