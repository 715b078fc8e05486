"""What an image is: find, group by patient, split, read, cache, augment; and three commands of its own.

python data.py check data/chest_xray         # health of a folder; exit code 1 where a result would be invalid
python data.py download                      # the public dataset (1.2 GB) into data/chest_xray
python data.py demo data/demo --images 1000  # the synthetic set that the scripts use where there is no data
"""

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

READER_VERSION = 1  # part of the cache key: raise it when read_image gives other pixels
DEFAULT_ROOT, DEMO_ROOT, DEMO_MARK = Path("data/chest_xray"), Path("data/demo"), "demo.json"
MAX_PIXELS = 100_000_000  # the largest image of the public set has 7.4 million
SMALL_VAL = 100  # a val folder with fewer images (the best-known copy has 16) can't choose anything
URL = (
    "https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
    "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded"
)
SHA256 = "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Pillow's own bomb warning and its remarks on odd metadata: read_image decides by itself what is an error.
warnings.filterwarnings("ignore", module="PIL")


class DataError(Exception):
    """Something about the data or the command that the user can mend; the message is one line."""


class ImageError(DataError):
    """One file that can't be used as an image; the message is the reason."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser with defaults in its help and one-line errors (exit code 2)."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)
        for stream in (sys.stdin, sys.stdout, sys.stderr):  # file names need not be valid text
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="surrogateescape")

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def within(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number in [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def warn(message: str) -> None:
    """One loud line on stderr, from one process of a distributed run only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"WARNING: {message}", file=sys.stderr, flush=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write to a temporary name and move into place: no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_csv(rows: list[dict], columns: list[str]) -> str:
    """Rows as CSV text with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- find, group by patient, split ---


def identify(name: str) -> tuple[str | None, str, str]:
    """Patient key, subtype (bacterial, viral or empty) and name series, as the file names of the public copies tell.

    The patient is None for names of no known scheme.
    """
    if m := re.match(r"person(\d+)_(bacteria|virus)_\d", name):
        return f"{m[2]}-{int(m[1])}", {"bacteria": "bacterial", "virus": "viral"}[m[2]], m[2]
    if m := re.match(r"((?:NORMAL2-)?IM)-(\d+)-\d", name):
        return f"{m[1]}-{int(m[2])}", "", m[1]
    if m := re.match(r"(NORMAL|BACTERIA|VIRUS)-(\d+)-\d", name):
        return m[2], {"BACTERIA": "bacterial", "VIRUS": "viral"}.get(m[1], ""), m[1]
    return None, "", ""


def is_image(path: Path) -> bool:
    """By name alone; the leftovers of macOS are none."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".") and "__MACOSX" not in path.parts


