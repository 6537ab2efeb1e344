"""What the headers and the structure of files say of the work in them, held against Pillow and the process's memory."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.image import FORMATS, TooManyPixels
from common.refusal import Refusal
from common.spec import ImageSpec
from serve.decode.weigh import MAX_AVIF_SIZES, MAX_CHUNKS, MAX_RLE_PIXELS, MAX_SCANS, MAX_SEGMENTS, is_light, weigh

ROOT = Path(__file__).resolve().parents[3]
GREY = ImageSpec(28, 28, 1, (0.5,), (0.5,), resize=28)
COLOUR = ImageSpec(28, 28, 3, (0.5,) * 3, (0.5,) * 3, resize=28)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def weighed(content, spec=GREY, max_bytes=10**12):
    return weigh(content, spec, max_pixels=64_000_000, max_bytes=max_bytes)


def image(kind, width, height):
    """The bytes of an image of one of KINDS."""
    convert, file_format, options = KINDS[kind]
    return encode(convert(Image.effect_noise((width, height), 80).convert("RGB")), file_format, **options)


def mode(name):
    return lambda colour: colour.convert(name)


def sixteen_bits(colour):
    return Image.fromarray(np.zeros((colour.height, colour.width), np.uint16))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif.tobytes()}


KINDS = {  # all that weigh something else
    "png": (mode("RGB"), "PNG", {}),
    "png-turned": (mode("RGB"), "PNG", turned()),
    "png-rgba": (mode("RGBA"), "PNG", {}),
    "png-la": (mode("LA"), "PNG", {}),
    "png-l": (mode("L"), "PNG", {}),
    "png-1": (mode("1"), "PNG", {}),
    "png-p": (mode("P"), "PNG", {}),
    "png-p-transparent": (mode("P"), "PNG", {"transparency": 0}),
    "png-16": (sixteen_bits, "PNG", {}),
    "jpeg": (mode("RGB"), "JPEG", {}),
    "jpeg-turned": (mode("RGB"), "JPEG", turned()),
    "jpeg-progressive": (mode("RGB"), "JPEG", {"progressive": True, "subsampling": 0}),
    "jpeg-cmyk": (mode("CMYK"), "JPEG", {"progressive": True}),
    "webp": (mode("RGB"), "WEBP", {"method": 0}),
    "webp-lossless": (mode("RGB"), "WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "webp-alpha": (mode("RGBA"), "WEBP", {"method": 0}),
    "webp-turned": (mode("RGB"), "WEBP", {"method": 0, **turned()}),
    "bmp": (mode("RGB"), "BMP", {}),
    "bmp-1": (mode("1"), "BMP", {}),
}
AVIFS = {
    "avif": (mode("RGB"), "AVIF", {"speed": 10}),
    "avif-444": (mode("RGB"), "AVIF", {"speed": 10, "subsampling": "4:4:4"}),
    "avif-alpha": (mode("RGBA"), "AVIF", {"speed": 10}),
    "avif-turned": (mode("RGB"), "AVIF", {"speed": 10, **turned()}),
}
KINDS |= AVIFS if "AVIF" in FORMATS else {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_that_of_pillow(kind):
    content = image(kind, 37, 21)
    weight = weighed(content)
    assert (weight.width, weight.height) == Image.open(io.BytesIO(content)).size
    assert is_light(weight) != kind.startswith("avif")  # whose pixels say their size once more, for themselves


MEASURE = """
import io, sys
sys.path[0] = sys.argv[1]
from pathlib import Path
from common.image import FORMATS, decode
from common.spec import ImageSpec
from PIL import Image
Image.init()
if avif := sys.modules.get("PIL.AvifImagePlugin"):
    avif.DEFAULT_MAX_THREADS = 1  # as in serve/decode/worker.py
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
spec = eval(sys.argv[2])
for kind in FORMATS:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, kind)
    decode(file.getvalue(), spec)
before = peak()
decode(sys.stdin.buffer.read(), spec)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which is Linux's")
@pytest.mark.parametrize(("kind", "spec"), [*((kind, COLOUR) for kind in KINDS), ("png-rgba", GREY), ("webp", GREY)])
def test_no_image_takes_more_memory_than_it_weighs(kind, spec):
    """In a process of its own: the peak of one would hide the next one's."""
    content = image(kind, 2000, 1500)
    command = [sys.executable, "-c", MEASURE, ROOT, repr(spec)]
    done = subprocess.run(command, input=content, capture_output=True, check=True, timeout=60)
    assert int(done.stdout) < weighed(content, spec).num_bytes + 4 * 2**20  # the interpreter's own


