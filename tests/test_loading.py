"""Decoding, random changes, and which pictures are drawn when."""

import os
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, kstest
from torch import Generator, Tensor
from torchvision import transforms

from o2cap.data import loading
from o2cap.data.images import ImageSet
from o2cap.data.loading import (
    MEAN,
    STD,
    augment,
    decode,
    instance_batches,
    normalise,
    proxy_batches,
    read_picture,
)
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


# ------------------------------------------ normalisation and random changes


def random_batch(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=seeded(seed)
    )


def still(pixels: Tensor, seed: int = 0, **changes: float) -> Tensor:
    """Augment with nothing but the changes named."""
    nothing = {"flip": 0.0, "pad": 0.0, "erase": 0.0, "jitter": 0.0}
    return augment(pixels, seeded(seed), **(nothing | changes))


def as_bytes(pictures: Tensor) -> Tensor:
    """Undo the normalisation: uint8 [B, H, W, 3]."""
    mean, std = torch.tensor([MEAN, STD])
    return ((pictures.permute(0, 2, 3, 1) * std + mean) * 255).round().byte()


def test_normalise_equals_torchvision() -> None:
    pixels = random_batch(3, 9, 7)
    pipeline = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    expected = torch.stack([pipeline(picture.numpy()) for picture in pixels])
    found = normalise(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_normalise_takes_any_layout_and_leaves_its_input() -> None:
    pixels = random_batch(3, 9, 7)
    turned = pixels.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    assert normalise(turned).equal(normalise(pixels))
    floats = pixels.float()
    assert normalise(floats).equal(normalise(pixels))
    assert floats.equal(pixels.float())


def test_nothing_asked_for_is_normalisation_only() -> None:
    pixels = random_batch(4, 12, 6)
    assert still(pixels).equal(normalise(pixels))


def test_flip_always_and_half_the_time() -> None:
    pixels = random_batch(400, 6, 4)
    assert still(pixels, flip=1.0).equal(normalise(pixels.flip(2)))
    found = as_bytes(still(pixels, flip=0.5))
    flipped = (found == pixels.flip(2)).flatten(1).all(dim=1)
    kept = (found == pixels).flatten(1).all(dim=1)
    assert (flipped ^ kept).all()
    assert 160 <= int(flipped.sum()) <= 240  # 4 standard deviations


def test_crop_is_a_window_into_the_black_framed_picture() -> None:
    # Slow reference: try every window of the framed picture, flipped and not.
    pixels = random_batch(200, 8, 6).clamp(min=1)  # only the frame is 0
    border = 2
    found = as_bytes(still(pixels, flip=0.5, pad=border / 8))
    drawn = Counter()
    for picture, result in zip(pixels, found, strict=True):
        framed = torch.zeros(8 + 2 * border, 6 + 2 * border, 3, dtype=torch.uint8)
        framed[border:-border, border:-border] = picture
        matches = [
            (top, left, flip)
            for top in range(2 * border + 1)
            for left in range(2 * border + 1)
            for flip in (False, True)
            if (framed.flip(1) if flip else framed)[
                top : top + 8, left : left + 6
            ].equal(result)
        ]
        assert len(matches) == 1
        drawn[matches[0]] += 1
    # each of the 25 places, uniformly (chi-square at a fixed seed)
    places = Counter()
    for (top, left, _), times in drawn.items():
        places[top, left] += times
    counts = [places[t, le] for t in range(5) for le in range(5)]
    assert chisquare(counts).pvalue > 0.01


def test_the_frame_is_a_share_of_the_height() -> None:
    # the paper's 10 pixels at 256; 2 or 3 at 64
    for height, border in ((256, 10), (128, 5), (64, 2)):
        white = torch.full((200, height, 32, 3), 255, dtype=torch.uint8)
        black_rows = (as_bytes(still(white, pad=10 / 256)) == 0).all(dim=3).all(dim=2)
        assert int(black_rows.sum(dim=1).max()) == border


def erased_boxes(height: int, width: int, count: int, probability: float) -> Tensor:
    """Height and width of what was erased in each white picture, [M, 2]."""
    white = torch.full((count, height, width, 3), 255, dtype=torch.uint8)
    pictures = still(white, erase=probability)
    erased = (pictures == 0).all(dim=1)
    # nothing else changed, and what was erased is a full rectangle
    assert (pictures != 0).all(dim=1).eq(~erased).all()
    assert as_bytes(pictures)[~erased].eq(255).all()
    tall, wide = erased.any(dim=2).sum(dim=1), erased.any(dim=1).sum(dim=1)
    assert erased.flatten(1).sum(dim=1).equal(tall * wide)
    return torch.stack([tall, wide], dim=1)[tall > 0]


def test_erasing_fills_the_mean_colour_with_the_right_statistics() -> None:
    # Ledger 4: the fill is 0 after normalisation. Large enough that rounding the
    # sides to whole pixels is a small thing.
    boxes = erased_boxes(120, 60, 1000, 0.5).double()
    assert 500 - 64 <= len(boxes) <= 500 + 64  # 4 standard deviations
    area = boxes.prod(dim=1) / (120 * 60)
    aspect = boxes[:, 0] / boxes[:, 1]
    assert 0.018 < area.min() < 0.03
    assert 0.35 < area.max() < 0.41
    assert 0.25 < aspect.min() < 0.45
    assert 3.0 < aspect.max() < 3.6
    assert boxes[:, 0].max() < 120
    assert boxes[:, 1].max() < 60


def test_erasing_is_uniform_in_area_where_every_box_fits() -> None:
    # In a square picture at most 40 % large no try is refused below sqrt(3.3 * .4).
    boxes = erased_boxes(80, 80, 800, 1.0).double()
    area = boxes.prod(dim=1) / 80**2
    small = area[area < 0.25]
    assert kstest(small, "uniform", args=(0.02, 0.23)).pvalue > 0.01


def test_erasing_always_and_never() -> None:
    assert len(erased_boxes(64, 32, 200, 1.0)) == 200
    assert len(erased_boxes(64, 32, 200, 0.0)) == 0


def test_erased_boxes_reach_every_border() -> None:
    white = torch.full((1500, 20, 10, 3), 255, dtype=torch.uint8)
    erased = (still(white, erase=1.0) == 0).all(dim=1)
    for edge in (erased[:, 0], erased[:, -1], erased[:, :, 0], erased[:, :, -1]):
        assert edge.any()
    # in the mean the middle is hit most, left and right alike
    share = erased.float().mean(dim=0)
    torch.testing.assert_close(share, share.flip(1), rtol=0, atol=0.08)
    torch.testing.assert_close(share, share.flip(0), rtol=0, atol=0.08)


def test_jitter_changes_colours_and_keeps_the_range() -> None:
    pixels = random_batch(64, 8, 4)
    found = still(pixels, jitter=0.4)
    low = normalise(torch.zeros(1, 1, 1, 3, dtype=torch.uint8))
    high = normalise(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8))
    assert (found >= low - 1e-5).all()
    assert (found <= high + 1e-5).all()
    changed = (as_bytes(found) != pixels).flatten(1).any(dim=1)
    assert changed.all()
    # brightness differs from picture to picture, to both sides
    ratio = as_bytes(found).flatten(1).double().mean(dim=1) / pixels.flatten(
        1
    ).double().mean(dim=1)
    assert ratio.min() < 0.8
    assert ratio.max() > 1.15
    # stronger jitter changes more
    weak = (as_bytes(still(pixels, jitter=0.05)).int() - pixels.int()).abs()
    strong = (as_bytes(found).int() - pixels.int()).abs()
    assert weak.double().mean() < 0.4 * strong.double().mean()


