"""Fine-tune a timm model to tell pneumonia from normal chest radiographs.

python train.py --model mobilenetv3_small_050 --epochs 10        # data/chest_xray, else a synthetic demo set
python train.py --data chest_xray --weights pretrained.pt        # own data, weights from a file
python train.py --resume runs/20260101-120000-resnet18           # go on after an interruption, to the bit
torchrun --nproc-per-node=4 train.py --data chest_xray           # several GPUs or processes
"""

import argparse
import contextlib
import functools
import math
import os
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import data  # before the libraries: it looks after Ctrl-C while they are being imported

# isort: split
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
import models
from data import UserError, warn

LAST_FORMAT = "training state"
STATE = {  # of last.pt, but for what a Learner restores
    "arguments": models.FIELDS["arguments"],
    "fingerprint": models.TEXT,
    "world": models.COUNT,
    "weights": models.FIELDS["weights"],
    "seen": models.Field(dict, optional=True, keys={k: models.FIELDS["data"].keys[k] for k in ("patients", "pixels")}),
    "epochs": models.Field(list, of=dict),
}
EPOCH = {  # of each epoch; its number is checked beside it
    "train_loss": models.Field(float),
    "lr": models.Field(float, 0),
    "val_loss": models.Field(float, 0),
    "val_auroc": models.SHARE,
    "val_accuracy": models.SHARE,
    "images_per_second": models.Field(float, 0),
    "selected": models.Field(bool),
    "seconds": models.Field(float, 0),
}


# --- what follows from the step, and from the epochs so far ---


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to the peak, then a cosine down to zero: a pure function of the step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def is_selected(history: list[dict], positives: int, negatives: int) -> bool:
    """Whether the last epoch is the one to keep so far: its validation AUROC lies within a standard error of the best.

    AUROC saturates here: between epochs that it can't tell apart, the longer trained one is better.
    """
    best = max(h["val_auroc"] for h in history)
    return history[-1]["val_auroc"] >= best - data.auroc_error(best, positives, negatives)


def epochs_since_best(history: list[dict]) -> int:
    """How many epochs have passed since the validation AUROC was highest for the first time."""
    aurocs = [h["val_auroc"] for h in history]
    return len(aurocs) - 1 - aurocs.index(max(aurocs)) if aurocs else 0


def summarize(history: list[dict]) -> dict:
    """What metrics.json says of the whole run, once an epoch is made."""
    if not history:
        return {}
    return {
        "best_epoch": max((h["epoch"] for h in history if h["selected"]), default=0),  # the selected one
        "seconds": round(sum(h["seconds"] for h in history), 3),
        "images_per_second": float(np.median([h["images_per_second"] for h in history])),
    }


# --- processes ---


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
    # The others wait while the master fetches weights, decodes a new folder and validates.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), world, device


def broadcast(value):
    """The master's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def master_first(rank: int):
    """The others enter when the master has left: it draws, fetches or decodes, and they find the files."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and dist.is_initialized():
        dist.barrier()


# --- data ---


