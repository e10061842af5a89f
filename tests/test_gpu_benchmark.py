"""Every piece of the measurement on a GPU works, at toy size on the CPU."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root))
    return importlib.import_module("benchmarks.gpu")


def numbers(found: Any) -> list[float]:
    """Return every number in a record."""
    if isinstance(found, dict):
        return [n for value in found.values() for n in numbers(value)]
    return [found] if isinstance(found, int | float) else []


def test_every_piece_at_toy_size(gpu: ModuleType, tmp_path: Path) -> None:
    where = {"output": tmp_path / "gpu.json", "work": tmp_path / "run", "toy": True}
    early = gpu.main(gpu.Options(**where, minutes=0))
    assert all("not measured" in item for item in early["items"].values())

    record = gpu.main(gpu.Options(**where, minutes=30))
    assert json.loads((tmp_path / "gpu.json").read_text()) == record
    items = record["items"]
    assert not any("not measured" in item for item in items.values())
    assert all(math.isfinite(n) for n in numbers(items))
    assert record["toy"] and record["GPU"] == "none"

    training = items["training, batch 16"]
    assert training["images/s"] == pytest.approx(16e3 / training["ms/step"])
    assert training["times the plain version"] == pytest.approx(
        training["images/s"] / training["plain version, images/s"]
    )
    assert 0 <= training["share outside the network"] < 1
    agreement = items["CPU and GPU"]  # here both are the CPU
    assert agreement["neighbours, share equal"] == 1 and agreement["labels equal"]
    assert agreement["Jaccard distance, max difference"] == 0
    assert agreement["gradient, max difference over its max"] == 0
    assert items["clustering, 300"]["ari"] > 0.9
    schedule = items["whole schedule"]
    assert schedule["counts"]["train"]["images"] == 100
    assert set(schedule["seconds"]) == {"extract", "cluster", "train", "evaluate"}
    assert record["rows"][0]["metrics"] == schedule["metrics"]

    again = gpu.main(gpu.Options(**where, minutes=0))  # nothing is measured twice
    assert again["items"] == items and again["rows"] == record["rows"]


def test_the_schedule_stops_in_time_and_goes_on(
    gpu: ModuleType, tmp_path: Path
) -> None:
    assert gpu.Bench(gpu.TOY, "cpu", deadline=0).schedule(tmp_path) is None
    assert (tmp_path / "checkpoint.pt").is_file()
    assert not (tmp_path / "summary.json").exists()
    found = gpu.Bench(gpu.TOY, "cpu", deadline=math.inf).schedule(tmp_path)
    assert found["epochs"] == 2


def test_without_a_gpu_nothing_is_claimed(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = gpu.main(gpu.Options(output=tmp_path / "gpu.json", work=tmp_path / "run"))
    assert len(record["items"]) == 8
    for item in record["items"].values():
        assert item == {"not measured": "no CUDA GPU where this record was written"}
    assert record["rows"] == [] and not (tmp_path / "run").exists()


def test_the_committed_record_is_of_this_program(gpu: ModuleType, root: Path) -> None:
    record = json.loads((root / "reproduce/records/gpu.json").read_text())
    bench = gpu.Bench(gpu.Sizes(), "cpu", deadline=0)
    assert list(record["items"]) == list(bench.pieces())
    assert not record["toy"]
    measured = [i for i in record["items"].values() if "not measured" not in i]
    assert record["GPU"] != "none" or not measured
