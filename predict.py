"""Classify radiographs with a trained model.

python predict.py img.jpeg                              # the newest run's model
python predict.py --ckpt runs/a --csv folder            # a run's model, for all images in a folder
python predict.py --cam maps img.jpeg                   # and where the model looked
find . -name '*.png' | python predict.py --json -       # a list of paths on stdin, one JSON object a line

From Python: predict.predict(images) with paths, open files, Pillow images or arrays.
"""

import argparse
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath

import data  # before the libraries: it looks after Ctrl-C while they are being imported

# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import models
from data import UserError, warn

BATCH = 32
FLUSH = object()  # among sources: all before it is to come out
COLOUR, CONSTANT, SMALL = 12, 6, 64  # limits of the flags, in grey levels (mean, spread) and pixels


@dataclass(frozen=True)
class Classifier:
    """A checkpoint that is ready to classify."""

    checkpoint: dict
    model: torch.nn.Module
    device: torch.device
    checksum: str  # first 12 hexadecimal digits of the file's SHA-256
    turns: threading.Semaphore  # threads that may use the model at once: an accelerator takes one


@dataclass
class Prediction:
    """One row of the results; these fields are the keys of --json."""

    path: str
    label: str | None = None
    probability: float | dict[str, float] | None = None  # of the positive class; of each of more than two
    threshold: float | None = None  # on the probability of the positive class; None for more than two classes
    flags: list[str] = field(default_factory=list)
    unlike: float | None = None  # distance to the training images; above 1 it is flagged
    error: str = ""
    demo: bool = False  # the model learnt synthetic phantoms: it means nothing for patients
    model: str = ""
    checksum: str = ""


def predict(images: list, checkpoint: str | Path | None = None, device: str = "auto") -> list[dict]:
    """Classify images; the model is kept between calls.

    Args:
        images: paths, open seekable binary files, Pillow images or uint8 arrays [height, width] or [height, width, 3].
        checkpoint: a ckpt.pt or the folder of a run; None for the newest run under runs/.

    Returns:
        for each image the fields of Prediction; one that can't be read has its reason in error.

    Raises:
        UserError: no usable checkpoint or device.
    """
    classifier = open_classifier(checkpoint, device)
    work = functools.partial(classify, classifier=classifier)
    images = list(images)
    lists = stream(images, work, max(1, min(len(images), data.CORES)), BATCH)
    return [asdict(row) for row in itertools.chain.from_iterable(lists)]


def open_classifier(checkpoint: str | Path | None, device: str) -> Classifier:
    """The classifier of a checkpoint, loaded once for as long as its file stays as it is."""
    path = models.in_run_folder(models.newest_checkpoint() if checkpoint is None else checkpoint)
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return load_classifier(path.absolute(), changed, device)


@functools.lru_cache(maxsize=2)
def load_classifier(path: Path, changed: int, device: str) -> Classifier:
    checkpoint = models.load(path)
    device = models.pick_device(device)
    model = models.from_checkpoint(checkpoint, device)
    checksum = data.sha256(path)[:12]
    turns = threading.Semaphore(data.CORES if device.type == "cpu" else 1)
    return Classifier(checkpoint, model, device, checksum, turns)


# --- read ---


def find_inputs(inputs):
    """Yield the paths that files, folders, globs and - (a list on stdin) stand for, in order. FLUSH is handed on."""
    for item in inputs:
        if item is FLUSH:
            yield FLUSH
        elif item == "-":
            yield from find_inputs(lines_on_stdin())
        elif os.path.exists(item) or not glob.has_magic(item):
            yield from find_images(item)
        else:
            found = sorted(glob.glob(item, recursive=True)) or [item]
            images = itertools.chain.from_iterable(map(find_images, found))
            yield from dict.fromkeys(images)  # ** finds a folder and what is in it


def find_images(path: str) -> list[str]:
    """The images of a folder; whatever else stands for itself.

    So does a folder that can't be read, or holds no image: it gets a row that says so.
    """
    if not os.path.isdir(path):
        return [path]
    unreadable, passed_over = [], Counter()
    found = [str(image) for image in data.walk(Path(path), passed_over, unreadable.append)]
    found += [error.filename for error in unreadable]
    if passed_over:
        warn(f"passed over in {path}: {passed_over.total()} files that are no images by their ending")
    return found or [path]


def lines_on_stdin():
    """Yield the paths that come, and FLUSH before each wait: what came so far is not to wait for more."""
    rest = b""
    chunk = b"\n"
    while chunk:
        yield FLUSH
        chunk = os.read(0, 65536)
        *lines, rest = (rest + (chunk or b"\n")).split(b"\n")
        for line in lines:
            path = os.fsdecode(line.rstrip(b"\r"))
            if path.strip() not in ("", "-"):
                yield path