@dataclass
class TrainingSet:
    """The images that a run trains and validates on."""

    root: Path
    records: list[data.Record]  # split is train, val, or left out where the file can't be read
    images: Tensor  # uint8 [n, size, size], in the order of records; they alone may lie on a GPU
    digests: Tensor  # int64 [n], see data.Images
    labels: Tensor  # int64 [n], positions in classes
    train: Tensor  # int64, positions of the training images in records
    val: Tensor  # int64, and of the validation images
    classes: list[str]
    positive_index: int  # position of the positive class in classes
    left_out: list[dict]  # path and reason
    fingerprint: str  # see data.fingerprint

    def about(self) -> dict:
        """What the files of a run say of the data."""
        return {
            "root": str(self.root.resolve()),
            "demo": data.is_demo(self.root),
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "positive": self.classes[self.positive_index],
            "images": {"train": len(self.train), "val": len(self.val)},
            "patients": {"train": self.patients(self.train), "val": self.patients(self.val)},
            "left_out": self.left_out,
        }

    def records_of(self, index: Tensor) -> list[data.Record]:
        return [self.records[i] for i in index.tolist()]

    def patients(self, index: Tensor) -> int:
        return len({r.patient for r in self.records_of(index)})

    def val_patients(self) -> tuple[int, int]:
        """How many patients of validation are positive, and how many are not; images of one patient are alike."""
        positive = self.labels[self.val] == self.positive_index
        return self.patients(self.val[positive]), self.patients(self.val[~positive])

    @functools.cached_property
    def checks(self) -> dict:
        """What a checkpoint knows of the training images: how such images look, and what their border alone tells.

        As long to fit as an epoch's validation: not before the first checkpoint.
        """
        train, val = models.in_batches(self.images, self.train), models.in_batches(self.images, self.val)
        border = None
        if len(self.classes) == 2:
            index = self.train[:: 1 + len(self.train) // 20_000]  # more would tell no more, but take a kilobyte each
            features = torch.cat([data.border_features(batch) for batch in models.in_batches(self.images, index)])
            border = models.fit_border(features, (self.labels[index] == self.positive_index).numpy())
        return {"input_check": models.fit_input_check(train, val), "border": border}


def read_data(args: argparse.Namespace, size: int) -> TrainingSet:
    """Find, split and decode the images, and check that each class is there to train and to validate on."""
    root = data.find_root(args.data)
    data.prepare_demo(root)
    records = data.find_training(root, args.folds, args.fold)
    classes = sorted({r.label for r in records})
    if args.threshold != "stressed" and len(classes) > 2:
        raise UserError("--threshold is for two classes; leave it out here")
    positive_index = data.positive_index(classes, args.positive)
    loaded = data.load_images(root, records, size)
    fingerprint = data.fingerprint(records, loaded.digests)  # before what failed is left out, as evaluate.py has it
    for i in loaded.failed:
        records[i].split = "left out"
    index = {}
    for split, purpose in (("train", "training"), ("val", "validation")):
        index[split] = torch.tensor([i for i, r in enumerate(records) if r.split == split])
        missing = sorted(set(classes) - {r.label for r in records if r.split == split})
        if missing:
            raise UserError(f"class {missing[0]} has no image for {purpose} here; another --fold, or fewer --folds?")
    return TrainingSet(
        root=root,
        records=records,
        images=loaded.pixels,
        digests=loaded.digests,
        labels=torch.tensor([classes.index(r.label) for r in records]),
        train=index["train"],
        val=index["val"],
        classes=classes,
        positive_index=positive_index,
        left_out=data.report_left_out(records, loaded.failed),
        fingerprint=fingerprint,
    )


def warn_overlap(d: TrainingSet, seen: dict | None) -> None:
    """Say loudly where labels contradict each other, or where this run, or the one that its weights come from, is
    trained on what validates it.
    """
    used = torch.cat([d.train, d.val])
    data.warn_contradictions(d.records_of(used), d.digests[used])
    copies = int(torch.isin(d.digests[d.val], d.digests[d.train]).sum())
    if copies:
        warn(
            f"LEAK: {copies} of {len(d.val)} validation images have the same pixels as training images of "
            "other or unknown patients (python data.py check --json lists them): "
            "validation, and all that is chosen by it, is flattered"
        )
    if seen is None:
        return
    images, patients = data.count_seen(d.records_of(d.val), d.digests[d.val], seen["pixels"], seen["patients"])
    if images or patients:
        warn(
            f"LEAK: the weights were trained on {images} of the {len(d.val)} validation images and on {patients} of "
            "their patients: validation, and all that is chosen by it, is flattered; use that run's --folds and --fold"
        )


@dataclass
class Feed:
    """How the images of an epoch are drawn and changed."""

    operations: list  # of data.preset, with their strengths
    pre: dict  # mean, std and margin
    seed: int
    batch_size: int  # of all processes together
    share: slice  # of each batch, for this process
    device: torch.device


def batches(d: TrainingSet, feed: Feed, epoch: int):
    """Yield the (x, y) of each step: augmented, normalised images [batch, 1, side, side] and their labels [batch].

    The incomplete last batch is left out: other images each epoch.
    """
    order = d.train[data.shuffle(len(d.train), feed.seed, epoch)]
    whole = len(order) - len(order) % feed.batch_size
    draws = data.draw(feed.operations, len(d.images), feed.seed, epoch)
    for index in order[:whole].view(-1, feed.batch_size)[:, feed.share]:
        x = data.hide_margin(d.images[index].to(feed.device, non_blocking=True), feed.pre["margin"])
        numbers = [u[index].to(feed.device, non_blocking=True) for u in draws]
        x = data.augment(x, feed.operations, numbers)
        yield data.normalise(x, feed.pre["mean"], feed.pre["std"]), d.labels[index].to(feed.device, non_blocking=True)


# --- model and loop ---


@dataclass
class Learner:
    """What training changes, what it is called through, and what its weights have seen before."""

    model: torch.nn.Module  # holds the weights
    net: torch.nn.Module  # what is called: the model, perhaps wrapped or compiled
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    frozen: bool  # all but the head, running statistics and dropout included
    seen: dict | None = None  # patients and pixels that the weights were trained on before this run

    def stateful(self) -> dict:
        return {
            "model": self.model,
            "ema": self.ema.module,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }

    def restore(self, state: dict) -> None:
        """Take over what save_progress wrote.

        Raises:
            UserError: it is of another model, or damaged.
        """
        try:
            for name, part in self.stateful().items():
                part.load_state_dict(state[name])
            for parameter, moments in self.optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    if moments[name].shape != parameter.shape:  # torch does not look
                        raise ValueError(f"{name} of another shape")
        except Exception as e:  # noqa: BLE001, what does not fit fails in many ways
            raise UserError(f"last.pt does not fit the run ({e}): it is damaged, start a new run") from None
        self.seen = state["seen"]


def start_model(args: argparse.Namespace, classes: list[str], size: int) -> tuple[torch.nn.Module, dict, dict | None]:
    """See models.build_pretrained; a resumed run brings its own weights, so that none are fetched."""
    torch.manual_seed(args.seed)
    if args.resume is not None or args.pretrained is False:
        origin = {"source": "random", "note": "random weights, as asked", "failed": ""}
        return models.build(args.model, len(classes), size), origin, None
    insist = args.pretrained is True
    model, origin, seen = models.build_pretrained(args.model, classes, size, args.weights, insist)
    if origin["failed"]:
        warn(f"RANDOM WEIGHTS: {origin['failed']}. Training starts from scratch; --weights FILE takes a local file")
    return model, origin, seen


def make_learner(model: torch.nn.Module, args: argparse.Namespace, device: torch.device) -> Learner:
    """Put the model on the device, wrapped for several processes and compiled where that is asked for."""
    model.to(device, memory_format=models.memory_format(model, device))
    if args.freeze:
        model.requires_grad_(False)
        heads = model.get_classifier()
        for head in heads if isinstance(heads, tuple) else [heads]:  # a distilled model has two
            head.requires_grad_(True)
    net = model
    if dist.is_initialized():
        net = DistributedDataParallel(model)  # starts from the weights of the master
    if args.compile:
        net = torch.compile(net)
    # The warm-up lets it look back over 2 to 6 % of the steps so far: a longer memory ruins short runs.
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True, warmup_gamma=10)
    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=args.lr,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        foreach=True,
    )
    half = pick_dtype(args.precision, device) == torch.float16 and device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    return Learner(model, net, ema, optimizer, scaler, args.freeze)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What autocast computes in: float32 is none."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def training_size(args: argparse.Namespace, size: int) -> int:
    """Side of the crops that training sees.

    A random crop enlarges what it shows; training at 3/4 of the size makes up for that (Touvron et al. 2019).
    """
    if args.augment == "none" or models.takes_one_size(args.model):
        return size
    return min(max(round(size * 0.75 / 32) * 32, 32), size)


