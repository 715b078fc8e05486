"""Evaluation: each figure against scikit-learn, a hand-worked value or a simulation; edge cases, comparisons, files."""

import csv
import hashlib
import io
import json
import math
import re
import shutil
import sys
import tracemalloc
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
from scipy.stats import beta

import data
import evaluate
import models
import predict

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


def answers(y, score, border=None, patients=None, threshold=0.0) -> evaluate.Answers:
    """Answers about images; border: logits of the border classifier."""
    y, score = np.asarray(y, bool), np.asarray(score, float)
    stratum = None
    if border is not None:
        stratum = np.searchsorted(np.quantile(border, (0.2, 0.4, 0.6, 0.8)), border)
    patients = np.arange(len(y)) if patients is None else patients
    return evaluate.Answers(y, score, score >= threshold, patients, stratum)


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
    y, z = rng.random(200) < 0.7, rng.integers(-15, 15, 200)
    weights = rng.integers(0, 3, (4, 200))
    metrics = evaluate.measure(answers(y, z, threshold=2), evaluate.METRICS, weights.astype(float))
    for i, w in enumerate(weights):
        truth, scores = np.repeat(y, w), np.repeat(z, w)
        assert metrics["auroc"][i] == pytest.approx(sk.roc_auc_score(truth, scores))
        assert metrics["auprc"][i] == pytest.approx(sk.average_precision_score(truth, scores))
        assert metrics["mcc"][i] == pytest.approx(sk.matthews_corrcoef(truth, scores >= 2))
        assert metrics["ppv"][i] == pytest.approx(sk.precision_score(truth, scores >= 2))


def test_images_are_ranked_where_probabilities_no_longer_differ(tmp_path):
    z = np.array([50, 60, 70, 80, -800, -900])
    rows = to_rows([0, 0, 1, 1, 1, 0], expit(z), calibrated_logit=z)
    found = score(tmp_path, rows)
    assert len({r["probability"] for r in rows}) < 4
    assert found["metrics"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score([0, 0, 1, 1, 1, 0], z))
    assert next(iter(found["failures"])) == "4.png" and math.isfinite(found["calibration"]["nll"])
    # Without that column the tiny ones are still in order, and 0 and 1 are as near to them as a number can be.
    alone = score(tmp_path, to_rows([0, 1, 0, 1], [0, 1e-300, 0.99, 1]))
    assert alone["metrics"]["auroc"]["value"] == 0.75 and math.isfinite(alone["calibration"]["nll"])


def test_macro_auroc_of_training():
    rng = np.random.default_rng(1)
    labels, z = rng.integers(0, 3, 60), rng.normal(size=(60, 3))
    each = [sk.roc_auc_score(labels == c, z[:, c]) for c in range(3)]
    assert evaluate.macro_auroc(labels, z) == pytest.approx(np.mean(each))
    assert evaluate.macro_auroc((labels == 1) * 1, z[:, :2]) == pytest.approx(sk.roc_auc_score(labels == 1, z[:, 1]))
    assert math.isnan(evaluate.macro_auroc(np.zeros(4, int), np.zeros((4, 2))))


def test_the_adjusted_auroc_counts_pairs_within_a_quintile_of_the_border():
    rng = np.random.default_rng(2)
    y, border, z = rng.random(60) < 0.6, rng.normal(size=60), rng.integers(0, 9, 60)
    quintile = sum((border > np.quantile(border, q)).astype(int) for q in (0.2, 0.4, 0.6, 0.8))
    right, pairs = 0, 0
    for i in np.flatnonzero(y):
        for j in np.flatnonzero(~y):
            if quintile[i] == quintile[j]:
                right += (z[i] > z[j]) + (z[i] == z[j]) / 2
                pairs += 1
    found = evaluate.estimates(answers(y, z, border), evaluate.Bootstrap(200))["adjusted_auroc"]
    assert found["value"] == pytest.approx(right / pairs)
    assert found["ci95"][0] < right / pairs < found["ci95"][1]


def test_a_metric_is_added_in_one_place_with_its_range(tmp_path, monkeypatch):
    youden = evaluate.Metric("Youden", None, lambda a, weights: 2 * evaluate.balanced_accuracy(a, weights) - 1, low=-1)
    monkeypatch.setitem(evaluate.METRICS, "youden", youden)
    found = score(tmp_path, to_rows([1, 1, 1, 0, 0, 0], [0.2, 0.1, 0.6, 0.9, 0.8, 0.7]))["metrics"]["youden"]
    assert found["value"] == pytest.approx(1 / 3 - 1) and found["ci95"][0] < found["value"] < found["ci95"][1] < 0.5
    assert found["ci95"][0] > -1 and "| youden " in (tmp_path / "p.scored.md").read_text()


# --- intervals ---


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
    half = 1.96 * 0.0283 / (0.8 * 0.2)
    assert accuracy["ci95"] == pytest.approx([expit(logit(0.8) - half), expit(logit(0.8) + half)], abs=0.003)


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


def test_intervals_contain_the_truth():
    """Sensitivity 0.99 at 120 positives: the percentile bootstrap contained it in 70 % of these data sets."""
    rng = np.random.default_rng(0)
    y, patients = np.arange(200) < 120, np.arange(200) // 2
    hits = []
    for seed in range(150):
        predicted = np.where(y, rng.random(200) < 0.99, rng.random(200) < 0.1)
        a = answers(y, predicted, patients=patients, threshold=0.5)
        low, high = evaluate.estimates(a, evaluate.Bootstrap(200, seed), ["sensitivity"])["sensitivity"]["ci95"]
        hits.append(low <= 0.99 <= high)
    assert 0.92 <= np.mean(hits) <= 1


