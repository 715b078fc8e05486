"""Score one checkpoint on a split of its data, or compare several on the same images.

python evaluate.py                              # the newest finished run, on the test split
python evaluate.py runs/A --plots               # test.json, test.csv and report.md in the run, with plots
python evaluate.py runs/A runs/B runs/C         # one table; B and C are compared with A, the reference
python evaluate.py runs/fold* --split val       # cross-validation: each image is scored by the run not trained on it
python evaluate.py predictions.csv              # what another program predicted: path, label, probability

Sections: what was predicted; metrics; intervals; report; comparison; Markdown; pictures; command line.
"""

import data  # isort: skip (first, so that Ctrl-C is quiet during the imports below)

import argparse
import contextlib
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import sklearn
import timm
import torch
import torchvision
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import expit, log_expit, logit, ndtr
from scipy.stats import binomtest
from sklearn.calibration import CalibrationDisplay
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay, confusion_matrix
from torch import Tensor

import models
import predict
from data import UserError, count, warn

# --- what was predicted ---


@dataclass
class Answers:
    """Truth and predictions of n images, for two classes or for one of several against the rest."""

    is_positive: ndarray  # bool [n]
    score: ndarray  # float64 [n]: calibrated logit
    predicted: ndarray  # bool [n]
    patient_index: ndarray  # int64 [n]
    stratum: ndarray | None  # int64 [n]: quintile of the border logit

    def n_patients(self, metric: str) -> int:
        """How many patients are in a metric's denominator; those of the rarer class if it needs both."""
        whose = METRICS[metric].whose
        groups = [self.is_positive, ~self.is_positive] if whose is None else [whose(self)]
        # np.unique would take seconds for a million images.
        return min(np.count_nonzero(np.bincount(self.patient_index[group])) for group in groups)


@dataclass
class Scored:
    """What a checkpoint, or another program, predicted for n labelled images; arrays have a row for each."""

    sources: list[str]  # run, checkpoint or CSV; for a cross-validation all of its runs
    model: str  # timm's name, or the CSV's
    arguments: dict  # what makes a run another model: all that training started from; of a CSV its path
    split: str  # train, val, test, or predictions (of a CSV)
    records: list[data.Record]
    classes: list[str]  # the positive one last
    labels: ndarray  # int64 [n]: positions in classes
    patient_index: ndarray  # int64 [n], see data.number_patients
    logits: ndarray  # float64 [n, classes]: log-odds of each class against the rest, before calibration
    calibrated_logits: ndarray  # float64 [n, classes], see models.Decision
    predicted: ndarray  # int64 [n]: positions in classes
    threshold: dict  # as in a checkpoint
    about: dict  # what the report says about the data: root, demo, fingerprint, copies, left_out, leaks
    border: ndarray | None = None  # float64 [n]: logit of the last class, from the border of the image alone
    stressed: dict[str, "Scored"] = field(default_factory=dict)  # the same images under each change of data.stress
    checkpoint: dict | None = None  # None: another program's predictions
    n_parameters: int | None = None

    @property
    def is_binary(self) -> bool:
        return len(self.classes) == 2

    @functools.cached_property
    def answers(self) -> dict[int, Answers]:
        """What was predicted about a class against the rest, by its position: the last of two, or each of more."""
        stratum = None
        if self.border is not None:
            stratum = np.searchsorted(np.quantile(self.border, (0.2, 0.4, 0.6, 0.8)), self.border)
        return {
            c: Answers(self.labels == c, self.calibrated_logits[:, c], self.predicted == c, self.patient_index, stratum)
            for c in ([1] if self.is_binary else range(len(self.classes)))
        }


def decided_fields(records: list[data.Record], logits: ndarray, checkpoint: dict) -> dict:
    """The fields of Scored that follow from a checkpoint's logits, classes, slope, intercept and threshold."""
    given_logits = torch.from_numpy(logits)
    decision = models.decide(given_logits, checkpoint)
    return {
        "records": records,
        "classes": checkpoint["classes"],
        "labels": np.array([checkpoint["classes"].index(r.label) for r in records]),
        "logits": models.calibrate(given_logits, 1.0, 0.0).numpy(),
        "calibrated_logits": decision.calibrated_logits.numpy(),
        "predicted": decision.predicted.numpy(),
        "threshold": checkpoint["threshold"],
    }


def to_logit(probability: float) -> float:
    """Log-odds; 0 and 1 are replaced by the nearest floats (log-odds -744 and 37), so that order is kept."""
    return float(logit(min(max(probability, math.ulp(0.0)), math.nextafter(1.0, 0.0))))


def score_checkpoint(path: str, checkpoint: dict, args: argparse.Namespace) -> Scored:
    """Run a checkpoint over a split of its own data, or of the folder that --data names.

    Raises:
        UserError: no such split, other classes, moved or changed data, or logits that are not finite.
    """
    own_data = checkpoint["data"]
    if not args.data and not os.path.exists(own_data["root"]):
        raise UserError(f"{own_data['root']}, the data folder of {path}, is missing; give its new path with --data DIR")
    root = data.find_root(args.data or own_data["root"])
    folder = data.read_folder(root, args.split == "test", checkpoint["input_size"])
    data.check_classes(folder.records, checkpoint["classes"], root)
    chosen = np.ones(len(folder.records), bool)
    if args.split != "test":
        if not args.data and folder.fingerprint != own_data["fingerprint"]:
            raise UserError(
                f"the images in {root}, or their labels, patients or subtypes, are not those that {path} was trained on"
                "; name the folder it used with --data DIR"
            )
        arguments = checkpoint["arguments"]
        in_val = data.is_validation(folder.records, folder.patient_index, arguments["folds"], arguments["fold"])
        chosen = in_val == (args.split == "val")
    out = np.flatnonzero(chosen & ~folder.usable)
    left_out = [{"path": folder.records[i].path, "reason": folder.infos[i].error} for i in out]
    index = np.flatnonzero(chosen & folder.usable)
    if not len(index):
        raise UserError(f"no image of the {args.split} split of {root} can be read")
    records = [folder.records[i] for i in index]
    model = models.from_checkpoint(checkpoint, models.pick_device(args.device))
    logits, border = ask(model, folder, torch.from_numpy(index), checkpoint, args.stress)
    clean = logits.pop("clean")
    is_finite = np.isfinite(clean).all(1)
    if not is_finite.all():
        raise UserError(f"{path} gives logits that are not finite for {records[is_finite.argmin()].path}")
    leaks, traces = [], folder.traces(index)
    # Every model is chosen on its validation images.
    for use in ["trained on"] if args.split == "val" else ["trained on", "chosen on"]:
        seen = data.seen_before(traces, checkpoint[use.replace(" ", "_")])
        if seen:
            leaks.append(f"LEAK: {use} {seen}")
    scored = Scored(
        sources=[path],
        model=checkpoint["model"],
        arguments={
            **checkpoint["arguments"],
            "code": checkpoint["code"][:8],
            "images": own_data["fingerprint"][:8],
            "start": checkpoint["origin"]["note"],
            "processes": checkpoint["world"],
        },
        split=args.split,
        patient_index=folder.patient_index[index],
        **decided_fields(records, clean, checkpoint),
        about={
            "root": str(root),
            "demo": data.is_demo(root) or own_data["demo"],
            "fingerprint": folder.fingerprint,
            "copies": len(index) - len(np.unique(folder.copy_index[index])),
            "left_out": left_out,
            "leaks": leaks,
        },
        border=border,
        checkpoint=checkpoint,
        n_parameters=models.n_parameters(model),
    )
    for name, stressed in logits.items():
        scored.stressed[name] = replace(scored, stressed={}, **decided_fields(records, stressed, checkpoint))
    return scored


