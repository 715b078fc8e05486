"""Score one checkpoint on a split of its data, or compare several on the same images.

python evaluate.py                              # the newest run, on the test split
python evaluate.py runs/A --plots               # test.json, test.csv and report.md in the run, with pictures too
python evaluate.py runs/A runs/B runs/C         # one table; B and C are compared with A, the reference
python evaluate.py runs/fold* --split val       # cross-validation: each image is scored by the run that did not see it
python evaluate.py predictions.csv              # what another program predicted: path, label, probability
"""

import argparse
import contextlib
import csv
import functools
import glob
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import data  # before the libraries: it looks after Ctrl-C while they are being imported

# isort: split
import numpy as np
import sklearn
import timm
import torch
import torchvision
from numpy import ndarray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import betaincinv, expit, log_expit, log_softmax, logit, ndtri, softmax, stdtr, stdtrit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix, precision_recall_curve, roc_curve
from torch import Tensor

import models
from data import UserError, warn

MAIN = ("auroc", "sensitivity", "specificity")  # what is said of a part of the images, or of changed ones
UNDER_STRESS = (*MAIN, "balanced_accuracy")
COMPARED = ("auroc", "accuracy")
LOWEST = {"mcc": -1}  # where it is not 0
MISSING = ("", "na", "n/a", "nan", "none", "null")  # in a column of metadata.csv
BLOCK = 300_000  # weights of a bootstrap that are held at once
EXACT = 1e-15  # a foreign probability nearer to 0 or 1 counts as exactly that


# --- metrics on weighted images: one row of weights is one draw of the bootstrap ---


@np.errstate(divide="ignore", invalid="ignore")
def rates(positive: ndarray, predicted: ndarray, weights: ndarray) -> dict[str, ndarray]:
    """The metrics of a confusion matrix, each [draws]; NaN where one is undefined (its denominator is zero).

    positive, predicted: bool [images]; weights: float [draws, images].
    """
    tp = weights @ (positive & predicted)
    fp = weights @ (~positive & predicted)
    fn = weights @ (positive & ~predicted)
    tn = weights @ (~positive & ~predicted)
    sensitivity = tp / (tp + fn)
    specificity = tn / (tn + fp)
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": tp / (tp + fp),
        "npv": tn / (tn + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / np.sqrt(margins),
    }


