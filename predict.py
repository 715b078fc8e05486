"""Classify radiographs with a trained model.

python predict.py img.jpeg                              # the newest run's model
python predict.py --ckpt a.pt --ckpt b.pt --csv folder  # the mean of two models, for all images in a folder
python predict.py --cam maps img.jpeg                   # and where the model looked
find . -name '*.png' | python predict.py --json -       # a list of paths on stdin, one JSON object a line
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import itertools
import json
import os
import sys
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import models

BATCH = 32
ONE_AT_A_TIME = threading.Lock()  # for an accelerator, where two threads would share one queue, or (MPS) crash
COLOUR, CONSTANT, SMALL = 12, 6, 64  # limits of the flags, in grey levels (mean, spread) and pixels


def find_inputs(inputs):
    """Yield the paths that files, folders, globs and - (a list on stdin) stand for, in order.

    A folder that can't be read, or holds no image, stands for itself: it gets a row that says so.
    """
    for item in inputs:
        if item == "-":
            yield from find_inputs(line.rstrip("\r\n") for line in sys.stdin or () if line.strip() not in ("", "-"))
        elif os.path.isdir(item):
            unreadable, path = [], None
            for path in data.walk(Path(item), unreadable.append):
                yield str(path)
            yield from [error.filename for error in unreadable] or [item] * (path is None)
        elif not os.path.exists(item) and glob.has_magic(item):
            found = sorted(glob.glob(item, recursive=True))
            yield from dict.fromkeys(find_inputs(found)) if found else [item]  # ** finds a folder and what is in it
        else:
            yield item


def load_models(paths: list[str], device: torch.device) -> list[tuple[dict, torch.nn.Module]]:
    """Checkpoints and their models; all must tell the same classes apart."""
    loaded = []
    for path in paths:
        ckpt = models.load(path)
        first = loaded[0][0] if loaded else ckpt
        if (ckpt["classes"], ckpt["positive"]) != (first["classes"], first["positive"]):
            mine, theirs = ", ".join(ckpt["classes"]), ", ".join(first["classes"])
            raise models.ModelError(
                f"{path} (classes {mine}; positive {ckpt['positive']}) and {paths[0]} (classes {theirs}; positive "
                f"{first['positive']}) can't be averaged"
            )
        if ckpt["data"]["demo"]:
            data.warn(
                f"DEMO MODEL: {path} was trained on synthetic phantoms; its predictions mean nothing for patients"
            )
        model = models.from_checkpoint(ckpt, device)
        loaded.append((ckpt, models.fold_batch_norms(model, ckpt["input_size"])))
    return loaded


def read(path: str, sizes: set[int]) -> tuple[str, dict[int, np.ndarray], dict, str]:
    """The path, its image at each size, what read_image tells of it, and the reason where it can't be read."""
    images, info = {}, {}
    try:
        for size in sizes:
            images[size], info = data.read_image(path, size)
    except data.ImageError as e:
        return path, {}, {}, str(e)
    return path, images, info, ""


def flags(info: dict, pixels: np.ndarray, unlike: bool) -> list[str]:
    """What a person should know of an image before trusting the label."""
    levels = pixels[::4, ::4].ravel()
    tail = len(levels) // 50  # 2 % at either end may be a letter or an edge
    levels = np.partition(levels, (tail, len(levels) - 1 - tail))
    found = {
        "colour image": info["colour"] > COLOUR,
        "near-constant image": int(levels[-1 - tail]) - int(levels[tail]) < CONSTANT,
        "under 64 pixels": min(info["width"], info["height"]) < SMALL,
        "unlike training images": unlike,
    }
    return [name for name, on in found.items() if on]


