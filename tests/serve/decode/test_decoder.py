"""Real processes that decode: what they answer, and what becomes of those that do not."""

from pathlib import Path

import numpy as np
import pytest

from common.image import TooManyPixels, decode
from common.refusal import Refusal
from common.spec import ImageSpec
from serve.decode.process import Decoder, TookTooLong
from serve.request.access import KEY_VARIABLE

SPEC = ImageSpec(8, 8, 3, (0.5,) * 3, (0.5,) * 3, resize=8)
pytestmark = pytest.mark.slow


@pytest.fixture
def decoder():
    decoder = Decoder(30, patience_s=60)
    yield decoder
    decoder.close()


def ask(decoder, content, *, num_bytes=10**8, max_pixels=10**8):
    """The pixels, or the refusal in their place."""
    try:
        return decoder(content, SPEC, max_pixels=max_pixels, num_bytes=num_bytes)
    except Refusal as refusal:
        return refusal


def process_of(decoder):
    return decoder._child.process


def test_a_process_decodes_as_the_server_does_and_stays(decoder, encode):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    files = [encode(noise, kind) for kind in ("PNG", "WEBP")] + [encode(noise[..., :3], "JPEG")]
    processes = set()
    for file in files:
        assert np.array_equal(ask(decoder, file), decode(file, SPEC))
        processes.add(process_of(decoder).pid)
    assert len(processes) == 1


def test_refusals_are_the_servers_own(decoder, encode):
    file = encode(np.zeros((40, 30, 3), np.uint8))
    for content, max_pixels in ((b"hello", 100), (file[:60], 10**6), (file, 1199)):
        with pytest.raises(Refusal) as expected:
            decode(content, SPEC, max_pixels=max_pixels)
        answer = ask(decoder, content, max_pixels=max_pixels)
        assert (type(answer), str(answer)) == (expected.type, str(expected.value))


def long_jpeg(encode):
    """Seconds of work in few bytes, which the server refuses before it comes here."""
    content = encode(np.full((2000, 2000), 128, np.uint8), "JPEG", progressive=True)
    return content[:-2] + 3000 * content[content.rindex(b"\xff\xda") : -2] + content[-2:]


@pytest.mark.parametrize(("limit_s", "patience_s"), [(0.1, 60), (60, 0.2)])
def test_a_decoder_that_takes_too_long_is_ended_and_replaced(encode, limit_s, patience_s):
    ends = []
    decoder = Decoder(limit_s, patience_s=60, on_end=lambda: ends.append(process_of(decoder).pid))
    small = encode(np.zeros((8, 8, 3), np.uint8))
    ask(decoder, small)
    ended = process_of(decoder)
    decoder._patience_s = patience_s
    answer = ask(decoder, long_jpeg(encode))
    assert isinstance(answer, TookTooLong)
    assert str(answer) == f"the image takes longer than {limit_s:g} s to decode; send a smaller one"
    assert ended.poll() is not None
    decoder._patience_s = 60
    assert ask(decoder, small).shape == (8, 8, 3)
    assert process_of(decoder).pid != ended.pid
    assert ends == [ended.pid]
    decoder.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which is Linux's")
def test_an_image_gets_the_memory_that_it_announced(decoder, encode):
    file = encode(np.zeros((6000, 6000), np.uint8))
    answer = ask(decoder, file, num_bytes=10**6)
    assert isinstance(answer, TooManyPixels)
    assert "more memory than its header says" in str(answer)
    assert ask(decoder, file, num_bytes=4 * 10**8).shape == (8, 8, 3)


def test_a_process_that_ends_by_itself_is_the_problem_of_one_image(decoder, encode):
    small = encode(np.zeros((8, 8, 3), np.uint8))
    ask(decoder, small)
    decoder.kill()
    assert str(ask(decoder, small)) == "the image crashes its decoder; save it again"
    assert ask(decoder, small).shape == (8, 8, 3)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="read from /proc, which is Linux's")
def test_a_process_holds_no_key(decoder, encode, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    ask(decoder, encode(np.zeros((8, 8, 3), np.uint8)))
    environment = Path(f"/proc/{process_of(decoder).pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"secret" not in environment


def test_a_closed_decoder_leaves_no_process(decoder, encode):
    ask(decoder, encode(np.zeros((8, 8, 3), np.uint8)))
    process = process_of(decoder)
    decoder.close()
    assert process.poll() is not None
    decoder.close()