@np.errstate(divide="ignore", invalid="ignore")
def ranking(positive: ndarray, score: ndarray, weights: ndarray) -> dict[str, ndarray]:
    """AUROC (ties count half) and AUPRC (average precision, a step function), each [draws]; NaN without both."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))  # first image of each group of equal scores
    weights = weights[:, order]
    positives = np.add.reduceat(weights * positive[order], starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    tp = np.cumsum(positives, 1)
    fp = np.cumsum(negatives, 1)
    precision = tp / (tp + fp)  # NaN, and no part of the sum, as long as no image of a draw has come
    all_positives, all_negatives = tp[:, -1], fp[:, -1]
    auroc = (negatives * (tp - positives / 2)).sum(1) / (all_positives * all_negatives)
    auprc = np.nansum(positives * precision, axis=1) / all_positives
    return {"auroc": auroc, "auprc": np.where(all_negatives > 0, auprc, np.nan)}


def binary_metrics(positive: ndarray, score: ndarray | None, predicted: ndarray, weights: ndarray) -> dict:
    """Every metric of two classes, each [draws]; without scores those of the predictions alone."""
    ranks = {} if score is None else ranking(positive, score, weights)
    return {**ranks, **rates(positive, predicted, weights)}


def macro_auroc(labels: ndarray, probabilities: ndarray, positive_index: int) -> float:
    """AUROC of the positive class where there are two classes, else the mean of one class against the rest."""
    once = np.ones((1, len(labels)))
    classes = range(probabilities.shape[1])
    if len(classes) == 2:
        classes = [positive_index]  # the other one's is the same
    aurocs = [ranking(labels == c, probabilities[:, c], once)["auroc"] for c in classes]
    return float(np.mean(aurocs))


# --- intervals ---


@dataclass
class Bootstrap:
    """Draws of patients with replacement, each with all of their images."""

    draws: int
    seed: int = 0

    def values(self, metrics, patients: ndarray) -> dict[str, ndarray]:
        """What metrics(weights [block, images]) returns for each name, [1 + draws]: of the images as they are, then
        of each draw; patients: int [images], any numbers."""
        rng = np.random.default_rng(self.seed)
        unique, patients = np.unique(patients, return_inverse=True)
        count = len(unique)
        block = max(1, BLOCK // len(patients))  # bounds the memory, whatever the numbers of images and of draws
        blocks = [metrics(np.ones((1, len(patients))))]
        for start in range(0, self.draws, block):
            rows = min(block, self.draws - start)
            drawn = rng.integers(count, size=(rows, count))
            drawn += count * np.arange(rows)[:, None]  # so that one bincount counts each row apart
            weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
            blocks.append(metrics(weights[:, patients].astype(float)))
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def patient_numbers(patients) -> ndarray:
    """int64 [images]: equal patients get equal numbers, from 0 on, in the order in which they appear."""
    numbers = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in patients])


def counts(patients: ndarray) -> dict[str, int]:
    return {"images": len(patients), "patients": len(np.unique(patients))}


def clopper_pearson(share: float, n: int) -> list[float]:
    """95 % interval of a share of n (Clopper and Pearson 1934)."""
    k = share * n
    low = betaincinv(k, n - k + 1, 0.025) if k > 0 else 0.0
    high = betaincinv(k + 1, n - k, 0.975) if k < n else 1.0
    return [low, high]


def deviation(drawn: ndarray, by_model: list[ndarray], least: float = 0.0) -> tuple[float, float]:
    """Standard deviation of a model's mean over its runs, or of the difference of two, and its degrees of freedom.

    variance = max(variance of drawn, least squared) + sum over models of (variance of its runs / their number): that
    of testing, from the draws of patients, and that of training, from other seeds (Satterthwaite 1946).

    Args:
        drawn: [draws] of the mean or difference; NaN where it is undefined. by_model: the values of the runs of each.
    """
    drawn = drawn[np.isfinite(drawn)]
    total = max(drawn.var(), least**2) if len(drawn) else 0.0
    inverse = 0.0
    for values in by_model:
        if len(values) > 1:
            variance = values.var(ddof=1) / len(values)
            total += variance
            inverse += variance**2 / (len(values) - 1)
    return math.sqrt(total), total**2 / inverse if inverse else math.inf


def with_interval(values: ndarray, patients: int, low: int = 0) -> dict:
    """{"value", "ci95"} of a mean over runs, in [low, 1], from its bootstrap: values [runs, 1 + draws]; of several runs
    their standard deviation, "sd", too.

    The interval is symmetric on the logit scale, where a draw keeps a sixth of the value's distance from either end.
    Where there is none (the value lies at an end, or no draw differs), it is Clopper and Pearson's on the number of
    patients in the metric's denominator. tests/coverage_simulation.py tells how often it holds the truth.
    """
    value = values[:, 0].mean()
    result = {"value": or_none(value), "ci95": None}
    if len(values) > 1:
        result["sd"] = or_none(values[:, 0].std(ddof=1))
    if math.isnan(value) or values.shape[1] == 1:
        return result
    values = (values - low) / (1 - low)
    share = values[:, 0].mean()
    ends = clopper_pearson(share, patients)
    if 0 < share < 1:
        bounds = share / 6, 1 - (1 - share) / 6
        drawn = logit(np.clip(values[:, 1:].mean(0), *bounds))
        sd, freedom = deviation(drawn, [logit(np.clip(values[:, 0], *bounds))])
        if sd > 1e-9:
            half = stdtrit(freedom, 0.975) * sd
            ends = expit([logit(share) - half, logit(share) + half])
    result["ci95"] = [low + (1 - low) * end for end in ends]
    return result


def or_none(value: float) -> float | None:
    """A float for JSON: null where it is undefined."""
    return float(value) if math.isfinite(value) else None


def patients_behind(metric: str, positive: ndarray, predicted: ndarray, patients: ndarray) -> int:
    """How many patients the denominator of a metric holds; those of the rarer class where it needs both."""
    denominators = {
        "accuracy": np.ones_like(positive),
        "sensitivity": positive,
        "specificity": ~positive,
        "ppv": predicted,
        "npv": ~predicted,
        "f1": positive | predicted,
    }
    group = denominators.get(metric)
    if group is None:
        return patients_of_rarest(positive, patients)
    return len(np.unique(patients[group]))


def patients_of_rarest(labels: ndarray, patients: ndarray) -> int:
    """How many patients the class with the fewest has, of those that are there."""
    return min(len(np.unique(patients[labels == c])) for c in np.unique(labels))


def binary_estimates(
    positive: ndarray, score: ndarray | None, predicted: ndarray, patients: ndarray, bootstrap: Bootstrap
) -> dict[str, dict]:
    """{metric: {"value", "ci95"}} of two classes; patients: int [images]."""
    result = {}
    drawn = bootstrap.values(functools.partial(binary_metrics, positive, score, predicted), patients)
    for name, values in drawn.items():
        behind = patients_behind(name, positive, predicted, patients)
        result[name] = with_interval(values[None], behind, LOWEST.get(name, 0))
    return result


# --- calibration and decisions ---


def calibration(positive: ndarray, z: ndarray) -> dict[str, float | None]:
    """Brier score, negative log-likelihood, ECE (10 equal bins), calibration slope and intercept, from logits z.

    Slope: of a logistic regression on the logit (1 is ideal); intercept: calibration in the large, with the slope fixed
    at 1 (0 is ideal); Van Calster et al. 2019. Both are None where the classes are separated or one is missing, and
    leave out probabilities of exactly 0 or 1.
    """
    p = expit(z)
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = np.abs(np.bincount(bins, p - positive))
    log_likelihood = log_expit(np.where(positive, z, -z))
    exact = np.abs(z) >= -logit(EXACT) * 0.999
    slope, intercept = None, None
    y, z = positive[~exact], z[~exact]
    if overlap(z[y], z[~y]):
        scale = max(z.std(), 1e-12)
        standardised = (z[:, None] - z.mean()) / scale
        fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10).fit(standardised, y)
        slope = fit.coef_[0, 0] / scale
        bound = np.abs(z).max() + 50
        intercept = brentq(lambda shift: np.mean(expit(z + shift) - y), -bound, bound)
    return {
        "brier": np.mean((p - positive) ** 2),
        "nll": -log_likelihood.mean(),
        "ece": gaps.sum() / len(p),
        "slope": slope,
        "intercept": intercept,
        "exact": int(exact.sum()),
    }


def overlap(a: ndarray, b: ndarray) -> bool:
    """Whether some of a lie below some of b and the other way round: else no logistic regression has a finite slope."""
    if not len(a) or not len(b):
        return False
    return a.min() < b.max() and b.min() < a.max()


def calibration_curve(positive: ndarray, p: ndarray, patients: ndarray, bootstrap: Bootstrap) -> list[dict]:
    """Mean probability and observed frequency, with its interval, in each of 10 equal bins that holds images."""
    bins = np.minimum((p * 10).astype(int), 9)
    points = []
    for b in np.unique(bins):
        inside = bins == b
        drawn = bootstrap.values(functools.partial(frequency, positive[inside]), patients[inside])
        observed = with_interval(drawn["frequency"][None], len(np.unique(patients[inside])))
        point = {"predicted": p[inside].mean(), "observed": observed, "images": int(inside.sum())}
        points.append(point)
    return points


def frequency(positive: ndarray, weights: ndarray) -> dict[str, ndarray]:
    """The share of positive images, [draws]."""
    return {"frequency": weights @ positive / weights.sum(1)}


def decision_curve(positive: ndarray, p: ndarray) -> list[dict]:
    """Net benefit per image of treating whom the model calls positive, and of treating all (Vickers and Elkin 2006).

    That of treating none is 0. A threshold of t says that a false positive costs t / (1 - t) of a true one's worth.
    """
    rows = []
    for t in np.arange(1, 100) / 100:
        worth = np.where(positive, 1, -t / (1 - t))  # of treating each image
        treated = np.where(p >= t, worth, 0)
        rows.append({"threshold": t, "model": treated.mean(), "all": worth.mean()})
    return rows


# --- what is chosen on validation ---

TEMPERATURES = (0.05, 20.0)  # the bounds of its fit


def fit_temperature(logits: ndarray, labels: ndarray) -> float:
    """The temperature that minimises the negative log-likelihood (Guo et al. 2017).

    It is one of TEMPERATURES where no minimum lies between them: the logits separate the classes, or tell nothing.

    Args:
        logits: float64 [images, classes]; labels: int [images].
    """

    def loss(log_t: float) -> float:
        log_p = log_softmax(logits / math.exp(log_t), axis=1)
        return -np.mean(log_p[np.arange(len(labels)), labels])

    low, high = np.log(TEMPERATURES)
    inside = minimize_scalar(loss, bounds=(low, high), method="bounded").x
    return float(np.exp(min(low, high, inside, key=loss)))


def at_bound(temperature: float) -> bool:
    return bool(np.isclose(temperature, TEMPERATURES).any())


def choose_threshold(rule: str, positive: ndarray, z: ndarray) -> float:
    """A threshold on the probability, predicted positive from it on.

    Args:
        rule: youden (the largest sensitivity + specificity), sensitivity=X (the highest threshold that reaches X), or
            a fixed number.
        positive: bool [images]; z: calibrated logits [images]. The value lies half-way (in logits) between two scores.
    """
    if "=" not in rule and rule != "youden":
        return float(rule)
    if not positive.any() or positive.all():
        return 0.5
    curve = roc_curve(positive, z, drop_intermediate=False)
    fpr, tpr, score = (values[1:] for values in curve)  # the first score is infinite
    wanted = tpr - fpr if rule == "youden" else tpr >= float(rule.split("=")[1]) - 1e-12
    i = int(np.argmax(wanted))
    score = np.append(score, score[-1] - 1e-6)  # rounding must not put the lowest one under the threshold
    return float(expit((score[i] + score[i + 1]) / 2))


# --- scoring ---


@dataclass
class Scored:
    """What a checkpoint, or another program, says of a set of images; arrays have one row an image."""

    source: str  # the file
    sha256: str  # of the file
    model: str  # timm's name, or that of the file
    classes: list[str]
    positive_index: int  # position in classes
    root: str
    records: list[data.Record]
    patients: ndarray  # int64 [images], see patient_numbers
    logits: ndarray  # float64 [images, classes]
    temperature: ndarray  # float64 [images]: of the run that scored the image
    thresholds: ndarray  # float64 [images], on the probability of the positive one of two classes
    threshold: dict  # as in a checkpoint: value (None: not one for all), rule, and what it was chosen from
    split: str = "predictions"
    demo: bool = False
    left_out: list[dict] = field(default_factory=list)  # path and reason
    border: ndarray | None = None  # float64 [images]: logit of the classifier that sees the border alone
    stressed: dict[str, ndarray] = field(default_factory=dict)  # logits of changed copies, like logits
    leaks: dict | None = None  # see find_leaks
    fingerprint: str | None = None  # of the images' pixels
    parameters: int | None = None
    images_per_second: float | None = None
    run: dict | None = None  # the checkpoint

    @property
    def is_binary(self) -> bool:
        return len(self.classes) == 2

    @functools.cached_property
    def labels(self) -> ndarray:
        """int64 [images]: positions in classes."""
        return np.array([self.classes.index(r.label) for r in self.records])

    @functools.cached_property
    def probabilities(self) -> ndarray:
        """Calibrated, float64 [images, classes]."""
        return softmax(self.logits / self.temperature[:, None], axis=1)

    @property
    def z(self) -> ndarray:
        """Logit of the positive one of two classes, before temperature."""
        return binary_logit(self.logits, self.positive_index)

    @functools.cached_property
    def predicted(self) -> ndarray:
        """int64 [images]: positions in classes."""
        if not self.is_binary:
            return self.probabilities.argmax(1)
        is_positive = self.probabilities[:, self.positive_index] >= self.thresholds
        return np.where(is_positive, self.positive_index, 1 - self.positive_index)

    def against_rest(self, c: int) -> tuple[ndarray, ndarray, ndarray]:
        """Whether each image is of class c, the probability of that, and whether it is predicted."""
        return self.labels == c, self.probabilities[:, c], self.predicted == c

    @property
    def binary(self) -> tuple[ndarray, ndarray, ndarray]:
        """The same of the positive class."""
        return self.against_rest(self.positive_index)

    @property
    def arguments(self) -> dict:
        """Of the training; another program's predictions have none in common."""
        return {"source": self.source} if self.run is None else self.run["arguments"]

    @property
    def unfinished(self) -> str:
        if self.run is None or self.run["finished"]:
            return ""
        return f"UNFINISHED: epoch {self.run['epochs']} of {self.arguments['epochs']}"


def infer_stressed(
    model: torch.nn.Module, images: Tensor, index: Tensor, records: list, pre: dict
) -> dict[str, ndarray]:
    """{name of the stress: logits [len(index), classes]} of changed copies of the images at index; records: theirs."""
    partners = data.draw_partners(records)
    paths = [r.path for r in records]
    logits = defaultdict(list)
    for start in range(0, len(index), 64):
        part = slice(start, start + 64)
        others = None if partners is None else images[index[partners[part]]].cpu()
        for name, copies in data.stress(images[index[part]].cpu(), others, paths[part]):
            logits[name].append(models.infer(model, [copies], pre))
    return {name: torch.cat(batches).numpy() for name, batches in logits.items()}


def binary_logit(logits: ndarray, positive_index: int) -> ndarray:
    """The logit of the positive one of two classes."""
    return logits[:, positive_index] - logits[:, 1 - positive_index]


