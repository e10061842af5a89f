"""Weights from files that may be anything."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from o2cap.backbone import ReIDModel, TinyResNet, build_model
from o2cap.errors import InputError
from o2cap.files import read_json
from o2cap.weights import EMBEDDED, read_state_dict
from o2cap_book import batch

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import pretrain

SMALL = {"height": 64, "width": 32}


def tiny_state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return TinyResNet().state_dict()


def loaded(model: ReIDModel, state: dict[str, Tensor]) -> bool:
    found = model.backbone.state_dict()
    return all(found[k].equal(v) for k, v in state.items() if "num_batches" not in k)


# ------------------------------------------ layouts that people have

LAYOUTS: dict[str, Any] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "module.": lambda state: {f"module.{k}": v for k, v in state.items()},
    "base.": lambda state: {f"base.{k}": v for k, v in state.items()},
    "MoCo": lambda state: {
        "state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}
        | {f"module.encoder_k.{k}": v + 1 for k, v in state.items()}
    },
    "DINO": lambda state: {
        "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()},
        "teacher": {f"backbone.{k}": v for k, v in state.items()}
        | {"head.mlp.0.weight": torch.zeros(3, 3)},
        "args": argparse.Namespace(lr=0.1),
    },
    "another classifier": lambda state: state | {"fc.weight": torch.rand(7, 96)},
    "no counters": lambda state: {
        k: v for k, v in state.items() if "num_batches" not in k
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_state_dict(layout: str, tmp_path: Path) -> None:
    state = tiny_state()
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth")
    assert loaded(build_model("tiny_resnet", str(tmp_path / "w.pth"), **SMALL), state)


def test_what_is_left_out_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"fc.weight": torch.rand(7, 96), "sie_embed": torch.rand(6, 1, 96)}
    torch.save(tiny_state() | more, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "o2cap"):
        build_model("tiny_resnet", str(tmp_path / "w.pth"), **SMALL)
    assert caplog.messages == ["left out of the weights: fc.weight, sie_embed"]


def test_safetensors_in_single_and_half_precision(tmp_path: Path) -> None:
    state = tiny_state()
    save_file(state, tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    assert loaded(build_model("tiny_resnet", path, **SMALL), state)
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "w.safetensors")
    model = build_model("tiny_resnet", path, **SMALL)
    assert next(model.parameters()).dtype == torch.float32


def test_torchvisions_files_fit(tmp_path: Path) -> None:
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = build_model("resnet18", str(tmp_path / "w.pth"), **SMALL).eval()
    for block in (network.layer4[0].conv1, network.layer4[0].downsample[0]):
        block.stride = (1, 1)
    network.fc = torch.nn.Identity()
    pictures = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        pooled = model.pooling(model.backbone(pictures))
        torch.testing.assert_close(pooled, network.eval()(pictures))


@pytest.mark.parametrize("grid", [(8, 4), (4, 2), (5, 5)])
def test_a_vit_of_transreid(
    grid: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As TransReID-SSL saves it: pretrained by DINO, or fine-tuned under `base.`."""
    theirs = build_model("timm:test_vit", "none", **SMALL).backbone[1].state_dict()
    rows, columns = grid
    theirs["pos_embed"] = torch.randn(1, 1 + rows * columns, 64)
    dino = {f"backbone.{k}": v for k, v in theirs.items()}
    tuned = {f"base.{k}": v for k, v in theirs.items()} | {
        "base.fc.weight": torch.zeros(9, 64),
        "bottleneck.weight": torch.zeros(64),
        "classifier.weight": torch.zeros(9, 64),
    }
    torch.save({"teacher": dino | {"head.x": torch.zeros(1)}}, tmp_path / "dino.pth")
    torch.save(tuned, tmp_path / "tuned.pth")
    for file in ("dino.pth", "tuned.pth"):
        with caplog.at_level(logging.INFO, "o2cap"):
            model = build_model("timm:test_vit", str(tmp_path / file), **SMALL)
        state = model.backbone[1].state_dict()
        positions = state.pop("pos_embed")
        torch.testing.assert_close(
            positions, resample_abs_pos_embed(theirs["pos_embed"], [4, 2], [*grid])
        )
        for name, value in state.items():
            assert value.equal(theirs[name])
    assert "head.x" in caplog.messages[0]
    assert "bottleneck.weight, classifier.weight, fc.weight" in caplog.messages[-1]


