"""Fine-tune a timm model to classify chest radiographs, by default as pneumonia or normal.

python train.py --model mobilenetv3_small_050 --epochs 10        # data/chest_xray, else a synthetic demo set
python train.py --data chest_xray --weights pretrained.pt        # your own data, weights from a file
python train.py --resume runs/20260101-120000-resnet18           # resume after an interruption, on the CPU bit for bit
torchrun --nproc-per-node=4 train.py --data chest_xray           # several GPUs or processes

Sections: schedule; data; learner and epoch; operating point; the run's files; the run; command line.
"""

import data  # isort: skip (first, so that Ctrl-C is quiet during the imports below)

import argparse
import contextlib
import ctypes
import functools
import math
import os
import re
import shlex
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy import ndarray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.utils.class_weight import compute_sample_weight
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
import models
from data import UserError, count, warn

STATE_FORMAT = "training state"


# --- schedule ---


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to the peak, then a cosine down to zero: a pure function of the step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# --- data ---


@dataclass
class TrainingSet:
    """The images that a run trains and validates on."""

    root: Path
    folder: data.Folder  # of train/ and val/: records, patients, hashes ...
    images: Tensor  # uint8 [n, size, size], perhaps on a GPU
    labels: Tensor  # int64 [n]: positions in classes
    train: Tensor  # int64: positions of the training images
    val: Tensor  # int64: positions of the validation images
    classes: list[str]  # the positive one last

    def n_patients(self, index: Tensor) -> int:
        return len(np.unique(self.folder.patient_index[index]))

    def selected_epoch(self, history: list[dict]) -> int:
        """The epoch to keep, from 1: the latest within a standard error of the best validation AUROC until then.

        AUROC saturates here: among epochs that it can't distinguish, the one trained longer is better. The error
        counts patients, not images, since images of one patient are alike.
        """
        is_positive = self.labels[self.val] == len(self.classes) - 1
        sizes = [self.n_patients(self.val[side]) for side in (is_positive, ~is_positive)]
        selected, best = 0, 0.0
        for epoch_log in history:
            best = max(best, epoch_log["val_auroc"])
            if epoch_log["val_auroc"] >= best - data.auroc_error(best, *sizes):
                selected = epoch_log["epoch"]
        return selected


def read_data(args: argparse.Namespace, size: int) -> TrainingSet:
    """Find, decode and split the images.

    Raises:
        UserError: no such fold, a class without an image to train or to validate on, a threshold rule for three or more
        classes, or what data.find_training refuses.
    """
    if args.fold >= args.folds:
        raise UserError(f"--fold {args.fold}: the last of {args.folds} folds is {args.folds - 1}")
    root = data.find_root(args.data)
    folder = data.read_folder(root, False, size)
    records = folder.records
    classes = data.sort_classes({r.label for r in records}, args.positive)
    if len(classes) > 2 and args.threshold != "0.5":
        raise UserError("--threshold is for two classes; leave it out here")
    labels = torch.tensor([classes.index(r.label) for r in records])
    is_validation = data.is_validation(records, folder.patient_index, args.folds, args.fold)
    parts = (~is_validation, is_validation)
    train, val = (torch.from_numpy(np.flatnonzero(part & folder.usable)) for part in parts)
    for split, index in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            if c not in labels[index]:
                raise UserError(
                    f"class {name} has no usable image in {split}: use more patients or, without val/, other folds"
                )
    n_rarest = int(labels[val].bincount().min())
    if len(val) < 50 or n_rarest < 10:
        images = count(len(val), "validation image")
        warn(f"only {images}, {n_rarest} in one class: too few to choose an epoch or a threshold")
    return TrainingSet(root, folder, folder.images, labels, train, val, classes)


def batches(d: TrainingSet, order: Tensor, operations: list, numbers: list[Tensor], preprocessing: dict, device):
    """Yield the (x, y) of each step: augmented, normalised images [batch, 1, side, side] and their labels [batch].

    order: int64 [steps, batch], positions of images; operations: from data.preset; numbers: from data.draw_numbers.
    """
    for index in order:
        images = d.images[index].to(device)
        drawn = [u[index].to(device) for u in numbers]
        x = data.augment(images, operations, drawn)
        yield data.normalise(x, preprocessing), d.labels[index].to(device)


