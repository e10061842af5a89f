"""From pictures to unit features: networks by their names, pooling, neck."""

import sys
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import tiny
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from o2cap.backbone import IBN, AveragePool, GeM, ReIDModel, TinyResNet, build_model
from o2cap.config import BatchConfig, LossConfig, OptimConfig
from o2cap.data.transforms import MEAN, STD
from o2cap.errors import InputError
from o2cap.trainer import train

SMALL = {"height": 64, "width": 32}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries to download meets what a machine without internet meets."""

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)


@pytest.fixture
def zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks start at 0: millions of random numbers take long, and need not be."""
    for name in ("trunc_normal_", "normal_", "xavier_uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda x, *_, **__: x.data.zero_())
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda x, **_: x.data.zero_())


@cache
def built(name: str, pooling: Any = "avg") -> ReIDModel:
    """Return a model with random weights, for pictures of 64 x 32; not to change."""
    torch.manual_seed(0)
    return build_model(name, "none", **SMALL, pooling=pooling)


def train_mode(model: ReIDModel, pictures: Tensor) -> Tensor:
    """Return the features in training mode: batch statistics."""
    return model.train()(pictures)


# ------------------------------------------ architecture

# One of each family, the smallest; whether it has a feature map, for GeM.
FAMILIES = {
    "mobilenet_v3_small": (576, True),
    "regnet_x_400mf": (400, True),
    "resnet18": (512, True),
    "shufflenet_v2_x0_5": (1024, True),
    "squeezenet1_1": (512, True),
    "tiny_resnet": (96, True),
    "timm:test_convnext": (64, True),
    "timm:test_resnet": (96, True),
    "timm:test_vit": (64, False),
    "timm:test_vit2": (64, False),  # no class token: it averages
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_unit_features(name: str) -> None:
    dim, has_map = FAMILIES[name]
    model = built(name)
    assert model.training
    assert model.dim == dim
    with torch.no_grad():
        found = train_mode(model, torch.randn(4, 3, 64, 32))
    assert found.shape == (4, dim)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert (found[0] - found[1]).norm() > 0.1  # not the same for every picture
    # no classifier is left, which would have 1,000 outputs
    for module in model.modules():
        assert getattr(module, "out_features", 0) != 1000
        assert not isinstance(module, nn.Dropout) or module.p == 0
    if not has_map:
        with pytest.raises(InputError, match="--pooling gem does not fit its output"):
            build_model(name, "none", **SMALL, pooling="gem")


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "timm:test_resnet"])
def test_gem_learns_wherever_there_is_a_map(name: str) -> None:
    model = built(name, "gem")
    train_mode(model, torch.randn(4, 3, 64, 32)).sum().backward()
    assert model.pooling.p.grad is not None


def test_a_map_with_its_channels_last_is_no_map_for_gem() -> None:
    # [B, h, w, D], which pooled as [B, D, h, w] would give features of length h
    with pytest.raises(InputError, match=r"does not fit its output \[1, 4, 2, "):
        build_model("timm:test_mambaout", "none", height=128, width=64, pooling="gem")


def test_tiny_resnet_shape_and_size() -> None:
    network = TinyResNet()
    assert network(torch.zeros(2, 3, 64, 32)).shape == (2, 96, 8, 4)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 173_304


@pytest.mark.parametrize("name", ["resnet18", "resnet50_ibn_a", "timm:test_resnet"])
@pytest.mark.usefixtures("zeros")
def test_the_last_stage_of_a_resnet_has_stride_1(name: str) -> None:
    model = build_model(name, "none", **SMALL, pooling="gem").eval()
    with torch.no_grad():
        assert model.backbone(torch.zeros(1, 3, 64, 32)).shape[2:] == (4, 2)


@pytest.mark.usefixtures("zeros")
def test_ibn_a_stands_in_every_bottleneck_of_stages_1_to_3() -> None:
    body = build_model("resnet50_ibn_a", "none", height=32, width=32).backbone
    stages = [part for part in body if isinstance(part, nn.Sequential)]
    assert [len(stage) for stage in stages] == [3, 4, 6, 3]
    for number, stage in enumerate(stages, start=1):
        for block in stage:
            assert isinstance(block, Bottleneck)
            assert isinstance(block.bn1, IBN) == (number <= 3)
            assert isinstance(block.bn2, nn.BatchNorm2d)
            assert isinstance(block.bn3, nn.BatchNorm2d)


def test_ibn_is_half_instance_half_batch_norm() -> None:
    norm = IBN(6)
    with torch.no_grad():
        norm.IN.weight.copy_(torch.tensor([2.0, 1.0, 3.0]))
        norm.BN.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    x = torch.randn(5, 6, 4, 3) * torch.arange(1, 6)[:, None, None, None] + 7
    found = norm(x)
    for b in range(5):
        for c in range(3):  # a picture's own mean and variance
            own = x[b, c]
            normal = (own - own.mean()) / (own.var(correction=0) + 1e-5).sqrt()
            expected = normal * norm.IN.weight[c]
            torch.testing.assert_close(found[b, c], expected, rtol=1e-4, atol=1e-4)
    for c in range(3):  # the batch's
        all_of = x[:, 3 + c]
        normal = (all_of - all_of.mean()) / (all_of.var(correction=0) + 1e-5).sqrt()
        expected = normal + norm.BN.bias[c]
        torch.testing.assert_close(found[:, 3 + c], expected, rtol=1e-4, atol=1e-4)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