def test_memory_does_not_grow_with_images_times_draws():
    rng = np.random.default_rng(0)
    a = answers(rng.random(2000) < 0.5, rng.normal(size=2000))
    tracemalloc.start()
    drawn = evaluate.Bootstrap(4000).values(a, ["accuracy", "mcc"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(drawn["accuracy"]) == 1 + 4000  # the estimate itself, and each draw
    assert peak < 20e6  # all weights at once would take 64 MB


def test_the_mean_over_runs_varies_as_the_mean_over_other_runs_would():
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(4, 1)).repeat(20001, 1)  # runs that differ, and no variation from patients
    means = evaluate.mean_over_runs(runs, np.random.default_rng(1))
    assert means[0] == pytest.approx(runs[:, 0].mean())
    assert means[1:].std() == pytest.approx(runs[:, 0].std(ddof=1) / 2, rel=0.03)
    alone = rng.random((1, 50))
    assert evaluate.mean_over_runs(alone, rng).tolist() == alone[0].tolist()


def test_draws_are_those_of_their_seed(tmp_path):
    found = [score(tmp_path, NAMED_ROWS, "--seed", seed)["metrics"]["accuracy"] for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


# --- calibration and decisions ---


def simulate(n: int = 20000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from well-calibrated logits."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0.5, 2, n)
    return rng.random(n) < expit(z), z


def test_brier_and_likelihood_equal_scikit_learn_and_the_slope_is_that_of_the_largest_likelihood(tmp_path):
    y, z = simulate(300, seed=1)
    found = score(tmp_path, to_rows(y.astype(int), expit(z)))["calibration"]
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, expit(z)))
    assert found["nll"] == pytest.approx(sk.log_loss(y, expit(z)))

    def loss(c):
        return np.mean(np.logaddexp(0, np.where(y, -1, 1) * (c[0] + c[1] * z)))

    best = minimize(loss, [0, 1], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14, "maxiter": 2000}).x
    assert found["slope"] == pytest.approx(best[1], abs=1e-6)


def test_calibration_error_by_hand(tmp_path):
    found = score(tmp_path, to_rows([0, 1, 1, 1, 0], [0.15, 0.15, 0.85, 0.87, 0.33]))["calibration"]
    assert found["ece"] == pytest.approx((0.7 + 0.28 + 0.33) / 5)


@pytest.mark.parametrize(("factor", "shift", "slope"), [(1, 0, 1), (2, 0, 0.5), (0.5, 0, 2), (1, 0.8, 1)])
def test_slope_and_intercept_show_what_was_done_to_the_logits(factor, shift, slope):
    y, z = simulate()
    found = evaluate.calibration(y, z * factor + shift)
    assert found["slope"] == pytest.approx(slope, rel=0.06)
    if factor == 1:
        assert found["intercept"] == pytest.approx(-shift, abs=0.06)


@pytest.mark.parametrize(
    ("y", "z"),
    [
        ([0, 0, 1, 1], [-2, 1, 1, 2]),  # they only touch: the best slope is infinite here too
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]),  # one and the same score for all: any slope is as good
        ([1, 1, 1, 1], [-2, -1, 1, 2]),
    ],
)
def test_a_slope_that_does_not_exist_is_none(y, z):
    found = evaluate.calibration(np.array(y) > 0, np.array(z, float))
    assert found["slope"] is None
    assert math.isfinite(found["brier"]) and math.isfinite(found["nll"])


def test_the_net_benefit_by_hand():
    # At 0.2, of 10 images 3 true and 2 false positives: 3/10 - 2/10 * 0.25; treating all: 4/10 - 6/10 * 0.25.
    p = np.array([0.9, 0.5, 0.21, 0.1, 0.6, 0.21, *[0.05] * 4])
    found = evaluate.net_benefit(answers([1] * 4 + [0] * 6, logit(p)), np.array([0.2]))
    assert found == (pytest.approx([0.25]), pytest.approx([0.25]))


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
    metrics = {k: v for k, v in values(found["metrics"]).items() if k != "adjusted_auroc"}
    assert metrics == pytest.approx(recompute(rows, threshold), abs=1e-6)
    half = recompute(rows, 0.5)
    assert values(found["at_half"]) == pytest.approx({k: half[k] for k in found["at_half"]}, abs=1e-6)
    y = np.array([r["label"] == "PNEUMONIA" for r in rows])
    p = np.array([float(r["probability"]) for r in rows])
    assert found["data"]["images"] == len(rows) and found["data"]["prevalence"] == pytest.approx(y.mean())
    of_truth = np.where(y, p, 1 - p)
    wrong = np.flatnonzero((p >= threshold) != y)
    failures = found["failures"].values()
    shown = [f["probability"] if f["label"] == "PNEUMONIA" else 1 - f["probability"] for f in failures]
    assert shown == pytest.approx(sorted(of_truth[wrong])[:10], abs=1e-6)
    assert found["failures"].keys() <= {rows[i]["path"] for i in wrong}


@pytest.mark.parametrize("threshold", [None, "0.3", "0.62", "0.9", "1"])
def test_every_figure_follows_from_the_csv(tmp_path, threshold):
    found = score(tmp_path, NAMED_ROWS, *(["--threshold", threshold] if threshold else []))
    assert_report(found, NAMED_ROWS)
    assert found["data"]["patients"] == 11
    source = ("command line", float(threshold)) if threshold else ("default", 0.5)
    assert (found["threshold"]["from"], found["threshold"]["value"]) == source
    assert found["metrics"]["adjusted_auroc"] == {"value": None, "ci95": None}  # no border logits


def test_subgroups_are_counted_by_hand_and_name_their_source(tmp_path):
    found = score(tmp_path, NAMED_ROWS)["subgroups"]
    figures = {}
    for name, g in found.items():
        side = "sensitivity" if name.startswith("subtype") else "specificity"
        figures[name] = g["images"], g["patients"], g[side]["value"]
    assert figures == {
        "subtype (from file names): bacterial": (4, 3, 1),
        "subtype (from file names): viral": (3, 3, pytest.approx(1 / 3)),
        "series (from file names): IM": (3, 2, pytest.approx(2 / 3)),
        "series (from file names): NORMAL2-IM": (2, 2, 0.5),
        "series (from file names): NORMAL": (2, 1, 1),
    }
    assert found["series (from file names): NORMAL"]["specificity"]["ci95"] == pytest.approx([0.025, 1])  # one patient
    own = [{**r, "subtype": "round"} for r in NAMED_ROWS]
    assert list(score(tmp_path, own)["subgroups"]) == ["subtype: round"]


@pytest.mark.parametrize(
    ("column", "groups"),
    [
        (["058Y", "25", "", "040Y", "006M", "7", "60"], {"0.5 to 7": 2, "25 to 40": 2, "58 to 60": 2}),
        (["1", "2", "3", "", "1", "2", "3"], {"1": 2, "2": 2, "3": 2}),
        (["F", "M", "M", "F", "", "F", "M"], {"F": 3, "M": 3}),
        ([f"2020-01-{i:02}" for i in range(1, 8)], {f"2020-01-{i:02}": 1 for i in range(1, 8)}),
    ],
)
def test_columns_of_numbers_and_ages_are_shown_as_ranges(tmp_path, column, groups):
    found = score(tmp_path, to_rows([0, 1, 0, 1, 0, 1, 0], [0.5] * 7, column=column))["subgroups"]
    assert {name.removeprefix("column: "): g["images"] for name, g in found.items()} == groups


