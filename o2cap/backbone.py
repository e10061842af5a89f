"""From a picture to a feature: backbone, pooling, batch-norm neck, L2 norm."""

from __future__ import annotations

import re
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from o2cap.errors import InputError, unknown
from o2cap.files import usable

# Parts of torchvision's models that a backbone does without.
_CLASSIFIERS = ("fc", "classifier", "heads", "head", "AuxLogits", "aux1", "aux2")
_OWN = ("tiny_resnet", "resnet50_ibn_a", "resnet101_ibn_a")

# Their auxiliary classifiers are left out as the main one is, with its dropout, and
# their weights expect colours in −1..1.
_INCEPTION: dict[str, Any] = {
    "aux_logits": False,
    "transform_input": True,
    "init_weights": True,
    "dropout": 0.0,
}
_OPTIONS = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}

# Names in torchvision's older weight files, which its own loaders translate too.
_RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(\.mlp)\.linear_2\."), r"\1.3."),
)


class GeM(nn.Module):
    """Generalised-mean pooling, mean(x^p)^(1/p), with a learned p.

    Maps [B, D, h, w] to [B, D]. p = 1 is average pooling, large p nears the maximum.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In float32: a cube of a half-precision activation overflows easily.
        powered = x.float().clamp(min=self.eps).pow(self.p)
        return powered.mean(dim=(2, 3)).pow(1 / self.p)


class AveragePool(nn.Module):
    """Average pooling: [B, D, h, w] to [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3))


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the rest.

    The «a» variant of IBN-Net puts one after the first convolution of every
    bottleneck of stages 1 to 3. The attribute names are those of the public
    weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([self.IN.num_features, self.BN.num_features], dim=1)
        return torch.cat([self.IN(first), self.BN(second)], dim=1)