def weighted_loss(logits: Tensor, labels: Tensor, class_weights: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of logits [batch, classes], each image weighted by its class.

    Summed and divided by the count: "mean" would divide by the batch's own weights, and undo them.
    """
    loss = F.cross_entropy(logits.float(), labels, class_weights, reduction="sum", label_smoothing=smoothing)
    return loss / len(labels)


def make_criterion(d: TrainingSet, args: argparse.Namespace, device: torch.device):
    """The loss, a function of logits and labels; with --balance each class counts the same."""
    rule = "balanced" if args.balance else None
    class_weights = compute_class_weight(rule, classes=np.arange(len(d.classes)), y=d.labels[d.train].numpy())
    class_weights = torch.tensor(class_weights, dtype=torch.float32, device=device)
    return functools.partial(weighted_loss, class_weights=class_weights, smoothing=args.label_smoothing)


def train_epoch(learner: Learner, criterion, loader, rates: list[float], first_step: int, dtype: torch.dtype) -> dict:
    """One epoch; the losses are read once, at its end: each look at one would wait for the device.

    Args:
        loader: iterable of (x, y), one for each step, on the device.
        rates: the learning rate of each step; first_step: how many steps the run has made before.

    Returns:
        train_loss (mean over the epoch and all processes) and lr (of the last step).

    Raises:
        UserError: the loss is not finite; names the step.
    """
    learner.net.train(not learner.frozen)
    losses = []
    for step, (rate, (x, y)) in enumerate(zip(rates, loader), first_step):
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)  # timm's factor of each layer
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = learner.net(x)
        loss = criterion(logits, y)
        learner.optimizer.zero_grad()
        learner.scaler.scale(loss).backward()
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.ema.update(learner.model, step=step)
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    bad_steps = (~losses.isfinite()).nonzero()
    if len(bad_steps):
        step = int(bad_steps[0]) + 1
        raise UserError(f"the loss is not finite in step {step} of {len(losses)}; start a new run with a lower --lr")
    return {"train_loss": float(losses.mean()), "lr": rates[-1]}


def validate(model: torch.nn.Module, d: TrainingSet, pre: dict) -> tuple[dict, np.ndarray]:
    """Loss, AUROC and accuracy (of the largest probability), and the logits [n, classes], of the validation images."""
    logits = models.infer(model, models.in_batches(d.images, d.val), pre)
    if not logits.isfinite().all():
        raise UserError("the logits of validation images are not finite; start a new run with a lower --lr")
    labels = d.labels[d.val]
    metrics = {
        # Unweighted, on whole images: not to be compared with train_loss.
        "val_loss": float(F.cross_entropy(logits, labels)),
        "val_auroc": evaluate.macro_auroc(labels.numpy(), logits.softmax(1).numpy(), d.positive_index),
        "val_accuracy": float((logits.argmax(1) == labels).double().mean()),
    }
    return metrics, logits.numpy()


def calibrate(logits: np.ndarray, stressed: dict, d: TrainingSet, rule: str) -> dict:
    """Temperature and threshold, chosen on validation images alone.

    Args:
        logits: of the validation images; stressed: {name: logits} of their stressed copies, which the threshold then
            rests on too; rule: of evaluate.choose_threshold.
    """
    labels = d.labels[d.val].numpy()
    temperature = evaluate.fit_temperature(logits, labels)
    threshold = {"value": None, "rule": "largest probability", "from": ""}
    if len(d.classes) == 2:
        everything = np.concatenate([logits, *stressed.values()])
        positive = np.tile(labels == d.positive_index, 1 + len(stressed))
        z = evaluate.binary_logit(everything, d.positive_index) / temperature
        threshold = {
            "value": evaluate.choose_threshold(rule, positive, z),
            "rule": rule,
            "from": "validation and its stressed copies" if stressed else "validation",
        }
    return {"temperature": temperature, "threshold": threshold}


# --- the run's files ---


def lock(folder: Path):
    """Hold the folder until this process ends, however it ends; the returned file must be kept.

    Raises:
        UserError: another process holds it.
    """
    f = open(folder / ".lock", "a")  # noqa: SIM115, closed with the process
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training in {folder}; wait for it, or choose another --output") from None
    except OSError as e:
        warn(f"{folder} can't be locked ({e}): that no other process trains in it is not checked")
    return f


def claim_folder(args: argparse.Namespace) -> tuple[Path, object]:
    """The run's folder, which this process alone uses, and the lock; one that holds a run is never overwritten."""
    if args.output is None:
        folder = new_folder(args.model.replace("/", "_"))
    else:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    if args.resume is not None:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while saving
            leftover.unlink()
    else:
        refuse_run(folder)
    return folder, held


def refuse_run(folder: Path) -> None:
    """Raise UserError where the folder holds a run."""
    if (folder / "metrics.json").exists() or (folder / "ckpt.pt").exists():
        raise UserError(f"{folder} already holds a run; use --resume {folder} to go on, or another --output")


def new_folder(name: str) -> Path:
    """Make runs/DATE-TIME-NAME; where another run has this second, that of the next."""
    Path("runs").mkdir(exist_ok=True)
    while True:
        folder = Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        time.sleep(0.1)


def save_progress(folder: Path, learner: Learner, metrics: dict, world: int) -> None:
    """Write last.pt, all that --resume needs for an exact continuation, and after it metrics.json."""
    state = {
        "format": LAST_FORMAT,
        "format_version": models.FORMAT_VERSION,
        "arguments": metrics["arguments"],
        "demo": metrics["data"]["demo"],
        "fingerprint": metrics["data"]["fingerprint"],
        "world": world,
        "weights": metrics["weights"],
        "seen": learner.seen,
        "epochs": metrics["epochs"],
    }
    for name, part in learner.stateful().items():
        state[name] = part.state_dict()
    models.save(state, folder / "last.pt")
    write_metrics(folder, metrics)


def write_metrics(folder: Path, metrics: dict) -> None:
    data.write_json(folder / "metrics.json", {**metrics, **summarize(metrics["epochs"])})


def load_state(folder: Path, args: argparse.Namespace, fingerprint: str, world: int) -> dict:
    """What save_progress wrote, for this run and these images.

    Raises:
        UserError: it, or the checkpoint that goes with it, is missing, damaged, or of other data or another run.
    """
    state = models.load(folder / "last.pt", LAST_FORMAT, STATE)
    history = state["epochs"]
    for number, h in enumerate(history, 1):
        found = list(models.faults(h, {**EPOCH, "epoch": models.Field(int, number, number)}))
        if found:
            raise UserError(f"{folder}/last.pt is damaged: epoch {number}: {found[0]}")
    if state["fingerprint"] != fingerprint:
        raise UserError(f"the images are not those that the run in {folder} was started with; start a new run")
    if state["world"] != world:
        raise UserError(f"the run in {folder} was started with {state['world']} processes, not {world}: resume it so")
    if history:
        checkpoint = models.load(folder / "ckpt.pt")  # missing or damaged: better told now than at the end
        # A newer one is right: it is written first, and a run that was killed in between makes its epoch again.
        if checkpoint["epoch"] < summarize(history)["best_epoch"]:
            raise UserError(f"{folder}/ckpt.pt is older than last.pt: start a new run")
        if fixed(checkpoint["arguments"]) != fixed(state["arguments"]):
            raise UserError(f"{folder}/ckpt.pt is of another run than last.pt: start a new run")
        if args.epochs < len(history):
            raise UserError(f"the run has made {len(history)} epochs already: --epochs can't be fewer")
        if args.epochs != state["arguments"]["epochs"]:
            warn("another number of epochs: the rates of the rest are those of a run of that length from the start")
    return state


def fixed(arguments: dict) -> dict:
    """Those that --resume can't change."""
    return {k: v for k, v in arguments.items() if k not in MAY_CHANGE}


def make_checkpoint(learner: Learner, d: TrainingSet, pre: dict, metrics: dict, validation: dict, chosen: dict) -> dict:
    """All that evaluation and prediction need; validation: from validate, chosen: from calibrate."""
    patients = data.named_patients(d.records_of(d.train))
    pixels = d.digests[d.train]
    if learner.seen is not None:
        patients |= set(learner.seen["patients"])
        pixels = torch.cat([pixels, learner.seen["pixels"]]).unique()
    epoch = len(metrics["epochs"])
    about = metrics["data"]
    about_data = {
        "root": about["root"],
        "demo": about["demo"],
        "fingerprint": about["fingerprint"],
        "images": len(d.train),
        # Trained on, by this run and those that its weights come from; pixels are digests.
        "patients": sorted(patients),
        "pixels": pixels,
        # Epoch, temperature and threshold are chosen on these.
        "val_patients": sorted(data.named_patients(d.records_of(d.val))),
        "val_pixels": d.digests[d.val],
    }
    return {
        "format": models.FORMAT,
        "format_version": models.FORMAT_VERSION,
        "model": metrics["arguments"]["model"],
        "state_dict": learner.ema.module.state_dict(),
        "classes": d.classes,
        "positive": about["positive"],
        **pre,
        **chosen,
        **d.checks,
        "validation": validation,
        "epoch": epoch,  # that of these weights
        "epochs": epoch,  # how many the run has made; more where the last ones were not selected
        "finished": False,
        "data": about_data,
        "arguments": metrics["arguments"],
        "environment": metrics["environment"],
        "weights": metrics["weights"],
    }


def finish_checkpoint(path: Path, d: TrainingSet, args: argparse.Namespace, epochs: int, device) -> None:
    """Mark the selected model as that of a finished run; a threshold that rests on stressed copies is chosen now.

    They cost as much as twelve validations, too much for each epoch that is selected for a while.
    """
    checkpoint = models.load(path)
    if args.threshold == "stressed" and len(d.classes) == 2:
        model = models.from_checkpoint(checkpoint, device)
        _, logits = validate(model, d, checkpoint)
        stressed = evaluate.infer_stressed(model, d.images, d.val, d.records_of(d.val), checkpoint)
        checkpoint.update(calibrate(logits, stressed, d, "youden"))
    if evaluate.at_bound(checkpoint["temperature"]):
        warn("the temperature lies at the bound of its fit: the validation images don't determine it")
    models.save({**checkpoint, "epochs": epochs, "finished": True}, path)


# --- the run ---


def run(args: argparse.Namespace) -> None:
    """Train as the arguments say."""
    rank, world, device = start_processes(args.device)
    master = rank == 0  # writes, prints and validates
    if master and args.output is not None and args.resume is None:
        refuse_run(Path(args.output))  # before minutes of decoding

    # data and model
    pre = {**models.preprocessing(args.model, args.img_size), "margin": args.margin}
    size = pre["input_size"]
    with master_first(rank):  # it draws, decodes and fetches: the others find the files
        d = read_data(args, size)
        folder, _lock = claim_folder(args) if master else (None, None)  # kept as long as the run lasts
        model, origin, seen = start_model(args, d.classes, size)
    args.output = broadcast(str(folder))  # for the line that says how to go on
    if device.type == "cuda" and d.images.numel() < torch.cuda.mem_get_info(device)[0] // 2:
        d.images = d.images.to(device)  # 25 kB an image at 160 px: the whole set stays on the GPU
    crop = training_size(args, size)
    models.check_size(model, crop)
    models.check_size(model, size)
    learner = make_learner(model, args, device)
    learner.seen = seen
    history = []  # all that a run remembers but what the learner holds
    if args.resume is not None:
        state = broadcast(load_state(folder, args, d.fingerprint, world) if master else None)
        learner.restore(state)
        history, origin = state["epochs"], state["weights"]

    # what an epoch takes
    batch_size = min(args.batch_size * world, len(d.train))
    steps = len(d.train) // batch_size
    warmup = round(args.warmup_epochs * steps)
    feed = Feed(data.preset(args.augment, crop), pre, args.seed, batch_size, slice(rank, None, world), device)
    criterion = make_criterion(d, args, device)
    dtype = pick_dtype(args.precision, device)
    rule = "youden" if args.threshold == "stressed" else args.threshold  # for the time being, see finish_checkpoint
    metrics = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("output", "resume")},
        "environment": evaluate.describe_environment(device),
        "finished": False,
        "data": d.about(),
        "weights": origin,
        "epochs": history,  # the list itself: it grows as the run does
    }
    if master:
        data.write_csv(folder / "splits.csv", split_rows(d))
        save_progress(folder, learner, metrics, world)
        warn_overlap(d, learner.seen)
        print_start(args, origin["note"], d, model, crop, size, device, dtype)

    for epoch in range(len(history) + 1, args.epochs + 1):
        if args.patience and epochs_since_best(history) >= args.patience:
            break
        start = time.perf_counter()
        torch.manual_seed(data.seed_from(args.seed, epoch, rank))  # for dropout and the like
        first_step = (epoch - 1) * steps
        rates = [learning_rate(first_step + i, args.epochs * steps, warmup, args.lr) for i in range(steps)]
        loader = tqdm(
            batches(d, feed, epoch),
            f"epoch {epoch}",
            steps,
            leave=False,
            unit="step",
            disable=None if master else True,  # None: where nobody looks
        )
        train_metrics = train_epoch(learner, criterion, loader, rates, first_step, dtype)
        speed = steps * batch_size / (time.perf_counter() - start)

        val_metrics, logits = broadcast(validate(learner.ema.module, d, pre) if master else None)
        h = {"epoch": epoch, **train_metrics, **val_metrics, "images_per_second": round(speed, 1)}
        history.append(h)
        h["selected"] = is_selected(history, *d.val_patients())
        if master and h["selected"]:
            chosen = calibrate(logits, {}, d, rule)
            models.save(make_checkpoint(learner, d, pre, metrics, val_metrics, chosen), folder / "ckpt.pt")
        h["seconds"] = round(time.perf_counter() - start, 3)
        if master:
            save_progress(folder, learner, metrics, world)
            print(ROW.format(**h), "*" if h["selected"] else "", flush=True)

    if master:
        finish_checkpoint(folder / "ckpt.pt", d, args, len(history), device)
        metrics["finished"] = True
        write_metrics(folder, metrics)
        print_end(folder, d, args, history)
    if world > 1:
        dist.destroy_process_group()


