"""From a picture to a feature: backbone, pooling, batch-norm neck, L2 norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import Normalize

from o2cap.data.transforms import MEAN, STD
from o2cap.errors import InputError, unknown
from o2cap.weights import HEADS, fill, read_state_dict


class GeM(nn.Module):
    """Generalised-mean pooling, mean(x^p)^(1/p), with a learned p.

    Maps [B, D, h, w] to [B, D]. p = 1 is average pooling, large p nears the maximum.
    """

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, x: Tensor) -> Tensor:
        # In float32: a cube of a half-precision activation overflows easily.
        powered = x.float().clamp(min=1e-6).pow(self.p)
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
        whole = torch.cat([self.IN(first), self.BN(second)], dim=1)
        # Instance norm gives the usual layout, and the next convolution would follow.
        return whole.contiguous(memory_format=torch.channels_last)


class TinyResNet(nn.Module):
    """The embedded set's backbone: a stride-2 stem and three basic blocks.

    Maps [B, 3, H, W] to [B, 96, H/8, W/8]; 173,304 parameters.
    """

    def __init__(self) -> None:
        super().__init__()

        def halved(inside: int, out: int) -> BasicBlock:
            shortcut = nn.Conv2d(inside, out, 1, 2, bias=False), nn.BatchNorm2d(out)
            return BasicBlock(inside, out, 2, nn.Sequential(*shortcut))

        stem = nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24)
        blocks = BasicBlock(24, 24), halved(24, 48), halved(48, 96)
        self.layers = nn.Sequential(*stem, nn.ReLU(inplace=True), *blocks)
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
) -> ReIDModel:
    """Return the model called `backbone`, its classifier removed.

    The last stage of a ResNet has stride 1. The position embedding of a vision
    transformer is resized, its patch projection frozen (Chen et al., ICCV 2021).

    Parameters
    ----------
    backbone : str
        ``tiny_resnet``, ``resnet50_ibn_a``, ``resnet101_ibn_a``, the name of a
        classification model of torchvision (no transformer of fixed size), or
        ``timm:`` and the name of one of timm.
    weights : str
        ``pretrained`` or ``torchvision`` (the library's own, downloaded), ``none``, or
        a file, see :func:`o2cap.weights.read_state_dict`: of the backbone, or of a
        whole model as a run directory holds it.
    height, width : int
        Size of the input in pixels.
    pooling : str
        Of a feature map. ``avg`` leaves it to a network that pools by itself: a vision
        transformer returns its class token.

    Raises
    ------
    InputError
        For an unknown name, weights that do not fit or cannot be had, an input
        size the backbone refuses, or GeM on a backbone that has no feature map.
    """
    pretrained = weights in ("pretrained", "torchvision")
    from_file = not pretrained and weights != "none"
    state = read_state_dict(Path(weights)) if from_file else {}
    whole = {"backbone", "bottleneck"} <= {name.split(".")[0] for name in state}
    make = _timm if backbone.startswith("timm:") else _torchvision
    try:
        network = make(backbone, pretrained, (height, width), pooling)
        if from_file and not whole:
            fill(network, state)
        body = _body(network)
        with torch.inference_mode():
            shape = body.eval()(torch.zeros(1, 3, height, width)).shape
        pool: nn.Module = nn.Identity()
        if len(shape) == 4 and getattr(network, "output_fmt", "NCHW") == "NCHW":
            pool = GeM() if pooling == "gem" else AveragePool()
        elif len(shape) != 2 or pooling == "gem":
            raise ValueError(f"--pooling {pooling} does not fit its output {[*shape]}")
        model = ReIDModel(body, pool, shape[1])
        if whole:
            fill(model, state)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"The backbone {backbone} with --weights {weights} does not work for "
            f"--height {height} and --width {width} ({' '.join(str(error).split())}); "
            "try another size, --weights FILE, or --weights none."
        ) from error
    return model.train()


def _torchvision(name: str, pretrained: bool, *_: Any) -> nn.Module:
    own = ["tiny_resnet", "resnet50_ibn_a", "resnet101_ibn_a"]
    # without those that need special care; timm has them, too
    odd = ["densenet*", "googlenet", "inception*", "maxvit*", "vit*"]
    known = own + models.list_models(models, exclude=odd)
    if name not in known:
        raise InputError(unknown("The backbone", name, known))
    if pretrained and name in own:
        raise ValueError("nobody offers weights of it")
    if name == "tiny_resnet":
        return TinyResNet()
    network = models.get_model(name.removesuffix("_ibn_a"))
    if name in own:
        for stage in (network.layer1, network.layer2, network.layer3):
            for block in stage:
                block.bn1 = IBN(block.bn1.num_features)
    for head in HEADS:
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
    if pretrained:
        choices = models.get_model_weights(name)
        choice = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
        fill(network, choice.get_state_dict(check_hash=True, weights_only=True))
    return network


def _timm(name: str, pretrained: bool, size: tuple[int, int], pooling: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{name} needs timm: pip install 'o2cap[timm]'.") from error
    name = name[5:]
    options: dict[str, Any] = {"global_pool": ""} if pooling == "gem" else {}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        options["img_size"] = size
    return timm.create_model(name, pretrained, num_classes=0, **options)


def _body(network: Any) -> nn.Module:
    """Return what maps pictures to a feature map, or else to a pooled vector."""
    for part in getattr(network, "layer4", nn.Identity()).modules():
        if hasattr(part, "stride"):  # the last stage of a ResNet
            part.stride = (1, 1)
        if isinstance(part, nn.AvgPool2d):  # before some shortcuts
            part.kernel_size, part.padding = 1, 0
    for name, value in network.named_parameters():
        if name.startswith("patch_embed.proj."):
            value.requires_grad_(False)
    if hasattr(network, "pretrained_cfg"):  # timm's; they expect other colours
        colours = torch.tensor([network.pretrained_cfg[k] for k in ("mean", "std")])
        mean, std = (colours - torch.tensor([MEAN, [0] * 3])) / torch.tensor(STD)
        return nn.Sequential(Normalize(mean.tolist(), std.tolist()), network)
    if isinstance(network, TinyResNet):
        return network
    end = ("avgpool", "flatten", *HEADS)
    parts = [part for name, part in network.named_children() if name not in end]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