# --- learner and epoch ---


class Learner:
    """The model in training, and everything that changes with it."""

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace, device: torch.device) -> None:
        """Put the model on the device, wrapped for several processes and compiled if asked for."""
        self.model = model.to(device, memory_format=models.memory_format(model, device))
        self.is_frozen = args.freeze  # all but the head; no dropout, and running statistics stay
        if args.freeze:
            model.requires_grad_(False)
            heads = model.get_classifier()
            for head in heads if isinstance(heads, tuple) else [heads]:  # a distilled model has two
                head.requires_grad_(True)
        self.network = model  # to call: perhaps wrapped or compiled
        if dist.is_initialized():
            self.network = DistributedDataParallel(model)  # starts from the weights of the first process
        if args.compile:
            self.network = torch.compile(self.network)
        self.optimizer = create_optimizer_v2(
            model,
            opt="adamw",
            lr=args.lr,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            foreach=True,
        )
        # The average of the weights, which is validated and kept. The warm-up lets it look back over 6 % of the first
        # 60 steps and 2 % of the first 1,300: a longer memory ruins short runs.
        self.average = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True, warmup_gamma=10)
        precision = args.precision
        if precision == "auto" and device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        # Of autocast; float32 means that it is off.
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        needs_scaling = self.dtype == torch.float16 and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaling)
        self.parts = {  # whose state is saved
            "model": model,
            "average": self.average.module,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }


