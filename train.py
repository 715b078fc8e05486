"""Fine-tune a timm model to tell pneumonia from normal chest radiographs.

python train.py --model mobilenetv3_small_050 --epochs 10        # data/chest_xray, else a synthetic demo set
python train.py --data chest_xray --weights pretrained.pt        # own data, weights from a file
python train.py --resume runs/20260101-120000-resnet18           # go on after an interruption, to the bit
torchrun --nproc-per-node=4 train.py --data chest_xray           # several GPUs or processes
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sklearn
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import models

LAST_FORMAT = "training state"


class TrainError(Exception):
    """The run can't go on; the message is one line."""


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to the peak, then a cosine down to zero: a pure function of the step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def class_weights(labels: torch.Tensor, classes: int, balance: bool) -> torch.Tensor:
    """float32 [classes], mean 1 over the training images: each class counts the same where balance is asked for."""
    counts = labels.bincount(minlength=classes).float()
    return len(labels) / (classes * counts) if balance else torch.ones(classes)


# --- processes ---


def start_processes(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device): from torchrun's environment, or one process."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = models.pick_device(args.device)
    if world == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = models.pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    # The others wait while the first process fetches weights and decodes a new folder.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), world, device


def from_first(value, world: int):
    """Rank 0's value, on every rank."""
    if world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def sum_over_ranks(t: torch.Tensor, world: int) -> torch.Tensor:
    if world > 1:
        dist.all_reduce(t)
    return t


def share(model: torch.nn.Module, world: int) -> None:
    """Give every rank the weights and statistics of rank 0."""
    if world > 1:
        for t in model.state_dict().values():
            dist.broadcast(t, 0)


# --- the loop ---


def train_epoch(net, model, ema, optimizer, scaler, images, labels, order, draws, state, epoch, args) -> dict:
    """One epoch over the training images; nothing in it waits for the device but the end.

    Args:
        net: what is called (model, perhaps wrapped or compiled); model: what holds the weights.
        images: uint8 [n, side, side]; labels: int64 [n]; draws: [n, DRAWS], see data.draw.
        order: int64 indices of the training images in this epoch's order, the same on every rank. All four lie on one
            device: an index from another one would make each step wait.
        state: what stays the same over the run: rank, world, device, dtype, class weights, strength, sizes and so on.

    Returns:
        train_loss (mean over the epoch), lr (of the last step), images (seen by all processes).

    Raises:
        TrainError: the loss is not finite, with epoch and step.
    """
    device, world = state["device"], state["world"]
    batch = min(args.batch_size * world, len(order))
    steps = len(order) // batch  # the incomplete last batch is left out: other images each epoch
    losses = torch.zeros(steps, device=device)
    net.train()
    bar = tqdm(
        range(steps), desc=f"epoch {epoch}", unit="step", leave=False, disable=None if state["rank"] == 0 else True
    )
    for step in bar:
        done = (epoch - 1) * steps + step
        lr = learning_rate(done, args.epochs * steps, round(args.warmup_epochs * steps), args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        index = order[step * batch : (step + 1) * batch][state["rank"] :: world]
        x, u, y = (t[index].to(device, non_blocking=True) for t in (images, draws, labels))
        x = data.augment(x, u, state["strength"], state["train_size"])
        x = data.normalise(x, state["mean"], state["std"]).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=state["dtype"], enabled=state["dtype"] != torch.float32):
            logits = net(x)
        loss = F.cross_entropy(
            logits.float(), y, state["weights"], reduction="sum", label_smoothing=args.label_smoothing
        )
        loss = loss / len(y)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update(model, step=done)
        losses[step] = loss.detach()
    losses = sum_over_ranks(losses, world).cpu() / world  # the one moment of an epoch that waits for the device
    if not losses.isfinite().all():
        bad = int((~losses.isfinite()).nonzero()[0]) + 1
        raise TrainError(f"the loss is not finite in epoch {epoch}, step {bad} of {steps}; try a lower --lr")
    return {"train_loss": float(losses.mean()), "lr": lr, "images": steps * batch}


