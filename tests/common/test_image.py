import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

import common.image
from common.image import FORMATS, TooManyPixels, begins_as_an_image, decode
from common.refusal import Refusal
from common.spec import ImageSpec

GRAY = ImageSpec(8, 8, 1, (0.5,), (0.5,), resize=8)
COLOUR = ImageSpec(8, 8, 3, (0.5,) * 3, (0.5,) * 3, resize=8)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_an_image_of_the_right_size_keeps_every_pixel(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encode(Image.fromarray(pixels), kind, **options), COLOUR), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_of_a_uniform_image_becomes_the_same_gray(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 30), 255 << 8, np.uint16))
    else:
        image = Image.new("RGB", (30, 20), "white").convert(mode)
    content = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    for spec in (GRAY, COLOUR):
        assert decode(content, spec).min() >= 254


def test_transparent_pixels_lie_on_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert decode(encode(image), GRAY).min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert decode(encode(palette, transparency=0), GRAY).min() == 255


def test_the_shorter_side_is_resized_and_the_centre_cropped():
    pixels = np.zeros((16, 48, 1), np.uint8)
    pixels[:, 14:34] = 200  # the central square and, for interpolation, a rim of two pixels
    assert decode(encode(Image.fromarray(pixels[..., 0])), GRAY).min() == 200
    squeezed = ImageSpec(8, 8, 1, (0.5,), (0.5,), resize=None)
    assert decode(encode(Image.fromarray(pixels[..., 0])), squeezed)[0, :, 0][[0, 4, 7]].tolist() == [0, 200, 0]


@pytest.mark.parametrize("size", [(29, 29), (29, 200), (200, 58), (58, 58)])
def test_no_size_is_refused_where_rounding_passes_the_edge(size):
    spec = ImageSpec(28, 28, 3, (0.5,) * 3, (0.5,) * 3, resize=28)
    assert 28 * (min(size) / 28) > min(size)
    assert decode(encode(Image.new("RGB", size, "white")), spec).min() == 255


def test_an_oriented_photograph_is_turned_upright():
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    assert decode(encode(Image.fromarray(pixels), exif=exif.tobytes()), GRAY)[7].min() == 255


def test_extreme_aspect_ratios_cost_no_memory():
    assert decode(encode(Image.new("L", (60_000, 1))), GRAY).shape == (8, 8, 1)


def test_a_decompression_bomb_is_refused_from_its_header():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    with pytest.raises(TooManyPixels, match="the image is 60000x60000"):
        decode(bomb, GRAY)


@pytest.mark.parametrize("content", [b"", b"hello", b"GIF89a" + bytes(100), encode(Image.new("L", (90, 90)))[:-40]])
def test_what_is_no_whole_image_is_refused(content):
    with pytest.raises(
        Refusal,
        match=r"^(not a PNG, JPEG, .* image|the file is empty|the image is (a damaged GIF|cut short).*)",
    ):
        decode(content, GRAY)


def general(content, spec):
    """The same pixels by the way that every file but a plain PNG takes."""
    return decode(content, spec, crop=lambda image, spec: image)


@pytest.mark.parametrize(("spec", "mode"), [(GRAY, "L"), (COLOUR, "RGB")])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_plain_png_has_the_pixels_that_pillow_reads(spec, mode, level, monkeypatch):
    smooth = np.add.outer(np.arange(8), np.arange(8))[..., None] * np.arange(1, spec.channels + 1)
    noise = np.random.default_rng(0).integers(0, 256, smooth.shape)
    for pixels in (smooth, noise):
        content = encode(Image.fromarray(pixels.astype(np.uint8).squeeze(), mode=mode), compress_level=level)
        expected = general(content, spec)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", None)  # the general way is not taken
            assert np.array_equal(decode(content, spec), expected)


def test_a_png_that_is_not_plain_is_read_in_the_general_way():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    gray = Image.fromarray(pixels)
    palette = gray.convert("P")
    exif = Image.Exif()
    exif[0x0112] = 3
    oriented, other_mode = encode(gray, exif=exif.tobytes()), encode(gray.convert("RGB"))
    transparent = encode(gray, transparency=int(pixels[0, 0]))
    for content in (oriented, other_mode, transparent, encode(palette), encode(gray) + b"more"):
        assert np.array_equal(decode(content, GRAY), general(content, GRAY))
    assert np.array_equal(decode(oriented, GRAY)[..., 0], pixels[::-1, ::-1])
    assert decode(transparent, GRAY)[0, 0, 0] == 255


