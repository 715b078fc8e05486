"""Score one checkpoint on a split of its data, or compare several on the same images.

python evaluate.py                              # the newest run, on the test split
python evaluate.py runs/A/ckpt.pt --plots       # writes test.json, test.csv and test.png beside the checkpoint
python evaluate.py runs/*/ckpt.pt               # one sorted table, with paired differences
python evaluate.py predictions.csv              # what another program predicted: path, label, probability
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit

import data
import models

TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "ppv": "PPV", "npv": "NPV", "f1": "F1", "mcc": "MCC"}


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
    above, false = np.cumsum(pos, 1), np.cumsum(neg, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = (neg * (above - pos / 2)).sum(1) / (above[:, -1] * false[:, -1])
        precision = np.where(above + false > 0, above / (above + false), 0)
        auprc = (pos * precision).sum(1) / above[:, -1]
        return {"auroc": auroc, "auprc": np.where(false[:, -1] > 0, auprc, np.nan)}


def binary_rates(positive: np.ndarray, called: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The rates, each [draws], of bool labels and predictions."""
    return rates(*confusion(positive, called, weights))


def at_prevalence(share: float, positive: np.ndarray, called: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The rates that their sensitivity and specificity give where another share of the images is positive."""
    found = binary_rates(positive, called, weights)
    tp, tn = found["sensitivity"] * share, found["specificity"] * (1 - share)
    return rates(tp, (1 - found["specificity"]) * (1 - share), (1 - found["sensitivity"]) * share, tn)


def binary_metrics(positive: np.ndarray, score: np.ndarray, called: np.ndarray, weights: np.ndarray) -> dict:
    """Every metric, each [draws], of bool labels, scores and bool predictions."""
    return ranking(positive, score, weights) | binary_rates(positive, called, weights)


def task_metrics(labels: np.ndarray, p: np.ndarray, predicted: np.ndarray, positive: int, weights: np.ndarray) -> dict:
    """Every metric, each [draws], of two classes; of more: accuracy, and means over each class against the rest.

    labels, predicted: int [images]; p: probabilities [images, classes].
    """
    some = [positive] if p.shape[1] == 2 else range(p.shape[1])
    each = [binary_metrics(labels == c, p[:, c], predicted == c, weights) for c in some]
    if len(each) == 1:
        return each[0]
    area, recall = (np.mean([e[k] for e in each], 0) for k in ("auroc", "sensitivity"))
    accuracy = weights @ (labels == predicted) / weights.sum(1)
    return {"auroc": area, "accuracy": accuracy, "balanced_accuracy": recall}


def draw_weights(patients: list[str], draws: int, seed: int) -> np.ndarray:
    """How often each image counts in each draw, [draws, images]: patients are resampled, with all of their images."""
    keys, patient = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=draws)
    return counts[:, patient].astype(np.float64)


def number(value: float) -> float | None:
    """A float for JSON: null where it is undefined."""
    return float(value) if math.isfinite(value) else None


def with_interval(point: np.ndarray, drawn: np.ndarray, patients: int) -> dict:
    """{"value", "ci95"}: point [1], and the 2.5 and 97.5 % points of its bootstrap, drawn [draws].

    No interval where the value is undefined, or in most draws, or was not drawn, or from fewer than two patients.
    """
    value, finite = number(point[0]), drawn[np.isfinite(drawn)]
    enough = value is not None and patients > 1 and len(finite) >= max(20, len(drawn) / 2)
    return {"value": value, "ci95": np.percentile(finite, (2.5, 97.5)).tolist() if enough else None}


def macro_auroc(labels: np.ndarray, probabilities: np.ndarray, positive: int) -> float:
    """AUROC of the positive class where there are two classes, else the mean of one class against the rest."""
    once = np.ones((1, len(labels)))
    return float(task_metrics(labels, probabilities, probabilities.argmax(1), positive, once)["auroc"][0])


def auroc_error(area: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC from so many positive and negative images (Hanley and McNeil 1982)."""
    pair, triple = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    variance = (area * (1 - area) + (positives - 1) * pair + (negatives - 1) * triple) / (positives * negatives)
    return math.sqrt(max(variance, 0.0))


def nll(positive: np.ndarray, z: np.ndarray) -> float:
    """Mean negative log-likelihood of binary labels, from logits."""
    return float(-np.mean(log_expit(np.where(positive, z, -z))))


def calibration(positive: np.ndarray, z: np.ndarray) -> dict[str, float | None]:
    """Brier score, negative log-likelihood, ECE (10 equal bins), calibration slope and intercept, from logits z.

    Slope: of a logistic regression on the logit (1 is ideal); intercept: calibration in the large, with the slope fixed
    at 1 (0 is ideal); Van Calster et al. 2019. Both are None where the classes are separated or one is missing.
    """
    p, y = expit(z), positive.astype(float)
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs(p[bins == b].sum() - y[bins == b].sum()) for b in range(10)]
    result = {"brier": float(np.mean((p - y) ** 2)), "nll": nll(positive, z), "ece": float(sum(gaps) / len(p))}
    result |= {"slope": None, "intercept": None}
    a, b = z[positive], z[~positive]
    # No logistic regression has a finite slope where the classes do not overlap, or all scores are equal.
    if len(a) and len(b) and a.min() < b.max() and b.min() < a.max():
        scale = max(float(np.std(z)), 1e-12)
        fit = minimize(lambda c: nll(positive, c[0] + c[1] * z / scale), [0.0, 1.0])
        bound = float(np.abs(z).max()) + 50
        result["slope"] = float(fit.x[1] / scale)
        result["intercept"] = float(brentq(lambda shift: float(np.mean(expit(z + shift) - y)), -bound, bound))
    return result


