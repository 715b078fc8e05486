"""Evaluation: each number against scikit-learn, a hand-worked value or a simulation; edge cases, comparisons, files."""

import csv
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from conftest import run_script
from PIL import Image
from scipy.special import expit, logit
from scipy.stats import beta

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


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def strict_json(text: str) -> dict:
    """JSON as the standard has it: NaN and Infinity are errors."""
    return json.loads(text, parse_constant=pytest.fail)


def to_rows(labels, probabilities, **columns) -> list[dict]:
    rows = []
    for i, (label, probability) in enumerate(zip(labels, probabilities)):
        row = {"path": f"{i}.png", "label": label, "probability": probability}
        for name, cells in columns.items():
            row[name] = cells[i]
        rows.append(row)
    return rows


def evaluate_files(folder: Path, *words, code: int = 0):
    """What evaluate.py prints as JSON, and its stderr."""
    done = run_script("evaluate.py", *words, "--json", cwd=folder)
    assert done.returncode == code, done.stderr
    found = strict_json(done.stdout) if code == 0 else None
    return found, done.stderr


def score(folder: Path, rows: list[dict], *words) -> dict:
    """The report of predictions in a CSV."""
    write_csv(folder / "p.csv", rows)
    found, _ = evaluate_files(folder, "p.csv", "--bootstrap", 200, *words)
    return found


def values(metrics: dict) -> dict:
    return {name: estimate["value"] for name, estimate in metrics.items()}


def numbers(rows: list[dict], column: str) -> np.ndarray:
    return np.array([float(row[column]) for row in rows])


def is_pneumonia(rows: list[dict], column: str = "label") -> np.ndarray:
    return np.array([row[column] == "PNEUMONIA" for row in rows])


def answers(y, score, patients=None) -> evaluate.Answers:
    """Answers about images, each from its own patient if none are given."""
    score = np.asarray(score, float)
    if patients is None:
        patients = np.arange(len(y))
    return evaluate.Answers(np.asarray(y, bool), score, score >= 0, patients, stratum=None)


# --- metrics ---


@pytest.mark.parametrize("levels", [3, 10**6])  # with many ties, and with none
def test_ranking_equals_scikit_learn(tmp_path, levels):
    rng = np.random.default_rng(levels)
    y = rng.integers(2, size=300)
    p = rng.integers(levels + 1, size=300) / levels  # 0 and 1 too
    metrics = score(tmp_path, to_rows(y, p))["metrics"]
    assert metrics["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert metrics["auprc"]["value"] == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)


def test_a_draw_is_scored_like_repeated_images():
    rng = np.random.default_rng(0)
    y = rng.random(200) < 0.7
    z = rng.integers(-15, 15, 200)
    times = rng.integers(0, 3, 200)
    drawn = evaluate.measure(answers(y, z), evaluate.METRICS, times[None].astype(float))
    repeated = evaluate.measure(answers(np.repeat(y, times), np.repeat(z, times)), evaluate.METRICS)
    for name, value, expected in zip(evaluate.METRICS, drawn, repeated, strict=True):
        assert value == pytest.approx(expected, nan_ok=True), name


def test_images_are_ranked_where_probabilities_no_longer_differ(tmp_path):
    y = [0, 0, 1, 1, 1, 0]
    z = np.array([50, 60, 70, 80, -800, -900])
    found = score(tmp_path, to_rows(y, expit(z), calibrated_logit=z))
    assert found["metrics"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, z))


# --- intervals ---


def test_an_interval_counts_patients_and_not_images(tmp_path):
    # 200 patients, 80 % of them right: the standard error is 0.0283, however many images each patient has.
    rows = []
    for i in range(200):
        label = i % 2
        called = 1 - label if i % 5 == 0 else label
        for k in range(5):
            row = {"path": f"{i}-{k}.png", "patient": f"p{i}", "label": label, "probability": 0.1 + 0.8 * called}
            rows.append(row)
    report = score(tmp_path, rows, "--bootstrap", 2000)
    assert report["warnings"] == []  # nothing is odd about them
    accuracy = report["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(0.8)
    half = 1.96 * 0.0283 / (0.8 * 0.2)
    low = expit(logit(0.8) - half)
    high = expit(logit(0.8) + half)
    assert accuracy["ci95"] == pytest.approx([low, high], abs=0.003)


def test_the_interval_of_0_or_1_is_from_the_patients_in_the_denominator(tmp_path):
    patients = ["a", "a", "b", "c", "d", "d", "e", "f", "g"]
    rows = to_rows([1] * 4 + [0] * 5, [0.9] * 4 + [0.2] * 5, patient=patients)
    metrics = score(tmp_path, rows)["metrics"]
    n_patients = {"sensitivity": 3, "specificity": 4, "ppv": 3, "npv": 4, "accuracy": 7, "auroc": 3}
    for name, n in n_patients.items():
        low = beta.ppf(0.025, n, 1)
        assert metrics[name]["ci95"] == pytest.approx([low, 1]), name
    metrics = score(tmp_path, to_rows([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]))["metrics"]
    high = beta.ppf(0.975, 1, 2)
    assert metrics["sensitivity"] == {"value": 0, "ci95": pytest.approx([0, high])}


def test_intervals_contain_the_truth():
    """Sensitivity 0.99 at 120 positives: the percentile bootstrap contained it in 70 % of these data sets."""
    rng = np.random.default_rng(0)
    y = np.arange(200) < 120
    patients = np.arange(200) // 2
    hits = []
    for seed in range(150):
        z = np.where(y, 0.99, 0.1) - rng.random(200)
        a = answers(y, z, patients)
        found = evaluate.estimates(a, evaluate.Bootstrap(200, seed), ["sensitivity"])
        low, high = found["sensitivity"]["ci95"]
        hits.append(low <= 0.99 <= high)
    assert 0.92 <= np.mean(hits) <= 1


def test_the_mean_over_runs_varies_as_the_mean_over_other_runs_would():
    rng = np.random.default_rng(0)
    of_runs = rng.normal(size=4)
    draws = np.repeat(of_runs[:, None], 20001, axis=1)  # no variation from patients
    means = evaluate.mean_over_runs(draws, rng)
    assert means[0] == pytest.approx(of_runs.mean())
    standard_error = of_runs.std(ddof=1) / 2
    assert means[1:].std() == pytest.approx(standard_error, rel=0.03)


# --- calibration and decisions ---


def test_brier_and_nll_equal_scikit_learn_and_ece_a_value_by_hand(tmp_path):
    y = [0, 1, 1, 1, 0]
    p = [0.15, 0.15, 0.85, 0.87, 0.33]
    found = score(tmp_path, to_rows(y, p))["calibration"]
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, p))
    assert found["nll"] == pytest.approx(sk.log_loss(y, p))
    assert found["ece"] == pytest.approx((0.7 + 0.28 + 0.33) / 5)