def validate(model, images, val_index, labels, state) -> dict:
    """Loss, AUROC, accuracy (at 0.5) and the logits [n, classes] of the validation images, each counted once."""
    device, world = state["device"], state["world"]
    mine = torch.arange(len(val_index))[state["rank"] :: world]
    logits = torch.zeros(len(val_index), state["classes"], dtype=torch.float64)
    if len(mine):
        batches = evaluate.in_batches(images, val_index[mine])
        logits[mine] = torch.from_numpy(evaluate.infer(model, batches, state["mean"], state["std"], device))
    if world > 1:
        logits = sum_over_ranks(logits.to(device if device.type == "cuda" else "cpu"), world).cpu()
    y = labels[val_index].cpu()
    p = logits.softmax(1)
    return {
        "val_loss": float(F.cross_entropy(logits, y)),
        "val_auroc": evaluate.macro_auroc(y.numpy(), p.numpy(), state["positive"]),
        "val_accuracy": float((logits.argmax(1) == y).double().mean()),
        "logits": logits.numpy(),
    }


def calibrate(model, logits: np.ndarray, images, val_index, labels, rule: str, state) -> dict:
    """Temperature and threshold, both chosen on the validation images."""
    y = labels[val_index].cpu().numpy()
    temperature = evaluate.fit_temperature(logits, y)
    if state["classes"] > 2:
        return {"temperature": temperature, "threshold": {"value": None, "rule": "largest probability", "from": ""}}
    z, positive = evaluate.binary_logit(logits, state["positive"]), y == state["positive"]
    source = "validation"
    if rule == "stressed":
        found = evaluate.infer_stressed(model, images, val_index, state["mean"], state["std"], state["device"])
        z = np.concatenate([z, *(evaluate.binary_logit(logits, state["positive"]) for logits in found.values())])
        positive = np.tile(positive, len(found) + 1)
        rule, source = "youden", "validation and its stressed copies"
    value = evaluate.choose_threshold(rule, positive, z / temperature)
    return {"temperature": temperature, "threshold": {"value": value, "rule": rule, "from": source}}


# --- the run ---