@functools.lru_cache(maxsize=4)
def read_split(
    root: Path, split: str, folds: int, fold: int, size: int
) -> tuple[list[data.Record], data.Images, Tensor, list[dict]]:
    """Records and images of test/, or all that training reads, the positions of those of the split, int64, and what of
    it can't be read; several runs of one comparison read, and warn, once."""
    records = data.scan(root, "test") if split == "test" else data.find_training(root, folds, fold)
    if not records:
        raise UserError(f"{root}/test has no class folders with images")
    images = data.load_images(root, records, size)
    failed = {i: reason for i, reason in images.failed.items() if records[i].split == split}
    index = [i for i, r in enumerate(records) if r.split == split and i not in failed]
    positions = torch.tensor(index, dtype=torch.int64)
    data.warn_contradictions([records[i] for i in index], images.digests[positions])
    return records, images, positions, data.report_left_out(records, failed)


def threshold_in_force(args: argparse.Namespace, stored: dict) -> dict:
    """The stored one, but where the user asks for another threshold."""
    if args.threshold is None:
        return stored
    return {"value": args.threshold, "rule": f"{args.threshold:g}", "from": "command line"}


def score_checkpoint(path: str, ckpt: dict, args: argparse.Namespace) -> Scored:
    """Run a checkpoint over a split.

    Raises:
        UserError: no such split, other classes, changed training images, or logits that are not finite.
    """
    seen, arguments = ckpt["data"], ckpt["arguments"]
    root = data.find_root(args.data or seen["root"])
    records, images, index, left_out = read_split(
        root, args.split, arguments["folds"], arguments["fold"], ckpt["input_size"]
    )
    if args.split != "test" and not args.data and data.fingerprint(records, images.digests) != seen["fingerprint"]:
        raise UserError(f"the images in {root} are not those that {path} was trained on, or it is of an older version")
    data.check_classes(records, ckpt["classes"], str(root))
    if not len(index):
        raise UserError(f"no image of the {args.split} split of {root} can be read")
    records = [records[i] for i in index.tolist()]
    digests = images.digests[index]
    model = models.from_checkpoint(ckpt, models.pick_device(args.device))
    start = time.perf_counter()
    logits = models.infer(model, models.in_batches(images.pixels, index), ckpt).numpy()
    seconds = time.perf_counter() - start
    finite = np.isfinite(logits).all(1)
    if not finite.all():
        raise UserError(f"{path} gives logits that are not finite for {records[finite.argmin()].path}: it is damaged")
    border = None
    if ckpt["border"] is not None:
        batches = models.in_batches(images.pixels, index)
        border = np.concatenate([models.border_logit(ckpt["border"], batch) for batch in batches])
    threshold = threshold_in_force(args, ckpt["threshold"])
    return Scored(
        source=path,
        sha256=data.sha256(models.in_run_folder(path)),
        model=ckpt["model"],
        classes=ckpt["classes"],
        positive_index=ckpt["classes"].index(ckpt["positive"]),
        root=str(root),
        records=records,
        patients=patient_numbers(r.patient for r in records),
        logits=logits,
        temperature=np.full(len(records), ckpt["temperature"], float),
        thresholds=np.full(len(records), threshold["value"], float),  # NaN where there is none
        threshold=threshold,
        split=args.split,
        demo=data.is_demo(root) or seen["demo"],
        left_out=left_out,
        border=border,
        stressed=infer_stressed(model, images.pixels, index, records, ckpt) if args.stress else {},
        leaks=find_leaks(records, digests, seen),
        fingerprint=data.fingerprint(records, digests),
        parameters=models.parameters(model),
        images_per_second=len(index) / seconds,
        run=ckpt,
    )


def find_leaks(records: list[data.Record], digests: Tensor, seen: dict) -> dict[str, int]:
    """How many images and patients the model was trained on, and on how many it was chosen; seen: of a checkpoint."""
    trained = data.count_seen(records, digests, seen["pixels"], seen["patients"])
    chosen = data.count_seen(records, digests, seen["val_pixels"], seen["val_patients"])
    if records[0].split == "val":
        chosen = 0, 0  # these images are what the choice was made on
    names = ("images", "patients", "val_images", "val_patients")
    return dict(zip(names, (*trained, *chosen)))


def read_predictions(path: str) -> tuple[list[data.Record], ndarray]:
    """Records and probabilities of a CSV with the columns path, label, probability, and perhaps patient and subtype.

    Raises:
        UserError: with the reason.
    """
    needed = ("path", "label", "probability")
    problem = f"{path} needs a header with the columns {', '.join(needed)}, and one row per image"
    records, p = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            columns = reader.fieldnames or []
            if len(set(columns)) < len(columns):
                raise UserError(f"{path} has a column twice: {', '.join(columns)}")
            if {"flags", "error"} <= set(columns):
                raise UserError(f"{path} comes from predict.py, whose labels are predictions, not the truth")
            for row in reader:
                if None in row or None in map(row.get, needed):  # too many cells or too few
                    raise UserError(problem)
                patient, subtype, series = data.identify(Path(row["path"]).name)
                patient = row.get("patient") or patient or row["path"]
                subtype = row.get("subtype") or subtype
                label = sys.intern(row["label"])  # a million rows share two
                records.append(data.Record(row["path"], label, "predictions", patient, subtype, series, 0, 0))
                p.append(float(row["probability"]))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} can't be read: {e}") from None
    except ValueError:
        raise UserError(f"{path}: column probability holds something that is no number") from None
    if not records:
        raise UserError(problem)
    return records, np.array(p)


def score_csv(path: str, args: argparse.Namespace) -> Scored:
    """What another program predicted: the probability of the positive class for each image."""
    records, p = read_predictions(path)
    if not ((p >= 0) & (p <= 1)).all():
        raise UserError(f"{path}: probabilities must lie in [0, 1]")
    if len({r.path for r in records}) < len(records):
        raise UserError(f"{path}: a path is listed twice")
    classes = sorted({r.label for r in records})
    asked = args.positive
    for known in (["0", "1"], ["NORMAL", "PNEUMONIA"]):
        if set(classes) <= set(known):  # one of the two alone will do
            classes, asked = known, asked or known[1]
    if len(classes) != 2 or "" in classes:
        raise UserError(f"{path}: expected two labels, found {', '.join(classes)}")
    exact = [r.path for r, value in zip(records, p) if value in (0, 1)]
    if exact:
        warn(f"{len(exact)} probabilities of {path} are exactly 0 or 1, such as that of {exact[0]}")
    positive_index = data.positive_index(classes, asked)
    logits = np.zeros((len(p), 2))
    logits[:, positive_index] = logit(p.clip(EXACT, 1 - EXACT))
    threshold = threshold_in_force(args, {"value": 0.5, "rule": "0.5", "from": "default"})
    return Scored(
        source=path,
        sha256=data.sha256(Path(path)),
        model=Path(path).stem,
        classes=classes,
        positive_index=positive_index,
        root=path,
        records=records,
        patients=patient_numbers(r.patient for r in records),
        logits=logits,
        temperature=np.ones(len(p)),
        thresholds=np.full(len(p), threshold["value"]),
        threshold=threshold,
    )


def group_runs(scored: list[Scored], *names: str) -> list[list[Scored]]:
    """Runs whose arguments differ in the named ones alone stand together; one run that is given twice stays apart."""
    groups = defaultdict(list)
    for s in scored:
        common = {name: value for name, value in s.arguments.items() if name not in names}
        groups[json.dumps(common, sort_keys=True)].append(s)
    result = []
    for runs in groups.values():
        distinct = {json.dumps(s.arguments, sort_keys=True) for s in runs}
        result += [runs] if len(distinct) == len(runs) else [[s] for s in runs]
    return result


def pool(runs: list[Scored]) -> Scored:
    """The runs of a cross-validation as one: each image is scored by the run that did not see it."""
    first = runs[0]
    if len(runs) == 1:
        return first
    records = [r for s in runs for r in s.records]
    if len({r.path for r in records}) < len(records):
        raise UserError(f"{first.source} and others validated on the same images (val/): they are no folds")
    arguments = {k: v for k, v in first.arguments.items() if k != "fold"}
    own = {"value": None, "rule": f"each of the {len(runs)} runs its own", "from": first.threshold["from"]}
    unfinished = [s.run for s in runs if not s.run["finished"]]
    run = unfinished[0] if unfinished else first.run
    has_border = all(s.border is not None for s in runs)
    names = [name for name in first.stressed if all(name in s.stressed for s in runs)]  # a fold may lack a class
    arrays = {
        name: np.concatenate([getattr(s, name) for s in runs]) for name in ("logits", "temperature", "thresholds")
    }
    return replace(
        first,
        source=", ".join(s.source for s in runs),
        sha256=data.hash_lines(s.sha256 for s in runs),
        records=records,
        patients=patient_numbers(r.patient for r in records),
        **arrays,
        threshold=first.threshold if all(s.threshold == first.threshold for s in runs) else own,
        left_out=[item for s in runs for item in s.left_out],
        border=np.concatenate([s.border for s in runs]) if has_border else None,
        stressed={name: np.concatenate([s.stressed[name] for s in runs]) for name in names},
        leaks={name: sum(s.leaks[name] for s in runs) for name in first.leaks},
        fingerprint=data.hash_lines(s.fingerprint for s in runs),
        run={**run, "arguments": arguments},
    )