def walk(folder: Path):
    """Yield the images under folder; links are followed, but each folder counts once, and one that can't be read not."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"folder {error.filename} can't be read ({error.strerror})")

    for top, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(top)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (p for p in sorted(Path(top, f) for f in files) if is_image(p))


def find_root(data: str | None) -> Path:
    """The folder with train/ and test/. Without data: data/chest_xray, else the demo set, drawn where it is missing."""
    root = Path(data) if data is not None else DEFAULT_ROOT
    if data is None and not root.exists():
        if not (DEMO_ROOT / DEMO_MARK).exists():
            draw_demo(DEMO_ROOT)
        root = DEMO_ROOT
    if not root.is_dir():
        raise DataError(
            f"data folder {root} does not exist; name one with --data, or fetch one: python data.py download"
        )
    if not (root / "train").is_dir() and not (root / "test").is_dir() and (root / "chest_xray").is_dir():
        root = root / "chest_xray"
    return root


def is_demo(root: Path) -> bool:
    return (root / DEMO_MARK).exists()


def warn_demo(root: Path) -> None:
    warn(
        f"DEMO DATA: {root} holds synthetic phantoms, not radiographs. No result on them says anything about patients."
    )


def scan(root: Path, split: str) -> list[dict]:
    """The images of ROOT/split/CLASS/, sorted by class and path, as ImageFolder finds them; no file is opened.

    Each is a dict: path (relative to root, posix), class, patient, subtype, bytes, mtime (ns). An image whose name
    tells no patient is its own patient, and its path is the key.
    """
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{root} has no folder {split}/; expected {root}/{split}/CLASS/*.jpeg")
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name[0] not in "._")
    if len(classes) < 2:
        found = f"only one class folder, {classes[0]}" if classes else "no class folders"
        raise DataError(f"{folder} holds {found}; expected at least two, such as NORMAL/ and PNEUMONIA/")
    records = []
    for name in classes:
        for path in sorted(walk(folder / name)):
            relative = path.relative_to(root).as_posix()
            info = path.stat() if path.exists() else path.lstat()  # a broken link is named when it is read
            patient, subtype, _ = identify(path.name)
            records.append(
                {"path": relative, "class": name, "patient": patient or relative, "subtype": subtype}
                | {"bytes": info.st_size, "mtime": info.st_mtime_ns}
            )
        if not records or records[-1]["class"] != name:
            raise DataError(f"{folder / name} holds no readable image")
    return records


def named_patients(records: list[dict]) -> set[str]:
    """Patients that the file names tell."""
    return {r["patient"] for r in records if r["patient"] != r["path"]}


def hash_lines(lines) -> str:
    """SHA-256 of lines of text, none of which is kept."""
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode(errors="surrogateescape") + b"\n")
    return found.hexdigest()


def fingerprint(records: list[dict]) -> str:
    """SHA-256 over paths and sizes: the same for every copy of the same files."""
    return hash_lines(f"{r['path']} {r['bytes']}" for r in records)


def split_by_patient(records: list[dict], seed: int, fraction: float) -> list[bool]:
    """True for the images of the validation split: disjoint by patient, stratified by class, a function of seed."""
    from sklearn.model_selection import StratifiedGroupKFold  # here, since prediction does without scikit-learn

    patients = Counter(c for c, _ in {(r["class"], r["patient"]) for r in records})
    folds = min(round(1 / fraction), min(patients.values()))
    if folds < 2:
        raise DataError(f"class {min(patients, key=patients.get)} has too few patients to hold some out for validation")
    # Patients get random numbers and the fold is drawn here: the splitter's own shuffle unbalanced the classes up to
    # scikit-learn 1.7, and differs between versions.
    rng = np.random.default_rng(seed)
    names = sorted({r["patient"] for r in records})
    numbers = dict(zip(names, rng.permutation(len(names)).tolist()))
    labels, groups = [r["class"] for r in records], [numbers[r["patient"]] for r in records]
    splits = list(StratifiedGroupKFold(folds).split(labels, labels, groups))
    held_out = set(splits[rng.integers(folds)][1].tolist())
    return [i in held_out for i in range(len(records))]


def find_training(root: Path, seed: int, fraction: float) -> list[dict]:
    """The records of train/ (and val/), each with its split, train or val; patients of test/ are asserted absent.

    Test images are looked at by name only.
    """
    train, val, test = scan(root, "train"), [], []
    if (root / "val").is_dir():
        val = scan(root, "val")
    if (root / "test").is_dir():
        test = scan(root, "test")
    for split in (val, test):
        if split and {r["class"] for r in split} != {r["class"] for r in train}:
            raise DataError(f"{root}/{split[0]['path'].split('/')[0]} has other classes than {root}/train")
    if val and len(val) < SMALL_VAL:
        warn(f"{root}/val holds only {len(val)} images: they are used for training; validation is drawn by patient")
        train, val = train + val, []
    for a, b in ((train, val), (train, test), (val, test)):
        if shared := sorted(named_patients(a) & named_patients(b)):
            sides = f"{a[0]['path'].split('/')[0]} and {b[0]['path'].split('/')[0]}"
            some = ", ".join(shared[:3]) + (" ..." if len(shared) > 3 else "")
            raise DataError(
                f"{len(shared)} patients are in both {sides} of {root} ({some}), so no result would hold; "
                f"remove them from one side (python data.py check {root} lists them)"
            )
    if unnamed := sum(r["patient"] == r["path"] for r in train + val):
        warn(f"{unnamed} of {len(train + val)} file names tell no patient: each of these images counts as its own")
    held_out = [False] * len(train) if val else split_by_patient(train, seed, fraction)
    for record, is_val in zip(train + val, held_out + [True] * len(val)):
        record["split"] = "val" if is_val else "train"
    return train + val


# --- read ---


def read_image(path: str | Path, size: int | None) -> tuple[np.ndarray, dict]:
    """Any image file as grey levels: the one function that opens images, for training, evaluation and prediction.

    Args:
        path: JPEG, PNG, TIFF and whatever else Pillow reads; the first frame counts.
        size: side of the square that the whole image is resized to, antialiased; None keeps its own resolution.

    Returns:
        uint8 array [size, size] (or [height, width]), and a dict: width, height, mode, and colour, the mean distance
        between the largest and the smallest of red, green and blue (0 to 255; 0 is grey).

    16- and 32-bit images are scaled from the smallest usual bit depth (8, 12, 16, 32; float in [0, 1]) that holds
    their maximum. Transparent pixels are black, EXIF rotation is applied.

    Raises:
        ImageError: the file is missing, empty, truncated, no image, or too large.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ImageError("the file is empty")
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed")
            mode, colour = image.mode, 0.0
            inverted = getattr(image, "tag_v2", {}).get(262) == 0 and mode.startswith("I;16")  # MONOCHROME1
            if size:  # the JPEG decoder halves the image while that leaves twice what the resize needs
                image.draft(None, (2 * size, 2 * size))
            image.load()
            if (orientation := image.getexif().get(0x0112, 1)) != 1:
                image = ImageOps.exif_transpose(image)
                width, height = (height, width) if orientation >= 5 else (width, height)
            if mode[0] in "IF":
                image = Image.fromarray(_to_8bit_range(np.asarray(image), inverted))
            elif mode not in ("L", "1") or "transparency" in image.info:
                if "A" in mode or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
                image = image.convert("RGB")
                colour = float(np.ptp(np.asarray(image.resize((64, 64), Image.Resampling.BOX)), axis=2).mean())
            image = image if image.mode == "F" else image.convert("L")
            if size and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.array(image)  # a copy: Pillow's own memory is read-only
            if pixels.dtype != np.uint8:
                pixels = pixels.round().clip(0, 255).astype(np.uint8)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except Image.UnidentifiedImageError:
        raise ImageError("not an image that Pillow can read") from None
    except Exception as e:  # noqa: BLE001, decoders raise whatever a damaged file makes them stumble over
        raise ImageError(f"cannot be decoded: {e}") from None
    return pixels, {"width": width, "height": height, "mode": mode, "colour": colour}