# --- what is chosen on validation ---


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature in [0.05, 20] that minimises the negative log-likelihood (Guo et al. 2017).

    Args:
        logits: float [images, classes]; labels: int [images].
    """

    def loss(log_t: float) -> float:
        log_p = log_softmax(logits.astype(np.float64) / math.exp(log_t), axis=1)
        return float(-np.mean(log_p[np.arange(len(labels)), labels]))

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
    wanted = sensitivity + specificity if rule == "youden" else sensitivity >= float(rule.split("=")[1]) - 1e-12
    i = int(np.argmax(wanted))
    below = score[i + 1] if i + 1 < len(score) else score[i] - 1e-6  # rounding must not put the lowest score under it
    return float(expit((score[i] + below) / 2))


# --- scoring: a checkpoint or a CSV becomes one dict, scored, with a row per image in records, labels and logits ---


@torch.inference_mode()
def infer(model: torch.nn.Module, batches, mean: float, std: float, device: torch.device) -> np.ndarray:
    """Logits, float64 [images, classes], of an iterable of uint8 batches [batch, side, side]; in float32 throughout."""
    logits = []
    for batch in batches:
        x = data.normalise(batch.to(device, non_blocking=True), mean, std)
        logits.append(model(x.to(memory_format=torch.channels_last)).float())
    return torch.cat(logits).cpu().double().numpy()


def in_batches(images: torch.Tensor, index: torch.Tensor, size: int = 64):
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
    drawn = False  # whether training drew this split from what it read
    if args.split != "test":
        # All that training read, in its order: the same cache file serves.
        records = data.scan(root, "train") + (data.scan(root, "val") if (root / "val").is_dir() else [])
        drawn = data.fingerprint(records) == ckpt["data"]["fingerprint"]
        if not drawn and not args.data:
            raise data.DataError(f"the images in {root} have changed since {path} was trained: its splits are gone")
    else:
        records = data.scan(root, "test")
    held_out = set(ckpt["data"]["val"])
    for r in records if drawn else ():
        r["split"] = "val" if r["path"] in held_out else "train"
    wanted = [r["split"] == args.split for r in records]
    if not any(wanted):
        raise data.DataError(f"{root} has no folder {args.split}/")
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
    leaks = {"images": sum(d in known_pixels for d in digests[index].tolist())}
    leaks["patients"] = len(data.named_patients(records) & known_patients)
    scored = {k: ckpt[k] for k in ("model", "classes", "temperature", "threshold", "arguments")}
    scored |= {"checkpoint": str(path), "split": args.split, "root": str(root), "left_out": left_out, "leaks": leaks}
    scored |= {"parameters": models.parameters(model), "images_per_second": len(records) / seconds}
    scored |= {"demo": data.is_demo(root) or ckpt["data"]["demo"], "records": records, "logits": logits}
    scored["stressed"] = {}
    if args.stress and len(ckpt["classes"]) == 2:
        scored["stressed"] = infer_stressed(model, images, index, *preprocessing)
    scored["positive"] = ckpt["classes"].index(ckpt["positive"])
    return scored | {"labels": np.array([ckpt["classes"].index(r["class"]) for r in records])}


def score_csv(path: str) -> dict:
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
    for known in (["0", "1"], ["NORMAL", "PNEUMONIA"]):
        if set(names) <= set(known):  # one of the two alone will do
            names = known
    if len(names) != 2 or "" in names:
        raise data.DataError(f"{path}: expected two labels, found {', '.join(names)}")
    positive = data.positive_class(names)
    records = []
    for r in rows:
        patient, subtype, _ = data.identify(Path(r["path"]).name)
        records.append({"path": r["path"], "class": r["label"], "patient": r.get("patient") or patient or r["path"]})
        records[-1]["subtype"] = r.get("subtype") or subtype
    logits = np.zeros((len(p), 2))
    logits[:, positive] = logit(p.clip(1e-15, 1 - 1e-15))  # a probability of exactly 0 or 1 stays finite
    scored = {"checkpoint": str(path), "model": Path(path).stem, "split": "predictions", "root": str(path)}
    scored |= {"classes": names, "positive": positive, "records": records, "logits": logits}
    scored |= {"parameters": None, "images_per_second": None, "demo": False, "stressed": {}, "arguments": None}
    scored |= {"left_out": [], "leaks": {"images": 0, "patients": 0}, "temperature": 1.0}
    scored["threshold"] = {"value": 0.5, "rule": "0.5", "from": "default"}
    return scored | {"labels": np.array([names.index(r["class"]) for r in records])}


def predict_classes(scored: dict, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities [images, classes] and predicted classes [images]."""
    p = models.probabilities(torch.from_numpy(scored["logits"]), scored["temperature"]).numpy()
    if p.shape[1] > 2:
        return p, p.argmax(1)
    positive = scored["positive"]
    return p, np.where(p[:, positive] >= threshold, positive, 1 - positive)