def align(s: Scored, first: Scored) -> Scored:
    """The same with the patients of the first one, since a foreign CSV may not know them.

    Raises:
        UserError: the two did not score the same task.
    """
    both = f"{s.source} and {first.source}"
    if (s.classes, s.positive_index) != (first.classes, first.positive_index):
        names = " and ".join(", ".join(c.classes) for c in (s, first))
        raise UserError(f"{both} tell other classes apart ({names}): they can't be compared")
    place = {r.path: i for i, r in enumerate(first.records)}
    odd = place.keys() ^ {r.path for r in s.records}
    if odd:
        raise UserError(f"{both} do not score the same images ({len(odd)} paths differ, such as {min(odd)})")
    same_size = s.run and first.run and s.run["input_size"] == first.run["input_size"]
    if s.split == "test" and same_size and s.fingerprint != first.fingerprint:
        raise UserError(f"{both} saw other pixels under the same names ({s.root}, {first.root}): name one --data")
    index = [place[r.path] for r in s.records]
    if (s.labels != first.labels[index]).any():
        raise UserError(f"{both} do not agree on the labels")
    return replace(s, patients=first.patients[index])


# --- provenance ---


def describe_environment(device: torch.device) -> dict:
    """Versions, device and git commit, for the record."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        folder = Path(__file__).resolve().parent
        done = subprocess.run(git, cwd=folder, check=False, capture_output=True, text=True, timeout=5)
        commit = done.stdout.strip() or None
    libraries = {m.__name__: str(m.__version__) for m in (torch, timm, torchvision, sklearn, np)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {data.CORES} cores"
    return {"python": platform.python_version(), **libraries, "device": name, "git_commit": commit}


def provenance(args: argparse.Namespace) -> dict:
    """When and how this evaluation was made."""
    return {
        "bootstrap": {"unit": "patient", "draws": args.bootstrap, "seed": args.seed},
        "provenance": {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": data.command_line("python", *sys.argv),
            "environment": describe_environment(models.pick_device(args.device)),
        },
    }


# --- the report of one model ---


def describe(s: Scored) -> dict:
    """What a report says of any model."""
    run = None
    if s.run is not None:
        run = {k: s.run[k] for k in ("arguments", "environment", "weights", "epoch", "epochs", "finished")}
        seen = s.run["data"]
        run["data"] = seen["root"]
        run["images"] = {"train": seen["images"], "val": len(seen["val_pixels"])}
    return {
        "checkpoint": s.source,
        "sha256": s.sha256,
        "model": s.model,
        "parameters": s.parameters,
        "unfinished": s.unfinished,
        "run": run,
        "split": s.split,
        "classes": s.classes,
        "data": {
            "root": s.root,
            "demo": s.demo,
            "fingerprint": s.fingerprint,
            **counts(s.patients),
            "prevalence": (s.labels == s.positive_index).mean() if s.is_binary else None,
            "left_out": s.left_out,
            "leaks": s.leaks,
        },
        "images_per_second": s.images_per_second,
        "threshold": s.threshold,
    }


def report(s: Scored, bootstrap: Bootstrap) -> dict:
    """Everything that the files say about one model."""
    figures = report_two if s.is_binary else report_more
    return {**describe(s), **figures(s, bootstrap), "failures": mistakes(s, 10)}


def report_two(s: Scored, bootstrap: Bootstrap) -> dict:
    """The figures of two classes."""
    positive, score, predicted = s.binary
    temperatures = np.unique(s.temperature)  # several runs have each its own
    (tn, fp), (fn, tp) = confusion_matrix(positive, predicted, labels=[False, True]).tolist()
    result = {
        "positive": s.classes[s.positive_index],
        "metrics": binary_estimates(positive, score, predicted, s.patients, bootstrap),
        "at_half": binary_estimates(positive, None, score >= 0.5, s.patients, bootstrap),
        "confusion": {"tp": tp, "fp": fp, "fn": fn, "tn": tn},
        "calibration": {
            **calibration(positive, s.z / s.temperature),
            "temperature": temperatures[0] if len(temperatures) == 1 else None,
            "before_temperature": calibration(positive, s.z),
            "curve": calibration_curve(positive, score, s.patients, bootstrap),
        },
        "decision_curve": decision_curve(positive, score),
        "subgroups": subgroups(s, bootstrap),
    }
    if s.border is not None:
        result["shortcut"] = shortcut(s, bootstrap)
    if s.stressed:
        result["stress"] = stress_report([s])
    return result


def report_more(s: Scored, bootstrap: Bootstrap) -> dict:
    """The figures of more than two classes."""
    aurocs, sensitivities = {}, {}
    for c, name in enumerate(s.classes):
        estimates = binary_estimates(*s.against_rest(c), s.patients, bootstrap)
        aurocs[name] = estimates["auroc"]
        sensitivities[name] = estimates["sensitivity"]
    return {
        "metrics": measure([s], bootstrap).estimates(),
        "auroc_one_vs_rest": aurocs,
        "sensitivity_per_class": sensitivities,
        "confusion": confusion_matrix(s.labels, s.predicted, labels=range(len(s.classes))).tolist(),
    }


def group_estimates(s: Scored, mask: ndarray, bootstrap: Bootstrap) -> dict:
    """Counts, and of AUROC, sensitivity and specificity what is defined, of the images in a mask."""
    part = [values[mask] for values in s.binary]
    patients = patient_numbers(s.patients[mask])  # the draws are those of a report on these images alone
    metrics = binary_estimates(*part, patients, bootstrap)
    defined = {name: metrics[name] for name in MAIN if metrics[name]["value"] is not None}
    return {**counts(patients), **defined}


def thirds(values: list[str]) -> list[str]:
    """Numbers as the third that they lie in; other values, and numbers of three kinds or less, as they are.

    What stands for a missing value, such as NA, becomes empty.
    """
    values = ["" if value.lower() in MISSING else value for value in values]
    try:
        numbers = {value: float(value) for value in values if value}
    except ValueError:
        return values
    distinct = set(numbers.values())
    if len(distinct) <= 3 or not all(map(math.isfinite, distinct)):
        return values
    low, high = np.quantile([numbers[value] for value in values if value], (1 / 3, 2 / 3))
    names = {"": ""}
    for value, x in numbers.items():
        bound = high if x > low else low
        names[value] = f"> {high:g}" if x > high else f"<= {bound:g}"
    return [names[value] for value in values]


def subgroups(s: Scored, bootstrap: Bootstrap) -> dict[str, dict]:
    """By each further column of metadata.csv, and by subtype or, where there is none, by the series of file names."""
    columns = {"": [r.subtype or r.series for r in s.records]}
    for name in dict.fromkeys(name for r in s.records for name in r.groups):
        columns[f"{name} "] = thirds([r.groups.get(name, "") for r in s.records])
    groups = {}
    for column, values in columns.items():
        values = np.array(values, dtype=object)
        for value in sorted(set(values) - {""}):
            groups[f"{column}{value}"] = group_estimates(s, values == value, bootstrap)
    return groups


def shortcut(s: Scored, bootstrap: Bootstrap) -> dict:
    """What the border of the images tells without any lung, and how the model does where that misleads."""
    positive = s.labels == s.positive_index
    border = s.border > 0
    groups, shares = {}, []
    for c in (1 - s.positive_index, s.positive_index):
        mask = (s.labels == c) & (border != positive)
        if mask.any():
            groups[s.classes[c]] = group_estimates(s, mask, bootstrap)
            shares.append((s.predicted[mask] == c).mean())
    return {
        "border_auroc": binary_estimates(positive, s.border, border, s.patients, bootstrap)["auroc"],
        "groups": groups,
        "worst": min(shares, default=None),
    }


def stress_report(runs: list[Scored]) -> dict:
    """UNDER_STRESS of each stressed copy at the threshold in force, their mean and worst; means over the runs."""
    tables = []
    for s in runs:
        once = np.ones((1, len(s.records)))
        rows = []
        for logits in s.stressed.values():
            metrics = binary_metrics(*replace(s, logits=logits).binary, once)
            rows.append([metrics[name][0] for name in UNDER_STRESS])
        tables.append([*rows, np.mean(rows, axis=0), np.min(rows, axis=0)])
    names = [*runs[0].stressed, "mean", "worst"]
    means = np.mean(tables, axis=0)
    return {name: dict(zip(UNDER_STRESS, map(or_none, row))) for name, row in zip(names, means)}


def mistakes(s: Scored, count: int) -> list[dict]:
    """The most confident ones: where the truth was given the least probability."""
    of_truth = s.probabilities[np.arange(len(s.records)), s.labels]
    wrong = np.flatnonzero(s.predicted != s.labels)
    rows = []
    for i in wrong[np.argsort(of_truth[wrong], kind="stable")][:count]:
        of = s.positive_index if s.is_binary else s.predicted[i]
        r = s.records[i]
        rows.append(
            {
                "path": r.path,
                "label": r.label,
                "prediction": s.classes[s.predicted[i]],
                "probability": s.probabilities[i, of],
            }
        )
    return rows


def to_rows(s: Scored) -> list[dict]:
    """One row per image for the CSV; the figures follow from it, but those of stress, border and metadata.csv."""
    if s.is_binary:
        columns = {"logit": s.z, "probability": s.probabilities[:, s.positive_index]}
    else:
        columns = {f"logit_{name}": logits for name, logits in zip(s.classes, s.logits.T)}
        for name, probabilities in zip(s.classes, s.probabilities.T):
            columns[f"probability_{name}"] = probabilities
    demo = {"demo": "phantom"} if s.demo else {}
    rows = []
    for i, r in enumerate(s.records):
        row = {
            "path": r.path,
            "patient": r.patient,
            "subtype": r.subtype,
            "label": r.label,
            **{name: values[i] for name, values in columns.items()},
            "prediction": s.classes[s.predicted[i]],
            **demo,
        }
        rows.append(row)
    return rows


# --- comparison ---


@dataclass
class Measured:
    """A model's metrics: those of one run, or of several that differ in their seed alone."""

    runs: list[Scored]
    values: dict[str, ndarray]  # of each metric [runs, 1 + draws], see Bootstrap.values

    def estimates(self) -> dict[str, dict]:
        """{metric: see with_interval} of the mean over the runs."""
        s = self.runs[0]
        positive, _, predicted = s.binary
        result = {}
        for name, values in self.values.items():
            behind = patients_behind(name, positive, predicted, s.patients)
            if not s.is_binary:
                behind = patients_of_rarest(s.labels, s.patients)
            result[name] = with_interval(values, behind, LOWEST.get(name, 0))
        return result