def test_a_column_in_which_most_images_differ_is_no_subgroup(tmp_path):
    rows = to_rows([0, 1] * 15, [0.3] * 30, accession=[f"A{i}" for i in range(30)], site=list("ab") * 15)
    found, err = evaluate_files(tmp_path, write_csv(tmp_path / "p.csv", rows), "--bootstrap", 0)
    assert list(found["subgroups"]) == ["site: a", "site: b"] and "column accession" in err


@pytest.mark.parametrize(
    ("labels", "asked", "positive"),
    [
        (("0", "1"), (), "1"),
        (("NORMAL", "PNEUMONIA"), (), "PNEUMONIA"),
        (("abnormal", "normal"), ("--positive", "abnormal"), "abnormal"),
    ],
)
def test_the_probability_is_that_of_the_positive_label(tmp_path, labels, asked, positive):
    y = [labels[0], labels[1], labels[1], labels[0]]
    write_csv(tmp_path / "p.csv", to_rows(y, [0.8 if v == positive else 0.1 for v in y]))
    found, err = evaluate_files(tmp_path, "p.csv", *asked)
    assert err.splitlines()[-2:] == ["written: p.scored.json", "written: p.scored.md"] and "guess" not in err
    assert found["positive"] == found["classes"][-1] == positive
    assert found["metrics"]["auroc"]["value"] == 1
    assert found["confusion"] == {"tp": 2, "fp": 0, "fn": 0, "tn": 2}


def test_tables_of_other_programs_are_read(tmp_path):
    text = "Path; LABEL;Probability ;site\n a\\b.png;ill;0,75;x\n c.png; healthy;0,25;\n"
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found, err = evaluate_files(tmp_path, "p.csv", "--bootstrap", 0, "--threshold", 0.8)
    assert found["positive"] == "ill" and "the positive class is a guess: ill, not healthy" in err
    assert {path: f["probability"] for path, f in found["failures"].items()} == {"a/b.png": pytest.approx(0.75)}
    assert found["subgroups"]["site: x"]["images"] == 1


WARNED = {
    "confidence": (to_rows([0, 1] * 30, [0.7, 0.9] * 30), "is this the confidence of the predicted class?"),
    "inverted": (to_rows([0, 1] * 30, [0.9, 0.1, 0.8, 0.3] * 15), "is the positive class the other one?"),
    "no patients": (to_rows([0, 1] * 30, [0.1, 0.9] * 30), "intervals treat images as independent"),
    "few": (to_rows([0, 1] * 24, [0.1, 0.9] * 24), "few images (48, 24 of 0)"),
    "few of a class": (to_rows([0] * 9 + [1] * 51, [0.1] * 60), "few images (60, 9 of 0)"),
}


@pytest.mark.parametrize("kind", WARNED)
def test_what_makes_figures_misleading_is_said_on_stderr_and_at_the_head_of_the_report(tmp_path, kind):
    rows, expected = WARNED[kind]
    write_csv(tmp_path / "p.csv", rows)
    done = run_script("evaluate.py", "p.csv", "--bootstrap", 50, cwd=tmp_path)
    head, _, _ = done.stdout.partition("\n## ")
    assert expected in done.stderr and expected in head
    assert expected in (tmp_path / "p.scored.md").read_text().partition("\n## ")[0]
    ordinary = to_rows([0, 1] * 30, [0.1, 0.9, 0.6, 0.4] * 15, patient=[f"p{i}" for i in range(60)])
    assert score(tmp_path, ordinary)["warnings"] == []


def test_control_characters_of_a_csv_reach_neither_screen_nor_card(tmp_path):
    rows = to_rows([1, 0, 1], [0.9, 0.8, 0.1], subtype=["\x1b[2J", "a|b", ""])
    rows[1]["path"] = "x\x1b[1A.png"
    write_csv(tmp_path / "p.csv", rows)
    done = run_script("evaluate.py", "p.csv", "--bootstrap", 20, cwd=tmp_path)
    card = (tmp_path / "p.scored.md").read_text()
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr + card
    assert "?[2J" in done.stdout and "x?[1A.png" in done.stdout and "a\\|b" in card


EDGES = {
    "positives alone": (["1"] * 4, [0.9, 0.7, 0.4, 0.6], {"auroc", "auprc", "specificity", "balanced_accuracy", "mcc"}),
    "negatives alone": (["0"] * 4, [0.9, 0.7, 0.4, 0.2], {"auroc", "auprc", "sensitivity", "balanced_accuracy", "mcc"}),
    "one image": (["1"], [0.9], {"auroc", "auprc", "specificity", "balanced_accuracy", "mcc", "npv"}),
    "all scores alike": (["0", "1", "1", "0"], [0.7] * 4, {"npv", "mcc"}),
    "none called positive": (["0", "1", "1", "0"], [0.1, 0.4, 0.2, 0.3], {"ppv", "mcc"}),
    "all right": (["0", "1", "1", "0"], [0.1, 0.9, 0.8, 0.3], set()),
}


@pytest.mark.parametrize("kind", EDGES)
def test_what_is_undefined_is_null_and_a_dash(tmp_path, kind):
    labels, p, undefined = EDGES[kind]
    write_csv(tmp_path / "edge.csv", to_rows(labels, p))
    done = run_script("evaluate.py", "edge.csv", "--bootstrap", 300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = strict_json((tmp_path / "edge.scored.json").read_text())["metrics"]
    assert {k for k, v in metrics.items() if v["value"] is None} == undefined | {"adjusted_auroc"}
    for name, v in metrics.items():
        (line,) = [s for s in done.stdout.splitlines() if s.startswith(f"| {evaluate.METRICS[name].title} ")]
        assert (line.split("|")[2].strip() == "-") == (v["value"] is None) == (v["ci95"] is None), line
        if v["ci95"]:
            assert 0 <= v["ci95"][0] + (name == "mcc") and v["ci95"][0] <= v["value"] <= v["ci95"][1] <= 1
    assert "nan" not in done.stdout.lower() and "none" not in done.stdout.lower()


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
    assert list(by_name) == ["good", "middling", "useless"] and by_name["middling"]["difference"] == {}
    reference = by_name["middling"]["metrics"]["auroc"]["value"]
    gaps = {name: by_name[name]["difference"]["auroc"] for name in ("good", "useless")}
    smallest = min(gap["p"] for gap in gaps.values())
    for name, gap in gaps.items():
        assert gap["value"] == pytest.approx(by_name[name]["metrics"]["auroc"]["value"] - reference)
        assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]
        assert (gap["ci95"][0] > 0 or gap["ci95"][1] < 0) == (gap["p"] < 0.05)
        assert gap["p_holm"] == pytest.approx(max(2 * smallest, gap["p"]))
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 5  # padded, so that a terminal shows columns
    assert "reference" in rows[3] and "worst" not in rows[0] and "leak-adjusted" not in rows[0]  # nothing but dashes
    assert "adjusted for the number of models" in done.stdout
    assert done.stdout.endswith("written: out/compare.json\nwritten: out/report.md\n")
    assert rows[0] in (rivals / "out" / "report.md").read_text()


