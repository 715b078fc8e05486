"""Evaluation: figures against scikit-learn and hand-worked numbers, edge cases, comparisons, and the real script."""

import csv
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from conftest import run_process, run_script
from PIL import Image
from scipy.special import expit, logit

import data
import evaluate
import models

# A warning from a library must never reach the user's screen.
pytestmark = pytest.mark.filterwarnings("error")


def arguments(*words) -> SimpleNamespace:
    return evaluate.make_parser().parse_args([str(w) for w in words])


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def strict_json(text: str) -> dict:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def simple_rows(labels, probabilities, **columns) -> list[dict]:
    rows = [{"path": f"{i}.png", "label": y, "probability": p} for i, (y, p) in enumerate(zip(labels, probabilities))]
    return [r | {k: v[i] for k, v in columns.items()} for i, r in enumerate(rows)]


def report_of(path: Path, *words) -> dict:
    args = arguments(*words)
    scored = evaluate.score_csv(str(path))
    return evaluate.report(scored, evaluate.draw_weights([r["patient"] for r in scored["records"]], 200, 0), args)


def run_main(monkeypatch, *words) -> int:
    """Exit code of the script's main() in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    try:
        evaluate.main()
    except SystemExit as e:
        return e.code
    return 0


# --- ranking, rates, bootstrap ---


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_ranking_equals_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    for n in (2, 7, 300):
        y = rng.permutation(np.arange(n) % 3 > 0)
        score = (rng.integers(0, levels, n) + y * levels // 4) / levels
        weights = rng.integers(0, 4, (5, n)).astype(float)
        weights[0] = 1
        weights[:, [np.argmax(y), np.argmin(y)]] += 1  # both classes in each draw
        found = evaluate.ranking(y, score, weights)
        for i, w in enumerate(weights.astype(int)):
            repeated = np.repeat(y, w), np.repeat(score, w)
            assert found["auroc"][i] == pytest.approx(sk.roc_auc_score(*repeated), abs=1e-12)
            assert found["auprc"][i] == pytest.approx(sk.average_precision_score(*repeated), abs=1e-12)


def test_ranking_by_hand():
    y, score = np.array([1, 0, 1, 0]) > 0, np.array([0.9, 0.5, 0.5, 0.1])
    found = evaluate.ranking(y, score, np.ones((1, 4)))
    assert found["auroc"][0] == pytest.approx(3.5 / 4)  # four pairs, one of them tied
    assert found["auprc"][0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@pytest.mark.parametrize("label", [True, False])
def test_ranking_without_both_classes_is_undefined(label):
    found = evaluate.ranking(np.full(4, label), np.array([0.1, 0.4, 0.4, 0.8]), np.ones((1, 4)))
    assert math.isnan(found["auroc"][0]) and math.isnan(found["auprc"][0])
    p = np.linspace(0.1, 0.9, 4)
    assert math.isnan(evaluate.macro_auroc(np.full(4, int(label)), np.stack([1 - p, p], 1), 1))


def test_rates_by_hand():
    found = evaluate.rates(*(np.array([float(v)]) for v in (40, 5, 10, 45)))  # tp, fp, fn, tn
    expected = {
        "accuracy": 0.85,
        "balanced_accuracy": 0.85,
        "sensitivity": 0.8,
        "specificity": 0.9,
        "ppv": 40 / 45,
        "npv": 45 / 55,
        "f1": 80 / 95,
        "mcc": (40 * 45 - 5 * 10) / math.sqrt(45 * 50 * 50 * 55),
    }
    assert {k: float(v[0]) for k, v in found.items()} == pytest.approx(expected)


def test_rates_of_weighted_images_equal_scikit_learn():
    rng = np.random.default_rng(0)
    y, predicted = rng.random(200) < 0.7, rng.random(200) < 0.6
    weights = rng.integers(0, 3, (4, 200)).astype(float)
    found = evaluate.rates(*evaluate.confusion(y, predicted, weights))
    known = {
        "accuracy": sk.accuracy_score,
        "balanced_accuracy": sk.balanced_accuracy_score,
        "sensitivity": sk.recall_score,
        "ppv": sk.precision_score,
        "f1": sk.f1_score,
        "mcc": sk.matthews_corrcoef,
    }
    for i, w in enumerate(weights.astype(int)):
        repeated = np.repeat(y, w), np.repeat(predicted, w)
        assert {k: found[k][i] for k in known} == pytest.approx({k: f(*repeated) for k, f in known.items()})


@pytest.mark.parametrize(
    ("cells", "undefined"),
    [
        ((0, 0, 5, 5), {"ppv", "mcc"}),  # none called positive
        ((5, 5, 0, 0), {"npv", "mcc"}),
        ((3, 0, 2, 0), {"specificity", "balanced_accuracy", "mcc"}),  # positives alone
        ((0, 2, 0, 3), {"sensitivity", "balanced_accuracy", "mcc"}),
        ((4, 0, 1, 5), set()),  # no false positive
    ],
)
def test_rates_without_a_denominator_are_undefined(cells, undefined):
    found = evaluate.rates(*(np.array([float(v)]) for v in cells))
    assert {k for k, v in found.items() if math.isnan(v[0])} == undefined


def test_bootstrap_resamples_patients_with_all_of_their_images():
    patients = ["a", "b", "a", "c", "b", "a", "d"]
    weights = evaluate.draw_weights(patients, 500, seed=3)
    assert weights.shape == (500, 7)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 0] == weights[:, 5]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert not (weights[:, 0] == weights[:, 1]).all()
    assert set(weights[:, [0, 1, 3, 6]].sum(1)) == {4}  # as many patients in each draw
    assert weights.mean(0) == pytest.approx(np.ones(7), abs=0.15)
    assert (evaluate.draw_weights(patients, 500, seed=3) == weights).all()
    assert (evaluate.draw_weights(patients, 500, seed=4) != weights).any()


@pytest.mark.parametrize("images", [1, 5])
def test_an_interval_counts_patients_and_not_images(tmp_path, images):
    # 200 patients, 80 % of them right: the standard error is 0.0283, however many images each patient has.
    rows = []
    for i in range(200):
        right = i % 5 > 0
        y = i % 2
        row = {"patient": f"p{i}", "label": y, "probability": 0.9 if (y == 1) == right else 0.1}
        rows += [row | {"path": f"{i}-{k}.png"} for k in range(images)]
    found = report_of(write_csv(tmp_path / "p.csv", rows))["metrics"]["accuracy"]
    assert found["value"] == pytest.approx(0.8)
    assert found["ci95"] == pytest.approx([0.8 - 1.96 * 0.0283, 0.8 + 1.96 * 0.0283], abs=0.012)


def test_intervals_are_null_where_too_few_draws_define_them():
    def interval(drawn: np.ndarray) -> list[float] | None:
        return evaluate.with_interval(np.array([0.5]), drawn, patients=2)["ci95"]

    assert interval(np.array([np.nan] * 100 + [0.5] * 5)) is None
    assert interval(np.append(np.linspace(0, 1, 1001), np.nan)) == pytest.approx([0.025, 0.975])


def test_standard_error_of_an_auroc():
    """Exact for exponential scores, whose AUROC is k / (1 + k) where positives are k times as large."""
    rng = np.random.default_rng(3)
    labels = (np.arange(100) < 40).astype(int)
    areas = []
    for _ in range(1500):
        score = rng.exponential(np.where(labels == 1, 9, 1))
        areas.append(evaluate.macro_auroc(labels, np.stack([-score, score], 1), 1))
    assert np.mean(areas) == pytest.approx(0.9, abs=0.005)
    assert evaluate.auroc_error(0.9, 40, 60) == pytest.approx(np.std(areas), rel=0.06)
    assert evaluate.auroc_error(1.0, 40, 60) == 0


# --- calibration, temperature, threshold ---


def simulate(n: int = 20000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from well-calibrated logits."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0.5, 2, n)
    return rng.random(n) < expit(z), z


def test_brier_and_likelihood_equal_scikit_learn():
    y, z = simulate(500)
    found = evaluate.calibration(y, z)
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, expit(z)))
    assert found["nll"] == pytest.approx(sk.log_loss(y, expit(z)))


def test_calibration_error_by_hand():
    p, y = np.array([0.15, 0.15, 0.85, 0.85, 0.33]), np.array([0, 1, 1, 1, 0]) > 0
    assert evaluate.calibration(y, logit(p))["ece"] == pytest.approx((0.7 + 0.3 + 0.33) / 5)


@pytest.mark.parametrize(("factor", "shift", "slope"), [(1, 0, 1), (2, 0, 0.5), (0.5, 0, 2), (1, 0.8, 1)])
def test_slope_and_intercept_tell_what_was_done_to_the_logits(factor, shift, slope):
    y, z = simulate()
    found = evaluate.calibration(y, z * factor + shift)
    assert found["slope"] == pytest.approx(slope, rel=0.06)
    if factor == 1:
        assert found["intercept"] == pytest.approx(-shift, abs=0.06)


@pytest.mark.parametrize(
    ("y", "z"),
    [
        ([0, 0, 1, 1], [-2, -1, 1, 2]),
        ([1, 1, 0, 0], [-2, -1, 1, 2]),
        ([0, 0, 1, 1], [-2, 1, 1, 2]),  # they only touch: the best slope is infinite here too
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]),  # one and the same score for all: any slope is as good
        ([1, 1, 1, 1], [-2, -1, 1, 2]),
        ([0, 0, 0, 0], [-2, -1, 1, 2]),
    ],
)
def test_a_slope_that_does_not_exist_is_none(y, z):
    found = evaluate.calibration(np.array(y) > 0, np.array(z, float))
    assert found["slope"] is None
    assert math.isfinite(found["brier"]) and math.isfinite(found["nll"])


@pytest.mark.parametrize("temperature", [0.4, 1, 3])
@pytest.mark.parametrize("classes", [2, 3])
def test_fit_temperature_recovers_a_known_one(temperature, classes):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (20000, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((20000, 1)) > p.cumsum(1)).sum(1)
    assert evaluate.fit_temperature(logits * temperature + 5, labels) == pytest.approx(temperature, rel=0.05)


def test_fit_temperature_stays_in_its_bounds_on_separated_classes():
    logits = np.array([[3.0, -3.0], [-3.0, 3.0]])
    assert 0.05 <= evaluate.fit_temperature(logits, np.array([0, 1])) < 0.2
    assert 10 < evaluate.fit_temperature(logits, np.array([1, 0])) <= 20


def test_youden_threshold_by_hand():
    z, y = np.array([2, 1, -1, 0, -2, -3, -4.0]), np.array([1, 1, 1, 0, 0, 0, 0]) > 0
    # From -1 on: sensitivity 1, specificity 3/4; half-way to the next score.
    assert evaluate.choose_threshold("youden", y, z) == pytest.approx(expit(-1.5))


@pytest.mark.parametrize(("target", "caught"), [(0.95, 95), (0.8, 80), (0.995, 100), (1.0, 100)])
def test_the_sensitivity_rule_takes_the_highest_threshold_that_reaches_it(target, caught):
    rng = np.random.default_rng(2)
    y = np.arange(160) < 100
    z = rng.permutation(160) * 0.1 - 8 + y * 2.03  # no ties
    p = expit(z)
    threshold = evaluate.choose_threshold(f"sensitivity={target}", y, z)
    assert (p[y] >= threshold).sum() == caught
    # One image higher, and it is not reached any more.
    above = np.sort(p[p >= threshold])
    assert (p[y] > above[0]).mean() < target


def test_a_chosen_threshold_holds_for_the_probabilities_that_are_reported():
    # Where the lowest score of all must be called positive, rounding must not leave it out.
    rng = np.random.default_rng(3)
    for _ in range(200):
        z = rng.normal(0, 3, 12)
        y = np.arange(12) < 6
        z[0] = z.min() - 0.5
        temperature = float(rng.uniform(0.5, 2))
        threshold = evaluate.choose_threshold("sensitivity=1.0", y, z / temperature)
        logits = np.stack([np.zeros(12), z], 1)
        scored = {"logits": logits, "temperature": temperature, "positive": 1}
        _, predicted = evaluate.predict_classes(scored, threshold)
        assert predicted[y].all()


def test_a_number_is_taken_as_the_threshold():
    y, z = simulate(50)
    assert evaluate.choose_threshold("0.37", y, z) == 0.37
    assert evaluate.choose_threshold("youden", np.ones(50, bool), z) == 0.5  # nothing to choose by


# --- a report, recomputed from its CSV ---


NAMED = (
    ("person1_bacteria_1.jpeg", "PNEUMONIA", 0.91),
    ("person1_bacteria_2.jpeg", "PNEUMONIA", 0.62),
    ("person1_virus_3.jpeg", "PNEUMONIA", 0.38),  # another patient than the one above: two series of numbers
    ("person7_virus_1.jpeg", "PNEUMONIA", 0.97),
    ("BACTERIA-1000007-0001.jpeg", "PNEUMONIA", 0.71),
    ("VIRUS-1000008-0001.jpeg", "PNEUMONIA", 0.29),
    ("person12_bacteria_9.jpeg", "PNEUMONIA", 0.55),
    ("IM-0003-0001.jpeg", "NORMAL", 0.07),
    ("IM-0003-0002.jpeg", "NORMAL", 0.62),  # a tie with a positive
    ("IM-0004-0001.jpeg", "NORMAL", 0.12),
    ("NORMAL2-IM-0003-0001.jpeg", "NORMAL", 0.44),
    ("NORMAL2-IM-0009-0001.jpeg", "NORMAL", 0.83),
    ("NORMAL-1000012-0001.jpeg", "NORMAL", 0.21),
    ("NORMAL-1000012-0002.jpeg", "NORMAL", 0.03),
)


@pytest.fixture
def named(tmp_path) -> Path:
    rows = [{"path": f"test/{y}/{n}", "label": y, "probability": p} for n, y, p in NAMED]
    return write_csv(tmp_path / "named.csv", rows)


def recompute(rows: list[dict], threshold: float) -> dict:
    """The figures of a binary report from the rows of a CSV, with scikit-learn and plain counting."""
    y = np.array([r["label"] == "PNEUMONIA" for r in rows])
    p = np.array([float(r["probability"]) for r in rows])

    def counted(called: np.ndarray) -> dict:
        (tn, fp), (fn, tp) = sk.confusion_matrix(y, called, labels=[False, True]).tolist()
        return {
            "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn},
            "accuracy": sk.accuracy_score(y, called),
            "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "ppv": tp / (tp + fp) if tp + fp else None,
            "npv": tn / (tn + fn) if tn + fn else None,
            "f1": sk.f1_score(y, called, zero_division=0),
            "mcc": sk.matthews_corrcoef(y, called) if 0 < called.sum() < len(y) else None,
        }

    metrics, half = counted(p >= threshold), counted(p >= 0.5)
    confusion = metrics.pop("confusion")
    half.pop("confusion")
    metrics |= {"auroc": sk.roc_auc_score(y, p), "auprc": sk.average_precision_score(y, p)}
    ece = 0
    for low in range(10):
        inside = (p >= low / 10) & ((p < (low + 1) / 10) | (low == 9))
        ece += abs(p[inside].sum() - y[inside].sum()) / len(p)
    calibration = {"brier": np.mean((p - y) ** 2), "nll": sk.log_loss(y, p, labels=[False, True]), "ece": ece}
    return {"metrics": metrics, "at_half": half, "confusion": confusion, "calibration": calibration, "y": y, "p": p}


def assert_report(found: dict, rows: list[dict]) -> None:
    """The report says what its CSV says."""
    expected = recompute(rows, found["threshold"]["value"])
    for key in ("metrics", "at_half"):
        assert {k: v["value"] for k, v in found[key].items()} == pytest.approx(expected[key], abs=1e-6)
    assert found["confusion"] == expected["confusion"]
    assert {k: found["calibration"][k] for k in expected["calibration"]} == pytest.approx(
        expected["calibration"], abs=1e-5
    )
    assert found["data"]["images"] == len(rows)
    assert found["data"]["prevalence"] == pytest.approx(expected["y"].mean())
    called = expected["p"] >= found["threshold"]["value"]
    wrong = np.flatnonzero(called != expected["y"])
    worst = sorted(wrong, key=lambda i: -abs(expected["p"][i] - found["threshold"]["value"]))[:10]
    assert [f["probability"] for f in found["failures"]] == pytest.approx([expected["p"][i] for i in worst], abs=1e-6)
    assert {f["path"] for f in found["failures"]} <= {rows[i]["path"] for i in wrong}


@pytest.mark.parametrize("threshold", [None, "0.3", "0.62", "0.9", "1"])
def test_every_figure_follows_from_the_csv(named, threshold):
    found = report_of(named, *(["--threshold", threshold] if threshold else []))
    assert_report(found, read_csv(named.read_text()))
    assert found["data"]["patients"] == 11
    source = ("command line", float(threshold)) if threshold else ("default", 0.5)
    assert (found["threshold"]["from"], found["threshold"]["value"]) == source


def test_intervals_follow_from_the_csv(named):
    args = arguments("--seed", 5)
    scored = evaluate.score_csv(str(named))
    patients = [r["patient"] for r in scored["records"]]
    weights = evaluate.draw_weights(patients, 30, 5)
    found = evaluate.report(scored, weights, args)["metrics"]
    rows = read_csv(named.read_text())
    draws = [recompute([r for r, k in zip(rows, w) for _ in range(int(k))], 0.5)["metrics"] for w in weights]
    for k in ("auroc", "auprc", "accuracy", "sensitivity", "specificity", "f1"):
        assert found[k]["ci95"] == pytest.approx(np.percentile([d[k] for d in draws], (2.5, 97.5)).tolist()), k


def test_subgroups_are_counted_by_hand(named):
    found = report_of(named)["subgroups"]
    figures = {
        k: (v["images"], v["patients"], v.get("sensitivity", v.get("specificity"))["value"]) for k, v in found.items()
    }
    assert figures == {
        "bacterial": (4, 3, 1),
        "viral": (3, 3, pytest.approx(1 / 3)),
        "IM": (3, 2, pytest.approx(2 / 3)),
        "NORMAL2-IM": (2, 2, 0.5),
        "NORMAL": (2, 1, 1),
    }
    assert {k for k, v in found.items() if "sensitivity" in v} == {"bacterial", "viral"}
    assert found["viral"]["sensitivity"]["ci95"] is not None
    assert found["NORMAL"]["specificity"]["ci95"] is None  # one patient


def test_ppv_at_another_prevalence_by_hand(tmp_path, capsys):
    # Sensitivity 0.8, specificity 0.9, prevalence 0.1: 0.08 true and 0.09 false positives, 0.81 and 0.02 negatives.
    labels = [1] * 5 + [0] * 10
    p = [0.9, 0.8, 0.7, 0.6, 0.2] + [0.7] + [0.1] * 9
    found = report_of(write_csv(tmp_path / "p.csv", simple_rows(labels, p)), "--prevalence", "0.1")
    assert found["at_prevalence"]["prevalence"] == 0.1
    assert found["at_prevalence"]["ppv"]["value"] == pytest.approx(0.08 / 0.17)
    assert found["at_prevalence"]["npv"]["value"] == pytest.approx(0.81 / 0.83)
    assert found["metrics"]["ppv"]["value"] == pytest.approx(0.8)  # at the prevalence of the images
    evaluate.print_report(found)
    assert "0.471" in capsys.readouterr().out


def test_temperature_scales_the_calibrated_figures_alone(named):
    args = arguments()
    scored = evaluate.score_csv(str(named)) | {"temperature": 2.0}
    found = evaluate.report(scored, np.ones((0, len(NAMED))), args)
    y, p = np.array([n[1] == "PNEUMONIA" for n in NAMED]), np.array([n[2] for n in NAMED])
    assert found["calibration"]["nll"] == pytest.approx(sk.log_loss(y, expit(logit(p) / 2)))
    assert found["calibration"]["before_temperature"]["nll"] == pytest.approx(sk.log_loss(y, p))
    assert found["calibration"]["temperature"] == 2
    assert found["metrics"]["auroc"] == {"value": pytest.approx(sk.roc_auc_score(y, p)), "ci95": None}


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (("0", "1"), "1"),
        (("NORMAL", "PNEUMONIA"), "PNEUMONIA"),
        (("healthy", "ill"), "ill"),
        (("PNEUMONIA", "well"), "PNEUMONIA"),
    ],
)
def test_the_probability_is_that_of_the_positive_label(tmp_path, labels, positive):
    y = [labels[0], labels[1], labels[1], labels[0]]
    p = [0.8 if v == positive else 0.1 for v in y]
    found = report_of(write_csv(tmp_path / "p.csv", simple_rows(y, p)))
    assert found["positive"] == positive
    assert found["metrics"]["auroc"]["value"] == 1
    assert found["confusion"] == {"tp": 2, "fp": 0, "fn": 0, "tn": 2}


# --- edge cases ---


EDGES = {
    "positives alone": (
        ["1"] * 4,
        [0.9, 0.7, 0.4, 0.6],
        None,
        {"auroc", "auprc", "specificity", "balanced_accuracy", "mcc"},
    ),
    "negatives alone": (
        ["0"] * 4,
        [0.9, 0.7, 0.4, 0.2],
        None,
        {"auroc", "auprc", "sensitivity", "balanced_accuracy", "mcc"},
    ),
    "one image": (["1"], [0.9], None, {"auroc", "auprc", "specificity", "balanced_accuracy", "mcc", "npv"}),
    "one patient": (["0", "1", "1", "0"], [0.3, 0.8, 0.4, 0.1], "aaaa", set()),
    "all scores alike": (["0", "1", "1", "0"], [0.7] * 4, None, {"npv", "mcc"}),
    "scores of exactly 0 and 1": (["0", "1", "1", "0", "1"], [1, 1, 0, 0, 0.5], None, set()),
    "no false positive": (["0", "1", "1", "0"], [0.1, 0.9, 0.2, 0.3], None, set()),
    "none called positive": (["0", "1", "1", "0"], [0.1, 0.4, 0.2, 0.3], None, {"ppv", "mcc"}),
    "all right": (["0", "1", "1", "0"], [0.1, 0.9, 0.8, 0.3], None, set()),
}


@pytest.mark.parametrize("kind", EDGES)
def test_what_is_undefined_is_null_and_a_dash(tmp_path, monkeypatch, capsys, kind):
    labels, p, patients, undefined = EDGES[kind]
    columns = {"patient": patients} if patients else {}
    write_csv(tmp_path / "edge.csv", simple_rows(labels, p, **columns))
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "edge.csv", "--bootstrap", "300", "--prevalence", "0.2") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = strict_json((tmp_path / "edge.scored.json").read_text())
    assert {k for k, v in found["metrics"].items() if v["value"] is None} == undefined
    assert all(v["ci95"] is None for v in found["metrics"].values() if v["value"] is None)
    if kind in ("one patient", "one image"):
        assert all(v["ci95"] is None for v in found["metrics"].values())
    table = captured.out.splitlines()
    for k in found["metrics"]:
        (line,) = [s for s in table if s.startswith(evaluate.TITLES.get(k, k.replace("_", " ")) + " ")]
        dash = line.split()[2 if k == "balanced_accuracy" else 1] == "-"
        assert dash == (k in undefined), line
    assert "nan" not in captured.out.lower() and "none" not in captured.out.lower()


def test_exact_zeros_and_ones_cost_much_but_not_infinitely_much(tmp_path):
    path = write_csv(tmp_path / "p.csv", simple_rows([0, 1, 1, 0, 1], [1, 1, 0, 0, 0.5]))
    found = report_of(path)
    assert found["metrics"]["auroc"]["value"] == pytest.approx(3 / 6)
    assert 10 < found["calibration"]["nll"] < 20
    assert found["calibration"]["brier"] == pytest.approx((1 + 0 + 1 + 0 + 0.25) / 5)


def test_without_draws_there_are_no_intervals(named, monkeypatch, capsys):
    assert run_main(monkeypatch, named, "--bootstrap", "0", "--json") == 0
    found = strict_json(capsys.readouterr().out)
    assert found["bootstrap"]["draws"] == 0
    assert all(v["ci95"] is None and v["value"] is not None for v in found["metrics"].values())


# --- three classes ---


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint of an untrained model for three classes, and a folder of noise that it fits."""
    folder = tmp_path_factory.mktemp("three")
    rng = np.random.default_rng(0)
    classes = ["A", "B", "C"]
    for c in classes:
        (folder / "data" / "test" / c).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(
                folder / "data" / "test" / c / f"{c}{i}.png"
            )
    torch.manual_seed(0)
    model = models.build("mobilenetv3_small_050", 3, 32)
    for m in model.modules():  # statistics of no data at all would let it say the same of every image
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 1, 32, 32))
        model.classifier.weight.mul_(5)
    about = {
        "root": str(folder / "data"),
        "demo": False,
        "fingerprint": "",
        "val": [],
        "patients": [],
        "pixels": torch.zeros(0),
    }
    ckpt = {"format": models.FORMAT, "format_version": models.FORMAT_VERSION, "model": "mobilenetv3_small_050"}
    ckpt |= {
        "state_dict": model.state_dict(),
        "classes": classes,
        "positive": "C",
        "input_size": 32,
        "mean": 0.5,
        "std": 0.3,
    }
    ckpt |= {"temperature": 1.5, "threshold": {"value": None, "rule": "largest probability", "from": ""}}
    models.save(ckpt | {"data": about, "arguments": {"seed": 0}, "input_check": {}}, folder / "ckpt.pt")
    return SimpleNamespace(folder=folder, ckpt=folder / "ckpt.pt", classes=classes)