def task_metrics(s: Scored, weights: ndarray) -> dict[str, ndarray]:
    """The main metrics of two classes; of more accuracy, and means over each class against the rest; each [draws]."""
    if s.is_binary:
        metrics = binary_metrics(*s.binary, weights)
        return {name: metrics[name] for name in ("auroc", "accuracy", "sensitivity", "specificity")}
    each = [binary_metrics(*s.against_rest(c), weights) for c in range(len(s.classes))]
    return {
        "auroc": np.mean([metrics["auroc"] for metrics in each], axis=0),
        "accuracy": weights @ (s.labels == s.predicted) / weights.sum(1),
        "balanced_accuracy": np.mean([metrics["sensitivity"] for metrics in each], axis=0),
    }


def measure(runs: list[Scored], bootstrap: Bootstrap) -> Measured:
    each = [bootstrap.values(functools.partial(task_metrics, s), s.patients) for s in runs]
    values = {name: np.stack([one[name] for one in each]) for name in each[0]}
    return Measured(runs, values)


def sign_flip_p(differences: ndarray) -> float:
    """Exact two-sided p of the sum of integers, one a patient, whose signs are random under the null (Fisher 1935).

    With one image a patient and the right answers of two models it is McNemar's exact test.
    """
    sizes = np.abs(differences[differences != 0])
    chance = np.ones(1)  # of each sum from -total to total
    for size in sizes:
        up = np.pad(chance, (2 * size, 0))
        down = np.pad(chance, (0, 2 * size))
        chance = (up + down) / 2
    sums = np.arange(len(chance)) - sizes.sum()
    as_far = np.abs(sums) >= abs(differences.sum())
    return min(1.0, chance[as_far].sum())


def right_answers(model: Measured) -> ndarray:
    """How many of its runs' answers are right, int64 [patients]."""
    return sum(np.bincount(s.patients, s.predicted == s.labels) for s in model.runs).astype(int)


def difference(model: Measured, reference: Measured, metric: str) -> dict:
    """{"value", "ci95", "p"} of the model's mean less the reference's, paired by patient; null without draws.

    Where few patients tell the accuracies apart, the draws make it too sure: the standard deviation is then at least
    what the exact test's p says (Altman and Bland 2011).
    """
    mine, theirs = model.values[metric], reference.values[metric]
    apart = mine.mean(0) - theirs.mean(0)
    value, drawn = apart[0], apart[1:]
    if math.isnan(value) or not len(drawn):
        return {"value": or_none(value), "ci95": None, "p": None}
    exact_p, least = 0.0, 0.0
    if metric == "accuracy":
        gaps = right_answers(model) * len(reference.runs) - right_answers(reference) * len(model.runs)
        if np.count_nonzero(gaps) <= 500:  # beyond these the draws are as good
            exact_p = sign_flip_p(gaps)
            least = abs(value) / max(-ndtri(exact_p / 2), 0.5)
    sd, freedom = deviation(drawn, [mine[:, 0], theirs[:, 0]], least)
    p = 2 * stdtr(freedom, -abs(value) / sd) if sd > 1e-9 else 1.0
    half = stdtrit(freedom, 0.975) * sd
    return {"value": value, "ci95": [value - half, value + half], "p": max(p, exact_p)}


def holm(p: list[float | None]) -> list[float]:
    """p-values adjusted for their number (Holm 1979); NaN where they are None, which all are or none."""
    p = np.array(p, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return adjusted.clip(max=1).tolist()


def worst_of(runs: list[Scored]) -> dict:
    """What a comparison says of stress and shortcuts: means over the runs, null where one of them has none."""
    result = {"stress": None, "shortcut": None}
    if all(s.stressed for s in runs):
        stress = stress_report(runs)
        result["stress"] = {"mean": stress["mean"], "worst": stress["worst"]}
    if all(s.border is not None for s in runs):
        worst = [shortcut(s, Bootstrap(0))["worst"] for s in runs]
        result["shortcut"] = or_none(np.mean(np.array(worst, float)))  # None is NaN
    return result


def compare(groups: list[list[Scored]], bootstrap: Bootstrap) -> dict:
    """Models on the same images, sorted by AUROC; all but the first, the reference, have their differences to it."""
    first = groups[0][0]
    measured = [measure([align(s, first) for s in runs], bootstrap) for runs in groups]
    entries = []
    for i, model in enumerate(measured, 1):
        runs = model.runs
        sources = [s.source for s in runs]
        entry = {
            **describe(runs[0]),
            "number": i,
            "checkpoint": ", ".join(sources),
            "sha256": [s.sha256 for s in runs],
            "unfinished": next((s.unfinished for s in runs if s.unfinished), ""),
            "runs": sources,
            "seeds": [s.arguments.get("seed") for s in runs if s.run],
            "metrics": model.estimates(),
            **worst_of(runs),
            "difference": {},
        }
        entries.append(entry)
    for metric in COMPARED:
        gaps = [difference(model, measured[0], metric) for model in measured[1:]]
        adjusted = holm([gap["p"] for gap in gaps])
        for entry, gap, p in zip(entries[1:], gaps, adjusted):
            entry["difference"][metric] = {**gap, "p_holm": or_none(p)}
    entries.sort(key=lambda entry: -(entry["metrics"]["auroc"]["value"] or 0))
    return {
        "split": first.split,
        **counts(first.patients),
        "demo": any(entry["data"]["demo"] for entry in entries),
        "compared": entries,
    }


# --- what a person reads: blocks of text and tables, as plain text or Markdown ---

TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "ppv": "PPV", "npv": "NPV", "f1": "F1", "mcc": "MCC"}


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list]  # what show takes