def weighted_loss(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Cross-entropy of logits [batch, classes], each image weighted by its class.

    Summed and divided by the count: "mean" would divide by the sum of the batch's weights, and partly undo them.
    """
    return F.cross_entropy(logits.float(), labels, class_weights, reduction="sum") / len(labels)


def train_epoch(learner: Learner, class_weights: Tensor, loader, rates: list[float], first_step: int) -> dict:
    """One epoch; the losses are read once, at its end: reading one waits for the device.

    Args:
        class_weights: float32 [classes]. loader: iterable of (x, y), one for each step, on the device.
        rates: the learning rate of each step. first_step: how many steps the run has made before.

    Returns:
        train_loss (mean over the epoch and all processes) and lr (of the last step).

    Raises:
        UserError: the loss is not finite; names the step.
    """
    learner.network.train(not learner.is_frozen)
    losses = []
    for step, (rate, (x, y)) in enumerate(zip(rates, loader), first_step):
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)  # timm's factor of each layer
        with torch.autocast(x.device.type, dtype=learner.dtype, enabled=learner.dtype != torch.float32):
            logits = learner.network(x)
        loss = weighted_loss(logits, y, class_weights)
        learner.optimizer.zero_grad()
        learner.scaler.scale(loss).backward()
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.average.update(learner.model, step=step)
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    bad_steps = (~losses.isfinite()).nonzero()
    if len(bad_steps):
        number = int(bad_steps[0]) + 1
        raise UserError(f"the loss is not finite in step {number} of {len(losses)}; start a new run with a lower --lr")
    return {"train_loss": float(losses.mean()), "lr": rates[-1]}


def validate(model: torch.nn.Module, d: TrainingSet, preprocessing: dict) -> dict:
    """val_loss, val_auroc and val_accuracy (at the largest logit) of the validation images, before calibration.

    More than two classes: the mean AUROC of each against the rest.
    """
    logits = torch.cat([models.infer(model, d.images[part], preprocessing) for part in d.val.split(64)])
    if not logits.isfinite().all():
        raise UserError("the logits of validation images are not finite; start a new run with a lower --lr")
    labels = d.labels[d.val]
    predicted = logits.argmax(1)
    patient_index = d.folder.patient_index[d.val]
    aurocs = []
    for c, score in enumerate(models.calibrate(logits, 1.0, 0.0).numpy().T):  # of two classes, both are equal
        answers = evaluate.Answers((labels == c).numpy(), score, (predicted == c).numpy(), patient_index, None)
        aurocs.append(evaluate.measure(answers, ["auroc"]))
    return {
        "val_loss": float(F.cross_entropy(logits, labels)),  # unweighted, on whole images: unlike train_loss
        "val_auroc": float(np.mean(aurocs)),
        "val_accuracy": float((predicted == labels).double().mean()),
    }


# --- operating point ---
#
# In use, a model gets images acquired differently from its validation images. So calibration, and a threshold that is
# not a fixed number, are fitted to validation images and their stressed copies, weighted so that the image border is
# unrelated to the class.

LEAST_SLOPE, LARGEST_SLOPE = 0.01, 20.0


def image_weights(labels: ndarray, border_logits: ndarray | None) -> tuple[ndarray, str]:
    """A weight for each image, float64 [n], and one line that says what the weights balance.

    All classes weigh the same, also within each tercile of the border logit, so that it is unrelated to the class.
    If a class is missing from a tercile, or without border logits, only the classes are balanced.

    Args:
        labels: int64 [n]. border_logits: float64 [n], see models.border_logit; None for more than two classes.
    """
    cells, how = labels, "classes balanced"
    if border_logits is not None:
        terciles = np.searchsorted(np.quantile(border_logits, (1 / 3, 2 / 3)), border_logits)
        in_terciles = 2 * terciles + labels
        if len(np.unique(in_terciles)) == 6:
            cells, how = in_terciles, f"{how}, also within each tercile of the border logit"
    return compute_sample_weight("balanced", cells), how


def fit_operating_point(
    logits: ndarray, labels: ndarray, border_logits: ndarray | None, rule: str
) -> dict[str, float | dict]:
    """slope, intercept and threshold, as a checkpoint has them and models.decide applies them.

    Two classes: a logistic regression on the logit (Platt 1999; scikit-learn's small penalty keeps the slope finite if
    the classes are separated). More: the slope alone (one over the temperature of Guo et al. 2017).

    Args:
        logits: float64 [copies, n, classes]: of the validation images, and of their stressed copies.
        labels: int64 [n]. border_logits: float64 [n] or None. rule: see threshold_rule.
    """
    weights, how = image_weights(labels, border_logits)
    n_copies, _, n_classes = logits.shape
    all_logits = torch.from_numpy(logits.reshape(-1, n_classes))
    all_labels = np.tile(labels, n_copies)
    all_weights = np.tile(weights, n_copies)
    source = {"from": f"validation and {n_copies - 1} stressed copies; {how}"}
    if n_classes > 2:
        truth, importance = torch.from_numpy(all_labels), torch.from_numpy(all_weights)
        loss = lambda slope: float(F.cross_entropy(all_logits * slope, truth, reduction="none") @ importance)
        slope = minimize_scalar(loss, bounds=(LEAST_SLOPE, LARGEST_SLOPE), method="bounded").x
        threshold = {"value": None, "logit": None, "rule": "largest probability", **source}
        return {"slope": float(slope), "intercept": 0.0, "threshold": threshold}
    z = models.calibrate(all_logits, 1.0, 0.0)[:, 1].numpy()
    scale = max(z.std(), 1e-12)
    fitted = LogisticRegression(tol=1e-10, solver="newton-cholesky").fit(z[:, None] / scale, all_labels, all_weights)
    slope, intercept = float(fitted.coef_[0, 0] / scale), float(fitted.intercept_[0])
    if slope < LEAST_SLOPE:
        warn("on validation the model is no better than chance: train longer")
        slope, intercept = LEAST_SLOPE, 0.0
    cut = choose_cut(rule, all_labels == 1, slope * z + intercept, all_weights)
    threshold = {"value": float(expit(cut)), "logit": cut, "rule": rule, **source}
    return {"slope": slope, "intercept": intercept, "threshold": threshold}


def choose_cut(rule: str, is_positive: ndarray, z: ndarray, weights: ndarray) -> float:
    """A threshold on the calibrated logit z: positive at or above it; unless fixed, halfway between two images.

    rule: youden (the largest sensitivity + specificity), sensitivity=X (the highest threshold that reaches X), or a
    fixed probability.
    """
    if "=" not in rule and rule != "youden":
        return float(logit(float(rule)))
    fpr, tpr, cuts = roc_curve(is_positive, z, sample_weight=weights, drop_intermediate=False)
    wanted = tpr - fpr if rule == "youden" else tpr >= float(rule.split("=")[1]) - 1e-12
    i = max(int(np.argmax(wanted)), 1)  # the first cut is infinite
    cuts = np.append(cuts, cuts[-1] - 1e-6)  # below all images
    return float((cuts[i] + cuts[i + 1]) / 2)


# --- the run's files ---


def describe(args: argparse.Namespace, d: TrainingSet, device: torch.device) -> dict:
    """Arguments, environment and data, the same in last.pt, ckpt.pt and metrics.json."""
    return {
        "arguments": data.without(vars(args), "output", "resume"),
        "code": data.hash_lines(data.sha256(path) for path in (data.__file__, models.__file__, __file__)),
        "environment": evaluate.describe_environment(device),
        "data": {
            "root": str(d.root.resolve()),
            "demo": data.is_demo(d.root),
            "fingerprint": d.folder.fingerprint,
            "classes": d.classes,
            "images": {"train": len(d.train), "val": len(d.val)},
            "patients": {"train": d.n_patients(d.train), "val": d.n_patients(d.val)},
        },
    }


def claim_folder(args: argparse.Namespace) -> tuple[Path, filelock.BaseFileLock]:
    """The run's folder and the lock on it, which the caller must keep; a folder with a run is never overwritten.

    Raises:
        UserError: another process trains in it, or it has a run already.
    """
    if args.output is None:
        model = re.sub(r"[^\w.-]", "_", args.model)
        folder = Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{model}")
        while folder.exists():  # of another run that was started in the same second
            folder = folder.with_name(f"{folder.name}-2")
    else:
        folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is training in {folder}; wait for it, or choose another --output") from None
    except (OSError, NotImplementedError) as e:
        warn(f"{folder} can't be locked ({e}): concurrent runs will not be detected")
    if args.resume is not None:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while saving
            leftover.unlink()
    elif any((folder / name).exists() for name in ("metrics.json", "ckpt.pt", "last.pt")):
        raise UserError(f"{folder} already has a run; use --resume {folder} to continue it, or another --output")
    return folder, lock


def save_progress(
    folder: Path,
    learner: Learner,
    about: dict,
    parent: dict | None,
    d: TrainingSet,
    history: list[dict],
    finished: bool,
) -> dict:
    """Write last.pt, the state that --resume continues from, and after it metrics.json; returns the latter.

    about: what doesn't change in a run. parent: traces of the images that the run of --weights was trained on.
    """
    parts = {name: part.state_dict() for name, part in learner.parts.items()}
    models.save({**about, "parent": parent, "history": history, **parts}, folder / "last.pt", STATE_FORMAT)
    metrics = {
        **about,
        "finished": finished,
        "best_epoch": d.selected_epoch(history),  # the selected one
        "seconds": round(sum(epoch_log["seconds"] for epoch_log in history), 3),
        "epochs": history,
    }
    data.write_json(folder / "metrics.json", metrics)
    return metrics


def save_checkpoint(checkpoint: dict, history: list[dict], folder: Path) -> None:
    """Write ckpt.pt; evaluate.py's reports on the previous one are renamed to *.old: they are about another model."""
    for file in folder.iterdir():
        if evaluate.IN_RUN.fullmatch(file.name):
            os.replace(file, f"{file}.old")
    # Without times, so that equal runs write equal files.
    timeless = [data.without(epoch_log, "seconds", "images_per_second") for epoch_log in history]
    models.save({**checkpoint, "history": timeless}, folder / "ckpt.pt")


def restore(state: dict, args: argparse.Namespace, d: TrainingSet, learner: Learner, world: int) -> None:
    """Load the state into the learner.

    Raises:
        UserError: it is from other data, another number of processes, or another run than ckpt.pt.
    """
    folder = Path(args.output)
    history = state["history"]
    if state["data"]["fingerprint"] != d.folder.fingerprint:
        raise UserError(
            f"the images, or what is known about them, have changed since the run in {folder} started: start a new run"
        )
    if state["world"] != world:
        raise UserError(
            f"the run in {folder} was started with {state['world']} processes, not {world}: use the same number"
        )
    for name, part in learner.parts.items():
        part.load_state_dict(state[name])
    if not history:
        return
    checkpoint = models.load(folder / "ckpt.pt")  # missing or damaged: better to fail now than at the end
    # A newer ckpt.pt is fine: it is written before last.pt, and a run killed in between repeats the epoch.
    is_older = checkpoint["epoch"] < d.selected_epoch(history)
    if is_older or fixed(checkpoint["arguments"]) != fixed(state["arguments"]):
        raise UserError(f"{folder}/ckpt.pt does not belong to {folder}/last.pt: start a new run")
    if args.epochs < len(history):
        raise UserError(f"the run has already done {count(len(history), 'epoch')}; --epochs can't be less")
    if args.epochs != state["arguments"]["epochs"]:
        warn("--epochs changed: the remaining epochs follow the schedule of the new length")


def start_checkpoint(d: TrainingSet, settings: dict, about: dict, parent: dict | None) -> dict:
    """All that evaluation and prediction need, except what each epoch adds: state_dict, epoch (of these weights) and
    history (of all epochs when the file was written). Warns if validation images were trained on.
    """
    some = d.train[:: 1 + len(d.train) // 20_000]  # more would add nothing, but need a kilobyte each
    trained = d.folder.traces(d.train)
    if parent is not None:
        trained["patients"] = sorted({*trained["patients"], *parent["patients"]})
        trained["hashes"] = torch.cat([trained["hashes"], parent["hashes"]]).unique(dim=0)
    validated = d.folder.traces(d.val)
    seen = data.seen_before(validated, trained)
    if seen:
        warn(f"LEAK: this run or its --weights were trained on validation data ({seen}): results are too optimistic")
    cut = {"value": 0.5, "logit": 0.0} if len(d.classes) == 2 else {"value": None, "logit": None}
    return {
        **settings,
        "classes": d.classes,
        "slope": 1.0,
        "intercept": 0.0,
        "threshold": {**cut, "rule": "0.5", "from": "the default of an unfinished run"},
        "input_check": models.fit_input_check(d.images, some, d.val),
        "border": models.fit_border(d.images, some, d.labels[some].numpy()) if len(d.classes) == 2 else None,
        "finished": False,
        "trained_on": trained,  # by this run, and by those that its weights come from
        "chosen_on": validated,  # epoch and operating point
        **about,
    }


def finish_checkpoint(folder: Path, d: TrainingSet, about: dict, history: list[dict], device) -> None:
    """Choose the operating point of the selected model, and mark it as one of a finished run."""
    checkpoint = models.load(folder / "ckpt.pt")
    model = models.from_checkpoint(checkpoint, device)
    logits, border = evaluate.ask(model, d.folder, d.val, checkpoint, stress=True)
    labels = d.labels[d.val].numpy()
    chosen = fit_operating_point(np.stack(list(logits.values())), labels, border, about["arguments"]["threshold"])
    save_checkpoint({**checkpoint, **about, **chosen, "finished": True}, history, folder)


# --- the run ---


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device): from torchrun's environment, or one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1, models.pick_device(name)
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = models.pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while the first one fetches weights, decodes a new folder and validates.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), world, device