ROW = (
    "{epoch:5}  {train_loss:10.4f}  {val_loss:8.4f}  {val_auroc:9.4f}  {val_accuracy:8.4f}  {seconds:7.1f}"
    "  {images_per_second:8.1f}"
)
HEADER = "epoch  train loss  val loss  val AUROC  val acc.  seconds  images/s"


def split_rows(d: TrainingSet) -> list[dict]:
    """The rows of splits.csv: which image was used for what."""
    mark = {"demo": "phantom"} if data.is_demo(d.root) else {}
    return [
        {"path": r.path, "class": r.label, "patient": r.patient, "subtype": r.subtype, "split": r.split, **mark}
        for r in d.records
    ]


def print_start(
    args: argparse.Namespace, note: str, d: TrainingSet, model, crop: int, size: int, device, dtype
) -> None:
    """What is trained, on what, and what the table's columns are; note: on the weights."""
    train = f"{len(d.train)} images of {d.patients(d.train)} patients to train"
    val = f"{len(d.val)} images of {d.patients(d.val)} patients to validate"
    print(f"{args.model}, {models.parameters(model) / 1e6:.2f} M parameters, {note}")
    print(f"{data.printable(str(d.root))}: {train}, {val}")
    if len(d.classes) == 2:
        print(f"positive class: {d.classes[d.positive_index]}, negative: {d.classes[1 - d.positive_index]}")
    print(f"trained at {crop} px, validated at {size} px, on {device}, {dtype}")
    print("*: selected so far, the latest epoch within a standard error of the best validation AUROC")
    print(
        "val acc.: at a probability of 0.5, so that it stands at a class's share until the averaged weights have moved"
    )
    print(HEADER)


