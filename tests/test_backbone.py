"""From pictures to unit features, and weights from files that may be anything."""

import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from o2cap.backbone import (
    IBN,
    AveragePool,
    GeM,
    ReIDModel,
    TinyResNet,
    build_model,
    read_state_dict,
)
from o2cap.errors import InputError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries to download meets what a machine without internet meets."""

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.fixture
def zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks start at 0: millions of random numbers take long, and need not be."""
    for name in ("trunc_normal_", "normal_", "xavier_uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda x, *_, **__: x.data.zero_())
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda x, **_: x.data.zero_())


def features_of(model: ReIDModel, height: int = 64, width: int = 32) -> Tensor:
    """Features of four noise pictures, in training mode: batch statistics."""
    with torch.no_grad():
        return model.train()(torch.randn(4, 3, height, width))


# ------------------------------------------ architecture

# One of each family, small ones; all 78 but vit_h_14 and regnet_y_128gf were run once.
FAMILIES = {
    "alexnet": 256,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 576,
    "regnet_x_400mf": 400,
    "resnet18": 512,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "resnet50_ibn_a": 2048,
    "tiny_resnet": 96,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_unit_features(name: str) -> None:
    model = build_model(name, "none", height=64, width=64)
    assert model.training
    assert model.dim == FAMILIES[name]
    found = features_of(model, 64, 64)
    assert found.shape == (4, model.dim)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert (found[0] - found[1]).norm() > 0.1  # not the same for every picture
    # no classifier is left, which would have 1,000 outputs
    for module in model.modules():
        assert getattr(module, "out_features", 0) != 1000
        assert not isinstance(module, nn.Dropout) or module.p == 0


@pytest.mark.parametrize("name", ["vit_b_32", "maxvit_t", "inception_v3"])
@pytest.mark.usefixtures("zeros")
def test_families_that_need_a_certain_size(name: str) -> None:
    with pytest.raises(InputError, match=r"--height and --width") as caught:
        build_model(name, "none", height=64, width=32)
    assert name in str(caught.value)
    size = 96 if name == "inception_v3" else 224
    model = build_model(name, "none", height=size, width=size)
    assert model.dim == {"vit_b_32": 768, "maxvit_t": 512, "inception_v3": 2048}[name]


def test_tiny_resnet_shape_and_size() -> None:
    network = TinyResNet()
    assert network(torch.zeros(2, 3, 64, 32)).shape == (2, 96, 8, 4)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 173_304


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_ibn_a"])
@pytest.mark.usefixtures("zeros")
def test_last_stride_1_doubles_the_last_map(name: str) -> None:
    pictures = torch.zeros(1, 3, 256, 128)
    for stride, size in ((1, (16, 8)), (2, (8, 4))):
        model = build_model(name, "none", last_stride=stride)
        with torch.no_grad():
            assert model.eval().backbone(pictures).shape[2:] == size


@pytest.mark.usefixtures("zeros")
def test_last_stride_is_where_torchvision_has_it() -> None:
    # ResNet-50 of torchvision strides in the 3×3 convolution of a bottleneck.
    model = build_model("resnet50", "none", last_stride=1)
    original = build_model("resnet50", "none", last_stride=2)
    for one, two in zip(model.modules(), original.modules(), strict=True):
        if isinstance(one, nn.Conv2d) and one.stride != two.stride:
            assert one.kernel_size in {(3, 3), (1, 1)}
            assert one.in_channels in {512, 1024}


@pytest.mark.parametrize("name", ["resnet50_ibn_a", "resnet101_ibn_a"])
@pytest.mark.usefixtures("zeros")
def test_ibn_a_stands_in_every_bottleneck_of_stages_1_to_3(name: str) -> None:
    with torch.device("meta"):
        plain = torchvision.models.get_model(name.removesuffix("_ibn_a"))
    body = build_model(name, "none", height=32, width=32).backbone
    stages = [part for part in body if isinstance(part, nn.Sequential)]
    assert [len(stage) for stage in stages] == [
        len(stage) for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4)
    ]
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
        shapes = {
            k: v.shape for k, v in torchvision.models.resnet50().state_dict().items()
        }
    state = {}
    for name in public_ibn_names():
        plain = name.replace(".IN.", ".").replace(".BN.", ".")
        shape = list(shapes[plain])
        if plain != name:
            shape[0] //= 2
        state[name] = torch.rand(shape)
    torch.save(state, tmp_path / "ibn.pth")
    path = str(tmp_path / "ibn.pth")
    model = build_model("resnet50_ibn_a", path, height=32, width=32)
    stage = model.backbone[6]  # conv1, bn1, relu, maxpool, layer1, layer2, layer3
    assert stage[5].bn1.IN.weight.equal(state["layer3.5.bn1.IN.weight"])
    assert stage[5].bn1.BN.running_var.equal(state["layer3.5.bn1.BN.running_var"])


@pytest.mark.usefixtures("zeros")
def test_the_model_can_be_cast() -> None:
    model = build_model("resnet50_ibn_a", "none", height=32, width=32).half()
    assert next(model.parameters()).dtype == torch.float16


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