class TinyResNet(nn.Module):
    """The embedded set's backbone: a stride-2 stem and three basic blocks.

    Maps [B, 3, H, W] to [B, 96, H/8, W/8]; 173,304 parameters.
    """

    def __init__(self) -> None:
        super().__init__()

        def block(inside: int, out: int, stride: int) -> BasicBlock:
            if stride == 1 and inside == out:
                return BasicBlock(inside, out)
            shortcut = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
            return BasicBlock(inside, out, stride, shortcut)

        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            block(24, 24, 1),
            block(24, 48, 2),
            block(48, 96, 2),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ReIDModel(nn.Module):
    """A backbone with what Re-ID puts on top of it.

    Maps pictures [B, 3, H, W] (normalised float) to features [B, D], float32, of
    length 1: pooling, batch norm with its bias frozen at 0 (BN neck), L2 norm.
    """

    def __init__(self, backbone: nn.Module, pooling: nn.Module, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.bottleneck = nn.BatchNorm1d(dim)
        self.bottleneck.bias.requires_grad_(False)

    @property
    def dim(self) -> int:
        """Length D of a feature."""
        return self.bottleneck.num_features

    def forward(self, pictures: Tensor) -> Tensor:
        pooled = self.pooling(self.backbone(pictures))
        with torch.autocast(pictures.device.type, enabled=False):
            return F.normalize(self.bottleneck(pooled.float()))


def build_model(
    backbone: str,
    weights: str = "torchvision",
    *,
    height: int = 256,
    width: int = 128,
    pooling: Literal["avg", "gem"] = "avg",
    last_stride: Literal[1, 2] = 1,
) -> ReIDModel:
    """Return the model called `backbone`, its classifier removed.

    Parameters
    ----------
    backbone : str
        ``tiny_resnet``, ``resnet50_ibn_a``, ``resnet101_ibn_a``, or the name of a
        classification model of torchvision.
    weights : str
        ``torchvision`` (downloads its own), ``none``, or a file: safetensors, or a
        state dict that ``torch.save`` wrote; of the backbone, or of a whole model as
        a run directory holds it.
    height, width : int
        Size of the input in pixels.
    last_stride : 1 or 2
        Stride of the last stage of a ResNet; other backbones ignore it.

    Raises
    ------
    InputError
        For an unknown name, weights that do not fit or cannot be had, an input
        size the backbone refuses, or GeM on a backbone that has no feature map.
    """
    network = _network(backbone)
    state = _read_weights(backbone, weights)
    whole = "bottleneck.weight" in state
    if state and not whole:
        _load_weights(network, backbone, weights, state)
    if isinstance(network, ResNet) and last_stride == 1:
        first = network.layer4[0]
        (first.conv2 if isinstance(first, Bottleneck) else first.conv1).stride = (1, 1)
        first.downsample[0].stride = (1, 1)
    body = _without_classifier(network)
    try:
        with torch.inference_mode():
            shape = body.eval()(torch.zeros(1, 3, height, width)).shape
    except Exception as error:
        raise InputError(
            f"The backbone {backbone} refuses pictures of height {height} and width "
            f"{width} ({error}); choose another --height and --width."
        ) from error
    if len(shape) == 4:
        pool: nn.Module = GeM() if pooling == "gem" else AveragePool()
    elif pooling == "gem":
        raise InputError(
            f"The backbone {backbone} pools by itself; leave --pooling at avg."
        )
    else:
        pool = nn.Identity()
    model = ReIDModel(body, pool, shape[1])
    if whole:
        _load_weights(model, backbone, weights, state)
    return model.train()


def _network(name: str) -> nn.Module:
    if name == "tiny_resnet":
        return TinyResNet()
    known = torchvision.models.list_models(module=torchvision.models)
    if name.endswith("_ibn_a") and name in _OWN:
        network = torchvision.models.get_model(name.removesuffix("_ibn_a"))
        for stage in (network.layer1, network.layer2, network.layer3):
            for block in stage:
                block.bn1 = IBN(block.bn1.num_features)
        return network
    if name not in known:
        raise InputError(unknown("The backbone", name, [*_OWN, *known]))
    return torchvision.models.get_model(name, weights=None, **_OPTIONS.get(name, {}))


def _without_classifier(network: nn.Module) -> nn.Module:
    """Return what maps pictures to a feature map, or else to a pooled vector."""
    if isinstance(network, ResNet):
        return nn.Sequential(*list(network.children())[:-2])
    if isinstance(network, torchvision.models.DenseNet):
        return nn.Sequential(network.features, nn.ReLU())
    if isinstance(network, torchvision.models.SwinTransformer):
        network.head = nn.Identity()
    elif isinstance(features := getattr(network, "features", None), nn.Module):
        return features
    else:
        for name in _CLASSIFIERS:
            if hasattr(network, name):
                setattr(network, name, nn.Identity())
    return network


@torch.no_grad()
def _read_weights(backbone: str, weights: str) -> dict[str, Tensor]:
    if weights == "none":
        return {}
    if weights == "torchvision":
        return _download(backbone)
    return read_state_dict(Path(weights))


def _load_weights(
    network: nn.Module, backbone: str, weights: str, state: dict[str, Tensor]
) -> None:
    for pattern, name in _RENAMED:
        state = {pattern.sub(name, k): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k.split(".")[0] not in _CLASSIFIERS}
    mine = {
        k: v
        for k, v in network.state_dict().items()
        if k.split(".")[0] not in _CLASSIFIERS
    }
    # BN counters are no weights; files made long ago do not have them.
    needed = [k for k in mine if not k.endswith("num_batches_tracked")]
    common = [k for k in mine if k in state]
    for what, names in (
        ("has entries that the backbone does not know", [*state.keys() - mine.keys()]),
        ("lacks entries of the backbone", [k for k in needed if k not in state]),
        (
            "has entries of another shape",
            [k for k in common if mine[k].shape != state[k].shape],
        ),
    ):
        if names:
            raise InputError(
                f"The weights {weights} do not fit the backbone {backbone}: the file "
                f"{what}, {len(names)} in all, for instance {min(names)}."
            )
    for name in common:
        mine[name].copy_(state[name])


def _download(backbone: str) -> dict[str, Tensor]:
    if backbone in _OWN:
        raise InputError(
            f"torchvision has no weights for {backbone}; give a file with --weights "
            "FILE (safetensors or a state dict), or start from --weights none."
        )
    choices = torchvision.models.get_model_weights(backbone)
    choice = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
    try:
        return choice.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, UnpicklingError) as error:
        raise InputError(
            f"The ImageNet weights of {backbone} cannot be downloaded ({error}); "
            f"fetch {choice.url} where there is internet, copy it here and give it "
            "with --weights FILE, or start from --weights none, best with the small "
            "--backbone tiny_resnet --height 64 --width 32."
        ) from error


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that holds its real numbers one by one."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_complex() or value.is_meta)
    )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, without running any code in it.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, or a state dict that ``torch.save`` wrote (plain,
        or under the key ``state_dict`` or ``model``; a leading ``module.`` of
        DataParallel is removed).

    Raises
    ------
    InputError
        When the file is missing, damaged, more than a dictionary of tensors, or holds
        NaN or infinity.
    """
    with usable(path):
        exists = path.is_file()
    if not exists:
        raise InputError(f"The weights file {path} does not exist.")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        if isinstance(error, UnpicklingError):  # whose own text advises to trust it
            reason = "damaged, or holds objects besides tensors, which are never loaded"
        raise InputError(
            f"The weights file {path} cannot be read as safetensors or as a plain "
            f"state dict ({reason})."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in state.items()
    ):
        raise InputError(f"The weights file {path} is no dictionary of tensors.")
    for name, value in state.items():
        if not value.float().isfinite().all():
            raise InputError(
                f"The weights file {path} holds NaN or infinity in {name}."
            )
    return {name.removeprefix("module."): value for name, value in state.items()}
