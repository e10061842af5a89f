"""The epoch loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.amp import GradScaler
from tqdm import tqdm

from o2cap import distributed, losses
from o2cap.backbone import ReIDModel, build_model
from o2cap.clustering import dbscan, jaccard_distance
from o2cap.config import Config
from o2cap.data import load_configured
from o2cap.data.images import ReIDDataset
from o2cap.data.loading import decode
from o2cap.data.samplers import instance_batches, proxy_batches
from o2cap.data.transforms import augment
from o2cap.device import Hardware
from o2cap.errors import InputError, TrainingError
from o2cap.evaluation import Evaluator, check_parts, clustering_quality
from o2cap.features import autocast, extract, extract_all
from o2cap.neighbours import nearest_neighbours
from o2cap.proxies import CameraProxies, ProxyMemory, split_by_camera
from o2cap.run import Metrics, RunDirectory, RunResult, load_model

logger = logging.getLogger("o2cap")


def train(
    config: Config,
    dataset: ReIDDataset | None = None,
    *,
    pseudo_labels: Tensor | None = None,
    resume: bool = True,
    on_epoch: Callable[[Metrics], None] | None = None,
) -> RunResult:
    """Train without identity labels, and evaluate.

    Under torchrun every process makes this call, and all return the same; see
    :mod:`o2cap.distributed`.

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
        Also in the run directory; see :class:`o2cap.run.RunDirectory`.

    Raises
    ------
    InputError
        When the data, the settings or the directory cannot be used.
    TrainingError
        When losses, weights or features are not finite; the last good checkpoint
        stays.
    """
    pseudo_labels = check_labels(pseudo_labels)
    with (
        distributed.joined(),
        RunDirectory.claim(config, resume) as run,
        _memory_suffices(),
    ):
        run.check_input(dataset, pseudo_labels)
        if run.finished():
            logger.info("%s is finished already", run.path)
            return run.result(distributed.on_first(load_model, run.path)[1])
        with distributed.together():
            hardware = Hardware.choose(config)
        with hardware.in_force(config):
            return _train(run, config, hardware, dataset, pseudo_labels, on_epoch)


def _train(
    run: RunDirectory,
    config: Config,
    hardware: Hardware,
    dataset: ReIDDataset | None,
    pseudo_labels: Tensor | None,
    on_epoch: Callable[[Metrics], None] | None,
) -> RunResult:
    # -- data
    check_batches(config)
    if dataset is None:
        dataset = distributed.on_first(load_configured, config)
        run.check_input(dataset, pseudo_labels)
    check_parts(dataset)

    # -- model, before minutes of decoding: a download may fail
    torch.manual_seed(config.seed)
    model = distributed.on_first(
        build_model,
        config.backbone,
        config.weights,
        height=config.height,
        width=config.width,
        pooling=config.pooling,
    ).to(hardware.device)
    model = model.to(memory_format=torch.channels_last)
    network = distributed.parallel(model, hardware.device)

    # -- pictures, decoded once; from here on, training has no identities
    with distributed.together():
        pixels, train_set = decode(
            dataset.train,
            config.height,
            config.width,
            workers=config.workers,
            skip_unreadable=config.skip_unreadable,
        )
        evaluator = Evaluator(config, dataset, hardware)
    evaluated = [part for _, part in evaluator.decoded] or (
        dataset.query,
        dataset.gallery,
    )
    kept = ReIDDataset(dataset.name, train_set, *evaluated)
    pids, images = train_set.pids, train_set.without_identities()
    if pseudo_labels is not None and len(pseudo_labels) != len(images):
        raise InputError(
            f"There are {len(pseudo_labels)} pseudo labels for {len(images)} "
            "readable training pictures; give one for each."
        )
    pixels = hardware.place(pixels)
    run.begin(dataset, hardware, pseudo_labels, kept)
    _announce(dataset, hardware, run, config)

    # -- warm start, or on from where the run was left
    optimizer = _adam(model, config.optim.lr, config, hardware)
    scaler = GradScaler(hardware.device.type, enabled=hardware.precision == "fp16")
    state = run.restore()
    if state is None or state["stage"] == "warm start":
        if warm_start_runs(config):
            warm_start(
                model,
                network,
                pixels,
                config,
                hardware,
                run,
                state,
                paths=images.paths,
            )
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
            features = extract_all(model, pixels, config, hardware)
        with _timed(seconds, "cluster"):
            if pseudo_labels is None:
                clusters = find_clusters(features, config)
            else:
                clusters = pseudo_labels
            proxies = make_proxies(clusters, images.camids, config)
            memory = ProxyMemory.from_features(
                features, proxies.to(hardware.device), config.loss.momentum
            )
            distributed.copy_buffers(memory)
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
                    network,
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


# ------------------------------------------------------------------ what one epoch does


def find_clusters(features: Tensor, config: Config) -> Tensor:
    """Return pseudo labels, LongTensor [N], −1 for outliers.

    Each process searches the neighbours of its share; the first one clusters.
    """
    settings, n = config.clustering, len(features)
    similarity, index = nearest_neighbours(
        features,
        min(settings.k1, n),
        rows=distributed.share(n),
    )
    similarity, index = similarity.to(features.device), index.to(features.device)
    neighbours = distributed.gather(similarity, n), distributed.gather(index, n)

    def cluster() -> Tensor:
        distance = jaccard_distance(
            features,
            settings.k1,
            settings.k2,
            neighbours=neighbours,
            max_distance=settings.eps,  # DBSCAN asks for no larger one
        )
        return dbscan(distance, settings.eps, settings.min_samples)

    return distributed.on_first(cluster)


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
    similarity = own = None
    if config.method == "both":  # one product with the whole memory serves both losses
        similarity, own = losses.compare_with_own(features, proxy, centroids)
    if config.method in ("offline", "both"):
        found["offline"] = losses.offline_loss(
            *given, **common, negatives=settings.negatives, similarity=similarity
        )
    if config.method in ("online", "both"):
        found["online"] = losses.online_loss(
            *given,
            **common,
            negatives=settings.negatives,
            positives=settings.positives,
            balance=settings.balance,
            similarity=similarity,
            own=own,
        )
    return found


def learning_rate(config: Config, epoch: int) -> float:
    """Return the learning rate of an epoch (counted from 0).

    It rises linearly from 0.01 of its value over the warm-up, and is divided by ten
    at each milestone; both are shares of `config.epochs`.

    Book: :eq:`learning_rate`
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


