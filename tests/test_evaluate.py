"""Evaluation: each figure against scikit-learn, a hand-worked value or a simulation; edge cases, comparisons, files."""

import csv
import functools
import hashlib
import io
import json
import math
import re
import shutil
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from conftest import run_script
from PIL import Image
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import beta, binomtest

import data
import evaluate
import models

# A warning from a library must never reach the user's screen.
pytestmark = pytest.mark.filterwarnings("error")


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


def to_rows(labels, probabilities, **columns) -> list[dict]:
    rows = []
    for i, (y, p) in enumerate(zip(labels, probabilities)):
        others = {name: values[i] for name, values in columns.items()}
        rows.append({"path": f"{i}.png", "label": y, "probability": p, **others})
    return rows


def evaluate_files(folder: Path, *words, code: int = 0):
    """What evaluate.py prints as JSON, and its stderr."""
    done = run_script("evaluate.py", *words, "--json", cwd=folder)
    assert done.returncode == code, done.stderr
    return (strict_json(done.stdout) if code == 0 else None), done.stderr


def score(folder: Path, rows: list[dict], *words) -> dict:
    """The report of predictions in a CSV."""
    return evaluate_files(folder, write_csv(folder / "p.csv", rows), "--bootstrap", 200, *words)[0]


def values(metrics: dict) -> dict:
    return {k: v["value"] for k, v in metrics.items()}


