"""Every setting of a run: typed, frozen, checked, with presets by name.

The same records serve the command line (``--clustering.eps 0.5``), the notebooks
(``preset("smoke", method="online")``) and ``config.yaml`` in a run directory. Ranges
and choices stand in the types: pydantic refuses other values, wherever they come from,
and one sentence names the option.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from o2cap import __version__
from o2cap.errors import InputError, unknown

Method = Literal["baseline", "intra", "offline", "online", "both"]
Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
Place = Annotated[Path, Strict(False)]  # text will do

# strict: True is no number, and "3" neither
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Checked:
    """What all groups of settings share: one sentence says what is wrong first."""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, values: Any, check: Callable[[Any], Self]) -> Self:
        try:
            return check(values)
        except ValidationError as error:
            wrong = error.errors()[0]
        group = [field.name for field in fields(Config) if type(field.default) is cls]
        names = group + [part for part in wrong["loc"] if isinstance(part, str)]
        if wrong["type"] == "unexpected_keyword_argument":
            known = [".".join([*group, name]) for name in cls.__annotations__]
            raise InputError(unknown("The setting", ".".join(names), known))
        option = "--" + ".".join(names).replace("_", "-")
        rule = wrong["msg"].replace("Input", "it")
        raise InputError(f"{option} is {wrong['input']}; {rule}.")


@dataclass(frozen=True, config=STRICT)
class AugmentConfig(_Checked):
    """Random changes to a training picture."""

    flip: Share = 0.5
    """Probability of a horizontal flip."""
    pad: Annotated[float, Ge(0), Le(0.5)] = 10 / 256
    """Black border before the random crop, as a share of the height."""
    erase: Share = 0.5
    """Probability that a random rectangle is erased (2-40 % of the area)."""


@dataclass(frozen=True, config=STRICT)
class WarmStartConfig(_Checked):
    """Label-free start from random weights: each picture is its own class."""

    epochs: Annotated[int, Ge(0)] = 8
    """Length, in epochs; 0 switches the warm start off."""
    iterations: Count = 100
    """Batches in an epoch."""
    images: Annotated[int, Ge(2)] = 32
    """Different pictures in a batch; each is seen twice, augmented differently."""
    lr: Positive = 2e-3
    """Learning rate of Adam."""
    temperature: Positive = 0.1
    """Temperature of the softmax over the batch."""
    jitter: Share = 0.4
    """Strength of the colour jitter (brightness, contrast, saturation, tint)."""


@dataclass(frozen=True, config=STRICT)
class OptimConfig(_Checked):
    """Adam and its schedule. Epochs are given as shares of the whole length."""

    method: Literal["adam", "sgd"] = "adam"
    """Adam, or stochastic gradient descent with a momentum of 0.9."""
    lr: Positive = 3.5e-4
    """Learning rate after warm-up."""
    weight_decay: Share = 5e-4
    """L2 penalty, coupled as in Adam."""
    warmup: Share = 0.2
    """Share of the epochs in which the rate rises linearly from 0.01 of its value."""
    milestones: Annotated[tuple[Share, ...], Strict(False)] = (0.4, 0.8)
    """Shares of the epochs after which the rate is divided by ten."""


@dataclass(frozen=True, config=STRICT)
class BatchConfig(_Checked):
    """A batch: some proxies, some pictures of each."""

    proxies: Count = 8
    """Proxies in a batch."""
    images: Count = 4
    """Pictures of each proxy."""


@dataclass(frozen=True, config=STRICT)
class ClusteringConfig(_Checked):
    """k-reciprocal Jaccard distance and DBSCAN."""

    distance: Literal["jaccard", "camera_aware"] = "jaccard"
    """Jaccard distance over all cameras' neighbours, or CA-Jaccard (CVPR 2024)."""
    k1: Count = 20
    """Neighbours of the k-reciprocal sets."""
    k2: Count = 6
    """Neighbours averaged in the local query expansion."""
    k1_intra: Count = 5
    """Neighbours of a picture's own camera (camera_aware)."""
    k1_inter: Count = 20
    """Neighbours in the other cameras (camera_aware)."""
    k2_intra: Count = 2
    """Neighbours of the own camera in the query expansion (camera_aware)."""
    k2_inter: Count = 4
    """Neighbours in the other cameras in the query expansion (camera_aware)."""
    eps: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Largest distance of two neighbours in DBSCAN."""
    min_samples: Count = 4
    """Neighbours (the picture included) that make a core picture."""
    standardise: bool = False
    """Cluster features standardised by camera (train on them as they are)."""
    drop_single_camera: bool = False
    """Make clusters that one camera alone saw outliers."""


@dataclass(frozen=True, config=STRICT)
class LossConfig(_Checked):
    """The proxy memory and the two association losses."""

    temperature: Positive = 0.07
    """Temperature of every softmax over proxies."""
    momentum: Share = 0.2
    """Share of the old memory entry that an update keeps."""
    negatives: Annotated[int, Ge(0)] = 50
    """Hardest other proxies in the denominator."""
    positives: Count = 3
    """Positives that online association picks, one a camera."""
    balance: Share = 0.15
    """Weight of the picture, against its proxy, when online positives are picked."""
    reduction: Literal["camera_sum", "mean"] = "camera_sum"
    """Sum over cameras of each camera's mean (the public code's), or plain mean."""
    camera_entropy: bool = False
    """Weight a picture by e to the entropy (in bits) of its cluster's cameras."""
    spare_online_positives: bool = False
    """Offline association does not push away what online association pulls."""