def test_the_calibration_slope_and_intercept_by_hand():
    # At the lower logit a quarter are positive, at the higher three quarters: a rise by 2 ln 3 over a distance of 2.
    y = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    z = np.array([-1.0] * 4 + [1.0] * 4)
    for scale, shift in ((1.0, 0.8), (1e-6, 100.0), (1.0, -1e6)):  # the last two: of models that do not work
        found = evaluate.calibration(y, z * scale + shift)
        assert found["slope"] * scale == pytest.approx(math.log(3), abs=1e-6)
        assert found["intercept"] == pytest.approx(-shift, abs=1e-6)
    assert abs(evaluate.calibration(y, np.append(z[:-1], 1e30))["intercept"]) < 1  # one odd logit


def test_classes_that_do_not_overlap_have_no_slope():
    y = np.array([False, False, True, True])
    z = np.array([-2.0, 1.0, 1.0, 2.0])  # they only touch
    found = evaluate.calibration(y, z)
    assert math.isnan(found["slope"])
    assert math.isnan(found["intercept"])


def test_the_net_benefit_by_hand():
    y = [1] * 4 + [0] * 6
    p = [0.9, 0.5, 0.21, 0.1, 0.6, 0.21, 0.05, 0.05, 0.05, 0.05]
    model, everyone = evaluate.net_benefit(answers(y, logit(p)), np.array([0.2]))
    # Of 10 images, 3 true and 2 false positives; at a threshold of 0.2 a false one costs a quarter.
    assert model == pytest.approx(3 / 10 - 2 / 10 * 0.25)
    assert everyone == pytest.approx(4 / 10 - 6 / 10 * 0.25)


# --- a report, recomputed from its CSV ---


NAMED = (
    ("person1_bacteria_1.jpeg", "PNEUMONIA", 0.91),
    ("person1_bacteria_2.jpeg", "PNEUMONIA", 0.62),
    ("person1_virus_3.jpeg", "PNEUMONIA", 0.38),  # another patient than the one above: two series of numbers
    ("person7_virus_1.jpeg", "PNEUMONIA", 0.97),
    ("BACTERIA-1000007-0001.jpeg", "PNEUMONIA", 0.71),
    ("VIRUS-1000008-0001.jpeg", "PNEUMONIA", 0.29),
    ("IM-0003-0001.jpeg", "NORMAL", 0.07),
    ("IM-0003-0002.jpeg", "NORMAL", 0.62),  # a tie with a positive
    ("NORMAL2-IM-0003-0001.jpeg", "NORMAL", 0.44),
    ("NORMAL2-IM-0009-0001.jpeg", "NORMAL", 0.83),
    ("NORMAL-1000012-0001.jpeg", "NORMAL", 0.21),
    ("NORMAL-1000012-0002.jpeg", "NORMAL", 0.03),
)
NAMED_ROWS = [{"path": f"test/{y}/{name}", "label": y, "probability": p} for name, y, p in NAMED]


def recompute(rows: list[dict], threshold: float) -> dict:
    """The metrics of two classes from the rows of a CSV, with scikit-learn and plain counting."""
    y = is_pneumonia(rows)
    p = numbers(rows, "probability")
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
    metrics = values(found["metrics"])
    del metrics["adjusted_auroc"]  # the CSV has no border logits
    assert metrics == pytest.approx(recompute(rows, threshold), abs=1e-6)
    half = recompute(rows, 0.5)
    for name, estimate in found["at_half"].items():
        assert estimate["value"] == pytest.approx(half[name], abs=1e-6), name
    assert found["data"]["images"] == len(rows)
    assert found["data"]["prevalence"] == pytest.approx(is_pneumonia(rows).mean())
    of_truth = {}  # of each mistake
    for row in rows:
        p = float(row["probability"])
        is_positive = row["label"] == "PNEUMONIA"
        if (p >= threshold) != is_positive:
            of_truth[row["path"]] = p if is_positive else 1 - p
    shown = [of_truth[path] for path in found["failures"]]
    assert shown == pytest.approx(sorted(of_truth.values())[:12], abs=1e-6)