@pytest.mark.slow
def test_a_heavier_image_weighs_more():
    for kind in ("png", "jpeg", "webp"):
        weights = [weighed(image(kind, size, size)) for size in (100, 400, 1200)]
        assert [weight.seconds for weight in weights] == sorted(weight.seconds for weight in weights)
        assert is_light(weights[0])
        assert not is_light(weights[-1])


def test_a_photograph_of_fifty_megapixels_weighs_little_as_a_jpeg():
    header = encode(Image.new("RGB", (16, 16)), "JPEG")
    at = header.index(b"\xff\xc0") + 5
    weight = weighed(header[:at] + struct.pack(">HH", 6000, 8000) + header[at + 4 :])
    assert (weight.width, weight.height) == (8000, 6000)
    assert weight.num_bytes < 16 * 2**20


def test_limits_on_pixels_and_memory_name_the_size():
    content = encode(Image.new("RGBA", (300, 200)), "PNG")
    with pytest.raises(TooManyPixels, match="the image is 300x200, over the limit of 59,999 pixels"):
        weigh(content, GREY, max_pixels=59_999, max_bytes=10**9)
    with pytest.raises(TooManyPixels, match=r"the image is 300x200 and takes . MB while it is decoded, over .* 1 MB"):
        weighed(content, max_bytes=10**6)


def progressive(num_more):
    content = encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + num_more * scan + content[-2:], content.count(b"\xff\xda")


def test_a_jpeg_of_many_scans_is_refused():
    _, num_scans = progressive(0)
    weighed(progressive(MAX_SCANS - num_scans)[0])
    with pytest.raises(Refusal, match=r"the JPEG has 101 scans, and 100 are accepted; save it again"):
        weighed(progressive(MAX_SCANS - num_scans + 1)[0])


@pytest.mark.parametrize("segment", [b"\xff\xfe\0\2", b"\xff", b"\0", b"\xff\xd0"])
def test_a_jpeg_of_many_segments_is_refused(segment):
    content = encode(Image.new("L", (8, 8)), "JPEG")
    weighed(content[:2] + 900 * segment + content[2:])
    with pytest.raises(Refusal, match="the JPEG has more than 1,000 segments before its pixels"):
        weighed(content[:2] + MAX_SEGMENTS * segment + content[2:])


def test_a_png_of_many_chunks_is_refused():
    content = encode(Image.new("L", (1, 1)), "PNG")
    chunk = bytes(4) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    weighed(content[:33] + MAX_CHUNKS * chunk + content[33:])
    with pytest.raises(Refusal, match=r"the PNG has more than 2\d\d chunks in 6,\d\d\d bytes; save it again"):
        weighed(content[:33] + 2 * MAX_CHUNKS * chunk + content[33:])


def test_a_large_bmp_of_runs_is_refused_and_a_small_one_is_heavy():
    def runs(width, height):
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 4, 0, 0, 256, 0) + bytes(1024)
        return b"BM" + struct.pack("<IHHI", 14 + len(header) + 4, 0, 0, 14 + len(header)) + header + b"\0\0\0\1"

    assert not is_light(weighed(runs(20, 20)))
    with pytest.raises(Refusal, match="the BMP is compressed and has 4,002,000 pixels"):
        weighed(runs(2000, MAX_RLE_PIXELS // 2000 + 1))


@pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow was built without AVIF")
def test_an_avif_of_many_sizes_is_refused_and_one_of_none_is_not_light():
    content = image("avif", 8, 8)
    size = b"ispe" + struct.pack(">III", 0, 9, 9)
    weighed(content + (MAX_AVIF_SIZES - 1) * size)
    with pytest.raises(Refusal, match="the AVIF has more than 64 sizes of its parts; save it again"):
        weighed(content + MAX_AVIF_SIZES * size)
    assert not is_light(weighed(content.replace(b"ispe", b"none")))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "webp-lossless", "webp-alpha", "bmp"])
def test_a_header_that_is_cut_short_is_left_to_the_decoder(kind):
    content = image(kind, 9, 9)
    for end in range(60):
        assert is_light(weighed(content[:end]))
