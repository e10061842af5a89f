"""The training loop: extract, cluster, split by camera, train; again in every epoch."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor

from o2cap import clustering, distributed, losses
from o2cap.backbone import build_model
from o2cap.config import Config
from o2cap.data import load_configured
from o2cap.data.images import ReIDDataset
from o2cap.data.loading import decode
from o2cap.data.samplers import instance_batches, proxy_batches
from o2cap.device import Hardware
from o2cap.errors import InputError
from o2cap.evaluation import Evaluator, check_parts, clustering_quality
from o2cap.features import extract_all, standardise_by_camera
from o2cap.learner import Learner
from o2cap.proxies import (
    CameraProxies,
    ProxyMemory,
    drop_single_camera,
    split_by_camera,
)
from o2cap.run import Metrics, RunDirectory, RunResult, input_facts, read_run
from o2cap.weights import EMBEDDED

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
        Read from the run directory; see :class:`o2cap.run.RunDirectory`.

    Raises
    ------
    InputError
        When the data, the settings or the directory cannot be used.
    TrainingError
        When losses, weights or features are not finite; the last good checkpoint
        stays.
    """
    with distributed.joined(config.timeout), RunDirectory.claim(config, resume) as run:
        if dataset is None:
            dataset = distributed.on_first(load_configured, config)
            if distributed.size() > 1 and dataset.name.startswith("synthetic"):
                dataset = load_configured(config)  # rendered on every machine
        labels = None if pseudo_labels is None else pseudo_labels.cpu()
        n = len(dataset.train)
        if labels is not None and (labels.dtype, *labels.shape) != (torch.int64, n):
            raise InputError(
                f"pseudo_labels must be int64, one for each of {n} pictures."
            )
        facts = input_facts(dataset, labels)
        run.check_input(**facts)
        if run.finished():
            logger.info("%s is finished already", run.path)
            return distributed.on_first(read_run, run.path)
        hardware = Hardware.choose(config)
        with hardware.in_force(config):
            with stage("prepare", {}):
                learner, evaluator, pids = prepare(run, hardware, dataset, facts)
            if labels is not None and len(labels) != len(learner.images):
                raise InputError("Some pictures with pseudo_labels cannot be read.")
            with stage("warm start", {}):
                warm_start(learner, run)
            with stage("evaluate", {}):
                if run.before is None:
                    run.before = evaluator.record(learner.model)
                    logger.info("before training: %s", in_words(run.before) or "no mAP")
                    run.keep_weights(learner.model, "start.safetensors")
                    run.save(learner.state(), epoch=-1)
            for record in train_epochs(learner, evaluator, run, labels, pids):
                if on_epoch is not None:
                    on_epoch(record)
            run.keep_weights(learner.model, "model.safetensors")
            return run.finish()


def train_epochs(
    learner: Learner,
    evaluator: Evaluator,
    run: RunDirectory,
    labels: Tensor | None,
    pids: Tensor | None,
) -> Iterator[Metrics]:
    """Extract, cluster, split by camera, train; yield the record of each epoch.

    `labels` are pseudo labels to use instead of clusters; `pids` are the identities,
    where known, and only measure. Three epochs in a row without two clusters end it.
    """
    config, camids = learner.config, learner.images.camids
    idle, told = 0, "pseudo_labels hold less than two clusters"
    for epoch in range(max(0, run.next_epoch), config.epochs):
        record: Metrics = {"epoch": epoch, "lr": learning_rate(config, epoch)}
        seconds: dict[str, float] = {}
        with stage("extract", seconds):
            features = extract_all(
                learner.model, learner.pixels, config, learner.hardware
            )
        with stage("cluster", seconds):
            clusters = labels
            if clusters is None:
                clusters = distributed.on_first(find_clusters, features, camids, config)
            proxies = make_proxies(clusters, camids, config)
            memory = ProxyMemory.from_features(features, proxies, config.loss.momentum)
            distributed.copy_buffers(memory)
        record |= describe_clusters(clusters, camids, pids)
        idle = 0 if record["clusters"] > 1 else idle + 1
        if labels is None and (idle or epoch == 0):
            told = distributed.on_first(advise, features, camids, config, clusters)
        with stage("train", seconds):
            if not idle:
                record |= train_epoch(learner, memory, proxies, epoch)
            else:
                record["skipped"] = True
        with stage("evaluate", seconds):
            if epoch + 1 == config.epochs or (epoch + 1) % config.evaluate_every == 0:
                record |= evaluator.record(learner.model)
        record["seconds"] = seconds
        logger.info("%s", in_words(record))
        run.record(record, clusters)
        run.save(learner.state(), epoch)
        yield record
        if idle == 3:
            raise InputError(f"In three epochs nothing could be told apart: {told}.")