def ask(
    model: torch.nn.Module, folder: data.Folder, index: Tensor, checkpoint: dict, stress: bool
) -> tuple[dict[str, ndarray], ndarray | None]:
    """A model's logits, and those of its border classifier, for the images at index, int64 [n].

    Returns:
        float64 [n, classes] as "clean" and, with stress, under the name of each change of data.stress; and the border
        logits, float64 [n], or None without a border classifier.
    """
    records = [folder.records[i] for i in index.tolist()]
    partners = data.draw_partners(records) if stress else None
    logits, border = defaultdict(list), []
    for batch in torch.arange(len(index)).split(64):
        images = folder.images[index[batch]]
        others = None if partners is None else folder.images[index[partners[batch]]]
        changed = data.stress(images, others, [records[i].path for i in batch]) if stress else ()
        for name, copy in itertools.chain([("clean", images)], changed):
            logits[name].append(models.infer(model, copy, checkpoint))
        if checkpoint["border"] is not None:
            border.append(models.border_logit(checkpoint["border"], images))
    all_logits = {name: torch.cat(batches).numpy() for name, batches in logits.items()}
    return all_logits, np.concatenate(border) if border else None


NEEDED = ("path", "label", "probability")
CSV_COLUMNS = (*NEEDED, "positive_class", "calibrated_logit", "patient", "subtype")
NO_GROUPS = {*CSV_COLUMNS, "logit", "prediction", "demo"}  # columns of test.csv that are not subgroups


def score_csv(path: str, positive: str | None, asked: dict) -> Scored:
    """What another program predicted: a table with the columns path, label and probability (of the positive class).

    It may have patient, subtype, positive_class, and calibrated_logit: the log-odds, used instead of the probability,
    which has ties at 0 and 1. Any other column gives subgroups of the report.

    Args:
        positive: the positive label that was asked for.
        asked: has the threshold that was asked for, or is empty.

    Raises:
        UserError: a column or value is missing or wrong, positive_class varies, or there are not two labels.
    """
    rows = data.read_table(Path(path), CSV_COLUMNS)
    columns = rows[0].keys()
    if not columns >= set(NEEDED):
        found = ", ".join(columns)
        raise UserError(f"{path} needs the columns {', '.join(NEEDED)} and one row per image; its columns are {found}")
    if columns >= {"flags", "error"}:
        raise UserError(f"{path} comes from predict.py, whose labels are predictions, not the truth")
    records, log_odds = [], []
    for row in rows:
        records.append(data.make_record(row["path"], "predictions", row, NO_GROUPS))
        given = row["probability"]
        probability = data.as_number(given)
        if probability is None or not 0 <= probability <= 1:
            raise UserError(f"{path}: the probability of {row['path']} is not a number in [0, 1]: {given!r}")
        exact = data.as_number(row.get("calibrated_logit", ""))
        log_odds.append(to_logit(probability) if exact is None else exact)
    if len({r.path for r in records}) < len(records):
        raise UserError(f"{path}: a path is listed twice")
    labels = {r.label for r in records}
    stated = {row.get("positive_class") or positive for row in rows}
    if len(stated) > 1 or positive not in (None, *stated):
        raise UserError(f"{path}: positive_class must be the same in all rows, and agree with --positive if given")
    (positive,) = stated
    for both in ({"0", "1"}, {"NORMAL", "PNEUMONIA"}):
        if labels <= both:  # one of the two is enough
            labels, positive = both, positive or max(both)
    if len(labels) != 2 or "" in labels:
        raise UserError(
            f"{path}: expected two labels, found {', '.join(label or 'an empty cell' for label in sorted(labels))}"
        )
    data.remark_patients(records)
    classes = data.sort_classes(labels, positive)
    threshold = {"value": 0.5, "logit": 0.0, "rule": "0.5", "from": "default"}
    as_given = {"classes": classes, "slope": 1.0, "intercept": 0.0, "threshold": threshold, **asked}
    return Scored(
        sources=[path],
        model=Path(path).stem,
        arguments={"predictions": path},
        split="predictions",
        patient_index=data.number_patients(records, np.arange(len(records))),
        **decided_fields(records, np.column_stack([np.zeros(len(records)), log_odds]), as_given),
        about={
            "root": path,
            "demo": any(row.get("demo") == "phantom" for row in rows),
            "fingerprint": None,
            "copies": 0,
            "left_out": [],
            "leaks": [],
        },
    )


def join_folds(a: Scored, b: Scored) -> Scored:
    """Two runs of a cross-validation as one: each image is scored by the run not trained on it."""
    sources, records = a.sources + b.sources, a.records + b.records
    if len({r.path for r in records}) < len(records):
        raise UserError(f"{', '.join(sources)} validated on the same images: they are not folds of one split")
    arrays = {name: np.concatenate([x, vars(b)[name]]) for name, x in vars(a).items() if isinstance(x, ndarray)}
    one_per_run = {"value": None, "logit": None, "rule": "one per run", "from": "validation"}
    added = {name: a.about[name] + b.about[name] for name in ("copies", "left_out", "leaks")}
    return replace(
        a,
        sources=sources,
        records=records,
        **arrays,
        threshold=a.threshold if a.threshold == b.threshold else one_per_run,
        about={**a.about, **added},
        # A run without images of a class has no copies with exchanged borders.
        stressed={name: join_folds(copy, b.stressed[name]) for name, copy in a.stressed.items() if name in b.stressed},
        checkpoint=min(a.checkpoint, b.checkpoint, key=lambda checkpoint: checkpoint["finished"]),  # unfinished if any
    )


def describe_environment(device: torch.device) -> dict:
    """Versions, device and git commit, for the record."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parent
        commit = subprocess.check_output(git, text=True, timeout=5, cwd=here, stderr=subprocess.DEVNULL).strip()
    libraries = {m.__name__: str(m.__version__) for m in (torch, timm, torchvision, sklearn, np)}
    return {"python": platform.python_version(), **libraries, "device": str(device), "git_commit": commit}


# --- metrics ---


def tally(is_positive: ndarray, score: ndarray, weights: ndarray) -> tuple[ndarray, ndarray]:
    """How many positives and negatives have each score, highest score first: two float64 [draws, distinct scores]."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.nan))  # first image of each group of equal scores
    weights = weights[:, order]
    all_images = np.add.reduceat(weights, starts, axis=1)
    positives = np.add.reduceat(weights * is_positive[order], starts, axis=1)
    return positives, all_images - positives


