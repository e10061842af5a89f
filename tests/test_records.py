"""Statistics over seeds, and the tables made of records."""

import csv as csv_module
import io
import json
import math
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from o2cap.errors import InputError
from o2cap_book.records import (
    BEFORE,
    PUBLISHED,
    SEEDS,
    ablation_table,
    bootstrap_interval,
    by_seed,
    convergence_table,
    cost_table,
    csv,
    default_value,
    every_difference,
    failures_table,
    forest_figure,
    gain_figure,
    gain_table,
    in_words,
    markdown,
    methods_in,
    paired_difference,
    paired_table,
    published_table,
    read_record,
    read_results,
    summarise,
    with_defaults,
    with_start,
    write_tables,
)

MEAN = {"baseline": 0.2, "offline": 0.3, "online": 0.5, "both": 0.5}


LUCK = [
    *((10, "online", 0.5), (11, "online", 0.5), (12, "online", 0.5)),
    *((10, "both", 0.51), (11, "both", 0.52), (12, "both", 0.56)),
]


GAP = {"both": 0.6, "online": 0.4}


def row(method="both", seed=10, m_ap=0.5, **changes):
    """A row as `o2cap reproduce` writes it."""
    return {
        "dataset": "synthetic",
        "method": method,
        "seed": seed,
        "data_seed": None,
        "study": None,
        "value": None,
        "metrics": {"mAP": m_ap, "rank1": m_ap, "mINP": None},
        "before": {"mAP": 0.17},
        "clusters": {"ari": m_ap, "clusters": 120, "cameras_per_cluster": 2.5},
        "history": [
            {"epoch": e, "mAP": m_ap * (e + 1) / 2, "ari": None if e else m_ap}
            for e in range(2)
        ],
        "seconds": {"extract": 1.0, "train": 10.0 + seed, "cpu": 30.0},
        **changes,
    }


def ablation():
    noise = {10: -0.02, 11: 0.0, 12: 0.03, 13: 0.01, 14: -0.01}
    return [
        row(m, s, MEAN[m] + noise[s] + 0.001 * i)
        for i, m in enumerate(MEAN)
        for s in noise
    ]


def studies():
    gap = [
        row(m, s, MEAN[m] * (1 - v / 4), study="strength", value=v)
        for m, s, v in product(("baseline", "both"), (10, 11), (0.0, 0.5))
    ]
    data = [
        row("both", s, 0.01 * d, study="data_seed", value=d, data_seed=d)
        for s, d in product((10, 11), (10, 11))
        if s != d
    ]
    eps = [row("both", s, 0.4, study="eps", value=0.4) for s in (10, 11)]
    return gap + data + eps


def write(folder: Path, target: str, rows, **changes) -> Path:
    path = folder / f"{target}.json"
    record = {"target": target, "what": "A test.", "rows": rows, "failures": []}
    path.write_text(json.dumps(record | changes))
    return path


def frame(rows, **changes) -> pd.DataFrame:
    with TemporaryDirectory() as folder:
        return read_record(write(Path(folder), "ablation", rows, **changes))


def runs(values: dict) -> pd.Series:
    """Values by data seed and training seed."""
    return pd.Series(values, pd.MultiIndex.from_tuples(values, names=SEEDS), float)


# ------------------------------------------------------------------------------ reading


def test_a_record_is_a_frame_with_a_line_a_run():
    record = frame([row(seed=10), row(seed=11, study="eps", value=0.4)], commit="abc")
    assert record.attrs["target"] == "ablation"
    assert (record.attrs["commit"], record.attrs["failures"]) == ("abc", [])
    assert record[SEEDS].values.tolist() == [[10, 10], [11, 11]]
    assert record.study.tolist() == ["", "eps"]
    assert record.mAP.tolist() == [50, 50]  # a share in the file, percent here
    assert record["before.mAP"].tolist() == pytest.approx([17, 17])
    assert record["clusters"].tolist() == [120, 120]
    assert record["seconds.train"].tolist() == [20, 21]
    assert record[["mINP", "rank5"]].isna().all(axis=None)  # null, and not there


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([row(), row()], "row 2 is of the same run"),
        ([row(), row(data_seed=10)], "row 2 is of the same run"),
        ([row(), {"dataset": "synthetic"}], "no record of results"),
        ([row(), 7], "no record of results"),
        ([row(), None], "lacks its dataset, method or seed"),
        ([row(metrics={"mAP": "much"})], "no record of results"),
    ],
)
def test_rows_that_would_spoil_the_statistics_are_refused(rows, complaint):
    with pytest.raises(InputError, match=rf"ablation\.json.*{complaint}"):
        frame(rows)