@dataclass(frozen=True, config=STRICT)
class SyntheticConfig(_Checked):
    """Settings of the embedded data set."""

    kind: Literal["person", "vehicle"] = "person"
    """What is rendered."""
    identities: Count = 100
    """Training identities."""
    test_identities: Annotated[int, Ge(0)] = 60
    """Identities to evaluate with; none of them is trained on."""
    cameras: Count = 6
    """Number of cameras."""
    images_per_camera: Annotated[int, Ge(2)] = 4
    """Pictures of an identity in a camera that it passes."""
    presence: Annotated[float, Gt(0), Le(1)] = 0.6
    """Probability that an identity passes a camera; each passes at least two."""
    strength: Annotated[float, Ge(0)] = 1.0
    """Camera gap; 0 makes all cameras identical, 1 is the book's."""
    seed: Seed | None = None
    """Seed of identities, cameras and pictures; by default the one of the training."""


@dataclass(frozen=True, config=STRICT)
class Config(_Checked):
    """Train on several cameras' pictures without identity labels."""

    preset: str = "synthetic"
    """The named group of settings that all others start from."""
    dataset: str = "synthetic"
    """synthetic, synthetic-vehicles, market1501, dukemtmcreid, msmt17, veri776,
    manifest (a CSV file) or folders (one folder a camera)."""
    root: Place | None = None
    """Where the data set lies; for a manifest, the CSV file."""
    output: Place | None = None
    """Run directory; by default a folder under runs/ named after the settings."""
    method: Method = "both"
    """Which losses; cluster-level baseline, intra-camera, offline, online, or both."""
    seed: Seed = 0
    """Seed of everything random, of the embedded data set too."""
    epochs: Count = 50
    """Epochs; each extracts, clusters, splits by camera and trains."""
    iterations: Count = 400
    """Batches in an epoch."""
    backbone: str = "resnet50"
    """A torchvision model, tiny_resnet, resnet50_ibn_a, or ``timm:NAME``."""
    weights: Annotated[str, tyro.conf.arg(aliases=("--from",))] = "torchvision"
    """pretrained (the library's own, downloaded; torchvision is the older word),
    embedded (the package's own, of tiny_resnet on rendered pictures), none (then with
    a warm start), a file, or the directory of another run, whose weights a new schedule
    takes up."""
    pooling: Literal["avg", "gem"] = "avg"
    """Pooling over the last feature map, average or generalised mean (GeM)."""
    height: Annotated[int, Ge(16)] = 256
    """Height of the network's input, in pixels."""
    width: Annotated[int, Ge(16)] = 128
    """Width of the network's input, in pixels."""
    device: str = "auto"
    """One of auto, cpu, cuda, mps, or as ``cuda:1``."""
    workers: Annotated[int, Ge(0)] = 0
    """Threads that decode pictures; 0 is one a core. Never changes a result."""
    threads: Annotated[int, Ge(0)] = 0
    """Threads of the arithmetic on the CPU; 0 is chosen by the program."""
    precision: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 where the hardware has it, fp16 on a GPU without,
    else off."""
    cuda_graphs: bool = True
    """On a GPU, launch the network's two passes as one CUDA graph each."""
    timeout: Count = 30
    """Minutes for which one of several processes waits for another, at least as long
    as the clustering takes, which only the first one does."""
    deterministic: bool = False
    """On a GPU, only deterministic kernels (slower); on the CPU all of ours are."""
    evaluate_every: Count = 5
    """Evaluate after every so many epochs, and after the last."""
    skip_unreadable: bool = False
    """Leave unreadable pictures out, with a warning, instead of stopping."""
    strict: bool = False
    """Stop when a benchmark's counts differ from the published ones."""
    augment: AugmentConfig = AugmentConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    loss: LossConfig = LossConfig()
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.batch.proxies * self.batch.images < 2:
            raise InputError("--batch.proxies 1 needs --batch.images of at least 2.")
        for kind in ("", "_intra", "_inter"):
            k1, k2 = (getattr(self.clustering, name + kind) for name in ("k1", "k2"))
            if k2 > k1:
                option = f"--clustering.k2{kind.replace('_', '-')}"
                raise InputError(f"{option} is {k2}, more than its k1, which is {k1}.")
        return self

    @property
    def reading(self) -> dict[str, Any]:
        """What :func:`o2cap.data.loading.decode` is told."""
        names = ("height", "width", "workers", "skip_unreadable")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain YAML/JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def hash(self) -> str:
        """Return 8 hex digits over every setting that can change a result."""
        plain = {k: v for k, v in self.to_dict().items() if k not in NO_INFLUENCE}
        text = json.dumps(plain, sort_keys=True).encode()
        return hashlib.sha256(text).hexdigest()[:8]

    def directory(self) -> Path:
        """Return the run directory: `output`, or one named after the settings."""
        name = f"{self.dataset}-{self.method}-seed{self.seed}-{self.hash()}"
        return self.output or Path("runs") / name


