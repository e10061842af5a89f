"""The epoch loop, and the run directory in which everything about a run is kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import Generator, Tensor
from torch.amp import GradScaler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from o2cap import losses
from o2cap.backbone import ReIDModel, build_model, read_state_dict
from o2cap.clustering import dbscan, jaccard_distance
from o2cap.config import NO_INFLUENCE, Config, load
from o2cap.data import load_dataset
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.data.loading import (
    augment,
    decode,
    instance_batches,
    proxy_batches,
)
from o2cap.errors import InputError, TrainingError
from o2cap.evaluation import RetrievalMetrics, clustering_quality, evaluate_retrieval
from o2cap.features import autocast, extract
from o2cap.files import read_json, replacing
from o2cap.neighbours import nearest_neighbours
from o2cap.proxies import CameraProxies, ProxyMemory, split_by_camera

logger = logging.getLogger("o2cap")

Metrics = dict[str, Any]


def train(
    config: Config,
    dataset: ReIDDataset | None = None,
    *,
    pseudo_labels: Tensor | None = None,
    resume: bool = True,
    on_epoch: Callable[[Metrics], None] | None = None,
) -> RunResult:
    """Train without identity labels, and evaluate.

    Parameters
    ----------
    config : Config
        All settings.
    dataset : ReIDDataset, optional
        Pictures, if not those that `config` names. The identities of `dataset.train`
        are used for one thing: the reported quality of the pseudo labels.
    pseudo_labels : LongTensor [N], optional
        Labels to train with in every epoch instead of clusters, −1 for outliers. A
        caller who passes the true identities gets the supervised bound, openly.
    resume : bool
        Continue the run that the directory holds; a finished one is returned as it
        is. With False, a directory that holds a run is refused.
    on_epoch : callable, optional
        Called with each epoch's record.

    Returns
    -------
    RunResult
        Also in the run directory; see :class:`RunDirectory`.

    Raises
    ------
    InputError
        When the data, the settings or the directory cannot be used.
    TrainingError
        When a loss is NaN or infinite; the last good checkpoint stays.
    """
    run = RunDirectory.claim(config, resume)
    run.check_input(dataset, pseudo_labels)
    if run.finished():
        logger.info("%s is finished already", run.path)
        return run.result(load_model(run.path)[1])
    hardware = Hardware.choose(config)
    with hardware.in_force(config):
        # -- data
        if dataset is None:
            dataset = load_configured(config)
            run.check_input(dataset, pseudo_labels)
        check_parts(dataset)

        # -- model, before minutes of decoding: a download may fail
        torch.manual_seed(config.seed)
        model = build_model(
            config.backbone,
            config.weights,
            height=config.height,
            width=config.width,
            pooling=config.model.pooling,
            last_stride=config.model.last_stride,
        ).to(hardware.device)
        model = model.to(memory_format=torch.channels_last)

        # -- pictures, decoded once; from here on, training has no identities
        pixels, train_set = decode(
            dataset.train,
            config.height,
            config.width,
            workers=config.workers,
            skip_unreadable=config.skip_unreadable,
        )
        pids, images = train_set.pids, train_set.without_identities()
        if pseudo_labels is not None and len(pseudo_labels) != len(images):
            raise InputError(
                f"There are {len(pseudo_labels)} pseudo labels for {len(images)} "
                "readable training pictures; give one for each."
            )
        evaluator = Evaluator(config, dataset, hardware)
        pixels = hardware.place(pixels)
        run.begin(dataset, hardware, pseudo_labels)
        _announce(dataset, hardware, run, config)

        # -- warm start, or on from where the run was left
        optimizer = _adam(model, config.optim.lr, config, hardware)
        scaler = GradScaler(hardware.device.type, enabled=hardware.precision == "fp16")
        state = run.restore(hardware.device)
        if state is None or state["stage"] == "warm start":
            if config.weights == "none" and config.warm_start.epochs > 0:
                warm_start(model, pixels, config, hardware, run, state)
            before = evaluator.record(model)
            if before:
                logger.info("before training: %s", _in_words(before))
            run.keep_weights(model, "start.safetensors")
            progress: Metrics = {"stage": "train", "epoch": -1, "before": before}
            run.save(progress, model, optimizer, scaler)
        else:
            run.take_up(state, model, optimizer, scaler)
            progress = {key: state[key] for key in ("stage", "epoch", "before")}

        # -- epochs: extract, cluster, split by camera, train
        for epoch in range(progress["epoch"] + 1, config.epochs):
            seconds: dict[str, float] = {}
            with _timed(seconds, "extract"):
                features = extract(
                    model,
                    pixels,
                    height=config.height,
                    width=config.width,
                    device=hardware.device,
                    precision=hardware.extraction,
                )
            with _timed(seconds, "cluster"):
                if pseudo_labels is None:
                    clusters = find_clusters(features, config)
                else:
                    clusters = pseudo_labels
                proxies = make_proxies(clusters, images.camids, config)
                memory = ProxyMemory.from_features(
                    features, proxies.to(hardware.device), config.loss.momentum
                )
            record: Metrics = {
                "epoch": epoch,
                "lr": learning_rate(config, epoch),
                **describe_clusters(clusters, images.camids, pids),
            }
            with _timed(seconds, "train"):
                if record["clusters"] < 2:
                    logger.warning(
                        "epoch %d: %d clusters in %d pictures, so nothing to tell "
                        "apart; no training in this epoch (a larger "
                        "--clustering.eps or a smaller --clustering.min-samples "
                        "finds more)",
                        epoch,
                        record["clusters"],
                        len(images),
                    )
                    record["skipped"] = True
                else:
                    record |= train_epoch(
                        model,
                        optimizer,
                        scaler,
                        memory,
                        proxies,
                        pixels,
                        config,
                        hardware,
                        epoch=epoch,
                        paths=images.paths,
                    )
            last = epoch == config.epochs - 1
            with _timed(seconds, "evaluate"):
                if last or (epoch + 1) % config.evaluate_every == 0:
                    record |= evaluator.record(model)
            record["seconds"] = seconds
            logger.info("%s", _in_words(record))
            run.record(record, clusters)
            run.save(progress | {"epoch": epoch}, model, optimizer, scaler)
            if on_epoch is not None:
                on_epoch(record)
        run.finish(model, progress["before"])
        return run.result(model)


@dataclass(frozen=True)
class Hardware:
    """What a run computes on: chosen once, printed, recorded.

    Parameters
    ----------
    device : torch.device
        CPU or an accelerator.
    precision : "bf16", "fp16" or "off"
        Mixed precision of the network.
    threads : int
        Threads of the arithmetic on the CPU.
    """

    device: torch.device
    precision: Literal["bf16", "fp16", "off"]
    threads: int

    @classmethod
    def choose(cls, config: Config) -> Hardware:
        """Turn the ``auto`` settings into what this machine has.

        Raises
        ------
        InputError
            When the device asked for is not here.
        """
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--device {config.device} cannot be used here ({reason}); try cpu."
            ) from error
        if config.precision != "auto":
            precision: Literal["bf16", "fp16", "off"] = config.precision
        elif device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
        else:
            # Without such instructions a CPU emulates bf16, slower than float32.
            has = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            precision = "bf16" if device.type == "cpu" and has() else "off"
        # With every core taken, threads that wait for each other collapse beside a
        # busy neighbour (measured on 2 cores: an epoch 60 s instead of 5 s).
        threads = config.threads or torch.get_num_threads()
        if not config.threads and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, min(threads // 2, 8))
        return cls(device, precision, threads)

    @property
    def extraction(self) -> Literal["fp16", "off"]:
        """Precision of features that are compared, not trained with.

        bf16 has 8 bits of mantissa, which is too coarse to rank near-duplicates (on
        video frames, rank-1 fell from 30.5 to 23.8 %); fp16 has 11, as TF32 has.
        """
        mixed = self.device.type == "cuda" and self.precision != "off"
        return "fp16" if mixed else "off"

    @contextlib.contextmanager
    def in_force(self, config: Config) -> Iterator[None]:
        """Set torch's global switches for a run, and put them back afterwards."""
        cudnn = torch.backends.cudnn
        threads, benchmark = torch.get_num_threads(), cudnn.benchmark
        strict = torch.are_deterministic_algorithms_enabled()
        tf32 = torch.get_float32_matmul_precision()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        try:
            torch.set_num_threads(self.threads)
            torch.use_deterministic_algorithms(config.deterministic)
            cudnn.benchmark = not config.deterministic
            if self.device.type == "cuda" and self.precision != "off":
                torch.set_float32_matmul_precision("high")
            with torch.random.fork_rng():
                yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
            cudnn.benchmark = benchmark
            torch.set_float32_matmul_precision(tf32)

    def place(self, pixels: Tensor) -> Tensor:
        """Return decoded pictures where batches are taken from fastest.

        That is the GPU, when they fill no more than a quarter of what is free there.
        """
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if pixels.numel() < free / 4:
                return pixels.to(self.device)
        return pixels

    def batch(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Return the pictures `index` (on the CPU) on the device."""
        there = index.to(pixels.device, non_blocking=True)
        return pixels[there].to(self.device, non_blocking=True)


# ------------------------------------------------------------------ what one epoch does


def find_clusters(features: Tensor, config: Config) -> Tensor:
    """Return pseudo labels, LongTensor [N], −1 for outliers (METHOD steps 2 and 3)."""
    settings = config.clustering
    k = min(settings.k1, len(features))
    found = nearest_neighbours(features, k, backend=settings.search)
    distance = jaccard_distance(
        features,
        settings.k1,
        settings.k2,
        neighbours=found,
        max_distance=settings.eps,  # DBSCAN asks for no larger one
    )
    return dbscan(distance, settings.eps, settings.min_samples)


def make_proxies(clusters: Tensor, camids: Tensor, config: Config) -> CameraProxies:
    """Split clusters by camera; the camera-blind baseline sees one camera only."""
    seen = torch.zeros_like(camids) if config.method == "baseline" else camids
    return split_by_camera(clusters, seen)


def method_losses(
    config: Config,
    features: Tensor,
    proxy: Tensor,
    centroids: Tensor,
    proxies: CameraProxies,
) -> dict[str, Tensor]:
    """Return the losses that `config.method` adds up, by name."""
    settings = config.loss
    given = (features, proxy, centroids, proxies)
    common: dict[str, Any] = {
        "temperature": settings.temperature,
        "reduction": settings.reduction,
    }
    found = {}
    if config.method == "baseline":
        found["cluster"] = losses.cluster_loss(
            features, proxy, centroids, temperature=settings.temperature
        )
    if config.method == "intra":
        found["intra"] = losses.intra_camera_loss(*given, **common)
    if config.method in ("offline", "online", "both"):
        # one product with the whole memory serves both losses
        common["similarity"] = losses.compare(features, centroids)
        common["negatives"] = settings.negatives
    if config.method in ("offline", "both"):
        found["offline"] = losses.offline_loss(*given, **common)
    if config.method in ("online", "both"):
        found["online"] = losses.online_loss(
            *given, **common, positives=settings.positives, balance=settings.balance
        )
    return found


def learning_rate(config: Config, epoch: int) -> float:
    """Return the learning rate of an epoch (counted from 0).

    It rises linearly from 0.01 of its value over the warm-up, and is divided by ten
    at each milestone; both are shares of `config.epochs`.
    """
    settings = config.optim
    warmup = round(settings.warmup * config.epochs)
    factor = 1.0
    if epoch < warmup:
        factor = 0.01 + 0.99 * epoch / warmup
    for milestone in settings.milestones:
        factor *= 0.1 if epoch >= round(milestone * config.epochs) else 1.0
    return settings.lr * factor


# ----------------------------------------------------------------------- training parts


def seed_of(seed: int, stage: str, epoch: int) -> int:
    """Return the seed of one epoch's random numbers.

    Every epoch is seeded anew, so that a resumed run draws what an uninterrupted one
    would have drawn, with no generator's state to carry over.
    """
    words = [seed, int.from_bytes(stage.encode(), "big") % 2**32, epoch]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])


def _adam(
    model: ReIDModel, lr: float, config: Config, hardware: Hardware
) -> torch.optim.Adam:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(
        trained,
        lr=lr,
        weight_decay=config.optim.weight_decay,
        fused=hardware.device.type == "cuda",
    )


def _step(
    model: ReIDModel, loss: Tensor, optimizer: torch.optim.Adam, scaler: GradScaler
) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def warm_start(
    model: ReIDModel,
    pixels: Tensor,
    config: Config,
    hardware: Hardware,
    run: RunDirectory,
    state: dict[str, Any] | None,
) -> None:
    """Train from random weights without labels: each picture is its own class.

    Every batch holds different pictures, each twice, changed at random, and a view
    must find the other view of its picture (:func:`o2cap.losses.instance_loss`). It
    stands in for ImageNet weights, which not everybody can download.

    Parameters
    ----------
    pixels : uint8 Tensor [N, H, W, 3]
        Training pictures.
    state : dict or None
        What the run directory holds of an interrupted warm start.
    """
    settings = config.warm_start
    optimizer = _adam(model, settings.lr, config, hardware)
    scaler = GradScaler(hardware.device.type, enabled=hardware.precision == "fp16")
    first = 0
    if state is not None:
        first = state["epoch"] + 1
        run.take_up(state, model, optimizer, scaler)
    for epoch in range(first, settings.epochs):
        generator = _seed_everything(seed_of(config.seed, "warm start", epoch))
        batches = instance_batches(
            len(pixels), settings.iterations, generator, images=settings.images
        )
        total = torch.zeros((), device=hardware.device)
        model.train()
        for index in tqdm(batches, f"warm start {epoch}", leave=False, disable=None):
            pictures = augment(
                hardware.batch(pixels, index.repeat(2)),
                generator,
                flip=config.augment.flip,
                pad=config.augment.pad,
                erase=config.augment.erase,
                jitter=settings.jitter,
            )
            with autocast(hardware.device, hardware.precision):
                features = model(pictures)
            loss = losses.instance_loss(features, temperature=settings.temperature)
            _step(model, loss, optimizer, scaler)
            total += loss.detach()
        mean = float(total) / len(batches)
        if not np.isfinite(mean):
            raise TrainingError(
                f"The warm start's loss is {mean} in epoch {epoch} (learning rate "
                f"{settings.lr:g}); lower --warm-start.lr, or try --precision off."
            )
        logger.info("warm start, epoch %d: loss %.3f", epoch, mean)
        run.record_warm_start({"epoch": epoch, "loss": mean, "lr": settings.lr})
        run.save({"stage": "warm start", "epoch": epoch}, model, optimizer, scaler)


def _seed_everything(seed: int) -> Generator:
    """Seed torch's own generators (dropout) and return one for batches and changes."""
    torch.manual_seed(seed)
    return Generator().manual_seed(seed)


def train_epoch(
    model: ReIDModel,
    optimizer: torch.optim.Adam,
    scaler: GradScaler,
    memory: ProxyMemory,
    proxies: CameraProxies,
    pixels: Tensor,
    config: Config,
    hardware: Hardware,
    *,
    epoch: int,
    paths: Sequence[Path],
) -> Metrics:
    """Train one epoch on fixed pseudo labels (METHOD step 5).

    Parameters
    ----------
    memory, proxies
        On the device, and on the CPU.
    pixels : uint8 Tensor [N, H, W, 3]
        Training pictures.
    epoch : int
        Counted from 0; decides the learning rate and the random numbers.
    paths : sequence of Path
        Where the pictures come from, to name them when something goes wrong.

    Returns
    -------
    dict
        The mean losses by name, and the number of proxies and of those visited.
    """
    generator = _seed_everything(seed_of(config.seed, "train", epoch))
    batches = proxy_batches(
        proxies.label,
        config.iterations,
        generator,
        proxies=config.batch.proxies,
        images=config.batch.images,
    )
    on_device = proxies.to(hardware.device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    model.train()
    history: list[Tensor] = []
    for index in tqdm(batches, f"epoch {epoch}", leave=False, disable=None):
        pictures = augment(
            hardware.batch(pixels, index),
            generator,
            flip=config.augment.flip,
            pad=config.augment.pad,
            erase=config.augment.erase,
        )
        with autocast(hardware.device, hardware.precision):
            features = model(pictures)
        proxy = proxies.label[index]
        parts = method_losses(
            config,
            features,
            proxy.to(hardware.device, non_blocking=True),
            memory.centroids,
            on_device,
        )
        names = list(parts)
        _step(model, torch.stack(list(parts.values())).sum(), optimizer, scaler)
        memory.update(features.detach(), proxy)
        # Looked at once per epoch: asking a GPU for each loss would wait for it.
        history.append(torch.stack(list(parts.values())).detach())
    found = torch.stack(history).cpu()
    bad = (~found.isfinite()).any(dim=1).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        some = ", ".join(str(paths[i]) for i in batches[first][:4].tolist())
        raise TrainingError(
            f"The loss is {found[first].sum().item()} in epoch {epoch}, iteration "
            f"{first} (learning rate {learning_rate(config, epoch):g}; pictures "
            f"{some}, ...); the checkpoint of the epoch before stays. Lower "
            "--optim.lr, or try --precision off."
        )
    mean = dict(zip(names, found.mean(dim=0).tolist(), strict=True))
    return {
        "loss": sum(mean.values()),
        **{f"loss_{name}": value for name, value in mean.items()},
        "proxies": len(proxies),
        "proxies_visited": int(proxies.label[batches].unique().numel()),
    }


def describe_clusters(clusters: Tensor, camids: Tensor, pids: Tensor | None) -> Metrics:
    """Return what an epoch's record says of its pseudo labels.

    Identities, where known, only measure: ARI, NMI, V-measure, purity.
    """
    found: Metrics = {
        "clusters": int(clusters[clusters >= 0].unique().numel()),
        "outliers": int((clusters < 0).sum()),
    }
    if found["clusters"] > 0:
        parts = len(split_by_camera(clusters, camids))
        found["cameras_per_cluster"] = parts / found["clusters"]
    if pids is not None and found["clusters"] > 0:
        quality = clustering_quality(clusters, pids)
        scores = {
            "ari": quality.ari,
            "nmi": quality.nmi,
            "v_measure": quality.v_measure,
            "purity": quality.purity,
        }
        # NaN where no clustered picture has a known identity
        found |= {name: value for name, value in scores.items() if value == value}
    return found


class Evaluator:
    """Query and gallery of a data set, decoded once.

    Parameters
    ----------
    config : Config
        Input size and reading options.
    dataset : ReIDDataset
        Its query and gallery; with neither, there is nothing to evaluate.
    hardware : Hardware
        Where features are extracted.

    Raises
    ------
    InputError
        At the first unreadable pictures, unless they are to be skipped.
    """

    def __init__(
        self, config: Config, dataset: ReIDDataset, hardware: Hardware
    ) -> None:
        self.config, self.hardware = config, hardware
        self.decoded = [
            decode(
                part,
                config.height,
                config.width,
                workers=config.workers,
                skip_unreadable=config.skip_unreadable,
            )
            for part in (dataset.query, dataset.gallery)
            if len(part)
        ]

    def __call__(self, model: ReIDModel) -> RetrievalMetrics | None:
        """Return the retrieval metrics of `model`, None without query and gallery."""
        if not self.decoded:
            return None
        (query_pixels, query), (gallery_pixels, gallery) = self.decoded
        features = [
            extract(
                model,
                pixels,
                height=self.config.height,
                width=self.config.width,
                device=self.hardware.device,
                precision=self.hardware.extraction,
            )
            for pixels in (query_pixels, gallery_pixels)
        ]
        assert query.pids is not None and gallery.pids is not None  # see check_parts
        return evaluate_retrieval(
            features[0],
            features[1],
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
        )

    def record(self, model: ReIDModel) -> Metrics:
        """Return the metrics as a record's entries; none without query and gallery."""
        found = self(model)
        if found is None:
            return {}
        # Beyond the end of a gallery of fewer pictures nothing more is found.
        most = len(found.cmc)
        rank = {f"rank{k}": float(found.cmc[min(k, most) - 1]) for k in (1, 5, 10)}
        return {"mAP": found.mAP, **rank, "mINP": found.mINP}


# -------------------------------------------------------------------- the run directory


class RunDirectory:
    """Everything about a run that a reader, a plot or a resumed run needs.

    ``config.yaml``; ``environment.json`` (versions, device, commit, data counts and
    fingerprint); ``metrics.jsonl`` (a line per epoch) and ``warm_start.jsonl``;
    ``pseudo_labels/epoch_NNN.npz``; ``checkpoint.pt`` (after every epoch, all that a
    resumed run needs); ``start.safetensors``, the weights before the first epoch;
    ``model.safetensors`` and ``summary.json`` at the end; TensorBoard events. Files
    are written whole or not at all.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.directory()
        self.history: list[Metrics] = []
        self.warm_history: list[Metrics] = []
        self.board: SummaryWriter | None = None

    @classmethod
    def claim(cls, config: Config, resume: bool) -> RunDirectory:
        """Return the directory of a run with these settings, new or to be resumed.

        Raises
        ------
        InputError
            When it holds a run with other settings, or something that is no run.
        """
        run = cls(config)
        known = run.path / "config.yaml"
        if run.path.is_file():
            raise InputError(f"--output {run.path} is a file; name a directory.")
        if not known.is_file():
            # (What a killed run leaves before its settings is hidden.)
            inside = run.path.iterdir() if run.path.is_dir() else ()
            if any(not path.name.startswith(".") for path in inside):
                raise InputError(
                    f"--output {run.path} holds files but no run (no config.yaml); "
                    "choose another directory."
                )
            return run
        if not resume:
            raise InputError(f"--output {run.path} holds a run; choose another one.")
        differing = [
            f"{name} is {there} there and {here} here"
            for name, there, here in _differences(load(known), config)
        ]
        if differing:
            raise InputError(
                f"--output {run.path} belongs to a run with other settings: "
                f"{'; '.join(differing)}. Choose another --output, or repeat those."
            )
        return run

    def finished(self) -> bool:
        """Say whether the run has come to its end."""
        return (self.path / "summary.json").is_file()

    def begin(
        self, dataset: ReIDDataset, hardware: Hardware, pseudo_labels: Tensor | None
    ) -> None:
        """Write what is known before the first step."""
        if not (self.path / "config.yaml").is_file():
            text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            self._write("config.yaml", text)
        if not (self.path / "environment.json").is_file():
            facts = describe_environment(self.config, dataset, hardware)
            facts["pseudo_labels"] = _fingerprint(pseudo_labels)
            self._write("environment.json", json.dumps(facts, indent=2))

    def check_input(
        self, dataset: ReIDDataset | None, pseudo_labels: Tensor | None
    ) -> None:
        """Refuse to go on with other pictures or labels than the run began with.

        Raises
        ------
        InputError
            When they differ from those that ``environment.json`` tells of.
        """
        path = self.path / "environment.json"
        if not path.is_file():
            return
        pictures, labels = read_json(path, "fingerprint", "pseudo_labels")
        if dataset is not None and dataset.fingerprint() != pictures:
            raise InputError(
                f"--output {self.path} belongs to a run on other pictures (the data "
                f"set's fingerprint was {pictures}); choose another."
            )
        if _fingerprint(pseudo_labels) != labels:
            raise InputError(
                f"--output {self.path} belongs to a run with other pseudo labels, "
                "given or found; choose another."
            )

    def restore(self, device: torch.device) -> dict[str, Any] | None:
        """Return the last checkpoint, if there is one, and forget what came after.

        Raises
        ------
        InputError
            When the file is damaged.
        """
        path = self.path / "checkpoint.pt"
        for left in self.path.rglob(".*.part"):  # of a run killed while writing
            left.unlink()
        state = None
        if path.is_file():
            try:
                state = torch.load(path, map_location=device, weights_only=True)
                stage, last = state["stage"], int(state["epoch"])
            except Exception as error:
                raise InputError(
                    f"{path} is damaged or no checkpoint of this program "
                    f"({type(error).__name__}); delete it to train from the start."
                ) from error
            done = last if stage == "train" else -1
            self.history = self._lines("metrics.jsonl", done)
            self.warm_history = self._lines(
                "warm_start.jsonl", last if stage == "warm start" else 10**9
            )
        return state

    def take_up(
        self,
        state: dict[str, Any],
        model: ReIDModel,
        optimizer: torch.optim.Adam,
        scaler: GradScaler,
    ) -> None:
        """Load a checkpoint's model, optimizer and loss scale.

        Raises
        ------
        InputError
            When it is of another model.
        """
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty if the device before needed none
                scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.path / 'checkpoint.pt'} does not fit the settings beside it; "
                "it is of another model. Delete it to train from the start."
            ) from error

    def _lines(self, name: str, last: int) -> list[Metrics]:
        path = self.path / name
        if not path.is_file():
            return []
        try:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            return [line for line in lines if line["epoch"] <= last]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}).") from error

    def record(self, record: Metrics, clusters: Tensor) -> None:
        """Keep an epoch's record and its pseudo labels."""
        self.history.append(record)
        name = f"pseudo_labels/epoch_{record['epoch']:03d}.npz"
        with replacing(self.path / name) as path, path.open("wb") as file:
            np.savez_compressed(file, clusters=clusters.numpy())
        self._write_lines("metrics.jsonl", self.history)
        if self.board is None:
            self.board = SummaryWriter(str(self.path), purge_step=record["epoch"])
        for key, value in record.items():
            if isinstance(value, int | float) and key != "epoch":
                self.board.add_scalar(key, value, record["epoch"])
        self.board.flush()

    def record_warm_start(self, record: Metrics) -> None:
        """Keep the record of an epoch of the warm start."""
        self.warm_history.append(record)
        self._write_lines("warm_start.jsonl", self.warm_history)

    def save(
        self,
        state: dict[str, Any],
        model: ReIDModel,
        optimizer: torch.optim.Adam,
        scaler: GradScaler,
    ) -> None:
        """Write the checkpoint: the last thing an epoch does."""
        whole = {
            **state,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        # By way of memory: torch does not say why it cannot write (a full disk).
        content = io.BytesIO()
        torch.save(whole, content)
        with replacing(self.path / "checkpoint.pt") as path:
            path.write_bytes(content.getbuffer())

    def keep_weights(self, model: ReIDModel, name: str) -> None:
        """Write the weights alone, in safetensors."""
        tensors = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
        with replacing(self.path / name) as path:
            path.write_bytes(safetensors.torch.save(tensors))

    def finish(self, model: ReIDModel, before: Metrics) -> None:
        """Write the trained weights and the final metrics."""
        self.keep_weights(model, "model.safetensors")
        summary = {
            **self.history[-1],
            "before": before,
            "epochs": len(self.history),
            "config_hash": self.config.hash(),
        }
        self._write("summary.json", json.dumps(summary, indent=2))
        if self.board is not None:
            self.board.close()

    def result(self, model: ReIDModel) -> RunResult:
        """Return the finished run."""
        (before,) = read_json(self.path / "summary.json", "before")
        return RunResult(
            self.path,
            self.config,
            model.eval(),
            before,
            self._lines("metrics.jsonl", 10**9),
        )

    def _write_lines(self, name: str, records: list[Metrics]) -> None:
        self._write(name, "".join(json.dumps(record) + "\n" for record in records))

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as path:
            path.write_text(text, encoding="utf-8")


def _fingerprint(labels: Tensor | None) -> str | None:
    if labels is None:
        return None
    return hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest()[:16]


def _differences(there: Config, here: Config) -> Iterator[tuple[str, Any, Any]]:
    def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in plain.items():
            if isinstance(value, dict):
                found |= flat(value, f"{prefix}{name}.")
            elif prefix or name not in NO_INFLUENCE:
                found[f"{prefix}{name}"] = value
        return found

    old, new = flat(there.to_dict()), flat(here.to_dict())
    return ((name, old[name], new[name]) for name in new if old[name] != new[name])


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Parameters
    ----------
    directory : Path
        The run directory; see :class:`RunDirectory`.
    config : Config
        The settings.
    model : ReIDModel
        The trained model, in evaluation mode.
    before : dict
        Retrieval metrics before the first epoch, after the warm start if there was
        one; empty when there is nothing to evaluate with.
    history : list of dict
        One record per epoch, as in ``metrics.jsonl``.
    """

    directory: Path
    config: Config
    model: ReIDModel
    before: Metrics
    history: list[Metrics]

    @property
    def final(self) -> Metrics:
        """The record of the last epoch: what is reported, never the best epoch."""
        return self.history[-1]


def load_model(
    directory: Path, weights: str = "model.safetensors"
) -> tuple[Config, ReIDModel]:
    """Return the settings of a run and its model, on the CPU, in evaluation mode.

    Parameters
    ----------
    directory : Path
        The run directory.
    weights : str
        ``model.safetensors``, trained, or ``start.safetensors``, before training.

    Raises
    ------
    InputError
        When the directory holds no finished run, or its weights do not fit.
    """
    if not (directory / "config.yaml").is_file():
        raise InputError(f"{directory} is no run directory (it has no config.yaml).")
    config = load(directory / "config.yaml")
    path = directory / weights
    if not path.is_file():
        raise InputError(
            f"The run in {directory} is not finished (it has no {weights}); "
            "the same o2cap train command resumes it."
        )
    model = build_model(
        config.backbone,
        "none",
        height=config.height,
        width=config.width,
        pooling=config.model.pooling,
        last_stride=config.model.last_stride,
    )
    try:
        model.load_state_dict(read_state_dict(path))
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit the backbone {config.backbone} of config.yaml; "
            "both must come from one run."
        ) from error
    return config, model.to(memory_format=torch.channels_last).eval()


def load_configured(config: Config) -> ReIDDataset:
    """Return the data set that the settings name, the embedded one rendered."""
    if not config.dataset.startswith("synthetic"):
        return load_dataset(
            config.dataset,
            config.root,
            strict=config.strict,
            skip_missing=config.skip_unreadable,
        )
    options = asdict(config.synthetic)
    if options["seed"] is None:
        options["seed"] = config.seed
    return load_dataset(
        config.dataset,
        config.root,
        **options,
        height=config.height,
        width=config.width,
    )


def check_parts(dataset: ReIDDataset) -> None:
    """Refuse a data set that cannot be trained on or evaluated with.

    Raises
    ------
    InputError
        For no training pictures; a gallery without queries, or the reverse; or
        pictures there of which no identity is known, or none that can be found.
    """
    if len(dataset.train) == 0:
        raise InputError(f"The data set {dataset.name} has no training pictures.")
    for has, lacks in (("gallery", "query"), ("query", "gallery")):
        if len(getattr(dataset, has)) and not len(getattr(dataset, lacks)):
            raise InputError(
                f"The data set {dataset.name} has a {has} but no {lacks}; evaluation "
                "needs both (training alone needs neither)."
            )
    if not len(dataset.query):
        return
    cameras: dict[int, set[int]] = {}
    for pid, camid in _identified(dataset.gallery):
        cameras.setdefault(pid, set()).add(camid)
    if not any(cameras.get(p, set()) - {c} for p, c in _identified(dataset.query)):
        raise InputError(
            f"The data set {dataset.name} cannot be evaluated with: no query has a "
            "picture of its identity, from another camera, in the gallery."
        )


def _identified(images: ImageSet) -> Iterator[tuple[int, int]]:
    if images.pids is None:
        return iter(())
    pairs = zip(images.pids.tolist(), images.camids.tolist(), strict=True)
    return ((pid, camid) for pid, camid in pairs if pid >= 0)


def describe_environment(
    config: Config, dataset: ReIDDataset, hardware: Hardware
) -> Metrics:
    """Return versions, device, seed, commit, and the data's counts and fingerprint."""
    packages = ("o2cap", "torch", "torchvision", "numpy", "scipy", "numba", "faiss-cpu")
    device = str(hardware.device)
    if hardware.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(hardware.device)})"
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in packages},
        "commit": commit,
        "device": device,
        "precision": hardware.precision,
        "threads": hardware.threads,
        "seed": config.seed,
        "config_hash": config.hash(),
        "dataset": dataset.name,
        "counts": dataset.counts(),
        "fingerprint": dataset.fingerprint(),
    }


