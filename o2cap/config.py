"""Every setting of a run: typed, frozen, with presets by name.

The same records serve the command line (``--clustering.eps 0.5``), the notebooks
(``preset("smoke", method="online")``) and ``config.yaml`` in a run directory. tyro
reads the first and the last and refuses a misspelt name with the nearest one, as
:func:`preset` does; values with which nothing can work are refused wherever they come
from.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
import yaml

from o2cap.errors import InputError, unknown

Method = Literal["baseline", "intra", "offline", "online", "both"]
Precision = Literal["auto", "bf16", "fp16", "off"]
Reduction = Literal["camera_sum", "mean"]


def _check_choices(settings: Any, prefix: str = "--") -> None:
    """Refuse a value outside its field's choices: Python itself checks none."""
    hints = get_type_hints(type(settings))
    for name in hints:
        value, choices = getattr(settings, name), get_args(hints[name])
        if is_dataclass(value):
            _check_choices(value, f"{prefix}{name.replace('_', '-')}.")
        elif get_origin(hints[name]) is Literal and value not in choices:
            option = prefix + name.replace("_", "-")
            raise InputError(unknown(option, str(value), map(str, choices)))


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to a training picture."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    pad: float = 10 / 256
    """Black border before the random crop, as a share of the height."""
    erase: float = 0.5
    """Probability that a random rectangle is erased (2-40 % of the area)."""


@dataclass(frozen=True)
class WarmStartConfig:
    """Label-free start from random weights: each picture is its own class."""

    epochs: int = 8
    """Length, in epochs; 0 switches the warm start off."""
    iterations: int = 100
    """Batches in an epoch."""
    images: int = 32
    """Different pictures in a batch; each is seen twice, augmented differently."""
    lr: float = 2e-3
    """Learning rate of Adam."""
    temperature: float = 0.1
    """Temperature of the softmax over the batch."""
    jitter: float = 0.4
    """Strength of the colour jitter (brightness, contrast, saturation, tint)."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its schedule. Epochs are given as shares of the whole length."""

    lr: float = 3.5e-4
    """Learning rate after warm-up."""
    weight_decay: float = 5e-4
    """L2 penalty, coupled as in Adam."""
    warmup: float = 0.2
    """Share of the epochs in which the rate rises linearly from 0.01 of its value."""
    milestones: tuple[float, ...] = (0.4, 0.8)
    """Shares of the epochs after which the rate is divided by ten."""


@dataclass(frozen=True)
class BatchConfig:
    """A batch: some proxies, some pictures of each."""

    proxies: int = 8
    """Proxies in a batch."""
    images: int = 4
    """Pictures of each proxy."""


@dataclass(frozen=True)
class ClusteringConfig:
    """k-reciprocal Jaccard distance and DBSCAN."""

    distance: Literal["jaccard", "camera_aware"] = "jaccard"
    """Jaccard distance over all cameras' neighbours, or CA-Jaccard (CVPR 2024)."""
    k1: int = 20
    """Neighbours of the k-reciprocal sets."""
    k2: int = 6
    """Neighbours averaged in the local query expansion."""
    k1_intra: int = 5
    """camera_aware: neighbours of a picture's own camera."""
    k1_inter: int = 20
    """camera_aware: neighbours in the other cameras."""
    k2_intra: int = 2
    """camera_aware: neighbours of the own camera averaged in the query expansion."""
    k2_inter: int = 4
    """camera_aware: neighbours in the other cameras averaged there."""
    eps: float = 0.5
    """Largest distance of two neighbours in DBSCAN."""
    min_samples: int = 4
    """Neighbours (the picture included) that make a core picture."""
    standardise: bool = False
    """Cluster features standardised by camera (train on them as they are)."""
    drop_single_camera: bool = False
    """Make clusters that one camera alone saw outliers."""