def auroc(a: Answers, weights: ndarray, strata=(slice(None),)) -> ndarray:
    """Area under the ROC curve: the share of pairs of a positive and a negative that are ranked correctly; ties: half.

    Args:
        weights: float64 [draws, n], how often each image was drawn. strata: masks of images, bool [n]; only pairs
            within one of them count.

    Returns:
        float64 [draws].
    """
    right = pairs = np.zeros(len(weights))
    for inside in strata:
        positives, negatives = tally(a.is_positive[inside], a.score[inside], weights[:, inside])
        right = right + (negatives * (np.cumsum(positives, 1) - positives / 2)).sum(1)
        pairs = pairs + positives.sum(1) * negatives.sum(1)
    return right / pairs


def adjusted_auroc(a: Answers, weights: ndarray) -> ndarray:
    """AUROC among pairs within one quintile of the border logit: what a model adds to the border of the image.

    Quintiles are weighted by their numbers of pairs. NaN without border logits.
    """
    return auroc(a, weights, [] if a.stratum is None else [a.stratum == number for number in np.unique(a.stratum)])


def auprc(a: Answers, weights: ndarray) -> ndarray:
    """Average precision, a step function without interpolation."""
    positives, negatives = tally(a.is_positive, a.score, weights)
    tp, fp = np.cumsum(positives, 1), np.cumsum(negatives, 1)
    precision = tp / (tp + fp)  # NaN, and no part of the sum, until the first image of a draw
    value = np.nansum(positives * precision, axis=1) / tp[:, -1]
    return np.where(fp[:, -1] > 0, value, np.nan)


def balanced_accuracy(a: Answers, weights: ndarray) -> ndarray:
    """Mean of sensitivity and specificity."""
    return measure(a, ("sensitivity", "specificity"), weights).mean(0)


def f1(a: Answers, weights: ndarray) -> ndarray:
    """Harmonic mean of PPV and sensitivity."""
    return 2 * (weights @ (a.is_positive & a.predicted)) / (weights @ a.is_positive + weights @ a.predicted)


def mcc(a: Answers, weights: ndarray) -> ndarray:
    """Matthews correlation coefficient."""
    n, true, called = weights.sum(1), weights @ a.is_positive, weights @ a.predicted
    covariance = n * (weights @ (a.is_positive & a.predicted)) - true * called
    return covariance / np.sqrt(true * (n - true) * called * (n - called))


@dataclass
class Metric:
    """A number of the report; to add one, write a line in METRICS."""

    title: str
    whose: Callable[[Answers], ndarray] | None  # bool [n]: the images in its denominator; None: both classes
    value: Callable[[Answers, ndarray], ndarray] | None = None  # see auroc; None: the share of whose that is right
    low: int = 0  # its lowest value; the highest is 1


METRICS = {
    "auroc": Metric("AUROC", None, auroc),
    "adjusted_auroc": Metric("leak-adjusted AUROC", None, adjusted_auroc),
    "auprc": Metric("AUPRC", None, auprc),
    "accuracy": Metric("accuracy", lambda a: np.ones_like(a.predicted)),
    "balanced_accuracy": Metric("balanced accuracy", None, balanced_accuracy),
    "sensitivity": Metric("sensitivity", lambda a: a.is_positive),
    "specificity": Metric("specificity", lambda a: ~a.is_positive),
    "ppv": Metric("PPV", lambda a: a.predicted),
    "npv": Metric("NPV", lambda a: ~a.predicted),
    "f1": Metric("F1", lambda a: a.is_positive | a.predicted, f1),
    "mcc": Metric("MCC", None, mcc, low=-1),
}
RANKING = ("auroc", "adjusted_auroc", "auprc")  # these do not depend on the threshold
OF_GROUPS = ("auroc", "adjusted_auroc", "sensitivity", "specificity")
UNDER_STRESS = ("auroc", "sensitivity", "specificity", "balanced_accuracy")


@np.errstate(divide="ignore", invalid="ignore")
def measure(answers: Answers, names, weights: ndarray | None = None) -> ndarray:
    """The named metrics, float64 [names, draws], NaN where one is undefined.

    weights: float64 [draws, n], how often each image was drawn; None counts each once.
    """
    if weights is None:
        weights = np.ones((1, len(answers.score)))
    values = []
    for name in names:
        metric = METRICS[name]
        if metric.value is None:
            among = metric.whose(answers)
            right = among & (answers.predicted == answers.is_positive)
            values.append(weights @ right / (weights @ among))
        else:
            values.append(metric.value(answers, weights))
    return np.stack(values)


# --- intervals ---
#
# An array of draws begins with the estimate itself: in its first element every image counts once; the rest are draws.


@dataclass
class Bootstrap:
    """Draws of patients with replacement, each with all of their images."""

    draws: int
    seed: int

    def values(self, answers: Answers, names) -> ndarray:
        """The named metrics, float64 [names, 1 + draws]."""
        rng = np.random.default_rng(self.seed)
        unique, patient_index = np.unique(answers.patient_index, return_inverse=True)
        n_patients = len(unique)
        most_rows = max(1, 300_000 // len(patient_index))  # weights in memory at once
        blocks = [measure(answers, names)]
        for start in range(0, self.draws, most_rows):
            shape = min(most_rows, self.draws - start), n_patients
            drawn = rng.integers(n_patients, size=shape)
            drawn += n_patients * np.arange(shape[0])[:, None]  # so that one bincount counts each row by itself
            times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape)
            blocks.append(measure(answers, names, times[:, patient_index].astype(float)))
        return np.concatenate(blocks, axis=1)


def mean_over_runs(values: ndarray, rng: np.random.Generator) -> ndarray:
    """The mean over the runs of a model, float64 [1 + draws], from the values of each, float64 [runs, 1 + draws].

    Each draw takes runs at random, one fewer than there are, so that it varies as much as the mean over new runs would
    (Rao and Wu 1988).
    """
    n_runs, n_draws = values.shape
    drawn = rng.integers(n_runs, size=(max(n_runs - 1, 1), n_draws))
    means = np.take_along_axis(values, drawn, axis=0).mean(0)
    means[0] = values[:, 0].mean()
    return means


def with_interval(name: str, values: ndarray, n_patients: int) -> dict:
    """{"value", "ci95"} of a metric, from an array of draws.

    The interval is symmetric on the logit scale; draws are kept away from either end by a sixth of the value's distance
    to it. If the value is at an end, or all draws are equal, the interval is from Clopper and Pearson (1934) instead,
    for the number of patients in the metric's denominator. tests/coverage_simulation.py shows how often it contains the
    truth.
    """
    if math.isnan(values[0]) or len(values) == 1:
        return {"value": values[0], "ci95": None}
    low = METRICS[name].low
    shares = (values - low) / (1 - low)
    share = shares[0]
    drawn = logit(np.clip(shares[1:], share / 6, 1 - (1 - share) / 6))
    drawn = drawn[np.isfinite(drawn)]  # none where all are 0, or all are 1
    if len(drawn) and drawn.std() > 1e-9:
        ends = expit(logit(share) + 1.96 * drawn.std() * np.array([-1, 1]))
    else:
        ends = binomtest(round(share * n_patients), n_patients).proportion_ci()
    return {"value": values[0], "ci95": [low + (1 - low) * end for end in ends]}