def report(scored: dict, weights: np.ndarray, args: argparse.Namespace) -> dict:
    """Everything that the printed report and the JSON say about one scored checkpoint.

    scored: from score_checkpoint or score_csv; weights: [draws, images] from draw_weights.
    """
    records, labels, classes, target = (scored[k] for k in ("records", "labels", "classes", "positive"))
    binary, threshold = len(classes) == 2, scored["threshold"]
    if binary and args.threshold is not None:
        threshold = {"value": args.threshold, "rule": f"{args.threshold:g}", "from": "command line"}
    p, predicted = predict_classes(scored, threshold["value"])
    patients, everyone = np.array([r["patient"] for r in records]), np.ones(len(records), bool)

    def estimate(metrics, *about, of: np.ndarray = everyone) -> dict[str, dict]:
        """{metric: {"value", "ci95"}} of the images in the mask of."""
        point, drawn = metrics(*about, of[None].astype(float)), metrics(*about, weights * of)
        return {k: with_interval(point[k], drawn[k], len(set(patients[of]))) for k in point}

    result = {k: scored[k] for k in ("checkpoint", "model", "parameters", "split", "classes")}
    result["data"] = {"root": scored["root"], "demo": scored["demo"], "images": len(records)}
    result["data"] |= {"patients": len(set(patients)), "left_out": scored["left_out"], "leaks": scored["leaks"]}
    result |= {"images_per_second": scored["images_per_second"], "threshold": threshold}
    result["bootstrap"] = {"unit": "patient", "draws": len(weights), "seed": args.seed}
    if binary:
        positive, called, score = labels == target, predicted == target, p[:, target]
        result["positive"] = classes[target]
        result["data"]["prevalence"] = float(positive.mean())
        result["metrics"] = estimate(binary_metrics, positive, score, called)
        result["at_half"] = estimate(binary_rates, positive, score >= 0.5)
        cells = confusion(positive, called, np.ones(len(records)))
        result["confusion"] = {k: int(v) for k, v in zip(("tp", "fp", "fn", "tn"), cells)}
        if args.prevalence is not None:
            found = estimate(at_prevalence, args.prevalence, positive, called)
            result["at_prevalence"] = {"prevalence": args.prevalence, "ppv": found["ppv"], "npv": found["npv"]}
        z = binary_logit(scored["logits"], target)
        result["calibration"] = calibration(positive, z / scored["temperature"])
        result["calibration"] |= {"temperature": scored["temperature"], "before_temperature": calibration(positive, z)}
        result["subgroups"] = {}
        # Positives by their subtype, negatives by the series that their file names belong to.
        names = [r["subtype"] if y else data.identify(Path(r["path"]).name)[2] for r, y in zip(records, positive)]
        for name in sorted(set(names) - {""}):
            for side, metric in ((positive, "sensitivity"), (~positive, "specificity")):
                mask = side & (np.array(names) == name)
                if mask.any():
                    entry = {"images": int(mask.sum()), "patients": len(set(patients[mask]))}
                    entry[metric] = estimate(binary_rates, positive, called, of=mask)[metric]
                    result["subgroups"][name] = entry
        if scored["stressed"]:
            result["stress"] = stress_report(scored, positive, threshold["value"])
    else:
        score, n = p.max(1), len(classes)
        result["metrics"] = estimate(task_metrics, labels, p, predicted, target)
        each = [estimate(binary_metrics, labels == c, p[:, c], predicted == c) for c in range(n)]
        result["auroc_one_vs_rest"] = {c: e["auroc"] for c, e in zip(classes, each)}
        result["sensitivity_per_class"] = {c: e["sensitivity"] for c, e in zip(classes, each)}
        result["confusion"] = np.bincount(labels * n + predicted, minlength=n * n).reshape(n, n).tolist()
    # The ten most confident mistakes: the farthest from the threshold, or where there is none the most probable.
    confidence = np.abs(score - (threshold["value"] or 0))
    result["failures"] = []
    for i in sorted(np.flatnonzero(predicted != labels), key=lambda i: -confidence[i])[:10]:
        r = records[i]
        result["failures"].append({"path": r["path"], "label": r["class"], "probability": float(score[i])})
    return result