def train_epoch(
    learner: Learner, memory: ProxyMemory, proxies: CameraProxies, epoch: int
) -> Metrics:
    """Train one epoch on fixed pseudo labels.

    Parameters
    ----------
    learner : Learner
        The network and its pictures.
    memory : ProxyMemory
        On the device.
    proxies : CameraProxies
        On the CPU.
    epoch : int
        Counted from 0; decides the learning rate and the random numbers.

    Returns
    -------
    dict
        The mean losses by name, and the number of proxies and of those visited.
    """
    config = learner.config
    generator = learner.begin("train", epoch, learning_rate(config, epoch))
    number = min(config.batch.proxies, len(proxies))
    # Of several processes each needs two pictures at least, for its batch norms.
    least = math.ceil(2 * distributed.size() / number)
    together = max(config.batch.images, least)
    batches = proxy_batches(
        proxies.label, config.iterations, generator, proxies=number, images=together
    )
    there = proxies.to(learner.hardware.device)
    proxy = there.label[batches.to(learner.hardware.device)]
    for own, pictures in zip(proxy, learner.pictures(batches, generator), strict=True):
        anchors = learner.embed(pictures)
        learner.step(method_losses(config, anchors, own, memory, there))
        memory.update(anchors.detach(), own, together)
    visited = int(proxies.label[batches].unique().numel())
    return learner.end() | {"proxies": len(proxies), "proxies_visited": visited}


def warm_start(learner: Learner, run: RunDirectory) -> None:
    """Take up the checkpoint, if there is one; from random weights, warm up first.

    The epochs of a warm start count below 0, up to −1. Every batch holds different
    pictures, each twice, changed at random, and a view must find the other view of its
    picture (:func:`o2cap.losses.instance_loss`). It stands in for pretrained weights,
    which not everybody can download.
    """
    config, settings = learner.config, learner.config.warm_start
    state = run.restore()
    if state is not None:
        learner.load(state)
    elif config.weights == "none":
        run.next_epoch = -settings.epochs
    for number in range(run.next_epoch, 0):
        epoch = number + settings.epochs
        generator = learner.begin("warm start", epoch, settings.lr)
        twice = instance_batches(
            len(learner.images), settings.iterations, generator, images=settings.images
        ).repeat(1, 2)
        for pictures in learner.pictures(twice, generator, settings.jitter):
            views = learner.embed(pictures)
            loss = losses.instance_loss(views, temperature=settings.temperature)
            learner.step({"instance": loss})
        record = {"epoch": epoch, "loss": learner.end()["loss"], "lr": settings.lr}
        logger.info("warm start, epoch %d: loss %.3f", epoch, record["loss"])
        run.record_warm_start(record)
        run.save(learner.state(), number)
    if run.before is None:  # the training begins: with an optimizer of its own
        learner.restart()


def find_clusters(features: Tensor, camids: Tensor, config: Config) -> Tensor:
    """Return pseudo labels, LongTensor [N], −1 for outliers.

    Parameters
    ----------
    features : FloatTensor [N, D]
        L2-normalised.
    camids : LongTensor [N]
        Camera of each picture.
    config : Config
        Its `clustering` says how.
    """
    eps = config.clustering.eps  # DBSCAN asks for no distance above it
    distance = find_distance(features, camids, config, eps)
    clusters = clustering.dbscan(distance, eps, config.clustering.min_samples)
    if config.clustering.drop_single_camera and len(camids.unique()) > 1:
        clusters = drop_single_camera(clusters, camids)
    return clusters


def find_distance(
    features: Tensor, camids: Tensor, config: Config, max_distance: float
) -> csr_array:
    """Return the distance that the settings name, as :func:`jaccard_distance` does."""
    # With one camera there is nothing to know: the plain distance serves.
    settings, several = config.clustering, len(camids.unique()) > 1
    how: dict[str, Any] = {"max_distance": max_distance}
    if settings.standardise and several:
        features = standardise_by_camera(features, camids)
    if settings.distance == "camera_aware" and several:
        names = ("k1_intra", "k1_inter", "k2_intra", "k2_inter")
        how |= {name: getattr(settings, name) for name in names}
        return clustering.camera_aware_jaccard(features, camids, **how)
    return clustering.jaccard_distance(features, settings.k1, settings.k2, **how)


