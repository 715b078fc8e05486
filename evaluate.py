"""Score one checkpoint on a split of its data, or compare several on the same images.

python evaluate.py                              # the newest run, on the test split
python evaluate.py runs/A/ckpt.pt --plots       # writes test.json, test.csv and test.png beside the checkpoint
python evaluate.py runs/*/ckpt.pt               # one sorted table, with paired differences
python evaluate.py predictions.csv              # what another program predicted: path, label, probability
"""

import argparse
import csv
import importlib.util
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import expit, log_expit, logit

import data
import models

METRICS = ("auroc", "auprc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "ppv", "npv", "f1", "mcc")
TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "ppv": "PPV", "npv": "NPV", "f1": "F1", "mcc": "MCC"}
SPLITS = ("test", "val", "train")


# --- metrics on weighted images: one row of weights is one draw of the bootstrap ---


def confusion(positive: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weighted tp, fp, fn, tn, each [draws], from bool [images] twice and weights [draws, images]."""
    cells = [positive & predicted, ~positive & predicted, positive & ~predicted, ~positive & ~predicted]
    return tuple((weights @ np.stack(cells, 1).astype(float)).T)


def rates(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of a confusion matrix; NaN where one is undefined (its denominator is zero)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        return {
            "accuracy": (tp + tn) / (tp + fp + fn + tn),
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "f1": 2 * tp / (2 * tp + fp + fn),
            "mcc": (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
        }


def ranking(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC (ties count half) and AUPRC (average precision, a step function), each [draws]; NaN without both classes."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))  # first image of each group of equal scores
    w = weights[:, order]
    pos = np.add.reduceat(w * positive[order], starts, axis=1)
    neg = np.add.reduceat(w * ~positive[order], starts, axis=1)
    above = np.cumsum(pos, 1)
    false = np.cumsum(neg, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = (neg * (above - pos / 2)).sum(1) / (above[:, -1] * false[:, -1])
        precision = np.where(above + false > 0, above / (above + false), 0)
        auprc = (pos * precision).sum(1) / above[:, -1]
        return {"auroc": auroc, "auprc": np.where(false[:, -1] > 0, auprc, np.nan)}


def draw_weights(patients: list[str], draws: int, seed: int) -> np.ndarray:
    """How often each image counts in each draw, [draws, images]: patients are resampled, with all of their images."""
    keys, patient = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=draws)
    return counts[:, patient].astype(np.float64)


def interval(values: np.ndarray) -> list[float] | None:
    """The 2.5 and 97.5 % points of a bootstrap; None where it is undefined in most draws or was not drawn."""
    finite = values[np.isfinite(values)]
    return np.percentile(finite, (2.5, 97.5)).tolist() if len(finite) >= max(20, len(values) / 2) else None


def number(value: float) -> float | None:
    """A float for JSON: null where it is undefined."""
    return float(value) if math.isfinite(value) else None


def with_interval(point: np.ndarray, drawn: np.ndarray, patients: int) -> dict:
    """{"value", "ci95"}; no interval from fewer than two patients."""
    value = number(point[0])
    return {"value": value, "ci95": interval(drawn) if value is not None and patients > 1 else None}


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; NaN without both classes."""
    return float(ranking(positive, score, np.ones((1, len(score))))["auroc"][0]) if len(score) else math.nan


def macro_auroc(labels: np.ndarray, probabilities: np.ndarray, positive: int) -> float:
    """AUROC of the positive class where there are two classes, else the mean of one class against the rest."""
    classes = [positive] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return float(np.mean([auroc(labels == c, probabilities[:, c]) for c in classes]))


def calibration(positive: np.ndarray, z: np.ndarray) -> dict[str, float | None]:
    """Brier score, negative log-likelihood, ECE (10 equal bins), calibration slope and intercept, from logits z.

    Slope: of a logistic regression on the logit (1 is ideal); intercept: calibration in the large, with the slope fixed
    at 1 (0 is ideal); Van Calster et al. 2019. Both are None where the classes are separated or one is missing.
    """
    p, y = expit(z), positive.astype(float)
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs(p[bins == b].sum() - y[bins == b].sum()) for b in range(10)]
    result = {"brier": float(np.mean((p - y) ** 2)), "nll": nll(positive, z), "ece": float(sum(gaps) / len(p))}
    slope = intercept = None
    if positive.any() and not positive.all() and not separated(z[positive], z[~positive]):
        bound = float(np.abs(z).max()) + 50
        intercept = float(brentq(lambda a: float(np.mean(expit(z + a) - y)), -bound, bound))
        scale = max(float(np.std(z)), 1e-12)
        fit = minimize(lambda b: -np.mean(log_expit(np.where(positive, 1, -1) * (b[0] + b[1] * z / scale))), [0.0, 1.0])
        slope = float(fit.x[1] / scale)
    return result | {"slope": slope, "intercept": intercept}


def separated(a: np.ndarray, b: np.ndarray) -> bool:
    """No logistic regression has a finite slope: the two do not overlap, or all are equal."""
    return bool(a.min() >= b.max() or b.min() >= a.max())