def estimates(answers: Answers, bootstrap: Bootstrap, names) -> dict[str, dict]:
    """The named metrics, each with its interval."""
    drawn = zip(names, bootstrap.values(answers, names))
    return {name: with_interval(name, values, answers.n_patients(name)) for name, values in drawn}


# --- report ---


def find_remarks(s: Scored, sizes: ndarray, auroc_interval: list[float] | None) -> list[str]:
    """Warnings about what makes results invalid or easy to misread, a line each; sizes: images of each class."""
    remarks = []
    if s.checkpoint and not s.checkpoint["finished"]:
        remarks.append(f"UNFINISHED: epoch {len(s.checkpoint['history'])} of {s.checkpoint['arguments']['epochs']}")
    if s.about["demo"]:
        remarks.append("DEMO: synthetic phantoms, not radiographs")
    remarks += s.about["leaks"]
    if not any(r.known_patient for r in s.records):
        remarks.append("all patients are unknown: intervals treat images as independent")
    if s.checkpoint is None and sizes.all() and (s.calibrated_logits[:, -1] >= 0).all():
        remarks.append("no probability is below 0.5: is this the confidence of the predicted class?")
    if auroc_interval and auroc_interval[1] < 0.5:
        remarks.append("the AUROC is below chance: are the classes swapped?")
    return remarks


def summarise(runs: list[Scored], bootstrap: Bootstrap, number: int = 0) -> tuple[ndarray, dict]:
    """The AUROC of a model, the mean over its runs, as an array of draws; and the head of its report.

    runs: on the same images. number: of the model, in a comparison.
    """
    s = runs[0]
    of_classes = [[bootstrap.values(run.answers[c], METRICS) for run in runs] for c in s.answers]
    of_runs = dict(zip(METRICS, np.mean(of_classes, axis=0).swapaxes(0, 1)))  # of each metric: [runs, 1 + draws]
    if not s.is_binary:
        # A wrong answer counts twice: for the true class, and for the predicted one.
        accuracy = 1 - len(s.classes) * (1 - of_runs["accuracy"]) / 2
        of_runs = {"auroc": of_runs["auroc"], "accuracy": accuracy, "balanced_accuracy": of_runs["sensitivity"]}
    drawn, metrics = {}, {}
    for name, values in of_runs.items():
        drawn[name] = mean_over_runs(values, np.random.default_rng([bootstrap.seed, number]))
        n_patients = min(a.n_patients(name) for a in s.answers.values())
        metrics[name] = with_interval(name, drawn[name], n_patients)
        if len(runs) > 1:
            metrics[name]["sd"] = values[:, 0].std(ddof=1)
    large = ("state_dict", "input_check", "border", "trained_on", "chosen_on")
    training = s.checkpoint and data.without(s.checkpoint, *large)
    sources = [source for run in runs for source in run.sources]
    sizes = np.bincount(s.labels, minlength=len(s.classes))
    remarks = [line for run in runs for line in find_remarks(run, sizes, metrics["auroc"]["ci95"])]
    return drawn["auroc"], {
        "checkpoint": ", ".join(sources),
        "sha256": ", ".join(data.sha256(models.in_run_folder(source)) for source in sources),
        "model": s.model,
        "parameters": s.n_parameters,
        "run": training,
        "seeds": [run.arguments.get("seed") for run in runs],
        "folds": len(s.sources),
        "split": s.split,
        "classes": s.classes,
        "data": {
            **s.about,
            "images": len(s.records),
            "patients": len(np.unique(s.patient_index)),
            "unknown_patients": sum(not r.known_patient for r in s.records),
            "sizes": dict(zip(s.classes, sizes.tolist())),
            "prevalence": sizes[1] / len(s.records) if s.is_binary else None,
        },
        "threshold": s.threshold,
        "warnings": list(dict.fromkeys(remarks)),
        "metrics": metrics,
    }


def report(s: Scored, bootstrap: Bootstrap) -> dict:
    """Everything in the files about one model; each dict of dicts in it can be shown as a table."""
    _, result = summarise([s], bootstrap)
    result["failures"] = find_mistakes(s)
    matrix = confusion_matrix(s.labels, s.predicted, labels=range(len(s.classes)))
    if not s.is_binary:
        both = ("auroc", "sensitivity")
        each = {name: estimates(a, bootstrap, both) for name, a in zip(s.classes, s.answers.values())}
        return {**result, "each_class": each, "confusion": matrix.tolist()}
    a = s.answers[1]
    at_half = replace(a, predicted=a.score >= 0)
    result |= {
        "positive": s.classes[1],
        "at_half": estimates(at_half, bootstrap, [name for name in METRICS if name not in RANKING]),
        "confusion": dict(zip(("tn", "fp", "fn", "tp"), matrix.ravel().tolist())),
        "calibration": calibration(a.is_positive, a.score),
        "subgroups": subgroups(s, bootstrap),
    }
    if s.checkpoint:
        result["calibration"]["before"] = calibration(a.is_positive, s.logits[:, 1])
        result["calibration"]["prevalence"] = 0.5  # at which the probability applies
    if s.border is not None:
        border = replace(a, score=s.border, predicted=s.border > 0)
        is_misled = border.predicted != a.is_positive
        result["shortcut"] = {
            "border_auroc": estimates(border, bootstrap, ["auroc"])["auroc"],
            "groups": {
                name: group_estimates(a, is_misled & (s.labels == c), bootstrap)
                for c, name in enumerate(s.classes)
                if c in s.labels[is_misled]
            },
        }
    if s.stressed:
        result["stress"], result["worst_balanced_accuracy"] = stress_table(s)
    return result


def calibration(is_positive: ndarray, z: ndarray) -> dict[str, float]:
    """Brier score, negative log-likelihood, ECE (10 equal bins), calibration slope and intercept, from logits z.

    Slope: of a logistic regression on the logit (1 is ideal); intercept: calibration in the large, with the slope fixed
    at 1 (0 is ideal); Van Calster et al. 2019. Both are NaN where the classes are separated or one is missing.
    """
    p = expit(z)
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = np.abs(np.bincount(bins, p - is_positive))  # of each bin, times its number of images
    slope = intercept = math.nan
    a, b = z[is_positive], z[~is_positive]
    # Where the logits of the classes do not overlap, no logistic regression has a finite slope.
    if len(a) and len(b) and a.min() < b.max() and b.min() < a.max():
        sd = z.std()
        standardised = (z - z.mean()) / sd
        fitted = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
        slope = fitted.fit(standardised[:, None], is_positive).coef_[0, 0] / sd
        limit = np.abs(z).max() + 50
        intercept = brentq(lambda shift: np.mean(expit(z + shift) - is_positive), -limit, limit, maxiter=2000)
    return {
        "brier": np.mean((p - is_positive) ** 2),
        "nll": -log_expit(np.where(is_positive, z, -z)).mean(),
        "ece": gaps.sum() / len(z),
        "slope": slope,
        "intercept": intercept,
    }