@pytest.mark.parametrize("threshold", ["0.62", "1"])
def test_every_number_follows_from_the_csv(tmp_path, threshold):
    found = score(tmp_path, NAMED_ROWS, "--threshold", threshold)
    assert_report(found, NAMED_ROWS)
    assert found["data"]["patients"] == 9
    assert found["threshold"]["value"] == float(threshold)


def test_subgroups_are_counted_by_hand(tmp_path):
    found = score(tmp_path, NAMED_ROWS)["subgroups"]
    figures = {}
    for name, group in found.items():
        side = "sensitivity" if name.startswith("subtype") else "specificity"
        figures[name] = group["images"], group["patients"], group[side]["value"]
    assert figures == {
        "subtype: bacterial": (3, 2, 1),
        "subtype: viral": (3, 3, pytest.approx(1 / 3)),
        "series of file names: IM": (2, 1, 0.5),
        "series of file names: NORMAL2-IM": (2, 2, 0.5),
        "series of file names: NORMAL": (2, 1, 1),
    }


def test_numbers_and_ages_are_shown_as_ranges(tmp_path):
    ages = ["110Y", "25", "", "040Y", "006M", "7", "120"]
    found = score(tmp_path, to_rows([0, 1, 0, 1, 0, 1, 0], [0.5] * 7, age=ages))
    sizes = {name: group["images"] for name, group in found["subgroups"].items()}
    assert list(sizes) == sorted(sizes, key=lambda name: float(name.split()[-1]))
    assert sizes == {"age: 0.5 to 7": 2, "age: 25 to 40": 2, "age: 110 to 120": 2}


def test_a_mostly_unique_column_is_not_a_subgroup(tmp_path):
    columns = {"accession": [f"A{i}" for i in range(30)], "site": ["a", "b"] * 15, "demo": [False] * 30}
    columns["note"] = [f"note {i}" * (i < 12) for i in range(30)]
    write_csv(tmp_path / "p.csv", to_rows([0, 1] * 15, [0.3] * 30, **columns))
    found, err = evaluate_files(tmp_path, "p.csv", "--bootstrap", 0)
    assert list(found["subgroups"]) == ["site: a", "site: b"]
    assert "column accession" in err and "column note" in err and "DEMO" not in err


def test_the_probability_is_that_of_the_positive_label(tmp_path):
    write_csv(tmp_path / "p.csv", to_rows(["abnormal", "normal", "normal", "abnormal"], [0.8, 0.1, 0.6, 0.7]))
    found, err = evaluate_files(tmp_path, "p.csv", "--positive", "abnormal")
    assert "guess" not in err
    assert found["classes"] == ["normal", "abnormal"]
    assert found["metrics"]["auroc"]["value"] == 1
    assert found["confusion"] == {"tp": 2, "fp": 1, "fn": 0, "tn": 1}


def test_the_csv_of_a_run_names_its_positive_class(run, tmp_path):
    """Else one that was trained with --positive NORMAL would be scored upside down."""
    altered(run, tmp_path / "r", classes=["PNEUMONIA", "NORMAL"])
    first, _ = evaluate_files(tmp_path, "r", "--bootstrap", 0, "--output", "r")
    again, _ = evaluate_files(tmp_path, "r/test.csv", "--bootstrap", 0)
    assert again["positive"] == "NORMAL"
    assert again["metrics"]["auroc"] == first["metrics"]["auroc"]


def test_tables_of_other_programs_are_read(tmp_path):
    text = "Path; LABEL;Probability ;site\n a\\b.png;ill;0,75;x\n c.png; healthy;0,25;\n"
    (tmp_path / "p.TSV").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found, err = evaluate_files(tmp_path, "p.TSV", "--bootstrap", 0, "--threshold", 0.8)
    assert "guessing that ill is positive, not healthy" in err
    assert found["positive"] == "ill"
    assert found["failures"]["a/b.png"]["probability"] == pytest.approx(0.75)
    assert found["subgroups"]["site: x"]["images"] == 1


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([0.7, 0.9], "is this the confidence of the predicted class?"),
        ([0.9, 0.1], "are the classes swapped?"),
        ([0.1, 0.9], "intervals treat images as independent"),
    ],
)
def test_what_makes_numbers_misleading_is_reported_at_the_head_of_the_report(tmp_path, probabilities, expected):
    write_csv(tmp_path / "p.csv", to_rows([0, 1] * 30, probabilities * 30))
    done = run_script("evaluate.py", "p.csv", "--bootstrap", 50, cwd=tmp_path)
    card = (tmp_path / "p.scored.md").read_text()
    for text in (done.stdout, card):
        head, _, _ = text.partition("\n## ")
        assert expected in head