def _to_8bit_range(values: np.ndarray, inverted: bool) -> np.ndarray:
    """float32 in [0, 255] from integers of 16 or 32 bits, or floats."""
    integer, values = values.dtype.kind in "iu", values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("holds values that are not finite")
    values -= min(values.min(), 0)
    top = values.max()
    if integer or top > 1:
        top = next((2.0**bits - 1 for bits in (8, 12, 16, 32) if top < 2**bits), top)
    else:
        top = 1.0
    return ((top - values if inverted else values) * (255 / top)).astype(np.float32)


# --- cache ---


def _decode(root: Path, record: dict, size: int) -> tuple[np.ndarray, int, str]:
    """Pixels, their 64-bit digest, and the reason where there are none."""
    try:
        pixels, _ = read_image(root / record["path"], size)
    except ImageError as e:
        return np.zeros((size, size), np.uint8), 0, str(e)
    return pixels, pixel_digest(pixels), ""


def pixel_digest(pixels: np.ndarray) -> int:
    """64-bit BLAKE2b of the pixels, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=8).digest(), "big", signed=True)


def _decode_all(root: Path, records: list[dict], size: int):
    """Yield _decode of each record in order, on all cores, with a progress bar; a bounded number in memory."""
    with (
        ThreadPoolExecutor(CORES) as pool,
        tqdm(total=len(records), desc="decoding", unit="img", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(records), 512):
            for item in pool.map(lambda r: _decode(root, r, size), records[start : start + 512]):
                yield item
                bar.update()


def load_images(root: Path, records: list[dict], size: int) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
    """The records' images, decoded once and kept in one memory-mapped cache file beside the data.

    Args:
        records: from scan or find_training; the file is rebuilt when a path, size or time of one of them changes.
        size: side of the square images.

    Returns:
        uint8 tensor [len(records), size, size]; int64 tensor [len(records)] of pixel digests; and for each image
        that can't be read its index with the reason (its pixels are zeros).
    """
    files = (f"{r['path']} {r['bytes']} {r['mtime']}" for r in records)
    key = hash_lines(itertools.chain([f"{READER_VERSION} {size} {root.resolve()}"], files))[:16]
    kind = f"{records[0]['path'].split('/')[0]}-{size}-"
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pneumonia")
    folders = [root / ".cache", user_cache]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError):  # not there, just replaced, or damaged
            return _open_cache(folder / f"{kind}{key}.npy")
    for folder in folders:
        path = folder / f"{kind}{key}.npy"
        temporary = folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(f".{kind}*.tmp"):  # what a killed build left behind
                if time.time() - old.stat().st_mtime > 86400:
                    old.unlink(missing_ok=True)
            with open(temporary, "wb") as f:
                # One file, so that pixels and notes can't disagree: an .npy array, and JSON after its end.
                shape = {"descr": "|u1", "fortran_order": False, "shape": (len(records), size, size)}
                np.lib.format.write_array_header_1_0(f, shape)
                digests, failed = [], {}
                for i, (pixels, digest, reason) in enumerate(_decode_all(root, records, size)):
                    f.write(pixels)
                    digests.append(digest)
                    if reason:
                        failed[i] = reason
                f.write(json.dumps({"digests": digests, "failed": failed}).encode())
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            for old in folder.glob(f"{kind}*.npy"):
                if folder != user_cache and old != path:
                    old.unlink(missing_ok=True)
            return _open_cache(path)
        except OSError as e:
            warn(
                f"no image cache in {folder} ({e.strerror or e}); trying {'elsewhere' if folder != user_cache else 'memory'}"
            )
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    pixels, digests, reasons = zip(*_decode_all(root, records, size))
    failed = {i: reason for i, reason in enumerate(reasons) if reason}
    return torch.from_numpy(np.stack(pixels)), torch.tensor(digests), failed


def _open_cache(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
    array = np.load(path, mmap_mode="c")  # copy-on-write: torch takes no read-only arrays
    with open(path, "rb") as f:
        f.seek(array.offset + array.nbytes)
        notes = json.load(f)
    failed = {int(i): reason for i, reason in notes["failed"].items()}
    return torch.from_numpy(array), torch.tensor(notes["digests"]), failed


def report_left_out(records: list[dict], failed: dict[int, str]) -> list[dict]:
    """Name and count the files that can't be read; the same as a list of {path, reason}."""
    left_out = [{"path": records[i]["path"], "reason": reason} for i, reason in failed.items()]
    for item in left_out[:10]:
        warn(f"left out: {item['path']}: {item['reason']}")
    if len(left_out) > 10:
        warn(f"left out: {len(left_out) - 10} more files that can't be read")
    return left_out