@dataclass(frozen=True)
class LossConfig:
    """The proxy memory and the two association losses."""

    temperature: float = 0.07
    """Temperature of every softmax over proxies."""
    momentum: float = 0.2
    """Share of the old memory entry that an update keeps."""
    negatives: int = 50
    """Hardest other proxies in the denominator."""
    positives: int = 3
    """Positives that online association picks, one a camera."""
    balance: float = 0.15
    """Weight of the picture, against its proxy, when online positives are picked."""
    reduction: Reduction = "camera_sum"
    """Sum over cameras of each camera's mean (the public code's), or plain mean."""
    camera_entropy: bool = False
    """Weight a picture by 2 to the entropy of its cluster's cameras."""
    spare_online_positives: bool = False
    """Offline association does not push away what online association pulls."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Settings of the embedded data set.

    Raises
    ------
    InputError
        For a setting that cannot be used, named.
    """

    kind: Literal["person", "vehicle"] = "person"
    """What is rendered."""
    identities: int = 100
    """Training identities."""
    test_identities: int = 60
    """Identities to evaluate with; none of them is trained on."""
    cameras: int = 6
    """Number of cameras."""
    images_per_camera: int = 4
    """Pictures of an identity in a camera that it passes."""
    presence: float = 0.6
    """Probability that an identity passes a camera; each passes at least two."""
    strength: float = 1.0
    """Camera gap; 0 makes all cameras identical, 1 is the book's."""
    seed: int | None = None
    """Seed of identities, cameras and pictures; by default the one of the training."""

    def __post_init__(self) -> None:
        _check_choices(self, "--synthetic.")
        least = {"identities": 1, "test_identities": 0, "cameras": 1}
        least |= {"images_per_camera": 2, "seed": 0, "strength": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise InputError(f"synthetic.{name} must be at least {low}: {value}")
        if not 0 < self.presence <= 1:
            raise InputError(f"synthetic.presence must lie in (0, 1]: {self.presence}")


@dataclass(frozen=True)
class Config:
    """Train on several cameras' pictures without identity labels."""

    preset: str = "synthetic"
    """The named group of settings that all others start from."""
    dataset: str = "synthetic"
    """synthetic, synthetic-vehicles, market1501, dukemtmcreid, msmt17, veri776,
    manifest (a CSV file) or folders (one folder a camera)."""
    root: Path | None = None
    """Where the data set lies; for a manifest, the CSV file."""
    output: Path | None = None
    """Run directory; by default a folder under runs/ named after the settings."""
    method: Method = "both"
    """Which losses; cluster-level baseline, intra-camera, offline, online, or both."""
    seed: int = 0
    """Seed of everything random, of the embedded data set too."""
    epochs: int = 50
    """Epochs; each extracts, clusters, splits by camera and trains."""
    iterations: int = 400
    """Batches in an epoch."""
    backbone: str = "resnet50"
    """tiny_resnet, resnet50_ibn_a, or any torchvision classification model."""
    weights: str = "torchvision"
    """torchvision (its own, downloaded), none (then with a warm start), or a file: of
    the backbone, or of another run (its model.safetensors or start.safetensors)."""
    pooling: Literal["avg", "gem"] = "avg"
    """Pooling over the last feature map, average or generalised mean (GeM)."""
    height: int = 256
    """Height of the network's input, in pixels."""
    width: int = 128
    """Width of the network's input, in pixels."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    workers: int = 0
    """Threads that decode pictures; 0 is one a core. Never changes a result."""
    threads: int = 0
    """Threads of the arithmetic on the CPU; 0 is chosen by the program."""
    precision: Precision = "auto"
    """Mixed precision; auto is bf16 where the hardware has it, fp16 on a GPU without,
    else off."""
    deterministic: bool = False
    """On a GPU, only deterministic kernels (slower); on the CPU all of ours are."""
    evaluate_every: int = 5
    """Evaluate after every so many epochs, and after the last."""
    skip_unreadable: bool = False
    """Leave unreadable pictures out, with a warning, instead of stopping."""
    strict: bool = False
    """Stop when a benchmark's counts differ from the published ones."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        """Refuse values with which a run cannot work (InputError names the option)."""
        _check_choices(self)
        at_least = {
            "epochs": (self.epochs, 1),
            "iterations": (self.iterations, 1),
            "height": (self.height, 16),
            "width": (self.width, 16),
            "workers": (self.workers, 0),
            "threads": (self.threads, 0),
            "evaluate-every": (self.evaluate_every, 1),
            "warm-start.epochs": (self.warm_start.epochs, 0),
            "warm-start.iterations": (self.warm_start.iterations, 1),
            "warm-start.images": (self.warm_start.images, 2),
            "batch.proxies": (self.batch.proxies, 1),
            "batch.images": (self.batch.images, 1),
            "clustering.k1": (self.clustering.k1, 1),
            "clustering.k2": (self.clustering.k2, 1),
            "clustering.k1-intra": (self.clustering.k1_intra, 1),
            "clustering.k1-inter": (self.clustering.k1_inter, 1),
            "clustering.k2-intra": (self.clustering.k2_intra, 1),
            "clustering.k2-inter": (self.clustering.k2_inter, 1),
            "clustering.min-samples": (self.clustering.min_samples, 1),
            "loss.negatives": (self.loss.negatives, 0),
            "loss.positives": (self.loss.positives, 1),
        }
        for name, (value, least) in at_least.items():
            if value < least:
                raise InputError(f"--{name} is {value}; it must be at least {least}.")
        if self.batch.proxies * self.batch.images < 2:
            raise InputError(
                "--batch.proxies times --batch.images is 1; batch normalisation "
                "needs at least 2 pictures in a batch."
            )
        within = {
            "augment.flip": (self.augment.flip, 0.0, 1.0),
            "augment.pad": (self.augment.pad, 0.0, 0.5),
            "augment.erase": (self.augment.erase, 0.0, 1.0),
            "loss.momentum": (self.loss.momentum, 0.0, 1.0),
            "loss.balance": (self.loss.balance, 0.0, 1.0),
            "clustering.eps": (self.clustering.eps, 0.0, 1.0),
            "optim.warmup": (self.optim.warmup, 0.0, 1.0),
            "optim.weight-decay": (self.optim.weight_decay, 0.0, 1.0),
            "warm-start.jitter": (self.warm_start.jitter, 0.0, 1.0),
        }
        for name, (number, low, high) in within.items():
            if not low <= number <= high:
                raise InputError(
                    f"--{name} is {number}; it must lie between {low:g} and {high:g}."
                )
        if self.clustering.k2 > self.clustering.k1:
            raise InputError(
                f"--clustering.k2 is {self.clustering.k2}; it must be at most "
                f"--clustering.k1, which is {self.clustering.k1}."
            )
        if self.clustering.eps == 1:
            raise InputError(
                "--clustering.eps is 1.0; it must be below 1, the distance of pictures "
                "that have nothing in common."
            )
        if not all(0 <= share <= 1 for share in self.optim.milestones):
            raise InputError(
                f"--optim.milestones are {self.optim.milestones}; they are shares of "
                "the epochs and must lie between 0 and 1."
            )
        positive = {
            "loss.temperature": self.loss.temperature,
            "warm-start.temperature": self.warm_start.temperature,
            "optim.lr": self.optim.lr,
            "warm-start.lr": self.warm_start.lr,
        }
        for name, number in positive.items():
            if not 0 < number < float("inf"):
                raise InputError(f"--{name} is {number}; it must be above 0.")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed is {self.seed}; it must be 0 or above.")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain YAML/JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def hash(self) -> str:
        """Return 8 hex digits over every setting that can change a result."""
        plain = {k: v for k, v in self.to_dict().items() if k not in NO_INFLUENCE}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[
            :8
        ]

    def directory(self) -> Path:
        """Return the run directory: `output`, or one named after the settings."""
        name = f"{self.dataset}-{self.method}-seed{self.seed}-{self.hash()}"
        return self.output or Path("runs") / name


# What a resumed run may change: where and how fast it goes, not what it computes
# (another device or number of threads rounds differently, no more).
NO_INFLUENCE = (
    "preset",
    "root",
    "output",
    "device",
    "workers",
    "threads",
    "evaluate_every",
)

_EMBEDDED = Config(
    preset="synthetic",
    backbone="tiny_resnet",
    weights="none",
    precision="off",  # the same numbers on a laptop without bf16
    height=64,
    width=32,
    epochs=10,
    iterations=50,
    clustering=ClusteringConfig(k1=15, k2=4),
    optim=OptimConfig(lr=1e-3, milestones=(0.8,)),
)

PRESETS: dict[str, Config] = {
    # seconds: for tests and a first look
    "smoke": replace(
        _EMBEDDED,
        preset="smoke",
        epochs=4,
        iterations=20,
        warm_start=WarmStartConfig(epochs=4, iterations=20),
        synthetic=SyntheticConfig(identities=24, test_identities=12, cameras=4),
    ),
    # the book's: the paper's effect in minutes on a laptop
    "synthetic": _EMBEDDED,
    "synthetic-vehicles": replace(
        _EMBEDDED,
        preset="synthetic-vehicles",
        dataset="synthetic-vehicles",
        width=64,
        synthetic=SyntheticConfig(kind="vehicle"),
    ),
    # the paper's
    "market1501": Config(preset="market1501", dataset="market1501"),
    "dukemtmcreid": Config(preset="dukemtmcreid", dataset="dukemtmcreid"),
    "msmt17": Config(preset="msmt17", dataset="msmt17"),
    "veri776": Config(preset="veri776", dataset="veri776", height=256, width=256),
    # the paper's, for the person's own pictures (manifest or folders)
    "own": Config(preset="own", dataset="manifest"),
}


def preset(name: str, **changes: Any) -> Config:
    """Return the settings called `name`, with top-level fields changed.

    Raises
    ------
    InputError
        When no preset, or no setting, has that name, or a value cannot work.
    """
    if name not in PRESETS:
        raise InputError(unknown("The preset", name, PRESETS))
    known = [field.name for field in fields(Config)]
    for change in changes:
        if change not in known:
            raise InputError(unknown("The setting", change, known))
    return replace(PRESETS[name], **changes)


@dataclass(frozen=True)
class _Start:
    """The two options that decide from where all others start."""

    preset: str | None = None
    dataset: str | None = None


STYLE = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)