@pytest.mark.parametrize(
    ("labels", "probabilities", "undefined"),
    [
        (["1"], [0.9], {"auroc", "auprc", "specificity", "balanced_accuracy", "mcc", "npv"}),
        (["0", "1", "1", "0"], [0.3, 0.3, 0.3, 0.3], {"ppv", "mcc"}),
    ],
)
def test_what_is_undefined_is_null_and_a_dash(tmp_path, labels, probabilities, undefined):
    write_csv(tmp_path / "edge.csv", to_rows(labels, probabilities))
    done = run_script("evaluate.py", "edge.csv", "--bootstrap", 300, cwd=tmp_path)
    metrics = strict_json((tmp_path / "edge.scored.json").read_text())["metrics"]
    nulls = {name for name, value in values(metrics).items() if value is None}
    assert nulls == undefined | {"adjusted_auroc"}
    for name, estimate in metrics.items():
        title = evaluate.METRICS[name].title
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {title} ")]
        shown = line.split("|")[2].strip()
        assert (shown == "-") == (name in nulls), line
        assert (estimate["ci95"] is None) == (name in nulls)


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
    good, middling, useless = found["compared"]
    assert [good["model"], useless["model"]] == ["good", "useless"]
    assert middling["difference"] == {}
    assert found["data"]["root"] == "middling.csv"
    reference = middling["metrics"]["auroc"]["value"]
    gaps = [entry["difference"]["auroc"] for entry in (good, useless)]
    smallest = min(gap["p"] for gap in gaps)
    for entry, gap in zip((good, useless), gaps):
        low, high = gap["ci95"]
        assert gap["value"] == pytest.approx(entry["metrics"]["auroc"]["value"] - reference)
        assert low < gap["value"] < high
        assert (low > 0 or high < 0) == (gap["p"] < 0.05)
        assert gap["p_holm"] == pytest.approx(max(2 * smallest, gap["p"]))
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1  # padded, so that a terminal shows columns
    assert "reference" in rows[3]
    assert rows[0] in (rivals / "out" / "report.md").read_text()


def test_holm_adjusted_p_values_match_those_by_hand():
    for values, expected in (([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.6, 0.9], [1, 1])):
        tests = [{"p": p} for p in values]
        evaluate.add_holm(tests)
        assert [test["p_holm"] for test in tests] == pytest.approx(expected)


def test_a_model_does_not_differ_from_itself_in_another_order(rivals):
    """Nor if only one of the two files names the patients."""
    rows = read_csv(rivals / "good.csv")
    for i, row in enumerate(rows):
        row["patient"] = f"p{i // 3}"
    write_csv(rivals / "same.csv", rows[::-1])
    for names in (("same.csv", "good.csv"), ("good.csv", "same.csv")):
        found, _ = evaluate_files(rivals, *names, "--bootstrap", 100)
        assert found["data"]["patients"] == 100
        assert [entry["warnings"] for entry in found["compared"]] == [[], []]  # no unknown patients
        (gap,) = [entry["difference"]["auroc"] for entry in found["compared"] if entry["difference"]]
        assert gap == {"value": pytest.approx(0), "ci95": pytest.approx([0, 0]), "p": 1, "p_holm": 1}


def test_in_a_comparison_the_patients_of_a_run_count(evaluated, run):
    """Even if another program's table names more: a run knows which images are copies."""
    rows = [{**row, "patient": f"p{i}"} for i, row in enumerate(evaluated.rows)]
    write_csv(run.parent / "each.csv", rows)
    for names in (("run", "each.csv"), ("each.csv", "run")):
        found, _ = evaluate_files(run.parent, *names, "--bootstrap", 0)
        assert found["data"]["patients"] == 12


def test_predictions_for_other_labels_cannot_be_compared(rivals):
    rows = read_csv(rivals / "good.csv")
    rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    write_csv(rivals / "odd.csv", rows)
    _, err = evaluate_files(rivals, "good.csv", "odd.csv", code=2)
    assert "odd.csv and good.csv have different images or labels" in err.splitlines()[-1]