def print_end(folder: Path, d: TrainingSet, args: argparse.Namespace, history: list[dict]) -> None:
    """Which epoch was selected, what the run took, and what to do next."""
    if len(history) < args.epochs:
        print(f"no better validation AUROC in {args.patience} epochs: stopped")
    run, ckpt = summarize(history), folder / "ckpt.pt"
    selected = history[run["best_epoch"] - 1]
    print(f"\nselected: epoch {selected['epoch']} of {len(history)}, validation AUROC {selected['val_auroc']:.4f}")
    print(f"took {run['seconds']:.0f} s; checkpoint: {data.printable(str(ckpt))}\n")
    image = d.root / d.records[d.val[0]].path
    for words in (["evaluate.py", ckpt], ["predict.py", "--ckpt", ckpt, image]):
        print(data.printable(data.command_line("python", *words)))


# --- command line ---


def make_parser() -> data.Parser:
    parser = data.Parser(prog="train.py", description="Fine-tune a timm model on chest radiographs.")
    number, yes_no = data.within, argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=data.filled,
        metavar="DIR",
        help="folder with train/CLASS/*.jpeg (data/chest_xray, else the demo set)",
    )
    add("--img-size", type=number(int, 8, 10_000), metavar="PX", help="side of the input (160, or the model's)")
    add("--positive", metavar="CLASS", help="the positive of two classes (PNEUMONIA, else the last)")
    add("--folds", type=number(int, 2, 1000), default=10, help="parts of the patients, one for validation")
    add("--fold", type=number(int, 0, 999), default=0, help="which part: 0 to folds - 1")
    group = parser.add_argument_group("model")
    add, add_source = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--model", default="mobilenetv3_small_050", help="any timm classification model")
    add_source("--pretrained", action=yes_no, default=None, help="timm's weights: insist, or do not try (try)")
    add_source(
        "--weights",
        type=data.filled,
        metavar="FILE",
        help="weights from a run, a .safetensors file or a torch state dict",
    )
    add("--freeze", action=yes_no, default=False, help="train the head alone: a linear probe")
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=number(int, 1), default=10, help="passes over the training images")
    add("--batch-size", type=number(int, 2), default=64, help="images per step and process")
    add("--lr", type=number(float, 0, 1e30), default=0.003, help="peak rate of AdamW; transformers want less")
    add("--weight-decay", type=number(float, 0, 1e6), default=0.05, help="not on norms and biases")
    add("--layer-decay", type=number(float, 0.1, 1), metavar="X", help="rate of each layer / of the one above")
    add("--warmup-epochs", type=number(float, 0), default=1.0, help="linear warm-up, then cosine")
    add("--ema-decay", type=number(float, 0, 0.99999), default=0.99, help="moving average of weights; 0: none")
    add("--label-smoothing", type=number(float, 0, 0.9), default=0.0, help="label share given to all classes")
    add("--balance", action=yes_no, default=True, help="weigh the classes equally in the loss")
    add("--augment", choices=data.PRESETS, default="robust", help="strength of the augmentation")
    add("--margin", type=number(float, 0, 0.4), default=0.1, help="outer part of each side to hide; 0: none")
    add("--patience", type=number(int, 0), default=0, help="stop so many epochs after the best AUROC; 0: no")
    rules = "youden, stressed (Youden's index, stressed copies of the images included), sensitivity=0.95, or a number"
    add("--threshold", type=threshold_rule, default="stressed", metavar="RULE", help=rules)
    add = parser.add_argument_group("run").add_argument
    add("--output", type=data.filled, metavar="DIR", help="run folder (runs/DATE-TIME-MODEL)")
    add("--resume", type=data.filled, metavar="DIR", help="continue the run in this folder, with its own arguments")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of everything random but the split")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA")
    add("--compile", action=yes_no, default=False, help="torch.compile the model")
    return parser