# --- augment ---

# scale: smallest part of the area that a random resized crop keeps; ratio: largest aspect distortion; degrees: largest
# rotation; flip: its probability; brightness, contrast: factors in [1 - v, 1 + v]; gamma: exponents in
# [exp(-v), exp(v)]; erase: probability of blanking a rectangle of 2 to 20 % of the area.
STRENGTHS = ("scale", "ratio", "degrees", "flip", "brightness", "contrast", "gamma", "erase")
AUGMENT = {
    "none": dict(zip(STRENGTHS, (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))),
    "light": dict(zip(STRENGTHS, (0.7, 1.1, 5.0, 0.5, 0.1, 0.1, 0.1, 0.0))),
    "medium": dict(zip(STRENGTHS, (0.08, 4 / 3, 0.0, 0.5, 0.3, 0.3, 0.4, 0.0))),
    "strong": dict(zip(STRENGTHS, (0.08, 4 / 3, 10.0, 0.5, 0.4, 0.4, 0.6, 0.25))),
}
DRAWS = 14


def draw(count: int, seed: int, epoch: int) -> torch.Tensor:
    """One epoch's random numbers for augment: float32 [count, DRAWS] in [0, 1), row i for image i, on the CPU.

    A row depends on (seed, epoch, i) and count alone, so no batch size, rank or thread changes what an image becomes.
    """
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def mix(*numbers: int) -> int:
    """A seed from several numbers, so that neighbours share nothing."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def shuffle(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch: a permutation of range(count), a function of (seed, epoch)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, "order")))


def augment(images: torch.Tensor, draws: torch.Tensor, strength: dict[str, float], size: int) -> torch.Tensor:
    """Random resized crop, rotation and flip in one bilinear resampling, then brightness, contrast, gamma and erasing.

    Args:
        images: uint8 [batch, side, side], on any device.
        draws: float32 [batch, DRAWS] in [0, 1), on the same device: each image's own random numbers.
        strength: an entry of AUGMENT; with all strengths at zero (scale and ratio at 1) the image comes back.
        size: side of the result, side or less.

    Returns:
        float32 [batch, 1, size, size] in [0, 1]; what lies outside of the image is 0.
    """
    s, u, n = strength, draws, len(images)
    x = images.unsqueeze(1).float().div_(255)
    if s["scale"] < 1 or s["ratio"] > 1 or s["degrees"] or s["flip"] or size != images.shape[-1]:
        area = 1 - u[:, 0] * (1 - s["scale"])
        ratio = torch.exp((2 * u[:, 1] - 1) * (math.log(s["ratio"]) / 2))
        w, h = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
        angle = (2 * u[:, 2] - 1) * math.radians(s["degrees"])
        cos, sin = angle.cos(), angle.sin()
        flip = 1 - 2 * (u[:, 3] < s["flip"]).float()
        dx, dy = (2 * u[:, 4] - 1) * (1 - w), (2 * u[:, 5] - 1) * (1 - h)
        ox = (torch.arange(size, device=u.device) * 2 + 1) / size - 1  # pixel centres of the output
        oy = ox[:, None]
        # By broadcasting: F.affine_grid's batched product takes longer than the resampling itself.
        cell = (n, 1, 1)
        gx = (cos * w * flip).view(cell) * ox - (sin * h).view(cell) * oy + dx.view(cell)
        gy = (sin * w * flip).view(cell) * ox + (cos * h).view(cell) * oy + dy.view(cell)
        x = F.grid_sample(x, torch.stack([gx, gy], 3), align_corners=False)
    column = (n, 1, 1, 1)
    if s["brightness"]:
        x = x.mul_((1 + (2 * u[:, 6] - 1) * s["brightness"]).view(column)).clamp_(max=1)
    if s["contrast"]:
        mean, factor = x.mean((1, 2, 3), keepdim=True), (1 + (2 * u[:, 7] - 1) * s["contrast"]).view(column)
        x = x.sub_(mean).mul_(factor).add_(mean).clamp_(0, 1)
    if s["gamma"]:
        x = x.pow(torch.exp((2 * u[:, 8] - 1) * s["gamma"]).view(column))
    if s["erase"]:
        x = x.masked_fill(_rectangles(u[:, 9:], x.shape[-2:], s["erase"]), 0)
    return x


def _rectangles(u: torch.Tensor, shape: tuple[int, int], probability: float) -> torch.Tensor:
    """bool [batch, 1, height, width]: one rectangle of 2 to 20 % of the area where u[:, 0] < probability."""
    area, ratio = 0.02 + 0.18 * u[:, 1], torch.exp((2 * u[:, 2] - 1) * math.log(3))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = u[:, 3] * (1 - w), u[:, 4] * (1 - h)
    y, x = ((torch.arange(k, device=u.device) + 0.5) / k for k in shape)
    inside_x = (x >= left[:, None]) & (x < (left + w)[:, None])
    inside_y = (y >= top[:, None]) & (y < (top + h)[:, None])
    return (inside_y[:, :, None] & inside_x[:, None, :] & (u[:, 0] < probability)[:, None, None]).unsqueeze(1)


def normalise(images: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """What the model sees: float32 [batch, 1, height, width] from uint8 [batch, height, width] or augment's output."""
    x = images.unsqueeze(1).float().div_(255) if images.dtype == torch.uint8 else images
    return x.sub_(mean).div_(std)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def stress(images: torch.Tensor):
    """Yield (name, copy) of uint8 images [batch, height, width] under nine changes that leave the diagnosis as it is.

    Exposure (brightness and contrast x 0.65 and x 1.4, gamma 0.7 and 1.4), JPEG at quality 30, a Gaussian blur of
    1 pixel at 224 (in proportion elsewhere), and the central 85 % of each side, resized back.
    """

    def to_uint8(x: torch.Tensor) -> torch.Tensor:
        return x.mul(255).round_().clamp_(0, 255).to(torch.uint8)

    size = images.shape[-1]
    x = images.float() / 255
    mean = x.mean((1, 2), keepdim=True)
    for factor in (0.65, 1.4):
        yield f"brightness x {factor}", to_uint8(x * factor)
        yield f"contrast x {factor}", to_uint8((x - mean) * factor + mean)
    for exponent in (0.7, 1.4):
        yield f"gamma {exponent}", to_uint8(x**exponent)
    yield "JPEG quality 30", torch.from_numpy(np.stack([_jpeg(i, 30) for i in images.numpy()]))
    blur = ImageFilter.GaussianBlur(size / 224)
    yield "blur", torch.from_numpy(np.stack([np.asarray(Image.fromarray(i).filter(blur)) for i in images.numpy()]))
    edge = round(size * 0.075)
    crop = x[:, None, edge : size - edge, edge : size - edge]
    yield "crop of 85 %", to_uint8(F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)[:, 0])