def test_gem_works_on_the_plain_resnet50() -> None:
    # Ledger 8: a NameError in the public code.
    model = build_model("resnet50", "none", height=64, width=32, pooling="gem")
    assert isinstance(model.pooling, GeM)
    model(torch.randn(4, 3, 64, 32)).sum().backward()
    assert model.pooling.p.grad is not None


def test_gem_needs_a_feature_map() -> None:
    with pytest.raises(InputError, match=r"shufflenet.*--pooling"):
        build_model("shufflenet_v2_x0_5", "none", height=64, width=32, pooling="gem")


def test_neck_is_batch_norm_with_a_frozen_bias() -> None:
    model = build_model("tiny_resnet", "none", height=64, width=32)
    assert not model.bottleneck.bias.requires_grad
    assert model.bottleneck.weight.requires_grad
    assert (model.bottleneck.bias == 0).all()
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    model(torch.randn(4, 3, 64, 32)).sum().backward()
    optimizer.step()
    assert (model.bottleneck.bias == 0).all()


def test_model_is_backbone_pool_neck_norm() -> None:
    model = build_model("tiny_resnet", "none", height=64, width=32).eval()
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
    model = build_model("tiny_resnet", "none", height=64, width=32, pooling=pooling)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.randn(4, 3, 64, 32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_seed_decides_random_weights() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(build_model("tiny_resnet", "none").parameters())

    assert first(1).equal(first(1))
    assert not first(1).equal(first(2))


# ------------------------------------------ weights from files

SMALL = {"height": 64, "width": 32}


def resnet18_state(seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return torchvision.models.resnet18().state_dict()


def same_network(model: ReIDModel, state: dict[str, Tensor]) -> bool:
    network = torchvision.models.resnet18()
    network.load_state_dict(state)
    network.layer4[0].conv1.stride = (1, 1)
    network.layer4[0].downsample[0].stride = (1, 1)
    pictures = torch.randn(2, 3, 64, 32)
    network.eval()
    model.eval()
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(pictures))))
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = stage(x)
        return model.backbone(pictures).allclose(x, atol=1e-5)


def wrapped(state: dict[str, Tensor], how: str) -> Any:
    if how == "state_dict":
        return {"state_dict": state, "epoch": 3}
    if how == "model":
        return {"model": state}
    if how == "module.":
        return {f"module.{name}": value for name, value in state.items()}
    if how == "state_dict, module.":
        return {"state_dict": wrapped(state, "module.")}
    if how == "no classifier":
        return {k: v for k, v in state.items() if not k.startswith("fc.")}
    if how == "another classifier":
        return state | {"fc.weight": torch.rand(7, 512), "fc.bias": torch.rand(7)}
    if how == "no counters":
        return {k: v for k, v in state.items() if "num_batches" not in k}
    assert how == "plain"
    return state


HOWS = [
    "plain",
    "state_dict",
    "model",
    "module.",
    "state_dict, module.",
    "no classifier",
    "another classifier",
    "no counters",
]


@pytest.mark.parametrize("how", HOWS)
def test_weights_from_a_state_dict(how: str, tmp_path: Path) -> None:
    state = resnet18_state()
    torch.save(wrapped(state, how), tmp_path / "w.pth")
    model = build_model("resnet18", str(tmp_path / "w.pth"), **SMALL)
    assert same_network(model, state)


def test_weights_from_safetensors(tmp_path: Path) -> None:
    state = resnet18_state()
    save_file(state, tmp_path / "w.safetensors")
    model = build_model("resnet18", str(tmp_path / "w.safetensors"), **SMALL)
    assert same_network(model, state)
    # and half-precision files fill a single-precision network
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "h.safetensors")
    model = build_model("resnet18", str(tmp_path / "h.safetensors"), **SMALL)
    assert next(model.parameters()).dtype == torch.float32