def advise(features: Tensor, camids: Tensor, config: Config, clusters: Tensor) -> str:
    """Warn of clusters that are too few, or that the lists of neighbours do not suit.

    The plain distance wants a k1 of about twice the size of the usual cluster. On 40
    sets of rendered people and video frames, with 2 to 40 pictures of a person and
    camera and a k1 from 10 to 30, that was said 66 times (k1 is out by more than 1.7).
    Clusters before training agreed better with the identities 61 times, worse once;
    whether training ends better, too, was not decided.

    Parameters
    ----------
    features, camids, config
        As for :func:`find_clusters`.
    clusters : LongTensor [N]
        What that found.

    Returns
    -------
    str
        What was said, with the eps of :func:`eps_of_most_clusters`; or "".
    """
    settings, n, outliers = config.clustering, len(clusters), int((clusters < 0).sum())
    sizes = clusters[clusters >= 0].unique(return_counts=True)[1]
    number, tips = len(sizes), []
    if number < 2 or 2 * outliers > n:
        distance = find_distance(features, camids, config, 0.8)
        found = clustering.eps_of_most_clusters(distance, settings.min_samples)
        eps, most, left = found
        if most > max(number, 1):
            tips = [f"eps {eps:g} instead of {settings.eps:g} makes {most} and {left}"]
        elif number < 2:
            tips = ["no eps up to 0.8 makes two clusters, shorter lists (k1) may"]
    k1 = min(max(2 * int(sizes.median()), 8), 30) if number > 1 else settings.k1
    out = max(k1 / settings.k1, settings.k1 / k1)
    if settings.distance == "jaccard" and out > 1.7:
        tips.append(f"k1 {k1} and k2 {round(0.3 * k1)} suit clusters of this size")
    if not tips:
        return ""
    said = f"{n} pictures, {number} clusters, {outliers} outliers; {', '.join(tips)}"
    logger.warning(said)
    return said


def make_proxies(clusters: Tensor, camids: Tensor, config: Config) -> CameraProxies:
    """Split clusters by camera; the camera-blind baseline sees one camera only."""
    seen = torch.zeros_like(camids) if config.method == "baseline" else camids
    return split_by_camera(clusters, seen)


def method_losses(
    config: Config,
    features: Tensor,
    proxy: Tensor,
    memory: ProxyMemory,
    proxies: CameraProxies,
) -> dict[str, Tensor]:
    """Return the losses that `config.method` adds up, by name.

    Parameters
    ----------
    config : Config
        Its `method`, and its `loss` with the constants.
    features : FloatTensor [B, D]
        Anchors, with gradient.
    proxy : LongTensor [B]
        Proxy of each.
    memory, proxies
        All on the device of the features.
    """
    settings = config.loss
    given = (features, proxy, memory.centroids, proxies)
    how: dict[str, Any] = {"temperature": settings.temperature}
    if config.method == "baseline":
        return {"cluster": losses.cluster_loss(*given[:3], **how)}
    how["reduction"], found = "none", {}
    if config.method == "intra":
        found["intra"] = losses.intra_camera_loss(*given, **how)
    how["negatives"] = settings.negatives
    if config.method in ("online", "both"):
        # One product with the whole memory serves both losses.
        how["similarity"], own = losses.compare_with_own(*given[:3])
    if config.method in ("offline", "both"):
        spare = None
        if config.method == "both" and settings.spare_online_positives:
            mixed = losses.online_similarity(how["similarity"], own, settings.balance)
            spare = losses.online_positives(mixed, proxies.camera, settings.positives)
        found["offline"] = losses.offline_loss(*given, **how, spare=spare)
    if config.method in ("online", "both"):
        how |= {"positives": settings.positives, "balance": settings.balance}
        found["online"] = losses.online_loss(*given, **how, own=own)
    weight: Tensor | float = 1.0
    if settings.camera_entropy:
        weight = losses.camera_entropy_weights(proxy, proxies)
    camera = proxies.camera[proxy]
    return {
        name: losses.reduce(weight * loss, camera, settings.reduction)
        for name, loss in found.items()
    }


def learning_rate(config: Config, epoch: int) -> float:
    """Return the learning rate of an epoch (counted from 0).

    It rises linearly from 0.01 of its value over the warm-up, and is divided by ten
    at each milestone; both are shares of `config.epochs`.

    Book: :eq:`learning_rate`
    """
    settings = config.optim
    warmup = round(settings.warmup * config.epochs)
    factor = 0.01 + 0.99 * epoch / warmup if epoch < warmup else 1.0
    for milestone in settings.milestones:
        factor *= 0.1 if epoch >= round(milestone * config.epochs) else 1.0
    return settings.lr * factor