def as_text(block: str | Table) -> str:
    """A line, or a table with aligned columns, each at most 40 wide."""
    if isinstance(block, str):
        return data.printable(block)
    lines = ["", block.title] if block.title else [""]
    rows = [[shorten(show(cell)) for cell in row] for row in (block.header, *block.rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_markdown(block: str | Table) -> str:
    """A list item, or a table."""
    if isinstance(block, str):
        return f"- {data.printable(block)}"
    lines = ["", f"## {block.title}", ""] if block.title else [""]
    for row in (block.header, ["---"] * len(block.header), *block.rows):
        cells = [data.printable(show(cell)).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def show(cell: str | float | dict | None, digits: int = 3) -> str:
    """Text and counts as they are, figures rounded, estimates with their interval, a dash for what is undefined."""
    match cell:
        case None:
            return "-"
        case float():
            return f"{cell:.{digits}f}"
        case {"value": value, "ci95": [low, high]}:
            return f"{value:.3f} [{low:.3f}, {high:.3f}]"
        case {"value": value}:
            return show(value)
    return str(cell)


def show_p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else show(value)


def shorten(text: str, width: int = 40) -> str:
    """Without some of its first half, so that both a class's name and a file's can still be told."""
    text = data.printable(text)
    if len(text) <= width:
        return text
    front = (width - 3) // 3
    back = width - 3 - front
    return f"{text[:front]}...{text[-back:]}"


def title(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def header_lines(r: dict) -> list[str]:
    """What was scored, on what, and how."""
    d, t = r["data"], r["threshold"]
    size = f", {r['parameters'] / 1e6:.2f} M parameters" if r["parameters"] else ""
    prevalence = f", prevalence {d['prevalence']:.3f}" if d["prevalence"] is not None else ""
    demo = "; DEMO: synthetic phantoms, not radiographs" if d["demo"] else ""
    lines = [r["unfinished"]] if r["unfinished"] else []
    lines += [
        f"{r['model']}{size}: {r['checkpoint']}",
        f"{r['split']} split of {d['root']}{demo}",
        f"{d['images']} images of {d['patients']} patients{prevalence}; {len(d['left_out'])} left out",
    ]
    if "positive" in r:
        value = "" if t["value"] is None else f" {t['value']:.4f}"
        lines.append(f"threshold{value} on the probability of {r['positive']}: {t['rule']}, from {t['from']}")
    if r["bootstrap"]["draws"]:
        lines.append(f"95 % intervals: {r['bootstrap']['draws']} bootstrap draws of patients")
    return lines


def confusion_cells(r: dict) -> tuple[list[str], ndarray]:
    """Class names and counts, a row for each true class; of two classes the negative one first."""
    c = r["confusion"]
    if "positive" not in r:
        return r["classes"], np.array(c)
    names = sorted(r["classes"], key=lambda name: name == r["positive"])
    return names, np.array([[c["tn"], c["fp"]], [c["fn"], c["tp"]]])


def metric_table(name: str, columns: dict[str, dict]) -> Table:
    """A row for each metric, a column for each named set of them."""
    rows = []
    for metric in next(iter(columns.values())):
        estimates = [metrics.get(metric, "") for metrics in columns.values()]
        rows.append([title(metric), *estimates])
    return Table(name, ["", *columns], rows)


def group_table(name: str, groups: dict) -> Table:
    rows = []
    for group, g in groups.items():
        estimates = [g.get(metric, "") for metric in MAIN]
        rows.append([shorten(group, 20), f"{g['images']} ({g['patients']})", *estimates])
    return Table(name, ["", "n (patients)", *map(title, MAIN)], rows)


def extremes(groups: dict) -> list[str]:
    """The groups with the smallest and the largest value of each metric."""
    lines = []
    for metric in MAIN:
        values = {name: g[metric]["value"] for name, g in groups.items() if metric in g}
        if len(set(values.values())) > 1:
            smallest = min(values, key=values.get)
            largest = max(values, key=values.get)
            ends = [f"{values[name]:.3f} ({shorten(name, 24)})" for name in (smallest, largest)]
            lines.append(f"smallest and largest {title(metric)}: {', '.join(ends)}")
    return lines


def two_class_blocks(r: dict) -> list:
    c = r["calibration"]
    figures = ("brier", "nll", "ece", "slope", "intercept")
    rows = [
        ["as reported", *map(c.get, figures)],
        ["before temperature", *map(c["before_temperature"].get, figures)],
    ]
    blocks = [
        metric_table("", {"at the threshold": r["metrics"], "at 0.5": r["at_half"]}),
        Table("calibration", ["", *figures], rows),
    ]
    if c["temperature"] is not None:
        bound = ": at the bound of its fit, so validation could not tell it" if at_bound(c["temperature"]) else ""
        blocks.append(f"temperature {c['temperature']:.3f}{bound}")
    if c["exact"]:
        blocks.append(f"{c['exact']} probabilities within 1e-15 of 0 or 1 are left out of slope and intercept")
    if r["subgroups"]:
        blocks.append(group_table("subgroups", r["subgroups"]))
        blocks += extremes(r["subgroups"])
    if "shortcut" in r:
        name = "where the border of the image, without any lung, speaks for the other class"
        blocks.append(group_table(name, r["shortcut"]["groups"]))
        blocks.append(f"AUROC of the border alone: {show(r['shortcut']['border_auroc'])}")
    if "stress" in r:
        rows = [[name, *map(metrics.get, UNDER_STRESS)] for name, metrics in r["stress"].items()]
        blocks.append(Table("stress", ["", *map(title, UNDER_STRESS)], rows))
    return blocks


def more_class_blocks(r: dict) -> list:
    each = Table("each class", ["", "AUROC against the rest", "sensitivity"], [])
    for name, auroc in r["auroc_one_vs_rest"].items():
        each.rows.append([name, auroc, r["sensitivity_per_class"][name]])
    return [metric_table("", {"mean over the classes": r["metrics"]}), each]


def report_blocks(r: dict) -> list:
    """The report of one model, from its JSON."""
    blocks = header_lines(r)
    blocks += two_class_blocks(r) if "positive" in r else more_class_blocks(r)
    names, cells = confusion_cells(r)
    columns = [shorten(name, 14) for name in names]
    rows = [[name, *row] for name, row in zip(names, cells)]
    blocks.append(Table("confusion matrix (columns: predicted class)", ["true class", *columns], rows))
    if r["failures"]:
        columns = [f"P({r.get('positive', 'predicted')})", "true class", "predicted", "file"]
        table = Table("most confident mistakes", columns, [])
        for f in r["failures"]:
            names = [shorten(f[key], 20) for key in ("label", "prediction")]
            table.rows.append([show(f["probability"], 4), *names, f["path"]])
        blocks.append(table)
    return blocks


def card_lines(r: dict) -> list[str]:
    """What else a model card says (Mitchell et al. 2019), of what is known."""
    lines = ["intended use: research on radiographs like those of the training data; not for diagnosis"]
    if r["run"] and "fold" not in r["run"]["arguments"]:
        lines.append("cross-validation: each image was scored by a run that was not trained on it")
    elif r["run"]:
        n = r["run"]["images"]
        lines.append(f"trained on {n['train']} images, validated on {n['val']}, of {r['run']['data']}")
        lines.append(f"weights of epoch {r['run']['epoch']}; started from: {r['run']['weights']['note'] or 'unknown'}")
    lines.append("limits: measured on the images below alone; other hospitals, devices and ages were not")
    lines.append(f"SHA-256 {r['sha256']}; {r['provenance']['date']}; {r['provenance']['command']}")
    return lines


def comparison_blocks(c: dict) -> list:
    """The report of several models, from its JSON."""
    demo = "; DEMO: synthetic phantoms, not radiographs" if c["demo"] else ""
    blocks = [f"{c['split']} split, {c['images']} images of {c['patients']} patients{demo}"]
    model_columns = ["model", "AUROC", "accuracy", "sens.", "spec.", "params", "img/s"]
    shift_columns = ["mean AUROC", "worst AUROC", "worst sensitivity", "worst specificity", "worst border group"]
    scores = Table("", ["", *model_columns], [])
    differences = Table("difference to the reference", ["", "metric", "difference", "p", "p (Holm)"], [])
    seeds = Table("mean (standard deviation) over runs that differ by chance", ["", "seeds", "AUROC", "accuracy"], [])
    shifts = Table("under stress, and in the worst group of the border", ["", *shift_columns], [])
    for e in c["compared"]:
        number, metrics = e["number"], e["metrics"]
        role = " (reference)" if number == 1 else ""
        blocks.append(f"{number}{role}  {e['checkpoint']}  {e['unfinished']}".rstrip())
        estimates = [metrics[name] for name in COMPARED]
        sides = [metrics.get(name, {}).get("value") for name in ("sensitivity", "specificity")]
        size = f"{e['parameters'] / 1e6:.2f} M" if e["parameters"] else "-"
        speed = show(e["images_per_second"], 0)
        scores.rows.append([number, shorten(e["model"], 21), *estimates, *sides, size, speed])
        for metric, gap in e["difference"].items():
            p = [show_p(gap[name]) for name in ("p", "p_holm")]
            differences.rows.append([f"{number} - 1", title(metric), gap, *p])
        if len(e["runs"]) > 1:
            spread = [f"{show(estimate['value'])} ({show(estimate['sd'])})" for estimate in estimates]
            numbers = ", ".join(map(str, e["seeds"]))
            seeds.rows.append([number, numbers, *spread])
        if e["stress"] or e["shortcut"] is not None:
            stress = e["stress"] or {"mean": {}, "worst": {}}
            worst = [stress["worst"].get(name) for name in MAIN]
            shifts.rows.append([number, stress["mean"].get("auroc"), *worst, e["shortcut"]])
    blocks += [table for table in (scores, differences, seeds, shifts) if table.rows]
    blocks.append(
        "Sorted by AUROC: the top of a table is flattered by chance. Holm's p allow for the number of models."
    )
    if seeds.rows:
        blocks.append(
            "Of several runs the mean; its intervals hold the variation of training as well as that of testing."
        )
    return blocks


# --- pictures: one function per panel ---

GRID = np.linspace(0, 1, 101)
BLUE, ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito's set: they differ in lightness as well
COLOURS, STYLES = (BLUE, "k", ORANGE, "#009E73", "#CC79A7"), ("-", "--", "-.", ":")
CHANCE = {"color": "0.6", "ls": ":", "lw": 1}  # reference lines: chance, nobody treated, no difference
CHOSEN = {"color": "k", "ls": "--", "lw": 1}  # threshold, epoch


def new_figure(rows: int, columns: int, width: float, height: float):
    """A figure and its panels, without pyplot, which would look for a display."""
    from matplotlib import cycler, rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # file names may hold dollar signs
    rcParams["legend.fontsize"] = "small"
    rcParams["axes.prop_cycle"] = cycler(color=COLOURS * len(STYLES), ls=STYLES * len(COLOURS))
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(path: Path, figure) -> None:
    """In the format that the name ends with."""
    with warnings.catch_warnings(action="ignore"), data.replacing(path) as f:  # names may need glyphs that fonts lack
        figure.savefig(f, format=path.suffix[1:], dpi=300)


def curves(positive: ndarray, score: ndarray, weights: ndarray) -> dict[str, ndarray]:
    """Sensitivity over 1 - specificity, and precision over recall, on GRID: [draws with both classes, len(GRID)]."""
    both = weights[:, positive].any(1) & weights[:, ~positive].any(1)
    roc, precision_recall = np.empty((2, both.sum(), len(GRID)))
    for i, w in enumerate(weights[both]):
        fpr, tpr, _ = roc_curve(positive, score, sample_weight=w)
        roc[i] = np.interp(GRID, fpr, tpr)
        precision, recall, _ = precision_recall_curve(positive, score, sample_weight=w)
        precision_recall[i] = np.interp(GRID, recall[::-1], precision[::-1])
    return {"roc": roc, "precision_recall": precision_recall}


def band_and_point(ax, drawn: ndarray, x: float, y: float) -> None:
    """The 95 % band of the curves in drawn [1 + draws, len(GRID)], and the operating point unless it is NaN."""
    if len(drawn) > 1:
        low, high = np.percentile(drawn[1:], (2.5, 97.5), axis=0)
        ax.fill_between(GRID, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % band")
    if np.isfinite(x + y):
        ax.plot(x, y, "o", color=ORANGE, mec="k", ms=8, label="at the threshold", zorder=5)


def draw_roc(ax, label: str, positive: ndarray, score: ndarray) -> None:
    if positive.any() and not positive.all():
        fpr, tpr, _ = roc_curve(positive, score)
        ax.plot(fpr, tpr, label=label)


def finish_roc(ax) -> None:
    ax.plot([0, 1], [0, 1], **CHANCE, label="chance")
    ax.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
    ax.legend(loc="lower right")


def precision_panel(ax, label: str, positive: ndarray, score: ndarray) -> None:
    prevalence = positive.mean()
    if 0 < prevalence < 1:
        precision, recall, _ = precision_recall_curve(positive, score)
        ax.step(recall, precision, where="post", label=label)
    ax.axhline(prevalence, **CHANCE, label=f"prevalence {prevalence:.3f}")
    ax.set(title="precision-recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)", ylim=(0, 1.03))
    ax.legend()


def low_value_high(estimate: dict) -> list[float | None]:
    """For a line with a marker in its middle (markevery); without an interval the marker alone."""
    low, high = estimate["ci95"] or (None, None)
    return [low, estimate["value"], high]


def calibration_panel(ax, c: dict) -> None:
    """Observed over predicted with intervals; the counts stand above the panel, over their bins."""
    ax.plot([0, 1], [0, 1], **CHANCE)
    for point in c["curve"]:
        x = point["predicted"]
        ax.plot([x] * 3, low_value_high(point["observed"]), "o-", markevery=[1], color=BLUE, clip_on=False)
        middle = min(int(x * 10), 9) / 10 + 0.05
        ax.text(middle, 1.06, point["images"], ha="center", fontsize="x-small")
    ax.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(-0.03, 1.03))
    ax.set_title(f"calibration: slope {show(c['slope'], 2)}, intercept {show(c['intercept'], 2)}", pad=20)


def decision_panel(ax, r: dict) -> None:
    thresholds, model, everyone = ([row[key] for row in r["decision_curve"]] for key in ("threshold", "model", "all"))
    ax.plot(thresholds, everyone, "--", color=ORANGE, label="treat all")
    ax.axhline(0, **CHANCE, label="treat none")
    ax.plot(thresholds, model, "-", color=BLUE, label="as the model says")
    top = max(r["data"]["prevalence"], 0.05) * 1.1
    ax.set(title="decision curve", xlabel="threshold probability", ylabel="net benefit", ylim=(-top / 5, top))
    ax.legend()


def score_panel(ax, s: Scored, r: dict) -> None:
    z = s.z / s.temperature
    positive, _, _ = s.binary
    names, _ = confusion_cells(r)
    labels = [shorten(name, 20) for name in names]
    ax.hist([z[~positive], z[positive]], 40, color=[ORANGE, BLUE], histtype="stepfilled", alpha=0.6, label=labels)
    threshold = r["threshold"]["value"]
    if threshold is not None and 0 < threshold < 1:
        ax.axvline(logit(threshold), **CHOSEN, label="threshold")
    ax.set(title="scores", xlabel="calibrated logit", ylabel="images")
    ax.legend()


def confusion_panel(ax, r: dict) -> None:
    """Counts, and their share of the true class."""
    names, cells = confusion_cells(r)
    display = ConfusionMatrixDisplay(cells, display_labels=[shorten(name, 16) for name in names])
    display.plot(ax=ax, cmap="Greys", colorbar=False)
    shares = 100 * cells / np.maximum(cells.sum(1, keepdims=True), 1)
    for cell, text in np.ndenumerate(display.text_):
        text.set_text(f"{cells[cell]}\n{shares[cell]:.1f} %")
    ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=30, ha="right")
    ax.set(title="confusion matrix", xlabel="predicted", ylabel="true class")


def training_panel(ax, history: dict[str, list], selected: int | None) -> None:
    if not history:
        ax.set_axis_off()
        ax.set_title("no training history")
        return
    right = ax.twinx()
    epochs = history["epoch"]
    lines = [
        *ax.plot(epochs, history["train_loss"], "-", color=BLUE, label="training loss"),
        *ax.plot(epochs, history["val_loss"], "--", color=BLUE, label="validation loss"),
        *right.plot(epochs, history["val_auroc"], "o-", color=ORANGE, ms=3, label="validation AUROC"),
        ax.axvline(selected, **CHOSEN, label=f"epoch {selected}, selected"),
    ]
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(title="training", xlabel="epoch", ylabel="loss")
    right.set_ylabel("validation AUROC")
    ax.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def plot_report(s: Scored, r: dict, bootstrap: Bootstrap, history: dict[str, list]):
    """The figure of one model."""
    if "positive" in r:
        figure, axes = new_figure(2, 4, 17, 8)
        roc, precision, reliability, decision, matrix, scores, training, spare = axes.flat
        spare.set_axis_off()
        positive, score, _ = s.binary
        metrics = r["metrics"]
        drawn = bootstrap.values(functools.partial(curves, positive, score), s.patients)
        point = [metrics[name]["value"] for name in ("sensitivity", "specificity", "ppv")]
        sensitivity, specificity, ppv = np.array(point, float)  # NaN where undefined
        band_and_point(roc, drawn["roc"], 1 - specificity, sensitivity)
        band_and_point(precision, drawn["precision_recall"], sensitivity, ppv)
        draw_roc(roc, f"AUROC {show(metrics['auroc'])}", positive, score)
        precision_panel(precision, f"AUPRC {show(metrics['auprc'])}", positive, score)
        calibration_panel(reliability, r["calibration"])
        decision_panel(decision, r)
        score_panel(scores, s, r)
    else:
        figure, (roc, matrix, training) = new_figure(1, 3, 15, 5)
        for c, name in enumerate(s.classes):
            label = f"{shorten(name, 16)} {show(r['auroc_one_vs_rest'][name])}"
            draw_roc(roc, label, s.labels == c, s.probabilities[:, c])
    finish_roc(roc)
    confusion_panel(matrix, r)
    training_panel(training, history, s.run and s.run["epoch"])
    demo = "; DEMO: synthetic phantoms" if r["data"]["demo"] else ""
    figure.suptitle(f"{r['model']}, {r['split']} split, {r['data']['images']} images{demo} {r['unfinished']}")
    return figure


def plot_mistakes(s: Scored, r: dict, device: torch.device):
    """The twelve most confident mistakes; what spoke for the predicted class is tinted, scaled to its own maximum."""
    figure, axes = new_figure(3, 4, 11, 10.5)
    model = models.from_checkpoint(s.run, device)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, f in zip(axes.flat, mistakes(s, axes.size)):
        pixels, _ = data.read_image(Path(s.root, f["path"]), s.run["input_size"])
        x = data.to_input(torch.from_numpy(pixels)[None].to(device), s.run)
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        with contextlib.suppress(UserError):  # some architectures have no map to show
            maps = models.heat_map(model, x, s.classes.index(f["prediction"]))
            heat = maps[0].cpu().numpy()
            opacity = np.where(heat > 0.3, heat / 2, 0)
            ax.imshow(heat, cmap="autumn", vmin=0, vmax=1, alpha=opacity)
        lines = [
            shorten(Path(f["path"]).name, 34),
            f"true: {shorten(f['label'], 25)}",
            f"predicted: {shorten(f['prediction'], 25)}",
            f"P({shorten(r.get('positive', f['prediction']), 25)}) {f['probability']:.3f}",
        ]
        ax.set_title("\n".join(lines), fontsize="small")
    figure.suptitle(f"most confident mistakes of {s.model}; tinted: what spoke for the predicted class (HiResCAM)")
    return figure


def plot_comparison(groups: list[list[Scored]], c: dict):
    """ROC curves of the models, each one's first run, and the differences to the reference with their intervals."""
    figure, (roc, differences) = new_figure(1, 2, 13, 6)
    entries = sorted(c["compared"], key=lambda e: e["number"])
    names = [f"{e['number']}  {shorten(e['model'], 24)}" for e in entries]
    for name, e, runs in zip(names, entries, groups):
        positive, score, _ = runs[0].binary
        draw_roc(roc, f"{name}  {show(e['metrics']['auroc'])}", positive, score)
    finish_roc(roc)
    for metric, shift, colour in (("auroc", -0.1, BLUE), ("accuracy", 0.1, ORANGE)):
        differences.plot([], [], "o-", color=colour, label=title(metric))
        for i, e in enumerate(entries[1:], 1):
            gap = low_value_high(e["difference"][metric])
            differences.plot(gap, [i + shift] * 3, "o-", markevery=[1], color=colour)
    differences.axvline(0, **CHANCE)
    differences.set_yticks(range(1, len(names)), names[1:])
    differences.set_ylim(len(names) - 0.4, 0.4)  # the first on top
    differences.set(title=f"difference to the reference, {names[0]}", xlabel="difference, 95 % interval")
    differences.legend()
    return figure


# --- command line ---


def make_parser() -> data.Parser:
    parser = data.Parser(prog="evaluate.py", description="Score checkpoints, or the predictions of other programs.")
    add, share = parser.add_argument, data.within(float, 0, 1)
    add(
        "inputs",
        nargs="*",
        metavar="FILE",
        help="run, ckpt.pt or CSV; of several the first is the reference (newest run)",
    )
    add("--split", choices=("test", "val", "train"), default="test", help="which images")
    add("--data", type=data.filled, metavar="DIR", help="another folder with the same classes")
    add("--positive", metavar="CLASS", help="the positive label of a CSV (1, PNEUMONIA, else the last)")
    add("--threshold", type=share, metavar="P", help="for exploring: another threshold than the stored one")
    add("--stress", action="store_true", help="also under changed exposure, JPEG, blur, crop, noise and borders")
    add("--plots", action="store_true", help="write pictures, PNG and PDF (needs matplotlib)")
    add("--bootstrap", type=data.within(int, 0, 10**6), default=2000, metavar="N", help="draws for the intervals")
    add("--seed", type=data.within(int, 0, 2**32 - 1), default=0, help="of the bootstrap")
    add(
        "--output",
        type=data.filled,
        metavar="DIR",
        help="folder for the files (beside the checkpoint; none for a comparison)",
    )
    add("--json", action="store_true", help="print JSON alone")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def find_inputs(patterns: list[str]) -> list[str]:
    """The inputs, those of glob patterns that the shell has left alone too; the newest run where there are none."""
    inputs = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        inputs += found or [pattern]
    return inputs or [str(models.newest_checkpoint())]


def check_arguments(args: argparse.Namespace, checkpoints: dict[str, dict]) -> None:
    """Raise UserError where an option does not fit the inputs."""
    several_plots = args.plots and len(args.inputs) > 1
    more_classes = any(len(ckpt["classes"]) > 2 for ckpt in checkpoints.values())
    no_matplotlib = not importlib.util.find_spec("matplotlib")
    needs_images = args.stress or args.data
    no_csv = len(checkpoints) == len(args.inputs)
    problems = [
        (several_plots and not args.output, "--plots of several inputs needs --output DIR"),
        (more_classes and args.threshold is not None, "--threshold is for two classes; leave it out here"),
        (more_classes and args.stress, "--stress is for two classes; leave it out here"),
        (more_classes and several_plots, "--plots of a comparison is for two classes; leave it out here"),
        (needs_images and not checkpoints, "--stress and --data are for checkpoints: a CSV holds no images"),
        (no_csv and args.positive is not None, "--positive is for CSV files: a checkpoint knows its positive class"),
        (
            args.plots and no_matplotlib,
            "--plots needs matplotlib: pip install matplotlib",
        ),  # last: nothing to mend here
    ]
    for is_there, problem in problems:
        if is_there:
            raise UserError(problem)


def warn_leaks(scored: list[Scored]) -> None:
    """Say once which of the images were trained on, or served to choose epoch, temperature and threshold."""
    sources = defaultdict(list)
    for s in scored:
        if s.leaks:
            sources["trained", s.leaks["images"], s.leaks["patients"]].append(s.source)
            sources["chosen", s.leaks["val_images"], s.leaks["val_patients"]].append(s.source)
    for (how, images, patients), names in sources.items():
        if images or patients:
            warn(f"LEAK: {how} on {images} of these images and {patients} of these patients: {', '.join(names)}")


def read_history(folder: Path) -> dict[str, list]:
    """The curves of a run; pictures do without where there is no metrics.json."""
    try:
        epochs = json.loads((folder / "metrics.json").read_text())["epochs"]
        return {name: [float(h[name]) for h in epochs] for name in ("epoch", "train_loss", "val_loss", "val_auroc")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def card_text(heading: str, blocks: list) -> str:
    return "\n".join([f"# {heading}\n", *map(as_markdown, blocks)]) + "\n"


def pictures(stem: str, figure) -> list[tuple]:
    return [(f"{stem}.{kind}", save_figure, figure) for kind in ("png", "pdf")]


def report_files(s: Scored, r: dict, blocks: list, args: argparse.Namespace):
    """Yields for each file of one model its name, the function that writes it, and the content.

    They are named after the split, and another folder than the run's own.
    """
    stem = args.split
    if s.run is None:
        stem = f"{Path(s.source).stem}.scored"  # the test.csv of a run must not replace its test.json
    if args.data:
        folder = data.find_root(args.data).resolve()
        stem = "-".join([stem, *folder.parts[-2:]])
    card = "report.md" if args.output or stem == "test" else f"{stem}.md"
    yield f"{stem}.json", data.write_json, r
    yield card, data.write_text, card_text(f"Model card: {s.model}", [*card_lines(r), *blocks])
    if s.run:
        yield f"{stem}.csv", data.write_csv, to_rows(s)
    if args.plots:
        alone = s.run is not None and len(args.inputs) == 1  # neither another program's predictions nor pooled runs
        history = read_history(models.in_run_folder(s.source).parent) if alone else {}
        fewer = Bootstrap(min(args.bootstrap, 300), args.seed)
        yield from pictures(stem, plot_report(s, r, fewer, history))
        if alone and r["failures"]:
            try:
                yield from pictures(f"{stem}-mistakes", plot_mistakes(s, r, models.pick_device(args.device)))
            except UserError as e:  # a file that can no longer be read
                warn(f"no picture of the mistakes: {e}")


def comparison_files(groups: list[list[Scored]], c: dict, blocks: list, args: argparse.Namespace):
    """The same of a comparison."""
    yield "compare.json", data.write_json, c
    yield "report.md", data.write_text, card_text("Comparison of models", blocks)
    if args.plots:
        yield from pictures("compare", plot_comparison(groups, c))


def run(args: argparse.Namespace) -> None:
    args.inputs = find_inputs(args.inputs)
    read_split.cache_clear()  # a folder may have changed since another call in this process
    checkpoints = {path: models.load(path) for path in args.inputs if not path.lower().endswith(".csv")}
    check_arguments(args, checkpoints)
    roots = {data.find_root(args.data or ckpt["data"]["root"]) for ckpt in checkpoints.values()}
    for root in sorted(roots):
        data.prepare_demo(root)
    scored = []
    for path in args.inputs:
        ckpt = checkpoints.get(path)
        scored.append(score_checkpoint(path, ckpt, args) if ckpt else score_csv(path, args))
    warn_leaks(scored)
    if args.split == "val":
        scored = [pool(runs) for runs in group_runs(scored, "fold")]
    bootstrap = Bootstrap(args.bootstrap, args.seed)
    if len(scored) == 1:
        result = {**report(scored[0], bootstrap), **provenance(args)}
        blocks = report_blocks(result)
        files = report_files(scored[0], result, blocks, args)
    else:
        groups = group_runs(scored, "seed", "fold")  # of one model: all of its runs are tested on the same images
        result = {**compare(groups, bootstrap), **provenance(args)}
        blocks = comparison_blocks(result)
        files = comparison_files(groups, result, blocks, args)
    written = []
    if args.output or len(args.inputs) == 1:  # several inputs have no folder but --output
        folder = Path(args.output or models.in_run_folder(args.inputs[0]).parent)
        folder.mkdir(parents=True, exist_ok=True)
        for name, write, content in files:
            write(folder / name, content)
            written.append(str(folder / name))
    print(json.dumps(result, indent=1) if args.json else "\n".join(map(as_text, blocks)))
    names = ", ".join(written) or "nothing; --output DIR keeps the report"
    print(f"\nwritten: {data.printable(names)}", file=sys.stderr if args.json else sys.stdout)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    data.run_script(parser, lambda: run(args))


if __name__ == "__main__":
    main()