@torch.inference_mode()
def classify(batch: list[tuple], loaded: list[tuple[dict, torch.nn.Module]], device: torch.device) -> list[tuple]:
    """Classify what read returned for each file.

    Returns:
        for each file a dict (path, label, probability, threshold, flags, error, demo) and its images by size.
    """
    good = [images for _, images, _, _ in batch if images]
    mean, unlike = 0.0, torch.zeros(len(good), dtype=torch.bool)
    for ckpt, model in loaded if good else ():
        pixels = torch.from_numpy(np.stack([images[ckpt["input_size"]] for images in good]))
        with contextlib.nullcontext() if device.type == "cpu" else ONE_AT_A_TIME:
            x = data.normalise(pixels.to(device), ckpt["mean"], ckpt["std"]).to(memory_format=torch.channels_last)
            logits = model(x).cpu()
        mean = mean + models.probabilities(logits, ckpt["temperature"]) / len(loaded)
        unlike |= models.unlikeness(ckpt["input_check"], pixels) > ckpt["input_check"]["cut"]
    classes, threshold = loaded[0][0]["classes"], None
    positive = classes.index(loaded[0][0]["positive"])
    if len(classes) == 2:
        threshold = sum(ckpt["threshold"]["value"] for ckpt, _ in loaded) / len(loaded)
    demo = any(ckpt["data"]["demo"] for ckpt, _ in loaded)
    results, found = [], zip(mean.tolist() if good else (), unlike.tolist())
    for path, images, info, reason in batch:
        result = {"path": path, "label": None, "probability": None, "threshold": threshold, "flags": []}
        result |= {"error": reason, "demo": demo}
        if images:
            p, odd = next(found)
            called = int(np.argmax(p))
            if len(classes) == 2:
                called = positive if p[positive] >= threshold else 1 - positive
            result["label"] = classes[called]
            result["probability"] = p[positive] if len(classes) == 2 else dict(zip(classes, p))
            result["flags"] = flags(info, next(iter(images.values())), odd)
        results.append((result, images))
    return results


