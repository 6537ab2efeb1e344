"""Bodies that a server must survive: damaged, enormous, lying and nonsensical, the same ones for a seed."""

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from common.image import FORMATS


@dataclass(frozen=True)
class Request:
    what: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def requests(seed: int = 0) -> Iterator[Request]:
    """More than 2,000 requests for POST /predict, none of which a well-behaved client would send."""
    rng = np.random.default_rng(seed)
    files = dict(sound_files(rng))
    yield from unusual(files)
    yield from truncated(files, rng)
    yield from flipped(files, rng)
    yield from noise(rng)
    yield from enormous()
    yield from broken_forms(files["png-rgb"], rng)
    yield from broken_json(files["png-rgb"], rng)
    yield from lying_headers(files["png-rgb"])


def sound_files(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Small whole images of many formats and modes."""
    pixels = rng.integers(0, 256, (24, 20, 4), dtype=np.uint8)
    grey, colour, transparent = (
        Image.fromarray(pixels[..., 0]),
        Image.fromarray(pixels[..., :3]),
        Image.fromarray(pixels),
    )
    palette = colour.convert("P")
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    kinds = {
        "png-grey": (grey, "PNG", {}),
        "png-rgb": (colour, "PNG", {}),
        "png-rgba": (transparent, "PNG", {}),
        "png-palette": (palette, "PNG", {}),
        "png-palette-transparent": (palette, "PNG", {"transparency": 3}),
        "png-16": (deep, "PNG", {}),
        "png-1": (grey.convert("1"), "PNG", {}),
        "png-animated": (colour, "PNG", {"save_all": True, "append_images": [transparent.convert("RGB")]}),
        "jpeg": (colour, "JPEG", {}),
        "jpeg-grey": (grey, "JPEG", {}),
        "jpeg-progressive": (colour, "JPEG", {"progressive": True}),
        "jpeg-cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "webp": (colour, "WEBP", {}),
        "webp-lossless": (transparent, "WEBP", {"lossless": True}),
        "webp-animated": (colour, "WEBP", {"save_all": True, "append_images": [transparent.convert("RGB")]}),
        "bmp": (colour, "BMP", {}),
        "gif": (palette, "GIF", {}),
        "gif-animated": (palette, "GIF", {"save_all": True, "append_images": [grey.convert("P")]}),
        "tiff": (colour, "TIFF", {}),
        "ico": (colour, "ICO", {}),
    }
    if "AVIF" in FORMATS:
        kinds |= {"avif": (colour, "AVIF", {}), "avif-alpha": (transparent, "AVIF", {"speed": 10})}
    for name, (image, kind, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, format=kind, **options)
        yield name, file.getvalue()


def unusual(files: dict[str, bytes]) -> Iterator[Request]:
    """Whole files of every format, those that the server does not take too."""
    for name, content in files.items():
        yield Request(f"whole {name}", content)
        yield Request(f"{name} said to be a jpeg", content, {"Content-Type": "image/jpeg"})


def truncated(files: dict[str, bytes], rng: np.random.Generator, each: int = 35) -> Iterator[Request]:
    for name, content in files.items():
        for length in rng.integers(0, len(content), each):
            yield Request(f"{name} cut at {length}", content[:length])


def flipped(files: dict[str, bytes], rng: np.random.Generator, each: int = 45) -> Iterator[Request]:
    for name, content in files.items():
        for _ in range(each):
            damaged = np.frombuffer(content, np.uint8).copy()
            places = rng.integers(0, len(damaged), rng.integers(1, 9))
            damaged[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
            yield Request(f"{name} with bits flipped at {sorted(places.tolist())}", damaged.tobytes())


def noise(rng: np.random.Generator, num: int = 150) -> Iterator[Request]:
    starts = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"BM", b"GIF89a")
    for index in range(num):
        start = starts[index % len(starts)]
        yield Request(f"noise {index} after {start!r}", start + rng.bytes(int(rng.integers(1, 3000))))


def enormous() -> Iterator[Request]:
    """Headers that promise more than any memory holds, and bodies that unpack to it."""
    for width, height in (
        (60_000, 60_000),
        (2**31 - 1, 1),
        (1, 2**31 - 1),
        (2**31 - 1, 2**31 - 1),
        (0, 0),
        (0, 9),
        (9, 0),
    ):
        yield Request(f"png of {width}x{height}", png(width, height, b""))
        yield Request(f"bmp of {width}x{height}", bmp(width, height))
        yield Request(f"jpeg of {width}x{height}", jpeg(width & 0xFFFF, height & 0xFFFF))
        yield Request(f"webp of {width}x{height}", webp(max(1, width), max(1, height)))
    zeros = zlib.compress(bytes(30_000_000), 9)
    yield Request("png whose rows unpack to 30 MB", png(8, 8, zeros))
    yield Request("png of 8000x7000 from 60 kB", png(8000, 7000, zlib.compress(bytes(7000 * 8001), 9)))
    yield Request("png with a text chunk of 30 MB", png(8, 8, zlib.compress(bytes(8 * 9)), text=zeros))
    packed = gzip.compress(bytes(20_000_000))
    yield Request("gzip bomb", packed, {"Content-Encoding": "gzip", "Content-Type": "image/png"})
    yield Request("zip file", b"PK\x03\x04" + packed)


def broken_forms(sound: bytes, rng: np.random.Generator) -> Iterator[Request]:
    head = (
        b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    whole = head + sound + b"\r\n--edge--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=edge"}
    for length in rng.integers(0, len(whole), 100):
        yield Request(f"form cut at {length}", whole[:length], kind)
    for _ in range(100):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(head), 3)] = rng.integers(0, 256, 3)
        yield Request("form with a damaged head", damaged.tobytes(), kind)
    for name, header in {
        "no boundary": "multipart/form-data",
        "an empty boundary": "multipart/form-data; boundary=",
        "another boundary": "multipart/form-data; boundary=other",
        "a long boundary": f"multipart/form-data; boundary={'x' * 5000}",
        "a boundary that is no text": "multipart/form-data; boundary=\xff\xfe",
        "a strange charset": "multipart/form-data; boundary=edge; charset=nonsense",
    }.items():
        yield Request(f"form with {name}", whole, {"Content-Type": header})
    yield Request(
        "form with 3,000 parts", head.replace(b"\r\n\r\n", b"\r\n\r\nx\r\n", 1) * 3000 + b"--edge--\r\n", kind
    )
    yield Request(
        "form with 3,000 fields", b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 3000, kind
    )
    yield Request("form with a head of 1 MB", head[:-4] + b"\r\nX-Long: " + b"y" * 10**6 + b"\r\n\r\n" + whole, kind)
    yield Request("form whose part has no name", b"--edge\r\n\r\nabc\r\n--edge--\r\n", kind)
    yield Request(
        "form whose file has an unknown encoding",
        whole.replace(b"Content-Type: image/png", b"Content-Transfer-Encoding: base64"),
        kind,
    )


def broken_json(sound: bytes, rng: np.random.Generator) -> Iterator[Request]:
    kind, text = {"Content-Type": "application/json"}, base64.b64encode(sound).decode()
    documents = [
        *(
            b"",
            b"null",
            b"[]",
            b"{}",
            b"1",
            b'"images"',
            b"NaN",
            b'{"images": NaN}',
            b'{"images": [NaN]}',
            b"{",
            b"\xff",
        ),
        *(b'{"images": {}}', b'{"images": []}', b'{"images": [null]}', b'{"images": [1e999]}', b'{"images": [[]]}'),
        b'{"images": ["' + b"A" * 100_001 + b'"]}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"images": [' + b"1" * 50_000 + b"]}",
        b'{"images": ["\xd8\x00"]}',
        b'{"images": ["\\ud800"]}',
        json.dumps({"images": [text] * 5000}).encode(),
        json.dumps({"images": ["data:image/png;base64," + text]}).encode(),
        json.dumps({"images": [text[:-3]]}).encode(),
        json.dumps({"images": [text.replace("A", "\u00e9")]}).encode(),
        json.dumps({"images": [text], "shape": [-1, 2**63, 0]}).encode(),
    ]
    for document in documents:
        yield Request(f"JSON {document[:40]!r}", document, kind)
    whole = json.dumps({"images": [text]}).encode()
    for length in rng.integers(1, len(whole), 100):
        yield Request(f"JSON cut at {length}", whole[:length], kind)
    for _ in range(100):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(whole), 2)] = rng.integers(0, 256, 2)
        yield Request("JSON with damaged characters", damaged.tobytes(), kind)


def lying_headers(sound: bytes) -> Iterator[Request]:
    for kind in (
        "text/html",
        "application/x-www-form-urlencoded",
        "image/svg+xml",
        "application/pdf",
        "/",
        ";",
        "x" * 3000,
    ):
        yield Request(f"an image as {kind[:40]}", sound, {"Content-Type": kind})
    for name, value in {
        "Content-Encoding": "br, gzip, deflate",
        "Accept": "*/*;q=nonsense",
        "Expect": "200-maybe",
        "Range": "bytes=9-0",
        "X-Request-Id": "\x7f" * 500,
        "Traceparent": "00-zz-zz-zz",
        "Authorization": "Bearer",
        "Cookie": "a" * 4000,
        "Forwarded": 'for="[::1]:\'"',
    }.items():
        yield Request(f"{name}: {value[:20]!r}", sound, {name: value, "Content-Type": "image/png"})


def png(width: int, height: int, rows: bytes, *, text: bytes = b"") -> bytes:
    """A grey PNG with right checksums, whatever its header says."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    texts = chunk(b"zTXt", b"Comment\0\0" + text) if text else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + texts + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 70, 0, 54, 40, width, height, 1, 24, 0, 16, 0, 0, 0, 0) + bytes(16)


def jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose frame header is overwritten."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, format="JPEG")
    content = file.getvalue()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def webp(width: int, height: int) -> bytes:
    """The extended header alone: a canvas of up to 2^24 pixels a side."""
    size = ((width - 1) & 0xFFFFFF).to_bytes(3, "little") + ((height - 1) & 0xFFFFFF).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    return b"RIFF" + struct.pack("<I", len(body)) + body