def test_holm_by_hand():
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.6, 0.9]) == [1, 1]


def test_a_model_does_not_differ_from_itself_in_another_order(rivals):
    """Nor where one of the two files knows the patients: those of the first count."""
    rows = read_csv((rivals / "good.csv").read_text())
    write_csv(rivals / "same.csv", [{**r, "patient": f"p{i // 3}"} for i, r in enumerate(rows)][::-1])
    found, _ = evaluate_files(rivals, "same.csv", "good.csv", "--bootstrap", 100)
    assert found["data"]["patients"] == 100
    (gap,) = [e["difference"]["auroc"] for e in found["compared"] if e["difference"]]
    assert gap == {"value": pytest.approx(0), "ci95": pytest.approx([0, 0]), "p": 1, "p_holm": 1}


@pytest.mark.parametrize("kind", ["other labels", "other images", "fewer images"])
def test_what_can_not_be_compared_is_an_error(rivals, kind):
    rows = read_csv((rivals / "good.csv").read_text())
    if kind == "other labels":
        rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    elif kind == "other images":
        rows[0]["path"] = "another.png"
    else:
        rows = rows[:-1]
    write_csv(rivals / "odd.csv", rows)
    _, err = evaluate_files(rivals, "good.csv", "odd.csv", code=2)
    assert "odd.csv and good.csv do not score the same images" in err.splitlines()[-1]


# --- runs ---


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory) -> Path:
    """A copy of the run, since evaluation writes into it; its border logits mislead, and its threshold is not 0.5."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    folder.mkdir()
    for name in ("metrics.json", "splits.csv"):
        shutil.copy(run_folder / name, folder)
    checkpoint = models.load(run_folder)
    checkpoint["threshold"] = {**checkpoint["threshold"], "value": float(expit(0.1)), "logit": 0.1}
    models.save(checkpoint, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def evaluated(run) -> SimpleNamespace:
    """What evaluate.py with a run and --stress printed and wrote."""
    done = run_script("evaluate.py", "ckpt.pt", "--stress", cwd=run)
    assert done.returncode == 0, done.stderr
    text = (run / "test.csv").read_text()
    found = strict_json((run / "test.json").read_text())
    return SimpleNamespace(out=done.stdout, err=done.stderr, json=found, csv=text, rows=read_csv(text))


def altered(run: Path, path: Path, noise: float = 0.0, arguments=(), **fields) -> Path:
    """A copy of the run's checkpoint with noise on its weights, other arguments and fields, saved as path/ckpt.pt."""
    checkpoint = models.load(run)
    generator = torch.Generator().manual_seed(len(str(path)))
    for v in checkpoint["state_dict"].values():
        if v.is_floating_point() and v.ndim > 1:
            v.add_(torch.randn(v.shape, generator=generator) * v.std() * noise)
    checkpoint["arguments"].update(arguments)
    path.mkdir(parents=True)
    models.save({**checkpoint, **fields}, path / "ckpt.pt")
    return path


def test_files_have_the_keys_that_others_rely_on(evaluated, run, demo):
    r, checkpoint = evaluated.json, models.load(run)
    assert r["data"]["root"] == str(demo.resolve()) and r["data"]["demo"] is True and r["data"]["left_out"] == []
    assert list(r["metrics"]) == list(evaluate.METRICS) and r["metrics"]["adjusted_auroc"]["ci95"]
    assert {"brier", "nll", "ece", "slope", "intercept", "before", "prevalence"} <= r["calibration"].keys()
    assert r["split"] == "test" and r["model"] == "mobilenetv3_small_050" and r["threshold"] == checkpoint["threshold"]
    weights = [v for k, v in checkpoint["state_dict"].items() if "running" not in k and "num_b" not in k]
    assert r["parameters"] == sum(v.numel() for v in weights)
    columns = ["path", "patient", "subtype", "label", "logit", "calibrated_logit", "probability", "prediction", "demo"]
    assert list(evaluated.rows[0]) == columns


def test_a_report_tells_where_it_comes_from(evaluated, run):
    r, card = evaluated.json, (run / "report.md").read_text()
    assert r["sha256"] == hashlib.sha256((run / "ckpt.pt").read_bytes()).hexdigest()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", r["provenance"]["date"])
    assert r["provenance"]["command"].endswith("evaluate.py ckpt.pt --stress")
    assert r["provenance"]["environment"]["torch"] == r["run"]["environment"]["torch"] == torch.__version__
    recipe = ("epochs 2", "seed 0", "batch_size 16", "epoch 2 of 2", "random weights")
    for text in ("not for diagnosis", r["sha256"], r["data"]["fingerprint"], "bootstrap of patients", *recipe):
        assert text in card
    words = ("Brier score:", "NLL:", "ECE:", "slope:", "intercept:", "MCC:", "ethics approval")
    assert all(f"- {word}" in card for word in words)
    assert card.startswith(evaluated.out.partition("\nwritten")[0]) and "pictures" not in card
    assert evaluated.out.endswith("written: test.json\nwritten: report.md\nwritten: test.csv\n")


def test_every_figure_of_a_run_follows_from_its_csv(evaluated, demo):
    rows, r = evaluated.rows, evaluated.json
    files = {p.relative_to(demo).as_posix() for p in (demo / "test").rglob("*.jpeg")}
    assert {row["path"] for row in rows} == files and len(rows) == len(files) == 24
    assert all(row["path"].split("/")[1] == row["label"] for row in rows)
    assert_report(r, rows)
    z, calibrated, p = (np.array([float(row[c]) for row in rows]) for c in ("logit", "calibrated_logit", "probability"))
    assert calibrated == pytest.approx(r["run"]["slope"] * z + r["run"]["intercept"], abs=1e-9)
    assert p == pytest.approx(expit(calibrated), abs=1e-12)
    predicted = np.where(calibrated >= r["threshold"]["logit"], "PNEUMONIA", "NORMAL")
    assert [row["prediction"] for row in rows] == predicted.tolist() and len(set(predicted)) == 2
    y = np.array([row["label"] == "PNEUMONIA" for row in rows])
    assert r["calibration"]["before"]["nll"] == pytest.approx(sk.log_loss(y, expit(z)), abs=1e-9)
    assert r["data"]["patients"] == len({row["patient"] for row in rows})