def keep_memory() -> None:
    """Make glibc keep the memory that tensors free, to the end of the process.

    Otherwise a training step on the CPU spends 15 to 30 % of its time on page faults.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def run(args: argparse.Namespace, state: dict | None) -> None:
    """Train as the arguments say; state: from the last.pt of a resumed run."""
    rank, world, device = start_processes(args.device)
    is_first = rank == 0  # it writes, prints and validates
    settings = models.settings(args.model, args.img_size)
    size = settings["input_size"]
    output = [None]  # the run's folder, from the first process
    if not is_first:
        try:
            dist.broadcast_object_list(output)  # wait until the first one has drawn, fetched and decoded
        except RuntimeError:
            raise UserError("the first process has ended") from None
    d = read_data(args, size)
    if is_first:
        folder, _lock = claim_folder(args)
        output = [str(folder)]
    torch.manual_seed(args.seed)
    # A resumed run brings its own weights, so that none are fetched.
    weights, pretrained = (args.weights, args.pretrained) if state is None else (None, False)
    model, origin, parent = models.build_pretrained(args.model, d.classes, size, weights, pretrained)
    if is_first and world > 1:
        dist.broadcast_object_list(output)
    (args.output,) = output  # for the line that says how to continue
    if device.type == "cuda" and d.images.numel() < torch.cuda.mem_get_info(device)[0] // 2:
        d.images = d.images.to(device)  # 25 kB an image at 160 px: the whole set stays on the GPU
    _, config, _ = models.resolve(args.model)
    is_cropped = args.augment != "none" and not config.fixed_input_size
    # A random crop enlarges what it shows; training at a smaller size makes up for that (Touvron et al. 2019).
    crop = min(max(round(size * 0.75 / 32) * 32, 32), size) if is_cropped else size
    for side in (crop, size):
        models.require_size(model, len(d.classes), side)
    learner = Learner(model, args, device)
    history = []
    if state is not None:
        restore(state, args, d, learner, world)
        history, origin, parent = state["history"], state["origin"], state["parent"]
        if len(history) == args.epochs and models.is_finished(Path(args.output)):
            if is_first:
                print(f"the run in {args.output} is finished; --epochs N trains it longer")
            return

    # what every epoch needs
    batch_size = min(args.batch_size * world, len(d.train))
    steps = len(d.train) // batch_size
    warmup = round(args.warmup_epochs * steps)
    operations = data.preset(args.augment, crop)
    sizes = d.labels[d.train].bincount().to(device)
    class_weights = sizes.sum() / (len(sizes) * sizes) if args.balance else torch.ones(len(sizes), device=device)

    if is_first:
        about = describe(args, d, device) | {"origin": origin, "world": world}
        if state is not None and state["code"] != about["code"]:
            warn("data.py, models.py or train.py has changed since the run started")
            about["code"] = state["code"]
        save = functools.partial(save_progress, folder, learner, about, parent, d, history)  # history grows
        data.write_text(folder / "splits.csv", data.to_csv(split_rows(d)))
        save(finished=False)
        checkpoint = start_checkpoint(d, settings, about, parent)
        print_start(args, origin["note"], d, learner, crop, size, device)

    if device.type == "cpu":
        keep_memory()
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(data.seed_from(args.seed, epoch, rank))  # for dropout and the like
        first_step = (epoch - 1) * steps
        rates = [learning_rate(first_step + i, args.epochs * steps, warmup, args.lr) for i in range(steps)]
        order = d.train[data.shuffle(len(d.train), args.seed, epoch)]
        order = order[: steps * batch_size].view(steps, batch_size)[:, rank::world]  # what is left over varies
        numbers = data.draw_numbers(operations, len(d.images), args.seed, epoch)
        loader = batches(d, order, operations, numbers, settings, device)
        bar = tqdm(loader, f"epoch {epoch}", steps, leave=False, unit="step", disable=None if is_first else True)
        epoch_log = {"epoch": epoch, "planned_epochs": args.epochs}
        epoch_log |= train_epoch(learner, class_weights, bar, rates, first_step)
        epoch_log["images_per_second"] = round(steps * batch_size / (time.perf_counter() - start), 1)
        if not is_first:
            continue
        epoch_log |= validate(learner.average.module, d, settings)
        history.append(epoch_log)
        if d.selected_epoch(history) == epoch:
            checkpoint |= {"state_dict": learner.average.module.state_dict(), "epoch": epoch}
            save_checkpoint(checkpoint, history, folder)
        epoch_log["seconds"] = round(time.perf_counter() - start, 3)
        save(finished=False)
        print(ROW.format(**epoch_log), flush=True)

    if is_first:
        finish_checkpoint(folder, d, about, history, device)
        metrics = save(finished=True)
        print_end(folder, d, metrics)


ROW = (
    "{epoch:5}  {train_loss:10.4f}  {val_loss:8.4f}  {val_auroc:9.4f}  {val_accuracy:8.4f}  {seconds:7.1f}"
    "  {images_per_second:8.1f}"
)
HEADER = "epoch  train loss  val loss  val AUROC  val acc.  seconds  images/s"


def split_rows(d: TrainingSet) -> list[dict]:
    """The rows of splits.csv: which image was used for what."""
    splits = np.full(len(d.folder.records), "left out")
    splits[d.train] = "train"
    splits[d.val] = "val"
    mark = {"demo": "phantom"} if data.is_demo(d.root) else {}
    rows = []
    for r, split in zip(d.folder.records, splits.tolist()):
        row = {"path": r.path, "class": r.label, "patient": r.patient, "subtype": r.subtype, "split": split}
        rows.append(row | r.groups | row | mark)  # a column of metadata.csv does not replace one of these
    return rows


def print_start(
    args: argparse.Namespace, note: str, d: TrainingSet, learner: Learner, crop: int, size: int, device
) -> None:
    """Print what is trained, on what, and the table's header; note: about the weights."""
    print(f"{args.model}, {models.n_parameters(learner.model) / 1e6:.2f} M parameters, {note}")
    for index, purpose in ((d.train, "for training"), (d.val, "for validation")):
        patients = count(d.n_patients(index), "patient")
        print(f"{data.printable(str(d.root))}: {count(len(index), 'image')} of {patients} {purpose}")
    if len(d.classes) == 2:
        print(f"positive class: {d.classes[1]}, negative: {d.classes[0]}")
    print(f"trained at {crop} px, validated at {size} px, on {device}, {learner.dtype}")
    print("val acc.: of the largest logit, before calibration; flat until the weight average catches up")
    print(HEADER)