def test_the_same_seed_with_another_value_is_another_run():
    record = frame([row(study="eps", value=v) for v in (0.4, 0.6)] + [row()])
    assert len(record) == 3
    with pytest.raises(ValueError, match="duplicate"):  # but not a line of its own
        by_seed(record)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"what": "x"}', None])
def test_what_is_no_record_is_refused_by_name(tmp_path, content):
    path = tmp_path / "ablation.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"ablation\.json"):
        read_record(path)


def test_only_results_are_read_from_a_folder(tmp_path):
    write(tmp_path, "ablation", ablation())
    write(tmp_path, "check", [row()])
    (tmp_path / "benchmarks.json").write_text('{"what": "speed", "rows": []}')
    assert [r.attrs["target"] for r in read_results(tmp_path)] == ["ablation"]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json"):
        read_results(tmp_path)


def test_runs_stand_by_seed_and_what_is_missing_stays_out():
    rows = [row(seed=10, m_ap=0.25), row("online", 11), row("intra", 11)]
    rows[1]["metrics"]["mAP"], rows[2]["metrics"]["mAP"] = None, math.nan
    found = by_seed(frame(rows))
    assert list(found) == ["both"]  # of the others no mAP is known
    assert found["both"].dropna().to_dict() == {(10, 10): 25.0}
    assert list(by_seed(frame(rows), "clusters")) == ["intra", "online", "both"]
    assert by_seed(frame(rows), "mINP").empty
    start = by_seed(with_start(frame(rows)))[BEFORE]
    assert start.dropna().to_dict() == {(10, 10): pytest.approx(17)}


def test_a_study_takes_its_default_from_the_ablation():
    rows = frame(ablation() + studies())
    found = with_defaults(rows, "strength")
    assert {*found[["method", "seed", "value"]].itertuples(index=False, name=None)} == {
        *product(("baseline", "both"), (10, 11), (0.0, 0.5, 1.0))
    }
    assert default_value("strength") == 1.0
    usual = by_seed(found[found.value == 1])["both"]
    assert usual.equals(by_seed(rows[rows.study == ""])["both"][:2])
    # where the study ran the default itself, that stays
    own = row(seed=10, m_ap=0.9, study="strength", value=1.0)
    found = with_defaults(frame([*ablation(), *studies(), own]), "strength")
    assert by_seed(found[found.value == 1])["both"][10, 10] == pytest.approx(90)


def test_data_seeds_are_completed_by_the_runs_where_both_seeds_agree():
    found = with_defaults(frame(ablation() + studies()), "data_seed")
    assert {*by_seed(found).index} == {*product((10, 11), (10, 11))}


# --------------------------------------------------------------------------- statistics


def test_the_interval_equals_counting_all_resamples():
    values = [3.0, 5.0, 10.0, 11.0]
    means = np.sort([np.mean(r) for r in product(values, repeat=4)])
    low, high = bootstrap_interval(values, resamples=200_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.26)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.26)


def test_the_interval_of_three_values_is_their_range():
    assert bootstrap_interval([4.0, 1.0, 2.5]) == (1.0, 4.0)


@settings(max_examples=25)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_interval_holds_the_mean_and_stays_inside_the_values(values):
    low, high = bootstrap_interval(values, resamples=500)
    # means of equal numbers round
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap_interval(values, resamples=500) == (low, high)
    shifted = bootstrap_interval([v + 7 for v in values], resamples=500)
    assert shifted == pytest.approx((low + 7, high + 7))


def test_the_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(2).normal(size=(400, 5))
    intervals = [bootstrap_interval(v, resamples=300) for v in draws]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert covered == pytest.approx(0.84, abs=0.04)