def stress_report(scored: dict, positive: np.ndarray, threshold: float) -> dict:
    """AUROC, sensitivity and specificity of each stressed copy at the threshold in force; their mean and worst."""
    rows = {}
    for name, logits in scored["stressed"].items():
        z = binary_logit(logits, scored["positive"]) / scored["temperature"]
        found = binary_metrics(positive, z, expit(z) >= threshold, np.ones((1, len(z))))
        rows[name] = {k: found[k][0] for k in ("auroc", "sensitivity", "specificity", "balanced_accuracy")}
    columns = {k: [row[k] for row in rows.values()] for k in rows["blur"]}
    rows |= {name: {k: how(v) for k, v in columns.items()} for name, how in (("mean", np.mean), ("worst", np.min))}
    return {name: {k: number(v) for k, v in row.items()} for name, row in rows.items()}


def to_rows(scored: dict, threshold: float | None) -> list[dict]:
    """One row per image for the CSV; every figure of the report follows from it."""
    p, predicted = predict_classes(scored, threshold)
    classes, positive, logits = scored["classes"], scored["positive"], scored["logits"]
    if len(classes) == 2:
        columns = {"logit": binary_logit(logits, positive), "probability": p[:, positive]}
    else:
        columns = {f"logit_{c}": logits[:, j] for j, c in enumerate(classes)}
        columns |= {f"probability_{c}": p[:, j] for j, c in enumerate(classes)}
    rows = []
    for i, r in enumerate(scored["records"]):
        row = {k: r[k] for k in ("path", "patient", "subtype")} | {"label": r["class"]}
        row |= {k: f"{v[i]:.9g}" for k, v in columns.items()} | {"prediction": classes[predicted[i]]}
        rows.append(row | ({"demo": "phantom"} if scored["demo"] else {}))
    return rows


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
        s["stressed"] = {name: logits[order] for name, logits in s["stressed"].items()}
        if (s["labels"] != first["labels"]).any():
            raise data.DataError(f"{both} do not agree on the labels")