def group_estimates(a: Answers, chosen: ndarray, bootstrap: Bootstrap) -> dict:
    """Counts, and the main metrics, of the images in chosen, bool [n]."""
    part = Answers(*(array if array is None else array[chosen] for array in vars(a).values()))
    n_patients = len(np.unique(part.patient_index))
    return {"images": len(part.score), "patients": n_patients, **estimates(part, bootstrap, OF_GROUPS)}


def thirds(values: list[str]) -> list[str]:
    """Replace numbers, and ages like 058Y, by the third that they are in, such as "25 to 58".

    If any is not a number, or there are at most three different ones, all are left unchanged. Empty text: missing.
    """
    numbers = [data.as_number(value) for value in values if value]
    if None in numbers or len(set(numbers)) <= 3:
        return values
    groups = defaultdict(list)
    cuts = np.quantile(numbers, (1 / 3, 2 / 3))
    for number in numbers:
        groups[np.searchsorted(cuts, number)].append(number)
    names = {third: f"{min(own):.10g} to {max(own):.10g}" for third, own in groups.items()}
    return [names[np.searchsorted(cuts, data.as_number(value))] if value else "" for value in values]


def subgroups(s: Scored, bootstrap: Bootstrap) -> dict[str, dict]:
    """By subtype or, without one, by the series of file names; and by each further column of the table."""
    columns = {
        "subtype": [r.subtype for r in s.records],
        "series of file names": ["" if r.subtype else r.series for r in s.records],
        **{name: thirds([r.groups[name] for r in s.records]) for name in s.records[0].groups},
    }
    a = s.answers[1]
    groups = {}
    for column, values in columns.items():
        known = [value for value in values if value]
        # By the number that a name begins with, so that 9 comes before 10.
        names = sorted(set(known), key=lambda name: (data.as_number(name.partition(" ")[0]) or 0, name))
        if len(names) > max(10, len(known) / 2):
            warn(f"column {column} gives no subgroups: most of its values differ")
            continue
        for name in names:
            groups[f"{column}: {name}"] = group_estimates(a, np.array(values) == name, bootstrap)
    return groups


def stress_table(s: Scored) -> tuple[dict[str, dict], dict]:
    """Metrics of the images and of their stressed copies, and mean and worst of the copies, at the threshold in use;
    and the lowest balanced accuracy of them all, with the name of its row.
    """
    names = ["clean", *s.stressed]
    values = np.stack([measure(images.answers[1], UNDER_STRESS)[:, 0] for images in (s, *s.stressed.values())])
    values = [*values, values[1:].mean(0), values[1:].min(0)]
    rows = {name: dict(zip(UNDER_STRESS, row)) for name, row in zip([*names, "mean", "worst"], values)}
    lowest = min(names, key=lambda name: rows[name]["balanced_accuracy"])
    return rows, {"value": rows[lowest]["balanced_accuracy"], "row": lowest}


def find_mistakes(s: Scored) -> dict[str, dict]:
    """The twelve most confident mistakes (lowest log-odds of the true class), by path."""
    wrong = np.flatnonzero(s.predicted != s.labels)
    of_truth = s.calibrated_logits[wrong, s.labels[wrong]]
    mistakes = {}
    for i in wrong[np.argsort(of_truth, kind="stable")][:12]:
        c = s.predicted[i]
        mistakes[s.records[i].path] = {
            "label": s.records[i].label,
            "prediction": s.classes[c],
            "probability": expit(s.calibrated_logits[i, 1 if s.is_binary else c]),
        }
    return mistakes


def to_rows(s: Scored) -> list[dict]:
    """One row per image for the CSV; the report's numbers follow from it, except stress, border and adjusted AUROC.

    A column added here belongs in NO_GROUPS too, or scoring the CSV takes it for a subgroup.
    """
    rows = []
    for i, r in enumerate(s.records):
        row = {"path": r.path, "patient": r.patient, "subtype": r.subtype, "label": r.label}
        for c in s.answers:
            suffix = "" if s.is_binary else f"_{s.classes[c]}"
            row[f"logit{suffix}"] = s.logits[i, c]
            row[f"calibrated_logit{suffix}"] = s.calibrated_logits[i, c]
            row[f"probability{suffix}"] = expit(s.calibrated_logits[i, c])
        row["prediction"] = s.classes[s.predicted[i]]
        if s.is_binary:
            row["positive_class"] = s.classes[1]
        if s.about["demo"]:
            row["demo"] = "phantom"
        rows.append(row | r.groups | row)  # a column of metadata.csv does not replace one of these
    return rows


# --- comparison ---


def group_runs(scored: list[Scored], *names: str) -> list[list[Scored]]:
    """Group the runs whose arguments differ only in the named ones."""
    groups = defaultdict(list)
    for s in scored:
        common = s.arguments | dict.fromkeys(names)
        groups[json.dumps(common, sort_keys=True)].append(s)
    return list(groups.values())


def align(s: Scored, first: Scored) -> Scored:
    """s with the patients of first.

    Raises:
        UserError: the two differ in classes, images, labels or data.
    """
    both = f"{', '.join(s.sources)} and {', '.join(first.sources)}"
    if s.classes != first.classes:
        raise UserError(f"{both} have different classes ({s.classes}, {first.classes}): they can't be compared")
    labels, others = ({(r.path, r.label) for r in one.records} for one in (s, first))
    if labels != others:
        path, _ = min(labels ^ others)
        raise UserError(
            f"{both} have different images or labels, for example {path}; folds are one model only if code, images and "
            "arguments are the same"
        )
    if s.checkpoint and first.checkpoint and s.about["fingerprint"] != first.about["fingerprint"]:
        raise UserError(f"{both} scored different data with the same paths: choose one folder with --data")
    places = {r.path: i for i, r in enumerate(first.records)}
    order = [places[r.path] for r in s.records]
    return replace(s, records=[first.records[i] for i in order], patient_index=first.patient_index[order])


def difference(mine: ndarray, reference: ndarray) -> dict:
    """{"value", "ci95", "p"} of the difference of two arrays of draws, paired by patient; no interval without draws."""
    apart = mine - reference
    value, drawn = apart[0], apart[np.isfinite(apart)][1:]
    ci95, p = None, math.nan
    if len(drawn):
        sd = drawn.std()
        ci95 = [value - 1.96 * sd, value + 1.96 * sd]
        p = 2 * ndtr(-abs(value) / sd) if sd > 1e-9 else 1.0
    return {"value": value, "ci95": ci95, "p": p}


def add_holm(tests: list[dict]) -> None:
    """Add p_holm to each test: its p adjusted for the number of tests (Holm 1979)."""
    adjusted = 0.0
    for i, test in enumerate(sorted(tests, key=lambda test: test["p"])):
        adjusted = max((len(tests) - i) * test["p"], adjusted)
        test["p_holm"] = min(adjusted, 1.0)