def public_ibn_names() -> set[str]:
    """The entries of the public ResNet-50-IBN-a file, put together by hand."""
    norm = ("weight", "bias", "running_mean", "running_var")
    names = {"conv1.weight", *(f"bn1.{n}" for n in norm), "fc.weight", "fc.bias"}
    for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            names |= {f"{at}.conv{i}.weight" for i in (1, 2, 3)}
            if stage <= 3:
                names |= {f"{at}.bn1.IN.weight", f"{at}.bn1.IN.bias"}
                names |= {f"{at}.bn1.BN.{n}" for n in norm}
            else:
                names |= {f"{at}.bn1.{n}" for n in norm}
            names |= {f"{at}.bn{i}.{n}" for i in (2, 3) for n in norm}
            if block == 0:
                names |= {f"{at}.downsample.0.weight"}
                names |= {f"{at}.downsample.1.{n}" for n in norm}
    return names


@pytest.mark.usefixtures("zeros")
def test_public_ibn_weights_fit(tmp_path: Path) -> None:
    with torch.device("meta"):
        plain = torchvision.models.resnet50().state_dict()
    state = {}
    for name in public_ibn_names():
        shape = list(plain[name.replace(".IN.", ".").replace(".BN.", ".")].shape)
        if ".IN." in name or ".BN." in name:
            shape[0] //= 2
        state[name] = torch.full(shape, 0.125)
    torch.save(state, tmp_path / "ibn.pth")
    path = str(tmp_path / "ibn.pth")
    model = build_model("resnet50_ibn_a", path, height=32, width=32)
    stage = model.backbone[6]  # conv1, bn1, relu, maxpool, layer1, layer2, layer3
    assert (stage[5].bn1.IN.weight == 0.125).all()
    assert (stage[5].bn1.BN.running_var == 0.125).all()


# ------------------------------------------ vision transformers


def test_timms_vit_sees_the_colours_that_its_weights_expect() -> None:
    model = built("timm:test_vit").eval()
    network = model.backbone[1]
    assert network.pos_embed.shape == (1, 1 + 4 * 2, 64)
    pixels = torch.rand(2, 3, 64, 32)
    mean, std = torch.tensor([MEAN, STD])[..., None, None]
    with torch.no_grad():
        token = network.forward_features((pixels - 0.5) / 0.5)[:, 0]  # Inception's
        found = model.backbone((pixels - mean) / std)
    torch.testing.assert_close(found, token, rtol=1e-4, atol=1e-5)
    assert not any("mean" in name for name in model.state_dict() if "0." in name)


def test_a_vit_trains_all_but_its_patch_projection(tmp_path: Path) -> None:
    dataset = tiny.as_dataset(tmp_path, tiny.write_pictures(tmp_path))
    config = tiny.config(
        tmp_path / "run",
        backbone="timm:test_vit",
        epochs=1,
        iterations=1,
        warm_start=tiny.WarmStartConfig(epochs=0),
        optim=OptimConfig(lr=3.5e-4, warmup=0.0),
        batch=BatchConfig(proxies=4, images=4),
        loss=LossConfig(temperature=0.05, momentum=0.1),
    )
    result = train(config, dataset)
    assert not result.history[0].get("skipped")
    torch.manual_seed(config.seed)
    start = build_model(config.backbone, "none", height=32, width=16)
    end = build_model(
        config.backbone, str(tmp_path / "run/model.safetensors"), height=32, width=16
    )
    moved = {
        name
        for (name, before), after in zip(
            start.named_parameters(), end.parameters(), strict=True
        )
        if not before.equal(after)
    }
    frozen = {name for name, value in end.named_parameters() if not value.requires_grad}
    assert {name for name, _ in end.named_parameters()} == moved | frozen
    projection = {f"backbone.1.patch_embed.proj.{n}" for n in ("weight", "bias")}
    assert frozen == {*projection, "bottleneck.bias"}


# ------------------------------------------ pooling and neck


def test_gem_with_p_1_is_the_average_and_large_p_nears_the_maximum() -> None:
    maps = torch.rand(3, 5, 4, 2) + 0.01
    torch.testing.assert_close(GeM(p=1.0)(maps), AveragePool()(maps))
    torch.testing.assert_close(GeM(p=1.0)(maps), maps.mean(dim=(2, 3)))
    torch.testing.assert_close(
        GeM(p=40.0)(maps), maps.amax(dim=(2, 3)), rtol=0.06, atol=0
    )