def compare(scored: list[dict], args: argparse.Namespace) -> dict:
    """All on the same images: a list sorted by AUROC, and paired differences to the best (patient bootstrap)."""
    align(scored)
    patients = [r["patient"] for r in scored[0]["records"]]
    count, weights = len(set(patients)), draw_weights(patients, args.bootstrap, args.seed)
    with_point = np.vstack([np.ones(len(patients)), weights])
    found = []
    for s in scored:
        full = report(s, weights, args)
        entry = {k: full[k] for k in ("checkpoint", "model", "parameters", "images_per_second", "threshold", "metrics")}
        entry |= {"leaks": s["leaks"], "stress": full.get("stress")}
        p, predicted = predict_classes(s, full["threshold"]["value"])
        found.append((entry, task_metrics(s["labels"], p, predicted, s["positive"], with_point), s["arguments"]))
    found.sort(key=lambda e: -(e[0]["metrics"]["auroc"]["value"] or 0))
    best = found[0][1]
    for entry, drawn, _ in found[1:]:
        entry["difference"] = {}
        for k in ("auroc", "accuracy"):
            gaps = drawn[k] - best[k]
            point, gaps = gaps[:1], gaps[1:][np.isfinite(gaps[1:])]
            tail = min((gaps <= 0).sum(), (gaps >= 0).sum())
            p_value = min(1.0, 2 * (tail + 1) / (len(gaps) + 1)) if len(gaps) and count > 1 else None
            entry["difference"][k] = with_interval(point, gaps, count) | {"p": p_value}
    result = {
        "split": scored[0]["split"],
        "images": len(patients),
        "demo": any(s["demo"] for s in scored),
        "patients": count,
    }
    result["compared"] = [entry for entry, _, _ in found]
    return result | {"over_seeds": over_seeds([entry | {"arguments": a} for entry, _, a in found])}


def over_seeds(entries: list[dict]) -> list[dict]:
    """Mean and standard deviation over the runs that differ in their seed alone."""
    groups = defaultdict(list)
    for e in entries:
        if e["arguments"] is not None:
            groups[json.dumps({k: v for k, v in e["arguments"].items() if k != "seed"}, sort_keys=True)].append(e)
    result = []
    for group in groups.values():
        seeds = sorted(e["arguments"]["seed"] for e in group)
        if len(set(seeds)) == 1:
            continue
        result.append({"model": group[0]["model"], "seeds": seeds})
        for k in ("auroc", "accuracy", "sensitivity", "specificity"):
            values = [e["metrics"][k]["value"] for e in group if k in e["metrics"]]
            if values and None not in values:
                result[-1][k] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
    return result


# --- what a person reads ---