def compare(groups: list[list[Scored]], bootstrap: Bootstrap) -> dict:
    """Models on the same images, sorted by AUROC; all but the first, the reference, with their difference from it."""
    # Its patients count for all: another program's CSV may not name them, nor know which images are copies.
    knows_most = lambda s: np.mean([r.known_patient for r in s.records]) > 0.5
    first = max(itertools.chain(*groups), key=lambda s: (knows_most(s), bool(s.checkpoint)))
    entries = []
    for number, group in enumerate(groups, 1):
        runs = [align(s, first) for s in group]
        drawn, entry = summarise(runs, bootstrap, number)
        varied = {
            name: value
            for name, value in runs[0].arguments.items()
            if any(others.arguments.get(name, value) != value for others, *_ in groups)
        }
        if number == 1:
            reference = drawn
        gap = {"auroc": difference(drawn, reference)} if number > 1 else {}
        entry |= {"number": number, "varied": varied, "difference": gap}
        if all(s.stressed for s in runs):
            worst = [stress_table(s)[1]["value"] for s in runs]
            entry["worst_balanced_accuracy"] = {"value": np.mean(worst)}
        entries.append(entry)
    add_holm([entry["difference"]["auroc"] for entry in entries[1:]])
    about = {**entries[0]["data"], "demo": any(entry["data"]["demo"] for entry in entries)}
    entries.sort(key=lambda entry: -entry["metrics"]["auroc"]["value"])
    return {"model": count(len(groups), "model"), "split": groups[0][0].split, "data": about, "compared": entries}


# --- Markdown ---

TITLES = {name: metric.title for name, metric in METRICS.items()}
TITLES |= {"brier": "Brier score", "nll": "NLL", "ece": "ECE", "prevalence": "assumed prevalence"}


def render(sections: dict[str, list | dict | None]) -> str:
    """A Markdown document that is readable in a terminal too.

    sections: {heading: content}, the first heading being the title; content is a list of lines, or a table {row:
    {column: cell}}, see show. Empty sections are left out.
    """
    lines = []
    for name, content in sections.items():
        if content:
            body = table(content) if isinstance(content, dict) else [f"- {line}" for line in content]
            lines += [f"{'##' if lines else '#'} {name}", "", *body, ""]
    return "\n".join(map(data.printable, lines))


def table(rows: dict[str, dict]) -> list[str]:
    """The lines of a Markdown table, its cells padded; empty rows, and columns without a value, are left out."""
    named = [{"": name, **row} for name, row in rows.items() if row]
    columns = []
    for name in dict.fromkeys(itertools.chain(*named)):
        cells = [show(row.get(name)) for row in named]
        if set(cells) != {"-"}:
            cells = [TITLES.get(cell, cell).replace("|", "\\|") for cell in (name, *cells)]
            width = max(map(len, cells))
            cells.insert(1, "-" * width)
            columns.append([cell.ljust(width) for cell in cells])
    return [f"| {' | '.join(row)} |" for row in zip(*columns)]


def show(cell: str | float | dict | None) -> str:
    """Text and counts as they are, numbers rounded, estimates with their interval, a dash for what is undefined."""
    match cell:
        case {"value": float(value), "ci95": [low, high]}:
            spread = f" (sd {cell['sd']:.3f})" if "sd" in cell else ""
            return f"{value:.3f} [{low:.3f}, {high:.3f}]{spread}"
        case {"value": float(value)} | float(value):
            return f"{value:.3f}"
        case None | dict():
            return "-"
    return str(cell)


def heading(r: dict) -> str:
    """The title of a report, a comparison, or their pictures."""
    demo = "; DEMO: synthetic phantoms" if r["data"]["demo"] else ""
    images = f"{count(r['data']['images'], 'image')} of {count(r['data']['patients'], 'patient')}"
    return f"{r['model']}, {r['split']} split, {images}{demo}"


def report_sections(r: dict) -> dict:
    """The report of one model, from its JSON: what was scored, on what, and how; its numbers. See render."""
    d, t, stored = r["data"], r["threshold"], r.get("calibration", {})
    sizes = ", ".join(f"{n} of class {name}" for name, n in d["sizes"].items())
    facts = [
        *r["warnings"],
        f"{r['checkpoint']} on {d['root']}: {sizes}; {len(d['left_out'])} left out",
        f"95 % confidence intervals: {count(r['bootstrap']['draws'], 'bootstrap draw')} of patients",
    ]
    matrix = r["confusion"]
    if "positive" in r:
        facts.append(
            f"threshold {show(t['value'])} on P({r['positive']}): rule {t['rule']}; operating point from {t['from']}"
        )
        matrix = np.reshape(list(matrix.values()), (2, 2))
    if "prevalence" in stored and 0 < d["prevalence"] < 1:
        facts.append(
            "probabilities assume equally frequent classes: for a prevalence of P add ln(P / (1 - P)) to their logits "
            f"(here {logit(d['prevalence']):+.3f}, which is also the calibration intercept to expect)"
        )
    if "shortcut" in r:
        facts.append(f"AUROC of the image border alone, without any lung: {show(r['shortcut']['border_auroc'])}")
    if "stress" in r:
        worst = r["worst_balanced_accuracy"]
        facts.append(f"worst balanced accuracy over clean and stressed images: {show(worst)} ({worst['row']})")
    kind = "at the threshold" if "positive" in r else "mean over the classes"
    half = r.get("at_half", {})
    called = [f"predicted {name}" for name in r["classes"]]
    return {
        heading(r): facts,
        "metrics": {name: {kind: estimate, "at 0.5": half.get(name)} for name, estimate in r["metrics"].items()},
        "each class against the rest": r.get("each_class"),
        "calibration": stored and {"as reported": stored, "before calibration": stored.get("before")},
        "subgroups": r.get("subgroups"),
        "images whose border suggests the wrong class": r.get("shortcut", {}).get("groups"),
        "stress (mean and worst: without clean, column by column)": r.get("stress"),
        "confusion matrix": {f"true {name}": dict(zip(called, row)) for name, row in zip(r["classes"], matrix)},
        f"most confident mistakes, with the probability of {r.get('positive', 'the predicted class')}": r["failures"],
    }


GLOSSARY = [
    "Brier score: mean squared distance of the probability from the truth (0 or 1); lower is better",
    "NLL: negative log-likelihood, the mean of -ln(probability of the true class); confident mistakes cost most",
    "ECE: expected calibration error, the mean distance between probability and observed frequency in ten bins",
    "slope: below 1 the probabilities are too extreme, above 1 too cautious",
    "intercept: above 0 the probabilities are too low on the whole, below 0 too high",
    "MCC: Matthews correlation coefficient, from -1 to 1; 0 is guessing",
]
TO_WRITE = ["setting and dates", "eligibility", "reference standard", "intended use", "ethics approval and funding"]