def nll(positive: np.ndarray, z: np.ndarray) -> float:
    """Mean negative log-likelihood of binary labels, from logits."""
    return float(-np.mean(log_expit(np.where(positive, z, -z))))


# --- what is chosen on validation ---


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature in [0.05, 20] that minimises the negative log-likelihood (Guo et al. 2017).

    Args:
        logits: float [images, classes]; labels: int [images].
    """

    def loss(log_t: float) -> float:
        z = logits.astype(np.float64) / math.exp(log_t)
        z = z - z.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]))

    bound = math.log(20)
    return float(math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def choose_threshold(rule: str, positive: np.ndarray, z: np.ndarray) -> float:
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
    score = np.unique(z)[::-1]
    tp = np.searchsorted(np.sort(-z[positive]), -score, side="right")
    fp = np.searchsorted(np.sort(-z[~positive]), -score, side="right")
    sensitivity, specificity = tp / positive.sum(), 1 - fp / (~positive).sum()
    if rule == "youden":
        i = int(np.argmax(sensitivity + specificity))
    else:
        i = int(np.argmax(sensitivity >= float(rule.split("=")[1]) - 1e-12))
    below = score[i + 1] if i + 1 < len(score) else score[i] - 1e-6  # rounding must not put the lowest score under it
    return float(expit((score[i] + below) / 2))


# --- scoring ---


@torch.inference_mode()
def infer(model: torch.nn.Module, batches, mean: float, std: float, device: torch.device) -> np.ndarray:
    """Logits, float64 [images, classes], of an iterable of uint8 batches [batch, side, side]; in float32 throughout."""
    logits = []
    for batch in batches:
        x = data.normalise(batch.to(device, non_blocking=True), mean, std)
        logits.append(model(x.to(memory_format=torch.channels_last)).float())
    return torch.cat(logits).cpu().double().numpy()


def in_batches(images: torch.Tensor, index: torch.Tensor, size: int = 256):
    """Yield uint8 batches of the images at index."""
    for i in range(0, len(index), size):
        yield images[index[i : i + size]]


def infer_stressed(model: torch.nn.Module, images: torch.Tensor, index: torch.Tensor, *preprocessing) -> dict:
    """{name of the stress: logits [len(index), classes]}; preprocessing is mean, std and device, as for infer."""
    found = defaultdict(list)
    for batch in in_batches(images, index):
        for name, copy in data.stress(batch.cpu()):
            found[name].append(infer(model, [copy], *preprocessing))
    return {name: np.concatenate(logits) for name, logits in found.items()}


def binary_logit(logits: np.ndarray, positive: int) -> np.ndarray:
    """The logit of the positive one of two classes."""
    return logits[:, positive] - logits[:, 1 - positive]


def score_checkpoint(path: str, args: argparse.Namespace) -> dict:
    """Run a checkpoint over a split; what report() needs, with one row per image."""
    ckpt = models.load(path)
    root = data.find_root(args.data or ckpt["data"]["root"])
    if data.is_demo(root):
        data.warn_demo(root)
    wanted = None
    if args.split != "test":
        # All that training read, in its order: the same cache file serves.
        records = data.scan(root, "train") + (data.scan(root, "val") if (root / "val").is_dir() else [])
        if data.fingerprint(records) == ckpt["data"]["fingerprint"]:
            held_out = set(ckpt["data"]["val"])
            wanted = [(r["path"] in held_out) == (args.split == "val") for r in records]
        elif not args.data:
            raise data.DataError(f"the images in {root} have changed since {path} was trained: its splits are gone")
    if wanted is None:
        records = data.scan(root, args.split)
        wanted = [True] * len(records)
    if {r["class"] for r in records} - set(ckpt["classes"]):
        raise data.DataError(f"{path} knows the classes {', '.join(ckpt['classes'])}; {root} has others")
    images, digests, failed = data.load_images(root, records, ckpt["input_size"])
    left_out = data.report_left_out(records, {i: reason for i, reason in failed.items() if wanted[i]})
    keep = [i for i in range(len(records)) if wanted[i] and i not in failed]
    records, index = [records[i] for i in keep], torch.tensor(keep)
    if not records:
        raise data.DataError(f"no image of {root}/{args.split} can be read")
    device = models.pick_device(args.device)
    model = models.from_checkpoint(ckpt, device)
    preprocessing = ckpt["mean"], ckpt["std"], device
    start = time.perf_counter()
    logits = infer(model, in_batches(images, index), *preprocessing)
    seconds = time.perf_counter() - start
    known_pixels, known_patients = set(ckpt["data"]["pixels"].tolist()), set(ckpt["data"]["patients"])
    stressed = infer_stressed(model, images, index, *preprocessing) if args.stress else {}
    return {
        "checkpoint": str(path),
        "model": ckpt["model"],
        "parameters": models.parameters(model),
        "classes": ckpt["classes"],
        "positive": ckpt["classes"].index(ckpt["positive"]),
        "split": args.split,
        "root": str(root),
        "demo": data.is_demo(root) or ckpt["data"]["demo"],
        "left_out": left_out,
        "records": records,
        "labels": np.array([ckpt["classes"].index(r["class"]) for r in records]),
        "logits": logits,
        "stressed": stressed,
        "temperature": ckpt["temperature"],
        "threshold": ckpt["threshold"],
        "images_per_second": len(records) / seconds,
        "leaks": {
            "images": sum(d in known_pixels for d in digests[index].tolist()),
            "patients": len(data.named_patients(records) & known_patients),
        },
        "arguments": ckpt["arguments"],
    }


def score_csv(path: str, args: argparse.Namespace) -> dict:
    """Read the predictions of another program: columns path, label, probability (of the positive class), patient."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise data.DataError(f"{path} can't be read: {e}") from None
    if not rows or any(r.get(k) is None for r in rows for k in ("path", "label", "probability")):
        raise data.DataError(f"{path} needs a header with the columns path, label, probability, and one row per image")
    if {"flags", "error"} <= rows[0].keys():
        raise data.DataError(f"{path} comes from predict.py, whose labels are predictions, not the truth")
    try:
        p = np.array([float(r["probability"]) for r in rows])
    except (TypeError, ValueError):
        raise data.DataError(f"{path}: column probability holds something that is no number") from None
    if not ((p >= 0) & (p <= 1)).all():
        raise data.DataError(f"{path}: probabilities must lie in [0, 1]")
    if len({r["path"] for r in rows}) < len(rows):
        raise data.DataError(f"{path}: a path stands there twice")
    names = sorted({r["label"] for r in rows})
    if set(names) <= {"0", "1"}:
        names = ["0", "1"]
    elif set(names) <= {"NORMAL", "PNEUMONIA"}:
        names = ["NORMAL", "PNEUMONIA"]
    if len(names) != 2:
        raise data.DataError(f"{path}: expected two labels, found {', '.join(names)}")
    positive = names.index("PNEUMONIA") if "PNEUMONIA" in names else 1
    records = []
    for r in rows:
        patient, subtype, _ = data.identify(Path(r["path"]).name)
        records.append({"path": r["path"], "class": r["label"], "patient": r.get("patient") or patient or r["path"]})
        records[-1]["subtype"] = r.get("subtype") or subtype
    z = logit(p.clip(1e-15, 1 - 1e-15))  # a probability of exactly 0 or 1 stays finite
    logits = np.stack((np.zeros_like(z), z), 1)
    return {
        "checkpoint": str(path),
        "model": Path(path).stem,
        "parameters": None,
        "classes": names,
        "positive": positive,
        "split": "predictions",
        "root": str(path),
        "demo": False,
        "left_out": [],
        "records": records,
        "labels": np.array([names.index(r["class"]) for r in records]),
        "logits": logits if positive == 1 else logits[:, ::-1],
        "stressed": {},
        "temperature": 1.0,
        "threshold": {"value": 0.5, "rule": "0.5", "from": "default"},
        "images_per_second": None,
        "leaks": {"images": 0, "patients": 0},
        "arguments": None,
    }