def starting_point(args: Sequence[str]) -> Config:
    """Return the settings that the options of `args` change.

    Those of `--preset`; without it, of the preset with the data set's name, or of
    ``own`` for a manifest or folders.
    """
    start, _ = tyro.cli(_Start, args=args, add_help=False, return_unknown_args=True)
    name = start.preset or start.dataset or "synthetic"
    if start.preset is None and name not in PRESETS:
        name = "own"
    return preset(name)


def load(path: Path) -> Config:
    """Return the settings that a run wrote to its ``config.yaml``.

    Raises
    ------
    InputError
        When the file cannot be read, or holds a name or value that is no setting.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # Aliases can make a small file a huge or an endless one.
        if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text)):
            raise InputError(f"{path} holds aliases (*name), which no run writes.")
        plain = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as settings: {reason}") from error
    if not isinstance(plain, dict):
        raise InputError(f"{path} holds no settings; is it the config.yaml of a run?")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = list(_as_options(plain))
            return tyro.cli(Config, args=options, add_help=False, config=STYLE)
    except SystemExit as error:
        text = said.getvalue().partition("For full helptext")[0]
        text = re.sub(r"[^\w\s.,:;'\"()=/-]|[─│╭╮╰╯]", " ", text)
        raise InputError(f"{path}: {' '.join(text.split())}") from error


def _as_options(plain: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from _as_options(value, f"{prefix}{name}.")
        elif str(value).startswith("-"):  # no option, though it looks like one
            yield f"{prefix}{name}={value}"
        else:
            yield f"{prefix}{name}"
            yield from map(str, value if isinstance(value, list) else [value])
