"""Decoding: every mode, every damage, one size; in memory or on the disk."""

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from o2cap.data.images import ImageSet
from o2cap.data.loading import decode, find_grey_range, read_picture
from o2cap.errors import InputError


def noise_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_set(folder: Path, count: int) -> ImageSet:
    """PNG files of different sizes and contents."""
    paths = []
    for i in range(count):
        paths.append(folder / f"{i:02}.png")
        Image.fromarray(noise_picture(20 + i, 10 + 2 * i, seed=i)).save(paths[-1])
    return ImageSet(paths, torch.arange(count) % 3, torch.arange(count) % 5)


# ------------------------------------------ one picture


def test_resize_is_bicubic_as_in_pillow(tmp_path: Path) -> None:
    original = Image.fromarray(noise_picture(37, 21))
    original.save(tmp_path / "a.png")
    expected = np.asarray(original.resize((16, 32), Image.Resampling.BICUBIC))
    found = read_picture(tmp_path / "a.png", 32, 16)
    assert found.shape == (32, 16, 3) and found.dtype == np.uint8
    assert np.array_equal(found, expected)
    # of the right size it is kept bit for bit
    assert np.array_equal(read_picture(tmp_path / "a.png", 37, 21), original)


def flat(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (6, 8), value)


def palette(mode: str) -> Image.Image:
    picture = flat("P", 3)
    picture.putpalette([0, 0, 0] * 3 + [10, 120, 250] + [0, 0, 0] * 252)
    return picture.convert("PA") if mode == "PA" else picture


def deep(kind: str) -> Image.Image:
    """A quarter of the way from black, 7000, to white, 7400."""
    return Image.fromarray(np.full((8, 6), 7100, dtype=kind))