MAY_CHANGE = ("data", "epochs", "device")  # what --resume takes from the command line


def threshold_rule(text: str) -> str:
    """An argparse type: youden, stressed, sensitivity=X or X, with X in (0, 1)."""
    with contextlib.suppress(ValueError):
        if text in ("youden", "stressed") or 0 < float(text.removeprefix("sensitivity=")) < 1:
            return text
    raise argparse.ArgumentTypeError(f"{text} is not youden, stressed, sensitivity=X or X, with X between 0 and 1")


def to_words(parser: data.Parser, values: dict) -> list[str]:
    """The command line that gives these values, so that the parser can check them."""
    words = []
    for action in parser._actions:
        value = values.get(action.dest)
        if value is None:
            continue
        if action.nargs == 0:  # a flag, which --no-FLAG may contradict
            words.append(action.option_strings[0 if value else -1])
        else:
            words.append(f"{action.option_strings[0]}={value}")
    return words


def parse_arguments(parser: data.Parser) -> argparse.Namespace:
    """The arguments; with --resume those of the run, of which the command line may change some."""
    args = parser.parse_args()
    if args.resume is not None:
        if args.output is not None:
            parser.error("--resume names the folder: leave out --output")
        try:
            stored = models.load(Path(args.resume, "last.pt"), LAST_FORMAT, STATE)["arguments"]
        except UserError as e:
            parser.error(f"--resume {args.resume} holds no run ({e})")
        odd = sorted(stored.keys() ^ (vars(args).keys() - {"resume", "output"}))
        if odd:
            parser.error(f"the run in {args.resume} is of another version of this code: {', '.join(odd)}")
        reader = make_parser()
        reader.prog = f"train.py: {args.resume}/last.pt is damaged or of another version"
        checked = vars(reader.parse_args(to_words(reader, stored)))
        stored = {name: checked[name] for name in stored}
        parser.set_defaults(**stored)
        args = parser.parse_args()  # now a value differs from the stored one only where it was given
        for name, value in fixed(stored).items():
            if getattr(args, name) != value:
                flag = f"--{name.replace('_', '-')}"
                parser.error(f"{flag} {getattr(args, name)} contradicts the run in {args.resume}, which has {value}")
        args.output = args.resume
    if args.fold >= args.folds:
        parser.error(f"--fold {args.fold} is none of the {args.folds} folds: they are 0 to {args.folds - 1}")
    return args


def how_to_go_on(args: argparse.Namespace) -> str:
    """For a run that was interrupted."""
    if args.output is not None and Path(args.output, "last.pt").exists():
        return f"go on with: {data.command_line('python', 'train.py', '--resume', args.output)}"
    return "nothing was saved yet"


def run_or_explain(args: argparse.Namespace) -> None:
    """run; what the compiler can't do, which shows in the first step, is something that the user can fix."""
    if not args.compile:
        return run(args)
    try:
        return run(args)
    except torch._dynamo.exc.TorchDynamoException as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--compile does not work here ({reason}); leave it out") from None


def main() -> None:
    parser = make_parser()
    args = parse_arguments(parser)
    data.run_script(parser, lambda: run_or_explain(args), lambda: how_to_go_on(args))


if __name__ == "__main__":
    main()