# --- runs ---


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory) -> Path:
    """A copy of the run, since evaluation writes into it; its threshold is not 0.5."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    folder.mkdir()
    for name in ("metrics.json", "splits.csv"):
        shutil.copy(run_folder / name, folder)
    checkpoint = models.load(run_folder)
    checkpoint["threshold"] |= {"value": float(expit(0.1)), "logit": 0.1}
    models.save(checkpoint, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def evaluated(run) -> SimpleNamespace:
    """What evaluate.py with a run and --stress printed and wrote."""
    done = run_script("evaluate.py", "ckpt.pt", "--stress", cwd=run)
    assert done.returncode == 0, done.stderr
    found = strict_json((run / "test.json").read_text())
    return SimpleNamespace(out=done.stdout, json=found, rows=read_csv(run / "test.csv"))


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
    r = evaluated.json
    assert r["threshold"] == models.load(run)["threshold"]
    assert r["data"]["root"] == str(demo.resolve())
    assert list(r["metrics"]) == list(evaluate.METRICS)
    assert {"brier", "nll", "ece", "slope", "intercept", "before", "prevalence"} <= r["calibration"].keys()
    identity, scores = ["path", "patient", "subtype", "label"], ["logit", "calibrated_logit", "probability"]
    assert list(evaluated.rows[0]) == [*identity, *scores, "prediction", "positive_class", "demo"]


def test_a_report_says_where_it_comes_from(evaluated, run):
    r = evaluated.json
    card = (run / "report.md").read_text()
    assert r["sha256"] == hashlib.sha256((run / "ckpt.pt").read_bytes()).hexdigest()
    assert r["provenance"]["command"].endswith("evaluate.py ckpt.pt --stress")
    recipe = ("epochs 2", "seed 0", "batch_size 16", "epoch 2 of 2", "random weights")
    for text in (*recipe, r["sha256"], r["data"]["fingerprint"], "not for diagnosis"):
        assert text in card
    printed, _, _ = evaluated.out.partition("\nwritten")
    assert card.startswith(printed)
    head, _, _ = card.partition("\n## ")
    assert "- DEMO: synthetic phantoms" in head
    assert "LEAK" not in head


def test_every_number_of_a_run_follows_from_its_csv(evaluated, run, demo):
    rows, r = evaluated.rows, evaluated.json
    files = {path.relative_to(demo).as_posix() for path in (demo / "test").rglob("*.jpeg")}
    assert {row["path"] for row in rows} == files
    assert len(rows) == len(files) == 24
    assert_report(r, rows)
    z = numbers(rows, "logit")
    calibrated = numbers(rows, "calibrated_logit")
    assert calibrated == pytest.approx(r["run"]["slope"] * z + r["run"]["intercept"], abs=1e-9)
    assert numbers(rows, "probability") == pytest.approx(expit(calibrated), abs=1e-12)
    predicted = calibrated >= r["threshold"]["logit"]
    assert 0 < predicted.sum() < 24
    assert is_pneumonia(rows, "prediction").tolist() == predicted.tolist()
    again, _ = evaluate_files(run, "test.csv", "--bootstrap", 0)
    assert again["data"]["demo"] and again["warnings"][0].startswith("DEMO")
    loss = sk.log_loss(is_pneumonia(rows), expit(z))
    assert r["calibration"]["before"]["nll"] == pytest.approx(loss)
    assert r["data"]["patients"] == len({row["patient"] for row in rows})


def test_stress_is_scored_on_changed_copies_and_names_the_worst(evaluated):
    rows = evaluated.json["stress"].copy()
    clean = rows.pop("clean")
    mean = rows.pop("mean")
    worst = rows.pop("worst")
    assert len(rows) == 18
    for metric in ("auroc", "sensitivity", "specificity", "balanced_accuracy"):
        figures = [row[metric] for row in rows.values()]
        assert mean[metric] == pytest.approx(np.mean(figures))
        assert worst[metric] == min(figures)
        assert clean[metric] == evaluated.json["metrics"][metric]["value"]
    lowest = evaluated.json["worst_balanced_accuracy"]
    assert lowest["value"] == min(clean["balanced_accuracy"], worst["balanced_accuracy"])
    assert rows[lowest["row"]]["balanced_accuracy"] == lowest["value"]
    line = f"worst balanced accuracy over clean and stressed images: {lowest['value']:.3f} ({lowest['row']})"
    assert line in evaluated.out


@pytest.fixture(scope="module")
def border(evaluated, run, demo) -> np.ndarray:
    """The logit of the border classifier for each row of the CSV."""
    images = [data.read_image(demo / row["path"], 64)[0] for row in evaluated.rows]
    return models.border_logit(models.load(run)["border"], torch.from_numpy(np.stack(images)))


def test_the_adjusted_auroc_counts_pairs_within_a_quintile_of_the_border(evaluated, border):
    y = is_pneumonia(evaluated.rows)
    z = numbers(evaluated.rows, "calibrated_logit")
    quintile = sum((border > np.quantile(border, q)).astype(int) for q in (0.2, 0.4, 0.6, 0.8))
    right, pairs = 0, 0
    for i in np.flatnonzero(y):
        for j in np.flatnonzero(~y):
            if quintile[i] == quintile[j]:
                right += z[i] > z[j]
                pairs += 1
    found = evaluated.json["metrics"]["adjusted_auroc"]
    assert found["value"] == pytest.approx(right / pairs)
    low, high = found["ci95"]
    assert low < right / pairs < high


def test_the_shortcut_is_reported_beside_the_model(evaluated, border):
    found = evaluated.json["shortcut"]
    y = is_pneumonia(evaluated.rows)
    predicted = is_pneumonia(evaluated.rows, "prediction")
    assert found["border_auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, border))
    normal = found["groups"]["NORMAL"]
    misled = ~y & (border > 0)
    assert normal["images"] == misled.sum()
    assert normal["specificity"]["value"] == pytest.approx(1 - predicted[misled].mean())
    pneumonia = found["groups"]["PNEUMONIA"]
    misled = y & (border <= 0)
    assert pneumonia["images"] == misled.sum()
    assert pneumonia["sensitivity"]["value"] == pytest.approx(predicted[misled].mean())
    assert "AUROC of the image border alone" in evaluated.out


def test_other_thresholds_and_images_overwrite_no_report(run, evaluated, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "new")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for words in (("--data", tmp_path / "new"), ("--threshold", 0.25)):
        found, err = evaluate_files(run, "ckpt.pt", "--bootstrap", 0, *words)
        assert err.endswith("nothing written; use --output DIR\n")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert found["metrics"]["sensitivity"] != evaluated.json["metrics"]["sensitivity"]
    found, err = evaluate_files(run, "ckpt.pt", "--threshold", 0.25, "--output", tmp_path / "out")
    assert f"written: {tmp_path}/out/test.json\n" in err
    done = run_script("evaluate.py", "ckpt.pt", "--bootstrap", 0, "--output", "ckpt.pt", cwd=run)
    assert done.returncode == 2 and "File exists: 'ckpt.pt'" in done.stderr
    assert "AUROC" in done.stdout  # the result is shown although it can't be written
    assert_report(found, read_csv(tmp_path / "out" / "test.csv"))


def test_scoring_val_reproduces_the_metrics_of_training(run, tmp_path):
    words = ("--split", "val", "--output", tmp_path, "--bootstrap", 0, "--device", "cpu")
    found, _ = evaluate_files(tmp_path, run, *words)
    checkpoint = models.load(run)
    known = checkpoint["history"][checkpoint["epoch"] - 1]
    drawn = [row["path"] for row in read_csv(run / "splits.csv") if row["split"] == "val"]
    scored = [row["path"] for row in read_csv(tmp_path / "val.csv")]
    assert sorted(scored) == sorted(drawn)
    assert found["data"]["leaks"] == []
    assert found["metrics"]["auroc"]["value"] == known["val_auroc"]
    assert found["calibration"]["before"]["nll"] == pytest.approx(known["val_loss"], abs=1e-9)


def test_leaks_are_found_in_another_folder_and_are_at_the_head_of_the_card(run, demo, tmp_path):
    # Training images of one class, compressed again and under new names, as if they were a test set.
    place = tmp_path / "other" / "test" / "NORMAL"
    place.mkdir(parents=True)
    used = [row for row in read_csv(run / "splits.csv") if row["class"] == "NORMAL"]
    for i, row in enumerate(used):
        Image.open(demo / row["path"]).save(place / f"{i}.jpeg", quality=90)
    evaluate_files(tmp_path, run, "--data", "other", "--output", "out", "--bootstrap", 0)
    card = (tmp_path / "out" / "report.md").read_text()
    head, _, _ = card.partition("\n## ")
    assert "inf" not in head  # the prevalence is 0
    for how, split in (("trained", "train"), ("chosen", "val")):
        n = sum(row["split"] == split for row in used)
        assert f"LEAK: {how} on {n} of these images and 0 of these patients" in head


def test_copies_count_as_one_patient_and_contradicting_labels_are_reported(run, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "d")
    normals = tmp_path / "d" / "test" / "NORMAL"
    first, second = sorted(normals.glob("IM-*0001.jpeg"))[:2]
    Image.open(first).save(second, quality=90)  # two patients with copies of one image
    pneumonia = min((tmp_path / "d" / "test" / "PNEUMONIA").iterdir())
    shutil.copy(pneumonia, normals / "copy.jpeg")
    found, err = evaluate_files(tmp_path, run, "--data", "d", "--output", "out", "--bootstrap", 0)
    assert found["data"]["patients"] == 11
    assert found["data"]["copies"] == 2
    assert err.count("copies whose labels differ: 1") == 1


def test_columns_of_metadata_are_subgroups_and_in_the_csv(run, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "demo")
    files = sorted((tmp_path / "demo" / "test").rglob("*.jpeg"))
    rows = []
    for i, path in enumerate(files):
        name = path.relative_to(tmp_path / "demo").as_posix()
        rows.append({"file_name": name, "sex": "FM"[i % 2]})
    write_csv(tmp_path / "demo" / "metadata.csv", rows)
    found, _ = evaluate_files(tmp_path, run, "--data", "demo", "--output", ".", "--bootstrap", 0)
    women = [row for row in read_csv(tmp_path / "test.csv") if row["sex"] == "F"]
    group = found["subgroups"]["sex: F"]
    assert group["images"] == len(women) == 12
    expected = recompute(women, found["threshold"]["value"])
    for metric in ("auroc", "sensitivity", "specificity"):
        assert group[metric]["value"] == pytest.approx(expected[metric])


def test_runs_that_differ_in_their_seed_are_one_model(run, tmp_path):
    altered(run, tmp_path / "s1", 0.5, {"seed": 1})
    altered(run, tmp_path / "other", 0.6, {"lr": 0.1})
    alone = []
    for path in (run, "s1", "other"):
        found, _ = evaluate_files(tmp_path, path, "--bootstrap", 0, "--output", "x")
        alone.append(found["metrics"]["auroc"]["value"])
    # No shell has expanded s?; a run that is named twice counts once.
    found, _ = evaluate_files(tmp_path, run, "s?", "s1/", "other", "--bootstrap", 200)
    ours, other = sorted(found["compared"], key=lambda entry: entry["number"])
    assert ours["seeds"] == [0, 1]
    assert other["varied"] == {"lr": 0.1}
    auroc = ours["metrics"]["auroc"]
    assert auroc["value"] == pytest.approx(np.mean(alone[:2]))
    assert auroc["sd"] == pytest.approx(np.std(alone[:2], ddof=1))
    assert other["difference"]["auroc"]["value"] == pytest.approx(alone[2] - auroc["value"])


def test_runs_of_other_code_or_other_training_images_are_other_models(run, tmp_path):
    """Another fingerprint: images were added or removed in between."""
    altered(run, tmp_path / "changed", 0.5, code="x")
    altered(run, tmp_path / "s1", 0.5, {"seed": 1}, data={**models.load(run)["data"], "fingerprint": "x"})
    altered(run, tmp_path / "s2", 0.5, {"seed": 2}, origin={"note": "other weights", "sha256": ""})
    for n, words in ((4, ["changed", "s1", "s2"]), (2, ["changed", "--split", "val"])):
        found, _ = evaluate_files(tmp_path, run, *words, "--bootstrap", 0)
        assert len(found["compared"]) == n


def test_the_folds_of_a_cross_validation_are_pooled(run, tmp_path):
    """Each image is scored by the run not trained on it, at that run's threshold."""
    threshold = models.load(run)["threshold"] | {"logit": 0.2, "value": float(expit(0.2))}
    altered(run, tmp_path / "f1", 0.3, {"fold": 1}, threshold=threshold)
    words = ("--split", "val", "--bootstrap", 0, "--stress", "--output", "out")
    alone = {}
    for path in (run, "f1"):
        evaluate_files(tmp_path, path, *words)
        alone |= {row["path"]: row for row in read_csv(tmp_path / "out" / "val.csv")}
    found, _ = evaluate_files(tmp_path, run, "f1", *words)
    rows = read_csv(tmp_path / "out" / "val.csv")
    assert {row["path"]: row for row in rows} == alone
    assert found["data"]["images"] == len(rows) == len(alone)
    assert found["folds"] == 2
    metrics = values(found["metrics"])
    y = is_pneumonia(rows)
    assert metrics["auroc"] == pytest.approx(sk.roc_auc_score(y, numbers(rows, "calibrated_logit")))
    assert metrics["accuracy"] == pytest.approx(np.mean(is_pneumonia(rows, "prediction") == y))
    assert found["threshold"]["rule"] == "one per run"
    assert found["stress"]["noise 0.05"]["auroc"] is not None
    assert "cross-validation of 2 runs, one of which" in (tmp_path / "out" / "val.md").read_text()