def test_the_printed_report_can_be_read_on_a_terminal(evaluated):
    blocks = evaluated.out.split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) >= 6 and all(len({len(row) for row in rows}) == 1 for rows in tables)
    r = evaluated.json
    assert "DEMO" in blocks[0] and "24 images of 12 patients" in blocks[0]
    assert evaluated.err.count("DEMO DATA") == 1 and "LEAK" not in evaluated.err + evaluated.out
    assert f"threshold {r['threshold']['value']:.3f} on the probability of PNEUMONIA" in blocks[1]
    assert f"{logit(r['data']['prevalence']):+.3f}, which is also the calibration intercept to expect" in blocks[1]
    auroc = r["metrics"]["auroc"]
    assert f"| AUROC               | {auroc['value']:.3f} [{auroc['ci95'][0]:.3f}, " in evaluated.out


def test_stress_is_scored_on_changed_copies_and_names_the_worst(evaluated):
    found = evaluated.json["stress"]
    names = [k for k in found if k not in ("clean", "mean", "worst")]
    assert len(names) == 18 and {"noise 0.02", "turned by 7 degrees", "border exchanged"} < set(names)
    for k in ("auroc", "sensitivity", "specificity", "balanced_accuracy"):
        figures = [found[n][k] for n in names]
        assert found["mean"][k] == pytest.approx(np.mean(figures)) and found["worst"][k] == min(figures)
        assert found["clean"][k] == evaluated.json["metrics"][k]["value"]
    balanced = {name: found[name]["balanced_accuracy"] for name in ("clean", *names)}
    worst = evaluated.json["worst_balanced_accuracy"]
    assert worst["value"] == min(balanced.values()) == balanced[worst["row"]] < found["mean"]["balanced_accuracy"]
    line = f"worst balanced accuracy over clean and stressed images: {worst['value']:.3f} ({worst['row']})"
    assert line in evaluated.out