def test_three_classes_get_what_is_defined_for_them(three, tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, three.ckpt, "--output", tmp_path, "--bootstrap", 100, "--device", "cpu") == 0
    out = capsys.readouterr().out
    found = strict_json((tmp_path / "test.json").read_text())
    rows = read_csv((tmp_path / "test.csv").read_text())
    assert len(rows) == 15
    labels = np.array([three.classes.index(r["label"]) for r in rows])
    p = np.array([[float(r[f"probability_{c}"]) for c in three.classes] for r in rows])
    z = np.array([[float(r[f"logit_{c}"]) for c in three.classes] for r in rows])
    e = np.exp(z / 1.5)
    assert p == pytest.approx(e / e.sum(1, keepdims=True), abs=1e-6)
    predicted = p.argmax(1)
    assert [r["prediction"] for r in rows] == [three.classes[i] for i in predicted]
    assert len(set(predicted)) > 1  # else the rest shows little
    each = {c: sk.roc_auc_score(labels == i, p[:, i]) for i, c in enumerate(three.classes)}
    assert {c: v["value"] for c, v in found["auroc_one_vs_rest"].items()} == pytest.approx(each)
    recall = sk.recall_score(labels, predicted, average=None)
    assert [v["value"] for v in found["sensitivity_per_class"].values()] == pytest.approx(recall.tolist())
    expected = {
        "auroc": np.mean(list(each.values())),
        "accuracy": (labels == predicted).mean(),
        "balanced_accuracy": recall.mean(),
    }
    assert {k: v["value"] for k, v in found["metrics"].items()} == pytest.approx(expected)
    assert found["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    binary = {"positive", "at_half", "at_prevalence", "calibration", "subgroups"}
    assert not binary & found.keys()
    assert "prevalence" not in found["data"] and found["threshold"]["value"] is None
    for c in three.classes:
        assert f"{each[c]:.3f}" in next(line for line in out.splitlines() if line.startswith(f"{c} "))


def test_three_classes_have_no_plot_and_none_is_named(three, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, three.ckpt, "--output", tmp_path, "--bootstrap", 0, "--plots", "--device", "cpu")
    assert (".png" in capsys.readouterr().out) == (tmp_path / "test.png").exists()


@pytest.mark.parametrize("words", [("--stress",), ("--prevalence", "0.2")])
def test_what_is_for_two_classes_is_an_error_with_three(three, tmp_path, monkeypatch, capsys, words):
    assert run_main(monkeypatch, three.ckpt, "--output", tmp_path, *words, "--device", "cpu") == 2
    assert "are for two classes" in capsys.readouterr().err and not (tmp_path / "test.json").exists()


# --- comparison ---


@pytest.fixture
def rivals(tmp_path) -> list[Path]:
    """Predictions of a good, a middling and a useless model on the same 300 images."""
    rng = np.random.default_rng(4)
    y = np.arange(300) % 2
    paths = []
    for name, skill in (("middling", 1.0), ("good", 3.0), ("useless", 0.0)):
        p = expit(skill * (2 * y - 1) + rng.normal(0, 1.5, 300))
        paths.append(write_csv(tmp_path / f"{name}.csv", simple_rows(y.tolist(), p.tolist())))
    return paths


def compare(paths, *words) -> dict:
    args = arguments("--bootstrap", "400", *words)
    return evaluate.compare([evaluate.score_csv(str(p)) for p in paths], args)


def test_comparison_is_sorted_and_paired(rivals, capsys):
    found = compare(rivals)
    strict_json(json.dumps(found, allow_nan=False))
    order = [e["model"] for e in found["compared"]]
    assert order == ["good", "middling", "useless"]
    area = [e["metrics"]["auroc"]["value"] for e in found["compared"]]
    assert "difference" not in found["compared"][0]
    for e, a in zip(found["compared"][1:], area[1:]):
        gap = e["difference"]["auroc"]
        assert gap["value"] == pytest.approx(a - area[0])
        assert gap["ci95"][0] < gap["value"] < gap["ci95"][1] < 0
        assert gap["p"] == pytest.approx(2 / 401)  # the smallest that so many draws can tell
        accuracy = e["metrics"]["accuracy"]["value"] - found["compared"][0]["metrics"]["accuracy"]["value"]
        assert e["difference"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert found["images"] == 300 and found["patients"] == 300 and found["over_seeds"] == []
    evaluate.print_comparison(found)
    out = capsys.readouterr().out
    assert out.index("good.csv") < out.index("middling.csv") < out.index("useless.csv")


def test_a_model_does_not_differ_from_itself_in_another_order(rivals, tmp_path):
    rows = read_csv(rivals[0].read_text())
    same = write_csv(tmp_path / "same.csv", rows[::-1])
    found = compare([rivals[0], same])["compared"][1]["difference"]
    for k in ("auroc", "accuracy"):
        assert found[k] == {"value": pytest.approx(0, abs=1e-12), "ci95": pytest.approx([0, 0], abs=1e-12), "p": 1}


def test_stressed_copies_are_compared_in_the_order_of_the_first(rivals, tmp_path, capsys):
    """Rows in another order must bring their stressed logits along."""
    other = write_csv(tmp_path / "other.csv", read_csv(rivals[1].read_text())[::-1])
    scored = [evaluate.score_csv(str(p)) for p in (rivals[0], other)]
    scored[1]["stressed"] = {"blur": scored[1]["logits"]}  # a stress that changes nothing
    found = evaluate.compare(scored, arguments("--bootstrap", "0"))
    best = found["compared"][0]
    assert found["split"] == "predictions"
    evaluate.print_comparison(found)
    assert f"under stress, mean: AUROC {best['metrics']['auroc']['value']:.3f}" in capsys.readouterr().out
    assert best["model"] == "other"
    assert best["stress"]["mean"]["auroc"] == pytest.approx(best["metrics"]["auroc"]["value"])


def test_equally_good_models_are_not_told_apart(tmp_path):
    rng = np.random.default_rng(5)
    y = np.arange(200) % 2
    paths = [
        write_csv(tmp_path / f"{i}.csv", simple_rows(y.tolist(), expit(2 * y - 1 + rng.normal(0, 1.5, 200)).tolist()))
        for i in range(2)
    ]
    gap = compare(paths)["compared"][1]["difference"]["auroc"]
    assert gap["p"] > 0.05
    assert gap["ci95"][0] < 0 < gap["ci95"][1]


def test_a_missing_truth_is_an_error(tmp_path):
    path = write_csv(
        tmp_path / "x.csv", [{"path": p, "label": y, "probability": "0.3"} for p, y in (("a", "1"), ("b", ""))]
    )
    with pytest.raises(data.DataError, match="expected two labels"):
        evaluate.score_csv(str(path))


def test_what_takes_one_checkpoint_is_an_error_in_a_comparison(rivals, monkeypatch, capsys):
    assert run_main(monkeypatch, *rivals, "--prevalence", "0.2") == 2
    assert "take one checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["other labels", "other classes", "other images", "fewer images"])
def test_what_can_not_be_compared_is_an_error(rivals, tmp_path, kind):
    rows = read_csv(rivals[0].read_text())
    if kind == "other labels":
        rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    elif kind == "other classes":
        rows = [r | {"label": ("cat", "dog")[int(r["label"])]} for r in rows]
    elif kind == "other images":
        rows[0]["path"] = "another.png"
    else:
        rows = rows[:-1]
    odd = write_csv(tmp_path / "odd.csv", rows)
    with pytest.raises(evaluate.data.DataError, match="odd.csv") as caught:
        compare([rivals[0], odd])
    assert "\n" not in str(caught.value)


def entry(seed: int, auroc: float | None, accuracy: float, **others) -> dict:
    metrics = {"auroc": {"value": auroc}, "accuracy": {"value": accuracy}}
    return {"model": "resnet18", "metrics": metrics, "arguments": {"seed": seed, "lr": 0.1} | others}


def test_runs_that_differ_in_their_seed_alone_are_summarised():
    entries = [entry(2, 0.9, 0.5), entry(0, 0.8, 0.7), entry(1, 0.7, 0.9), entry(3, 0.1, 0.1, lr=0.2)]
    entries.append({"model": "other program", "metrics": {}, "arguments": None})
    (found,) = evaluate.over_seeds(entries)
    assert found["model"] == "resnet18" and found["seeds"] == [0, 1, 2]
    assert found["auroc"] == pytest.approx({"mean": 0.8, "sd": 0.1})
    assert found["accuracy"] == pytest.approx({"mean": 0.7, "sd": 0.2})


def test_one_run_twice_has_no_spread():
    assert evaluate.over_seeds([entry(1, 0.9, 0.5), entry(1, 0.9, 0.5)]) == []


def test_an_undefined_figure_is_left_out_of_the_summary():
    (found,) = evaluate.over_seeds([entry(1, None, 0.5), entry(2, 0.9, 0.5)])
    assert "auroc" not in found and found["accuracy"] == {"mean": 0.5, "sd": 0}


# --- the real script on a real run ---


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory) -> Path:
    """A copy of the run, since evaluation writes into it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    folder.mkdir()
    for name in ("ckpt.pt", "metrics.json", "splits.csv"):
        shutil.copy(run_folder / name, folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(run) -> SimpleNamespace:
    """What evaluate.py with a checkpoint and no flag printed and wrote."""
    done = run_process("evaluate.py", "ckpt.pt", cwd=run)
    assert done.returncode == 0, done.stderr
    text = (run / "test.csv").read_text()
    return SimpleNamespace(
        out=done.stdout,
        err=done.stderr,
        json=strict_json((run / "test.json").read_text()),
        csv=text,
        rows=read_csv(text),
    )


def test_files_have_the_keys_that_others_rely_on(evaluated, run, demo):
    r = evaluated.json
    assert {"checkpoint", "model", "parameters", "split", "data", "threshold"} <= r.keys()
    assert {"root", "demo", "images", "patients", "left_out"} <= r["data"].keys()
    assert r["data"]["root"] == str(demo.resolve()) and r["data"]["demo"] is True and r["data"]["left_out"] == []
    names = ["auroc", "auprc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "ppv", "npv", "f1", "mcc"]
    assert list(r["metrics"]) == names
    assert {"accuracy", "sensitivity", "specificity"} <= r["at_half"].keys()
    assert {"brier", "nll", "ece", "temperature"} <= r["calibration"].keys()
    assert {"bacterial", "viral"} <= r["subgroups"].keys()
    assert r["split"] == "test" and r["model"] == "mobilenetv3_small_050"
    ckpt = models.load(run / "ckpt.pt")
    assert r["threshold"] == ckpt["threshold"] and "validation" in r["threshold"]["from"]
    assert r["calibration"]["temperature"] == ckpt["temperature"]
    assert r["parameters"] == sum(
        v.numel() for k, v in ckpt["state_dict"].items() if "running" not in k and "num_b" not in k
    )
    assert list(evaluated.rows[0]) == [
        "path",
        "patient",
        "subtype",
        "label",
        "logit",
        "probability",
        "prediction",
        "demo",
    ]


def test_every_figure_of_a_run_follows_from_its_csv(evaluated, demo):
    rows, r = evaluated.rows, evaluated.json
    files = {p.relative_to(demo).as_posix() for p in (demo / "test").rglob("*.jpeg")}
    assert {row["path"] for row in rows} == files and len(rows) == len(files) == 24
    assert all(row["path"].split("/")[1] == row["label"] for row in rows)
    assert_report(r, rows)
    z = np.array([float(row["logit"]) for row in rows])
    p = np.array([float(row["probability"]) for row in rows])
    assert p == pytest.approx(expit(z / r["calibration"]["temperature"]), abs=1e-6)
    called = np.where(p >= r["threshold"]["value"], "PNEUMONIA", "NORMAL")
    assert [row["prediction"] for row in rows] == called.tolist()
    for name in ("bacterial", "viral"):
        hits = [c == "PNEUMONIA" for row, c in zip(rows, called) if row["subtype"] == name]
        assert r["subgroups"][name]["images"] == len(hits)
        assert r["subgroups"][name]["sensitivity"]["value"] == pytest.approx(np.mean(hits))
    assert r["data"]["patients"] == len({row["patient"] for row in rows})


def test_the_printed_report_fits_and_says_what_a_reader_must_know(evaluated, demo):
    lines = evaluated.out.splitlines()
    # How long the path of the data is, is the user's affair.
    assert [s for s in lines if len(s.replace(str(demo.resolve()), "")) > 100] == []
    r = evaluated.json
    assert f"24 images of {r['data']['patients']} patients, prevalence {r['data']['prevalence']:.3f}" in evaluated.out
    (line,) = [s for s in lines if s.startswith("threshold")]
    assert f"{r['threshold']['value']:.4f}" in line and "from validation" in line
    for f in r["failures"]:
        assert any(f["path"] in s and f"{f['probability']:.4f}" in s and f["label"] in s for s in lines)
    auroc = next(s for s in lines if s.startswith("AUROC"))
    assert f"{r['metrics']['auroc']['value']:.3f}" in auroc and f"{r['metrics']['auroc']['ci95'][0]:.3f}" in auroc
    assert "DEMO" in evaluated.out and evaluated.err.count("DEMO DATA") == 1 and "LEAK" not in evaluated.err


def test_json_alone_on_stdout_and_a_threshold_of_the_user(run, evaluated, tmp_path):
    words = ("ckpt.pt", "--json", "--threshold", "0.25", "--bootstrap", "50", "--output", tmp_path / "out")
    done = run_script("evaluate.py", *words, cwd=run)
    assert done.returncode == 0, done.stderr
    found = strict_json(done.stdout)
    assert found["threshold"]["value"] == 0.25 and found["threshold"]["from"] == "command line"
    assert found == strict_json((tmp_path / "out" / "test.json").read_text())
    assert_report(found, read_csv((tmp_path / "out" / "test.csv").read_text()))
    assert found["metrics"]["auroc"]["value"] == evaluated.json["metrics"]["auroc"]["value"]
    assert (run / "test.csv").read_text() == evaluated.csv  # --output left it alone


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_split_of_the_run_is_scored_as_it_was_drawn(run, tmp_path, monkeypatch, capsys, split):
    words = ("--split", split, "--output", tmp_path, "--bootstrap", "20", "--device", "cpu")
    assert run_main(monkeypatch, run / "ckpt.pt", *words) == 0
    captured = capsys.readouterr()
    expected = sorted(r["path"] for r in read_csv((run / "splits.csv").read_text()) if r["split"] == split)
    assert sorted(r["path"] for r in read_csv((tmp_path / f"{split}.csv").read_text())) == expected
    leaks = [line for line in captured.err.splitlines() if "LEAK" in line]
    found = strict_json((tmp_path / f"{split}.json").read_text())
    assert found["split"] == split
    if split == "val":
        assert leaks == [] and found["data"]["leaks"] == {"images": 0, "patients": 0}
    else:
        assert len(leaks) == 1 and f"{len(expected)} of these images" in leaks[0]
        assert found["data"]["leaks"]["images"] == len(expected)


def test_validation_figures_are_those_that_training_reported(run, tmp_path, monkeypatch):
    run_main(
        monkeypatch, run / "ckpt.pt", "--split", "val", "--output", tmp_path, "--bootstrap", "0", "--device", "cpu"
    )
    found = strict_json((tmp_path / "val.json").read_text())
    known = models.load(run / "ckpt.pt")["validation"]
    assert found["metrics"]["auroc"]["value"] == pytest.approx(known["val_auroc"], abs=1e-3)
    assert found["calibration"]["before_temperature"]["nll"] == pytest.approx(known["val_loss"], abs=1e-4)


def test_leaks_are_found_in_another_folder_too(run, demo, tmp_path, monkeypatch, capsys):
    # The training images under new names, as if they were a test set: the pixels give them away.
    for c in ("NORMAL", "PNEUMONIA"):
        (tmp_path / "other" / "test" / c).mkdir(parents=True)
        for i, p in enumerate(sorted((demo / "train" / c).iterdir())):
            shutil.copy(p, tmp_path / "other" / "test" / c / f"{i}.jpeg")
    words = ("--data", tmp_path / "other", "--output", tmp_path, "--bootstrap", "0", "--device", "cpu")
    assert run_main(monkeypatch, run / "ckpt.pt", *words) == 0
    trained = sum(r["split"] == "train" for r in read_csv((run / "splits.csv").read_text()))
    assert f"{trained} of these images and 0 of these patients" in capsys.readouterr().err
    assert strict_json((tmp_path / "test-other.json").read_text())["data"]["images"] == 96


def test_stress_is_scored_on_changed_copies(run, tmp_path, monkeypatch, capsys):
    words = ("--stress", "--output", tmp_path, "--bootstrap", "0", "--device", "cpu")
    assert run_main(monkeypatch, run / "ckpt.pt", *words) == 0
    found = strict_json((tmp_path / "test.json").read_text())["stress"]
    names = [k for k in found if k not in ("mean", "worst")]
    assert len(names) == 9
    for k in ("auroc", "sensitivity", "specificity", "balanced_accuracy"):
        values = [found[n][k] for n in names]
        assert found["mean"][k] == pytest.approx(np.mean(values)) and found["worst"][k] == min(values)
    assert len({tuple(found[n].values()) for n in names}) > 1
    assert "crop of 85 %" in capsys.readouterr().out


def test_checkpoints_and_predictions_of_others_in_one_table(run, evaluated, tmp_path):
    ckpt = models.load(run / "ckpt.pt")
    generator = torch.Generator().manual_seed(9)
    for v in ckpt["state_dict"].values():
        if v.is_floating_point() and v.ndim > 1:
            v.add_(torch.randn(v.shape, generator=generator) * v.std() * 0.5)
    ckpt["arguments"] |= {"seed": 1}
    models.save(ckpt, tmp_path / "b.pt")
    columns = ("path", "label", "probability", "patient")
    write_csv(tmp_path / "theirs.csv", [{k: r[k] for k in columns} for r in evaluated.rows])
    words = (run / "ckpt.pt", "b.pt", "theirs.csv", "--output", "out", "--bootstrap", "200")
    done = run_script("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = strict_json((tmp_path / "out" / "compare.json").read_text())
    by_file = {Path(e["checkpoint"]).name: e for e in found["compared"]}
    assert by_file.keys() == {"ckpt.pt", "b.pt", "theirs.csv"}
    area = [e["metrics"]["auroc"]["value"] for e in found["compared"]]
    assert area == sorted(area, reverse=True)
    assert by_file["theirs.csv"]["metrics"]["auroc"]["value"] == pytest.approx(
        evaluated.json["metrics"]["auroc"]["value"]
    )
    assert by_file["ckpt.pt"]["metrics"]["auroc"]["value"] == pytest.approx(evaluated.json["metrics"]["auroc"]["value"])
    assert by_file["theirs.csv"]["parameters"] is None and by_file["b.pt"]["parameters"] == evaluated.json["parameters"]
    (seeds,) = found["over_seeds"]
    values = [by_file[k]["metrics"]["auroc"]["value"] for k in ("ckpt.pt", "b.pt")]
    assert seeds["seeds"] == [0, 1]
    assert seeds["auroc"] == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
    table = [s for s in done.stdout.splitlines() if str(run) not in s]
    assert [s for s in table if len(s) > 100] == []
    assert found["demo"] is True and "DEMO" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.json"]


def test_checkpoints_of_other_classes_are_not_compared(run, three, demo, monkeypatch, capsys):
    assert run_main(monkeypatch, run / "ckpt.pt", three.ckpt, "--data", demo, "--device", "cpu") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "evaluate.py: error:" in last and "classes" in last


def test_predictions_of_a_run_score_as_the_run_does(evaluated, tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.csv").write_text(evaluated.csv)
    monkeypatch.chdir(tmp_path)
    value = evaluated.json["threshold"]["value"]
    assert run_main(monkeypatch, "theirs.csv", "--json", "--threshold", value) == 0
    found = strict_json(capsys.readouterr().out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs.csv", "theirs.scored.json"]
    for k, v in evaluated.json["metrics"].items():
        assert found["metrics"][k]["value"] == pytest.approx(v["value"]), k
        assert found["metrics"][k]["ci95"] == pytest.approx(v["ci95"]), k
    assert found["confusion"] == evaluated.json["confusion"]
    assert found["subgroups"].keys() == evaluated.json["subgroups"].keys()


# --- errors of the user ---


def test_a_missing_checkpoint_is_one_line_and_code_2(tmp_path):
    done = run_script("evaluate.py", "nowhere.pt", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "nowhere.pt" in done.stderr


BAD_CSV = {
    "no columns": ("a,b\n1,2\n", "path, label, probability"),
    "no rows": ("path,label,probability\n", "one row per image"),
    "empty": ("", "path, label, probability"),
    "no number": ("path,label,probability\na,0,high\nb,1,0.5\n", "no number"),
    "short row": ("path,label,probability\na,0,0.1\nb,1\n", "needs a header with the columns"),
    "not a number": ("path,label,probability\na,0,nan\nb,1,0.5\n", r"\[0, 1\]"),
    "above 1": ("path,label,probability\na,0,1.5\nb,1,0.5\n", r"\[0, 1\]"),
    "path twice": ("path,label,probability\na,0,0.1\na,1,0.5\n", "twice"),
    "three labels": ("path,label,probability\na,x,0.1\nb,y,0.5\nc,z,0.5\n", "two labels"),
    "one unknown label": ("path,label,probability\na,x,0.1\nb,x,0.5\n", "two labels"),
    "not text": (b"\xff\xfe\x00path", "can't be read"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_csv_that_can_not_be_scored_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, kind):
    content, expected = BAD_CSV[kind]
    path = tmp_path / "bad.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert run_main(monkeypatch, path) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and "bad.csv" in captured.err and captured.out == ""
    assert re.search(expected, captured.err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("garbage.pt",), "damaged"),
        (("missing.csv",), "missing.csv"),
        ((), "runs"),
        (("good.csv", "--bootstrap", "-1"), "--bootstrap"),
        (("good.csv", "--threshold", "1.5"), "1.5"),
        (("good.csv", "--threshold", "nan"), "nan"),
        (("good.csv", "--prevalence", "-0.1"), "prevalence"),
        (("good.csv", "--seed", "-1"), "seed"),
        (("good.csv", "--split", "all"), "all"),
    ],
)
def test_errors_are_one_line_and_code_2(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("garbage.pt").write_bytes(b"\x80garbage" * 100)
    write_csv(Path("good.csv"), simple_rows([0, 1], [0.2, 0.7]))
    assert run_main(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and expected in captured.err and captured.out == ""


@pytest.mark.parametrize("kind", ["no folder", "no test split", "other classes"])
def test_a_folder_that_does_not_fit_the_checkpoint_is_an_error(run, tmp_path, monkeypatch, capsys, kind):
    root = tmp_path / "data"
    if kind != "no folder":
        for name in ("x", "y"):
            folder = root / ("train" if kind == "no test split" else "test") / name
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "0.png")
    assert run_main(monkeypatch, run / "ckpt.pt", "--data", root, "--output", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and str(root) in captured.err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


# --- plots ---


def test_a_plot_without_matplotlib_says_how_to_install_it(named, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_main(monkeypatch, named, "--plots", "--bootstrap", "20") == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and "pip install matplotlib" in captured.err


@pytest.mark.filterwarnings("default")  # matplotlib's own
@pytest.mark.parametrize("kind", ["run", "named", "no draws", "one class"])
def test_the_plot_is_a_png_1600_pixels_wide(run, named, tmp_path, monkeypatch, capsys, kind):
    pytest.importorskip("matplotlib")
    write_csv(tmp_path / "one.csv", simple_rows([1, 1, 1], [0.2, 0.7, 0.9]))
    source = {"run": run / "ckpt.pt", "one class": tmp_path / "one.csv"}.get(kind, named)
    draws = 0 if kind == "no draws" else 50
    words = ("--plots", "--output", tmp_path / "out", "--bootstrap", draws, "--device", "cpu")
    assert run_main(monkeypatch, source, *words) == 0
    assert ".png" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*.png")
    with Image.open(path) as image:
        assert image.width == 1600 and image.height >= 600
        assert image.convert("L").getextrema() == (0, 255)


def test_a_run_folder_stands_for_its_checkpoint(run_folder, tmp_path):
    """The report lands in the folder itself, not beside it."""
    shutil.copytree(run_folder, tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "test.json").unlink(missing_ok=True)
    assert run_script("evaluate.py", tmp_path / "runs" / "a", cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs" / "a" / "test.json").exists()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a"]