def test_an_unfinished_run_is_reported(run, tmp_path):
    altered(run, tmp_path / "a", 0.0, {"epochs": 40}, finished=False)
    done = run_script("evaluate.py", "a", "--bootstrap", 0, cwd=tmp_path)
    line = "- UNFINISHED: epoch 2 of 40"
    assert done.stdout.splitlines()[2] == line
    assert f"{line}\n" in (tmp_path / "a" / "report.md").read_text()


# --- three classes ---


@pytest.fixture(scope="module")
def three(run_folder, demo, tmp_path_factory) -> Path:
    """A checkpoint for the classes A, B and C: the run's with another head, and phantoms dealt to them in turn."""
    folder = tmp_path_factory.mktemp("three")
    for i, path in enumerate(sorted((demo / "test").rglob("*.jpeg"))):
        place = folder / "data" / "test" / "ABC"[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    checkpoint = models.load(run_folder)
    for name, shift in (("classifier.weight", 0), ("classifier.bias", checkpoint["intercept"] / checkpoint["slope"])):
        (head,) = checkpoint["state_dict"][name].diff(dim=0) + shift  # as calibrated, so that about half are above 0
        checkpoint["state_dict"][name] = torch.stack([0 * head, head, -head])
    checkpoint["threshold"] = {"value": None, "logit": None, "rule": "largest probability", "from": ""}
    checkpoint["data"]["root"] = str(folder / "data")
    checkpoint.update(classes=["A", "B", "C"], slope=1.5, intercept=0.0, border=None)
    models.save(checkpoint, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def test_three_classes_get_the_metrics_defined_for_them(three, tmp_path):
    found, _ = evaluate_files(tmp_path, three, "--output", "out", "--bootstrap", 100)
    rows = read_csv(tmp_path / "out" / "test.csv")
    labels = np.array(["ABC".index(row["label"]) for row in rows])
    predicted = np.array(["ABC".index(row["prediction"]) for row in rows])
    z = np.column_stack([numbers(rows, f"logit_{c}") for c in "ABC"])
    p = np.column_stack([numbers(rows, f"probability_{c}") for c in "ABC"])
    softened = expit(z) ** 1.5
    assert p == pytest.approx(softened / softened.sum(1, keepdims=True), abs=1e-9)
    assert predicted.tolist() == p.argmax(1).tolist()
    assert len(set(predicted)) > 1  # else the rest shows little
    recall = sk.recall_score(labels, predicted, average=None)
    aurocs = []
    for i, c in enumerate("ABC"):
        aurocs.append(sk.roc_auc_score(labels == i, p[:, i]))
        assert values(found["each_class"][c]) == pytest.approx({"auroc": aurocs[i], "sensitivity": recall[i]})
    metrics = values(found["metrics"])
    assert metrics["auroc"] == pytest.approx(np.mean(aurocs))
    assert metrics["accuracy"] == pytest.approx(np.mean(labels == predicted))
    assert metrics["balanced_accuracy"] == pytest.approx(recall.mean())
    assert found["confusion"] == sk.confusion_matrix(labels, predicted).tolist()


# --- errors of the user ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("path,label,probability\na,0,1.5\nb,1,0.5\n", "the probability of a is not a number in [0, 1]"),
        ("path,label,probability\na,0,0.1\na,1,0.5\n", "a path is listed twice"),
        ("path,label,probability\na,x,0.1\nb,y,0.5\nc,z,0.5\n", "two labels"),
        ("path,label,probability,flags,error\na,1,0.1,,\n", "labels are predictions"),
        ("path,label,probability,positive_class\na,x,0.1,x\nb,y,0.5,y\n", "must be the same in all rows"),
    ],
)
def test_a_csv_that_cannot_be_scored_is_one_line_and_code_2(tmp_path, content, expected):
    (tmp_path / "bad.csv").write_text(content)
    _, err = evaluate_files(tmp_path, "bad.csv", code=2)
    assert len(err.splitlines()) == 1
    assert "bad.csv" in err
    assert expected in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_data_other_than_the_runs_own_is_refused(run, demo, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(demo, tmp_path / name)
        about = {**models.load(run)["data"], "root": str(tmp_path / name)}
        altered(run, tmp_path / f"run_{name}", 0.0, {"data": name}, data=about)
    first, second = sorted((tmp_path / "b" / "test" / "NORMAL").iterdir())[:2]
    shutil.copy(first, second)
    _, err = evaluate_files(tmp_path, "run_a", "run_b", "--bootstrap", 0, code=2)
    assert "scored different data with the same paths" in err
    min((tmp_path / "b" / "train" / "NORMAL").iterdir()).unlink()
    _, err = evaluate_files(tmp_path, "run_b", "--split", "val", code=2)
    assert "are not those that run_b was trained on" in err
    shutil.rmtree(tmp_path / "a")
    _, err = evaluate_files(tmp_path, "run_a", code=2)
    assert "give its new path with --data DIR" in err


def test_logits_that_are_not_finite_are_an_error_with_the_files_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "infer", lambda *_: torch.full((24, 2), math.inf))
    _, err = evaluate_files(tmp_path, run, code=2)
    last = err.splitlines()[-1]
    assert "not finite" in last
    assert ".jpeg" in last