def stream(paths, read, work, workers: int, size: int = BATCH):
    """Yield work([read(path), ...]) of batches of size paths in order, a few ahead, however many paths there are.

    The same workers, with one thread each, read files and classify batches, so that no core waits while there is either
    to do; where there are fewer files than that takes, the model gets the spare cores.
    """
    paths = iter(paths)
    head = list(itertools.islice(paths, workers * size))
    workers = max(1, min(workers, len(head)))
    size = max(1, min(size, -(-len(head) // workers)))
    paths, pool, threads = itertools.chain(head, paths), ThreadPoolExecutor(workers), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))

    def submit(batch: list[str]) -> Future:
        reads = [pool.submit(read, path) for path in batch]  # the pool starts these before what waits for them
        return pool.submit(lambda: work([r.result() for r in reads]))

    try:
        jobs = (submit(batch) for batch in iter(lambda: list(itertools.islice(paths, size)), []))
        ahead = deque(itertools.islice(jobs, 2 * workers))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(itertools.islice(jobs, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(threads)


def save_cam(result: dict, loaded: list[tuple[dict, torch.nn.Module]], images: dict, folder: Path, device) -> None:
    """Write the radiograph at its own resolution with the heat map of its label laid over it, and a caption."""
    heat = 0.0
    picture = Image.fromarray(data.read_image(result["path"], None)[0])
    width, height = picture.size
    for ckpt, model in loaded:
        pixels = torch.from_numpy(images[ckpt["input_size"]])[None].to(device)
        x = data.normalise(pixels, ckpt["mean"], ckpt["std"])
        cam = models.grad_cam(model, x, ckpt["classes"].index(result["label"]))[0].cpu().numpy()
        cam = Image.fromarray(cam).resize(picture.size, Image.Resampling.BICUBIC)
        heat = heat + np.asarray(cam).clip(0, 1) / len(loaded)
    # From no colour over red to yellow, as opaque as the map is high.
    green, mask = (Image.fromarray((255 * v).astype(np.uint8)) for v in (heat**2, heat / 2))
    colour = Image.merge("RGB", (Image.new("L", picture.size, 255), green, Image.new("L", picture.size)))
    label, p, of = result["label"], result["probability"], loaded[0][0]["positive"]
    if isinstance(p, dict):  # more than two classes
        p, of = p[label], label
    font = ImageFont.load_default(max(12, min(width // 45, 60)))
    lines = [printable(Path(result["path"]).name), f"{label}   P({of}) = {p:.3f}   (map: what speaks for {label})"]
    lines += result["flags"] + ["DEMO MODEL, trained on synthetic phantoms"] * result["demo"]
    line = int(font.size * 1.35)
    wide = max(width, *(int(font.getlength(text)) + line for text in lines))
    canvas = Image.new("RGB", (wide, height + line * len(lines) + line // 2), "black")
    canvas.paste(Image.composite(colour, picture.convert("RGB"), mask), (0, 0))
    for i, text in enumerate(lines):
        ImageDraw.Draw(canvas).text((line // 3, height + line // 4 + i * line), text, fill="white", font=font)
    name = "_".join(Path(result["path"]).parts[-3:]).strip("/").replace("/", "_").replace(".", "_")
    name = os.fsencode(name)[-120:].decode(errors="ignore")  # file systems count bytes
    digest = hashlib.sha256(os.fsencode(result["path"])).hexdigest()[:6]
    with data.replacing(folder / f"{name}_{digest}_cam.png") as f:  # two images of one name keep a map each
        canvas.save(f, "PNG")


def printable(name: str) -> str:
    """A file name as one line."""
    return "".join(c if c.isprintable() else "?" for c in name)


class Writer:
    """Prints results as they come: a table for people, CSV, or a JSON object a line."""

    def __init__(self, style: str, classes: list[str]) -> None:
        self.style, self.classes, self.header, self.width = style, classes, True, 0

    def row(self, r: dict) -> dict:
        row, p = {"path": r["path"], "label": r["label"]}, r["probability"]
        row |= {"probability": p} if len(self.classes) == 2 else {f"probability_{c}": p and p[c] for c in self.classes}
        flags = "; ".join(r["flags"] + ["demo model"] * r["demo"])
        return row | {"threshold": r["threshold"], "flags": flags, "error": r["error"]}

    def write(self, results: list[dict], out) -> None:
        if self.style == "json":
            for r in results:
                out.write(json.dumps(r) + "\n")
        elif self.style == "csv":
            writer = csv.DictWriter(out, list(self.row(results[0])), lineterminator="\n")
            if self.header:
                writer.writeheader()
            writer.writerows(self.row(r) for r in results)
        else:
            paths = [printable(r["path"]) for r in results]
            self.width = max(self.width, *map(len, paths))
            name = max(len(c) for c in self.classes)
            for path, r in zip(paths, results):
                p = r["probability"]
                shown = p[r["label"]] if isinstance(p, dict) else p
                notes = "; ".join(r["flags"] + ["DEMO MODEL"] * r["demo"])
                text = f"error: {r['error']}" if r["error"] else f"{r['label']:{name}}  {shown:.4f}  {notes}"
                out.write(f"{path:{self.width}}  {text}".rstrip() + "\n")
        self.header = False
        out.flush()


def make_parser() -> argparse.ArgumentParser:
    parser = data.Parser(prog="predict.py", description="Classify radiographs. For research, not for diagnosis.")
    parser.add_argument("inputs", nargs="+", metavar="PATH", help="files, folders, globs, or - for a list on stdin")
    parser.add_argument("--ckpt", action="append", metavar="FILE", help="checkpoint; several are averaged (newest run)")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="one JSON object a line")
    style.add_argument("--csv", action="store_true", help="CSV with a header")
    parser.add_argument("--cam", metavar="DIR", help="write each image with a Grad-CAM heat map to DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def run(args: argparse.Namespace) -> int:
    device = models.pick_device(args.device)
    loaded = load_models(args.ckpt or [str(models.newest_checkpoint())], device)
    if args.cam:
        Path(args.cam).mkdir(parents=True, exist_ok=True)
    writer = Writer("json" if args.json else "csv" if args.csv else "table", loaded[0][0]["classes"])
    # A heat map hooks into the model, which others must not use meanwhile; it takes long, so each gives its row at once.
    workers, size = (1, 1) if args.cam else (data.CORES, BATCH)
    failed = count = 0
    sizes = {ckpt["input_size"] for ckpt, _ in loaded}

    def work(batch: list[tuple]) -> list[dict]:
        done = classify(batch, loaded, device)
        for result, images in done if args.cam else ():
            try:
                if images:
                    save_cam(result, loaded, images, Path(args.cam), device)
            except (data.ImageError, MemoryError) as e:  # gone meanwhile, or huge
                result |= {"label": None, "probability": None, "flags": [], "error": f"no map: {e}"}
        return [result for result, _ in done]

    with tqdm(unit="img", leave=False, disable=None) as bar:
        for results in stream(find_inputs(args.inputs), lambda path: read(path, sizes), work, workers, size):
            count += len(results)
            failed += sum(bool(r["error"]) for r in results)
            bar.update(len(results))
            with bar.external_write_mode():  # the bar makes way for rows on the same terminal
                writer.write(results, sys.stdout)
    if not count:
        raise data.DataError(f"no image found in {' '.join(args.inputs)}")
    return 1 if failed else 0


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    data.run_script(parser, lambda: run(args), models.ModelError)


if __name__ == "__main__":
    main()