# What a resumed run may change: where and how fast it goes, not what it computes
# (another device or number of threads rounds differently, no more).
NO_INFLUENCE = (
    *("preset", "root", "output", "device", "workers", "threads", "cuda_graphs"),
    *("timeout", "evaluate_every"),
)

_given = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text("utf-8"))
PRESETS: dict[str, Config] = {
    name: TypeAdapter(Config).validate_json(json.dumps({"preset": name} | given))
    for name, given in _given.items()
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
    return replace(PRESETS[name], **changes)


STYLE = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)


def starting_point(args: Sequence[str]) -> Config:
    """Return the settings that the options of `args` change.

    Those of `--preset`; without it, of the preset with the data set's name, or of
    ``own`` for a manifest or folders; without either, of the run that `--from` names.
    """

    @dataclass
    class Base:
        preset: str = ""
        dataset: str = ""
        weights: Annotated[str, tyro.conf.arg(aliases=("--from",))] = ""

    base, _ = tyro.cli(Base, args=args, add_help=False, return_unknown_args=True)
    before = Path(base.weights, "config.yaml")
    if base.weights and not base.preset + base.dataset and before.is_file():
        return replace(load(before), output=None)
    dataset = base.dataset or "synthetic"
    return preset(base.preset or (dataset if dataset in PRESETS else "own"))


def load(path: Path) -> Config:
    """Return the settings that a run wrote to its ``config.yaml``.

    Raises
    ------
    InputError
        When the file cannot be read, or holds a name or value that is no setting.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict):
            raise InputError("it holds none")
        # as JSON, which has text for paths and objects for groups, and no more
        return TypeAdapter(Config).validate_json(json.dumps(plain, default=str))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, InputError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        said = f"{path} cannot be read as settings of o2cap {__version__}: {reason}."
        raise InputError(said) from error