# ----------------------------------------------------------------------------- messages


def _announce(
    dataset: ReIDDataset, hardware: Hardware, run: RunDirectory, config: Config
) -> None:
    logger.info(
        "%s on %s, precision %s, %d threads; run directory %s",
        config.method,
        hardware.device,
        hardware.precision,
        hardware.threads,
        run.path,
    )
    for split, counts in dataset.counts().items():
        known = f"{counts['identities']} identities, " if counts["identities"] else ""
        logger.info(
            "%s %s: %d pictures, %s%d cameras",
            dataset.name,
            split,
            counts["images"],
            known,
            counts["cameras"],
        )
    if config.method != "baseline" and dataset.train.camids.unique().numel() == 1:
        logger.warning(
            "All training pictures come from one camera: every cluster is one proxy, "
            "so the camera-aware parts have nothing to do, and training is "
            "cluster-level."
        )
    if not len(dataset.query):
        logger.info("no query and gallery: clusters are reported, but no mAP")


def _in_words(record: Metrics) -> str:
    shown = {
        "epoch": "{:d}",
        "loss": "{:.3f}",
        "clusters": "{:d}",
        "outliers": "{:d}",
        "cameras_per_cluster": "{:.2f}",
        "ari": "{:.3f}",
        "mAP": "{:.3f}",
        "rank1": "{:.3f}",
    }
    return ", ".join(
        f"{name.replace('_', ' ')} {form.format(record[name])}"
        for name, form in shown.items()
        if name in record
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[stage] = round(time.perf_counter() - start, 3)