# --------------------------------------------------------------- before the first epoch


def prepare(
    run: RunDirectory, hardware: Hardware, dataset: ReIDDataset, facts: Metrics
) -> tuple[Learner, Evaluator, Tensor | None]:
    """Read the pictures and build the network.

    Returns
    -------
    learner : Learner
        It sees no identities.
    evaluator : Evaluator
        Query and gallery.
    pids : LongTensor [N] or None
        The training identities, where known, to measure pseudo labels with.

    Raises
    ------
    InputError
        When data or weights cannot be used.
    """
    config = run.config
    check_parts(dataset)
    torch.manual_seed(config.seed)
    weights = config.weights
    if weights == "embedded":
        weights = str(EMBEDDED / f"{config.synthetic.kind}.safetensors")
    # Before minutes of decoding: a download may fail.
    shape: Any = {n: getattr(config, n) for n in ("height", "width", "pooling")}
    model = distributed.on_first(build_model, config.backbone, weights, **shape)
    pixels, images = decode(dataset.train, **config.reading)
    evaluator = Evaluator(config, dataset, hardware)
    (_, query), (_, gallery) = evaluator.decoded
    kept = replace(dataset, train=images, query=query, gallery=gallery)
    facts = facts | {"readable": kept.fingerprint()}
    run.check_input(**facts)
    parts = zip(dataset.splits().values(), kept.splits().values(), strict=True)
    lost = {p for every, some in parts for p in {*every.paths} - {*some.paths}}
    run.begin(hardware, facts, lost)
    announce(dataset, hardware, run)
    learner = Learner(config, hardware, model, pixels, images.without_identities())
    return learner, evaluator, images.pids


# ----------------------------------------------------------------------------- messages


def announce(dataset: ReIDDataset, hardware: Hardware, run: RunDirectory) -> None:
    """Say what is trained, on what, and with which pictures."""
    config = run.config
    logger.info(
        f"{config.method} from weights {config.weights} on {hardware.device}, "
        f"{distributed.size()} processes, precision {hardware.precision}, "
        f"{hardware.threads} threads; run directory {run.path}"
    )
    for split, counts in dataset.counts().items():
        said = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        logger.info(f"{dataset.name} {split}: {said or 'none'}")
    if config.method != "baseline" and len(dataset.train.camids.unique()) == 1:
        logger.warning(
            "All training pictures come from one camera: the camera-aware parts have "
            "nothing to do, and training is cluster-level."
        )
    if not len(dataset.query):
        logger.info("no query and gallery: clusters are reported, but no mAP")
    few = config.batch.proxies * config.batch.images < 16 * (k := distributed.size())
    if few and k > 1 and hardware.device.type == "cuda":
        logger.warning(
            f"Fewer than 16 pictures a GPU: {k} GPUs are hardly faster than one. Try "
            f"--batch.proxies {k * config.batch.proxies} --optim.lr "
            f"{k * config.optim.lr:g} --iterations {-(-config.iterations // k)}"
        )


def describe_clusters(clusters: Tensor, camids: Tensor, pids: Tensor | None) -> Metrics:
    """Return what an epoch's record says of its pseudo labels.

    Identities, where known, only measure: ARI, NMI, purity.
    """
    known = torch.full_like(clusters, -1) if pids is None else pids
    found = asdict(clustering_quality(clusters, known, camids))
    found["outliers"] = round(found.pop("outlier_share") * len(clusters))
    # NaN where there are no clusters, or no clustered picture has a known identity
    return {name: value for name, value in found.items() if value == value}


def in_words(record: Metrics) -> str:
    """Return the entries of a record that people follow, as one line."""
    shown = ("epoch", "loss", "clusters", "outliers", "cameras_per_cluster", "ari")
    return ", ".join(
        f"{name.replace('_', ' ')} {round(record[name], 3)}"
        for name in (*shown, "mAP", "rank1")
        if name in record
    )


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note the seconds of a stage; say so where the GPU's memory ends in it."""
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The GPU's memory is full (stage: {name}): resume when others need "
            "less, or begin a run with a smaller --batch.proxies, --batch.images, "
            "--warm-start.images, --height or --width."
        ) from error
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[name] = round(time.perf_counter() - start, 3)