def test_a_summary_by_hand():
    s = summarise([1.0, 2.0, 6.0])
    assert (s.n, s.mean, s.sd) == (3, 3.0, pytest.approx(7**0.5))
    assert s.text() == "3.0 ± 2.6 (1.0 to 6.0)"
    one = summarise([2.0])
    assert one.text() == "2.0 (1 seed)"
    assert math.isnan(one.sd) and math.isnan(one.low)
    assert summarise([math.nan, 2.0]).n == 1  # not measured is not zero
    assert summarise([]) is None


def test_differences_are_paired_by_seed():
    a = runs({(1, 1): 10, (2, 2): 50, (3, 3): 90})
    b = runs({(2, 2): 49, (3, 3): 91, (1, 1): 7, (4, 4): 0})
    d = paired_difference(a, b)
    assert d is not None
    assert (d.n, d.mean, d.above) == (3, 1.0, 2)
    assert d.sd == pytest.approx(2.0)  # of 3, 1, -1; the values themselves vary by 40
    assert paired_difference(a, runs({(4, 4): 0})) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([5.0, 6.0, 7.0], "both is 6.0 points of mAP above online (+3.5 to +8.5"),
        ([-5.0, -6.0, -7.0], "both is 6.0 points of mAP below online (-8.5 to -3.5"),
        (
            [-1.0, 1.0, 3.0],
            "both is 1.0 points of mAP above online, which the seeds do not settle (-4",
        ),
        (
            [1.0, 1.2, 6.0],
            "2.7 points of mAP above online, which the seeds do not settle",
        ),
        (
            [-1.0, -1.2, -6.0],
            "2.7 points of mAP below online, which the seeds do not settle",
        ),
        ([4.0], "one seed allows no conclusion"),
    ],
)
def test_words_say_no_more_than_the_interval(values, said):
    text = in_words("both", "online", summarise(values))
    assert said in text
    if len(values) > 1:
        above = sum(v > 0 for v in values)
        assert f"both is the higher in {above} of 3 seeds" in text
        assert ("not settle" in text) == (summarise(values).side() == 0)


def test_settled_is_what_students_interval_leaves_zero_out_of():
    # Student: 6 ± 4.303 · 1 / √3 = 6 ± 2.48
    assert summarise([5.0, 6.0, 7.0]).student() == pytest.approx(
        (3.516, 8.484), abs=1e-3
    )
    assert summarise([5.0, 6.0, 7.0]).side() == 1
    assert summarise([-5.0, -6.0, -7.0]).side() == -1
    assert summarise([1.4, 2.4, 3.4]).side() == 0  # 2.4 - 2.48 is below 0
    assert summarise([1.6, 2.6, 3.6]).side() == 1  # 2.6 - 2.48 is not
    assert np.isnan(summarise([7.0]).student()).all()
    assert summarise([7.0]).side() == 0


def test_methods_stand_in_order_and_additions_behind_their_method():
    shuffled = ["supervised", "new", "both+std", "online", "both", "both+ca", BEFORE]
    there = methods_in(frame([row(m) for m in shuffled]))
    assert there == [BEFORE, "online", "both", "both+ca", "both+std", *shuffled[:2]]


def test_words_without_a_common_seed():
    assert "not run on the same seeds" in in_words("a", "b", None)


# ------------------------------------------------------------------------------- tables


def lines(table: pd.DataFrame) -> dict:
    return table.set_index(table.columns[0]).to_dict("index")


def test_the_ablation_has_a_line_for_each_method_and_one_before():
    rows = frame(ablation())
    table = ablation_table(rows)
    found = lines(table)
    assert list(found) == [BEFORE, *MEAN]
    assert found["both"]["seeds"] == 5
    assert found["both"]["mAP (%)"] == summarise(by_seed(rows)["both"])
    assert found["both"]["mAP (%)"].mean == pytest.approx(50.5)
    assert "mINP (%)" not in table  # nobody measured it
    assert found[BEFORE]["ARI (0 to 1)"] is None


