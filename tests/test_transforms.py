"""Random changes to a batch, and normalisation."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Generator, Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from o2cap.data import transforms
from o2cap.data.transforms import (
    MEAN,
    STD,
    augment,
    change,
    draw_changes,
    normalise,
)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


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
    pipeline = Compose([ToTensor(), Normalize(MEAN, STD)])
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


def test_flip_never_always_and_half_the_time() -> None:
    pixels = random_batch(400, 6, 4)
    assert still(pixels).equal(normalise(pixels))  # nothing asked for
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
        white = torch.full((120, height, 24, 3), 255, dtype=torch.uint8)
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
    boxes = erased_boxes(120, 60, 300, 0.5).double()
    assert 150 - 35 <= len(boxes) <= 150 + 35  # 4 standard deviations
    area = boxes.prod(dim=1) / (120 * 60)
    aspect = boxes[:, 0] / boxes[:, 1]
    assert 0.018 < area.min() < 0.04
    assert 0.35 < area.max() < 0.41
    assert 0.25 < aspect.min() < 0.45
    assert 2.8 < aspect.max() < 3.6
    assert boxes[:, 0].max() < 120
    assert boxes[:, 1].max() < 60


def test_erasing_is_uniform_in_area_where_every_box_fits() -> None:
    # In a square picture at most 40 % large no try is refused below sqrt(3.3 * .4).
    boxes = erased_boxes(60, 60, 500, 1.0).double()
    assert len(boxes) == 500
    area = boxes.prod(dim=1) / 60**2
    small = area[area < 0.25]
    assert kstest(small, "uniform", args=(0.02, 0.23)).pvalue > 0.01


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


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_a_gpus_way_gives_the_same_pictures(
    jitter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a kernel a picture: gathers and masks, here on the CPU."""
    pixels = torch.randint(256, (12, 20, 10, 3), dtype=torch.uint8)
    for seed in range(5):
        found = []
        for by_picture in (True, False):
            monkeypatch.setattr(
                transforms, "_by_picture", lambda device, b=by_picture: b
            )
            generator = torch.Generator().manual_seed(seed)
            found.append(augment(pixels, generator, pad=0.2, jitter=jitter))
        assert torch.equal(*found)
        assert found[1].is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_drawn_at_once_is_its_batches_one_by_one() -> None:
    """And a share of a batch changes as in the whole."""
    pixels = torch.randint(256, (3, 12, 20, 10, 3), dtype=torch.uint8)
    one, two = seeded(1), seeded(1)
    changes = draw_changes(tuple(pixels.shape[:4]), one, pad=0.2)
    for i, batch in enumerate(pixels):
        whole = augment(batch, two, pad=0.2, jitter=0.3)
        found = change(batch, changes.select(i), pad=0.2, jitter=0.3)
        assert torch.equal(found, whole)
        own = changes.select((i, slice(3, 7)))
        share = change(batch[3:7], own, pad=0.2, jitter=0.3)
        assert torch.equal(share, whole[3:7])
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))