def _step(loss: Tensor, optimizer: torch.optim.Adam, scaler: GradScaler) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def warm_start_runs(config: Config) -> bool:
    """Say whether training begins with a warm start: from random weights only."""
    return config.weights == "none" and config.warm_start.epochs > 0


def warm_start(
    model: ReIDModel,
    network: nn.Module,
    pixels: Tensor,
    config: Config,
    hardware: Hardware,
    run: RunDirectory,
    state: dict[str, Any] | None,
    *,
    paths: Sequence[Path],
) -> None:
    """Train from random weights without labels: each picture is its own class.

    Every batch holds different pictures, each twice, changed at random, and a view
    must find the other view of its picture (:func:`o2cap.losses.instance_loss`). It
    stands in for ImageNet weights, which not everybody can download.

    Parameters
    ----------
    network : nn.Module
        `model`, or what several processes train it through.
    pixels : uint8 Tensor [N, H, W, 3]
        Training pictures.
    state : dict or None
        What the run directory holds of an interrupted warm start.
    paths : sequence of Path
        As in :func:`train_epoch`.
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
        own = distributed.share(2 * batches.shape[1])
        network.train()
        history: list[Tensor] = []
        for index in _bar(batches, f"warm start {epoch}"):
            pictures = augment(
                hardware.batch(pixels, index.repeat(2)),
                generator,
                flip=config.augment.flip,
                pad=config.augment.pad,
                erase=config.augment.erase,
                jitter=settings.jitter,
                rows=own,
            )
            with autocast(hardware.device, hardware.precision):
                features = network(pictures)
            features = distributed.gather(features, 2 * len(index))
            loss = losses.instance_loss(features, temperature=settings.temperature)
            _step(loss, optimizer, scaler)
            history.append(loss.detach())
        distributed.copy_buffers(model)
        found = torch.stack(history).cpu()
        with distributed.together():
            check_finite(
                found,
                model,
                pixels,
                batches,
                config,
                hardware,
                epoch=epoch,
                lr=settings.lr,
                paths=paths,
                whose="The warm start's",
            )
        mean = float(sum(found)) / len(found)  # in order, as one adds them up
        logger.info("warm start, epoch %d: loss %.3f", epoch, mean)
        run.record_warm_start({"epoch": epoch, "loss": mean, "lr": settings.lr})
        run.save({"stage": "warm start", "epoch": epoch}, model, optimizer, scaler)


def _seed_everything(seed: int) -> Generator:
    """Seed torch's own generators (dropout) and return one for batches and changes.

    Processes draw the same batches and changes, and each its own dropout.
    """
    torch.manual_seed(seed + distributed.rank())
    return Generator().manual_seed(seed)


def train_epoch(
    network: nn.Module,
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
    """Train one epoch on fixed pseudo labels.

    Parameters
    ----------
    network : nn.Module
        The model, or what several processes train it through.
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
    size = batches.shape[1]
    if size % distributed.size():
        raise TrainingError(
            f"Epoch {epoch} has {len(proxies)} proxies, so batches of {size} pictures, "
            f"which do not divide among {distributed.size()} processes; go on with "
            "fewer."
        )
    own = distributed.share(size)
    on_device = proxies.to(hardware.device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    network.train()
    history: list[Tensor] = []
    for index in _bar(batches, f"epoch {epoch}"):
        pictures = augment(
            hardware.batch(pixels, index),
            generator,
            flip=config.augment.flip,
            pad=config.augment.pad,
            erase=config.augment.erase,
            rows=own,
        )
        with autocast(hardware.device, hardware.precision):
            features = network(pictures)
        features = distributed.gather(features, size)
        proxy = proxies.label[index]
        parts = method_losses(
            config,
            features,
            proxy.to(hardware.device, non_blocking=True),
            memory.centroids,
            on_device,
        )
        names = list(parts)
        _step(torch.stack(list(parts.values())).sum(), optimizer, scaler)
        memory.update(features.detach(), proxy)
        # Looked at once per epoch: asking a GPU for each loss would wait for it.
        history.append(torch.stack(list(parts.values())).detach())
    distributed.copy_buffers(network)
    found = torch.stack(history).cpu()
    with distributed.together():
        check_finite(
            found.sum(dim=1),
            network,
            pixels,
            batches,
            config,
            hardware,
            epoch=epoch,
            lr=learning_rate(config, epoch),
            paths=paths,
        )
    mean = dict(zip(names, found.mean(dim=0).tolist(), strict=True))
    return {
        "loss": sum(mean.values()),
        **{f"loss_{name}": value for name, value in mean.items()},
        "proxies": len(proxies),
        "proxies_visited": int(proxies.label[batches].unique().numel()),
    }


def check_finite(
    loss: Tensor,
    network: nn.Module,
    pixels: Tensor,
    batches: Tensor,
    config: Config,
    hardware: Hardware,
    *,
    epoch: int,
    lr: float,
    paths: Sequence[Path],
    whose: str = "The",
) -> None:
    """Refuse an epoch that broke the network, before it replaces the last good one.

    A loss tells of the weights before its step only; so the weights that the last step
    left are looked at too, and what they make of the last batch.

    Parameters
    ----------
    loss : Tensor [iterations]
        On the CPU.
    batches : LongTensor [iterations, B]
        The pictures of each.

    Raises
    ------
    TrainingError
        Names the epoch, the learning rate and pictures of the batch.
    """
    bad = (~loss.isfinite()).nonzero().flatten()
    at = int(bad[0]) if len(bad) else len(loss) - 1
    if len(bad):
        what = f"loss is {loss[at].item()}"
    else:
        # (Of several processes, what DistributedDataParallel trains.)
        model: Any = getattr(network, "module", network)
        numbers = [*model.parameters(), *model.buffers()]
        finite = [x.isfinite().all() for x in numbers if x.is_floating_point()]
        features = extract(
            model,
            hardware.batch(pixels, batches[-1]),
            height=config.height,
            width=config.width,
            device=hardware.device,
        )
        if torch.stack([*finite, features.isfinite().all()]).all():
            return
        what = "network breaks (its weights or features are not finite)"
    some = ", ".join(str(paths[i]) for i in batches[at][:4].tolist())
    option = "--optim.lr" if whose == "The" else "--warm-start.lr"
    raise TrainingError(
        f"{whose} {what} in epoch {epoch}, iteration {at} (learning rate {lr:g}; "
        f"pictures {some}, ...); nothing of this epoch is kept. Lower {option}, or try "
        "--precision off."
    )


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


def check_labels(labels: Tensor | None) -> Tensor | None:
    """Return pseudo labels as int64 on the CPU.

    Raises
    ------
    InputError
        When they are not one whole number a picture.
    """
    if labels is None:
        return None
    kind = labels.dtype
    whole = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if labels.ndim != 1 or not whole:
        raise InputError(
            "Pseudo labels must be whole numbers, one a picture: a LongTensor [N], not "
            f"{kind} {list(labels.shape)}."
        )
    return labels.to("cpu", torch.int64)


def check_batches(config: Config) -> None:
    """Refuse batches of which several processes would get unequal shares.

    Raises
    ------
    InputError
        Names the options that decide the number of pictures.
    """
    batch, warm = config.batch, config.warm_start
    distributed.check_batch(
        batch.proxies * batch.images, "--batch.proxies times --batch.images"
    )
    if warm_start_runs(config):
        distributed.check_batch(2 * warm.images, "twice --warm-start.images")


# ----------------------------------------------------------------------------- messages


def _announce(
    dataset: ReIDDataset, hardware: Hardware, run: RunDirectory, config: Config
) -> None:
    several = f", {distributed.size()} processes" if distributed.size() > 1 else ""
    logger.info(
        "%s on %s%s, precision %s, %d threads; run directory %s",
        config.method,
        hardware.device,
        several,
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


def _bar(batches: Tensor, what: str) -> Iterator[Tensor]:
    """Draw a progress bar, once, and on a terminal only."""
    hidden = None if distributed.rank() == 0 else True
    return iter(tqdm(batches, what, leave=False, disable=hidden))


@contextlib.contextmanager
def _memory_suffices() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "The GPU's memory is full. If another program fills it, the same command "
            "resumes later where this one stopped; if not, a new run with a smaller "
            "--batch.proxies, --batch.images, --height or --width needs less."
        ) from error


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[stage] = round(time.perf_counter() - start, 3)