def path_of(source) -> str:
    """Of a path or an open file; empty for what has none."""
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    return os.fsdecode(name) if isinstance(name, str | os.PathLike) else ""


def stream(sources, work, workers: int, limit: int):
    """Yield work([source, ...]) of the sources in order, a few lists ahead, however many sources there are.

    Lists grow up to limit, so that few sources are shared out too. FLUSH makes all before it come out.
    """
    pool, jobs, batch = ThreadPoolExecutor(workers), deque(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    submitted = 0
    try:
        for source in itertools.chain(sources, [FLUSH]):
            if source is FLUSH:
                wanted, ahead = 1, 0
            else:
                wanted, ahead = min(limit, 2 ** (submitted // workers)), 2 * workers
                batch.append(source)
            if len(batch) >= wanted:
                jobs.append(pool.submit(work, batch))
                submitted += 1
                batch = []
            while len(jobs) > ahead:
                yield jobs.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(max(threads, torch.get_num_threads()))  # another call may have ended meanwhile


# --- classify ---


def classify(sources: list, classifier: Classifier, maps: Path | None = None) -> list[Prediction]:
    """A prediction for each path, open file, Pillow image or array; heat maps of paths go to the folder maps.

    These hook into the model, which no other thread may use meanwhile.
    """
    checkpoint = classifier.checkpoint
    pixels, infos, errors = zip(*[data.decode(source, checkpoint["input_size"]) for source in sources])
    images = torch.from_numpy(np.stack(pixels))  # black where one can't be read
    unlike = models.unlikeness(checkpoint["input_check"], images) / checkpoint["input_check"]["cut"]
    with classifier.turns:
        logits = models.infer(classifier.model, [images], checkpoint)
    p = models.probabilities(logits, checkpoint["temperature"])
    rows = []
    for i, source in enumerate(sources):
        row = Prediction(
            path=path_of(source),
            error=errors[i],
            threshold=checkpoint["threshold"]["value"],
            demo=checkpoint["data"]["demo"],
            model=checkpoint["model"],
            checksum=classifier.checksum,
        )
        if not row.error:
            row.unlike = unlike[i].item()
            row.flags = flags(pixels[i], infos[i], row.unlike)
            decide(row, p[i].tolist(), checkpoint)
        if maps is not None and row.label is not None:
            add_heat_map(row, pixels[i], classifier, maps)
        rows.append(row)
    return rows


def decide(row: Prediction, probabilities: list[float], checkpoint: dict) -> None:
    """Fill in probability and label, or the error that there is none."""
    classes = checkpoint["classes"]
    positive = classes.index(checkpoint["positive"])
    if not np.isfinite(probabilities).all():
        row.error = "the model's output for this image is not finite"
    elif len(classes) == 2:
        row.probability = probabilities[positive]
        row.label = classes[positive if row.probability >= row.threshold else 1 - positive]
    else:
        row.probability = dict(zip(classes, probabilities))
        row.label = max(row.probability, key=row.probability.get)


def flags(pixels: np.ndarray, info: data.ImageInfo, unlike: float) -> list[str]:
    """What a person should know of an image before trusting the label."""
    low, high = np.percentile(pixels[::4, ::4], (2, 98))  # what lies beyond may be a letter or an edge
    limits = {
        "colour image": info.colour > COLOUR,
        "near-constant image": high - low < CONSTANT,
        "under 64 pixels": min(info.width, info.height) < SMALL,
        "unlike training images": unlike > 1,
    }
    return [name for name, holds in limits.items() if holds]


# --- heat maps ---

MAP_END = "_cam.png"
LOW = 0.3  # of a map's own maximum: what is lower has no colour
PANEL = (224, 2500)  # pixels: smallest width, largest side
GREY, WHITE = (90, 90, 90), (255, 255, 255)


def add_heat_map(row: Prediction, pixels: np.ndarray, classifier: Classifier, folder: Path) -> None:
    """Write what draw_heat_map draws of one prediction, which becomes an error where its file is gone meanwhile.

    pixels: uint8 [size, size], what the model saw.
    """
    checkpoint = classifier.checkpoint
    try:
        picture, _ = data.read_image(row.path, None)
    except data.ImageError as e:
        row.label, row.probability = None, None
        row.error = f"no map: {e}"
        return
    x = data.to_input(torch.from_numpy(pixels)[None].to(classifier.device), checkpoint)
    heat = models.heat_map(classifier.model, x, checkpoint["classes"].index(row.label))[0].cpu().numpy()
    drawn = draw_heat_map(Image.fromarray(picture), heat, caption(row, checkpoint["positive"]))
    with data.replacing(folder / map_name(Path(row.path))) as f:
        drawn.save(f, "PNG")


def map_name(path: PurePath) -> str:
    """A file name from the last parts of a path; a digest of the whole keeps those of one name apart."""
    parts = path.relative_to(path.anchor).parts[-3:]
    name = re.sub(r"[^\w-]+", "_", "_".join(parts))
    name = name.encode()[-120:].decode(errors="ignore")  # file systems count bytes
    return f"{name}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}{MAP_END}"


def caption(row: Prediction, positive: str) -> list[str]:
    """The lines under a heat map."""
    if row.threshold is None:
        result = f"{row.label}: P({row.label}) = {row.probability[row.label]:.3f}"
    else:
        result = f"{row.label}: P({positive}) = {row.probability:.3f}, threshold {row.threshold:.3f}"
    lines = [Path(row.path).name, result, f"colour: what speaks for {row.label}, scaled to this map's own maximum"]
    if row.demo:
        lines.append("DEMO MODEL, trained on synthetic phantoms")
    return lines + row.flags


def draw_heat_map(picture: Image.Image, heat: np.ndarray, lines: list[str]) -> Image.Image:
    """The radiograph beside itself with the map over it, a colour scale, and a caption.

    Args:
        picture: grey. heat: float [height, width] in [0, 1], of any size.
    """
    factor = min(max(PANEL[0] / picture.width, 1), PANEL[1] / max(picture.size))
    picture = ImageOps.scale(picture, factor)
    width, height = picture.size
    heat = np.asarray(Image.fromarray(heat).resize(picture.size, Image.Resampling.BILINEAR))
    font = ImageFont.load_default(max(12, width // 28))
    gap = round(font.size / 3)
    line = font.size + gap
    canvas = Image.new("RGB", (2 * width + gap, height + line * (len(lines) + 1) + gap), "black")
    canvas.paste(picture, (0, 0))
    canvas.paste(picture, (width + gap, 0))
    paste_heat(canvas, heat, (width + gap, 0))
    draw = ImageDraw.Draw(canvas)
    left, top = width + gap + 3 * font.size, height + gap
    right, bottom = canvas.width - 3 * font.size, top + font.size
    canvas.paste(GREY, (left, top, right, bottom))
    ramp = np.linspace(LOW, 1, right - left)
    paste_heat(canvas, np.tile(ramp, (bottom - top, 1)), (left, top))
    draw.text((left - gap, top), f"{LOW}", fill=WHITE, font=font, anchor="ra")
    draw.text((right + gap, top), "1", fill=WHITE, font=font)
    for text in lines:
        top += line
        draw.text((gap, top), shorten(text, font, canvas.width - 2 * gap), fill=WHITE, font=font)
    return canvas


def paste_heat(canvas: Image.Image, heat: np.ndarray, corner: tuple[int, int]) -> None:
    """From red to yellow and from faint to half opaque; nothing under LOW."""
    strength = (heat - LOW).clip(0) / (1 - LOW)
    colour = ImageOps.colorize(Image.fromarray((255 * strength).astype(np.uint8)), "red", "yellow")
    opacity = np.where(heat < LOW, 0, 70 + 60 * strength)
    canvas.paste(colour, corner, Image.fromarray(opacity.astype(np.uint8)))


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A line that fits, without its middle where it would not; the font knows ASCII alone."""
    text = data.printable(text).encode("ascii", "replace").decode()
    while font.getlength(text) > width:
        middle = len(text) // 2
        text = f"{text[: middle - 2]}...{text[middle + 2 :]}"
    return text


# --- write ---


def to_table(rows: list[Prediction], classes: list[str], positive: str, header: bool) -> list[str]:
    """A line for each row; the path stands last, since nobody knows how long paths will be."""
    threshold = rows[0].threshold
    column = max(len(name) for name in [*classes, "error"])
    of, note = "P(label)", ""
    if threshold is not None:
        of, note = f"P({positive})", f" (threshold {threshold:.3f})"
    lines = [f"{'label':{column}}  {of}  image{note}"] if header else []
    for row in rows:
        p = row.probability[row.label] if isinstance(row.probability, dict) else row.probability
        shown = "-" if p is None else f"{p:.4f}"
        notes = [row.error] if row.error else row.flags + ["DEMO MODEL"] * row.demo
        notes = f"  [{'; '.join(notes)}]" if notes else ""
        path = data.printable(row.path + notes)
        lines.append(f"{row.label or 'error':{column}}  {shown:>{len(of)}}  {path}")
    return lines


def csv_row(row: Prediction, classes: list[str]) -> dict:
    probabilities = {"probability": row.probability}
    if len(classes) > 2:
        probabilities = {f"probability_{name}": row.probability and row.probability[name] for name in classes}
    return {
        "path": row.path,
        "label": row.label,
        **probabilities,
        "threshold": row.threshold,
        "flags": "; ".join(row.flags + ["demo model"] * row.demo),
        "unlike": row.unlike,
        "error": row.error,
        "model": row.model,
        "checksum": row.checksum,
    }


def to_text(rows: list[Prediction], style: str, checkpoint: dict, first: bool) -> str:
    """Rows as json, csv or table; a header stands above the first ones."""
    classes = checkpoint["classes"]
    if style == "json":
        lines = [json.dumps(asdict(row)) for row in rows]
    elif style == "csv":
        return data.to_csv([csv_row(row, classes) for row in rows], header=first)
    else:
        lines = to_table(rows, classes, checkpoint["positive"], header=first)
    return "".join(f"{line}\n" for line in lines)


def summary(counts: Counter, flagged: int, checkpoint: dict) -> str:
    """The last line: how many images there were, and what was said of them; counts: of each label, None for errors."""
    labels = [f"{counts[name]} {name}" for name in checkpoint["classes"]]
    if len(labels) == 2:
        positives = counts[checkpoint["positive"]]
        labels = [f"{positives} positive", f"{counts.total() - counts[None] - positives} negative"]
    images = "1 image" if counts.total() == 1 else f"{counts.total()} images"
    return f"{images}: {', '.join(labels)}, {flagged} flagged, {counts[None]} errors"


def make_parser() -> argparse.ArgumentParser:
    parser = data.Parser(prog="predict.py", description="Classify radiographs. For research, not for diagnosis.")
    parser.add_argument("inputs", nargs="+", metavar="PATH", help="files, folders, globs, or - for a list on stdin")
    parser.add_argument("--ckpt", action="append", metavar="FILE", help="checkpoint or folder of a run (the newest)")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", dest="style", action="store_const", const="json", help="one JSON object a line")
    style.add_argument("--csv", dest="style", action="store_const", const="csv", help="CSV with a header")
    parser.add_argument(
        "--cam", type=data.filled, metavar="DIR", help="write each image with a heat map (HiResCAM) to DIR"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.ckpt and len(args.ckpt) > 1:
        raise UserError("--ckpt takes one checkpoint")
    classifier = open_classifier(args.ckpt and args.ckpt[0], args.device)
    checkpoint = classifier.checkpoint
    if not checkpoint["finished"]:
        warn(f"UNFINISHED MODEL: epoch {checkpoint['epochs']} of {checkpoint['arguments']['epochs']}")
    if checkpoint["data"]["demo"]:
        warn("DEMO MODEL: it was trained on synthetic phantoms; its predictions mean nothing for patients")
    work = functools.partial(classify, classifier=classifier)
    workers, limit = data.CORES, BATCH
    if all(map(os.path.isfile, args.inputs)):  # else nobody knows how many there will be
        workers = min(workers, len(args.inputs))
    if args.cam:
        folder = Path(args.cam)
        if any(folder.resolve().is_relative_to(Path(item).resolve()) for item in args.inputs):
            raise UserError("--cam DIR lies in a folder of the inputs: its maps would be classified too")
        folder.mkdir(parents=True, exist_ok=True)
        if any(data.is_image(path) and not path.name.endswith(MAP_END) for path in folder.iterdir()):
            raise UserError(f"--cam {args.cam} holds images, with which maps would be confused; take another folder")
        work = functools.partial(classify, classifier=classifier, maps=folder)
        workers, limit = 1, 1  # a heat map takes long: each gives its row at once
    counts, flagged = Counter(), 0
    with tqdm(unit="img", leave=False, disable=None) as bar:
        for rows in stream(find_inputs(args.inputs), work, workers, limit):
            with bar.external_write_mode():  # the bar makes way for rows on the same terminal
                sys.stdout.write(to_text(rows, args.style, checkpoint, first=not counts))
                sys.stdout.flush()
            bar.update(len(rows))
            counts.update(row.label for row in rows)
            flagged += sum(bool(row.flags) for row in rows)
    if not counts:
        raise UserError(f"no image found in {' '.join(args.inputs)}")
    print(summary(counts, flagged, checkpoint), file=sys.stderr)
    return 1 if counts[None] else 0


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    data.run_script(parser, lambda: run(args))


if __name__ == "__main__":
    main()