def test_jitter_of_grey_tints_all_pixels_alike() -> None:
    grey = torch.full((5, 4, 4, 3), 100, dtype=torch.uint8)
    found = as_bytes(still(grey, jitter=0.4))
    assert (found == found[:, :1, :1]).all()
    assert (found[:, 0, 0].amax(dim=1) > found[:, 0, 0].amin(dim=1)).any()


FULL = {"flip": 0.5, "pad": 0.1, "erase": 0.5, "jitter": 0.4}


def test_augment_is_decided_by_its_generator_and_spares_its_input() -> None:
    pixels = random_batch(16, 16, 8)
    before = pixels.clone()
    torch.manual_seed(1)
    one = augment(pixels, seeded(3), **FULL)
    torch.manual_seed(2)  # the global generator has no say
    assert augment(pixels, seeded(3), **FULL).equal(one)
    assert not augment(pixels, seeded(4), **FULL).equal(one)
    assert pixels.equal(before)
    assert one.dtype == torch.float32
    assert one.shape == (16, 3, 16, 8)
    assert one.is_contiguous(memory_format=torch.channels_last)
    # two calls with one generator differ
    generator = seeded(3)
    augment(pixels, generator, **FULL)
    assert not augment(pixels, generator, **FULL).equal(one)


# ------------------------------------------ samplers