# --- metrics ---


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_ranking_equals_scikit_learn(tmp_path, levels):
    rng = np.random.default_rng(levels)
    for n in (2, 7, 300):
        y = rng.permutation(np.arange(n) % 3 > 0)
        p = (rng.integers(0, levels, n) + y * levels // 4) / levels / 1.26
        metrics = score(tmp_path, to_rows(y.astype(int), p))["metrics"]
        assert metrics["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
        assert metrics["auprc"]["value"] == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)


def test_metrics_by_hand(tmp_path):
    rows = to_rows([1, 0, 1, 0], [0.9, 0.5, 0.5, 0.1])
    metrics = values(score(tmp_path, rows)["metrics"])
    assert metrics["auroc"] == pytest.approx(3.5 / 4)  # four pairs, one of them tied
    assert metrics["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # 40 true and 5 false positives, 10 false and 45 true negatives
    labels = [1] * 40 + [0] * 5 + [1] * 10 + [0] * 45
    report = score(tmp_path, to_rows(labels, [0.9] * 45 + [0.1] * 55))
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
    assert {k: v for k, v in values(report["metrics"]).items() if k in expected} == pytest.approx(expected)
    assert report["confusion"] == {"tp": 40, "fp": 5, "fn": 10, "tn": 45}


def test_a_weighted_draw_is_scored_as_the_repeated_images_are():
    rng = np.random.default_rng(0)
    y, p = rng.random(200) < 0.7, rng.integers(0, 30, 200) / 30
    weights = rng.integers(0, 3, (4, 200))
    metrics = evaluate.binary_metrics(y, p, p >= 0.4, weights.astype(float))
    for i, w in enumerate(weights):
        truth, scores = np.repeat(y, w), np.repeat(p, w)
        assert metrics["auroc"][i] == pytest.approx(sk.roc_auc_score(truth, scores))
        assert metrics["auprc"][i] == pytest.approx(sk.average_precision_score(truth, scores))
        assert metrics["mcc"][i] == pytest.approx(sk.matthews_corrcoef(truth, scores >= 0.4))
        assert metrics["ppv"][i] == pytest.approx(sk.precision_score(truth, scores >= 0.4))


def test_macro_auroc_of_training(tmp_path):
    rng = np.random.default_rng(1)
    labels, p = rng.integers(0, 3, 60), rng.dirichlet(np.ones(3), 60)
    each = [sk.roc_auc_score(labels == c, p[:, c]) for c in range(3)]
    assert evaluate.macro_auroc(labels, p, 0) == pytest.approx(np.mean(each))
    assert evaluate.macro_auroc(labels == 1, p[:, :2], 1) == pytest.approx(sk.roc_auc_score(labels == 1, p[:, 1]))
    assert math.isnan(evaluate.macro_auroc(np.zeros(4, int), np.full((4, 2), 0.5), 1))


def test_standard_error_of_an_auroc():
    """Exact for exponential scores, whose AUROC is k / (1 + k) where positives are k times as large."""
    rng = np.random.default_rng(3)
    labels = (np.arange(100) < 40).astype(int)
    areas = []
    for _ in range(1500):
        score = rng.exponential(np.where(labels == 1, 9, 1))
        areas.append(evaluate.macro_auroc(labels, np.stack([-score, score], 1), 1))
    assert np.mean(areas) == pytest.approx(0.9, abs=0.005)
    assert data.auroc_error(0.9, 40, 60) == pytest.approx(np.std(areas), rel=0.06)
    assert data.auroc_error(1.0, 40, 60) == 0


# --- intervals ---


def logit_interval(value: float, sd: float) -> list[float]:
    half = 1.96 * sd / (value * (1 - value))
    return [expit(logit(value) - half), expit(logit(value) + half)]


@pytest.mark.parametrize("images", [1, 5])
def test_an_interval_counts_patients_and_not_images(tmp_path, images):
    # 200 patients, 80 % of them right: the standard error is 0.0283, however many images each patient has.
    rows = []
    for i in range(200):
        right, y = i % 5 > 0, i % 2
        p = 0.9 if (y == 1) == right else 0.1
        rows += [{"patient": f"p{i}", "label": y, "probability": p, "path": f"{i}-{k}.png"} for k in range(images)]
    accuracy = score(tmp_path, rows, "--bootstrap", 2000)["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(0.8)
    assert accuracy["ci95"] == pytest.approx(logit_interval(0.8, 0.0283), abs=0.003)


def test_without_an_error_the_interval_is_that_of_the_patients_in_the_denominator(tmp_path):
    patients = ["a", "a", "b", "c", "d", "d", "e", "f", "g"]
    rows = to_rows([1, 1, 1, 1, 0, 0, 0, 0, 0], [0.9] * 4 + [0.2] * 5, patient=patients)
    metrics = score(tmp_path, rows)["metrics"]
    for name, n in (("sensitivity", 3), ("specificity", 4), ("ppv", 3), ("npv", 4), ("accuracy", 7), ("auroc", 3)):
        assert metrics[name]["ci95"] == pytest.approx([beta.ppf(0.025, n, 1), 1]), name
    low = beta.ppf(0.025, 3, 1)
    assert metrics["mcc"]["ci95"] == pytest.approx([2 * low - 1, 1])
    none = score(tmp_path, to_rows([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]))["metrics"]["sensitivity"]
    assert none == {"value": 0, "ci95": pytest.approx([0, beta.ppf(0.975, 1, 2)])}


def test_intervals_hold_the_truth():
    """Sensitivity 0.99 at 120 positives: the percentile bootstrap held it in 70 % of such data sets."""
    rng = np.random.default_rng(0)
    positive, patients = np.arange(200) < 120, np.arange(200) // 2
    hits = []
    for seed in range(150):
        predicted = np.where(positive, rng.random(200) < 0.99, rng.random(200) < 0.1)
        score = predicted.astype(float)
        estimates = evaluate.binary_estimates(positive, score, predicted, patients, evaluate.Bootstrap(200, seed))
        low, high = estimates["sensitivity"]["ci95"]
        hits.append(low <= 0.99 <= high)
    assert 0.92 <= np.mean(hits) <= 1


def test_memory_does_not_grow_with_images_times_draws():
    rng = np.random.default_rng(0)
    y, p = rng.random(2000) < 0.5, rng.random(2000)
    tracemalloc.start()
    bootstrap = evaluate.Bootstrap(4000, 0)
    drawn = bootstrap.values(functools.partial(evaluate.rates, y, p > 0.5), np.arange(2000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(drawn["accuracy"]) == 1 + 4000  # the images as they are, and each draw
    assert peak < 20e6  # all weights at once would take 64 MB


def test_draws_are_those_of_their_seed(tmp_path):
    found = []
    for seed in (3, 3, 4):
        found.append(score(tmp_path, NAMED_ROWS, "--seed", seed)["metrics"]["accuracy"])
    assert found[0] == found[1] != found[2]


# --- calibration, temperature, threshold ---


def simulate(n: int = 20000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from well-calibrated logits."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0.5, 2, n)
    return rng.random(n) < expit(z), z


def test_brier_and_likelihood_equal_scikit_learn(tmp_path):
    y, z = simulate(500)
    found = score(tmp_path, to_rows(y.astype(int), expit(z)))["calibration"]
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, expit(z)))
    assert found["nll"] == pytest.approx(sk.log_loss(y, expit(z)))


def test_calibration_error_and_curve_by_hand(tmp_path):
    rows = to_rows([0, 1, 1, 1, 0], [0.15, 0.15, 0.85, 0.87, 0.33])
    found = score(tmp_path, rows)["calibration"]
    assert found["ece"] == pytest.approx((0.7 + 0.28 + 0.33) / 5)
    curve = found["curve"]
    assert [point["images"] for point in curve] == [2, 1, 2]
    assert [point["predicted"] for point in curve] == pytest.approx([0.15, 0.33, 0.86])
    assert [point["observed"]["value"] for point in curve] == [0.5, 0, 1]
    assert curve[2]["observed"]["ci95"] == pytest.approx([beta.ppf(0.025, 2, 1), 1])


@pytest.mark.parametrize(("factor", "shift", "slope"), [(1, 0, 1), (2, 0, 0.5), (0.5, 0, 2), (1, 0.8, 1)])
def test_slope_and_intercept_tell_what_was_done_to_the_logits(factor, shift, slope):
    y, z = simulate()
    found = evaluate.calibration(y, z * factor + shift)
    assert found["slope"] == pytest.approx(slope, rel=0.06)
    if factor == 1:
        assert found["intercept"] == pytest.approx(-shift, abs=0.06)


def test_the_slope_is_that_of_the_largest_likelihood(tmp_path):
    y, z = simulate(300, seed=1)

    def loss(c):
        return np.mean(np.logaddexp(0, np.where(y, -1, 1) * (c[0] + c[1] * z)))

    best = minimize(loss, [0, 1], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14, "maxiter": 2000}).x
    found = score(tmp_path, to_rows(y.astype(int), expit(z)))["calibration"]
    assert found["slope"] == pytest.approx(best[1], abs=1e-6)


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


def test_probabilities_of_exactly_0_and_1_are_named_and_leave_the_slope_alone(tmp_path):
    y, z = simulate(200, seed=2)
    rows = to_rows(y.astype(int), expit(z))
    without = score(tmp_path, rows)["calibration"]
    rows += [{"path": f"end{i}.png", "label": i % 2, "probability": p} for i, p in enumerate((0, 1, 1))]
    write_csv(tmp_path / "p.csv", rows)
    done = run_script("evaluate.py", "p.csv", "--bootstrap", 20, cwd=tmp_path)
    assert "3 probabilities of p.csv are exactly 0 or 1, such as that of end0.png" in done.stderr
    assert "3 probabilities within 1e-15 of 0 or 1 are left out of slope and intercept" in done.stdout
    found = strict_json((tmp_path / "p.scored.json").read_text())["calibration"]
    assert found["exact"] == 3 and without["exact"] == 0
    assert (found["slope"], found["intercept"]) == (without["slope"], without["intercept"])
    assert found["nll"] > without["nll"] + 0.1  # they cost much, but not infinitely much


def test_the_decision_curve_by_hand(tmp_path):
    # At 0.2, of 10 images 3 true and 2 false positives: 3/10 - 2/10 * 0.25; treating all: 4/10 - 6/10 * 0.25.
    rows = to_rows([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0.9, 0.5, 0.2, 0.1, 0.6, 0.2] + [0.05] * 4)
    (row,) = [r for r in score(tmp_path, rows)["decision_curve"] if r["threshold"] == 0.2]
    assert row == {"threshold": 0.2, "model": pytest.approx(0.25), "all": pytest.approx(0.25)}


@pytest.mark.parametrize("temperature", [0.4, 1, 3])
@pytest.mark.parametrize("classes", [2, 3])
def test_fit_temperature_recovers_a_known_one(temperature, classes):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (20000, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((20000, 1)) > p.cumsum(1)).sum(1)
    found = evaluate.fit_temperature(logits * temperature + 5, labels)
    assert found == pytest.approx(temperature, rel=0.05) and not evaluate.at_bound(found)


def test_a_temperature_without_an_optimum_is_told_from_others():
    logits = np.array([[3.0, -3.0], [-3.0, 3.0]])
    low, high = evaluate.fit_temperature(logits, np.array([0, 1])), evaluate.fit_temperature(logits, np.array([1, 0]))
    assert low == pytest.approx(0.05) and evaluate.at_bound(low)
    assert high == pytest.approx(20) and evaluate.at_bound(high)


def test_youden_threshold_by_hand():
    z, y = np.array([2, 1, -1, 0, -2, -3, -4.0]), np.array([1, 1, 1, 0, 0, 0, 0]) > 0
    # From -1 on: sensitivity 1, specificity 3/4; half-way to the next score.
    assert evaluate.choose_threshold("youden", y, z) == pytest.approx(expit(-1.5))
    assert evaluate.choose_threshold("0.37", y, z) == 0.37
    assert evaluate.choose_threshold("youden", np.ones(7, bool), z) == 0.5  # nothing to choose by


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


def test_a_chosen_threshold_holds_for_the_probabilities_that_are_reported(tmp_path):
    """Where the lowest score of all must be called positive, rounding must not leave it out."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        z = rng.normal(0, 3, 12)
        y = np.arange(12) < 6
        z[0] = z.min() - 0.5
        threshold = evaluate.choose_threshold("sensitivity=1.0", y, z)
        report = score(tmp_path, to_rows(y.astype(int), expit(z)), "--threshold", threshold)
        assert report["metrics"]["sensitivity"]["value"] == 1


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
NAMED_ROWS = [{"path": f"test/{y}/{name}", "label": y, "probability": p} for name, y, p in NAMED]


def recompute(rows: list[dict], threshold: float) -> dict:
    """The metrics of two classes from the rows of a CSV, with scikit-learn and plain counting."""
    y = np.array([r["label"] == "PNEUMONIA" for r in rows])
    p = np.array([float(r["probability"]) for r in rows])
    predicted = p >= threshold
    (tn, fp), (fn, tp) = sk.confusion_matrix(y, predicted, labels=[False, True]).tolist()
    return {
        "auroc": sk.roc_auc_score(y, p),
        "auprc": sk.average_precision_score(y, p),
        "accuracy": sk.accuracy_score(y, predicted),
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "ppv": tp / (tp + fp) if tp + fp else None,
        "npv": tn / (tn + fn) if tn + fn else None,
        "f1": sk.f1_score(y, predicted, zero_division=0),
        "mcc": sk.matthews_corrcoef(y, predicted) if 0 < predicted.sum() < len(y) else None,
    }


def assert_report(found: dict, rows: list[dict]) -> None:
    """The report says what its CSV says."""
    threshold = found["threshold"]["value"]
    assert values(found["metrics"]) == pytest.approx(recompute(rows, threshold), abs=1e-6)
    half = recompute(rows, 0.5)
    assert values(found["at_half"]) == pytest.approx({k: half[k] for k in found["at_half"]}, abs=1e-6)
    assert found["data"]["images"] == len(rows)
    y = np.array([r["label"] == "PNEUMONIA" for r in rows])
    p = np.array([float(r["probability"]) for r in rows])
    assert found["data"]["prevalence"] == pytest.approx(y.mean())
    of_truth = np.where(y, p, 1 - p)
    wrong = np.flatnonzero((p >= threshold) != y)
    worst = sorted(of_truth[wrong])[:10]
    shown = [f["probability"] if f["label"] == "PNEUMONIA" else 1 - f["probability"] for f in found["failures"]]
    assert shown == pytest.approx(worst, abs=1e-6)
    assert {f["path"] for f in found["failures"]} <= {rows[i]["path"] for i in wrong}
    assert all(f["prediction"] != f["label"] for f in found["failures"])


@pytest.mark.parametrize("threshold", [None, "0.3", "0.62", "0.9", "1"])
def test_every_figure_follows_from_the_csv(tmp_path, threshold):
    found = score(tmp_path, NAMED_ROWS, *(["--threshold", threshold] if threshold else []))
    assert_report(found, NAMED_ROWS)
    assert found["data"]["patients"] == 11
    source = ("command line", float(threshold)) if threshold else ("default", 0.5)
    assert (found["threshold"]["from"], found["threshold"]["value"]) == source


def test_subgroups_are_counted_by_hand(tmp_path):
    found = score(tmp_path, NAMED_ROWS)["subgroups"]
    figures = {}
    for name, g in found.items():
        figures[name] = g["images"], g["patients"], g.get("sensitivity", g.get("specificity"))["value"]
    assert figures == {
        "bacterial": (4, 3, 1),
        "viral": (3, 3, pytest.approx(1 / 3)),
        "IM": (3, 2, pytest.approx(2 / 3)),
        "NORMAL2-IM": (2, 2, 0.5),
        "NORMAL": (2, 1, 1),
    }
    assert {k for k, v in found.items() if "sensitivity" in v} == {"bacterial", "viral"}
    assert found["NORMAL"]["specificity"]["ci95"] == pytest.approx([0.025, 1])  # one patient


@pytest.mark.parametrize(
    ("labels", "asked", "positive"),
    [
        (("0", "1"), (), "1"),
        (("NORMAL", "PNEUMONIA"), (), "PNEUMONIA"),
        (("PNEUMONIA", "well"), (), "PNEUMONIA"),
        (("abnormal", "normal"), ("--positive", "abnormal"), "abnormal"),
        (("0", "1"), ("--positive", "0"), "0"),
    ],
)
def test_the_probability_is_that_of_the_positive_label(tmp_path, labels, asked, positive):
    y = [labels[0], labels[1], labels[1], labels[0]]
    rows = to_rows(y, [0.8 if v == positive else 0.1 for v in y])
    write_csv(tmp_path / "p.csv", rows)
    found, err = evaluate_files(tmp_path, "p.csv", *asked)
    assert err.splitlines() == ["", "written: p.scored.json, p.scored.md"]
    assert found["positive"] == positive
    assert found["metrics"]["auroc"]["value"] == 1
    assert found["confusion"] == {"tp": 2, "fp": 0, "fn": 0, "tn": 2}


def test_control_characters_of_a_csv_reach_neither_screen_nor_card(tmp_path):
    rows = to_rows([1, 0, 1], [0.9, 0.8, 0.1], subtype=["\x1b[2J", "a|b", ""])
    rows[1]["path"] = "x\x1b[1A.png"
    write_csv(tmp_path / "p.csv", rows)
    done = run_script("evaluate.py", "p.csv", "--bootstrap", 20, cwd=tmp_path)
    card = (tmp_path / "p.scored.md").read_text()
    assert done.returncode == 0 and "\x1b" not in done.stdout + card
    assert "?[2J" in done.stdout and "x?[1A.png" in done.stdout and "a\\|b" in card


def test_a_guessed_positive_class_is_said(tmp_path):
    rows = to_rows(["healthy", "ill", "ill", "healthy"], [0.1, 0.9, 0.8, 0.3])
    found, err = evaluate_files(tmp_path, write_csv(tmp_path / "p.csv", rows))
    assert found["positive"] == "ill" and "the positive class is a guess: ill, not healthy" in err


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
    "no false positive": (["0", "1", "1", "0"], [0.1, 0.9, 0.2, 0.3], None, set()),
    "none called positive": (["0", "1", "1", "0"], [0.1, 0.4, 0.2, 0.3], None, {"ppv", "mcc"}),
    "all right": (["0", "1", "1", "0"], [0.1, 0.9, 0.8, 0.3], None, set()),
}


@pytest.mark.parametrize("kind", EDGES)
def test_what_is_undefined_is_null_and_a_dash(tmp_path, kind):
    labels, p, patients, undefined = EDGES[kind]
    write_csv(tmp_path / "edge.csv", to_rows(labels, p, **({"patient": patients} if patients else {})))
    done = run_script("evaluate.py", "edge.csv", "--bootstrap", 300, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    metrics = strict_json((tmp_path / "edge.scored.json").read_text())["metrics"]
    assert {k for k, v in metrics.items() if v["value"] is None} == undefined
    assert all((v["ci95"] is None) == (v["value"] is None) for v in metrics.values())
    for name, v in metrics.items():
        (line,) = [s for s in done.stdout.splitlines() if s.startswith(f"{evaluate.title(name)}  ")]
        dash = line.removeprefix(evaluate.title(name)).split()[0] == "-"
        assert dash == (name in undefined), line
        if v["ci95"]:
            assert 0 <= v["ci95"][0] + (name == "mcc") and v["ci95"][0] <= v["value"] <= v["ci95"][1] <= 1
    assert "nan" not in done.stdout.lower() and "none" not in done.stdout.lower()


def test_without_draws_there_are_no_intervals(tmp_path):
    found = score(tmp_path, NAMED_ROWS, "--bootstrap", 0)
    assert found["bootstrap"]["draws"] == 0
    assert all(v["ci95"] is None and v["value"] is not None for v in found["metrics"].values())


# --- comparison ---


@pytest.fixture
def rivals(tmp_path) -> Path:
    """Predictions of a good, a middling and a useless model on the same 300 images."""
    rng = np.random.default_rng(4)
    y = np.arange(300) % 2
    for name, skill in (("middling", 1.0), ("good", 3.0), ("useless", 0.0)):
        p = expit(skill * (2 * y - 1) + rng.normal(0, 1.5, 300))
        write_csv(tmp_path / f"{name}.csv", to_rows(y, p))
    return tmp_path


def test_the_first_input_is_the_reference_and_the_table_is_sorted(rivals):
    names = ("middling.csv", "useless.csv", "good.csv")
    done = run_script("evaluate.py", *names, "--bootstrap", 400, "--output", "out", cwd=rivals)
    found = strict_json((rivals / "out" / "compare.json").read_text())
    by_name = {e["model"]: e for e in found["compared"]}
    assert list(by_name) == ["good", "middling", "useless"]
    reference = by_name["middling"]["metrics"]
    assert by_name["middling"]["difference"] == {}
    for name in ("good", "useless"):
        p = [e["difference"]["auroc"]["p"] for e in (by_name["good"], by_name["useless"])]
        for metric in ("auroc", "accuracy"):
            gap = by_name[name]["difference"][metric]
            value = by_name[name]["metrics"][metric]["value"] - reference[metric]["value"]
            assert gap["value"] == pytest.approx(value)
            assert gap["ci95"][0] < value < gap["ci95"][1]
            assert (gap["ci95"][0] > 0 or gap["ci95"][1] < 0) == (gap["p"] < 0.05)
        adjusted = by_name[name]["difference"]["auroc"]["p_holm"]
        assert adjusted == pytest.approx(max(2 * min(p), by_name[name]["difference"]["auroc"]["p"]))
    out = done.stdout
    assert "1 (reference)  middling.csv" in out and "flattered by chance" in out
    assert "written: out/compare.json, out/report.md" in out
    assert "| 3 - 1 | AUROC |" in (rivals / "out" / "report.md").read_text()
    assert [s for s in out.splitlines() if len(s) > 100] == []


def test_a_comparison_and_a_report_say_the_same_of_a_model(tmp_path):
    right = [{**r, "probability": 0.9 if r["label"] == "PNEUMONIA" else 0.2} for r in NAMED_ROWS]
    for rows in (NAMED_ROWS, right):
        alone = score(tmp_path, rows)["metrics"]
        found, _ = evaluate_files(tmp_path, "p.csv", "p.csv", "--bootstrap", 200)
        for entry in found["compared"]:
            assert all(alone[name] == metric for name, metric in entry["metrics"].items())


def test_holm_by_hand():
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.6, 0.9]) == [1, 1]


def test_a_model_does_not_differ_from_itself_in_another_order(rivals):
    """Nor where one of the two files knows the patients: those of the first count."""
    rows = read_csv((rivals / "good.csv").read_text())
    write_csv(rivals / "same.csv", [{**r, "patient": i // 3} for i, r in enumerate(rows)][::-1])
    found, _ = evaluate_files(rivals, "same.csv", "good.csv", "--bootstrap", 100)
    assert found["patients"] == 100
    (gaps,) = [e["difference"] for e in found["compared"] if e["difference"]]
    for gap in gaps.values():
        assert gap == {"value": pytest.approx(0), "ci95": pytest.approx([0, 0]), "p": 1, "p_holm": 1}


@pytest.mark.parametrize(("better", "worse"), [(4, 0), (6, 0), (9, 2), (30, 12)])
def test_few_images_that_differ_are_judged_by_the_exact_test(tmp_path, better, worse):
    """McNemar's, which is a sign test, where each patient has one image."""
    y = np.arange(200) % 2
    right, wrong = np.where(y == 1, 0.8, 0.2), np.where(y == 1, 0.3, 0.7)
    a, b = right.copy(), right.copy()
    a[:worse] = wrong[:worse]
    b[worse : worse + better] = wrong[worse : worse + better]
    write_csv(tmp_path / "a.csv", to_rows(y, a))
    write_csv(tmp_path / "b.csv", to_rows(y, b))
    found, _ = evaluate_files(tmp_path, "b.csv", "a.csv")
    (gap,) = [e["difference"]["accuracy"] for e in found["compared"] if e["difference"]]
    exact = binomtest(better, better + worse).pvalue
    assert gap["value"] == pytest.approx((better - worse) / 200)
    assert gap["p"] == pytest.approx(exact) if better < 20 else gap["p"] >= exact
    assert (gap["ci95"][0] > 0) == (gap["p"] < 0.05)


def test_sign_flips_of_patients_by_enumeration():
    differences = np.array([2, -1, 0, 3, 1])
    sums = [abs(a * 2 + b * 1 + c * 3 + d * 1) for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)]
    assert evaluate.sign_flip_p(differences) == pytest.approx(np.mean(np.array(sums) >= 5))
    assert evaluate.sign_flip_p(np.zeros(3, int)) == 1


def test_equal_models_are_seldom_told_apart(tmp_path):
    """Three equal models against a reference: any of them differs in at most one data set of twenty, by chance."""
    rng = np.random.default_rng(6)
    significant = 0
    for _ in range(40):
        y = np.arange(120) % 2
        common = rng.normal(0, 1, 120)
        for i in range(4):
            write_csv(tmp_path / f"{i}.csv", to_rows(y, expit(2 * y - 1 + common + rng.normal(0, 1, 120))))
        found, _ = evaluate_files(tmp_path, *(f"{i}.csv" for i in range(4)), "--bootstrap", 200)
        p = [gap["p_holm"] for e in found["compared"] for gap in [e["difference"].get("auroc")] if gap]
        significant += min(p) < 0.05
    assert significant <= 5  # of 40 at 5 %: six or more have a chance of 1 %


@pytest.mark.parametrize("kind", ["other labels", "other classes", "other images", "fewer images"])
def test_what_can_not_be_compared_is_an_error(rivals, kind):
    rows = read_csv((rivals / "good.csv").read_text())
    if kind == "other labels":
        rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    elif kind == "other classes":
        rows = [{**r, "label": ("cat", "dog")[int(r["label"])]} for r in rows]
    elif kind == "other images":
        rows[0]["path"] = "another.png"
    else:
        rows = rows[:-1]
    write_csv(rivals / "odd.csv", rows)
    _, err = evaluate_files(
        rivals, "good.csv", "odd.csv", "--positive", "dog" if kind == "other classes" else "1", code=2
    )
    assert len(err.splitlines()) == 1 and ("odd.csv" in err or "--positive" in err)


# --- three classes ---


@pytest.fixture(scope="module")
def three(run_folder, tmp_path_factory) -> SimpleNamespace:
    """A checkpoint of an untrained model for three classes, and a folder of noise that it fits."""
    folder = tmp_path_factory.mktemp("three")
    rng = np.random.default_rng(0)
    classes = ["A", "B", "C"]
    for c in classes:
        (folder / "data" / "test" / c).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / "test" / c / f"{c}{i}.png")
    torch.manual_seed(0)
    model = models.build("mobilenetv3_small_050", 3, 32)
    for m in model.modules():  # statistics of no data at all would let it say the same of every image
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 1, 32, 32))
        model.classifier.weight.mul_(5)
    ckpt = models.load(run_folder)
    ckpt.update(
        state_dict=model.state_dict(), classes=classes, positive="C", input_size=32, temperature=1.5, border=None
    )
    ckpt["threshold"] = {"value": None, "rule": "largest probability", "from": ""}
    ckpt["data"].update(root=str(folder / "data"), demo=False)
    models.save(ckpt, folder / "ckpt.pt")
    return SimpleNamespace(folder=folder, ckpt=folder / "ckpt.pt", classes=classes)


