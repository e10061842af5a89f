"""Decoding, random changes, and which pictures are drawn when."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Generator

from o2cap.data import loading
from o2cap.data.images import ImageSet
from o2cap.data.loading import decode, read_picture
from o2cap.errors import InputError


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


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
    assert found.shape == (32, 16, 3)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_a_picture_of_the_right_size_is_kept_bit_for_bit(tmp_path: Path) -> None:
    pixels = noise_picture(8, 6)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png", 8, 6), pixels)


def flat(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (6, 8), value)


def sixteen_bit(big_endian: bool) -> Image.Image:
    grey = np.full((8, 6), 200 * 256 + 17, dtype=">u2" if big_endian else "<u2")
    return Image.fromarray(grey)


def palette() -> Image.Image:
    picture = flat("P", 3)
    picture.putpalette([0, 0, 0] * 3 + [10, 120, 250] + [0, 0, 0] * 252)
    return picture


MODES: dict[str, tuple[Callable[[], Image.Image], str, tuple[int, int, int]]] = {
    "grey": (lambda: flat("L", 77), "a.png", (77, 77, 77)),
    "black and white": (lambda: flat("1", 1), "a.png", (255, 255, 255)),
    "grey with alpha": (lambda: flat("LA", (77, 128)), "a.png", (77, 77, 77)),
    "alpha": (lambda: flat("RGBA", (10, 120, 250, 128)), "a.png", (10, 120, 250)),
    "palette": (palette, "a.png", (10, 120, 250)),
    "palette gif": (palette, "a.gif", (10, 120, 250)),
    "cmyk": (lambda: flat("CMYK", (0, 255, 255, 0)), "a.tif", (255, 0, 0)),
    "16 bits": (lambda: sixteen_bit(False), "a.png", (200, 200, 200)),
    "16 bits, tiff": (lambda: sixteen_bit(False), "a.tif", (200, 200, 200)),
    "16 bits, big endian": (lambda: sixteen_bit(True), "a.tif", (200, 200, 200)),
}


@pytest.mark.parametrize("case", MODES.values(), ids=MODES)
def test_every_colour_mode_becomes_rgb(case: tuple, tmp_path: Path) -> None:
    make, name, colour = case
    make().save(tmp_path / name)
    found = read_picture(tmp_path / name, 8, 6)
    assert np.array_equal(found, np.broadcast_to(np.uint8(colour), (8, 6, 3)))


def test_a_rotation_noted_in_exif_is_applied(tmp_path: Path) -> None:
    upright = noise_picture(12, 6)
    lying = Image.fromarray(np.rot90(upright).copy())  # as a turned sensor stores it
    exif = Image.Exif()
    exif[274] = 6  # "turn by 90 degrees clockwise to show"
    lying.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png", 12, 6), upright)


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
    else:
        assert how == "missing"


DAMAGES = ["truncated", "empty", "no picture", "folder", "missing"]


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
    with pytest.raises(InputError, match="None of the 3"):
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
        assert ("not in memory" in caplog.text) == on_disk
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
        monkeypatch.delattr("os.posix_fallocate", raising=False)
        with pytest.raises(InputError, match=r"GiB, which neither .* TMPDIR"):
            decode(images, 16, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("how", ["reserve", "write"])
def test_room_on_the_disk_is_taken_before_it_is_used(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file that grows as it is written to kills the program on a full disk."""
    if how == "write":
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    size = 2**24 + 5000  # more than a block
    with (tmp_path / "file").open("w+b") as file:
        loading._reserve(file, size)
        found = os.fstat(file.fileno())
        assert found.st_size == size and found.st_blocks * 512 >= size


def test_processes_of_one_machine_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, size = write_set(tmp_path, 2), 2 * 16 * 8 * 3
    free = SimpleNamespace(available=3 * size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    caplog.set_level("INFO", "o2cap")
    decode(images, 16, 8)
    assert "not in memory" not in caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    decode(images, 16, 8)
    assert "not in memory" in caplog.text