GREY, BLUE = (77, 77, 77), (10, 120, 250)
QUARTER = (64, 64, 64)
MODES: dict[str, tuple[Callable[[], Image.Image], str, tuple[int, int, int]]] = {
    "1": (lambda: flat("1", 1), "a.png", (255, 255, 255)),
    "L": (lambda: flat("L", 77), "a.png", GREY),
    "LA": (lambda: flat("LA", (77, 128)), "a.png", GREY),
    "P": (lambda: palette("P"), "a.png", BLUE),
    "P, gif": (lambda: palette("P"), "a.gif", BLUE),
    "PA": (lambda: palette("PA"), "a.tif", BLUE),
    "RGB": (lambda: flat("RGB", BLUE), "a.bmp", BLUE),
    "RGBX": (lambda: flat("RGBX", (*BLUE, 0)), "a.tif", BLUE),
    "RGBA": (lambda: flat("RGBA", (*BLUE, 128)), "a.png", BLUE),
    "RGBA, webp": (lambda: flat("RGBA", (0, 0, 0, 9)), "a.webp", (0, 0, 0)),
    "CMYK": (lambda: flat("CMYK", (0, 255, 255, 0)), "a.tif", (255, 0, 0)),
    "YCbCr": (lambda: flat("YCbCr", (77, 128, 128)), "a.tif", GREY),
    # L* = 50.2 of a neutral grey is 119 in sRGB
    "LAB": (lambda: flat("LAB", (128, 128, 128)), "a.tif", (119, 119, 119)),
    "I;16": (lambda: deep("<u2"), "a.png", QUARTER),
    "I;16, tiff": (lambda: deep("<u2"), "a.tif", QUARTER),
    "I;16B": (lambda: deep(">u2"), "a.tif", QUARTER),
    "I": (lambda: deep("<i4"), "a.tif", QUARTER),
    "F": (lambda: deep("<f4"), "a.tif", QUARTER),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_by_its_rule(mode: str, tmp_path: Path) -> None:
    make, name, colour = MODES[mode]
    make().save(tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.mode == mode.split(",")[0].replace("RGBX", "RGB")
    found = read_picture(tmp_path / name, 8, 6, (7000, 7400))
    assert np.array_equal(found, np.broadcast_to(np.uint8(colour), (8, 6, 3)))


def test_every_mode_that_pillow_knows_has_a_rule() -> None:
    """HSV is in no file that is read; La alone is refused, by Pillow."""
    known = {mode.split(",")[0] for mode in MODES}
    native = {"I;16L", "I;16N", "RGBa"}  # other spellings of I;16 and RGBA
    assert known | native | {"HSV", "La"} >= set(Image.MODES)
    assert flat("HSV", (0, 255, 255)).convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="conversion from La"):
        flat("La", (77, 128)).convert("RGB")


def test_sixteen_bit_colour_keeps_its_upper_bits(tmp_path: Path) -> None:
    """A PNG of one pixel; Pillow reads such files and cannot write them."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        code = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + code

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    row = chunk(b"IDAT", zlib.compress(struct.pack(">B3H", 0, 10 << 8, 30783, 65535)))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + row + chunk(b"IEND", b""))
    assert read_picture(path, 1, 1).tolist() == [[[10, 120, 255]]]


# ------------------------------------------ more than 8 bits of grey


def thermal(folder: Path, kind: str, suffix: str) -> list[Path]:
    """Two pictures of a warm and a cold day, and a colour one; 54 levels in each."""
    paths = []
    for name, start in (("warm", 7200), ("cold", 7000)):
        levels = np.arange(start, start + 54).repeat(20)[: 40 * 27].reshape(40, 27)
        levels[0, 0] = 65535 if "u2" in kind else 0  # a dead pixel
        paths.append(folder / f"{name}{suffix}")
        Image.fromarray(levels.astype(kind)).save(paths[-1])
    paths.append(folder / "colour.png")
    Image.fromarray(noise_picture(40, 27)).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("<u2", ".png"), ("<u2", ".tif"), ("<i4", ".tif"), ("<f4", ".tif")],
)
def test_a_thermal_set_has_one_range(kind: str, suffix: str, tmp_path: Path) -> None:
    paths = thermal(tmp_path, kind, suffix)
    grey = find_grey_range([*paths, tmp_path / "nowhere.png"])
    assert grey is not None
    np.testing.assert_allclose(grey, (7000, 7253), atol=1)
    warm, cold, colour = (read_picture(path, 40, 27, grey) for path in paths)
    # Grey levels survive, and a warm day stays warmer than a cold one.
    for picture in (warm, cold):
        assert len(np.unique(picture[1:])) >= 53
        assert (np.diff(picture[1:, :, 0].flatten().astype(int)) >= 0).all()
    assert warm[1:].min() > cold[1:].max() > 40
    assert cold[1:].min() <= 2 and warm[1:].max() >= 253
    assert np.array_equal(colour, noise_picture(40, 27))
    assert find_grey_range(paths[2:]) is None
    images = ImageSet(paths, torch.arange(3), grey_range=grey)
    assert np.array_equal(decode(images, 40, 27)[0].numpy(), [warm, cold, colour])
    with pytest.raises(
        InputError, match=r"warm.* more than 8 bits of grey, .* neither"
    ):
        decode(replace(images, grey_range=None), 40, 27)


def test_grey_of_one_value_and_of_none(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 5, np.uint16)).save(tmp_path / "one.png")
    holes = np.full((4, 4), np.nan, np.float32)
    Image.fromarray(holes).save(tmp_path / "nan.tif")
    grey = find_grey_range([tmp_path / "one.png", tmp_path / "nan.tif"])
    assert grey == (5, 6)
    assert read_picture(tmp_path / "one.png", 4, 4, grey).max() == 0
    with pytest.raises(InputError, match=r"nan\.tif .* no finite numbers"):
        read_picture(tmp_path / "nan.tif", 4, 4, grey)


# ------------------------------------------ EXIF


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    3: lambda a: a[::-1, ::-1],
    6: lambda a: np.rot90(a, 3),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("turned", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_rotation_noted_in_exif_is_applied(
    turned: int, suffix: str, tmp_path: Path
) -> None:
    stored = noise_picture(12, 6)
    exif = Image.Exif()
    exif[274] = turned
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
    expected = UPRIGHT[turned](stored)
    found = read_picture(tmp_path / f"a{suffix}", *expected.shape[:2])
    assert np.array_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*(tag|EXIF|Truncated):UserWarning")
def test_damaged_exif_is_no_reason_to_refuse_a_picture(tmp_path: Path) -> None:
    """Its rotation counts as far as it can be read."""
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[271], exif[274], exif[282] = "maker", 6, 72.0
    Image.fromarray(noise_picture(12, 6)).save(path, exif=exif, quality=95)
    whole, content = read_picture(path, 6, 12), path.read_bytes()
    start = content.index(b"Exif\0\0") + 6
    end = start + int.from_bytes(content[start - 8 : start - 6], "big") - 8
    chance, turned = np.random.default_rng(0), 0
    for _ in range(60):
        broken = bytearray(content)
        broken[chance.integers(start, end)] = chance.integers(256)
        path.write_bytes(broken)
        turned += np.array_equal(read_picture(path, 6, 12), whole)
    assert 30 < turned < 60
    # A tag of another type than it should be, beside a good rotation.
    place = content.index(b"\x01\x1a\x00\x05", start)
    broken = bytearray(content)
    broken[place + 3] = 2
    path.write_bytes(broken)
    assert np.array_equal(read_picture(path, 6, 12), whole)


# ------------------------------------------ what cannot be read


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_frame(name: str, tmp_path: Path) -> None:
    frames = [flat("RGB", (250, 0, 0)), flat("RGB", (0, 250, 0))]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as written:
        assert written.n_frames == 2
    found = read_picture(tmp_path / name, 8, 6)
    assert np.array_equal(found, np.broadcast_to(np.uint8((250, 0, 0)), (8, 6, 3)))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no picture":
        path.write_text("<html>404</html>")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        assert how == "missing"


DAMAGES = ["truncated", "empty", "no picture", "folder", "pipe", "missing"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("how", DAMAGES)
def test_an_unreadable_picture_is_named(how: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    Image.fromarray(noise_picture(40, 30)).save(path)
    damage(path, how)
    with pytest.raises(InputError, match="broken") as caught:
        read_picture(path, 8, 6)
    assert "--skip-unreadable" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absurdly_large_picture_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(noise_picture(40, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InputError, match=r"bomb\.png"):
        read_picture(tmp_path / "bomb.png", 8, 6)


# ------------------------------------------ all pictures


def test_decode_keeps_order_whatever_the_workers(tmp_path: Path) -> None:
    images = write_set(tmp_path, 23)
    expected = np.stack([read_picture(path, 16, 8) for path in images.paths])
    for workers in (0, 1, 2, 7):
        pixels, kept = decode(images, 16, 8, workers=workers)
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.numpy(), expected)
        assert kept == images


def test_decode_of_nothing() -> None:
    pixels, kept = decode(ImageSet([], torch.zeros(0, dtype=torch.int64)), 16, 8)
    assert pixels.shape == (0, 16, 8, 3)
    assert len(kept) == 0


def test_decode_stops_at_unreadable_pictures_and_counts_them(tmp_path: Path) -> None:
    images = write_set(tmp_path, 9)
    for i, how in ((3, "truncated"), (5, "empty"), (8, "missing")):
        damage(images.paths[i], how)
    with pytest.raises(InputError, match=r"03\.png .* 2 more") as caught:
        decode(images, 16, 8, workers=3)
    assert "\n" not in str(caught.value)


def test_decode_skips_exactly_the_unreadable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_set(tmp_path, 9)
    whole = [0, 2, 4, 6, 7]
    expected = [read_picture(images.paths[i], 16, 8) for i in whole]
    for how, i in zip(DAMAGES, (1, 3, 5, 8), strict=False):
        damage(images.paths[i], how)
    with caplog.at_level("WARNING", logger="o2cap"):
        pixels, kept = decode(images, 16, 8, skip_unreadable=True)
    assert np.array_equal(pixels.numpy(), np.stack(expected))
    assert list(kept.paths) == [images.paths[i] for i in whole]
    assert kept.camids.tolist() == [i % 3 for i in whole]
    assert kept.pids is not None
    assert kept.pids.tolist() == [i % 5 for i in whole]
    assert "4 of 9" in caplog.text
    assert "01.png" in caplog.text


def test_decode_stops_when_nothing_is_readable(tmp_path: Path) -> None:
    images = write_set(tmp_path, 3)
    for path in images.paths:
        damage(path, "empty")
    with pytest.raises(InputError, match=r"00\.png .* 2 more cannot be read"):
        decode(images, 16, 8, skip_unreadable=True)


def test_decode_goes_to_disk_when_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_set(tmp_path, 6)
    expected, _ = decode(images, 16, 8)
    size = 6 * 16 * 8 * 3
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    # a third of what is free is the limit: one byte less sends it to disk
    for free, on_disk in ((3 * size, False), (3 * size - 1, True)):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free)
        )
        caplog.clear()
        with caplog.at_level("INFO", logger="o2cap"):
            pixels, _ = decode(images, 16, 8)
        assert ("kept in a file" in caplog.text) == on_disk
        assert pixels.equal(expected)
        assert list(scratch.iterdir()) == []  # nothing is left behind
    damage(images.paths[0], "empty")
    pixels, kept = decode(images, 16, 8, skip_unreadable=True)
    assert pixels.equal(expected[1:])
    assert len(kept) == 5


def test_decode_says_when_the_disk_is_too_small_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_set(tmp_path, 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 16 * 8 * 3 - 1, limits[1]))
        with pytest.raises(InputError, match=r"GiB, which neither .* TMPDIR"):
            decode(images, 16, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
