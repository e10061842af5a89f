"""Real pictures through every command; O2CAP_REAL_DATA names the folder with ward/."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from o2cap.__main__ import main


@pytest.mark.skipif(
    "O2CAP_REAL_DATA" not in os.environ,
    reason="O2CAP_REAL_DATA does not name the folder of ward/manifest.csv",
)
def test_every_command_on_real_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ward = Path(os.environ["O2CAP_REAL_DATA"]) / "ward"
    run, manifest = tmp_path / "run", ward / "manifest.csv"

    def command(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    small = ["--backbone", "tiny_resnet", "--weights", "none"]
    small += ["--height", "64", "--width", "32"]
    short = ["--epochs", "2", "--iterations", "20", "--warm-start.epochs", "2"]
    given = ("--dataset", "manifest", "--root", manifest, "--output", run)
    command("train", *given, *small, *short, "--warm-start.iterations", "40")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    before = json.loads((run / "summary.json").read_text())["before"]
    # 35 persons: by chance mAP is about 3 %; frames of a video are near-doubles.
    assert before["mAP"] > 0.05 and last["mAP"] > 0.05
    assert last["clusters"] >= 20

    assert json.loads(command("evaluate", run))["mAP"] == last["mAP"]
    features = tmp_path / "ward.npz"
    command("embed", run, ward / "images", "-o", features)
    with np.load(features) as file:
        assert len(file["features"]) == len(list((ward / "images").glob("*.jpg")))
    query = next((ward / "images").glob("*.jpg"))
    picture = tmp_path / "ranked.png"
    found = json.loads(
        command("search", run, query, "--gallery", features, "-o", picture)
    )
    assert len(found["matches"]) == 10 and picture.stat().st_size > 10_000
    command("report", run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "t-SNE" in page and "manifest" in page
