"""Settings: presets, the command line, YAML, what is refused and how."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from o2cap.config import (
    NO_INFLUENCE,
    PRESETS,
    STYLE,
    BatchConfig,
    Config,
    LossConfig,
    OptimConfig,
    load,
    preset,
    starting_point,
)
from o2cap.errors import InputError
from o2cap.trainer import learning_rate

# ------------------------------------------ presets


def parse(args: Sequence[str]) -> Config:
    """Return the settings that options describe, as ``o2cap train`` reads them."""
    return tyro.cli(Config, args=args, default=starting_point(args), config=STYLE)


def test_presets_carry_their_names() -> None:
    assert {
        "smoke",
        "synthetic",
        "market1501",
        "dukemtmcreid",
        "msmt17",
        "veri776",
    } <= (PRESETS.keys())
    for name, config in PRESETS.items():
        assert config.preset == name
        assert preset(name) == config


def test_the_papers_settings() -> None:
    # Those of the public code and the formulas; one line a number.
    for name in ("market1501", "dukemtmcreid", "msmt17", "veri776"):
        config = preset(name)
        assert config.dataset == name
        assert config.method == "both"
        assert (config.backbone, config.weights) == ("resnet50", "torchvision")
        assert config.pooling == "avg"
        assert (config.epochs, config.iterations) == (50, 400)
        assert config.batch == BatchConfig(proxies=8, images=4)
        assert config.optim.lr == 3.5e-4
        assert config.optim.weight_decay == 5e-4
        assert (config.clustering.k1, config.clustering.k2) == (20, 6)
        assert (config.clustering.eps, config.clustering.min_samples) == (0.5, 4)
        assert config.loss == LossConfig(
            temperature=0.07,
            momentum=0.2,
            negatives=50,
            positives=3,
            balance=0.15,
            reduction="camera_sum",
        )
        assert config.augment.flip == 0.5
        assert config.augment.erase == 0.5
        assert round(config.augment.pad * config.height) == 10
    assert (preset("market1501").height, preset("market1501").width) == (256, 128)


def test_learning_rate_is_the_papers() -> None:
    config = preset("market1501")
    rates = [learning_rate(config, epoch) for epoch in range(50)]
    assert rates[0] == pytest.approx(0.01 * 3.5e-4)
    # linear over ten epochs: 0.01 + 0.99 e / 10
    for epoch in range(10):
        assert rates[epoch] == pytest.approx((0.01 + 0.099 * epoch) * 3.5e-4)
    assert rates[10:20] == pytest.approx([3.5e-4] * 10)
    assert rates[20:40] == pytest.approx([3.5e-5] * 20)
    assert rates[40:] == pytest.approx([3.5e-6] * 10)


def test_learning_rate_scales_with_the_length() -> None:
    config = preset("synthetic", epochs=10)  # 2 of warm-up, a tenth from epoch 8
    rates = [learning_rate(config, epoch) / config.optim.lr for epoch in range(10)]
    assert rates == pytest.approx([0.01, 0.505, *[1.0] * 6, 0.1, 0.1])


def test_learning_rate_without_warm_up_or_milestones() -> None:
    config = preset("smoke", optim=OptimConfig(lr=0.5, warmup=0, milestones=()))
    assert [learning_rate(config, epoch) for epoch in range(4)] == [0.5] * 4


def test_preset_with_changes_and_an_unknown_one() -> None:
    config = preset("smoke", method="online", epochs=7)
    assert (config.method, config.epochs) == ("online", 7)
    assert config.iterations == PRESETS["smoke"].iterations
    with pytest.raises(InputError, match=r"'smoek'.*Did you mean smoke\?"):
        preset("smoek")
    with pytest.raises(InputError, match=r"'metod'.*Did you mean method\?"):
        preset("smoke", metod="online")


# ------------------------------------------ the command line


def test_no_argument_means_the_embedded_set() -> None:
    assert parse([]) == preset("synthetic")


def test_preset_by_name_and_any_setting_over_it(tmp_path: Path) -> None:
    found = parse(
        [
            *("--preset", "market1501", "--root", str(tmp_path), "--method", "online"),
            *("--clustering.eps", "0.6", "--loss.reduction", "mean", "--seed", "3"),
            *("--optim.milestones", "0.5", "0.7", "0.9", "--skip-unreadable", "True"),
        ]
    )
    base = preset("market1501")
    assert found == replace(
        base,
        root=tmp_path,
        method="online",
        seed=3,
        skip_unreadable=True,
        clustering=replace(base.clustering, eps=0.6),
        loss=replace(base.loss, reduction="mean"),
        optim=replace(base.optim, milestones=(0.5, 0.7, 0.9)),
    )


def test_equals_sign_and_order_do_not_matter() -> None:
    one = parse(["--preset=smoke", "--epochs=3"])
    two = parse(["--epochs", "3", "--preset", "smoke"])
    assert one == two == preset("smoke", epochs=3)


@pytest.mark.parametrize(
    ("dataset", "base"),
    [
        ("msmt17", "msmt17"),
        ("veri776", "veri776"),
        ("synthetic-vehicles", "synthetic-vehicles"),
        ("manifest", "own"),
        ("folders", "own"),
    ],
)
def test_a_data_set_brings_its_preset(dataset: str, base: str) -> None:
    assert parse(["--dataset", dataset]) == preset(base, dataset=dataset)


def test_a_preset_said_wins_over_the_data_sets() -> None:
    found = parse(["--preset", "smoke", "--dataset", "manifest"])
    assert found == preset("smoke", dataset="manifest")


@pytest.mark.parametrize(
    "args",
    [
        ["--epochs", "many"],
        ["--method", "none"],
        ["--loss.reduction", "sum"],
        ["--pooling", "max"],
        ["--epochs"],
        ["--deterministic", "perhaps"],
        ["stray"],
    ],
)
def test_an_unreadable_value_ends_with_code_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(args)
    assert caught.value.code == 2
    assert capsys.readouterr().err


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean market1501"):
        parse(["--preset", "market1502"])


# ------------------------------------------ values with which nothing can work


def changed(option: str, value: Any) -> Config:
    """Return the smoke settings with one value changed, from Python."""
    base, (*group, name) = preset("smoke"), option.split(".")
    if group:
        return replace(
            base, **{group[0]: replace(getattr(base, group[0]), **{name: value})}
        )
    return replace(base, **{name: value})


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("epochs", 0, "greater than or equal to 1"),
        ("height", 15, "greater than or equal to 16"),
        ("workers", -1, "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**31, "less than 2147483648"),
        ("batch.proxies", 0, "greater than or equal to 1"),
        ("clustering.k1", 0, "greater than or equal to 1"),
        ("clustering.min_samples", 0, "greater than or equal to 1"),
        ("clustering.eps", -0.5, "greater than or equal to 0"),
        ("clustering.eps", 1.0, "less than 1"),
        ("clustering.eps", float("nan"), "a finite number"),
        ("loss.temperature", 0.0, "greater than 0"),
        ("loss.temperature", float("inf"), "a finite number"),
        ("loss.momentum", 1.01, "less than or equal to 1"),
        ("loss.negatives", -1, "greater than or equal to 0"),
        ("augment.pad", 0.6, "less than or equal to 0.5"),
        ("optim.lr", -1e-3, "greater than 0"),
        ("warm_start.images", 1, "greater than or equal to 2"),
        ("synthetic.presence", 0.0, "greater than 0"),
        ("synthetic.images_per_camera", 1, "greater than or equal to 2"),
    ],
)
def test_a_bad_value_is_one_sentence_wherever_it_comes_from(
    option: str, value: float, rule: str, tmp_path: Path
) -> None:
    name = f"--{option.replace('_', '-')}"
    said = re.escape(f"{name} is {value}; it should be {rule}.")
    with pytest.raises(InputError, match=f"^{said}$"):
        changed(option, value)
    with pytest.raises(InputError, match=f"^{said}$"):
        parse(["--preset", "smoke", f"{name}={value}"])
    plain: Any = value
    for key in reversed(option.split(".")):
        plain = {key: plain}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(
        InputError, match=f"config.yaml cannot be read as settings of o2cap .*: {said}$"
    ):
        load(path)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("epochs", True, "a valid integer"),
        ("epochs", "3", "a valid integer"),
        ("epochs", 3.0, "a valid integer"),
        ("deterministic", 1, "a valid boolean"),
        ("backbone", 50, "a valid string"),
        ("loss.momentum", "0.2", "a valid number"),
        ("loss.momentum", False, "a valid number"),
        ("optim.milestones", (0.5, 40.0), "less than or equal to 1"),
        ("optim.milestones", 0.5, "a valid tuple"),
        ("clustering", {"eps": 0.5}, "an instance of ClusteringConfig"),
        ("method", "onlin", "'offline', 'online' or 'both'"),
        ("clustering.distance", "cosine", "'jaccard' or 'camera_aware'"),
    ],
)
def test_a_value_of_another_kind_is_refused(option: str, value: Any, rule: str) -> None:
    """In Python; the command line reads text by the setting's kind."""
    with pytest.raises(
        InputError, match=rf"^--{option} is .*; it should be .*{rule}\.$"
    ):
        changed(option, value)