def test_weights_of_mobilenet_without_classifier(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torchvision.models.mobilenet_v2().features.state_dict()
    state = {f"features.{name}": value for name, value in state.items()}
    save_file(state, tmp_path / "mobilenet_v2_imagenet.safetensors")
    path = str(tmp_path / "mobilenet_v2_imagenet.safetensors")
    model = build_model("mobilenet_v2", path, **SMALL)
    for name, value in model.backbone.state_dict().items():
        assert value.equal(state[f"features.{name}"])


@pytest.mark.parametrize(
    ("backbone", "new", "old"),
    [
        (
            "densenet121",
            "features.denseblock1.denselayer1.norm1.weight",
            "features.denseblock1.denselayer1.norm.1.weight",
        ),
        (
            "vit_b_32",
            "encoder.layers.encoder_layer_0.mlp.0.weight",
            "encoder.layers.encoder_layer_0.mlp.linear_1.weight",
        ),
        ("mnasnet0_5", None, None),
        ("googlenet", None, None),
    ],
)
@pytest.mark.usefixtures("zeros")
def test_torchvisions_own_files_fit(
    backbone: str, new: str | None, old: str | None, tmp_path: Path
) -> None:
    # Older files use names, or hold auxiliary classifiers, that the models of today
    # do not know; torchvision translates them when it loads.
    options = {"init_weights": False} if backbone == "googlenet" else {}
    state = torchvision.models.get_model(backbone, **options).state_dict()
    if backbone == "googlenet":
        assert any(name.startswith("aux1.") for name in state)
    state = {
        k.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.")
        if backbone == "densenet121" and "denselayer" in k
        else k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
        for k, v in state.items()
    }
    if new is not None:
        assert new not in state
        assert old is not None
        state[old] = torch.full_like(state[old], 0.125)
    torch.save(state, tmp_path / "w.pth")
    size = 224 if backbone == "vit_b_32" else 64
    model = build_model(backbone, str(tmp_path / "w.pth"), height=size, width=size)
    if new is not None:
        # DenseNet's `features` come first in a Sequential of feature map and ReLU
        name = new.replace("features.", "0.") if backbone == "densenet121" else new
        assert (model.backbone.state_dict()[name] == 0.125).all()


def test_given_weights_inception_takes_torchvisions_colours() -> None:
    model = build_model("googlenet", "none", height=64, width=64)
    assert model.backbone.transform_input


# ------------------------------------------ weights that are refused


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Bomb(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth") as caught:
        build_model("resnet18", str(tmp_path / "w.pth"), **SMALL)
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)  # no advice to switch safety off
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have been


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("how", ["missing", "empty", "noise", "truncated", "folder"])
def test_damaged_files_are_named(how: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    state = {"a": torch.zeros(1000)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        made = {"empty": b"", "noise": b"\x80\x02no", "truncated": content[:-500]}
        path.write_bytes(made[how])
    with pytest.raises(InputError, match=rf"w\{suffix}") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(2), {"a": 3}, {"state_dict": {"a": "b"}}]
)
def test_a_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no dictionary of tensors"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(3, 3)}, ["shape", "layer1.0.conv1"]),
        ({"layer9.weight": torch.zeros(3)}, ["does not know", "layer9.weight"]),
        ({"layer2.1.bn2.bias": None}, ["lacks", "layer2.1.bn2.bias"]),
        ({"bn1.weight": torch.full((64,), torch.nan)}, ["NaN", "bn1.weight"]),
        ({"bn1.weight": torch.full((64,), torch.inf)}, ["infinity", "bn1.weight"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: dict[str, Tensor | None], words: list[str], tmp_path: Path
) -> None:
    state = resnet18_state() | change
    state = {name: value for name, value in state.items() if value is not None}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        build_model("resnet18", str(tmp_path / "w.pth"), **SMALL)
    for word in [*words, "w.pth"]:
        assert word in str(caught.value)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    torch.save(resnet18_state(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="do not fit the backbone tiny_resnet"):
        build_model("tiny_resnet", str(tmp_path / "w.pth"), **SMALL)


def test_an_unknown_backbone_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean resnet50"):
        build_model("resnet5O", "none")


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "densenet121"])
def test_an_impossible_download_says_how_to_give_a_file(name: str) -> None:
    with pytest.raises(InputError) as caught:
        build_model(name, "torchvision")
    for word in (name, "no route to host", "--weights FILE", "--weights none"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["tiny_resnet", "resnet50_ibn_a"])
def test_a_backbone_without_public_weights_says_so(name: str) -> None:
    with pytest.raises(InputError, match=rf"no weights for {name}.*--weights FILE"):
        build_model(name, "torchvision")


def test_downloads_are_checked_and_never_unpickle_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []
    state = resnet18_state()

    def serve(url: str, **options: Any) -> dict[str, Tensor]:
        asked.append({"url": url, **options})
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", serve)
    model = build_model("resnet18", "torchvision", **SMALL)
    assert same_network(model, state)
    assert "resnet18" in asked[0]["url"]
    assert asked[0]["weights_only"] is True
    assert asked[0]["check_hash"] is True


def test_every_torchvision_model_has_weights_to_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A few (vit_h_14, regnet_y_128gf) have no file called IMAGENET1K_V1.
    from o2cap.backbone import _download

    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **_: {url: url}
    )
    for name in torchvision.models.list_models(module=torchvision.models):
        assert len(_download(name)) == 1


def test_weights_of_a_run_set_the_whole_model(tmp_path: Path) -> None:
    trained = build_model("tiny_resnet", "none", height=32, width=16)
    with torch.no_grad():
        trained.bottleneck.running_mean.add_(1)
    file = tmp_path / "model.safetensors"
    save_file(trained.state_dict(), file)
    again = build_model("tiny_resnet", str(file), height=32, width=16)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(InputError, match=r"lacks entries .* pooling\.p"):
        build_model("tiny_resnet", str(file), height=32, width=16, pooling="gem")


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be used .*too long"):
        build_model("tiny_resnet", str(tmp_path / ("n" * 300)), height=32, width=16)