# --- pictures ---


def test_missing_matplotlib_is_reported_in_one_line(tmp_path, monkeypatch):
    write_csv(tmp_path / "p.csv", NAMED_ROWS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, err = evaluate_files(tmp_path, "p.csv", "--plots", code=2)
    assert len(err.splitlines()) == 1
    assert "pip install matplotlib" in err


@pytest.mark.extra("matplotlib")
@pytest.mark.filterwarnings("default")  # matplotlib's own
def test_pictures_are_drawn_from_whatever_there_is(run, three, tmp_path):
    write_csv(tmp_path / "one.csv", to_rows(["1", "1", "1"], [0.2, 0.7, 0.9]))
    # Names that are not valid text: matplotlib refuses them.
    altered(run, tmp_path / "\udcff", 0.5, {"seed": 1})
    odd, in_train = "PNEUM\udcc4", models.load(run)["data"]
    shutil.copytree(in_train["root"], tmp_path / "data")
    (tmp_path / "data" / "test" / "PNEUMONIA").rename(tmp_path / "data" / "test" / odd)
    altered(run, tmp_path / "odd", classes=["NORMAL", odd], data={**in_train, "root": str(tmp_path / "data")})
    cases = [
        ([run], ["test", "test-mistakes"]),
        ([three], ["test", "test-mistakes"]),
        (["one.csv"], ["one.scored"]),
        ([run, "\udcff"], ["compare"]),
        (["odd"], ["test", "test-mistakes"]),
    ]
    for i, (words, stems) in enumerate(cases):
        done = run_script("evaluate.py", *words, "--bootstrap", 0, "--plots", "--output", f"{i}", cwd=tmp_path)
        for stem in stems:
            assert f"written: {i}/{stem}.png\n" in done.stdout, done.stderr
            with Image.open(tmp_path / f"{i}" / f"{stem}.png") as image:
                darkest, _ = image.convert("L").reduce(20).getextrema()
                assert min(image.size) >= 700
                assert darkest < 200  # not blank
    assert "![test.png](test.png)" in (tmp_path / "0" / "report.md").read_text()


@pytest.mark.extra("matplotlib")
@pytest.mark.parametrize("names", [["good.csv", "useless.csv"], ["good.csv", "--threshold", 0.3]])
def test_nothing_is_drawn_that_would_not_be_written(rivals, names, monkeypatch):
    monkeypatch.setattr(evaluate, "new_figure", lambda *_: pytest.fail("drawn"))
    _, err = evaluate_files(rivals, *names, "--plots", "--bootstrap", 0)
    assert err.endswith("nothing written; use --output DIR\n")


@pytest.fixture
def figures(monkeypatch) -> dict:
    """The figures that are saved, by file name."""
    saved = {}
    monkeypatch.setattr(evaluate, "save_figure", lambda path, figure: saved.update({path.name: figure}))
    return saved


@pytest.mark.extra("matplotlib")
@pytest.mark.filterwarnings("default")
def test_the_grid_shows_each_mistake_with_the_map_of_the_predicted_class(run, tmp_path, figures, monkeypatch):
    targets = []
    heat_map = models.heat_map

    def watch(model, image, target, checkpoint):
        targets.append(target)
        return heat_map(model, image, target, checkpoint)

    monkeypatch.setattr(models, "heat_map", watch)
    found, _ = evaluate_files(tmp_path, run, "--threshold", 0.99, "--output", "out", "--plots", "--bootstrap", 0)
    assert set(targets) == {"NORMAL"}  # at this threshold all mistakes are called normal
    panels = [ax for ax in figures["test-mistakes.png"].axes if ax.images]
    assert len(panels) == len(targets) == min(12, found["confusion"]["fn"])


@pytest.mark.extra("matplotlib")
@pytest.mark.filterwarnings("default")
def test_panels_show_the_threshold_in_use_and_say_what_was_scored(run, tmp_path, figures):
    found, _ = evaluate_files(tmp_path, run, "--threshold", 0.3, "--output", "out", "--plots", "--bootstrap", 0)
    figure = figures["test.png"]
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == list(evaluate.PANELS)
    (line,) = panels["probabilities"].lines
    assert line.get_xdata()[0] == 0.3
    assert [line.get_marker() for line in panels["training"].lines[:3]] == ["."] * 3  # one epoch gives no line
    dot = panels["ROC"].lines[-1]
    metrics = values(found["metrics"])
    assert dot.get_xdata()[0] == pytest.approx(1 - metrics["specificity"])
    assert dot.get_ydata()[0] == pytest.approx(metrics["sensitivity"])
    assert "test split, 24 images of 12 patients; DEMO" in figure.get_suptitle()
