"""The trainer: run directory, exact resume, identities kept out, edge cases."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from o2cap import config as settings
from o2cap import evaluation, features, trainer
from o2cap.config import BatchConfig, ClusteringConfig, LossConfig, WarmStartConfig
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.errors import InputError, TrainingError
from o2cap.run import load_model
from o2cap.trainer import train


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReIDDataset:
    folder = tmp_path_factory.mktemp("tiny") / "data"
    return tiny.as_dataset(folder, tiny.write_pictures(folder))


@pytest.fixture(scope="session")
def whole(data: ReIDDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return train(tiny.config(tmp_path_factory.mktemp("whole") / "run"), data).directory


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def weights(path: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


def trained(run: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What training made: weights and pseudo labels."""
    labels = {
        path.name: np.load(path)["clusters"].tobytes()
        for path in sorted((run / "pseudo_labels").iterdir())
    }
    return weights(run / "model.safetensors"), labels


def outcome(run: Path) -> dict[str, Any]:
    """What two equal runs have in common, to the last bit."""
    summary = json.loads((run / "summary.json").read_text())
    summary.pop("seconds")
    return {
        "trained": trained(run),
        "start": weights(run / "start.safetensors"),
        "summary": summary,
        "warm start": lines(run, "warm_start.jsonl"),
        "metrics": [
            {k: v for k, v in line.items() if k != "seconds"} for line in lines(run)
        ],
    }


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Stop(Exception):
    pass


def stop_at(epoch: int) -> Callable[[dict[str, Any]], None]:
    def on_epoch(record: dict[str, Any]) -> None:
        if record["epoch"] == epoch:
            raise Stop

    return on_epoch


@pytest.fixture(scope="session")
def _half(data: ReIDDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(Stop):
        train(tiny.config(run), data, on_epoch=stop_at(0))
    return run


@pytest.fixture
def half(_half: Path, tmp_path: Path) -> Path:
    """A run that was left after its first epoch, to do with as one likes."""
    return Path(shutil.copytree(_half, tmp_path / "half"))


# ------------------------------------------------------------------- the run directory


def test_a_run_leaves_what_is_promised(whole: Path, data: ReIDDataset) -> None:
    names = {str(path.relative_to(whole)) for path in whole.rglob("*")}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "config.yaml",
        "environment.json",
        "warm_start.jsonl",
        "metrics.jsonl",
        "pseudo_labels",
        "pseudo_labels/epoch_000.npz",
        "pseudo_labels/epoch_001.npz",
        "checkpoint.pt",
        "start.safetensors",
        "model.safetensors",
        "summary.json",
    }
    assert settings.load(whole / "config.yaml") == tiny.config(whole)


def test_a_line_per_epoch_holds_what_is_promised(whole: Path) -> None:
    history = lines(whole)
    assert [record["epoch"] for record in history] == [0, 1]
    fractions = {"ari", "nmi", "purity", "mAP", "rank1", "rank5", "mINP"}
    numbers = {"loss", "loss_offline", "loss_online", "lr", "cameras_per_cluster"}
    counts = {"clusters", "outliers", "proxies", "proxies_visited"}
    for record in history:
        assert fractions | numbers | counts <= record.keys()
        assert all(np.isfinite(record[name]) for name in fractions | numbers)
        assert all(0 <= record[name] <= 1 for name in fractions)
        assert record["loss"] == pytest.approx(
            record["loss_offline"] + record["loss_online"]
        )
        assert set(record["seconds"]) == {"extract", "cluster", "train", "evaluate"}
        name = whole / f"pseudo_labels/epoch_{record['epoch']:03d}.npz"
        clusters = np.load(name, allow_pickle=False)["clusters"]
        assert clusters.dtype == np.int64 and len(clusters) == 54
        assert clusters.max() + 1 == record["clusters"]
        assert (clusters < 0).sum() == record["outliers"]
    assert [record["lr"] for record in history] == [1e-3, pytest.approx(1e-4)]