def test_three_classes_get_what_is_defined_for_them(three, tmp_path):
    words = ("--output", "out", "--bootstrap", 100, "--device", "cpu")
    done = run_script("evaluate.py", three.ckpt, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = strict_json((tmp_path / "out" / "test.json").read_text())
    rows = read_csv((tmp_path / "out" / "test.csv").read_text())
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
    assert values(found["auroc_one_vs_rest"]) == pytest.approx(each)
    recall = sk.recall_score(labels, predicted, average=None)
    assert list(values(found["sensitivity_per_class"]).values()) == pytest.approx(recall.tolist())
    expected = {
        "auroc": np.mean(list(each.values())),
        "accuracy": (labels == predicted).mean(),
        "balanced_accuracy": recall.mean(),
    }
    assert values(found["metrics"]) == pytest.approx(expected)
    assert found["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    assert not {"positive", "at_half", "calibration", "subgroups", "shortcut", "decision_curve"} & found.keys()
    assert found["threshold"]["value"] is None
    for c in three.classes:
        assert any(line.startswith(f"{c} ") and f"{each[c]:.3f}" in line for line in done.stdout.splitlines())
    assert [line for line in done.stdout.splitlines() if len(line) > 100 and not line.startswith("written")] == []


@pytest.mark.extra("matplotlib")
def test_three_classes_are_drawn(three, tmp_path):
    done = run_script("evaluate.py", three.ckpt, "--output", "out", "--bootstrap", 0, "--plots", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_pictures(tmp_path / "out", "test", "test-mistakes")


def test_three_classes_in_a_comparison(three, tmp_path):
    found, _ = evaluate_files(tmp_path, three.ckpt, three.ckpt, "--bootstrap", 50, "--device", "cpu")
    assert [e["number"] for e in found["compared"]] == [1, 2]
    assert found["compared"][1]["difference"]["auroc"]["p"] == 1


# --- runs ---


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
    """What evaluate.py with a run and --stress printed and wrote."""
    done = run_script("evaluate.py", "ckpt.pt", "--stress", cwd=run)
    assert done.returncode == 0, done.stderr
    text = (run / "test.csv").read_text()
    found = strict_json((run / "test.json").read_text())
    return SimpleNamespace(out=done.stdout, err=done.stderr, json=found, csv=text, rows=read_csv(text))


def test_files_have_the_keys_that_others_rely_on(evaluated, run, demo):
    r = evaluated.json
    assert r["data"]["root"] == str(demo.resolve()) and r["data"]["demo"] is True and r["data"]["left_out"] == []
    names = ["auroc", "auprc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "ppv", "npv", "f1", "mcc"]
    assert list(r["metrics"]) == names
    assert {"brier", "nll", "ece", "temperature"} <= r["calibration"].keys()
    assert {"bacterial", "viral"} <= r["subgroups"].keys()
    assert r["split"] == "test" and r["model"] == "mobilenetv3_small_050"
    ckpt = models.load(run)
    assert r["threshold"] == ckpt["threshold"] and "validation" in r["threshold"]["from"]
    assert r["calibration"]["temperature"] == ckpt["temperature"]
    weights = [v for k, v in ckpt["state_dict"].items() if "running" not in k and "num_b" not in k]
    assert r["parameters"] == sum(v.numel() for v in weights)
    columns = ["path", "patient", "subtype", "label", "logit", "probability", "prediction", "demo"]
    assert list(evaluated.rows[0]) == columns


def test_a_report_tells_where_it_comes_from(evaluated, run):
    r = evaluated.json
    assert r["sha256"] == hashlib.sha256((run / "ckpt.pt").read_bytes()).hexdigest()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", r["provenance"]["date"])
    assert r["provenance"]["command"].endswith("evaluate.py ckpt.pt --stress")
    assert r["provenance"]["environment"]["torch"] == torch.__version__
    assert r["run"]["environment"]["torch"] == torch.__version__ and r["run"]["arguments"]["epochs"] == 2
    assert len(r["data"]["fingerprint"]) == 64
    card = (run / "report.md").read_text()
    for text in ("not for diagnosis", r["sha256"], "| AUROC |", "| noise 0.05 |", "## subgroups", "DEMO"):
        assert text in card
    trained = sum(row["split"] == "train" for row in read_csv((run / "splits.csv").read_text()))
    assert f"trained on {trained} images" in card
    assert "written: test.json, report.md, test.csv" in evaluated.out


def test_every_figure_of_a_run_follows_from_its_csv(evaluated, demo):
    rows, r = evaluated.rows, evaluated.json
    files = {p.relative_to(demo).as_posix() for p in (demo / "test").rglob("*.jpeg")}
    assert {row["path"] for row in rows} == files and len(rows) == len(files) == 24
    assert all(row["path"].split("/")[1] == row["label"] for row in rows)
    assert_report(r, rows)
    z = np.array([float(row["logit"]) for row in rows])
    p = np.array([float(row["probability"]) for row in rows])
    assert p == pytest.approx(expit(z / r["calibration"]["temperature"]), abs=1e-6)
    predicted = np.where(p >= r["threshold"]["value"], "PNEUMONIA", "NORMAL")
    assert [row["prediction"] for row in rows] == predicted.tolist()
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
        (line,) = [s for s in lines if s.startswith(f"{f['probability']:.4f}") and s.endswith(f["path"][-30:])]
        assert line.split()[1:3] == [f["label"], f["prediction"]]
    auroc = next(s for s in lines if s.startswith("AUROC"))
    assert f"{r['metrics']['auroc']['value']:.3f}" in auroc and f"{r['metrics']['auroc']['ci95'][0]:.3f}" in auroc
    assert "DEMO" in evaluated.out and evaluated.err.count("DEMO DATA") == 1 and "LEAK" not in evaluated.err
    assert "UNFINISHED" not in evaluated.out


def test_stress_is_scored_on_changed_copies(evaluated):
    found = evaluated.json["stress"]
    names = [k for k in found if k not in ("mean", "worst")]
    assert len(names) == 12 and {"noise 0.02", "noise 0.05", "border exchanged"} < set(names)
    for k in ("auroc", "sensitivity", "specificity", "balanced_accuracy"):
        figures = [found[n][k] for n in names]
        assert found["mean"][k] == pytest.approx(np.mean(figures)) and found["worst"][k] == min(figures)
    assert len({tuple(found[n].values()) for n in names}) > 1


def test_the_shortcut_is_reported_beside_the_model(evaluated, run, demo):
    """Recounted from the CSV and the border classifier's own logits."""
    border = models.load(run)["border"]
    images = [data.read_image(demo / row["path"], 64)[0] for row in evaluated.rows]
    speaks = models.border_logit(border, torch.from_numpy(np.stack(images)))
    y = np.array([row["label"] == "PNEUMONIA" for row in evaluated.rows])
    predicted = np.array([row["prediction"] == "PNEUMONIA" for row in evaluated.rows])
    found = evaluated.json["shortcut"]
    assert found["border_auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, speaks))
    worst = []
    for name, mask, metric in (
        ("NORMAL", ~y & (speaks > 0), "specificity"),
        ("PNEUMONIA", y & (speaks <= 0), "sensitivity"),
    ):
        if mask.any():
            worst.append(np.mean((predicted == y)[mask]))
            group = found["groups"][name]
            assert group["images"] == mask.sum() and group[metric]["value"] == pytest.approx(worst[-1])
    assert found["worst"] == pytest.approx(min(worst)) and "AUROC of the border alone" in evaluated.out


def test_a_threshold_of_the_user_and_another_folder_for_the_files(run, evaluated, tmp_path):
    words = ("ckpt.pt", "--threshold", "0.25", "--bootstrap", "50", "--output", tmp_path / "out")
    found, err = evaluate_files(run, *words)
    assert found["threshold"] == {"value": 0.25, "rule": "0.25", "from": "command line"}
    assert found == strict_json((tmp_path / "out" / "test.json").read_text())
    assert_report(found, read_csv((tmp_path / "out" / "test.csv").read_text()))
    assert found["metrics"]["auroc"]["value"] == evaluated.json["metrics"]["auroc"]["value"]
    assert (run / "test.csv").read_text() == evaluated.csv  # --output left it alone
    assert f"written: {tmp_path}/out/test.json" in err


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_split_of_the_run_is_scored_as_it_was_drawn(run, tmp_path, split):
    words = ("--split", split, "--output", tmp_path, "--bootstrap", "0", "--device", "cpu")
    found, err = evaluate_files(tmp_path, run / "ckpt.pt", *words)
    expected = sorted(r["path"] for r in read_csv((run / "splits.csv").read_text()) if r["split"] == split)
    assert sorted(r["path"] for r in read_csv((tmp_path / f"{split}.csv").read_text())) == expected
    leaks = [line for line in err.splitlines() if "LEAK" in line]
    if split == "train":
        assert len(leaks) == 1 and f"trained on {len(expected)} of these images" in leaks[0]
        return
    assert leaks == [] and not any(found["data"]["leaks"].values())
    known = models.load(run / "ckpt.pt")["validation"]
    assert found["metrics"]["auroc"]["value"] == pytest.approx(known["val_auroc"], abs=1e-3)
    assert found["calibration"]["before_temperature"]["nll"] == pytest.approx(known["val_loss"], abs=1e-4)


def test_leaks_are_found_in_another_folder_too(run, demo, tmp_path):
    # The training images of one class under new names, as if they were a test set: the pixels give them away.
    (tmp_path / "other" / "test" / "NORMAL").mkdir(parents=True)
    for i, p in enumerate(sorted((demo / "train" / "NORMAL").iterdir())):
        shutil.copy(p, tmp_path / "other" / "test" / "NORMAL" / f"{i}.jpeg")
    part = Counter(r["split"] for r in read_csv((run / "splits.csv").read_text()) if r["class"] == "NORMAL")
    words = ("--data", tmp_path / "other", "--output", tmp_path, "--bootstrap", "50", "--device", "cpu", "--stress")
    altered(run, tmp_path / "seed1", 0.3, seed=1)
    found, err = evaluate_files(tmp_path, run, "seed1", *words)
    assert err.count("LEAK") == 2  # once for both
    assert f"trained on {part['train']} of these images and 0 of these patients" in err
    assert f"chosen on {part['val']} of these images and 0 of these patients" in err
    assert found["compared"][0]["metrics"]["auroc"] == {"value": None, "ci95": None, "sd": None}  # one class alone
    assert found["compared"][0]["metrics"]["specificity"]["value"] is not None


def test_columns_of_metadata_are_subgroups(run, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "more" / "demo")
    files = sorted((tmp_path / "more" / "demo" / "test").rglob("*.jpeg"))
    rows = []
    for i, p in enumerate(files):
        name = p.relative_to(tmp_path / "more" / "demo").as_posix()
        rows.append({"file_name": name, "sex": "FM"[i % 2], "age": "NA" if i == 5 else str(i % 9 + 1)})
    write_csv(tmp_path / "more" / "demo" / "metadata.csv", rows)
    words = ("--data", "more/demo", "--output", ".", "--bootstrap", 50)
    done = run_script("evaluate.py", run, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = strict_json((tmp_path / "test-more-demo.json").read_text())
    groups = found["subgroups"]
    assert groups["sex F"]["images"] == 12 and groups["sex M"]["images"] == 12
    ages = [g["images"] for name, g in groups.items() if name.startswith("age")]
    assert len(ages) == 3 and sum(ages) == 23  # of one image it is not known
    scored = {r["path"]: r for r in read_csv((tmp_path / "test-more-demo.csv").read_text())}
    part = [scored[r["file_name"]] for r in rows if r["sex"] == "F"]
    expected = recompute(part, found["threshold"]["value"])
    for metric in ("auroc", "sensitivity", "specificity"):
        assert groups["sex F"][metric]["value"] == pytest.approx(expected[metric])
    aurocs = {name: g["auroc"]["value"] for name, g in groups.items() if "auroc" in g}
    (line,) = [s for s in done.stdout.splitlines() if s.startswith("smallest and largest AUROC")]
    assert f": {min(aurocs.values()):.3f} (" in line and f", {max(aurocs.values()):.3f} (" in line


def altered(run: Path, path: Path, noise: float = 0.0, **arguments) -> Path:
    """A copy of the run's checkpoint with noise on its weights and other arguments, saved as path/ckpt.pt."""
    ckpt = models.load(run)
    generator = torch.Generator().manual_seed(len(str(arguments)))
    for v in ckpt["state_dict"].values():
        if v.is_floating_point() and v.ndim > 1:
            v.add_(torch.randn(v.shape, generator=generator) * v.std() * noise)
    ckpt["arguments"].update(arguments)
    path.mkdir(parents=True)
    models.save(ckpt, path / "ckpt.pt")
    return path


def test_runs_that_differ_in_their_seed_are_one_model(run, evaluated, tmp_path):
    altered(run, tmp_path / "s1", 0.5, seed=1)
    altered(run, tmp_path / "s2", 0.6, seed=2)
    altered(run, tmp_path / "other", 0.6, lr=0.1)
    write_csv(
        tmp_path / "theirs.csv",
        [{k: r[k] for k in ("path", "label", "probability", "patient")} for r in evaluated.rows],
    )
    words = (run, "s?", "other", "theirs.csv", "--output", "out", "--bootstrap", "200", "--device", "cpu")
    done = run_script("evaluate.py", *words, cwd=tmp_path)  # nobody has expanded s?
    assert done.returncode == 0, done.stderr
    found = strict_json((tmp_path / "out" / "compare.json").read_text())
    by_number = {e["number"]: e for e in found["compared"]}
    assert [len(by_number[i]["runs"]) for i in (1, 2, 3)] == [3, 1, 1]
    assert by_number[1]["seeds"] == [0, 1, 2]
    alone = []
    for path in (run, tmp_path / "s1", tmp_path / "s2"):
        alone.append(evaluate_files(tmp_path, path, "--bootstrap", 0, "--output", "x")[0]["metrics"]["auroc"]["value"])
    auroc = by_number[1]["metrics"]["auroc"]
    assert auroc["value"] == pytest.approx(np.mean(alone)) and auroc["sd"] == pytest.approx(np.std(alone, ddof=1))
    assert alone[0] == pytest.approx(by_number[3]["metrics"]["auroc"]["value"])  # the CSV is its predictions
    gap = by_number[3]["difference"]["auroc"]
    assert gap["value"] == pytest.approx(alone[0] - np.mean(alone))
    # Training varies too: the interval is wider than seeds of no variation would have it.
    assert gap["ci95"][1] - gap["ci95"][0] > 2 * 1.96 * np.std(alone, ddof=1) / math.sqrt(3)
    assert f"{np.mean(alone):.3f} ({np.std(alone, ddof=1):.3f})" in done.stdout
    assert [s for s in done.stdout.splitlines() if len(s.replace(str(run), "")) > 100] == []
    assert found["demo"] is True and "DEMO" in done.stdout and done.stderr.count("DEMO DATA") == 1


def test_the_folds_of_a_cross_validation_are_pooled(run, demo, tmp_path):
    """Each image is scored by the run that did not see it, at that run's threshold."""
    root = models.load(run)["data"]["root"]
    for fold in (1, 2):
        altered(run, tmp_path / f"f{fold}", 0.3, fold=fold)
        ckpt = models.load(tmp_path / f"f{fold}")
        ckpt["threshold"]["value"] = fold / 4
        records = data.find_training(Path(root), 10, fold)
        images = data.load_images(Path(root), records, ckpt["input_size"])
        ckpt["data"]["fingerprint"] = data.fingerprint(records, images.digests)
        models.save(ckpt, tmp_path / f"f{fold}" / "ckpt.pt")
    words = (run, "f1", "f2", "--split", "val", "--bootstrap", 50, "--device", "cpu")
    found, err = evaluate_files(tmp_path, *words)
    assert "written: nothing" in err
    found, _ = evaluate_files(tmp_path, *words, "--output", "out")
    rows = {r["path"]: r for r in read_csv((tmp_path / "out" / "val.csv").read_text())}
    folds = data.draw_folds(data.scan(Path(root), "train"), 10)
    assert len(rows) == sum(fold in (0, 1, 2) for fold in folds) == found["data"]["images"]
    alone = {}
    for path in (run, "f1", "f2"):
        evaluate_files(tmp_path, path, "--split", "val", "--bootstrap", 0, "--output", "one", "--device", "cpu")
        alone.update({r["path"]: r for r in read_csv((tmp_path / "one" / "val.csv").read_text())})
    assert rows == alone
    y = [r["label"] == "PNEUMONIA" for r in rows.values()]
    auroc = sk.roc_auc_score(y, [float(r["probability"]) for r in rows.values()])
    assert found["metrics"]["auroc"]["value"] == pytest.approx(auroc)
    assert found["threshold"]["value"] is None and "each of the 3 runs its own" in found["threshold"]["rule"]


def test_an_unfinished_run_and_a_temperature_at_its_bound_are_said(run, tmp_path):
    altered(run, tmp_path / "a", epochs=40)
    ckpt = models.load(tmp_path / "a")
    ckpt.update(finished=False, temperature=20.0)
    models.save(ckpt, tmp_path / "a" / "ckpt.pt")
    done = run_script("evaluate.py", "a", "--bootstrap", 0, "--device", "cpu", cwd=tmp_path)
    assert done.stdout.startswith("UNFINISHED: epoch 2 of 40\n")
    assert "UNFINISHED: epoch 2 of 40" in (tmp_path / "a" / "report.md").read_text()
    assert "temperature 20.000: at the bound of its fit" in done.stdout
    done = run_script("evaluate.py", run, "a", "--bootstrap", 0, "--device", "cpu", cwd=tmp_path)
    assert "2  a  UNFINISHED: epoch 2 of 40" in done.stdout


def test_logits_that_are_not_finite_are_an_error_with_the_files_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "infer", lambda *_: torch.full((24, 2), math.inf))
    _, err = evaluate_files(tmp_path, run, "--device", "cpu", "--output", "out", code=2)
    last = err.splitlines()[-1]
    assert "not finite" in last and ".jpeg" in last and not (tmp_path / "out").exists()


def test_predictions_of_a_run_score_as_the_run_does(evaluated, tmp_path):
    (tmp_path / "theirs.csv").write_text(evaluated.csv)
    found, _ = evaluate_files(tmp_path, "theirs.csv", "--threshold", evaluated.json["threshold"]["value"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs.csv", "theirs.scored.json", "theirs.scored.md"]
    for k, v in evaluated.json["metrics"].items():
        assert found["metrics"][k]["value"] == pytest.approx(v["value"]), k
        assert found["metrics"][k]["ci95"] == pytest.approx(v["ci95"]), k
    assert found["subgroups"].keys() == evaluated.json["subgroups"].keys()


def test_a_run_folder_stands_for_its_checkpoint(run, tmp_path):
    """The report lands in the folder itself, not beside it; control characters in names do not reach the screen."""
    shutil.copytree(run, tmp_path / "runs" / "a\x1b[2J")
    done = run_script("evaluate.py", tmp_path / "runs" / "a\x1b[2J", "--bootstrap", 0, cwd=tmp_path)
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert (tmp_path / "runs" / "a\x1b[2J" / "test.json").exists()
    assert len(list((tmp_path / "runs").iterdir())) == 1


# --- errors of the user ---


def test_other_pixels_under_the_same_names_are_not_compared(run, demo, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(demo, tmp_path / name)
        altered(run, tmp_path / f"run_{name}")
        ckpt = models.load(tmp_path / f"run_{name}")
        ckpt["data"]["root"] = str(tmp_path / name)
        models.save(ckpt, tmp_path / f"run_{name}" / "ckpt.pt")
    first, second = sorted((tmp_path / "b" / "test" / "NORMAL").iterdir())[:2]
    shutil.copy(first, second)
    _, err = evaluate_files(tmp_path, "run_a", "run_b", "--output", "out", "--bootstrap", 0, code=2)
    assert "saw other pixels under the same names" in err


def test_one_image_with_two_labels_is_said(run, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "d")
    image = min((tmp_path / "d" / "test" / "NORMAL").iterdir())
    shutil.copy(image, tmp_path / "d" / "test" / "PNEUMONIA" / "copy.jpeg")
    _, err = evaluate_files(tmp_path, run, run, "--data", "d", "--output", "out", "--bootstrap", 0)
    assert err.count("1 images appear under several labels") == 1  # however many runs are scored on them


BAD_CSV = {
    "no columns": ("a,b\n1,2\n", "path, label, probability"),
    "no rows": ("path,label,probability\n", "one row per image"),
    "empty": ("", "path, label, probability"),
    "no number": ("path,label,probability\na,0,high\nb,1,0.5\n", "no number"),
    "short row": ("path,label,probability\na,0,0.1\nb,1\n", "needs a header with the columns"),
    "not a number": ("path,label,probability\na,0,nan\nb,1,0.5\n", "[0, 1]"),
    "above 1": ("path,label,probability\na,0,1.5\nb,1,0.5\n", "[0, 1]"),
    "decimal comma": ("path,label,probability\na,0,0,1\nb,1,0,5\n", "needs a header with the columns"),
    "column twice": ("path,label,probability,probability\na,0,0.1,0.2\nb,1,0.5,0.2\n", "a column twice"),
    "path twice": ("path,label,probability\na,0,0.1\na,1,0.5\n", "twice"),
    "three labels": ("path,label,probability\na,x,0.1\nb,y,0.5\nc,z,0.5\n", "two labels"),
    "one unknown label": ("path,label,probability\na,x,0.1\nb,x,0.5\n", "two labels"),
    "no truth": ("path,label,probability\na,1,0.1\nb,,0.5\n", "two labels"),
    "of predict.py": ("path,label,probability,flags,error\na,1,0.1,,\n", "labels are predictions"),
    "not text": (b"\xff\xfe\x00path", "can't be read"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_csv_that_can_not_be_scored_is_one_line_and_code_2(tmp_path, kind):
    content, expected = BAD_CSV[kind]
    (tmp_path / "bad.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    _, err = evaluate_files(tmp_path, "bad.csv", code=2)
    assert len(err.splitlines()) == 1 and "bad.csv" in err and expected in err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--threshold", "0.3"), "--threshold is for two classes"),
        (("--stress",), "--stress is for two classes"),
        (("x.csv", "--plots"), "--plots of a comparison is for two classes"),
        (("--positive", "A"), "--positive is for CSV files"),
        (("--split", "val"), "train has no class folders"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_told_before_anything_is_done(three, tmp_path, words, expected):
    _, err = evaluate_files(tmp_path, three.ckpt, *words, "--output", "out", code=2)
    assert len(err.splitlines()) == 1 and expected in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"folds": "x"}, "arguments.folds is no int"),
        ({"folds": 0}, "arguments.folds is 0, not in [2, 1000]"),
        ({"fold": -3}, "arguments.fold is -3, not in [0, 999]"),
        ({"fold": None}, "arguments.fold is no int"),
        ({"epochs": None}, "arguments.epochs is no int"),
        ({"seed": [torch.zeros(2)]}, "are no JSON"),
        ({"lr": math.nan}, "are no JSON"),
        ({0: 1}, "are no JSON"),
    ],
)
def test_arguments_that_no_training_wrote_are_an_error(run, tmp_path, arguments, expected):
    ckpt = models.load(run)
    ckpt.update(arguments={**ckpt["arguments"], **arguments}, finished=False)
    torch.save(ckpt, tmp_path / "ckpt.pt")
    _, err = evaluate_files(tmp_path, "ckpt.pt", "--split", "val", "--bootstrap", 0, "--device", "cpu", code=2)
    assert len(err.splitlines()) == 1 and "ckpt.pt is damaged: " in err and expected in err


def test_a_temperature_may_be_a_whole_number(run, tmp_path):
    models.save({**models.load(run), "temperature": 1}, tmp_path / "ckpt.pt")
    result, _ = evaluate_files(tmp_path, "ckpt.pt", "--bootstrap", 0, "--device", "cpu")
    assert result["calibration"]["temperature"] == 1


def test_arguments_of_an_older_version_may_lack_the_folds_but_not_the_epochs(run, tmp_path):
    ckpt = models.load(run)
    del ckpt["arguments"]["folds"], ckpt["arguments"]["fold"]
    ckpt["format_version"] = 2
    models.save(ckpt, tmp_path / "ckpt.pt")
    words = ("ckpt.pt", "--split", "val", "--bootstrap", 0, "--device", "cpu")
    assert evaluate_files(tmp_path, *words)[0]["data"]["images"] == len(ckpt["data"]["val_pixels"])
    del ckpt["arguments"]["epochs"]
    models.save(ckpt, tmp_path / "ckpt.pt")
    assert "ckpt.pt is damaged: it holds no arguments.epochs" in evaluate_files(tmp_path, *words, code=2)[1]


def test_a_second_call_sees_a_folder_that_has_changed(run, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "demo")
    words = (run, "--data", "demo", "--output", "out", "--bootstrap", 0, "--device", "cpu")
    before, _ = evaluate_files(tmp_path, *words)
    removed = min((tmp_path / "demo" / "test" / "PNEUMONIA").iterdir())
    removed.unlink()
    after, _ = evaluate_files(tmp_path, *words)
    assert after["data"]["images"] == before["data"]["images"] - 1


def test_a_folder_with_other_classes_is_an_error(run, three, tmp_path):
    _, err = evaluate_files(tmp_path, run, "--data", three.folder / "data", "--output", "out", code=2)
    assert "has the class A, which is not among NORMAL, PNEUMONIA" in err and not (tmp_path / "out").exists()
    _, err = evaluate_files(tmp_path, run, three.ckpt, "--bootstrap", 0, "--device", "cpu", code=2)
    assert "tell other classes apart" in err.splitlines()[-1]


# --- pictures ---


def assert_pictures(folder: Path, *stems: str) -> None:
    """Each as a PNG of some size that is not blank, and a PDF."""
    for stem in stems:
        with Image.open(folder / f"{stem}.png") as image:
            assert image.width >= 3000 and image.height >= 1400
            assert image.convert("L").reduce(20).getextrema()[0] < 200
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")


def test_pictures_need_matplotlib_and_say_so(tmp_path, monkeypatch):
    write_csv(tmp_path / "p.csv", NAMED_ROWS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, err = evaluate_files(tmp_path, "p.csv", "--plots", code=2)
    assert len(err.splitlines()) == 1 and "pip install matplotlib" in err


@pytest.mark.extra("matplotlib")
@pytest.mark.filterwarnings("default")  # matplotlib's own
@pytest.mark.parametrize("kind", ["run", "one class"])
def test_pictures_are_drawn_from_whatever_there_is(run, tmp_path, kind):
    words = ["--bootstrap", 50 if kind == "run" else 0, "--plots", "--output", "out", "--device", "cpu"]
    write_csv(tmp_path / "p.csv", to_rows(["1", "1", "1"], [0.2, 0.7, 0.9]))
    source, stem = (run, "test") if kind == "run" else ("p.csv", "p.scored")
    done = run_script("evaluate.py", source, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{stem}.png" in done.stdout and f"{stem}.pdf" in done.stdout
    assert_pictures(tmp_path / "out", stem, *(["test-mistakes"] if kind == "run" else []))


@pytest.mark.extra("matplotlib")
def test_runs_of_one_model_alone_are_drawn_without_a_warning(run, tmp_path):
    altered(run, tmp_path / "s1", 0.5, seed=1)
    words = (run, "s1", "--bootstrap", 20, "--plots", "--output", "out", "--device", "cpu")
    done = run_script("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_pictures(tmp_path / "out", "compare")
