"""Every piece of the measurement on a GPU works, at toy size on the CPU."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# A machine with PyTorch and little else, where the package is not installed.
BARE = """
import importlib.metadata, runpy, sys
for name in ("pydantic", "annotated_types", "tyro", "faiss", "umap", "timm"):
    sys.modules[name] = None
known = importlib.metadata.version
def version(name):
    if name == "o2cap":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


@pytest.fixture
def gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root))
    return importlib.import_module("benchmarks.gpu")


def numbers(found: Any) -> list[float]:
    """Return every number in a record."""
    if isinstance(found, dict):
        return [n for value in found.values() for n in numbers(value)]
    return [found] if isinstance(found, int | float) else []


def test_every_piece_at_toy_size_on_a_bare_machine(
    gpu: ModuleType, tmp_path: Path, root: Path
) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-c", BARE, "--toy", "--output", str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    items = record["items"]
    lacking = {name: item for name, item in items.items() if "not measured" in item}
    assert not lacking, done.stderr
    assert list(items) == list(gpu.Bench(gpu.TOY, "cpu").pieces())
    assert all(math.isfinite(n) for n in numbers(items))
    assert record["toy"] and record["GPU"] == "none"

    training = items["training, batch 16, eager, bf16"]
    assert training["images/s"] == pytest.approx(16e3 / training["ms/step"])
    plain = items["training, batch 16, plain"]["images/s"]
    assert training["times the plain version"] == pytest.approx(
        training["images/s"] / plain
    )
    assert 0 <= training["share outside the network"] < 1
    kernels = items["a step's kernels, bf16"]
    assert len(kernels["longest, ms/step"]) == 20
    assert training["GPU busy"] == kernels["in all, ms/step"] / training["ms/step"]
    for where in ("inside", "outside"):
        agreement = items[f"CPU and GPU, {where} TF32"]  # here both are the CPU
        assert agreement["neighbours, share equal"] == 1 and agreement["labels equal"]
        assert agreement["Jaccard distance, max difference"] == 0
        assert agreement["gradient, max difference over its max"] == 0
    assert items["clustering, 300"]["ari"] > 0.9
    epochs = items["epochs of the shape of Market-1501"]
    assert epochs["counts"]["train"]["images"] == 60
    assert set(epochs["seconds/epoch"]) == {"extract", "cluster", "train"}
    assert epochs["50 epochs of 400 iterations, extrapolated, minutes"] > 0

    # nothing is measured twice; a piece for which there is no time is not begun
    order = list(items)
    del items["extraction"]
    path.write_text(json.dumps(record | {"versions": gpu.versions()}))
    again = gpu.measure(path, minutes=0, toy=True)["items"]
    assert list(again) == order
    assert again.pop("extraction") == {
        "not measured": "the time was up; the same command goes on"
    }
    assert again == items


def test_a_piece_that_fails_or_takes_too_long_stops_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("no room")

    def waits() -> None:
        while True:
            pass

    pieces = {"a": (1, fails), "b": (1, dict), "c": (1, waits), "d": (1, dict)}
    monkeypatch.setattr(gpu.Bench, "pieces", lambda bench: pieces)
    path = tmp_path / "gpu.json"
    found = gpu.measure(path, minutes=1 / 60, toy=True)["items"]
    assert found["a"] == {"not measured": "OutOfMemoryError: no room"}
    assert found["b"] == {}
    assert "the time was up" in found["c"]["not measured"]
    assert "the time was up" in found["d"]["not measured"]
    assert json.loads(path.read_text())["items"] == found


def test_without_a_gpu_nothing_is_claimed(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = gpu.measure(tmp_path / "gpu.json", minutes=8)
    assert len(record["items"]) > 10
    for item in record["items"].values():
        assert item == {"not measured": "no CUDA GPU where this record was written"}
    assert record["rows"] == []


def test_the_committed_record_is_of_this_program(gpu: ModuleType, root: Path) -> None:
    record = json.loads((root / "reproduce/records/gpu.json").read_text())
    assert list(record["items"]) == list(gpu.Bench(gpu.Sizes(), "cpu").pieces())
    assert not record["toy"]
    measured = [i for i in record["items"].values() if "not measured" not in i]
    assert record["GPU"] != "none" or not measured
