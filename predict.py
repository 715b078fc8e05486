"""Classify radiographs with a trained model.

python predict.py img.jpeg                              # the newest finished run's model
python predict.py --ckpt runs/a --csv folder            # a run's model, for all images in a folder
python predict.py --cam maps img.jpeg                   # also heat maps, in the folder maps
find . -name '*.png' | python predict.py --json -       # paths from stdin, one JSON object per line

From Python: predict.predict(images) with paths, open files, Pillow images or arrays.

Sections: inputs, classify, heat maps, write.
"""

import data  # isort: skip (first, so that Ctrl-C is quiet during the imports below)

import argparse
import contextlib
import functools
import glob
import itertools
import json
import os
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import models
from data import UserError, count, warn

# --- inputs ---


def find_inputs(inputs):
    """Yield the paths of files, folders, globs and - (a list on stdin), in order.

    A folder that can't be read or has no images is yielded itself: its row says why.
    """
    for item in inputs:
        if item == "-":
            lines = (line.rstrip("\r\n") for line in sys.stdin)
            yield from find_inputs(line for line in lines if line not in ("", "-"))
        elif os.path.isdir(item):
            unreadable, passed_over = [], Counter()
            found = [str(path) for path in data.walk(Path(item), passed_over, unreadable.append)]
            found += [error.filename for error in unreadable]
            if passed_over:
                warn(f"skipped {count(passed_over.total(), 'other file')} in {item}")
            yield from found or [item]
        else:
            matches = [] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
            yield from dict.fromkeys(find_inputs(matches)) or [item]  # ** matches a folder and what is in it


# --- classify ---

BATCH = 32


@dataclass
class Prediction:
    """One row of the results; the fields are the keys of --json."""

    path: str
    label: str | None = None
    probability: float | dict[str, float] | None = None  # of the positive class, or of each if there are more than two
    threshold: float | None = None  # on the probability of the positive class; None for more than two classes
    flags: list[str] = field(default_factory=list)
    unlike: float | None = None  # distance to the training images; above 1 it is flagged
    error: str = ""
    demo: bool = False  # trained on synthetic phantoms: no meaning for patients
    model: str = ""
    checksum: str = ""  # first 12 hexadecimal digits of the checkpoint's SHA-256
    run: str = ""  # path of the checkpoint


@dataclass
class Classifier:
    """A checkpoint that is ready to classify."""

    path: Path
    checksum: str
    checkpoint: dict
    model: torch.nn.Module
    turns: threading.Semaphore  # threads that may use the model at once: an accelerator takes one


def predict(images, checkpoint: str | Path | None = None, device: str = "auto") -> list[dict]:
    """Classify images; the model is kept between calls, and several threads may call at once.

    Args:
        images: paths, open seekable binary files, Pillow images or uint8 arrays [height, width] or [height, width, 3],
            see data.read_image.
        checkpoint: a ckpt.pt or the folder of a run; None for the newest finished run in runs/, else the newest.

    Returns:
        for each image the fields of Prediction; one that can't be read has its reason in error.

    Raises:
        UserError: no usable checkpoint or device.
    """
    classifier = open_classifier(checkpoint, device)
    return [asdict(row) for row in classify_all(images, classifier)]


def open_classifier(checkpoint: str | Path | None, device: str) -> Classifier:
    """The classifier of a checkpoint, loaded once until its file changes."""
    path = models.in_run_folder(models.newest_checkpoint() if checkpoint is None else checkpoint)
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return load_classifier(path.absolute(), changed, device)


@functools.lru_cache(maxsize=2)
def load_classifier(path: Path, changed: int, device: str) -> Classifier:  # changed: reload if it differs
    checkpoint = models.load(path)
    device = models.pick_device(device)
    model = models.from_checkpoint(checkpoint, device)
    turns = threading.Semaphore(data.CORES if device.type == "cpu" else 1)
    return Classifier(path, data.sha256(path)[:12], checkpoint, model, turns)


def classify_all(sources, classifier: Classifier):
    """Yield the predictions of any number of sources in order, in batches spread over all cores."""
    sources = iter(sources)
    batches = iter(lambda: list(itertools.islice(sources, BATCH)), [])
    work = functools.partial(classify, classifier=classifier)
    with ThreadPoolExecutor(data.CORES) as pool:
        while ahead := list(itertools.islice(batches, 4 * data.CORES)):
            yield from itertools.chain.from_iterable(pool.map(work, ahead))