def title(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_interval(entry: dict) -> str:
    ci = entry["ci95"]
    return f"{show(entry['value']):>6} {'[' + show(ci[0]) + ', ' + show(ci[1]) + ']' if ci else '-':<16}"


def print_report(r: dict) -> None:
    d, t = r["data"], r["threshold"]
    size = f" ({r['parameters'] / 1e6:.2f} M parameters)" if r["parameters"] else ""
    demo = "   DEMO: synthetic phantoms, not radiographs" if d["demo"] else ""
    prevalence = f", prevalence {d['prevalence']:.3f}" if "prevalence" in d else ""
    print(f"{r['model']}{size}   {r['checkpoint']}\n{r['split']} split of {d['root']}{demo}")
    print(f"{d['images']} images of {d['patients']} patients{prevalence}; {len(d['left_out'])} left out")
    if t["value"] is not None:
        print(f"threshold {t['value']:.4f} on the probability of {r['positive']}: {t['rule']}, from {t['from']}")
    print(f"95 % intervals: {r['bootstrap']['draws']} bootstrap draws of patients\n")
    if "at_half" in r:
        print(f"{'':18} {'at the threshold':24} at 0.5")
        for k, v in r["metrics"].items():
            half = show_interval(r["at_half"][k]) if k in r["at_half"] else ""
            print(f"{title(k):18} {show_interval(v)}  {half}".rstrip())
        if "at_prevalence" in r:
            a = r["at_prevalence"]
            print(
                f"at a prevalence of {a['prevalence']:g}: PPV {show_interval(a['ppv'])} NPV {show_interval(a['npv'])}"
            )
        c = r["confusion"]
        print(
            f"\nconfusion: {c['tp']} true and {c['fp']} false positives, {c['tn']} true and {c['fn']} false negatives"
        )
        for name, c in (("calibration", r["calibration"]), ("  uncalibrated", r["calibration"]["before_temperature"])):
            figures = "  ".join(f"{k} {show(c[k])}" for k in ("brier", "nll", "ece", "slope", "intercept"))
            print(f"{name:14} {figures}" + (f"  (T = {c['temperature']:.3f})" if "temperature" in c else ""))
        for name, g in r["subgroups"].items():
            metric = "sensitivity" if "sensitivity" in g else "specificity"
            print(f"{name:14} {metric} {show_interval(g[metric])} {g['images']} images of {g['patients']} patients")
        if "stress" in r:
            print(f"\n{'stress':18} {'AUROC':>7} {'sensitivity':>12} {'specificity':>12} {'their mean':>11}")
            for name, row in r["stress"].items():
                print(
                    f"{name:18} " + " ".join(f"{show(v):>{width}}" for v, width in zip(row.values(), (7, 12, 12, 11)))
                )
    else:
        for k, v in r["metrics"].items():
            print(f"{'macro ' if k == 'auroc' else ''}{title(k):18} {show_interval(v)}")
        for c in r["classes"]:
            area, recall = (show_interval(r[k][c]) for k in ("auroc_one_vs_rest", "sensitivity_per_class"))
            print(f"{c:18} AUROC {area}  sensitivity {recall}")
        print("\nconfusion (rows: true class)")
        for c, row in zip(r["classes"], r["confusion"]):
            print(f"  {c:16}" + "".join(f"{v:8}" for v in row))
    if r["failures"]:
        print("\nmost confident mistakes (probability, true class, file)")
    for f in r["failures"]:
        print(f"  {f['probability']:.4f}  {f['label']:10} {f['path']}")


def print_comparison(c: dict) -> None:
    demo = " (DEMO: phantoms)" if c["demo"] else ""
    print(f"{c['split']} split, {c['images']} images of {c['patients']} patients{demo}\n")
    print(f"{'AUROC':23} {'accuracy':23} {'sens.':>6} {'spec.':>6} {'params':>7} {'img/s':>6}  model")
    for e in c["compared"]:
        m = e["metrics"]
        size = f"{e['parameters'] / 1e6:.2f} M" if e["parameters"] else "-"
        sides = " ".join(f"{show(m[k]['value'] if k in m else None):>6}" for k in ("sensitivity", "specificity"))
        print(f"{show_interval(m['auroc'])} {show_interval(m['accuracy'])} {sides}", end=" ")
        print(f"{size:>7} {show(e['images_per_second'], 0):>6}  {e['model']}\n    {e['checkpoint']}")
        for name in ("mean", "worst") if e["stress"] else ():
            row = "  ".join(f"{title(k)} {show(v)}" for k, v in e["stress"][name].items())
            print(f"    under stress, {name}: {row}")
    print(f"\npaired difference to the best, {c['compared'][0]['checkpoint']}")
    for e in c["compared"][1:]:
        for k, v in e["difference"].items():
            print(f"{title(k):9} {show_interval(v)} p = {show(v['p'])}   {e['checkpoint']}")
    for s in c["over_seeds"]:
        figures = ", ".join(f"{title(k)} {v['mean']:.3f} ({v['sd']:.3f})" for k, v in s.items() if "mean" in v)
        print(f"\n{s['model']} over seeds {', '.join(map(str, s['seeds']))}, mean (sd)\n  {figures}")


def plot(scored: dict, r: dict, weights: np.ndarray, history: list[dict], path: Path) -> None:
    """One PNG, 1,600 pixels wide: ROC, precision-recall, reliability, confusion, scores, and the training curves."""
    from matplotlib.figure import Figure  # an optional extra; pyplot would look for a display

    positive = scored["labels"] == scored["positive"]
    z = binary_logit(scored["logits"], scored["positive"]) / scored["temperature"]
    p, threshold, m = expit(z), r["threshold"]["value"], {k: v["value"] for k, v in r["metrics"].items()}
    fig = Figure(figsize=(16, 10), dpi=100, layout="constrained")
    (roc, pr, reliability), (matrix, scores, training) = fig.subplots(2, 3)
    order = np.argsort(-p)
    ends = np.flatnonzero(np.diff(p[order], append=-1))  # last image of each group of equal scores

    def curve(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """1 - specificity and sensitivity from each threshold on, where image i counts w[i]."""
        fp, tp = (np.append(0, np.cumsum((w * side)[order])[ends]) for side in (~positive, positive))
        return fp / max(fp[-1], 1e-12), tp / max(tp[-1], 1e-12)

    if len(weights):
        grid = np.linspace(0, 1, 101)
        band = np.percentile([np.interp(grid, *curve(w)) for w in weights[:500]], (2.5, 97.5), axis=0)
        roc.fill_between(grid, *band, color="0.85", label="95 % interval")
    fp, tp = curve(np.ones(len(p)))
    roc.plot(fp, tp, "k-", label=f"AUROC {show(m['auroc'])}")
    roc.plot([0, 1], [0, 1], "k:", lw=1)
    if None not in (m["specificity"], m["sensitivity"]):
        roc.plot(1 - m["specificity"], m["sensitivity"], "ko", ms=8, label=f"threshold {threshold:.3f}")
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    roc.legend(loc="lower right")
    precision = np.cumsum(positive[order])[ends] / (ends + 1)
    pr.step(tp[1:], precision, "k-", where="post", label=f"AUPRC {show(m['auprc'])}")
    pr.axhline(positive.mean(), color="k", ls=":", lw=1, label=f"prevalence {positive.mean():.3f}")
    pr.set(title="Precision-recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)", ylim=(0, 1.05))
    pr.legend(loc="lower left")
    bins = np.minimum((p * 10).astype(int), 9)
    points = [(p[bins == b].mean(), positive[bins == b].mean(), (bins == b).sum()) for b in np.unique(bins)]
    reliability.plot([0, 1], [0, 1], "k:", lw=1)
    reliability.plot([x for x, _, _ in points], [y for _, y, _ in points], "ko-")
    for x, y, count in points:
        offset = (0, -14 if y > 0.5 else 8)
        reliability.annotate(str(count), (x, y), offset, textcoords="offset points", ha="center")
    reliability.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(-0.05, 1.05), ylim=(-0.1, 1.1))
    reliability.set(title=f"Reliability (counts; ECE {show(r['calibration']['ece'])})")
    names = [scored["classes"][1 - scored["positive"]], r["positive"]]
    c = r["confusion"]
    cells = np.array([[c["tn"], c["fp"]], [c["fn"], c["tp"]]])
    matrix.imshow(cells, cmap="Greys", vmin=0, vmax=max(cells.max(), 1) * 1.3)
    for (i, j), count in np.ndenumerate(cells):
        color = "w" if count > cells.max() * 0.7 else "k"
        matrix.text(j, i, count, ha="center", va="center", fontsize=22, color=color)
    matrix.set(title="Confusion matrix", xlabel="predicted", ylabel="true")
    matrix.set_xticks([0, 1], names)
    matrix.set_yticks([0, 1], names, rotation=90, va="center")
    edges = np.linspace(min(z.min(), -1), max(z.max(), 1), 41)
    scores.hist(z[~positive], edges, color="0.75", label=names[0])
    scores.hist(z[positive], edges, histtype="step", color="k", lw=1.5, label=names[1])
    if 0 < threshold < 1:
        scores.axvline(logit(threshold), color="k", ls="--", lw=1, label="threshold")
    scores.set(title="Scores", xlabel="calibrated logit", ylabel="images")
    scores.legend()
    if history:
        h = {k: [entry[k] for entry in history] for k in ("epoch", "train_loss", "val_loss", "val_auroc")}
        lines = training.plot(h["epoch"], h["train_loss"], "k-", label="training loss")
        lines += training.plot(h["epoch"], h["val_loss"], "k--", label="validation loss")
        training.set(title="Training", xlabel="epoch", ylabel="loss")
        style = {"color": "0.5", "ms": 4, "label": "validation AUROC (right)"}
        lines += training.twinx().plot(h["epoch"], h["val_auroc"], "o-", **style)
        training.legend(handles=lines, loc="center right")
    else:
        training.set_axis_off()
        training.text(0.5, 0.5, "no metrics.json beside the checkpoint", ha="center")
    demo = "   DEMO DATA: synthetic phantoms" if r["data"]["demo"] else ""
    fig.suptitle(f"{r['model']}, {r['split']} split, {r['data']['images']} images{demo}")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    data.write_atomic(path, buffer.getvalue())


def make_parser() -> argparse.ArgumentParser:
    parser = data.Parser(prog="evaluate.py", description="Score checkpoints, or the predictions of other programs.")
    add, share = parser.add_argument, data.within(float, 0, 1)
    add("inputs", nargs="*", metavar="FILE", help="ckpt.pt or CSV; several are compared (newest run)")
    add("--split", choices=("test", "val", "train"), default="test", help="which images")
    add("--data", metavar="DIR", help="another folder with the same classes")
    add("--threshold", type=share, metavar="P", help="for exploring: another threshold than the stored one")
    add("--prevalence", type=share, metavar="P", help="PPV and NPV at this prevalence too")
    add("--stress", action="store_true", help="also under changed exposure, JPEG, blur and crop")
    add("--plots", action="store_true", help="write a PNG (needs matplotlib)")
    add("--bootstrap", type=data.within(int, 0, 10**6), default=2000, metavar="N", help="draws for the intervals")
    add("--seed", type=data.within(int, 0, 2**32 - 1), default=0, help="of the bootstrap")
    add("--output", metavar="DIR", help="folder for the files (beside the checkpoint)")
    add("--json", action="store_true", help="print JSON alone")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def run(args: argparse.Namespace) -> None:
    inputs = args.inputs or [str(models.newest_checkpoint())]
    if len(inputs) > 1 and (args.plots or args.prevalence is not None):
        raise data.DataError("--plots and --prevalence take one checkpoint; leave them out of a comparison")
    if args.plots and not importlib.util.find_spec("matplotlib"):
        raise data.DataError("--plots needs matplotlib: pip install matplotlib")
    scored = [score_csv(i) if i.lower().endswith(".csv") else score_checkpoint(i, args) for i in inputs]
    for s in scored:
        n, m = s["leaks"]["images"], s["leaks"]["patients"]
        if n or m:
            data.warn(f"LEAK: {s['checkpoint']} was trained on {n} of these images and {m} of these patients")
    source = Path(inputs[0])
    beside = source if source.is_dir() else source.parent  # a run folder names its ckpt.pt
    folder = Path(args.output or beside)
    folder.mkdir(parents=True, exist_ok=True)
    if len(scored[0]["classes"]) > 2 and (args.plots or args.stress or args.prevalence is not None):
        raise data.DataError("--plots, --stress and --prevalence are for two classes; leave them out here")
    if len(scored) > 1:
        result = compare(scored, args)
        if args.output:
            data.write_atomic(folder / "compare.json", json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1)) if args.json else print_comparison(result)
        return
    s, is_csv = scored[0], inputs[0].lower().endswith(".csv")
    weights = draw_weights([r["patient"] for r in s["records"]], args.bootstrap, args.seed)
    result = report(s, weights, args)
    stem = f"{source.stem}.scored" if is_csv else args.split  # the test.csv of a run must not replace its test.json
    if args.data:
        stem += f"-{data.find_root(args.data).resolve().name}"
    suffixes = [".json"]
    if not is_csv:
        rows = to_rows(s, result["threshold"]["value"])
        data.write_atomic(folder / f"{stem}.csv", data.to_csv(rows, list(rows[0])))
        suffixes.append(".csv")
    data.write_atomic(folder / f"{stem}.json", json.dumps(result, indent=1) + "\n")
    if args.plots:
        history = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the figure does without
            history = json.loads((beside / "metrics.json").read_text())["epochs"]
        plot(s, result, weights, history, folder / f"{stem}.png")
        suffixes.append(".png")
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print_report(result)
        print(f"\nwritten: {folder / stem}{', '.join(suffixes)}")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    data.run_script(parser, lambda: run(args), models.ModelError)


if __name__ == "__main__":
    main()