def test_a_model_that_crops_crops_a_plain_png_too():
    spec = ImageSpec(8, 8, 1, (0.5,), (0.5,), resize=16)
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:6, 2:6] = 200
    assert decode(encode(Image.fromarray(pixels)), spec).mean() > 150


def test_the_limit_on_pixels_holds_for_a_plain_png():
    with pytest.raises(TooManyPixels, match="the image is 8x8, over the limit of 63 pixels"):
        decode(encode(Image.new("L", (8, 8))), GRAY, max_pixels=63)


def test_a_damaged_plain_png_is_refused_or_read_as_pillow_does():
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    content = encode(Image.fromarray(pixels))
    outcomes = set()
    for position in range(len(content)):
        for damaged in (
            content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :],
            content[:position] + content[position + 1 :],
            content[:position],
        ):
            results = []
            for read in (decode, general):
                try:
                    results.append(read(damaged, GRAY).tobytes())
                except Refusal as refusal:
                    results.append(str(refusal))
            assert results[0] == results[1], position
            outcomes.add(type(results[0]))
    assert outcomes == {str, bytes}


def test_a_large_jpeg_is_decoded_small_and_comes_out_alike():
    """See DETAIL: two roundings of half a level and more are below one level rms."""
    ramp = np.add.outer(np.arange(600), np.arange(800))[..., None] // np.array([6, 9, 7])
    noise = np.random.default_rng(0).normal(0, 20, ramp.shape)
    content = encode(Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)), "JPEG", quality=90)
    seen = []

    def crop(image, spec):
        seen.append(image.size)
        return image.resize((spec.width, spec.height))

    spec = ImageSpec(32, 32, 3, (0.5,) * 3, (0.5,) * 3, resize=36)
    decode(content, spec, crop=crop)
    decode(content, spec, crop=crop, smallest_crop=0.25)  # a quarter of the area is enlarged no more than the whole
    assert seen == [(100, 75), (200, 150)]
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        whole = decode(encode(image, "BMP"), spec)
    difference = decode(content, spec).astype(float) - whole
    assert 0 < np.sqrt(np.mean(difference**2)) < 1


def test_a_jpeg_that_is_not_far_larger_than_the_input_keeps_every_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (31, 40, 3), dtype=np.uint8)
    content = encode(Image.fromarray(pixels), "JPEG")
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert np.array_equal(decode(content, COLOUR), decode(encode(image, "BMP"), COLOUR))