def card_sections(r: dict, pictures: list[str]) -> dict[str, list[str]]:
    """What a report file says besides its numbers: those items of TRIPOD+AI and STARD-AI that are known here."""
    d, t, made = r["data"], r["run"], r["provenance"]
    reasons = Counter(item["reason"] for item in d["left_out"]).most_common(5)
    left_out = "; ".join(f"{n} left out: {reason}" for reason, n in reasons) or "none left out"
    lines = [
        f"source: {d['root']}; fingerprint (SHA-256 of files and what is known of them): {d['fingerprint'] or 'none'}",
        f"flow: {count(d['images'] + len(d['left_out']), 'image')} found; {left_out}; {d['images']} scored",
        f"without a patient id: {count(d['unknown_patients'], 'image')}",
        f"intervals: bootstrap of patients, seed {r['bootstrap']['seed']}, symmetric on the logit scale",
        "intervals at 0 and 1: Clopper and Pearson, for the patients in the metric's denominator",
        f"SHA-256 of the scored file (of a run its ckpt.pt) {r['checkpoint']}: {r['sha256']}",
    ]
    if t:
        used = t["data"]
        recipe = ", ".join(f"{name} {value}" for name, value in t["arguments"].items() if value is not None)
        lines += [
            f"model: {r['model']}, {r['parameters']} parameters, {t['input_size']} px",
            f"preprocessing: grey levels in [0, 1], minus {t['mean']:.3f}, divided by {t['std']:.3f}",
            f"started from: {t['origin']['note']}; SHA-256 of its file: {t['origin']['sha256'] or 'none'}",
            f"trained on {count(used['images']['train'], 'image')} of {used['root']}, {used['fingerprint']}",
            f"recipe: {recipe}",
            f"epoch {t['epoch']} of {len(t['history'])}, git commit {t['environment']['git_commit']}",
            f"copies: {count(d['copies'], 'scored image')} repeating an earlier one; copies count as one patient",
            f"calibration: logit x {t['slope']:.4f} {t['intercept']:+.4f}",
            f"operating point from {r['threshold']['from']}",
        ]
    if r["folds"] > 1:
        lines.append(f"cross-validation of {r['folds']} runs, one of which is described here")
    lines += [
        f"this report: {made['command']}, on {made['date']}, git commit {made['environment']['git_commit']}",
        "limits: measured on these images only, not on other hospitals, devices or ages",
        "use: research; not for diagnosis",
    ]
    captions = [f"{name}: {y} vs {x}; {note}" for name, (x, y, note) in PANELS.items()]
    return {
        "plots": pictures and [*(f"![{name}]({name})" for name in pictures), *captions],
        "terms": GLOSSARY,
        "about this study (after TRIPOD+AI 2024 and STARD-AI 2025)": lines,
        "to fill in by hand": TO_WRITE,
    }


def comparison_sections(c: dict) -> dict:
    """The report of several models, from its JSON. See render."""
    remarks, rows = defaultdict(list), {}
    for e in c["compared"]:
        number, gap = str(e["number"]), e["difference"].get("auroc", {})
        for line in e["warnings"]:
            remarks[line].append(number)
        names = ("auroc", "adjusted_auroc", "accuracy", "sensitivity", "specificity")
        rows[number] = {
            "model": " ".join([e["model"], *(f"{name}={value}" for name, value in e["varied"].items())]),
            **{name: e["metrics"].get(name) for name in names},
            "worst balanced accuracy": e.get("worst_balanced_accuracy"),
            "difference in AUROC": gap or "reference",
            "p (Holm)": gap.get("p_holm"),
        }
    facts = [f"{line} (model {', '.join(numbers)})" for line, numbers in remarks.items()]
    facts += [f"model {e['number']}: {e['checkpoint']}" for e in c["compared"]]
    facts += [
        "sorted by AUROC: the best of several models looks better than it is",
        "p (Holm): of the difference in AUROC, adjusted for the number of comparisons",
        "several runs of a model: mean and standard deviation (sd); intervals resample patients and runs",
    ]
    return {heading(c): facts, "models": rows}


# --- pictures ---

PANELS = {  # title: names of the axes, and what else to know
    "ROC": ("1 - specificity", "sensitivity", "the dot is the threshold in use"),
    "calibration": ("mean probability", "observed frequency", "in ten bins; the diagonal is ideal"),
    "decision curve": ("threshold", "net benefit", "of treating predicted positives, all, or none (0)"),
    "probabilities": ("probability", "images", "of the last class, by true class; the line is the threshold"),
    "confusion matrix": ("predicted class", "true class", "numbers of images"),
    "training": ("epoch", "losses and validation AUROC", "the line is the selected epoch"),
}


def new_figure(title: str, rows: int, columns: int, width: float, height: float):
    """A figure whose axes are its panels, row by row; without pyplot, which would look for a display."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # file names may have dollar signs
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(data.printable(title))
    figure.subplots(rows, columns)
    return figure


def save_figure(path: Path, figure) -> None:
    """Write a figure as PNG."""
    with warnings.catch_warnings(action="ignore"), data.replacing(path) as f:  # names may need glyphs that fonts lack
        figure.savefig(f, format="png", dpi=200)


def draw_roc(ax, a: Answers, label: str, colour: str) -> None:
    """A ROC curve, if both classes are present, and a dot for the threshold in use."""
    if 0 < a.is_positive.mean() < 1:
        RocCurveDisplay.from_predictions(a.is_positive, a.score, ax=ax, name=label, curve_kwargs={"color": colour})
        sensitivity, specificity = measure(a, ("sensitivity", "specificity"))
        ax.plot(1 - specificity, sensitivity, "o", color=colour)


def net_benefit(a: Answers, thresholds: ndarray) -> tuple[ndarray, ndarray]:
    """Per image: of treating the predicted positives, and of treating all (Vickers and Elkin 2006).

    Treating none has a benefit of 0. At threshold t a false positive costs t / (1 - t) times what a true one gains.
    """
    cuts = logit(thresholds)[:, None]
    worth = np.where(a.is_positive, 1, -np.exp(cuts))
    return (worth * (a.score >= cuts)).mean(1), worth.mean(1)


def plot_report(s: Scored, title: str, run: dict | None):
    """Six panels of one model; run: the checkpoint, if it is one run's."""
    figure = new_figure(title, 2, 3, 15, 9)
    roc, reliability, decision, distribution, matrix, training = figure.axes
    thresholds = np.arange(1, 100) / 100
    names = [data.printable(name) for name in s.classes]
    for c, a in s.answers.items():
        draw_roc(roc, a, names[c], f"C{c}")
        CalibrationDisplay.from_predictions(a.is_positive, expit(a.score), n_bins=10, ax=reliability, name=names[c])
        benefits = np.column_stack(net_benefit(a, thresholds))
        decision.plot(thresholds, benefits, label=[names[c], f"all as {names[c]}"])
    decision.set_ylim(-0.1, 1)
    decision.legend()
    p = expit(s.calibrated_logits[:, -1])
    distribution.hist([p[s.labels == c] for c in range(len(s.classes))], 20, range=(0, 1), label=names)
    if s.threshold["value"] is not None:
        distribution.axvline(s.threshold["value"], color="k", ls="--")
    distribution.legend()
    ConfusionMatrixDisplay.from_predictions(
        s.labels, s.predicted, labels=range(len(s.classes)), display_labels=names, ax=matrix, colorbar=False
    )
    if run:
        for name in ("train_loss", "val_loss", "val_auroc"):
            epochs, values = zip(*[(log["epoch"], log[name]) for log in run["history"]])
            training.plot(epochs, values, ".-", label=name)
        training.axvline(run["epoch"], color="k", ls="--")
        training.legend()
    for ax, (panel, (x, y, _)) in zip(figure.axes, PANELS.items()):
        ax.set(title=panel, xlabel=x, ylabel=y, visible=ax.has_data())
    return figure