def test_the_summary_is_of_the_last_epoch(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    final = lines(whole)[-1]
    assert {name: summary[name] for name in final} == final
    assert summary["epochs"] == 2
    assert set(summary["before"]) == {"mAP", "rank1", "rank5", "rank10", "mINP"}


def test_the_environment_is_recorded(whole: Path, data: ReIDDataset) -> None:
    facts = json.loads((whole / "environment.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["seed"] == 0 and facts["device"] == "cpu" and facts["threads"] == 1
    assert facts["counts"]["train"] == {"images": 54, "identities": 6, "cameras": 3}
    assert facts["fingerprint"] == data.fingerprint()
    assert facts["pseudo_labels"] is None


def test_tensorboard_reads_the_curves(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole)).Reload()
    for name in ("loss", "clusters", "mAP", "lr"):
        drawn = [(event.step, event.value) for event in events.Scalars(name)]
        kept = [(record["epoch"], record[name]) for record in lines(whole)]
        assert drawn == [(step, pytest.approx(value)) for step, value in kept]


def test_tensorboard_draws_an_epoch_that_was_repeated_once(
    half: Path, data: ReIDDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A life ends between an epoch's curves and its checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def save(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(trainer.RunDirectory, "save", save)
        train(tiny.config(half), data)
    train(tiny.config(half), data)
    assert len(list(half.glob("events.out.tfevents.*"))) == 3
    events = EventAccumulator(str(half)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1]


def test_the_result_is_the_run_directory(whole: Path, data: ReIDDataset) -> None:
    result = train(tiny.config(whole), data)
    assert result.directory == whole
    assert result.history == lines(whole) and result.final == lines(whole)[-1]
    assert not result.model.training
    _, loaded = load_model(whole)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


def test_a_finished_run_is_returned_at_once(
    whole: Path, data: ReIDDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(whole)
    for name in ("decode", "build_model", "extract_all", "find_clusters"):
        monkeypatch.delattr(trainer, name)
    assert train(tiny.config(whole), data).final == lines(whole)[-1]
    assert snapshot(whole) == before


# ------------------------------------------------------------------------ exact resume


def test_an_interrupted_run_ends_as_a_whole_one(
    whole: Path, half: Path, data: ReIDDataset
) -> None:
    assert not (half / "summary.json").exists()
    later: list[int] = []
    with pytest.raises(Stop):  # again, after the last epoch
        train(tiny.config(half), data, on_epoch=stop_at(1))
    assert not (half / "summary.json").exists()
    train(tiny.config(half), data, on_epoch=lambda record: later.append(1))
    assert later == []  # nothing is done twice
    assert outcome(half) == outcome(whole)


def test_a_crash_at_any_write_is_made_good(
    whole: Path, data: ReIDDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A life ends before each file that a run writes is in its place."""
    config, replace_, unlink = tiny.config(tmp_path / "run"), os.replace, os.unlink
    died: list[tuple[str, int]] = []
    checkpoints = 0

    def mortal(source: Any, target: Path) -> None:
        nonlocal checkpoints
        if (target.name, checkpoints) not in died:
            died.append((target.name, checkpoints))
            # As when killed: the temporary file stays behind.
            monkeypatch.setattr(os, "unlink", lambda path: None)
            raise Stop
        replace_(source, target)
        checkpoints += target.name == "checkpoint.pt"

    monkeypatch.setattr(os, "replace", mortal)
    for _ in range(50):
        monkeypatch.setattr(os, "unlink", unlink)
        try:
            train(config, data)
            break
        except Stop:
            assert any((tmp_path / "run").rglob(".*.part"))
    assert {name for name, _ in died} == {
        path.name for path in whole.rglob("*.*") if "tfevents" not in path.name
    }
    assert outcome(tmp_path / "run") == outcome(whole)
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_full_disk_is_said_and_harms_nothing(
    whole: Path, half: Path, data: ReIDDataset
) -> None:
    before = snapshot(half)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"checkpoint\.pt cannot be written"):
            train(tiny.config(half), data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        snapshot(half)[str(half / "checkpoint.pt")]
        == before[str(half / "checkpoint.pt")]
    )
    train(tiny.config(half), data)
    assert outcome(half) == outcome(whole)


def test_another_number_of_workers_or_evaluations_changes_nothing(
    whole: Path, data: ReIDDataset, tmp_path: Path
) -> None:
    run = train(tiny.config(tmp_path, workers=3, evaluate_every=7), data).directory
    assert trained(run) == trained(whole)
    assert "mAP" not in lines(run)[0]
    assert lines(run)[1]["mAP"] == lines(whole)[1]["mAP"]


def test_the_seed_decides(whole: Path, data: ReIDDataset, tmp_path: Path) -> None:
    same = train(tiny.config(tmp_path / "same"), data).directory
    other = train(tiny.config(tmp_path / "other", seed=1), data).directory
    assert outcome(same) == outcome(whole)
    assert trained(other)[0] != trained(whole)[0]


def test_the_callers_state_comes_back(data: ReIDDataset, tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.set_num_threads(2)

    def switches() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        )

    random, before = torch.get_rng_state(), switches()
    changes = {"deterministic": True, "epochs": 1}
    train(tiny.config(tmp_path / "a", **changes), data)
    assert torch.equal(torch.get_rng_state(), random) and switches() == before
    with pytest.raises(Stop):
        train(tiny.config(tmp_path / "b", **changes), data, on_epoch=stop_at(0))
    assert torch.equal(torch.get_rng_state(), random) and switches() == before


# ------------------------------------------------------------------ identities kept out


def with_pids(data: ReIDDataset, pids: Tensor | None) -> ReIDDataset:
    return replace(data, train=replace(data.train, pids=pids))


@pytest.mark.parametrize("kind", ["permuted", "unknown", "removed"])
def test_identities_change_nothing(
    kind: str, whole: Path, data: ReIDDataset, tmp_path: Path
) -> None:
    assert data.train.pids is not None
    pids = {
        "permuted": data.train.pids[torch.randperm(54)],
        "unknown": torch.full((54,), -1),
        "removed": None,
    }[kind]
    run = train(tiny.config(tmp_path), with_pids(data, pids)).directory
    assert trained(run) == trained(whole)
    quality = {"ari", "nmi", "purity"} & lines(run)[0].keys()
    assert bool(quality) == (kind == "permuted")


class Guarded(Tensor):
    """Identities that nobody may look at but where `allowed` says so."""

    allowed: list[str] = []  # noqa: RUF012  (the stack of those looking)
    readers: set[str] = set()  # noqa: RUF012

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        harmless = (Tensor.dtype.__get__, Tensor.shape.__get__)  # type: ignore[attr-defined]
        if func not in harmless:
            if not cls.allowed:
                raise AssertionError("identities were looked at")
            cls.readers.add(cls.allowed[-1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Guarded]]:
    def allow(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def looking(*args: Any, **kwargs: Any) -> Any:
            Guarded.allowed.append(name)
            try:
                return real(*args, **kwargs)
            finally:
                Guarded.allowed.pop()

        monkeypatch.setattr(owner, name, looking)

    # The record of the data, and measuring. No more.
    for owner, name in (
        (ReIDDataset, "fingerprint"),
        (ReIDDataset, "counts"),
        (trainer, "clustering_quality"),
        (evaluation, "evaluate_retrieval"),
    ):
        allow(owner, name)
    Guarded.readers.clear()
    yield Guarded


def guarded(images: ImageSet) -> ImageSet:
    assert images.pids is not None
    return replace(images, pids=images.pids.as_subclass(Guarded))


def test_the_guard_bites(guard: type[Guarded], data: ReIDDataset) -> None:
    pids = guarded(data.train).pids
    assert pids is not None
    for look in (
        lambda: pids + 1,
        lambda: pids[0],
        lambda: pids.tolist(),
        lambda: pids.numpy(),
        lambda: pids == 3,
        lambda: torch.zeros(9)[pids],
    ):
        with pytest.raises(AssertionError, match="looked at"):
            look()


@pytest.mark.parametrize("method", ["baseline", "both"])
def test_training_looks_at_identities_only_to_measure(
    method: Any, guard: type[Guarded], data: ReIDDataset, tmp_path: Path
) -> None:
    config = tiny.config(tmp_path, method=method)
    train(config, replace(data, train=guarded(data.train)))
    assert guard.readers == {"fingerprint", "counts", "clustering_quality"}


def test_test_identities_only_reach_the_evaluation(
    guard: type[Guarded], data: ReIDDataset, tmp_path: Path
) -> None:
    parts = {"query": guarded(data.query), "gallery": guarded(data.gallery)}
    train(tiny.config(tmp_path), replace(data, **parts))
    assert guard.readers == {"fingerprint", "counts", "evaluate_retrieval"}


# ------------------------------------------------------------------ labels given openly


def test_given_labels_are_trained_with(data: ReIDDataset, tmp_path: Path) -> None:
    assert data.train.pids is not None
    labels = data.train.pids * 10  # gaps are no clusters
    labels[:2] = -1
    result = train(tiny.config(tmp_path / "run"), data, pseudo_labels=labels)
    for record in result.history:
        assert (record["clusters"], record["outliers"]) == (6, 2)
        assert record["ari"] == 1 and record["proxies"] == 18
    with np.load(tmp_path / "run/pseudo_labels/epoch_001.npz") as kept:
        assert np.array_equal(kept["clusters"], labels.numpy())


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(54), torch.zeros(53).long(), torch.zeros(54, 1).long()],
)
def test_labels_that_are_not_one_whole_number_a_picture_are_refused(
    labels: Tensor, data: ReIDDataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"pseudo.labels"):
        train(tiny.config(tmp_path / "run"), data, pseudo_labels=labels)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_mixed_with_one_on_given_labels(
    whole: Path, data: ReIDDataset
) -> None:
    """The supervised bound never passes for the method, nor the reverse."""
    before = snapshot(whole)
    with pytest.raises(InputError, match="pseudo_labels: null then"):
        train(tiny.config(whole), data, pseudo_labels=data.train.pids)
    assert snapshot(whole) == before


def test_a_run_is_not_mixed_with_one_on_other_pictures(
    whole: Path, half: Path, data: ReIDDataset
) -> None:
    fewer = replace(data, train=data.train.select(torch.arange(50)))
    with pytest.raises(InputError, match="other pictures"):
        train(tiny.config(whole), fewer)
    with pytest.raises(InputError, match="other pictures"):
        train(tiny.config(half), fewer)


# ----------------------------------------------------------------- methods and settings


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"method": "baseline"}, {"loss_cluster"}),
        ({"method": "intra"}, {"loss_intra"}),
        ({"method": "offline"}, {"loss_offline"}),
        ({"method": "online"}, {"loss_online"}),
        (
            {"loss": LossConfig(reduction="mean", negatives=0)},
            {"loss_offline", "loss_online"},
        ),
        (
            {
                "clustering": settings.ClusteringConfig(
                    distance="camera_aware",
                    standardise=True,
                    drop_single_camera=True,
                    k1_intra=3,
                    k1_inter=6,
                    min_samples=2,
                ),
                "loss": LossConfig(camera_entropy=True, spare_online_positives=True),
            },
            {"loss_offline", "loss_online"},
        ),
        (
            {"pooling": "gem", "precision": "off"},
            {"loss_offline", "loss_online"},
        ),
    ],
)
def test_every_method_runs(
    changes: Any, names: set[str], data: ReIDDataset, tmp_path: Path
) -> None:
    result = train(tiny.config(tmp_path, **changes), data)
    for record in result.history:
        assert {name for name in record if name.startswith("loss_")} == names
        assert all(np.isfinite(record[name]) for name in names)
        assert record["loss"] == pytest.approx(sum(record[name] for name in names))
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


def test_methods_differ(data: ReIDDataset, whole: Path, tmp_path: Path) -> None:
    offline = train(tiny.config(tmp_path, method="offline"), data).directory
    assert trained(offline)[0] != trained(whole)[0]


@pytest.mark.parametrize("method", ["baseline", "both"])
def test_only_the_baseline_is_blind_to_cameras(
    method: Any, data: ReIDDataset, tmp_path: Path
) -> None:
    camids = data.train.camids[torch.randperm(54)] + 4
    other = replace(data, train=replace(data.train, camids=camids))
    one, two = (
        train(tiny.config(tmp_path / name, method=method), given).directory
        for name, given in (("one", data), ("two", other))
    )
    assert (trained(one)[0] == trained(two)[0]) == (method == "baseline")


def test_the_warm_start_runs_from_random_weights_only(
    whole: Path, data: ReIDDataset, tmp_path: Path
) -> None:
    """From the weights it led to, training does the same without it."""
    assert len(lines(whole, "warm_start.jsonl")) == 2
    start = whole / "start.safetensors"
    assert weights(start) != weights(whole / "model.safetensors")
    run = train(tiny.config(tmp_path / "a", weights=str(start)), data).directory
    assert not (run / "warm_start.jsonl").exists()
    assert trained(run) == trained(whole)
    # A finished run's directory stands for its weights: a new schedule sets out there.
    on = train(tiny.config(tmp_path / "c", weights=str(run), epochs=1), data)
    assert weights(on.directory / "start.safetensors") == trained(run)[0]
    off = tiny.config(tmp_path / "b", epochs=1, warm_start=WarmStartConfig(epochs=0))
    assert not (train(off, data).directory / "warm_start.jsonl").exists()


# ---------------------------------------------------------------- degenerate epochs


@pytest.mark.parametrize(("label", "clusters"), [(-1, 0), (0, 1)])
def test_an_epoch_with_nothing_to_tell_apart_is_skipped(
    label: int,
    clusters: int,
    data: ReIDDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real, calls = trainer.find_clusters, 0

    def first_degenerate(features: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            return torch.full((len(features),), label)
        return real(features, *rest)

    monkeypatch.setattr(trainer, "find_clusters", first_degenerate)
    result = train(tiny.config(tmp_path), data)
    skipped, usual = result.history
    assert skipped["skipped"] and skipped["clusters"] == clusters
    assert "loss" not in skipped and skipped["mAP"] == result.before["mAP"]
    assert usual["loss"] > 0 and "skipped" not in usual
    assert f"54 pictures, {clusters} clusters, " in caplog.text


def test_a_run_of_skipped_epochs_changes_no_weight(
    data: ReIDDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trainer, "find_clusters", lambda features, *_: torch.full((len(features),), -1)
    )
    result = train(tiny.config(tmp_path / "short"), data)
    start = torch.load(tmp_path / "short/checkpoint.pt", weights_only=True)
    assert start["optimizer"]["state"] == {}  # not one step
    assert result.final["mAP"] == result.before["mAP"]
    with pytest.raises(InputError, match=r"In three epochs .* 54 outliers; eps 0\."):
        train(tiny.config(tmp_path / "long", epochs=20), data)
    assert len(lines(tmp_path / "long")) == 3


@pytest.mark.parametrize(("eps", "k1", "said"), [(0.0, 8, 54), (0.79, 50, 0)])
def test_bad_clusters_come_with_the_eps_to_try(
    eps: float, k1: int, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything is an outlier, or in one cluster: the advice makes several."""
    centre = torch.eye(6).repeat_interleave(9, 0)
    features = torch.nn.functional.normalize(centre + 0.2 * torch.randn(54, 6))
    camids = torch.arange(54) % 3
    clustering = ClusteringConfig(k1=k1, k2=2, eps=eps)
    config = tiny.config(Path("run"), clustering=clustering)
    clusters = trainer.find_clusters(features, camids, config)
    words = trainer.advise(features, camids, config, clusters)
    assert words in caplog.text and f"{said} outliers; eps 0." in words
    better = float(words.split("; eps ")[1].split()[0])
    changed = replace(clustering, eps=better)
    found = trainer.find_clusters(features, camids, replace(config, clustering=changed))
    assert len(found[found >= 0].unique()) > 1
    assert f"makes {int(found.max()) + 1} and {int((found < 0).sum())}" in words
    other = replace(config, clustering=changed)
    assert "eps" not in trainer.advise(features, camids, other, found)


def test_lists_that_do_not_suit_the_clusters_are_said() -> None:
    """Persons of six pictures, or of sixty: two sizes are a k1 of 12, or 30 at most."""
    for size, k1, said in ((6, 12, ""), (6, 30, "k1 12 and k2 4"), (60, 15, "k1 30")):
        centre = torch.eye(8).repeat_interleave(size, 0)
        features = centre + 0.02 * torch.randn(len(centre), 8)
        features = torch.nn.functional.normalize(features)
        camids = torch.arange(len(centre)) % 3
        clustering = ClusteringConfig(k1=k1, k2=2)
        config = tiny.config(Path("run"), clustering=clustering)
        clusters = torch.arange(8).repeat_interleave(size)
        words = trainer.advise(features, camids, config, clusters)
        assert said in words and bool(words) == bool(said)
        aware = replace(clustering, distance="camera_aware")
        other = replace(config, clustering=aware)
        assert trainer.advise(features, camids, other, clusters) == ""


def test_no_eps_separates_what_is_one(caplog: pytest.LogCaptureFixture) -> None:
    features, camids = torch.ones(9, 4) / 2, torch.zeros(9, dtype=torch.int64)
    config = tiny.config(Path("run"))
    words = trainer.advise(features, camids, config, torch.zeros_like(camids))
    assert "no eps up to 0.8 makes two clusters" in words


def test_proxies_that_no_batch_reached_are_counted(
    data: ReIDDataset, tmp_path: Path
) -> None:
    config = tiny.config(
        tmp_path, epochs=1, iterations=2, batch=BatchConfig(proxies=2, images=2)
    )
    record = train(config, data).final
    assert record["proxies_visited"] == 4 < record["proxies"]


def test_one_camera_is_said_once_and_trained_on(
    data: ReIDDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = replace(data, train=replace(data.train, camids=torch.full((54,), 9)))
    result = train(tiny.config(tmp_path), alone)
    assert result.final["cameras_per_cluster"] == 1
    assert result.final["proxies"] == result.final["clusters"]
    assert result.final["loss"] > 0
    assert caplog.text.count("camera-aware parts have nothing to do") == 1
    # With one camera the camera-aware distance is the plain one.
    features = torch.nn.functional.normalize(torch.randn(54, 8))
    config = tiny.config(tmp_path)
    aware = replace(config.clustering, distance="camera_aware", drop_single_camera=True)
    found = [
        trainer.find_clusters(features, alone.train.camids, given)
        for given in (config, replace(config, clustering=aware))
    ]
    assert torch.equal(*found)


def test_two_cameras_and_a_gap_in_their_numbers(
    data: ReIDDataset, tmp_path: Path
) -> None:
    camids = torch.where(data.train.camids == 1, 40, 2)
    two = replace(data, train=replace(data.train, camids=camids))
    assert train(tiny.config(tmp_path), two).final["loss"] > 0


def empty(images: ImageSet) -> ImageSet:
    return images.select(torch.zeros(0, dtype=torch.int64))


def test_own_pictures_are_trained_on_and_not_evaluated(
    data: ReIDDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "o2cap")
    train_set = data.train.without_identities()
    own = ReIDDataset("own", train_set, empty(data.query), empty(data.gallery))
    result = train(tiny.config(tmp_path), own)
    assert result.before == {}
    assert result.final["clusters"] > 1 and result.final["loss"] > 0
    assert not {"mAP", "rank1", "ari"} & result.final.keys()
    assert "no mAP" in caplog.text


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: replace(d, query=empty(d.query)), "has 0 query and 12 gallery"),
        (lambda d: replace(d, gallery=empty(d.gallery)), "has 12 query and 0 gallery"),
        (lambda d: replace(d, train=empty(d.train)), "no training pictures"),
    ],
)
def test_data_that_cannot_be_used_are_refused_at_first(
    make: Any, sentence: str, data: ReIDDataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        train(tiny.config(tmp_path / "run"), make(data))
    assert not (tmp_path / "run").exists()


def test_a_gallery_of_fewer_than_ten_pictures(
    data: ReIDDataset, tmp_path: Path
) -> None:
    few = replace(data, gallery=data.gallery.select(torch.arange(7)))
    final = train(tiny.config(tmp_path, epochs=1), few).final
    assert final["rank10"] == 1 >= final["rank5"]


# ------------------------------------------------------------------ unreadable pictures


def breaking(images: ImageSet, folder: Path) -> ImageSet:
    """Return the pictures with the third one damaged."""
    broken = folder / "broken.png"
    broken.write_bytes(Path(images.paths[2]).read_bytes()[:60])
    return replace(images, paths=[*images.paths[:2], broken, *images.paths[3:]])


@pytest.mark.parametrize("split", ["train", "query", "gallery"])
def test_an_unreadable_picture_stops_the_run_before_it_begins(
    split: str, data: ReIDDataset, tmp_path: Path
) -> None:
    broken = replace(data, **{split: breaking(getattr(data, split), tmp_path)})
    with pytest.raises(InputError, match=r"broken\.png"):
        train(tiny.config(tmp_path / "run"), broken)
    assert not (tmp_path / "run").exists()


def test_unreadable_pictures_are_left_out_where_told(
    data: ReIDDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {name: breaking(images, tmp_path) for name, images in data.splits().items()}
    config = tiny.config(tmp_path / "run", skip_unreadable=True)
    train(config, replace(data, **parts))
    with np.load(tmp_path / "run/pseudo_labels/epoch_001.npz") as kept:
        assert len(kept["clusters"]) == 53
    assert caplog.text.count("cannot be read and are left out") == 3
    left_out = (tmp_path / "run/unreadable.txt").read_text().splitlines()
    assert left_out == [str(tmp_path / "broken.png")]


def test_a_run_goes_on_with_the_pictures_that_it_began_with_or_not_at_all(
    data: ReIDDataset, tmp_path: Path
) -> None:
    """The file has the size it had, so that the data set looks the same."""
    broken = replace(data, train=breaking(data.train, tmp_path))
    config = tiny.config(tmp_path / "run", skip_unreadable=True)
    with pytest.raises(Stop):
        train(config, broken, on_epoch=stop_at(0))
    file = tmp_path / "broken.png"
    damaged = file.read_bytes()
    small = tmp_path / "small.gif"
    Image.new("L", (1, 1)).save(small)
    file.write_bytes(small.read_bytes().ljust(len(damaged), b"\0"))
    with pytest.raises(InputError, match=r"other pictures .*readable"):
        train(config, broken)
    file.write_bytes(damaged)
    train(config, broken)
    whole = train(replace(config, output=tmp_path / "whole"), broken).directory
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_link_to_nowhere_is_left_out_as_told(
    data: ReIDDataset, tmp_path: Path
) -> None:
    for path, camid in zip(data.train.paths, data.train.camids, strict=True):
        (tmp_path / f"own/cam{camid}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / f"own/cam{camid}")
    (tmp_path / "own/cam1/gone.png").symlink_to(tmp_path / "nowhere.png")
    own = {"dataset": "folders", "root": tmp_path / "own"}
    with pytest.raises(InputError, match=r"gone\.png"):
        train(tiny.config(tmp_path / "run", **own))
    config = tiny.config(tmp_path / "run", skip_unreadable=True, **own)
    assert train(config).final["loss"] > 0
    left_out = (tmp_path / "run/unreadable.txt").read_text()
    assert left_out == f"{tmp_path / 'own/cam1/gone.png'}\n"


# --------------------------------------------------------------------- a loss of NaN


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint_whole(
    number: str,
    whole: Path,
    half: Path,
    data: ReIDDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, real, calls = tiny.config(half), trainer.losses.offline_loss, 0

    def offline(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = real(features, *args, **kwargs)
        return loss * float(number) if calls == 2 else loss

    monkeypatch.setattr(trainer.losses, "offline_loss", offline)
    with pytest.raises(TrainingError) as caught:
        train(config, data)
    said = str(caught.value)
    assert "not finite after epoch 1 of the train, from iteration 1" in said
    assert said.count(".png") == 4 and "--optim.lr" in said
    monkeypatch.undo()
    assert [record["epoch"] for record in lines(half)] == [0]
    train(config, data)
    assert outcome(half) == outcome(whole)


def steep(real: Any, at: int) -> Callable[..., Tensor]:
    """Return a loss of which call `at` is finite and its gradient is not."""
    calls = 0

    def loss(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        cliff = (features - features.detach()).abs().sum().sqrt()
        return real(features, *args, **kwargs) + (cliff if calls == at else 0)

    return loss


@pytest.mark.parametrize("stage", ["train", "warm start"])
def test_a_last_step_that_breaks_the_weights_is_not_kept(
    stage: str,
    whole: Path,
    data: ReIDDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All losses are finite: each was computed before its step."""
    name = {"train": "offline_loss", "warm start": "instance_loss"}[stage]
    option = {"train": "--optim.lr", "warm start": "--warm-start.lr"}[stage]
    config = tiny.config(tmp_path / "run")
    monkeypatch.setattr(trainer.losses, name, steep(getattr(trainer.losses, name), 6))
    with pytest.raises(TrainingError, match="not finite") as caught:
        train(config, data)
    said = str(caught.value)
    assert f"epoch 1 of the {stage}, from iteration 2 on" in said and option in said
    assert said.count(".png") == 4
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["epoch"] == {"train": 0, "warm start": -2}[stage]
    assert all(value.isfinite().all() for value in state["model"].values())
    monkeypatch.undo()
    train(config, data)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_weights_too_large_to_compute_with_are_said(
    data: ReIDDataset, tmp_path: Path
) -> None:
    """They are finite, and what comes of them is not."""
    huge = settings.OptimConfig(lr=1e30, warmup=0.0)
    config = tiny.config(tmp_path, iterations=1, optim=huge, evaluate_every=9)
    with pytest.raises(TrainingError, match=r"features are not finite"):
        train(config, data)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("breaks_at", [["fp16"], ["fp16", "off"]])
def test_features_beyond_half_precision_are_extracted_again(
    breaks_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def extract(model: Any, pixels: Tensor, *, precision: str, **_: Any) -> Tensor:
        asked.append(precision)
        found = torch.ones(len(pixels), 4)
        found[1, 2] = float("nan") if precision in breaks_at else 1
        return found

    monkeypatch.setattr(features, "extract", extract)
    on_gpu: Any = SimpleNamespace(device=torch.device("cpu"), extraction="fp16")
    given: Any = (None, torch.zeros(3, 2), tiny.config(Path("run")), on_gpu)
    if "off" in breaks_at:
        with pytest.raises(TrainingError, match="features are not finite"):
            features.extract_all(*given)
    else:
        assert features.extract_all(*given).isfinite().all()
    assert asked == ["fp16", "off"]


# ------------------------------------------------------------------------- hardware


def test_a_run_on_the_cpu_leaves_gpus_alone(
    data: ReIDDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, devices = torch.random.fork_rng, []

    def fork_rng(*args: Any) -> Any:
        devices.append(args)
        return real(*args)

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    train(tiny.config(tmp_path, epochs=1), data)
    assert devices == [([],)]


@pytest.mark.parametrize(("precision", "allowed"), [("off", False), ("bf16", True)])
def test_tf32_goes_with_mixed_precision(precision: Any, allowed: bool) -> None:
    config = tiny.config(Path("run"), precision=precision)
    before = torch.backends.cudnn.allow_tf32
    with trainer.Hardware.choose(config).in_force(config):
        assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("Learner", "prepare"),
        ("warm_start", "warm start"),
        ("extract_all", "extract"),
        ("find_clusters", "cluster"),
        ("train_epoch", "train"),
    ],
)
def test_a_full_gpu_is_said_and_harms_nothing(
    name: str,
    stage: str,
    whole: Path,
    half: Path,
    data: ReIDDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, name, full)
    with pytest.raises(InputError, match=rf"full \(stage: {stage}\)") as caught:
        train(tiny.config(half), data)
    for word in ("--batch.proxies", "--batch.images", "--height", "--width", "resume"):
        assert word in str(caught.value)
    monkeypatch.undo()
    train(tiny.config(half), data)
    assert outcome(half) == outcome(whole)


@pytest.mark.parametrize(
    ("device", "processes", "proxies", "said"),
    [
        ("cuda", 8, 8, True),
        ("cuda", 8, 32, False),
        ("cuda", 1, 2, False),
        ("cpu", 8, 8, False),
    ],
)
def test_gpus_with_too_little_to_do_are_said_with_what_to_scale(
    device: str,
    processes: int,
    proxies: int,
    said: bool,
    data: ReIDDataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = settings.preset("msmt17", batch=BatchConfig(proxies=proxies))
    hardware = trainer.Hardware(torch.device(device), "off", 1)
    run: Any = SimpleNamespace(config=config, path="run")
    monkeypatch.setattr(trainer.distributed, "size", lambda: processes)
    trainer.announce(data, hardware, run)
    assert ("Fewer than 16 pictures a GPU" in caplog.text) == said
    recipe = "--batch.proxies 64 --optim.lr 0.0028"
    assert (recipe in caplog.text) == ("--iterations 50" in caplog.text) == said


def test_cuda_graphs_leave_the_statistics_alone_and_serve_a_shape_each(
    data: ReIDDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture rehearses on the sample, in training mode."""
    config = tiny.config(tmp_path)
    model = trainer.build_model("tiny_resnet", "none", height=32, width=16)
    pixels = torch.zeros(54, 32, 16, 3, dtype=torch.uint8)
    hardware = trainer.Hardware(torch.device("cpu"), "off", 1)
    learner = trainer.Learner(config, hardware, model, pixels, data.train)
    learner.begin("train", 0, 1e-3)
    learner.batches = torch.zeros(2, 8)
    eager, called, made = torch.randn(8, 3, 32, 16), [], []

    def make(module: Any, sample: tuple[Tensor, ...]) -> Any:
        made.append(len(*sample))
        for _ in range(3):
            module(*sample)
        return lambda pictures: called.append(len(pictures)) or module(pictures)

    before = {n: b.clone() for n, b in model.named_buffers()}
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    graph = learner.captured(eager)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    learner.graph = graph, eager.shape
    on_gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), precision="off")
    learner.hardware = on_gpu
    learner.embed(eager)
    learner.embed(torch.randn(4, 3, 32, 16))  # as after the warm start
    learner.embed(torch.randn(4, 3, 32, 16))
    assert called == [8, 4, 4] and made == [8, 4]
    learner.config = replace(config, cuda_graphs=False)
    learner.embed(eager)
    assert called == [8, 4, 4]


@pytest.mark.parametrize("theirs", [True, False])
def test_a_checkpoint_does_not_say_how_this_device_computes(
    theirs: bool, half: Path, data: ReIDDataset
) -> None:
    """A fused optimizer is for GPUs, and one that is not is slow there."""
    config = tiny.config(half)
    state = trainer.RunDirectory(config).restore()
    assert state is not None
    state["optimizer"]["param_groups"][0]["fused"] = theirs
    model = trainer.build_model("tiny_resnet", "none", height=32, width=16)
    pixels = torch.zeros(54, 32, 16, 3, dtype=torch.uint8)
    hardware = trainer.Hardware.choose(config)
    learner = trainer.Learner(config, hardware, model, pixels, data.train)
    learner.optimizer.param_groups[0]["fused"] = not theirs
    learner.load(state)
    group = learner.optimizer.param_groups[0]
    assert group["fused"] is not theirs
    assert group["lr"] == 1e-3  # the rest is taken over


# ------------------------------------------------------- an output that cannot be used


def test_other_settings_are_refused_and_named(whole: Path, data: ReIDDataset) -> None:
    before = snapshot(whole)
    changed = tiny.config(whole, loss=LossConfig(temperature=0.1))
    said = r"\(loss\.temperature is 0\.07 there and 0\.1 here\)"
    with pytest.raises(InputError, match=said):
        train(changed, data)
    assert snapshot(whole) == before


def test_what_has_no_influence_may_change(whole: Path, data: ReIDDataset) -> None:
    changed = tiny.config(whole, workers=2, threads=2, evaluate_every=9)
    assert train(changed, data).final == lines(whole)[-1]


def test_a_run_is_not_resumed_against_the_callers_will(
    whole: Path, data: ReIDDataset
) -> None:
    with pytest.raises(InputError, match="holds a run"):
        train(tiny.config(whole), data, resume=False)


def test_a_folder_of_other_files_is_left_alone(
    data: ReIDDataset, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files but no run"):
        train(tiny.config(tmp_path), data)
    assert snapshot(tmp_path) == {str(tmp_path / "thesis.tex"): b"years of work"}


def test_a_file_is_no_directory(data: ReIDDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OSError):
            train(tiny.config(path), data)
    assert snapshot(tmp_path) == {str(tmp_path / "file"): b"a"}


LONG = "n" * 300  # characters: longer than a file name may be


GARBLED = ["config.yaml", "environment.json", "summary.json", "metrics.jsonl"]


@pytest.mark.parametrize("name", GARBLED)
@pytest.mark.parametrize("content", [b"7", b"\xff\x00{", b"[1, 2"])
def test_a_garbled_file_is_named(
    name: str, content: bytes, whole: Path, data: ReIDDataset, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        train(tiny.config(run), data)


@pytest.mark.parametrize("damage", ["truncated", "garbled", "empty", "a list"])
def test_a_damaged_checkpoint_is_named(
    damage: str, half: Path, data: ReIDDataset
) -> None:
    path = half / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "a list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(
            {"truncated": content[:5000], "garbled": b"x" * 900, "empty": b""}[damage]
        )
    before = snapshot(half)
    with pytest.raises(InputError, match=r"checkpoint\.pt is damaged"):
        train(tiny.config(half), data)
    assert snapshot(half) == before


class Code:
    """Runs when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_refused_and_not_run(
    half: Path, data: ReIDDataset, tmp_path: Path
) -> None:
    state = {"epoch": 0, "before": {}, "model": Code(tmp_path / "executed")}
    torch.save(state, half / "checkpoint.pt")
    with pytest.raises(InputError, match="damaged or no checkpoint"):
        train(tiny.config(half), data)
    assert not (tmp_path / "executed").exists()
    # The trap is real: an ordinary load springs it.
    torch.load(half / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


def test_without_its_checkpoint_a_run_starts_again(
    whole: Path, half: Path, data: ReIDDataset
) -> None:
    (half / "checkpoint.pt").unlink()
    train(tiny.config(half), data)
    assert outcome(half) == outcome(whole)


def test_an_unknown_device_is_refused(data: ReIDDataset, tmp_path: Path) -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match=f"--device {device} cannot be used"):
            train(tiny.config(tmp_path / "run", device=device), data)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------- weights for use


def test_weights_that_cannot_be_used_are_named(
    whole: Path, half: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not finished"):
        load_model(half)
    with pytest.raises(InputError, match="cannot be read as settings"):
        load_model(tmp_path)
    content = (whole / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(content[:2000])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be used"):
        load_model(half)
    state = load_file(whole / "model.safetensors")
    del state["backbone.layers.0.weight"]
    save_file(state, half / "model.safetensors")
    with pytest.raises(InputError, match="entries do not fit"):
        load_model(half)


def test_training_off_the_main_thread(
    whole: Path, data: ReIDDataset, tmp_path: Path
) -> None:
    worker = threading.Thread(target=train, args=(tiny.config(tmp_path), data))
    worker.start()
    worker.join()
    assert outcome(tmp_path) == outcome(whole)


# ---------------------------------------------------------- one directory, one program


def test_a_second_program_waits_and_finds_the_finished_run(
    whole: Path, data: ReIDDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "o2cap")
    config = tiny.config(tmp_path / "run")
    training, goes_on = threading.Event(), threading.Event()
    found: dict[str, trainer.RunResult] = {}
    epochs: dict[str, list[int]] = {"first": [], "second": []}

    def program(name: str) -> None:
        def on_epoch(record: dict[str, Any]) -> None:
            epochs[name].append(record["epoch"])
            training.set()
            assert goes_on.wait(60)

        found[name] = train(config, data, on_epoch=on_epoch)

    first = threading.Thread(target=program, args=("first",), daemon=True)
    second = threading.Thread(target=program, args=("second",), daemon=True)
    first.start()
    assert training.wait(60)
    second.start()
    while second.is_alive() and "waiting for it" not in caplog.text:
        second.join(0.01)
    assert epochs == {"first": [0], "second": []}
    goes_on.set()
    first.join()
    second.join()
    assert epochs == {"first": [0, 1], "second": []}
    assert found["first"].history == found["second"].history
    assert caplog.text.count(f"another process is training in {tmp_path / 'run'}") == 1
    assert outcome(tmp_path / "run") == outcome(whole)
    assert not (tmp_path / "run/.lock").exists()


# ------------------------------------------------------------------- on an accelerator


@pytest.mark.parametrize("method", ["both", "baseline", "intra"])
def test_a_step_on_an_accelerator_sends_nothing_and_waits_for_nothing(
    method: Any,
    data: ReIDDataset,
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is torch's meta, which has no numbers to look at or to send."""
    monkeypatch.syspath_prepend(str(root))
    launches = importlib.import_module("benchmarks.launches")
    config = tiny.config(tmp_path, method=method)
    first, *later = launches.count(config, torch.arange(54) % 6, data.train)
    assert len(later) == config.iterations - 1 >= 2
    for step in (first, *later):
        assert step.pop("drawn singly").copies == 6  # the count counts
    # Before the first step the plan of the epoch is sent, and after it Adam has room.
    plan, began = first.pop("pictures"), first.pop("update")
    assert plan.copies > 0 and began.launches > later[0]["update"].launches
    assert all(part.copies == 0 for part in first.values())
    assert all(part.copies == 0 for step in later for part in step.values())
    for step in later:
        for name, part in step.items():
            assert part.launches == later[0][name].launches > 0, name