labels = st.lists(st.integers(-1, 7), min_size=1, max_size=60)


def numbered(rows: list[int]) -> Tensor:
    """Renumber so that every number from 0 on is in use, −1 kept."""
    known = sorted({row for row in rows if row >= 0})
    return torch.tensor([known.index(row) if row >= 0 else -1 for row in rows])


@given(
    rows=labels.filter(lambda rows: max(rows) >= 0),
    iterations=st.integers(1, 9),
    proxies=st.integers(1, 9),
    images=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_proxy_batches_on_any_labels(
    rows: list[int], iterations: int, proxies: int, images: int, seed: int
) -> None:
    label = numbered(rows)
    n_proxies = int(label.max()) + 1
    together = min(proxies, n_proxies)
    batches = proxy_batches(
        label, iterations, seeded(seed), proxies=proxies, images=images
    )
    assert batches.dtype == torch.int64
    assert batches.shape == (iterations, together * images)
    visited = label[batches].reshape(iterations, together, images)
    assert (visited >= 0).all()  # no outlier
    assert (visited == visited[..., :1]).all()  # images of a proxy stand together
    visited = visited[..., 0]
    for batch in visited.tolist():
        assert len(set(batch)) == together
    # images: distinct where the proxy has enough of them
    size = label[label >= 0].bincount()
    picks = batches.reshape(iterations * together, images).tolist()
    for proxy, drawn in zip(visited.flatten().tolist(), picks, strict=True):
        if size[proxy] >= images:
            assert len(set(drawn)) == images
    # a pass visits every proxy at most once; all but a last partial batch of them
    in_pass = n_proxies // together
    for start in range(0, iterations, in_pass):
        of_pass = visited[start : start + in_pass].flatten().tolist()
        assert len(set(of_pass)) == len(of_pass)


def test_a_pass_visits_every_proxy_once() -> None:
    label = torch.arange(24).repeat(4)
    batches = proxy_batches(label, 9, seeded(), proxies=8, images=4)
    passes = label[batches].reshape(3, 24, 4)[..., 0]
    for order in passes:
        assert sorted(order.tolist()) == list(range(24))
    assert not passes[0].equal(passes[1])  # reshuffled


def test_a_last_partial_batch_is_dropped_by_chance_not_by_number() -> None:
    label = torch.arange(11).repeat(4)
    batches = proxy_batches(label, 300, seeded(), proxies=8)
    visits = label[batches].reshape(300, 8, 4)[..., 0].flatten().bincount()
    # a pass is one batch: every proxy is left out in 3 of 11 passes
    assert chisquare(visits.numpy()).pvalue > 0.01
    assert visits.sum() == 2400


def test_fewer_images_than_asked_for_are_drawn_again() -> None:
    label = torch.tensor([0, 1, 1, -1])
    batches = proxy_batches(label, 200, seeded(), proxies=2, images=4)
    drawn = batches.reshape(400, 4)
    for row in drawn.tolist():
        assert set(row) in ({0}, {1}, {2}, {1, 2})
    counts = batches[label[batches] == 1].bincount(minlength=3)[1:]
    assert chisquare(counts.numpy()).pvalue > 0.01


def test_fewer_proxies_than_a_batch_wants() -> None:
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    batches = proxy_batches(label, 5, seeded(), proxies=8, images=2)
    assert batches.shape == (5, 6)
    for batch in batches:
        assert sorted(batch.tolist()) == [0, 1, 2, 3, 4, 5]


def test_more_proxies_than_draws() -> None:
    # Ledger 5: some are not visited; none is visited twice before all were once.
    label = torch.arange(1000)
    batches = proxy_batches(label, 10, seeded(), proxies=8, images=4)
    visited = label[batches].reshape(80, 4)[:, 0]
    assert visited.unique().numel() == 80


def test_one_proxy() -> None:
    batches = proxy_batches(torch.tensor([-1, 0, 0]), 3, seeded(), proxies=8, images=4)
    assert batches.shape == (3, 4)
    assert set(batches.flatten().tolist()) == {1, 2}


def test_no_proxy_is_refused() -> None:
    with pytest.raises(ValueError, match="no proxy"):
        proxy_batches(torch.tensor([-1, -1]), 3, seeded())


def test_every_image_of_a_proxy_is_as_likely_in_every_place() -> None:
    label = torch.tensor([0] * 6 + [1] * 5)
    batches = proxy_batches(label, 3000, seeded(1), proxies=2, images=4)
    for proxy, size, first in ((0, 6, 0), (1, 5, 6)):
        drawn = batches[label[batches] == proxy].reshape(3000, 4) - first
        for place in range(4):
            counts = drawn[:, place].bincount(minlength=size)
            assert chisquare(counts.numpy()).pvalue > 0.001
        # so are all ordered pairs of different images
        pairs = (drawn[:, 0] * size + drawn[:, 1]).bincount(minlength=size * size)
        pairs = pairs.reshape(size, size)
        assert pairs.diagonal().sum() == 0
        apart = pairs[~torch.eye(size, dtype=torch.bool)]
        assert chisquare(apart.numpy()).pvalue > 0.001


def test_samplers_are_decided_by_their_seed() -> None:
    label = torch.arange(40) % 13
    one = proxy_batches(label, 20, seeded(5))
    assert proxy_batches(label, 20, seeded(5)).equal(one)
    assert not proxy_batches(label, 20, seeded(6)).equal(one)
    one = instance_batches(40, 20, seeded(5), images=7)
    assert instance_batches(40, 20, seeded(5), images=7).equal(one)
    assert not instance_batches(40, 20, seeded(6), images=7).equal(one)


@settings(max_examples=50)
@given(
    n=st.integers(1, 50),
    iterations=st.integers(1, 12),
    images=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_instance_batches_pass_over_all_pictures(
    n: int, iterations: int, images: int, seed: int
) -> None:
    batches = instance_batches(n, iterations, seeded(seed), images=images)
    together = min(images, n)
    assert batches.shape == (iterations, together)
    assert batches.min() >= 0
    assert batches.max() < n
    in_pass = n // together
    for start in range(0, iterations, in_pass):
        seen = batches[start : start + in_pass].flatten().tolist()
        assert len(set(seen)) == len(seen)


# ------------------------------------------------------------ a share, and a GPU's way


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_a_gpus_way_gives_the_same_pictures(
    jitter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a kernel a picture: gathers and masks, here on the CPU."""
    pixels = torch.randint(256, (12, 20, 10, 3), dtype=torch.uint8)
    for seed in range(20):
        found = []
        for by_picture in (True, False):
            monkeypatch.setattr(loading, "_by_picture", lambda device, b=by_picture: b)
            generator = torch.Generator().manual_seed(seed)
            found.append(augment(pixels, generator, pad=0.2, jitter=jitter))
        assert torch.equal(*found)
        assert found[1].is_contiguous(memory_format=torch.channels_last)


def test_a_share_of_a_batch_changes_as_in_the_whole() -> None:
    pixels = torch.randint(256, (12, 20, 10, 3), dtype=torch.uint8)
    one, two = (torch.Generator().manual_seed(1) for _ in "ab")
    whole = augment(pixels, one, pad=0.2)
    assert torch.equal(augment(pixels, two, pad=0.2, rows=slice(3, 7)), whole[3:7])
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))