def plot_mistakes(s: Scored, mistakes: dict[str, dict], device: torch.device):
    """Mistakes, each beside its heat map for the predicted class."""
    rows = math.ceil(len(mistakes) / 4)
    title = "most confident mistakes; tinted: evidence for the predicted class"
    figure = new_figure(title, rows, 4, 16, 3 * rows)
    model = models.from_checkpoint(s.checkpoint, device)
    for ax in figure.axes:
        ax.set_axis_off()
    for ax, (path, mistake) in zip(figure.axes, mistakes.items()):
        image, _ = data.read_image(Path(s.about["root"], path), s.checkpoint["input_size"])
        heat = np.zeros(image.shape, np.float32)
        with contextlib.suppress(UserError):  # some architectures have no map to show
            heat = models.heat_map(model, image, mistake["prediction"], s.checkpoint)
        of = s.classes[-1] if s.is_binary else mistake["prediction"]
        called = f"{mistake['label']} predicted as {mistake['prediction']}, P({of}) {mistake['probability']:.3f}"
        ax.imshow(predict.draw_heat_map(image, heat, [os.path.basename(path), called]))
    return figure


def plot_comparison(groups: list[list[Scored]], c: dict):
    """ROC curves, one of each run, in the colour of its model."""
    figure = new_figure(heading(c), 1, 1, 8, 8)
    for number, runs in enumerate(groups, 1):
        for s in runs:
            name = data.printable(f"{number}: {', '.join(s.sources)}")
            draw_roc(figure.axes[0], s.answers[len(s.classes) - 1], name, f"C{number - 1}")
    return figure


# --- command line ---

# The names that make_files gives to reports in a run's folder; train.py sets them aside when the model changes.
IN_RUN = re.compile(r"(report|(train|val|test)(\.scored|-mistakes)?)\.(json|csv|md|png)")


def make_files(groups: list[list[Scored]], r: dict, sections: dict, args: argparse.Namespace) -> dict:
    """The files of a report or a comparison: {name: content}; sections: what is printed of it."""
    if "compared" in r:
        figures = {"compare.png": plot_comparison(groups, r)} if args.plots else {}
        return {"compare.json": r, "report.md": render(sections), **figures}
    s = groups[0][0]
    stem = s.split if s.checkpoint else f"{s.model}.scored"  # scoring a run's test.csv must not replace its test.json
    figures = {}
    if args.plots:
        run = s.checkpoint if len(s.sources) == 1 else None
        figures[f"{stem}.png"] = plot_report(s, heading(r), run)
        if run and r["failures"]:
            figures[f"{stem}-mistakes.png"] = plot_mistakes(s, r["failures"], models.pick_device(args.device))
    card = render({**sections, **card_sections(r, list(figures))})
    files = {f"{stem}.json": r, "report.md" if stem == "test" else f"{stem}.md": card}
    if s.checkpoint:
        files[f"{stem}.csv"] = data.to_csv(to_rows(s))
    return files | figures


def evaluate(args: argparse.Namespace) -> None:
    """Score, report and write as the arguments say."""
    files = {}  # each once
    for pattern in args.inputs:  # the shell may have left it unexpanded
        matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        for path in matches or [pattern]:
            files.setdefault(os.path.realpath(models.in_run_folder(path)), path)
    inputs = list(files.values()) or [str(models.newest_checkpoint())]
    asked = {}
    if args.threshold is not None:
        p = args.threshold
        source = "command line; calibration unchanged"
        asked = {"threshold": {"value": p, "logit": to_logit(p), "rule": f"{p:g}", "from": source}}
    checkpoints = [
        None if path.lower().endswith((".csv", ".tsv")) else {**models.load(path), **asked} for path in inputs
    ]
    more_classes = any(checkpoint and len(checkpoint["classes"]) > 2 for checkpoint in checkpoints)
    for_images = not any(checkpoints) and (args.stress or args.data)
    problems = {
        "--threshold is for two classes; leave it out here": more_classes and asked,
        "--stress is for two classes; leave it out here": more_classes and args.stress,
        "--stress and --data are for checkpoints: a CSV has no images": for_images,
        "--positive is for CSV files: a checkpoint knows its positive class": all(checkpoints) and args.positive,
        "--plots needs matplotlib: pip install matplotlib": args.plots and not importlib.util.find_spec("matplotlib"),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise UserError(problem)
    scored = [
        score_checkpoint(path, checkpoint, args) if checkpoint else score_csv(path, args.positive, asked)
        for path, checkpoint in zip(inputs, checkpoints)
    ]
    if args.split == "val":
        scored = [functools.reduce(join_folds, runs) for runs in group_runs(scored, "fold")]
    bootstrap = Bootstrap(args.bootstrap, args.seed)
    groups = group_runs(scored, "seed", "fold")  # of one model: all of its runs are tested on the same images
    result = report(scored[0], bootstrap) if len(scored) == 1 else compare(groups, bootstrap)
    result["bootstrap"] = {"unit": "patient", **vars(bootstrap)}
    result["provenance"] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(models.pick_device(args.device)),
    }
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # null instead of NaN
    sections = comparison_sections(result) if "compared" in result else report_sections(result)
    last_lines = []
    is_official = len(inputs) == 1 and not (asked or args.data)
    try:
        if args.output or is_official:
            folder = Path(args.output or models.in_run_folder(inputs[0]).parent)
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in make_files(groups, result, sections, args).items():
                write = {dict: data.write_json, str: data.write_text}.get(type(content), save_figure)
                write(folder / name, content)
                last_lines.append(f"written: {data.printable(str(folder / name))}")
    finally:  # even if a file can't be written
        print(json.dumps(result, indent=1) if args.json else render(sections))
    last_lines = last_lines or ["nothing written; use --output DIR"]
    print("\n".join(last_lines), file=sys.stderr if args.json else sys.stdout)


def main() -> None:
    parser = data.Parser(description="Score checkpoints, or the predictions of other programs.")
    add, text = parser.add_argument, data.non_empty
    help = "runs, checkpoints or CSV files, the first being the reference (default: newest finished run)"
    add("inputs", nargs="*", metavar="FILE", help=help)
    add("--split", choices=("test", "val", "train"), default="test", help="images to score")
    help = "data folder to use instead of the run's own; then files are written only with --output"
    add("--data", type=text, help=help)
    add("--positive", help="the positive label of a CSV (default: its positive_class, else 1, PNEUMONIA or a guess)")
    help = "threshold to use instead of the stored one; then files are written only with --output"
    add("--threshold", type=data.within(float, 0, 1), help=help)
    help = "also score versions with altered exposure, geometry, sharpness, noise or border"
    add("--stress", action="store_true", help=help)
    add("--plots", action="store_true", help="also write plots (needs matplotlib)")
    add("--bootstrap", type=data.within(int, 0, 10**6), default=2000, help="bootstrap draws")
    add("--seed", type=data.within(int, 0, 2**32 - 1), default=0, help="seed of the bootstrap")
    help = "folder for the files (default: beside the checkpoint or CSV; for several inputs, no files)"
    add("--output", type=text, help=help)
    add("--json", action="store_true", help="print only JSON")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    data.run_script(parser, lambda: evaluate(args))


if __name__ == "__main__":
    main()