def test_gem_by_hand_and_its_p_learns() -> None:
    pool = GeM(p=3.0)
    maps = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]]]])
    found = pool(maps)
    assert found.item() == pytest.approx(((1 + 8 + 0 + 27) / 4) ** (1 / 3), rel=1e-5)
    found.sum().backward()
    assert pool.p.grad is not None
    assert pool.p.grad > 0  # the power mean rises with p


def test_gem_of_half_precision_and_of_nothing_is_finite() -> None:
    maps = torch.full((1, 2, 3, 3), 200.0, dtype=torch.float16, requires_grad=True)
    torch.testing.assert_close(GeM()(maps), torch.full((1, 2), 200.0))
    dead = torch.zeros(1, 2, 3, 3, requires_grad=True)
    GeM()(dead).sum().backward()
    assert dead.grad is not None
    assert dead.grad.isfinite().all()


def test_neck_is_batch_norm_with_a_frozen_bias() -> None:
    model = build_model("tiny_resnet", "none", **SMALL)
    assert not model.bottleneck.bias.requires_grad
    assert model.bottleneck.weight.requires_grad
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    train_mode(model, torch.randn(4, 3, 64, 32)).sum().backward()
    optimizer.step()
    assert (model.bottleneck.bias == 0).all()


def test_model_is_backbone_pool_neck_norm() -> None:
    model = build_model("tiny_resnet", "none", **SMALL).eval()
    model.bottleneck.running_mean.normal_()
    model.bottleneck.running_var.uniform_(0.5, 2)
    pictures = torch.randn(3, 3, 64, 32)
    pooled = model.backbone(pictures).mean(dim=(2, 3))
    neck = (pooled - model.bottleneck.running_mean) / (
        model.bottleneck.running_var + model.bottleneck.eps
    ).sqrt()
    expected = neck / neck.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(pictures), expected)


@pytest.mark.parametrize("pooling", ["avg", "gem"])
def test_features_are_float32_under_mixed_precision(pooling: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = train_mode(built("tiny_resnet", pooling), torch.randn(4, 3, 64, 32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_seed_decides_random_weights() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(build_model("tiny_resnet", "none").parameters())

    assert first(1).equal(first(1))
    assert not first(1).equal(first(2))


# ------------------------------------------ names and downloads


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet5O", "Did you mean resnet50"),
        ("inception_v3", "does not exist"),  # timm has it, and makes no fuss
        ("vit_b_16", "does not exist"),  # it takes squares only; timm's do not
        ("timm:resnet5O", r"timm:resnet5O .*Unknown model \(resnet5O\)"),
        ("timm:resnet50.nobody", r"Invalid pretrained tag \(nobody\) for resnet50"),
    ],
)
def test_an_unknown_backbone_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_model(name, "none")


def test_without_timm_the_sentence_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'o2cap\[timm\]'"):
        build_model("timm:resnet50", "none")


@pytest.mark.parametrize("name", ["resnet18", "timm:test_vit", "tiny_resnet"])
def test_an_impossible_download_says_what_to_do(name: str) -> None:
    for weights in ("torchvision", "pretrained"):
        with pytest.raises(InputError) as caught:
            build_model(name, weights)
        why = "nobody offers" if name == "tiny_resnet" else "no route to host"
        for word in (name, why, "--weights FILE", "--weights none"):
            assert word in str(caught.value)


def test_a_size_that_a_network_refuses_is_named() -> None:
    with pytest.raises(InputError, match=r"--height 16 and --width 16 .*another size"):
        build_model("squeezenet1_1", "none", height=16, width=16)


def test_downloads_are_checked_and_never_unpickle_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []
    state = torchvision.models.squeezenet1_1().state_dict()

    def serve(url: str, **options: Any) -> dict[str, Tensor]:
        asked.append({"url": url, **options})
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", serve)
    model = build_model("squeezenet1_1", "torchvision", **SMALL)
    for name, value in model.backbone.state_dict().items():
        assert value.equal(state[f"features.{name}"])
    assert "squeezenet1_1" in asked[0]["url"]
    assert asked[0]["weights_only"] is True
    assert asked[0]["check_hash"] is True


def test_timms_own_weights_are_fitted_to_the_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import timm

    theirs = timm.create_model("test_vit").state_dict()  # of 160 x 160 pixels
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(theirs)
    )
    model = build_model("timm:test_vit", "pretrained", **SMALL)
    network = model.backbone[1]
    assert network.blocks[0].attn.qkv.weight.equal(theirs["blocks.0.attn.qkv.weight"])
    assert network.pos_embed.shape == (1, 1 + 4 * 2, 64)
    assert network.pos_embed[:, 0].equal(theirs["pos_embed"][:, 0])


def test_weights_of_a_run_set_the_whole_model(tmp_path: Path) -> None:
    trained = build_model("tiny_resnet", "none", height=32, width=16)
    with torch.no_grad():
        trained.bottleneck.running_mean.add_(1)
    file = tmp_path / "model.safetensors"
    save_file(trained.state_dict(), file)
    again = build_model("tiny_resnet", str(file), height=32, width=16)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(InputError, match=r"1 entries do not fit.* pooling\.p"):
        build_model("tiny_resnet", str(file), height=32, width=16, pooling="gem")