@pytest.mark.parametrize(
    ("args", "rule"),
    [
        ("--clustering.k1 5 --clustering.k2 6", "k2 is 6, .* k1, which is 5"),
        ("--clustering.k2-inter 21", "k2-inter is 21, .* which is 10"),
        ("--batch.proxies 1 --batch.images 1", "at least 2"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(args: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        parse(args.split())


def test_numbers_are_of_their_settings_kind() -> None:
    """1 and 1.0 are one setting, and have one hash; a path may be given as text."""
    one, other = (changed("synthetic.strength", value) for value in (1, 1.0))
    assert one == other and one.hash() == other.hash()
    assert preset("own", root="cameras.csv").root == Path("cameras.csv")


# ------------------------------------------ YAML


def round_trip(config: Config, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return load(path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name: str, tmp_path: Path) -> None:
    assert round_trip(preset(name), tmp_path) == preset(name)


def test_unusual_values_survive_yaml(tmp_path: Path) -> None:
    config = preset(
        "own",
        root=Path("a folder/with: signs #1 – ü.csv"),
        output=Path("-out"),
        backbone="1e3",
        device="cuda:1",
        skip_unreadable=True,
        optim=OptimConfig(lr=1e-5, warmup=1 / 3, milestones=()),
        loss=LossConfig(temperature=0.1 + 0.2),
    )
    assert round_trip(config, tmp_path) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: [1, 2", "cannot be read"),
        ("epochs: !!python/object/apply:os.mkdir ['RAN']\n", "cannot be read"),
        ("- epochs\n- 3\n", "it holds none"),
        ("epochs\n", "it holds none"),
        ("", "it holds none"),
        ("epochz: 3\n", "'epochz' does not exist. Did you mean epochs?"),
        ("clustering: {esp: 0.4}\n", "Did you mean clustering.eps?"),
        ("clustering: 3\n", "--clustering is 3"),
        ("epochs: many\n", "--epochs is many"),
        ("epochs: 3.0\n", "--epochs is 3.0"),
        ("epochs: [3, 4]\n", "--epochs is [3, 4]"),
        ("optim: {milestones: [0.4, 2.0]}\n", "--optim.milestones is 2.0"),
        ("method: null\n", "--method is None"),
        ("deterministic: 2024-01-01\n", "--deterministic is 2024-01-01"),
        ("5: 3\n", "'5' does not exist"),
    ],
)
def test_other_yaml_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("RAN", str(tmp_path / "ran")))
    with pytest.raises(InputError) as caught:
        load(path)
    said = str(caught.value)
    assert "config.yaml" in said
    assert words in said
    assert "\n" not in said
    assert not (tmp_path / "ran").exists()


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"config\.yaml"):
        load(tmp_path / "config.yaml")


# ------------------------------------------ hash and directory


def test_hash_ignores_what_cannot_change_a_result() -> None:
    base = preset("smoke")
    same: dict[str, Any] = {
        "preset": "other",
        "root": Path("moved"),
        "output": Path("elsewhere"),
        "device": "cpu",
        "workers": 3,
        "threads": 1,
        "cuda_graphs": False,
        "timeout": 90,
        "evaluate_every": 1,
    }
    assert set(same) == set(NO_INFLUENCE)
    for name, value in same.items():
        assert getattr(base, name) != value
        assert replace(base, **{name: value}).hash() == base.hash()


def test_hash_sees_everything_else() -> None:
    base = preset("smoke")
    others: list[Config] = [
        replace(base, **change)
        for change in (
            {"seed": 1},
            {"method": "online"},
            {"epochs": 5},
            {"loss": replace(base.loss, balance=0.2)},
            {"clustering": replace(base.clustering, k2=5)},
            {"augment": replace(base.augment, erase=0.4)},
            {"synthetic": replace(base.synthetic, strength=0.5)},
            {"precision": "bf16"},
            {"optim": replace(base.optim, milestones=(0.8, 0.9))},
        )
    ]
    hashes = {config.hash() for config in others} | {base.hash()}
    assert len(hashes) == len(others) + 1
    assert len(base.hash()) == 8


def test_directory_is_the_one_given_or_named_after_the_settings() -> None:
    config = preset("smoke", seed=4)
    name = config.directory().name
    assert config.directory().parent == Path("runs")
    for part in ("synthetic", "both", "seed4", config.hash()):
        assert part in name
    assert preset("smoke", output=Path("x/y")).directory() == Path("x/y")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        preset("smoke").epochs = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        preset("smoke").loss.momentum = 3  # type: ignore[misc]