def choose(scored: dict, override: str | None) -> dict:
    """The threshold in force: the stored one, or the user's, recorded as such."""
    if override is None:
        return scored["threshold"]
    return {"value": float(override), "rule": override, "from": "command line"}


def predict_classes(scored: dict, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities [images, classes] and predicted classes [images]."""
    p = models.probabilities(torch.from_numpy(scored["logits"].copy()), scored["temperature"]).numpy()
    if p.shape[1] > 2:
        return p, p.argmax(1)
    positive = scored["positive"]
    return p, np.where(p[:, positive] >= threshold, positive, 1 - positive)


def report(scored: dict, weights: np.ndarray, args: argparse.Namespace) -> dict:
    """Everything that the printed report and the JSON say about one scored checkpoint.

    Args:
        scored: from score_checkpoint or score_csv.
        weights: [draws, images] from draw_weights.
    """
    records, labels, binary = scored["records"], scored["labels"], len(scored["classes"]) == 2
    threshold = choose(scored, args.threshold) if binary else {"value": None, "rule": "largest probability", "from": ""}
    p, predicted = predict_classes(scored, threshold["value"])
    patients = len({r["patient"] for r in records})
    result = {k: scored[k] for k in ("checkpoint", "model", "parameters", "split", "classes")}
    result["data"] = {
        "root": scored["root"],
        "demo": scored["demo"],
        "images": len(records),
        "patients": patients,
        "left_out": scored["left_out"],
        "leaks": scored["leaks"],
    }
    result |= {"images_per_second": scored["images_per_second"], "threshold": threshold}
    result["bootstrap"] = {"unit": "patient", "draws": len(weights), "seed": args.seed}
    once = np.ones((1, len(records)))

    def estimate(metric, *columns: np.ndarray, of: np.ndarray | None = None) -> dict[str, dict]:
        """{metric: {"value", "ci95"}} of the images in mask of."""
        of = np.ones(len(records), bool) if of is None else of
        columns = [c[of] for c in columns]
        groups = len({r["patient"] for r, m in zip(records, of) if m})
        point = metric(*columns, once[:, of])
        drawn = metric(*columns, weights[:, of])
        return {k: with_interval(point[k], drawn[k], groups) for k in point}

    def matrix(*columns: np.ndarray) -> dict[str, np.ndarray]:
        return rates(*confusion(*columns))

    if not binary:
        one = {c: estimate(ranking, labels == i, p[:, i])["auroc"] for i, c in enumerate(scored["classes"])}
        recall = {
            c: estimate(matrix, labels == i, predicted == i)["sensitivity"] for i, c in enumerate(scored["classes"])
        }
        hit = (labels == predicted).astype(float)

        def overall(w: np.ndarray) -> dict[str, np.ndarray]:
            each = [ranking(labels == i, p[:, i], w)["auroc"] for i in range(p.shape[1])]
            recalls = [(w * hit)[:, labels == i].sum(1) / w[:, labels == i].sum(1) for i in range(p.shape[1])]
            return {"auroc": np.mean(each, 0), "accuracy": w @ hit / w.sum(1), "balanced_accuracy": np.mean(recalls, 0)}

        with np.errstate(divide="ignore", invalid="ignore"):
            point, drawn = overall(once), overall(weights)
        result["metrics"] = {k: with_interval(point[k], drawn[k], patients) for k in point}
        result |= {"auroc_one_vs_rest": one, "sensitivity_per_class": recall}
        pairs = range(p.shape[1])
        result["confusion"] = [[int(((labels == i) & (predicted == j)).sum()) for j in pairs] for i in pairs]
        result["failures"] = failures(scored, labels != predicted, p.max(1), p.max(1))
        return result

    positive, z = labels == scored["positive"], binary_logit(scored["logits"], scored["positive"])
    score, called = p[:, scored["positive"]], predicted == scored["positive"]
    result["positive"] = scored["classes"][scored["positive"]]
    result["data"]["prevalence"] = float(positive.mean())
    found = estimate(ranking, positive, score) | estimate(matrix, positive, called)
    result["metrics"] = {k: found[k] for k in METRICS}
    result["at_half"] = estimate(matrix, positive, score >= 0.5)
    counts = [int(v[0]) for v in confusion(positive, called, once)]
    result["confusion"] = dict(zip(("tp", "fp", "fn", "tn"), counts))
    if args.prevalence is not None:

        def at_prevalence(*columns: np.ndarray) -> dict[str, np.ndarray]:
            r, q = matrix(*columns), args.prevalence
            tp, fp = r["sensitivity"] * q, (1 - r["specificity"]) * (1 - q)
            fn, tn = (1 - r["sensitivity"]) * q, r["specificity"] * (1 - q)
            return {k: v for k, v in rates(tp, fp, fn, tn).items() if k in ("ppv", "npv")}

        result["at_prevalence"] = {"prevalence": args.prevalence} | estimate(at_prevalence, positive, called)
    result["calibration"] = calibration(positive, z / scored["temperature"])
    result["calibration"] |= {"temperature": scored["temperature"], "before_temperature": calibration(positive, z)}
    result["subgroups"] = {}
    groups = defaultdict(list)
    for i, r in enumerate(records):
        groups[r["subtype"]].append(i) if positive[i] else groups[data.identify(Path(r["path"]).name)[2]].append(i)
    for name, members in sorted(groups.items()):
        mask = np.zeros(len(records), bool)
        mask[members] = True
        for side, metric in ((positive, "sensitivity"), (~positive, "specificity")):
            if name and (mask & side).any():
                entry = {"images": int((mask & side).sum())}
                entry["patients"] = len({records[i]["patient"] for i in np.flatnonzero(mask & side)})
                entry[metric] = estimate(matrix, positive, called, of=mask & side)[metric]
                result["subgroups"][name] = entry
    if scored["stressed"]:
        result["stress"] = stress_report(scored, positive, threshold["value"])
    result["failures"] = failures(scored, called != positive, score, np.abs(score - threshold["value"]))
    return result


def failures(scored: dict, wrong: np.ndarray, probability: np.ndarray, confidence: np.ndarray) -> list[dict]:
    """The ten most confident mistakes."""
    found = sorted(np.flatnonzero(wrong), key=lambda i: -confidence[i])[:10]
    records = scored["records"]
    return [
        {"path": records[i]["path"], "label": records[i]["class"], "probability": float(probability[i])} for i in found
    ]


def stress_report(scored: dict, positive: np.ndarray, threshold: float) -> dict:
    """AUROC, sensitivity and specificity of each stressed copy at the threshold in force; their mean and worst."""
    rows = {}
    for name, logits in scored["stressed"].items():
        z = binary_logit(logits, scored["positive"]) / scored["temperature"]
        found = rates(*confusion(positive, expit(z) >= threshold, np.ones((1, len(z)))))
        rows[name] = {"auroc": number(auroc(positive, z))}
        rows[name] |= {k: number(found[k][0]) for k in ("sensitivity", "specificity", "balanced_accuracy")}
    summary = {}
    for name, how in (("mean", np.mean), ("worst", np.min)):
        summary[name] = {
            k: None if None in (v := [r[k] for r in rows.values()]) else float(how(v)) for k in rows["blur"]
        }
    return rows | summary


def to_rows(scored: dict, threshold: float | None) -> tuple[list[dict], list[str]]:
    """One row per image for the CSV, and its columns; every figure of the report follows from it."""
    p, predicted = predict_classes(scored, threshold)
    classes, positive = scored["classes"], scored["positive"]
    rows = []
    for i, r in enumerate(scored["records"]):
        row = {k: r[k] for k in ("path", "patient", "subtype")} | {"label": r["class"]}
        if len(classes) == 2:
            z = binary_logit(scored["logits"][i : i + 1], positive)[0]
            row |= {"logit": f"{z:.9g}", "probability": f"{p[i, positive]:.9g}"}
        else:
            row |= {f"logit_{c}": f"{scored['logits'][i, j]:.9g}" for j, c in enumerate(classes)}
            row |= {f"probability_{c}": f"{p[i, j]:.9g}" for j, c in enumerate(classes)}
        rows.append(row | {"prediction": classes[predicted[i]]} | ({"demo": "phantom"} if scored["demo"] else {}))
    return rows, list(rows[0])


# --- comparison ---


def align(scored: list[dict]) -> None:
    """Bring all into the order of the first one's images; DataError where they did not score the same task."""
    first = scored[0]
    paths = [r["path"] for r in first["records"]]
    for s in scored[1:]:
        both = f"{s['checkpoint']} and {first['checkpoint']}"
        if (s["classes"], s["positive"]) != (first["classes"], first["positive"]):
            names = " and ".join(", ".join(c["classes"]) for c in (s, first))
            raise data.DataError(f"{both} tell other classes apart ({names}): they can't be compared")
        place = {r["path"]: i for i, r in enumerate(s["records"])}
        if odd := place.keys() ^ set(paths):
            raise data.DataError(f"{both} do not score the same images ({len(odd)} paths differ, such as {min(odd)})")
        order = [place[p] for p in paths]
        s["records"] = [s["records"][i] for i in order]
        s["labels"], s["logits"] = s["labels"][order], s["logits"][order]
        if (s["labels"] != first["labels"]).any():
            raise data.DataError(f"{both} do not agree on the labels")


def areas_and_accuracy(s: dict, threshold: float | None, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC (macro) and accuracy, each [draws]."""
    p, predicted = predict_classes(s, threshold)
    some = [s["positive"]] if p.shape[1] == 2 else range(p.shape[1])
    area = np.mean([ranking(s["labels"] == c, p[:, c], weights)["auroc"] for c in some], 0)
    return {"auroc": area, "accuracy": weights @ (predicted == s["labels"]).astype(float) / weights.sum(1)}


def compare(scored: list[dict], args: argparse.Namespace) -> dict:
    """All on the same images: a list sorted by AUROC, and paired differences to the best (patient bootstrap)."""
    align(scored)
    records = scored[0]["records"]
    patients = len({r["patient"] for r in records})
    weights = draw_weights([r["patient"] for r in records], args.bootstrap, args.seed)
    entries = []
    for s in scored:
        full = report(s, weights, args)
        entry = {k: full[k] for k in ("checkpoint", "model", "parameters", "images_per_second", "threshold", "metrics")}
        entry |= {"leaks": s["leaks"], "stress": full.get("stress"), "arguments": s["arguments"]}
        drawn = areas_and_accuracy(s, full["threshold"]["value"], np.vstack([np.ones(len(records)), weights]))
        entries.append((entry, drawn))
    entries.sort(key=lambda e: -(e[0]["metrics"]["auroc"]["value"] or 0))
    best = entries[0][1]
    for entry, drawn in entries[1:]:
        entry["difference"] = {}
        for k in ("auroc", "accuracy"):
            gaps = drawn[k] - best[k]
            point, gaps = gaps[:1], gaps[1:][np.isfinite(gaps[1:])]
            tail = min((gaps <= 0).sum(), (gaps >= 0).sum())
            p_value = min(1.0, 2 * (tail + 1) / (len(gaps) + 1)) if len(gaps) else None
            entry["difference"][k] = with_interval(point, gaps, patients) | {"p": p_value if patients > 1 else None}
    result = {"split": args.split, "images": len(records), "demo": any(s["demo"] for s in scored)}
    result |= {"patients": patients, "compared": [e[0] for e in entries]}
    result["over_seeds"] = over_seeds(result["compared"])
    for e in result["compared"]:
        del e["arguments"]
    return result


def over_seeds(entries: list[dict]) -> list[dict]:
    """Mean and standard deviation over the runs that differ in their seed alone."""
    groups = defaultdict(list)
    for e in entries:
        if e["arguments"] is not None:
            groups[json.dumps({k: v for k, v in e["arguments"].items() if k != "seed"}, sort_keys=True)].append(e)
    result = []
    for group in (g for g in groups.values() if len({e["arguments"]["seed"] for e in g}) > 1):
        summary = {"model": group[0]["model"], "seeds": sorted(e["arguments"]["seed"] for e in group)}
        for k in ("auroc", "accuracy", "sensitivity", "specificity"):
            values = [e["metrics"][k]["value"] for e in group if k in e["metrics"]]
            if values and None not in values:
                summary[k] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        result.append(summary)
    return result


# --- what a person reads ---


def show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_interval(entry: dict) -> str:
    ci = entry["ci95"]
    return f"{show(entry['value']):>6} {'[' + show(ci[0]) + ', ' + show(ci[1]) + ']' if ci else '-':<16}"


def print_report(r: dict) -> None:
    d, t = r["data"], r["threshold"]
    size = f" ({r['parameters'] / 1e6:.2f} M parameters)" if r["parameters"] else ""
    print(f"{r['model']}{size}   {r['checkpoint']}")
    demo = "   DEMO: synthetic phantoms, not radiographs" if d["demo"] else ""
    print(f"{r['split']} split of {d['root']}{demo}")
    prevalence = f", prevalence {d['prevalence']:.3f}" if "prevalence" in d else ""
    print(f"{d['images']} images of {d['patients']} patients{prevalence}; {len(d['left_out'])} left out")
    if t["value"] is not None:
        print(f"threshold {t['value']:.4f} on the probability of {r['positive']}: {t['rule']}, from {t['from']}")
    print(f"95 % intervals: {r['bootstrap']['draws']} bootstrap draws of patients\n")
    if "at_half" not in r:
        for k, v in r["metrics"].items():
            print(f"{'macro ' if k == 'auroc' else ''}{TITLES.get(k, k.replace('_', ' ')):18} {show_interval(v)}")
        for c in r["classes"]:
            print(f"{c:18} AUROC {show_interval(r['auroc_one_vs_rest'][c])}", end="  ")
            print(f"sensitivity {show_interval(r['sensitivity_per_class'][c])}")
        print("\nconfusion (rows: true class)")
        for c, row in zip(r["classes"], r["confusion"]):
            print(f"  {c:16}" + "".join(f"{v:8}" for v in row))
        print_failures(r)
        return
    print(f"{'':18} {'at the threshold':24} at 0.5")
    for k in METRICS:
        half = show_interval(r["at_half"][k]) if k in r["at_half"] else ""
        print(f"{TITLES.get(k, k.replace('_', ' ')):18} {show_interval(r['metrics'][k])}  {half}".rstrip())
    if "at_prevalence" in r:
        a = r["at_prevalence"]
        print(f"at a prevalence of {a['prevalence']:g}: PPV {show_interval(a['ppv'])} NPV {show_interval(a['npv'])}")
    c = r["confusion"]
    print(f"\nconfusion: {c['tp']} true and {c['fp']} false positives, {c['tn']} true and {c['fn']} false negatives")
    for title, c in (("calibration", r["calibration"]), ("  uncalibrated", r["calibration"]["before_temperature"])):
        figures = "  ".join(f"{k} {show(c[k])}" for k in ("brier", "nll", "ece", "slope", "intercept"))
        print(f"{title:14} {figures}" + (f"  (T = {c['temperature']:.3f})" if "temperature" in c else ""))
    for name, g in r["subgroups"].items():
        metric = "sensitivity" if "sensitivity" in g else "specificity"
        print(f"{name:14} {metric} {show_interval(g[metric])} {g['images']} images of {g['patients']} patients")
    if "stress" in r:
        print(f"\n{'stress':18} {'AUROC':>7} {'sensitivity':>12} {'specificity':>12} {'their mean':>11}")
        for name, row in r["stress"].items():
            print(f"{name:18} {show(row['auroc']):>7} {show(row['sensitivity']):>12}", end=" ")
            print(f"{show(row['specificity']):>12} {show(row['balanced_accuracy']):>11}")
    print_failures(r)


def print_failures(r: dict) -> None:
    if r["failures"]:
        print("\nmost confident mistakes (probability, true class, file)")
    for f in r["failures"]:
        print(f"  {f['probability']:.4f}  {f['label']:10} {f['path']}")


def print_comparison(c: dict) -> None:
    print(
        f"{c['split']} split, {c['images']} images of {c['patients']} patients{' (DEMO: phantoms)' if c['demo'] else ''}\n"
    )
    print(f"{'AUROC':23} {'accuracy':23} {'sens.':>6} {'spec.':>6} {'params':>7} {'img/s':>6}  model")
    for e in c["compared"]:
        m = e["metrics"]
        size = f"{e['parameters'] / 1e6:.2f} M" if e["parameters"] else "-"
        sides = " ".join(f"{show(m[k]['value'] if k in m else None):>6}" for k in ("sensitivity", "specificity"))
        print(f"{show_interval(m['auroc'])} {show_interval(m['accuracy'])} {sides}", end=" ")
        print(f"{size:>7} {show(e['images_per_second'], 0):>6}  {e['model']}\n    {e['checkpoint']}")
    if len(c["compared"]) > 1:
        print(f"\npaired difference to the best, {c['compared'][0]['checkpoint']}")
    for e in c["compared"][1:]:
        for k, v in e["difference"].items():
            print(f"{TITLES.get(k, k):9} {show_interval(v)} p = {show(v['p'])}   {e['checkpoint']}")
    for s in c["over_seeds"]:
        figures = ", ".join(f"{TITLES.get(k, k)} {v['mean']:.3f} ({v['sd']:.3f})" for k, v in s.items() if "mean" in v)
        print(f"\n{s['model']} over seeds {', '.join(map(str, s['seeds']))}, mean (sd)\n  {figures}")


def plot(scored: dict, r: dict, weights: np.ndarray, history: list[dict], path: Path) -> None:
    """One PNG, 1,600 pixels wide: ROC, precision-recall, reliability, confusion, scores, and the training curves."""
    import matplotlib  # an optional extra

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positive = scored["labels"] == scored["positive"]
    z = binary_logit(scored["logits"], scored["positive"]) / scored["temperature"]
    p, threshold, m = expit(z), r["threshold"]["value"], r["metrics"]
    fig, ax = plt.subplots(2, 3, figsize=(16, 10), dpi=100, layout="constrained")
    grid = np.linspace(0, 1, 101)

    def curve(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(-p)
        ends = np.flatnonzero(np.diff(p[order], append=-1))
        return np.cumsum(w * positive[order])[ends], np.cumsum(w * ~positive[order])[ends]

    def roc(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tp, fp = curve(w)
        return np.append(0, fp / max(fp[-1], 1e-12)), np.append(0, tp / max(tp[-1], 1e-12))

    order = np.argsort(-p)
    a = ax[0, 0]
    if len(weights):
        band = np.percentile([np.interp(grid, *roc(w[order])) for w in weights[:500]], (2.5, 97.5), axis=0)
        a.fill_between(grid, *band, color="0.85", label="95 % interval")
    a.plot(*roc(np.ones(len(p))), "k-", label=f"AUROC {show(m['auroc']['value'])}")
    a.plot([0, 1], [0, 1], "k:", lw=1)
    if m["specificity"]["value"] is not None and m["sensitivity"]["value"] is not None:
        a.plot(1 - m["specificity"]["value"], m["sensitivity"]["value"], "ko", ms=8, label=f"threshold {threshold:.3f}")
    a.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    a.legend(loc="lower right")
    a = ax[0, 1]
    tp, fp = curve(np.ones(len(p)))
    a.step(tp / max(tp[-1], 1), tp / (tp + fp), "k-", where="post", label=f"AUPRC {show(m['auprc']['value'])}")
    a.axhline(positive.mean(), color="k", ls=":", lw=1, label=f"prevalence {positive.mean():.3f}")
    a.set(title="Precision-recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)", ylim=(0, 1.05))
    a.legend(loc="lower left")
    a = ax[0, 2]
    bins = np.minimum((p * 10).astype(int), 9)
    used = [b for b in range(10) if (bins == b).any()]
    x, y = [p[bins == b].mean() for b in used], [positive[bins == b].mean() for b in used]
    a.plot([0, 1], [0, 1], "k:", lw=1)
    a.plot(x, y, "ko-")
    for b, px, py in zip(used, x, y):
        below = py > 0.5
        a.annotate(str((bins == b).sum()), (px, py), (0, -14 if below else 8), textcoords="offset points", ha="center")
    ece = show(r["calibration"]["ece"])
    a.set(title=f"Reliability (counts; ECE {ece})", xlabel="predicted probability", ylabel="observed frequency")
    a.set(xlim=(-0.05, 1.05), ylim=(-0.1, 1.1))
    a = ax[1, 0]
    c, names = r["confusion"], [scored["classes"][1 - scored["positive"]], scored["classes"][scored["positive"]]]
    cells = np.array([[c["tn"], c["fp"]], [c["fn"], c["tp"]]])
    a.imshow(cells, cmap="Greys", vmin=0, vmax=max(cells.max(), 1) * 1.3)
    for i, j in np.ndindex(2, 2):
        a.text(
            j,
            i,
            cells[i, j],
            ha="center",
            va="center",
            fontsize=22,
            color="w" if cells[i, j] > cells.max() * 0.7 else "k",
        )
    a.set(title="Confusion matrix", xlabel="predicted", ylabel="true", xticks=[0, 1], yticks=[0, 1])
    a.set_xticklabels(names)
    a.set_yticklabels(names, rotation=90, va="center")
    a = ax[1, 1]
    edges = np.linspace(min(z.min(), -1), max(z.max(), 1), 41)
    a.hist(z[~positive], edges, color="0.75", label=names[0])
    a.hist(z[positive], edges, histtype="step", color="k", lw=1.5, label=names[1])
    if 0 < threshold < 1:
        a.axvline(logit(threshold), color="k", ls="--", lw=1, label="threshold")
    a.set(title="Scores", xlabel="calibrated logit", ylabel="images")
    a.legend()
    a = ax[1, 2]
    if history:
        epochs = [h["epoch"] for h in history]
        a.plot(epochs, [h["train_loss"] for h in history], "k-", label="training loss")
        a.plot(epochs, [h["val_loss"] for h in history], "k--", label="validation loss")
        a.set(title="Training", xlabel="epoch", ylabel="loss")
        b = a.twinx()
        b.plot(epochs, [h["val_auroc"] for h in history], "o-", color="0.5", ms=4, label="validation AUROC (right)")
        a.legend(
            *[x + y for x, y in zip(a.get_legend_handles_labels(), b.get_legend_handles_labels())], loc="center right"
        )
    else:
        a.set_axis_off()
        a.text(0.5, 0.5, "no metrics.json beside the checkpoint", ha="center")
    demo = "   DEMO DATA: synthetic phantoms" if r["data"]["demo"] else ""
    fig.suptitle(f"{r['model']}, {r['split']} split, {r['data']['images']} images{demo}")
    temporary = path.with_name(f".{path.name}.tmp")
    fig.savefig(temporary, format="png")
    plt.close(fig)
    temporary.replace(path)


def make_parser() -> argparse.ArgumentParser:
    parser = data.Parser(prog="evaluate.py", description="Score checkpoints, or the predictions of other programs.")
    parser.add_argument("inputs", nargs="*", metavar="FILE", help="ckpt.pt or CSV; several are compared (newest run)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which images")
    parser.add_argument("--data", metavar="DIR", help="another folder with the same classes")
    parser.add_argument(
        "--threshold",
        type=data.within(float, 0, 1),
        metavar="P",
        help="for exploring: another threshold than the stored one",
    )
    parser.add_argument(
        "--prevalence", type=data.within(float, 0, 1), metavar="P", help="PPV and NPV at this prevalence too"
    )
    parser.add_argument("--stress", action="store_true", help="also under changed exposure, JPEG, blur and crop")
    parser.add_argument("--plots", action="store_true", help="write a PNG (needs matplotlib)")
    parser.add_argument(
        "--bootstrap", type=data.within(int, 0, 10**6), default=2000, metavar="N", help="draws for the intervals"
    )
    parser.add_argument("--seed", type=data.within(int, 0, 2**32 - 1), default=0, help="of the bootstrap")
    parser.add_argument("--output", metavar="DIR", help="folder for the files (beside the checkpoint)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def run(args: argparse.Namespace) -> None:
    inputs = args.inputs or [str(models.newest_checkpoint())]
    if args.plots and len(inputs) > 1:
        raise data.DataError("--plots draws one checkpoint; leave it out of a comparison")
    if args.plots and not importlib.util.find_spec("matplotlib"):
        raise data.DataError("--plots needs matplotlib: pip install matplotlib")
    scored = [score_csv(i, args) if i.endswith(".csv") else score_checkpoint(i, args) for i in inputs]
    for s in scored:
        if any(s["leaks"].values()):
            n, m = s["leaks"]["images"], s["leaks"]["patients"]
            data.warn(f"LEAK: {s['checkpoint']} was trained on {n} of these images and {m} of these patients")
    folder = Path(args.output) if args.output else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    if args.plots and len(scored[0]["classes"]) > 2:
        raise data.DataError("--plots draws two classes; leave it out here")
    if len(scored) > 1:
        result = compare(scored, args)
        if folder:
            data.write_atomic(folder / "compare.json", json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1)) if args.json else print_comparison(result)
        return
    s = scored[0]
    weights = draw_weights([r["patient"] for r in s["records"]], args.bootstrap, args.seed)
    result = report(s, weights, args)
    is_csv = inputs[0].endswith(".csv")
    # Scoring the test.csv of a run must not replace its test.json.
    stem = f"{Path(inputs[0]).stem}.scored" if is_csv else args.split
    if args.data:
        stem += f"-{data.find_root(args.data).resolve().name}"
    beside = Path(inputs[0]) if Path(inputs[0]).is_dir() else Path(inputs[0]).parent  # a run folder names its ckpt.pt
    folder = folder or beside
    if not is_csv:
        rows, columns = to_rows(s, result["threshold"]["value"])
        data.write_atomic(folder / f"{stem}.csv", data.to_csv(rows, columns))
    data.write_atomic(folder / f"{stem}.json", json.dumps(result, indent=1) + "\n")
    if args.plots:
        metrics = beside / "metrics.json"
        history = json.loads(metrics.read_text())["epochs"] if metrics.exists() else []
        plot(s, result, weights, history, folder / f"{stem}.png")
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print_report(result)
        print(f"\nwritten: {folder / stem}.json" + ("" if is_csv else ", .csv") + (", .png" if args.plots else ""))


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        run(args)
    except (data.DataError, models.ModelError, OSError) as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