def describe_environment(device: torch.device) -> dict:
    """Versions, device and git commit, for the record."""
    try:
        folder = Path(__file__).resolve().parent
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, check=False, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    libraries = {m.__name__: str(m.__version__) for m in (torch, timm, torchvision, sklearn, np)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {data.CORES} cores"
    return {"python": platform.python_version(), **libraries, "device": name, "git_commit": commit}


def make_parser() -> argparse.ArgumentParser:
    parser, number, yes_no = data.Parser(prog="train.py"), data.within, argparse.BooleanOptionalAction
    parser.description = "Fine-tune a timm model on chest radiographs."
    g = parser.add_argument_group("data")
    g.add_argument("--data", metavar="DIR", help="folder with train/CLASS/*.jpeg (data/chest_xray, else the demo set)")
    g.add_argument(
        "--img-size", type=number(int, 1, 10_000), metavar="PX", help="side of the input (160, or the model's)"
    )
    g.add_argument("--val-fraction", type=number(float, 0.01, 0.5), default=0.1, help="of the patients, for validation")
    g = parser.add_argument_group("model")
    g.add_argument("--model", default="mobilenetv3_small_050", help="any timm classification model")
    g = g.add_mutually_exclusive_group()
    g.add_argument("--pretrained", action=yes_no, default=None, help="timm's weights: insist, or do not try (try)")
    g.add_argument("--weights", metavar="FILE", help="weights from a .safetensors file or a torch state dict")
    g = parser.add_argument_group("recipe")
    g.add_argument("--epochs", type=number(int, 1), default=10, help="passes over the training images")
    g.add_argument("--batch-size", type=number(int, 2), default=64, help="images per step and process")
    g.add_argument("--lr", type=number(float, 0), default=0.003, help="peak rate of AdamW; transformers want less")
    g.add_argument("--weight-decay", type=number(float, 0), default=0.05, help="not on norms and biases")
    g.add_argument("--warmup-epochs", type=number(float, 0), default=1.0, help="linear warm-up, then cosine")
    g.add_argument(
        "--ema-decay", type=number(float, 0, 0.99999), default=0.99, help="moving average of weights; 0: none"
    )
    g.add_argument(
        "--label-smoothing", type=number(float, 0, 0.9), default=0.0, help="label share given to all classes"
    )
    g.add_argument("--balance", action=yes_no, default=True, help="weigh the classes equally in the loss")
    g.add_argument("--augment", choices=data.AUGMENT, default="medium", help="strength of the augmentation")
    g.add_argument("--patience", type=number(int, 0), default=0, help="stop so many epochs after the best AUROC; 0: no")
    rules = "youden, stressed (Youden's index, stressed copies of the images included), sensitivity=0.95, or a number"
    g.add_argument("--threshold", type=threshold_rule, default="stressed", metavar="RULE", help=rules)
    g = parser.add_argument_group("run")
    g.add_argument("--output", metavar="DIR", help="run folder (runs/DATE-TIME-MODEL)")
    g.add_argument("--resume", metavar="DIR", help="continue the run in this folder, with its own arguments")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the split and of everything random")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    return parser


def threshold_rule(text: str) -> str:
    """An argparse type: youden, stressed, sensitivity=X or X, with X in (0, 1)."""
    value = text.removeprefix("sensitivity=")
    if text not in ("youden", "stressed") and not 0 < float(value) < 1:
        raise ValueError
    return text


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; with --resume those of the run, which only --epochs and --device may contradict."""
    args = parser.parse_args()
    if args.resume is None:
        return args
    unset = object()
    given = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    metrics = Path(args.resume) / "metrics.json"
    try:
        stored = json.loads(metrics.read_text())["arguments"]
        if stored.keys() != given.keys() - {"resume", "output"}:
            raise ValueError("arguments of another version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TrainError(f"--resume {args.resume} holds no run (no readable {metrics})") from None
    for name, value in given.items():
        if value is unset or name in ("resume", "output"):
            continue
        if name in ("epochs", "device"):
            stored[name] = value
        elif value != stored.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise TrainError(f"{flag} {value} contradicts the run in {args.resume}, which has {stored.get(name)}")
    if given["output"] is not unset and Path(args.output) != Path(args.resume):
        raise TrainError("--output and --resume name different folders")
    return argparse.Namespace(**(vars(args) | stored | {"resume": args.resume, "output": args.resume}))


def make_run_folder(args: argparse.Namespace) -> Path:
    """The run's folder; one that already holds a run is never overwritten."""
    if args.resume is not None:
        for leftover in Path(args.resume).glob(".*.tmp"):  # of a process that was killed while saving
            leftover.unlink()
        return Path(args.resume)
    folder = Path(args.output or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{args.model.replace('/', '_')}")
    if (folder / "last.pt").exists() or (folder / "ckpt.pt").exists():
        raise TrainError(f"{folder} already holds a run; use --resume {folder} to go on, or another --output")
    folder.mkdir(parents=True, exist_ok=bool(args.output))
    return folder


def read_data(root: Path, size: int, args: argparse.Namespace, first: bool, world: int) -> SimpleNamespace:
    """The training and validation images, and all that a run says of them.

    Returns:
        images: uint8 [n, size, size]; digests: int64 [n]; labels: int64 [n]; index: {"train", "val"} of int64 indices;
        records (see data.find_training, with the split "left out" too), classes, positive (an index), left_out, demo.
    """
    d = SimpleNamespace(demo=data.is_demo(root), records=data.find_training(root, args.seed, args.val_fraction))
    # The first process decodes what is not in the cache yet; the others wait for that.
    loaded = data.load_images(root, d.records, size) if first else None
    from_first(None, world)
    d.images, d.digests, failed = loaded or data.load_images(root, d.records, size)
    d.left_out = data.report_left_out(d.records, failed)
    for i in failed:
        d.records[i]["split"] = "left out"
    d.classes = sorted({r["class"] for r in d.records})
    d.positive = data.positive_class(d.classes)
    d.labels = torch.tensor([d.classes.index(r["class"]) for r in d.records])
    d.index = {s: torch.tensor([i for i, r in enumerate(d.records) if r["split"] == s]) for s in ("train", "val")}
    for (split, members), (i, name) in itertools.product(d.index.items(), enumerate(d.classes)):
        if not len(members) or not (d.labels[members] == i).any():
            purpose = {"train": "training", "val": "validation"}[split]
            raise data.DataError(f"class {name} has no readable image for {purpose}")
    if len(d.index["train"]) < 2 * world:
        raise data.DataError(f"{len(d.index['train'])} training images are too few for {world} processes")
    return d


def start_model(args: argparse.Namespace, classes: int, pre: dict, saved: dict | None) -> tuple[torch.nn.Module, dict]:
    """The model to train and where its weights come from; a saved state brings its own, so that none are fetched."""
    torch.manual_seed(args.seed)
    what = args.model, classes, pre["input_size"]
    if saved:
        model, source = models.build(*what), saved["weights_source"]
    elif args.weights or args.pretrained is not False:
        model, source = models.build_pretrained(*what, args.weights, insist=args.pretrained is True)
    else:
        model, source = models.build(*what), {"source": "random", "note": "random weights, as asked", "failed": ""}
    if source["failed"]:
        data.warn(
            f"RANDOM WEIGHTS: {source['failed']}. Training starts from scratch; --weights FILE takes a local file"
        )
    return model, source


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What autocast computes in: float32 is none."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def run(args: argparse.Namespace) -> Path:
    """Train as the arguments say; returns the run folder."""
    rank, world, device = start_processes(args)
    first = rank == 0
    say = print if first else (lambda *_, **__: None)
    pre = models.preprocessing(args.model, args.img_size)
    root = from_first(data.find_root(args.data) if first else None, world)
    args.folder = folder = from_first(make_run_folder(args) if first else None, world)
    arguments = {k: v for k, v in vars(args).items() if k not in ("output", "resume", "folder")}
    metrics = {"arguments": arguments, "environment": describe_environment(device), "finished": False, "epochs": []}

    def write_metrics(**entries) -> None:
        metrics.update(entries)
        if first:
            data.write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")

    if not args.resume:
        write_metrics()  # the arguments are all that --resume needs until the first state is saved
    if data.is_demo(root):
        data.warn_demo(root)
    d = read_data(root, pre["input_size"], args, first, world)
    about_data = {"root": str(root.resolve()), "demo": d.demo, "fingerprint": data.fingerprint(d.records)}

    state_file, saved = folder / "last.pt", None
    if first and args.resume and state_file.exists():
        saved = models.load(state_file, LAST_FORMAT)
        try:
            if saved["best"]["epoch"]:
                models.load(folder / "ckpt.pt")  # missing or damaged: better told now than at the end
        except models.ModelError as e:
            raise TrainError(f"{e}; the run can't go on without it, start a new one") from None
    elif first and args.resume and (folder / "ckpt.pt").exists():
        raise TrainError(f"{folder} has a ckpt.pt but no last.pt to go on from; start a new run")
    saved = from_first(saved, world)
    if saved and saved["fingerprint"] != about_data["fingerprint"]:
        raise TrainError(f"the images in {root} are not those that the run in {folder} was started with")
    if saved and saved["world"] != world:
        raise TrainError(f"the run in {folder} was started with {saved['world']} processes, not {world}: resume it so")
    model, source = start_model(args, len(d.classes), pre, saved)
    # A random crop enlarges what it shows; training at 3/4 of the size makes up for that (Touvron et al. 2019).
    small = min(max(round(pre["input_size"] * 0.75 / 32) * 32, 32), pre["input_size"])
    train_size = pre["input_size"] if args.augment == "none" or models.takes_one_size(args.model) else small
    for size in {pre["input_size"], train_size}:
        models.check_size(model, size)
    model.to(device, memory_format=torch.channels_last)
    share(model, world)  # a download may have worked on one machine alone
    # The warm-up lets it look back over 2 to 6 % of the steps so far: a longer memory ruins short runs.
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True, warmup_gamma=10)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay, foreach=True)
    dtype = pick_dtype(args.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 and device.type == "cuda")
    net = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model
    net = torch.compile(net) if args.compile else net
    history, best, seconds = [], {"epoch": 0, "auroc": -1.0, "reached": 0}, 0.0  # epoch: the selected one
    parts = {"model": model, "ema": ema.module, "optimizer": optimizer, "scaler": scaler}
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        history, best, seconds = saved["history"], saved["best"], saved["seconds"]

    if device.type == "cuda" and d.images.numel() < torch.cuda.mem_get_info(device)[0] // 2:
        d.images = d.images.to(device)  # 50 kB an image at 224 px: the whole set stays on the GPU
    labels, val = d.labels.to(d.images.device), d.index["val"].to(d.images.device)
    ill = int((d.labels[d.index["val"]] == d.positive).sum())
    sides = ill, len(val) - ill
    state = {"rank": rank, "world": world, "device": device, "dtype": dtype, "train_size": train_size}
    state |= {"classes": len(d.classes), "positive": d.positive, "mean": pre["mean"], "std": pre["std"]}
    state["weights"] = class_weights(d.labels[d.index["train"]], len(d.classes), args.balance).to(device)
    state["strength"] = data.AUGMENT[args.augment]
    train_records = [d.records[i] for i in d.index["train"].tolist()]
    images_of = {s: len(members) for s, members in d.index.items()}
    patients_of = {s: len({d.records[i]["patient"] for i in members.tolist()}) for s, members in d.index.items()}
    metrics["data"] = about_data | {"classes": d.classes, "images": images_of, "patients": patients_of}
    metrics["data"]["left_out"], metrics["weights"] = d.left_out, source
    if first:
        columns = ["path", "class", "patient", "subtype", "split"] + ["demo"] * d.demo
        data.write_atomic(folder / "splits.csv", data.to_csv([r | {"demo": "phantom"} for r in d.records], columns))
    count = {s: f"{images_of[s]} images of {patients_of[s]} patients" for s in d.index}
    say(f"{args.model}, {models.parameters(model) / 1e6:.2f} M parameters, {source['note']}")
    say(f"{root}: {count['train']} to train, {count['val']} to validate; {pre['input_size']} px on {device}, {dtype}")
    say("epoch  train loss  val loss  val AUROC  val acc.  seconds  images/s")

    def save_last() -> None:
        content = {"format": LAST_FORMAT, "format_version": models.FORMAT_VERSION, "demo": d.demo, "world": world}
        content |= {name: part.state_dict() for name, part in parts.items()}
        content |= {"history": history, "best": best, "seconds": seconds, "weights_source": source}
        if first:
            models.save(content | {"fingerprint": about_data["fingerprint"]}, state_file)

    def save_checkpoint(epoch: int, found: dict, chosen: dict) -> None:
        checkpoint = {"format": models.FORMAT, "format_version": models.FORMAT_VERSION, "model": args.model}
        checkpoint |= {"state_dict": ema.module.state_dict(), "classes": d.classes, "positive": d.classes[d.positive]}
        checkpoint |= {**pre, **chosen, "validation": found, "epoch": epoch, "input_check": input_check()}
        patients = sorted(data.named_patients(train_records))
        checkpoint["data"] = about_data | {"patients": patients, "pixels": d.digests[d.index["train"]].clone()}
        checkpoint["data"]["val"] = [d.records[i]["path"] for i in d.index["val"].tolist()]
        checkpoint |= {"arguments": arguments, "environment": metrics["environment"]}
        models.save(checkpoint, folder / "ckpt.pt")

    @functools.cache
    def input_check() -> dict:
        return models.fit_input_check(*(evaluate.in_batches(d.images, d.index[s].to(d.images.device)) for s in d.index))

    def progress() -> dict:
        median = round(float(np.median([h["images_per_second"] for h in history])), 1)
        return {
            "epochs": history,
            "best_epoch": best["epoch"],
            "seconds": round(seconds, 3),
            "images_per_second": median,
        }

    if not saved:
        save_last()
    for epoch in range(len(history) + 1, args.epochs + 1):
        if args.patience and len(history) - best["reached"] >= args.patience:
            say(f"no better validation AUROC in {args.patience} epochs: stopped")
            break
        start = time.perf_counter()
        torch.manual_seed(data.mix(args.seed, epoch, rank))  # for dropout and the like
        order = d.index["train"][data.shuffle(len(d.index["train"]), args.seed, epoch)].to(d.images.device)
        draws = data.draw(len(d.records), args.seed, epoch).to(d.images.device)
        step = train_epoch(net, model, ema, optimizer, scaler, d.images, labels, order, draws, state, epoch, args)
        rate = step.pop("images") / (time.perf_counter() - start)
        share(ema.module, world)  # the statistics of normalisation layers are those of each rank's own images
        found = validate(ema.module, d.images, val, labels, state)
        logits = found.pop("logits")
        if math.isnan(found["val_auroc"]) or math.isnan(found["val_loss"]):
            raise TrainError(f"the validation loss is not finite in epoch {epoch}; try a lower --lr")
        if found["val_auroc"] > best["auroc"]:
            best = best | {"auroc": found["val_auroc"], "reached": epoch}
        # AUROC saturates here: between epochs that it can't tell apart, the longer trained one is selected.
        if found["val_auroc"] >= best["auroc"] - evaluate.auroc_error(best["auroc"], *sides):
            best = best | {"epoch": epoch}
            if first:
                # Stressed copies cost as much as nine validations: they wait for the end of the run.
                rule = "youden" if args.threshold == "stressed" else args.threshold
                save_checkpoint(epoch, found, calibrate(ema.module, logits, d.images, val, labels, rule, state))
        took = time.perf_counter() - start
        seconds += took
        h = {"epoch": epoch} | step | found | {"seconds": round(took, 3), "images_per_second": round(rate, 1)}
        history.append(h)
        save_last()
        write_metrics(**progress())
        line = (
            f"{epoch:5}  {h['train_loss']:10.4f}  {h['val_loss']:8.4f}  {h['val_auroc']:9.4f}  {h['val_accuracy']:8.4f}"
        )
        say(f"{line}  {took:7.1f}  {h['images_per_second']:8.1f}{' *' * (best['epoch'] == epoch)}", flush=True)
    if first and args.threshold == "stressed":
        start = time.perf_counter()
        checkpoint = models.load(folder / "ckpt.pt")
        selected = models.from_checkpoint(checkpoint, device)
        logits = validate(selected, d.images, val, labels, state | {"rank": 0, "world": 1})["logits"]
        checkpoint |= calibrate(selected, logits, d.images, val, labels, args.threshold, state)
        models.save(checkpoint, folder / "ckpt.pt")
        seconds += time.perf_counter() - start
    write_metrics(**progress(), finished=True)
    if first:
        an_image = data.scan(root, "test")[0] if (root / "test").is_dir() else d.records[d.index["val"][0]]
        ckpt, image = shlex.quote(str(folder / "ckpt.pt")), shlex.quote(str(root / an_image["path"]))
        say(f"\nbest epoch {best['epoch']} of {len(history)}, {seconds:.0f} s; checkpoint: {folder / 'ckpt.pt'}\n")
        say(f"python evaluate.py {ckpt}\npython predict.py --ckpt {ckpt} {image}")
    if world > 1:
        dist.destroy_process_group()
    return folder


def main() -> None:
    parser = make_parser()
    args = argparse.Namespace()
    try:
        args = parse_arguments(parser)
        run(args)
    except (TrainError, data.DataError, models.ModelError, OSError) as e:
        go_on = f"; go on with --resume {args.folder}" if isinstance(e, OSError) and hasattr(args, "folder") else ""
        parser.error(f"{e}{go_on}")
    except KeyboardInterrupt:
        where = getattr(args, "folder", None)
        go_on = f"; go on with: python train.py --resume {shlex.quote(str(where))}" if where else ""
        parser.exit(130, f"interrupted{go_on}\n")


if __name__ == "__main__":
    main()