def print_end(folder: Path, d: TrainingSet, metrics: dict) -> None:
    """Which epoch was selected, how long the epochs took, and what to do next."""
    ckpt = folder / "ckpt.pt"
    selected = metrics["epochs"][metrics["best_epoch"] - 1]
    kept = f"epoch {selected['epoch']} of {len(metrics['epochs'])}, validation AUROC {selected['val_auroc']:.4f}"
    print(f"\nselected: {kept} (the latest within a standard error of the best)")
    print(f"epochs took {metrics['seconds']:.0f} s; checkpoint: {data.printable(str(ckpt))}\n")
    image = d.root / d.folder.records[d.val[0]].path
    for words in (["evaluate.py", ckpt], ["predict.py", "--ckpt", ckpt, image]):
        print(data.printable(shlex.join(["python", *map(str, words)])))


# --- command line ---


def make_parser() -> data.Parser:
    parser = data.Parser(description="Fine-tune a timm model on chest radiographs.")
    number, yes_no, text = data.within, argparse.BooleanOptionalAction, data.non_empty
    add = parser.add_argument_group("data").add_argument
    add("--data", type=text, help="folder with train/CLASS/ (default: data/chest_xray, else a demo set)")
    help = "input side in pixels (default: 160, or the model's own if fixed)"
    add("--img-size", type=number(int, 8, 10_000), help=help)
    add("--positive", help="the positive class (default: PNEUMONIA, else a guess)")
    help = "number of patient folds, one for validation; unused if val/ has 100 or more"
    add("--folds", type=number(int, 2, 1000), default=10, help=help)
    add("--fold", type=number(int, 0, 999), default=0, help="the validation fold: 0 to folds - 1")
    group = parser.add_argument_group("model")
    add, add_source = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--model", type=text, default="mobilenetv3_small_050", help="any timm classification model")
    help = "require, or skip, timm's weights (default: use them if available)"
    add_source("--pretrained", action=yes_no, default=None, help=help)
    add_source("--weights", type=text, help="weights from a run, a .safetensors file or a torch state dict")
    add("--freeze", action=yes_no, default=False, help="train only the head: a linear probe")
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=number(int, 1), default=10, help="passes over the training images")
    add("--batch-size", type=number(int, 2), default=64, help="images per step and process")
    add("--lr", type=number(float, 0, 1e30), default=0.003, help="peak learning rate; transformers need less")
    add("--weight-decay", type=number(float, 0, 1e6), default=0.05, help="AdamW weight decay; none on norms and biases")
    add("--layer-decay", type=number(float, 0.1, 1), help="layer-wise learning-rate decay factor")
    add("--warmup-epochs", type=number(float, 0), default=1.0, help="epochs of linear warm-up before cosine decay")
    add("--ema-decay", type=number(float, 0, 0.99999), default=0.99, help="decay of the weight average (EMA); 0: off")
    add("--balance", action=yes_no, default=True, help="give each class the same total weight in the loss")
    add("--augment", choices=data.PRESETS, default="robust", help="strength of the augmentation")
    help = "lowest probability that counts as positive; or youden, or sensitivity=0.95, chosen on validation"
    add("--threshold", type=threshold_rule, default="0.5", help=help)
    add = parser.add_argument_group("run").add_argument
    add("--output", type=text, help="run folder (default: runs/DATE-TIME-MODEL)")
    add("--resume", type=text, help="continue the run in a folder; can change --data, --epochs, --device")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of everything but the split")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    help = "auto: bf16 or fp16 on CUDA, else fp32"
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=help)
    add("--compile", action=yes_no, default=False, help="torch.compile the model")
    return parser