def test_the_shortcut_is_reported_beside_the_model(evaluated, run, demo):
    """Recounted from the CSV and the border classifier's own logits."""
    images = [data.read_image(demo / row["path"], 64)[0] for row in evaluated.rows]
    border = models.border_logit(models.load(run)["border"], torch.from_numpy(np.stack(images)))
    y = np.array([row["label"] == "PNEUMONIA" for row in evaluated.rows])
    predicted = np.array([row["prediction"] == "PNEUMONIA" for row in evaluated.rows])
    found = evaluated.json["shortcut"]
    assert found["border_auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, border))
    for name, misled in (("NORMAL", ~y & (border > 0)), ("PNEUMONIA", y & (border <= 0))):
        group = found["groups"][name]
        metric = group["sensitivity" if name == "PNEUMONIA" else "specificity"]
        assert group["images"] == misled.sum() and metric["value"] == pytest.approx(np.mean((predicted == y)[misled]))
    assert "AUROC of the image border alone" in evaluated.out


def test_exploring_a_threshold_replaces_no_report(run, evaluated, tmp_path):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    found, err = evaluate_files(run, "ckpt.pt", "--threshold", "0.25", "--bootstrap", 0)
    assert err.endswith("nothing written; use --output DIR\n")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    other, err = evaluate_files(run, "ckpt.pt", "--threshold", "0.25", "--bootstrap", 0, "--output", tmp_path / "out")
    rows = read_csv((tmp_path / "out" / "test.csv").read_text())
    assert_report(other, rows)
    assert found["threshold"] == other["threshold"] == {**found["threshold"], "value": 0.25, "from": "command line"}
    assert found["metrics"]["sensitivity"] != evaluated.json["metrics"]["sensitivity"]
    assert f"written: {tmp_path}/out/test.json\n" in err


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_split_of_the_run_is_scored_as_it_was_drawn(run, tmp_path, split):
    words = ("--split", split, "--output", tmp_path, "--bootstrap", "0", "--device", "cpu")
    found, err = evaluate_files(tmp_path, run / "ckpt.pt", *words)
    expected = sorted(r["path"] for r in read_csv((run / "splits.csv").read_text()) if r["split"] == split)
    assert sorted(r["path"] for r in read_csv((tmp_path / f"{split}.csv").read_text())) == expected
    assert found["data"]["fingerprint"] == models.load(run)["data"]["fingerprint"]
    leaks = [line for line in err.splitlines() if "LEAK" in line]
    if split == "train":
        assert len(leaks) == 1 and f"trained on {len(expected)} of these images" in leaks[0]
        return
    assert leaks == [] and not any(found["data"]["leaks"].values())
    known = models.load(run / "ckpt.pt")["validation"]
    assert found["metrics"]["auroc"]["value"] == pytest.approx(known["val_auroc"], abs=1e-12)
    assert found["calibration"]["before"]["nll"] == pytest.approx(known["val_loss"], abs=1e-9)


def test_leaks_are_found_in_another_folder_and_stand_at_the_head_of_the_card(run, demo, tmp_path):
    # Training images of one class, compressed again and under new names, as if they were a test set.
    place = tmp_path / "other" / "test" / "NORMAL"
    place.mkdir(parents=True)
    used = [r for r in read_csv((run / "splits.csv").read_text()) if r["class"] == "NORMAL"]
    for i, r in enumerate(used):
        Image.open(demo / r["path"]).save(place / f"{i}.jpeg", quality=90)
    part = {split: sum(r["split"] == split for r in used) for split in ("train", "val")}
    altered(run, tmp_path / "seed1", 0.3, {"seed": 1})
    words = ("--data", tmp_path / "other", "--output", "out", "--bootstrap", 50, "--stress")
    found, err = evaluate_files(tmp_path, run, "seed1", *words)
    lines = [
        f"LEAK: {how} on {n} of these images and 0 of these patients"
        for how, n in zip(("trained", "chosen"), part.values())
    ]
    assert err.count("LEAK") == 2 and all(line in err for line in lines)  # once for both runs
    metrics = found["compared"][0]["metrics"]
    assert metrics["auroc"] == {"value": None, "ci95": None, "sd": None}  # one class alone
    assert metrics["specificity"]["value"] is not None
    for words in ([run, "seed1"], [run]):
        evaluate_files(tmp_path, *words, "--data", tmp_path / "other", "--output", "out", "--bootstrap", 0)
        head = (tmp_path / "out" / "report.md").read_text().partition("\n## ")[0]
        assert all(line in head for line in lines)


def test_copies_count_as_one_patient_and_contradicting_labels_are_said(run, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "d")
    folder = tmp_path / "d" / "test"
    first, second = sorted((folder / "NORMAL").glob("IM-*0001.jpeg"))[:2]
    Image.open(first).save(second, quality=90)  # two patients with copies of one image
    shutil.copy(min((folder / "PNEUMONIA").iterdir()), folder / "NORMAL" / "copy.jpeg")
    found, err = evaluate_files(tmp_path, run, "--data", "d", "--output", "out", "--bootstrap", 0)
    assert found["data"]["patients"] == 11 and found["data"]["copies"] == 2
    assert err.count("1 image under several labels") == 1


def test_other_images_replace_no_report(run, demo, tmp_path):
    def names(*words):
        _, err = evaluate_files(tmp_path, moved, "--bootstrap", 0, *words)
        return {Path(line.removeprefix("written: ")).name for line in err.splitlines() if line.startswith("written")}

    moved = altered(run, tmp_path / "moved")
    assert names("--data", demo) == {"test.json", "test.csv", "report.md"}  # its own, named
    assert names("--split", "val") == {"val.json", "val.csv", "val.md"}
    shutil.copytree(demo, tmp_path / "new")
    assert names("--data", "new") == set()
    assert names("--data", "new", "--output", "out") == {"test.json", "test.csv", "report.md"}


def test_columns_of_metadata_are_subgroups_and_in_the_csv(run, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "demo")
    files = sorted((tmp_path / "demo" / "test").rglob("*.jpeg"))
    rows = []
    for i, p in enumerate(files):
        name = p.relative_to(tmp_path / "demo").as_posix()
        rows.append({"file_name": name, "sex": "FM"[i % 2], "age": "NA" if i == 5 else f"{i % 9 + 1:03}Y"})
    write_csv(tmp_path / "demo" / "metadata.csv", rows)
    found, _ = evaluate_files(tmp_path, run, "--data", "demo", "--output", ".", "--bootstrap", 50)
    groups = found["subgroups"]
    assert groups["sex: F"]["images"] == groups["sex: M"]["images"] == 12
    ages = {name: g["images"] for name, g in groups.items() if name.startswith("age")}
    assert list(ages) == ["age: 1 to 3", "age: 4 to 5", "age: 6 to 9"] and sum(ages.values()) == 23  # one is unknown
    scored = {r["path"]: r for r in read_csv((tmp_path / "test.csv").read_text())}
    assert all(scored[r["file_name"]]["sex"] == r["sex"] for r in rows)
    part = [scored[r["file_name"]] for r in rows if r["sex"] == "F"]
    expected = recompute(part, found["threshold"]["value"])
    for metric in ("auroc", "sensitivity", "specificity"):
        assert groups["sex: F"][metric]["value"] == pytest.approx(expected[metric])


def test_runs_that_differ_in_their_seed_are_one_model(run, evaluated, tmp_path):
    altered(run, tmp_path / "s1", 0.5, {"seed": 1})
    altered(run, tmp_path / "s22", 0.6, {"seed": 2})
    altered(run, tmp_path / "other", 0.6, {"lr": 0.1})
    columns = ("path", "label", "calibrated_logit", "probability", "patient")
    write_csv(tmp_path / "theirs.csv", [{k: r[k] for k in columns} for r in evaluated.rows])
    words = (run, "s?", "s22", "other", "theirs.csv", "--output", "out", "--bootstrap", "200")
    done = run_script("evaluate.py", *words, cwd=tmp_path)  # nobody has expanded s?
    assert done.returncode == 0, done.stderr
    found = strict_json((tmp_path / "out" / "compare.json").read_text())
    by_number = {e["number"]: e for e in found["compared"]}
    assert by_number[1]["seeds"] == [0, 1, 2] and len(by_number) == 3
    alone = []
    for path in (run, tmp_path / "s1", tmp_path / "s22"):
        alone.append(evaluate_files(tmp_path, path, "--bootstrap", 0, "--output", "x")[0]["metrics"]["auroc"]["value"])
    auroc, spread = by_number[1]["metrics"]["auroc"], np.std(alone, ddof=1)
    assert auroc["value"] == pytest.approx(np.mean(alone)) and auroc["sd"] == pytest.approx(spread)
    assert alone[0] == pytest.approx(by_number[3]["metrics"]["auroc"]["value"])  # the CSV is its predictions
    gap = by_number[3]["difference"]["auroc"]
    assert gap["value"] == pytest.approx(alone[0] - np.mean(alone))
    # Training varies too: the interval is wider than seeds of no variation would have it.
    assert gap["ci95"][1] - gap["ci95"][0] > 2 * 1.96 * spread / math.sqrt(3)
    assert f"(sd {spread:.3f})" in done.stdout and "mobilenetv3_small_050 lr=0.1" in done.stdout
    assert "DEMO" in done.stdout.splitlines()[0] and done.stderr.count("DEMO DATA") == 1


def test_the_folds_of_a_cross_validation_are_pooled(run, tmp_path):
    """Each image is scored by the run that did not see it, at that run's threshold."""
    for fold in (1, 2):
        cut = {**models.load(run)["threshold"], "value": float(expit(fold / 9)), "logit": fold / 9}
        altered(run, tmp_path / f"f{fold}", 0.3, {"fold": fold}, threshold=cut)
    words = (run, "f1", "f2", "--split", "val", "--bootstrap", 50, "--stress")
    _, err = evaluate_files(tmp_path, *words)
    assert err.endswith("nothing written; use --output DIR\n")
    found, _ = evaluate_files(tmp_path, *words, "--output", "out")
    rows = {r["path"]: r for r in read_csv((tmp_path / "out" / "val.csv").read_text())}
    alone = {}
    for path in (run, "f1", "f2"):
        evaluate_files(tmp_path, path, "--split", "val", "--bootstrap", 0, "--output", "one")
        alone.update({r["path"]: r for r in read_csv((tmp_path / "one" / "val.csv").read_text())})
    assert rows == alone and len(rows) == found["data"]["images"] > 24
    y = [r["label"] == "PNEUMONIA" for r in rows.values()]
    auroc = sk.roc_auc_score(y, [float(r["calibrated_logit"]) for r in rows.values()])
    assert found["metrics"]["auroc"]["value"] == pytest.approx(auroc) and found["folds"] == 3
    accuracy = np.mean([r["label"] == r["prediction"] for r in rows.values()])
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert found["threshold"]["value"] is None and found["threshold"]["rule"] == "each run its own"
    assert found["stress"]["noise 0.05"]["auroc"] is not None and found["shortcut"]["border_auroc"]["value"]


def test_an_unfinished_run_is_said(run, tmp_path):
    altered(run, tmp_path / "a", lengths=[40], finished=False)
    done = run_script("evaluate.py", "a", "--bootstrap", 0, cwd=tmp_path)
    line = "UNFINISHED: epoch 2 of 40"
    assert done.stdout.splitlines()[2] == f"- {line}" and f"{line}: a\n" in done.stderr
    assert f"- {line}\n" in (tmp_path / "a" / "report.md").read_text()
    done = run_script("evaluate.py", run, "a", "--bootstrap", 0, cwd=tmp_path)
    assert f"- {line} (model " in done.stdout


def test_predictions_of_a_run_score_as_the_run_does(evaluated, tmp_path):
    (tmp_path / "theirs.csv").write_text(evaluated.csv)
    words = ("--threshold", evaluated.json["threshold"]["value"], "--output", ".")
    found, _ = evaluate_files(tmp_path, "theirs.csv", *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs.csv", "theirs.scored.json", "theirs.scored.md"]
    for k, v in evaluated.json["metrics"].items():
        if k != "adjusted_auroc":
            assert found["metrics"][k] == {"value": pytest.approx(v["value"]), "ci95": pytest.approx(v["ci95"])}, k
    assert found["subgroups"].keys() == evaluated.json["subgroups"].keys()


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
            image = rng.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(image).save(folder / "data" / "test" / c / f"{c}{i}.png")
    torch.manual_seed(0)
    model = models.build("mobilenetv3_small_050", 3, 32)
    for m in model.modules():  # statistics of no data at all would let it say the same of every image
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 1, 32, 32))
        model.classifier.weight.mul_(5)
    checkpoint = models.load(run_folder)
    checkpoint.update(state_dict=model.state_dict(), classes=classes, input_size=32, slope=1.5, intercept=0.0)
    checkpoint["threshold"] = {"value": None, "logit": None, "rule": "largest probability", "from": ""}
    checkpoint["border"] = None
    checkpoint["data"].update(root=str(folder / "data"), demo=False)
    models.save(checkpoint, folder / "ckpt.pt")
    return SimpleNamespace(folder=folder, ckpt=folder / "ckpt.pt", classes=classes)


