"""Features equal what the model gives one picture at a time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from o2cap.backbone import ReIDModel, build_model
from o2cap.data.images import ImageSet
from o2cap.data.loading import decode
from o2cap.data.transforms import normalise
from o2cap.features import autocast, extract

SIZE = {"height": 32, "width": 16}


@pytest.fixture(scope="module")
def model() -> ReIDModel:
    """A network whose batch-norm statistics are not those of a fresh one."""
    torch.manual_seed(0)
    model = build_model("tiny_resnet", "none", **SIZE)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 16))
    return model.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(11):
        paths.append(Path(folder, f"{i:02}.png"))
        pixels = rng.integers(0, 256, (24 + i, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return ImageSet(paths, torch.zeros(11, dtype=torch.int64))


@pytest.fixture
def pixels(images: ImageSet) -> Iterator[Tensor]:
    decoded, _ = decode(images, 32, 16)
    before = decoded.clone()
    yield decoded
    assert decoded.equal(before)  # whatever a test does, extraction changes nothing


def test_equals_one_by_one(model: ReIDModel, pixels: Tensor) -> None:
    with torch.no_grad():
        expected = torch.cat([model(normalise(one[None])) for one in pixels])
    found = extract(model, pixels, **SIZE)
    assert found.dtype == torch.float32
    assert found.shape == (11, model.dim)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(11))


def test_order_and_number_of_pictures_are_irrelevant(
    model: ReIDModel, pixels: Tensor
) -> None:
    many = pixels.repeat(200, 1, 1, 1)  # several batches
    order = torch.randperm(len(many))
    torch.testing.assert_close(
        extract(model, many[order], **SIZE),
        extract(model, pixels, **SIZE).repeat(200, 1)[order],
        rtol=1e-4,
        atol=1e-5,
    )


def test_files_and_decoded_pixels_agree(
    model: ReIDModel, images: ImageSet, pixels: Tensor
) -> None:
    assert extract(model, images, **SIZE).equal(extract(model, pixels, **SIZE))


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_statistics_are_as_before(
    model: ReIDModel, pixels: Tensor, training: bool
) -> None:
    model.train(training)
    try:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found = extract(model, pixels, **SIZE)
        assert model.training == training
        assert model.bottleneck.training == training
        for name, value in model.state_dict().items():
            assert value.equal(state[name])
    finally:
        model.eval()
    # whatever the mode before, features are those of evaluation mode
    assert found.equal(extract(model, pixels, **SIZE))


def test_mode_is_restored_after_a_fault(model: ReIDModel) -> None:
    model.train()
    try:
        with pytest.raises(RuntimeError):
            extract(model, torch.zeros(2, 32, 16, 4, dtype=torch.uint8), **SIZE)
        assert model.training
    finally:
        model.eval()


def test_bf16_is_near_and_still_float32(model: ReIDModel, pixels: Tensor) -> None:
    full = extract(model, pixels, **SIZE)
    mixed = extract(model, pixels, **SIZE, precision="bf16")
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.norm(dim=1), torch.ones(11))
    assert not mixed.equal(full)  # it was used
    assert ((mixed * full).sum(dim=1) > 0.99).all()


def test_nothing_in_nothing_out(model: ReIDModel) -> None:
    empty = ImageSet([], torch.zeros(0, dtype=torch.int64))
    assert extract(model, empty, **SIZE).shape == (0, model.dim)


def test_progress_is_silent_in_a_log_file(
    model: ReIDModel, pixels: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    extract(model, pixels, **SIZE)
    assert capfd.readouterr() == ("", "")


def test_autocast_off_changes_nothing() -> None:
    a = torch.randn(3, 3)
    with autocast(torch.device("cpu"), "off"):
        assert (a @ a).dtype == torch.float32
    with autocast(torch.device("cpu"), "bf16"):
        assert (a @ a).dtype == torch.bfloat16