def fixed(arguments: dict) -> dict:
    """The arguments that --resume can't change."""
    return data.without(arguments, "data", "epochs", "device")


def threshold_rule(text: str) -> str:
    """An argparse type: youden, sensitivity=X or X, with X in (0, 1)."""
    with contextlib.suppress(ValueError):
        if text == "youden" or 0 < float(text.removeprefix("sensitivity=")) < 1:
            return text
    raise argparse.ArgumentTypeError(f"{text} is not youden, sensitivity=X or X, with X between 0 and 1")


def parse_arguments(parser: data.Parser) -> tuple[argparse.Namespace, dict | None]:
    """The arguments, and with --resume the state in last.pt: the run's own arguments are the defaults then."""
    args = parser.parse_args()
    state = None
    if args.resume is not None:
        folder = args.resume
        if args.output is not None:
            parser.error("--resume names the folder: leave out --output")
        try:
            state = models.load(Path(folder, "last.pt"), STATE_FORMAT)
        except (UserError, OSError) as e:
            parser.error(f"--resume {folder}: no run to continue ({e}); start a new one with another --output")
        parser.set_defaults(**state["arguments"])
        args = parser.parse_args()
        for name, value in fixed(state["arguments"]).items():
            if getattr(args, name) != value:
                flag = f"--{name.replace('_', '-')}"
                parser.error(f"{flag} {getattr(args, name)} contradicts the run in {folder}, which has {value}")
        args.output = folder
    return args, state


def main() -> None:
    parser = make_parser()
    args, state = parse_arguments(parser)

    def work():
        run(args, state)
        if dist.is_initialized():
            dist.barrier()  # with PyTorch 2.6, destroying a group while another process works may hang
            dist.destroy_process_group()

    def advise():
        """How to continue a run that was interrupted."""
        # Not Path.exists, which raises an error if the name is too long.
        if args.output is not None and os.path.exists(os.path.join(args.output, "last.pt")):
            n = os.environ.get("LOCAL_WORLD_SIZE")  # of torchrun
            start = ["torchrun", f"--nproc-per-node={n}"] if n else ["python"]
            return f"continue with: {shlex.join([*start, 'train.py', '--resume', args.output])}"
        return "nothing saved yet"

    data.run_script(parser, work, advise)


if __name__ == "__main__":
    main()