def animation():
    """Two frames of noise; of the first, colour 0 is transparent. A comment and a loop stand before it."""
    noise = np.random.default_rng(1).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    noise[:, 0, 0] = 0
    frames = [Image.fromarray(pixels) for pixels in noise]
    palette = [value for index in range(256) for value in (index, 255 - index, index // 2)]
    for frame in frames:
        frame.putpalette(palette)
    pixels = noise[0]
    content = encode(
        frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0, comment=b"hello", loop=0
    )
    expected = np.stack([pixels, 255 - pixels, pixels // 2], axis=-1)
    expected[pixels == 0] = 255
    return content, expected


def test_of_a_gif_the_first_frame_is_taken():
    content, expected = animation()
    assert np.array_equal(decode(content, COLOUR), expected)


def before_first_frame(content, blocks):
    end = 13 + (3 << ((content[10] & 7) + 1))
    return content[:end] + blocks + content[end:]


@pytest.mark.parametrize("unit", [b"\x21\x01\0", b"\x21\xfe\x01a\0", b"\x21\xff\x01a\x01b\0"])
def test_a_gif_full_of_comments_is_read_to_a_limit(unit):
    content, expected = animation()
    assert np.array_equal(decode(before_first_frame(content, unit * 1000), COLOUR), expected)
    with pytest.raises(Refusal, match="over 10,000 blocks before its first frame; send it as PNG"):
        decode(before_first_frame(content, unit * 20_000), COLOUR)


def test_a_gif_is_bounded_by_its_screen_and_by_its_frame():
    content, _ = animation()
    descriptor = content.index(b"\x2c" + bytes(4) + struct.pack("<HH", 8, 8))
    huge = struct.pack("<HH", 60_000, 60_000)
    for large in (content[:6] + huge + content[10:], content[: descriptor + 5] + huge + content[descriptor + 9 :]):
        with pytest.raises(TooManyPixels, match="the image is 60000x60000"):
            decode(large, COLOUR)


def test_a_gif_cut_short_is_refused_wherever_it_is():
    content = encode(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), "GIF")
    for size in range(len(content) - 4):  # the last four say only that it ends
        with pytest.raises(
            Refusal, match=r"^(not a PNG|the file is empty|the image is (a damaged GIF file|cut short))"
        ):
            decode(content[:size], COLOUR)


@pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow was built without AVIF")
def test_an_avif_is_turned_as_it_says_and_one_that_is_damaged_is_refused():
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = Image.new("RGB", (16, 16), "black")
    halves.paste("white", (0, 0, 16, 8))
    content = encode(halves, "AVIF", quality=100, exif=exif.tobytes())
    pixels = decode(content, COLOUR)
    assert pixels[:, :3].mean() < 20  # what was above is on the right
    assert pixels[:, -3:].mean() > 235
    with pytest.raises(TooManyPixels, match="the image is 16x16, over the limit of 255 pixels"):
        decode(content, COLOUR, max_pixels=255)
    for damaged in (content[:60], content[:-40], content.replace(b"av1C", b"none"), content[:12]):
        with pytest.raises(Refusal, match=r"the image is (a damaged AVIF file|cut short)"):
            decode(damaged, COLOUR)


@pytest.mark.parametrize(
    ("content", "is_one"),
    [
        *((encode(Image.new("RGB", (8, 8)), kind), True) for kind in (*FORMATS, "TIFF", "ICO")),
        (b"", False),
        (b"image=%89PNG", False),
        (b"{}", False),
    ],
)
def test_the_first_bytes_of_an_image_tell_it_from_a_form(content, is_one):
    assert begins_as_an_image(content) == is_one


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PDF", "SVG", *(["AVIF"] if "AVIF" not in FORMATS else [])])
def test_other_images_are_refused_by_their_name(kind):
    text = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    content = text if kind == "SVG" else encode(Image.new("RGB", (16, 16)), kind)
    with pytest.raises(Refusal, match=f"the image is {kind}, which is not decoded here; convert it to PNG or JPEG"):
        decode(content, COLOUR)


def of_every_mode():
    pixels = np.random.default_rng(3).integers(0, 256, (30, 41, 4), dtype=np.uint8)
    colour = Image.fromarray(pixels[..., :3])
    palette = colour.quantize(200)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "I;16": encode(Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])),
        "1": encode(colour.convert("1")),
        "LA": encode(Image.fromarray(pixels).convert("LA")),
        "P": encode(palette),
        "P, transparent": encode(palette, transparency=bytes(range(200))),
        "RGB": encode(colour),
        "RGB, transparent": encode(colour, transparency=tuple(map(int, pixels[0, 0, :3]))),
        "RGBA, turned": encode(Image.fromarray(pixels), exif=exif.tobytes()),
        "CMYK": encode(colour.convert("CMYK"), "JPEG", subsampling=0),
    }


@pytest.mark.parametrize("kind", of_every_mode())
@pytest.mark.parametrize("spec", [GRAY, COLOUR])
def test_a_large_image_converted_in_bands_has_the_pixels_of_one_converted_whole(kind, spec, monkeypatch):
    content = of_every_mode()[kind]
    whole = decode(content, spec)
    monkeypatch.setattr("common.image._BAND_PIXELS", 4 * 41)
    assert np.array_equal(decode(content, spec), whole)


def test_sixteen_bits_are_not_widened():
    content = encode(Image.fromarray(np.full((1500, 1500), 255 << 8, np.uint16)))
    tracemalloc.start()
    try:
        assert decode(content, GRAY).min() == 255
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20  # int64 would take that for a band of a mebipixel, and 18 MB for the whole


def test_a_large_jpeg_decodes_itself_smaller_and_looks_the_same(monkeypatch):
    smooth = Image.linear_gradient("L").resize((640, 640))
    content, sizes = encode(smooth, "JPEG", quality=95), []
    crop = common.image._centre_crop
    monkeypatch.setattr(
        common.image, "_centre_crop", lambda image, spec: (sizes.append(image.size), crop(image, spec))[1]
    )
    reduced, whole = decode(content, GRAY).astype(int), decode(encode(smooth), GRAY).astype(int)
    assert sizes == [(80, 80), (640, 640)]
    assert abs(reduced - whole).max() <= 2  # one from the JPEG's quantization, one from rounding
    nearly = encode(smooth.resize((31, 31)), "JPEG")
    decode(nearly, GRAY)
    assert sizes[-1] == (31, 31)