def test_three_classes_get_what_is_defined_for_them(three, tmp_path):
    done = run_script("evaluate.py", three.ckpt, "--output", "out", "--bootstrap", 100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = strict_json((tmp_path / "out" / "test.json").read_text())
    rows = read_csv((tmp_path / "out" / "test.csv").read_text())
    labels = np.array([three.classes.index(r["label"]) for r in rows])
    columns = ("logit", "calibrated_logit", "probability")
    z, calibrated, p = (np.array([[float(r[f"{k}_{c}"]) for c in three.classes] for r in rows]) for k in columns)
    e = expit(z) ** 1.5
    assert p == pytest.approx(e / e.sum(1, keepdims=True), abs=1e-9) and p == pytest.approx(expit(calibrated))
    predicted = calibrated.argmax(1)
    assert [r["prediction"] for r in rows] == [three.classes[i] for i in predicted]
    assert len(set(predicted)) > 1  # else the rest shows little
    each = {c: sk.roc_auc_score(labels == i, calibrated[:, i]) for i, c in enumerate(three.classes)}
    recall = sk.recall_score(labels, predicted, average=None)
    for c, sensitivity in zip(three.classes, recall):
        assert values(found["each_class"][c]) == pytest.approx({"auroc": each[c], "sensitivity": sensitivity})
        assert any(line.startswith(f"| {c} ") and f"{each[c]:.3f}" in line for line in done.stdout.splitlines())
    accuracy = (labels == predicted).mean()
    expected = {"auroc": np.mean(list(each.values())), "accuracy": accuracy, "balanced_accuracy": recall.mean()}
    assert values(found["metrics"]) == pytest.approx(expected)
    assert found["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    assert not {"positive", "at_half", "calibration", "subgroups", "shortcut", "stress"} & found.keys()


def test_three_classes_in_a_comparison(three, tmp_path):
    other = altered(three.ckpt, tmp_path / "other", 0.5, {"lr": 1.0})
    found, _ = evaluate_files(tmp_path, three.ckpt, other, three.ckpt, "--bootstrap", 50)
    assert sorted(e["number"] for e in found["compared"]) == [1, 2]  # named twice, scored once
    assert [0 < e["difference"]["auroc"]["p"] <= 1 for e in found["compared"] if e["difference"]] == [True]


# --- errors of the user ---


BAD_CSV = {
    "no columns": ("a,b\n1,2\n", "path, label, probability"),
    "no rows": ("path,label,probability\n", "one row per image"),
    "not a number": ("path,label,probability\na,0,nan\nb,1,0.5\n", "the probability of a is not a number"),
    "above 1": ("path,label,probability\na,0,1.5\nb,1,0.5\n", "[0, 1]"),
    "path twice": ("path,label,probability\na,0,0.1\na,1,0.5\n", "a path is listed twice"),
    "three labels": ("path,label,probability\na,x,0.1\nb,y,0.5\nc,z,0.5\n", "two labels"),
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
        (("--positive", "A"), "--positive is for CSV files"),
        (("--split", "val"), "train"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_said_before_anything_is_done(three, tmp_path, words, expected):
    _, err = evaluate_files(tmp_path, three.ckpt, *words, "--output", "out", code=2)
    assert len(err.splitlines()) == 1 and expected in err and not (tmp_path / "out").exists()


def test_what_is_missing_is_named_with_the_way_out(run, tmp_path):
    altered(run, tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    about = {**models.load(run)["data"], "root": str(tmp_path / "gone")}
    altered(run, tmp_path / "b", data=about)
    cases = {
        "runs": "runs/ckpt.pt does not exist; name one of the runs, such as runs/a",
        "empty": "empty/ckpt.pt does not exist",
        "nowhere": "checkpoint nowhere does not exist",
        "b": "name its new place with --data DIR",
    }
    for name, expected in cases.items():
        _, err = evaluate_files(tmp_path, name, code=2)
        assert len(err.splitlines()) == 1 and expected in err, name


def test_other_data_than_the_runs_own_are_noticed(run, demo, three, tmp_path):
    roots = {}
    for name in ("a", "b"):
        shutil.copytree(demo, tmp_path / name)
        roots[name] = {**models.load(run)["data"], "root": str(tmp_path / name)}
        altered(run, tmp_path / f"run_{name}", 0.1 * (name == "b"), {"data": name}, data=roots[name])
    first, second = sorted((tmp_path / "b" / "test" / "NORMAL").iterdir())[:2]
    shutil.copy(first, second)
    _, err = evaluate_files(tmp_path, "run_a", "run_b", "--bootstrap", 0, code=2)
    assert "scored different images with the same names" in err
    min((tmp_path / "b" / "train" / "NORMAL").iterdir()).unlink()
    _, err = evaluate_files(tmp_path, "run_b", "--split", "val", code=2)
    assert "run_b was not trained on the images in" in err
    _, err = evaluate_files(tmp_path, run, "--data", three.folder / "data", "--output", "out", code=2)
    assert "has the class A, which is not one of NORMAL, PNEUMONIA" in err and not (tmp_path / "out").exists()
    _, err = evaluate_files(tmp_path, run, three.ckpt, "--bootstrap", 0, code=2)
    assert "have different classes" in err.splitlines()[-1]


def test_logits_that_are_not_finite_are_an_error_with_the_files_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "infer", lambda *_: torch.full((24, 2), math.inf))
    _, err = evaluate_files(tmp_path, run, "--output", "out", code=2)
    last = err.splitlines()[-1]
    assert "not finite" in last and ".jpeg" in last and not (tmp_path / "out").exists()


# --- pictures ---


def assert_pictures(folder: Path, *stems: str) -> None:
    """Each as a PNG of some size that is not blank."""
    for stem in stems:
        with Image.open(folder / f"{stem}.png") as image:
            assert min(image.size) >= 700 and image.convert("L").reduce(20).getextrema()[0] < 200


def test_pictures_need_matplotlib_and_say_so_after_other_mistakes(tmp_path, monkeypatch):
    write_csv(tmp_path / "p.csv", NAMED_ROWS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, err = evaluate_files(tmp_path, "p.csv", "--plots", code=2)
    assert len(err.splitlines()) == 1 and "pip install matplotlib" in err


@pytest.mark.extra("matplotlib")
@pytest.mark.filterwarnings("default")  # matplotlib's own
def test_pictures_are_drawn_from_whatever_there_is(run, three, tmp_path):
    write_csv(tmp_path / "one.csv", to_rows(["1", "1", "1"], [0.2, 0.7, 0.9]))
    write_csv(tmp_path / "right.csv", to_rows(["0", "1"], [0.2, 0.7]))
    altered(run, tmp_path / "s1", 0.5, {"seed": 1})
    cases = [
        ([run], ("test", "test-mistakes")),
        ([three.ckpt], ("test", "test-mistakes")),
        (["one.csv"], ("one.scored",)),
        (["right.csv"], ("right.scored",)),
        ([run, "s1", "--data", models.load(run)["data"]["root"]], ("compare",)),
    ]
    for i, (words, stems) in enumerate(cases):
        done = run_script("evaluate.py", *words, "--bootstrap", 0, "--plots", "--output", f"{i}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert_pictures(tmp_path / f"{i}", *stems)
        assert f"written: {i}/{stems[0]}.png\n" in done.stdout
    card = (tmp_path / "0" / "report.md").read_text()
    assert "![test.png](test.png)" in card and "- decision curve: net benefit over threshold" in card


@pytest.fixture
def figures(monkeypatch) -> dict:
    """The figures that are saved, by file name."""
    saved = {}
    monkeypatch.setitem(evaluate.WRITERS, ".png", lambda path, figure: saved.update({path.name: figure}))
    return saved


@pytest.mark.extra("matplotlib")
@pytest.mark.filterwarnings("default")
def test_the_grid_shows_each_mistake_with_the_map_of_the_predicted_class(run, tmp_path, figures, monkeypatch):
    targets, captions = [], []
    heat_map, draw = models.heat_map, predict.draw_heat_map

    def watch(model, x, target):
        targets.append(target)
        return heat_map(model, x, target)

    def read(image, heat, lines):
        captions.append(lines)
        return draw(image, heat, lines)

    monkeypatch.setattr(models, "heat_map", watch)
    monkeypatch.setattr(predict, "draw_heat_map", read)
    found, _ = evaluate_files(tmp_path, run, "--threshold", 0.99, "--output", "out", "--plots", "--bootstrap", 0)
    assert {f["prediction"] for f in found["failures"].values()} == {"NORMAL"} and set(targets) == {0}
    panels = figures["test-mistakes.png"].axes
    n_mistakes = found["confusion"]["fn"]
    assert len(targets) == sum(bool(ax.images) for ax in panels) == min(12, n_mistakes)
    assert captions[0][0] == next(iter(found["failures"])).split("/")[-1]
    assert captions[0][1].startswith("PNEUMONIA called NORMAL, P(PNEUMONIA) 0.")


@pytest.mark.extra("matplotlib")
@pytest.mark.filterwarnings("default")
def test_panels_show_the_threshold_in_force_and_say_what_was_scored(run, tmp_path, figures):
    altered(run, tmp_path / "s1", 0.5, {"seed": 1})
    found, _ = evaluate_files(tmp_path, run, "--threshold", 0.3, "--output", "out", "--plots", "--bootstrap", 0)
    figure = figures["test.png"]
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == list(evaluate.PANELS)
    assert [line.get_xdata()[0] for line in panels["probabilities"].lines] == [0.3]
    dot = panels["ROC"].lines[-1]
    sides = values(found["metrics"])
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == pytest.approx((1 - sides["specificity"], sides["sensitivity"]))
    assert "test split, 24 images of 12 patients; DEMO" in figure.get_suptitle()
    evaluate_files(tmp_path, run, "s1", "--output", "out", "--plots", "--bootstrap", 0)
    figure = figures["compare.png"]
    (roc,) = figure.axes
    assert [line.get_label()[:2] for line in roc.lines if "AUC" in line.get_label()] == ["1:", "1:"]  # a curve a run
    assert "test split, 24 images of 12 patients; DEMO" in figure.get_suptitle()