# ------------------------------------------ files that are refused


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    bomb = argparse.Namespace(inside=Bomb(tmp_path / "ran"))
    torch.save({"conv1.weight": Bomb(tmp_path / "ran"), "args": bomb}, tmp_path / "w")
    with pytest.raises(InputError, match=r"file .*/w cannot be used") as caught:
        read_state_dict(tmp_path / "w")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)  # no advice to switch safety off
    with pytest.raises(FileExistsError):  # the second one found the first one's folder
        torch.load(tmp_path / "w", weights_only=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("how", ["missing", "empty", "noise", "truncated", "folder"])
def test_damaged_files_are_named(how: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    state = {"a": torch.zeros(1000)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        made = {"empty": b"", "noise": b"\x80\x02no", "truncated": content[:-500]}
        path.write_bytes(made[how])
    with pytest.raises(InputError, match=rf"w\{suffix}") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        {"a": 3},
        {"state_dict": {"a": "b"}},
        {1: torch.zeros(2)},
    ],
)
def test_a_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not of tensors alone"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.0.weight": torch.zeros(3, 3)}, ["shape", "layers.0.weight"]),
        ({"layers.6.conv1.weight": torch.zeros(3)}, ["1 entries", "layers.6.conv1"]),
        ({"layers.5.bn2.bias": None}, ["1 entries", "layers.5.bn2.bias"]),
        ({"layers.1.weight": torch.full((24,), torch.nan)}, ["NaN", "layers.1.weight"]),
        (
            {"layers.1.bias": torch.full((24,), torch.inf)},
            ["infinity", "layers.1.bias"],
        ),
        (dict.fromkeys(tiny_state()), ["entries do not fit"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: dict[str, Tensor | None], words: list[str], tmp_path: Path
) -> None:
    state = {k: v for k, v in (tiny_state() | change).items() if v is not None}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        build_model("tiny_resnet", str(tmp_path / "w.pth"), **SMALL)
    for word in [*words, "w.pth"]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / "w.pth")
    for name in ("squeezenet1_1", "timm:test_vit"):
        with pytest.raises(InputError, match=f"{name} with .*entries do not fit"):
            build_model(name, str(tmp_path / "w.pth"), **SMALL)


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be used .*too long"):
        build_model("tiny_resnet", str(tmp_path / ("n" * 300)), height=32, width=16)


def test_the_shipped_starts_are_small_and_whole() -> None:
    files = sorted(EMBEDDED.glob("*.safetensors"))
    assert [path.stem for path in files] == ["person", "vehicle"]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    card = read_json(EMBEDDED / "card.json")
    for path in files:
        model = build_model(
            "tiny_resnet", str(path), height=64, width=32, pooling="gem"
        )
        assert torch.equal(
            model.state_dict()["pooling.p"], load_file(path)["pooling.p"]
        )
        assert card[path.stem]["data seeds"].startswith("1000-1007")


def test_nothing_else_renders_with_the_seeds_of_the_starts() -> None:
    targets = yaml.safe_load(batch.GRID.read_text())["targets"]
    for target in set(targets) - {"paper", "ward"}:
        for job in batch.read_grid(batch.GRID, target):
            assert max(job.key["seed"], job.key["data_seed"]) < min(pretrain.SEEDS)
    for path in batch.RECORDS.glob("*.json"):
        record = read_json(path)
        for row in [*record.get("rows", []), *record.get("tried", [])]:
            seeds = [row.get("seed"), row.get("data_seed")]
            assert not {*pretrain.SEEDS} & {*seeds}, path
    for path in (Path(__file__).parents[1] / "book").glob("*.ipynb"):
        assert '"seed = 20\\n"' in path.read_text(encoding="utf-8"), path


def test_a_start_is_made_without_identities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "SEEDS", (1000,))
    monkeypatch.setattr(pretrain, "PRESETS", {"person": "smoke"})
    facts = pretrain.pretrain("person", 2, tmp_path, batches=3)
    again = load_file(tmp_path / "person.safetensors")
    pretrain.pretrain("person", 2, tmp_path, batches=3)
    state = load_file(tmp_path / "person.safetensors")
    assert all(torch.equal(state[name], again[name]) for name in state)
    random = load_file(EMBEDDED / "person.safetensors")
    assert state.keys() == random.keys()
    assert facts["data seeds"] == "1000-1000, training parts"