# --- the demo set ---

DEMO_VERSION = 1


def draw_demo(folder: Path, images: int = 1000, seed: int = 0) -> None:
    """Write a synthetic set: crude chest phantoms with patients, subtypes, varied sizes and names of both schemes.

    One in five is for test; two in three show a pneumonia: focal consolidation (bacterial) or diffuse streaks (viral).
    Brightness, contrast, size and aspect are drawn without regard to the class. opacities.csv holds where each opacity
    lies: path, and an ellipse (x, y, rx, ry in parts of the width and height).
    Every pixel is a function of the seed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} exists and is not empty; choose another folder or remove it")
    if images < 40:
        raise DataError(f"a demo set needs at least 40 images, not {images}")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        jobs, patient = [], 0
        for split, count in (("train", images - images // 5), ("test", images // 5)):
            done = 0
            while done < count:
                patient += 1
                rng = np.random.default_rng([seed, patient])
                subtype = ("", "bacterial", "viral")[patient % 3]
                for visit in range(min(int(rng.integers(1, 4)), count - done)):
                    done += 1
                    jobs.append((split, subtype, patient, visit, [seed, patient, visit]))
        for split in ("train", "test"):
            for name in ("NORMAL", "PNEUMONIA"):
                (temporary / split / name).mkdir(parents=True)
        rows = [row for job in jobs for row in _draw_job(temporary, *job)]  # threads would wait for each other
        (temporary / "opacities.csv").write_text(to_csv(rows, ["path", "x", "y", "rx", "ry"]))
        mark = {"demo": True, "version": DEMO_VERSION, "images": images, "seed": seed}
        (temporary / DEMO_MARK).write_text(json.dumps(mark) + "\n")
        if folder.exists():
            folder.rmdir()
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / DEMO_MARK).exists():  # else another process was first, with the same pixels
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw_job(folder: Path, split: str, subtype: str, patient: int, visit: int, seed: list[int]) -> list[dict]:
    """Draw and save one phantom; its opacities as rows for opacities.csv."""
    if patient % 4 == 0:  # the naming scheme of the newer copies
        kind = {"": "NORMAL", "bacterial": "BACTERIA", "viral": "VIRUS"}[subtype]
        name = f"{kind}-{1000000 + patient}-{visit + 1:04d}.jpeg"
    elif subtype:
        name = f"person{patient}_{subtype.replace('bacterial', 'bacteria').replace('viral', 'virus')}_{visit + 1}.jpeg"
    else:
        name = f"{'NORMAL2-' if patient % 2 else ''}IM-{patient:04d}-{visit + 1:04d}.jpeg"
    path = f"{split}/{'PNEUMONIA' if subtype else 'NORMAL'}/{name}"
    image, opacities = _draw_phantom(np.random.default_rng(seed[:2]), np.random.default_rng([*seed, 1]), subtype)
    image.save(folder / path, quality=90)
    return [dict(zip(("path", "x", "y", "rx", "ry"), (path, *(f"{v:.4f}" for v in o)))) for o in opacities]


def _smooth(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Smooth noise in [-1, 1] with about cells bumps down and across."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells[0] + 2, cells[1] + 2)).astype(np.float32))
    return np.asarray(grid.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _draw_phantom(anatomy: np.random.Generator, visit: np.random.Generator, subtype: str):
    """One phantom as a grey Pillow image, and its opacities as ellipses (x, y, rx, ry) in parts of width and height.

    anatomy draws what stays the same for a patient; visit draws exposure, pose, size and disease.
    """
    w = int(visit.integers(110, 150))
    h = int(w * visit.uniform(0.75, 1.0))
    sx, sy = visit.uniform(0.82, 1.0), visit.uniform(0.82, 1.0)
    turn, cx, cy = visit.uniform(-0.08, 0.08), visit.uniform(-0.06, 0.06), visit.uniform(-0.06, 0.06)
    gx, gy = np.meshgrid(np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32))
    x = ((gx - cx) * math.cos(turn) + (gy - cy) * math.sin(turn)) / sx
    y = ((gy - cy) * math.cos(turn) - (gx - cx) * math.sin(turn)) / sy

    def soft(distance: np.ndarray, width: float) -> np.ndarray:  # 1 inside (distance < 0), 0 outside
        return np.clip(0.5 - distance / (2 * width), 0, 1)

    wide, heart, arch = anatomy.uniform(0.8, 0.95), anatomy.uniform(0.28, 0.4), anatomy.uniform(0.25, 0.4)
    body = soft(np.abs(x) - wide - 0.25 * np.clip(-0.55 - y, 0, 1) * 3, 0.05)
    image = 0.62 * body + 0.1 * soft(np.abs(x) - 0.2, 0.15) * body
    lungs = np.zeros_like(x)
    dome = anatomy.uniform(0.45, 0.6)
    for side in (-1, 1):
        lx, ly = (side * x - 0.43) / 0.34, (y + 0.12) / 0.72
        field = soft(lx**2 + np.where(ly < 0, ly**2, 0.5 * ly**2) - 1, 0.25)
        floor = dome + 0.25 * (side * x - 0.42) ** 2 - (0.06 if side < 0 else 0)
        lungs = np.maximum(lungs, field * soft(y - floor, 0.03))
    image -= 0.34 * lungs
    phase, spacing = anatomy.uniform(0, 1), anatomy.uniform(0.17, 0.2)
    bend = np.abs(x) - 0.35
    wave = (y - arch * 1.4 * bend * np.abs(bend) - 0.3 * bend) / spacing + phase
    ribs = np.exp(-(((wave % 1) - 0.5) ** 2) / 0.012) * soft(np.abs(x) - 0.8, 0.03) * soft(np.abs(y) - 0.82, 0.1)
    image += 0.09 * ribs * (np.abs(x) > 0.1)
    spine = soft(np.abs(x) - 0.085, 0.02)
    image += spine * (0.12 + 0.03 * np.sin(y * 34 + phase * 6))
    image += 0.2 * soft(((x - 0.16) / heart) ** 2 + ((y - 0.28) / 0.34) ** 2 - 1, 0.25) * soft(y - dome - 0.1, 0.05)
    for side in (-1, 1):  # collar bones
        image += (
            0.14 * np.exp(-(((y + 0.72 + 0.22 * (side * x - 0.1)) / 0.028) ** 2)) * (np.abs(side * x - 0.42) < 0.34)
        )
    hila = np.exp(-(((np.abs(x) - 0.2) / 0.16) ** 2) - ((y + 0.02) / 0.25) ** 2)
    image += lungs * (0.04 + 0.05 * hila) * (1 + _smooth(anatomy, (h, w), (10, 12)))  # vessels

    opacities, shade = [], np.zeros_like(x)
    if subtype:
        side = int(visit.choice([-1, 1]))
        spots = [(side * visit.uniform(0.36, 0.5), visit.uniform(-0.35, 0.2))]
        if subtype == "viral":
            spots = [(-0.43, visit.uniform(-0.2, 0.1)), (0.43, visit.uniform(-0.2, 0.1))]
        for ox, oy in spots:
            rx, ry = visit.uniform(0.26, 0.34), visit.uniform(0.3, 0.45)
            if subtype == "viral":
                rx, ry = 0.34, visit.uniform(0.5, 0.65)
            spot = soft(((x - ox) / rx) ** 2 + ((y - oy) / ry) ** 2 - 1 + 0.5 * _smooth(visit, (h, w), (9, 9)), 0.35)
            if subtype == "bacterial":
                shade += spot * visit.uniform(0.2, 0.4) * (0.8 + 0.8 * _smooth(visit, (h, w), (26, 26)))
            else:
                streaks = _smooth(visit, (h, w), (26, 16)) + _smooth(visit, (h, w), (16, 26))
                shade += spot * visit.uniform(0.16, 0.34) * (0.4 + np.exp(-((streaks / 0.3) ** 2)))
            # From body to image: undo scale, turn and shift.
            px = ox * sx * math.cos(turn) - oy * sy * math.sin(turn) + cx
            py = ox * sx * math.sin(turn) + oy * sy * math.cos(turn) + cy
            opacities.append(((px + 1) / 2, (py + 1) / 2, 1.15 * rx * sx / 2, 1.15 * ry * sy / 2))
    image += shade * lungs
    image += 0.02 * _smooth(visit, (h, w), (h // 2, w // 2)) + 0.04 * _smooth(visit, (h, w), (3, 3)) * body
    # Exposure: mean and spread are drawn, so that neither tells the class.
    image = (image - image.mean()) / image.std() * visit.uniform(42, 62) + visit.uniform(95, 145)
    out = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    zoom = visit.uniform(1.6, 3)
    out = out.resize((int(w * zoom), int(h * zoom)), Image.Resampling.BICUBIC)
    if visit.random() < 0.7:
        mark = visit.integers(0, 2)
        ImageDraw.Draw(out).text((out.width * (0.04 if mark else 0.93), out.height * 0.07), "RL"[1 - mark], fill=235)
    return out, opacities


# --- check ---


def check(root: Path) -> dict:
    """The health of a data folder: counts, shapes and what would invalidate a result.

    Returns:
        dict: splits (per split and class: images, patients, subtypes, width, height, aspect, brightness, modes),
        unreadable, duplicates (groups of paths with the same pixels), shared_patients, and problems: one line for
        each thing that makes a result invalid.
    """
    splits = [s for s in ("train", "val", "test") if (root / s).is_dir()]
    if not splits:
        raise DataError(f"{root} has none of the folders train/, val/, test/")
    records = {s: scan(root, s) for s in splits}
    report = {"root": str(root), "demo": is_demo(root), "splits": {}, "unreadable": [], "problems": []}
    by_pixels = defaultdict(list)
    for split, rows in records.items():
        stats = defaultdict(lambda: defaultdict(list))
        with (
            ThreadPoolExecutor(CORES) as pool,
            tqdm(total=len(rows), desc=split, unit="img", leave=False, disable=None) as bar,
        ):
            for row, result in zip(rows, pool.map(lambda r: _inspect(root / r["path"]), rows)):
                bar.update()
                if isinstance(result, str):
                    report["unreadable"].append({"path": row["path"], "reason": result})
                    continue
                by_pixels[result.pop("digest")].append((row, split))
                for key, value in (result | {"patients": row["patient"], "subtypes": row["subtype"]}).items():
                    stats[row["class"]][key].append(value)
        for name in sorted({r["class"] for r in rows} - stats.keys()):
            report["problems"].append(f"{split}/{name} holds no readable image")
        report["splits"][split] = {name: _summary(s) for name, s in stats.items()}
    report["named_patients"] = {s: len(named_patients(rows)) for s, rows in records.items()}
    report["duplicates"] = [
        {
            "paths": [r["path"] for r, _ in g],
            "splits": len({s for _, s in g}),
            "classes": len({r["class"] for r, _ in g}),
        }
        for g in by_pixels.values()
        if len(g) > 1
    ]
    # A small val folder is folded into train, so what the two share harms nobody.
    if len(records.get("val", [])) < SMALL_VAL:
        records["train"] = records.get("train", []) + records.pop("val", [])
    report["shared_patients"] = {}
    names = list(records)
    for a, b in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        if shared := sorted(named_patients(records[a]) & named_patients(records[b])):
            report["shared_patients"][f"{a}/{b}"] = shared
            report["problems"].append(f"{len(shared)} patients are in both {a} and {b}, such as {shared[0]}")
    home = {r["path"]: s for s, rows in records.items() for r in rows}
    if across := [d["paths"] for d in report["duplicates"] if len({home[p] for p in d["paths"]}) > 1]:
        report["problems"].append(f"{len(across)} images are on both sides of a split, such as {', '.join(across[0])}")
    if across := [d["paths"] for d in report["duplicates"] if d["classes"] > 1]:
        report["problems"].append(f"{len(across)} images are under two classes, such as {', '.join(across[0])}")
    return report


def _inspect(path: Path) -> dict | str:
    try:
        pixels, info = read_image(path, None)
    except ImageError as e:
        return str(e)
    digest = (pixels.shape, pixel_digest(pixels))
    return info | {"aspect": info["width"] / info["height"], "brightness": float(pixels.mean()), "digest": digest}


def _summary(stats: dict[str, list]) -> dict:
    """One class of one split: counts, and [5th percentile, median, 95th] of what a model could take a shortcut by."""
    spread = {
        k: np.percentile(stats[k], (5, 50, 95)).round(2).tolist() for k in ("width", "height", "aspect", "brightness")
    }
    counts = {k: dict(Counter(v for v in stats[k] if v).most_common()) for k in ("subtypes", "mode")}
    colour = sum(c > 0 for c in stats["colour"])
    return {"images": len(stats["width"]), "patients": len(set(stats["patients"])), "colour": colour} | counts | spread


def print_check(report: dict) -> None:
    head = f"{'split':6} {'class':10} {'images':>6} {'patients':>8}  {'width':^16} {'height':^16} {'aspect':^16} {'brightness':^14}"
    print(f"{report['root']}{' (DEMO: synthetic phantoms)' if report['demo'] else ''}\n\n{head}  modes, subtypes")
    for split, classes in report["splits"].items():
        for name, s in classes.items():
            spread = [
                " ".join(f"{v:{f}}" for v in s[k])
                for k, f in (("width", "5.0f"), ("height", "5.0f"), ("aspect", "5.2f"), ("brightness", "4.0f"))
            ]
            counts = ", ".join(f"{k} {n}" for k, n in (s["mode"] | s["subtypes"]).items())
            print(f"{split:6} {name:10} {s['images']:6} {s['patients']:8}  {'  '.join(spread)}  {counts}")
    print("(5th percentile, median, 95th; where these differ between classes, a model can take them for the disease)\n")
    print(f"unreadable files   {len(report['unreadable'])}")
    for item in report["unreadable"]:
        print(f"  {item['path']}: {item['reason']}")
    print(f"exact duplicates   {len(report['duplicates'])} groups")
    for item in report["duplicates"][:20]:
        print(f"  {' = '.join(item['paths'])}")
    print(f"shared patients    {sum(map(len, report['shared_patients'].values()))}")
    for line in report["problems"]:
        print(f"PROBLEM: {line}")
    print("no problem found" if not report["problems"] else "a result on this folder would not be valid")


# --- download ---


def download(folder: Path, url: str = URL, sha256: str = SHA256) -> Path:
    """Fetch, verify and unpack the public dataset into folder/chest_xray; nothing is done where it already is.

    Raises:
        DataError: no connection, another checksum, a damaged archive, or one that would write outside of folder.
    """
    target = folder / "chest_xray"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = (
        f"by hand: fetch {url} (or on Kaggle paultimothymooney/chest-xray-pneumonia) and unpack it, so that "
        f"{target}/train and {target}/test exist"
    )
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
        archive, unpacked = Path(temporary, "archive.zip"), Path(temporary, "unpacked")
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(60)  # a dead connection must not hang for ever
        try:
            torch.hub.download_url_to_file(url, str(archive), hash_prefix=sha256)
        except (RuntimeError, OSError, urllib.error.URLError) as e:
            raise DataError(f"the download failed ({e}); try again, or {by_hand}") from None
        finally:
            socket.setdefaulttimeout(timeout)
        try:
            with zipfile.ZipFile(archive) as z:
                for member in z.infolist():
                    path = Path(member.filename)
                    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                        raise DataError(f"the archive would write outside of {folder} ({path}); nothing was unpacked")
                    inside = len(path.parts) == 4 and path.parts[0] == "chest_xray" and is_image(path)
                    if inside and path.parts[1] in ("train", "val", "test"):
                        z.extract(member, unpacked)
        except zipfile.BadZipFile as e:
            raise DataError(f"the archive is damaged ({e}); try again, or {by_hand}") from None
        if not (unpacked / "chest_xray" / "train").is_dir():
            raise DataError(f"the archive does not hold chest_xray/train; {by_hand}")
        os.replace(unpacked / "chest_xray", target)
    return target


def main() -> None:
    parser = Parser(prog="data.py", description="Check, download or draw a data folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("check", help="the health of a folder; exit code 1 where a result would be invalid")
    sub.add_argument("dir", metavar="DIR", help="folder with train/ and test/")
    sub.add_argument("--json", action="store_true", help="print JSON alone")
    sub = commands.add_parser("download", help="fetch the public dataset (Kermany et al. 2018, CC BY 4.0, 1.2 GB)")
    sub.add_argument("dir", metavar="DIR", nargs="?", default="data", help="DIR/chest_xray is made")
    sub = commands.add_parser("demo", help="draw the synthetic set")
    sub.add_argument("dir", metavar="DIR")
    sub.add_argument("--images", type=within(int, 40, 10**6), default=1000, help="how many")
    sub.add_argument("--seed", type=within(int, 0, 2**32 - 1), default=0, help="every pixel is a function of it")
    args = parser.parse_args()
    try:
        if args.command == "check":
            report = check(find_root(args.dir))
            print(json.dumps(report, indent=1)) if args.json else print_check(report)
            sys.exit(1 if report["problems"] else 0)
        elif args.command == "download":
            existed = (Path(args.dir) / "chest_xray").exists()
            print(f"{download(Path(args.dir))} {'is there already' if existed else 'is ready'}")
        else:
            draw_demo(Path(args.dir), args.images, args.seed)
            print(f"{args.dir}: {args.images} synthetic phantoms; they are no radiographs")
    except (DataError, OSError) as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; nothing half-written is left\n")


if __name__ == "__main__":
    main()