def test_markdown_and_csv_hold_the_same():
    table = ablation_table(frame(ablation()))
    shown = markdown(table).splitlines()
    assert len(shown) == 2 + len(table)
    assert all(line.count("|") == len(table.columns) + 1 for line in shown)
    some = markdown(table[["rank-1 (%)", "method"]]).splitlines()
    assert some[0] == "| rank-1 (%) | method |"
    assert some[-1].endswith("| both |")
    (line,) = [line for line in shown if line.startswith("| both")]
    found = list(csv_module.DictReader(io.StringIO(csv(table))))
    (both,) = [r for r in found if r["method"] == "both"]
    mean, sd = float(both["mAP (%) mean"]), float(both["mAP (%) sd"])
    low, high = float(both["mAP (%) low"]), float(both["mAP (%) high"])
    assert f"| {mean:.1f} ± {sd:.1f} ({low:.1f} to {high:.1f}) |" in line
    assert (both["seeds"], both["mAP (%) n"]) == ("5", "5")
    assert found[0]["ARI (0 to 1) mean"] == ""  # unknown is empty, not 0


def test_paired_lines_count_seeds():
    found = lines(paired_table(frame(ablation())))
    assert found["both − baseline"]["seeds above 0"] == "5 of 5"
    assert found["both − baseline"]["mAP (points)"].mean == pytest.approx(30.3)
    assert found["both − baseline"]["mAP (points)"].sd == pytest.approx(0, abs=1e-9)
    assert found["both − baseline"]["settled"] == "above"
    # the additions of 0.1 points a method have no spread at all
    assert found["both − online"]["Student's 95 %"] == "+0.1 to +0.1"
    assert "intra − baseline" not in found


def test_a_difference_that_may_be_luck_is_not_settled():
    rows = [row(m, s, v) for s, m, v in LUCK]
    (line,) = paired_table(frame(rows)).to_dict("records")
    # differences of 1, 2 and 6 points: 3 ± 4.303 · 2.646 / √3
    assert line["mAP (points)"].low > 0
    assert line["Student's 95 %"] == "-3.6 to +9.6"
    assert (line["seeds above 0"], line["settled"]) == ("3 of 3", "no")


def test_a_study_shows_gains_over_the_baseline():
    rows = with_defaults(frame(ablation() + studies()), "strength")
    found = lines(gain_table(rows, "strength"))
    assert list(found) == [0.0, 0.5, 1.0]
    gains = [line["both − baseline (points)"].mean for line in found.values()]
    assert gains == pytest.approx([30, 30 * 0.875, 30.3])
    left, right = gain_figure(rows).axes
    (drawn,) = (c.lines[0].get_ydata() for c in right.containers)
    assert drawn == pytest.approx(gains)
    assert left.get_xlabel() == right.get_xlabel() == "camera gap (1: the book's)"
    alone = gain_table(rows[rows.method == "both"], "strength")
    assert list(alone) == ["strength", "both, mAP (%)", "both − baseline (points)"]


def test_every_difference_pairs_runs_that_differ_in_the_method_only(tmp_path):
    write(tmp_path, "ablation", ablation())
    gap = [row(m, 20, v, study="strength", value=0.5) for m, v in GAP.items()]
    write(tmp_path, "studies", gap)
    tried = [
        {**row(m, 0, v), "start": "x", "changes": {"loss.momentum": mu}}
        for m, v, mu in (("both", 0.7, 0.2), ("online", 0.6, 0.2), ("online", 0.1, 0.8))
    ]
    write(tmp_path, "tuning", [], tried=tried)
    broken = [
        {
            "part": "fragments",
            "seed": 1,
            "cut": 0.5,
            "merge": 0.3,
            "method": m,
            "mAP": v,
        }
        for m, v in GAP.items()
    ]
    write(tmp_path, "association", [*broken, {"part": "diagnosis"}])
    found = every_difference(tmp_path).set_index("source")
    assert found.loc["ablation"].difference.tolist() == pytest.approx([0.1] * 5)
    assert found.loc["studies, strength 0.5", "difference"] == pytest.approx(20)
    assert found.loc["tuning, μ 0.2", "difference"] == pytest.approx(10)
    assert "tuning, μ 0.8" not in found.index  # nothing to pair it with
    name = "true people, 50 % cut, 30 % merged"
    assert found.loc[name, ["difference", "seed"]].tolist() == pytest.approx([20, 1])
    assert np.isnan(found.loc[name, "cameras"])
    assert (found.loc["ablation"].cameras == 2.5).all()
    (ax,) = forest_figure(found.reset_index()).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == [*dict.fromkeys(found.index)]