def classify(sources: list, classifier: Classifier, maps: Path | None = None) -> list[Prediction]:
    """A prediction for each path, open file, Pillow image or array.

    maps: a folder for heat maps. They hook into the model, so no other thread may use it at the same time.
    """
    checkpoint = classifier.checkpoint
    classes = checkpoint["classes"]
    images, infos = zip(*[data.read_image(source, checkpoint["input_size"]) for source in sources])
    batch = torch.from_numpy(np.stack(images))  # black where one can't be read
    unlike = models.unlikeness(checkpoint["input_check"], batch)
    with classifier.turns:
        logits = models.infer(classifier.model, batch, checkpoint)
    decision = models.decide(logits, checkpoint)
    rows = []
    for i, source in enumerate(sources):
        row = Prediction(
            path=str(source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")),
            threshold=checkpoint["threshold"]["value"],
            error=infos[i].error,
            demo=checkpoint["data"]["demo"],
            model=checkpoint["model"],
            checksum=classifier.checksum,
            run=str(classifier.path),
        )
        rows.append(row)
        if row.error:
            continue
        row.unlike = unlike[i].item()
        row.flags = find_flags(images[i], infos[i], row.unlike)
        if not logits[i].isfinite().all():
            row.error = "the model's output for this image is not finite"
            continue
        row.label = classes[decision.predicted[i]]
        probabilities = decision.probabilities[i].tolist()
        row.probability = probabilities[-1] if len(classes) == 2 else dict(zip(classes, probabilities))
        if maps:
            write_heat_map(row, images[i], classifier, maps)
    return rows


def find_flags(image: np.ndarray, info: data.ImageInfo, unlike: float) -> list[str]:
    """What a person should know about an image before trusting the label."""
    low, high = np.percentile(image[::4, ::4], (2, 98))  # what lies beyond may be a letter or an edge
    flags = {
        "colour image": info.colour > 12,
        "near-constant image": high - low < 6,
        "under 64 pixels": min(info.width, info.height) < 64,
        "lateral view": info.view in data.LATERAL,  # models learn from frontal ones
        "mask or drawing": info.is_mask,
        "unlike training images": unlike > 1,
    }
    return [flag for flag, is_set in flags.items() if is_set]


# --- heat maps ---

LOW = 0.3  # of a map's own maximum: lower values are not tinted
TINT = (255, 110, 0)
SMALLEST = 224  # minimum longer side of a panel, in pixels
FONTS = (
    "DejaVuSans",
    "NotoSans-Regular",
    "arial",
    "NotoSansCJK-Regular",
    "DroidSansFallbackFull",
    "wqy-microhei",
    "msyh",
)


def draw_heat_map(image: np.ndarray, heat: np.ndarray, lines: list[str]) -> Image.Image:
    """The radiograph, beside it the same with its heat map (more opaque where higher), and lines of text below.

    Args:
        image: uint8 [height, width]. heat: float32 in [0, 1], of any size.
    """
    side = max(SMALLEST, *image.shape)
    height, width = (max(1, round(n * side / max(image.shape))) for n in image.shape)
    radiograph = Image.fromarray(image).resize((width, height))
    tinted = radiograph.convert("RGB")
    heat = np.asarray(Image.fromarray(heat).resize(tinted.size, Image.Resampling.BILINEAR))
    opacity = np.where(heat < LOW, 0, 150 * heat).astype(np.uint8)
    tinted.paste(TINT, mask=Image.fromarray(opacity))
    font_size = max(12, side // 28)
    gap = font_size // 3
    canvas_width = max(2 * width + gap, 2 * SMALLEST)  # room for the caption of a narrow image
    canvas = Image.new("RGB", (canvas_width, height + gap + (font_size + gap) * len(lines)))
    canvas.paste(radiograph, (0, 0))
    canvas.paste(tinted, (width + gap, 0))
    top = height + gap
    for line in lines:
        text, font = typeset(line, font_size)
        ImageDraw.Draw(canvas).text((gap, top), text, font=font)
        top += font_size + gap
    return canvas


def write_heat_map(row: Prediction, image: np.ndarray, classifier: Classifier, folder: Path) -> None:
    """Draw the heat map of a prediction; image: uint8 [size, size], what the model saw.

    The file is named after the end of the path, with a digest of the whole path, since two may have the same end.
    """
    heat = models.heat_map(classifier.model, image, row.label, classifier.checkpoint)
    radiograph, _ = data.read_image(row.path, None)
    if row.threshold is None:
        result = f"{row.label}: P({row.label}) = {row.probability[row.label]:.3f}"
    else:
        positive = classifier.checkpoint["classes"][-1]
        result = f"{row.label}: P({positive}) = {row.probability:.3f}, threshold {row.threshold:.3f}"
    demo = ["DEMO MODEL, trained on synthetic phantoms"] * row.demo
    caption = [Path(row.path).name, result, f"tinted: evidence for {row.label}", *demo, *row.flags]
    drawn = draw_heat_map(radiograph, heat, caption)
    end = re.sub(r"[^\w-]+", "_", row.path).encode()[-100:]  # file systems count bytes
    name = f"{end.decode(errors='ignore').strip('_')}_{data.hash_lines([row.path])[:6]}_cam.png"
    with data.replacing(folder / name) as f:
        drawn.save(f, "PNG")


def typeset(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Text and a font for it: Pillow's own, which has only ASCII, else the first of FONTS that has all letters.

    Without one, other letters are escaped.
    """
    text = data.printable(text)
    for name in () if text.isascii() else FONTS:
        with contextlib.suppress(OSError):  # not installed
            font = ImageFont.truetype(name, size)
            box = bytes(font.getmask("\U0010ffff"))  # drawn for a letter that the font lacks
            if box not in [bytes(font.getmask(letter)) for letter in text]:
                return text, font
    return text.encode("ascii", "backslashreplace").decode(), ImageFont.load_default(size)


# --- write ---


def to_text(row: Prediction | None, style: str | None, checkpoint: dict) -> str:
    """A row as JSON, CSV or a line of the table; without a row, the header."""
    classes, threshold = checkpoint["classes"], checkpoint["threshold"]["value"]
    if style == "json":
        return f"{json.dumps(asdict(row))}\n" if row else ""
    if style == "csv":
        cells = asdict(row or Prediction(""))
        cells["flags"] = "; ".join(cells["flags"])
        if len(classes) > 2:
            probabilities = cells.pop("probability") or {}
            cells |= {f"probability_{name}": probabilities.get(name) for name in classes}
        header, _, line = data.to_csv([cells]).partition("\n")
        return line if row else f"{header}\n"
    width = max(map(len, [*classes, "error"]))
    of = "P(label)" if threshold is None else f"P({classes[-1]})"
    if row is None:
        cut = "" if threshold is None else f" (threshold {threshold:.3f})"
        return data.printable(f"{'label':{width}}  {of}  image{cut}") + "\n"
    p = row.probability[row.label] if isinstance(row.probability, dict) else row.probability
    shown = "-" if p is None else f"{p:.4f}"
    notes = "; ".join(filter(None, [row.error, *row.flags, "DEMO MODEL" * row.demo]))
    image = f"{row.path}  [{notes}]" if notes else row.path
    return data.printable(f"{row.label or 'error':{width}}  {shown:>{len(of)}}  {image}") + "\n"


def print_predictions(args: argparse.Namespace) -> int:
    """Classify what the command line names, a row for each image; returns the exit code."""
    classifier = open_classifier(args.ckpt, args.device)
    checkpoint = classifier.checkpoint
    print(data.printable(f"model: {classifier.path}"), file=sys.stderr)
    if not checkpoint["finished"]:
        warn(f"UNFINISHED MODEL: epoch {len(checkpoint['history'])} of {checkpoint['arguments']['epochs']}")
    if checkpoint["data"]["demo"]:
        warn("DEMO MODEL: it was trained on synthetic phantoms; its predictions say nothing about patients")
    maps = args.cam and Path(args.cam)
    if maps:
        maps.mkdir(parents=True, exist_ok=True)
    sources = find_inputs(args.inputs)
    if maps or "-" in args.inputs:  # one by one: a heat map takes long, and a list on stdin may pause
        rows = (row for source in sources for row in classify([source], classifier, maps))
    else:
        rows = classify_all(sources, classifier)
    counts, flagged = Counter(), 0  # of each label, None for errors; with any flag
    sys.stdout.write(to_text(None, args.style, checkpoint))
    for row in tqdm(rows, unit="img", leave=False, disable=sys.stdout.isatty() or None):  # rows show progress too
        sys.stdout.write(to_text(row, args.style, checkpoint))
        sys.stdout.flush()
        counts[row.label] += 1
        flagged += bool(row.flags)
    if not counts:
        raise UserError("no paths on stdin; write one per line, as in: find DIR -name '*.png' | python predict.py -")
    if maps:
        print(f"{count(counts.total() - counts[None], 'heat map')} in {maps}", file=sys.stderr)
    labels = ", ".join(f"{counts[name]} {name}" for name in checkpoint["classes"])
    done, failed = count(counts.total(), "image"), count(counts[None], "error")
    print(data.printable(f"{done}: {labels}, {flagged} flagged, {failed}"), file=sys.stderr)
    return 1 if counts[None] else 0


def main() -> None:
    parser = data.Parser(description="Classify radiographs. For research, not for diagnosis.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="PATH", help="files, folders, globs, or - for paths on stdin")
    add("--ckpt", type=data.non_empty, help="run or checkpoint (default: newest finished run)")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", dest="style", action="store_const", const="json", help="one JSON object per line")
    style.add_argument("--csv", dest="style", action="store_const", const="csv", help="print CSV with a header")
    add("--cam", type=data.non_empty, help="write each image with its heat map (HiResCAM) to a folder")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    data.run_script(parser, lambda: print_predictions(args))


if __name__ == "__main__":
    main()