def test_convergence_is_a_summary_of_each_epoch():
    rows = frame(ablation())
    table = convergence_table(rows).set_index(["method", "epoch"]).loc["online"]
    assert list(table.index) == [0, 1]
    assert table["mAP (%)"][1] == summarise(by_seed(rows)["online"])
    assert table["mAP (%)"][0].mean == pytest.approx(table["mAP (%)"][1].mean / 2)
    assert table["ARI (0 to 1)"][1] is None  # it was not measured


def test_costs_are_medians_over_the_runs_that_have_them():
    rows = [row(seed=s) for s in (10, 11, 30)] + [row(seed=12, seconds={})]
    rows.append(row("online", 10, seconds={"train": None}))
    found = lines(cost_table(frame(rows)))
    assert found["both"]["runs"] == 3
    assert found["both"]["train (s)"] == 21.0
    assert list(found) == ["both"]


def test_published_numbers_stand_beside_ours_or_beside_nothing():
    rows = [row(dataset="market1501", seed=s, m_ap=0.8) for s in (0, 1)]
    rows.append(row(dataset="market1501", method="new"))
    rows.append(row(dataset="msmt17", study="eps", value=0.4))  # no ablation
    table = published_table(frame([*rows, row()]))
    found = {(line[0], line[1]): line[2:] for line in table.values.tolist()}
    assert found["market1501", "both"][:2] == [82.7, 92.5]
    assert found["market1501", "both"][2].mean == pytest.approx(80)
    assert found["market1501", "both"][2].n == 2
    assert found["market1501", "new"][2].n == 1
    ours = [v for k, line in found.items() for v in line[2:] if k[0] != "market1501"]
    assert pd.isna(ours).all()
    assert list(dict.fromkeys(table["data set"])) == [*PUBLISHED["dataset"].unique()]
    assert found["veri776", "CAP"][:2] == [40.6, 87.0]


def test_failures_are_counted_and_shown():
    failure = {"job": "synthetic-both-seed10", "error": "Trace\n back"}
    first, second = failures_table([frame(ablation(), failures=[failure])]).values
    assert first[1] == "1 of 21 failed"
    assert list(second[1:]) == ["synthetic-both-seed10", "Trace back"]


# ------------------------------------------------------------------------------ writing


def test_everything_is_written_and_listed(tmp_path):
    write(tmp_path, "ablation", ablation(), device="cpu", commit="abc")
    write(tmp_path, "studies", studies(), failures=[{"job": "x", "error": "y"}])
    files = write_tables(tmp_path, tmp_path / "out")
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    index = files[0].read_text()
    names = {f.name for f in files}
    assert "- ablation: A test. (device cpu, abc)" in index
    for stem in ("ablation-synthetic", "strength-synthetic", "eps-synthetic"):
        assert {f"{stem}.svg", f"{stem}.png"} <= names
        assert f"({stem}.svg)" in index
    for stem in ("ablation-synthetic-cost", "data_seed-synthetic", "published"):
        assert {f"{stem}.md", f"{stem}.csv"} <= names
        assert (tmp_path / "out" / f"{stem}.md").read_text().rstrip() in index
    assert "(ablation-synthetic-convergence.csv)" in index
    assert "1 of" in (tmp_path / "out" / "failures.md").read_text()


def test_one_run_is_enough_and_the_same_files_come_again(tmp_path):
    write(tmp_path, "ablation", [row(history=[], seconds={}, before={}, clusters={})])
    first = {f: f.read_bytes() for f in write_tables(tmp_path, tmp_path / "out")}
    assert b"(1 seed)" in first[tmp_path / "out" / "index.md"]
    again = write_tables(tmp_path, tmp_path / "out")
    assert first == {f: f.read_bytes() for f in again}


def test_without_records_the_person_is_told(tmp_path):
    with pytest.raises(InputError, match="run o2cap reproduce first"):
        write_tables(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_committed_records_can_be_read():
    folder = Path(__file__).parents[1] / "reproduce" / "records"
    tuning = read_record(folder / "tuning.json").query("dataset == 'synthetic'")
    assert set(tuning.seed) <= {0, 1, 2}
    for record in read_results(folder):
        rendered = record.query("dataset == 'synthetic' and study == ''")
        assert (rendered.seed > 2).all(), "a tuning seed among the results"
