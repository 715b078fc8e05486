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
import signal
import socket
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

READER_VERSION = 1  # part of the cache key: raise it when read_image gives other pixels
DEFAULT_ROOT, DEMO_ROOT, DEMO_MARK = Path("data/chest_xray"), Path("data/demo"), "demo.json"
SPLITS = ("train", "val", "test")
MAX_PIXELS = 100_000_000  # the largest image of the public set has 7.4 million
SMALL_VAL = 100  # a val folder with fewer images (the best-known copy has 16) can't choose anything
URL = "https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
URL += "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded"
SHA256 = "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Pillow's own bomb warning and its remarks on odd metadata: read_image decides by itself what is an error.
warnings.filterwarnings("ignore", module="PIL")


class DataError(Exception):
    """Something about the data or the command that the user can mend; the message is one line."""


class ImageError(DataError):
    """One file that can't be used as an image; the message is the reason."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with defaults in its help and one-line errors (exit code 2)."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, closed by the caller: nothing to write to
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        for stream in (sys.stdin, sys.stdout, sys.stderr):  # file names need not be valid text
            if hasattr(stream, "reconfigure"):
                escape = stream is not sys.stdin and not stream.encoding.lower().startswith("utf")
                stream.reconfigure(errors="backslashreplace" if escape else "surrogateescape")

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def run_script(parser: Parser, work, *errors: type[Exception]) -> None:
    """End the process as work() tells: its exit code, one line and 2 for what the user can mend, 130 for Ctrl-C."""

    def ignore_signals() -> None:  # a second one must not disturb the threads that are ending
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def terminate(*_) -> None:  # as an exception, so that half-written files are removed
        ignore_signals()
        sys.exit(143)

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = work()
        sys.stdout.flush()  # here a closed pipe can still be caught
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (DataError, OSError, *errors) as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        ignore_signals()
        parser.exit(130, "interrupted; nothing half-written is left\n")
    sys.exit(code or 0)


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
        with contextlib.suppress(OSError):  # nobody may be reading it
            print(f"WARNING: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write, moved to path once it is complete: no reader ever sees half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write the whole file, or leave the one that is there."""
    with replacing(path) as f:
        f.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


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


def refuse_folder(error: OSError) -> None:
    raise DataError(f"folder {error.filename} can't be read ({error.strerror})")


def walk(folder: Path, onerror=refuse_folder):
    """Yield the images under folder; links are followed, each folder counts once; onerror is told of unreadable ones."""
    seen = set()
    for top, subfolders, files in os.walk(folder, onerror=onerror, followlinks=True):
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
        root = DEMO_ROOT
        if not is_demo(root):
            draw_demo(root)
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist; name one with --data, or run python data.py download")
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

    Each is a dict: path (relative to root, posix), split, class, patient, subtype, bytes, mtime (ns). An image whose
    name tells no patient is its own patient, and its path is the key.
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
            relative, (patient, subtype, _) = path.relative_to(root).as_posix(), identify(path.name)
            info = path.stat() if path.exists() else path.lstat()  # a broken link is named when it is read
            record = {"path": relative, "split": split, "class": name, "patient": patient or relative}
            records.append(record | {"subtype": subtype, "bytes": info.st_size, "mtime": info.st_mtime_ns})
        if not records or records[-1]["class"] != name:
            raise DataError(f"{folder / name} holds no readable image")
    return records


def scan_all(root: Path, required: tuple = ()) -> list[dict]:
    """scan of train/, val/ and test/, where there is one or it is required; the split of a small val/ is train."""
    records = [r for s in SPLITS if s in required or (root / s).is_dir() for r in scan(root, s)]
    classes = defaultdict(set)
    for r in records:
        classes[r["split"]].add(r["class"])
    for a, b in itertools.pairwise(classes):
        if classes[a] != classes[b]:
            raise DataError(f"{root}/{b} has other classes than {root}/{a}")
    val = [r for r in records if r["split"] == "val"]
    if len(val) < SMALL_VAL:
        for r in val:
            r["split"] = "train"
    return records


def positive_class(classes: list[str]) -> int:
    """The index of PNEUMONIA, in whatever case, else of the last class."""
    return next((i for i, name in enumerate(classes) if name.upper() == "PNEUMONIA"), len(classes) - 1)


def named_patients(records: list[dict]) -> set[str]:
    """Patients that the file names tell."""
    return {r["patient"] for r in records if r["patient"] != r["path"]}


def shared_patients(records: list[dict]) -> dict[str, list[str]]:
    """Patients on both sides of a split, where file names tell: {"train and test": [patient, ...]}."""
    named = {s: named_patients([r for r in records if r["split"] == s]) for s in SPLITS}
    pairs = itertools.combinations(SPLITS, 2)
    return {f"{a} and {b}": sorted(named[a] & named[b]) for a, b in pairs if named[a] & named[b]}


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
    fewest = min(patients, key=patients.get)
    if folds < 2:
        raise DataError(f"class {fewest} has too few patients to hold some out for validation")
    if folds < round(1 / fraction):
        warn(f"class {fewest} has only {folds} patients: 1 in {folds} of all images is held out for validation")
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
    records = scan_all(root, required=("train",))
    for sides, shared in shared_patients(records).items():
        raise DataError(
            f"{len(shared)} patients are in both {sides} of {root} ({', '.join(shared[:3])}), so no result would hold; "
            f"remove them from one side (python data.py check {root} lists them)"
        )
    records = [r for r in records if r["split"] != "test"]
    if small := sum(r["split"] == "train" and r["path"].startswith("val/") for r in records):
        warn(f"{root}/val holds only {small} images: they are used for training; validation is drawn by patient")
    if unnamed := sum(r["patient"] == r["path"] for r in records):
        warn(f"{unnamed} of {len(records)} file names tell no patient: each of these images counts as its own")
    if all(r["split"] == "train" for r in records):
        for record, held_out in zip(records, split_by_patient(records, seed, fraction)):
            record["split"] = "val" if held_out else "train"
    return records


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
            raise ImageError("the file is empty" if os.path.isfile(path) else "not a regular file")
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
            pixels = np.asarray(image).round().clip(0, 255).astype(np.uint8)
    except ImageError:
        raise
    except Exception as e:  # noqa: BLE001, decoders raise whatever a damaged file makes them stumble over
        known = {
            FileNotFoundError: "no such file",
            IsADirectoryError: "a folder without images",
            Image.UnidentifiedImageError: "not an image that Pillow can read",
        }
        raise ImageError(known.get(type(e), f"cannot be decoded: {e}")) from None
    return pixels, {"width": width, "height": height, "mode": mode, "colour": colour}


def _to_8bit_range(values: np.ndarray, inverted: bool) -> np.ndarray:
    """float32 in [0, 255] from integers of 16 or 32 bits, or floats."""
    integer, values = values.dtype.kind in "iu", values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("holds values that are not finite")
    values -= min(values.min(), 0)
    top = values.max()
    full = next((2.0**bits - 1 for bits in (8, 12, 16, 32) if top < 2**bits), top) if integer or top > 1 else 1.0
    return ((full - values if inverted else values) * (255 / full)).astype(np.float32)


# --- cache ---


def _parallel(work, items: list, name: str):
    """Yield work(item) of each item in order, on all cores, with a progress bar; a bounded number in memory."""
    chunks = (items[i : i + 512] for i in range(0, len(items), 512))
    with ThreadPoolExecutor(CORES) as pool:
        results = (result for chunk in chunks for result in pool.map(work, chunk))
        yield from tqdm(results, name, len(items), leave=False, unit="img", disable=None)


def _decode(path: Path, size: int | None) -> tuple[np.ndarray, dict]:
    """read_image; its dict with the pixels' digest (64-bit BLAKE2b, signed), or with the reason where it fails."""
    try:
        pixels, info = read_image(path, size)
    except ImageError as e:
        return np.zeros((size or 1, size or 1), np.uint8), {"digest": 0, "reason": str(e)}
    digest = int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "big", signed=True)
    return pixels, info | {"digest": digest}


def load_images(root: Path, records: list[dict], size: int) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
    """The records' images, decoded once and kept in one memory-mapped cache file: beside the data, where that can't be
    written in the user's cache folder, else in memory.

    Args:
        records: from scan or find_training; the file is rebuilt when a path, size or time of one of them changes.
        size: side of the square images.

    Returns:
        uint8 tensor [len(records), size, size]; int64 tensor [len(records)] of pixel digests; and for each image
        that can't be read its index with the reason (its pixels are zeros).
    """

    def build(f) -> None:  # pixels and notes in one file, so that they can't disagree
        digests, failed = [], []
        for i, (pixels, info) in enumerate(_parallel(lambda r: _decode(root / r["path"], size), records, "decoding")):
            f.write(pixels)
            digests.append(info["digest"])
            if "reason" in info:
                failed.append([i, info["reason"]])
        f.write(json.dumps([digests, failed]).encode())

    def take(built: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        pixels, notes = np.split(built, [len(records) * size**2])
        digests, failed = json.loads(notes.tobytes())
        if len(digests) != len(records):
            raise ValueError("notes of other images")
        return torch.from_numpy(pixels.reshape(-1, size, size)), torch.tensor(digests), dict(failed)

    files = (f"{r['path']} {r['bytes']} {r['mtime']}" for r in records)
    kind = f"{records[0]['path'].split('/')[0]}-{size}-"
    name = f"{kind}{hash_lines(itertools.chain([str(READER_VERSION)], files))[:16]}.bin"
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pneumonia")
    paths = [root / ".cache" / name, user_cache / hash_lines([str(root.resolve())])[:16] / name]
    for path in paths:
        with contextlib.suppress(OSError, ValueError, TypeError):  # not there, just replaced, or damaged
            return take(np.memmap(path, mode="c"))  # copy-on-write: torch takes no read-only arrays
    for path, otherwise in zip(paths, ("trying the user's cache folder", "keeping the images in memory")):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as f:
                build(f)
            for old in path.parent.glob(f"*{kind}*"):  # outdated, or left behind by a build that was killed
                with contextlib.suppress(OSError):  # another process was faster, or uses it
                    if old != path and (old.suffix == ".bin" or time.time() - old.stat().st_mtime > 86400):
                        old.unlink()
            return take(np.memmap(path, mode="c"))
        except OSError as e:
            warn(f"no image cache in {path.parent} ({e.strerror or e}); {otherwise}")
    build(memory := io.BytesIO())
    return take(np.frombuffer(memory.getbuffer(), np.uint8))


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
        gx = ((cos * w * flip).view(cell) * ox + dx.view(cell)) - (sin * h).view(cell) * oy
        gy = (sin * w * flip).view(cell) * ox + ((cos * h).view(cell) * oy + dy.view(cell))
        x = F.grid_sample(x, torch.stack([gx, gy], 3), align_corners=False)
    column = (n, 1, 1, 1)
    if s["brightness"]:
        x = x.mul_((1 + (2 * u[:, 6] - 1) * s["brightness"]).view(column)).clamp_(max=1)
    if s["contrast"]:
        mean, factor = x.mean((1, 2, 3), keepdim=True), (1 + (2 * u[:, 7] - 1) * s["contrast"]).view(column)
        x = x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)
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


def stress(images: torch.Tensor):
    """Yield (name, copy) of uint8 images [batch, height, width] under nine changes that leave the diagnosis as it is.

    Exposure (brightness and contrast x 0.65 and x 1.4, gamma 0.7 and 1.4), JPEG at quality 30, a Gaussian blur of
    1 pixel at 224 (in proportion elsewhere), and the central 85 % of each side, resized back.
    """

    def to_uint8(x: torch.Tensor) -> torch.Tensor:
        return x.mul(255).round_().clamp_(0, 255).to(torch.uint8)

    def jpeg(image: Image.Image) -> Image.Image:
        image.save(buffer := io.BytesIO(), "JPEG", quality=30)
        return Image.open(buffer)

    size = images.shape[-1]
    x = images.float() / 255
    mean = x.mean((1, 2), keepdim=True)
    for factor in (0.65, 1.4):
        yield f"brightness x {factor}", to_uint8(x * factor)
        yield f"contrast x {factor}", to_uint8((x - mean) * factor + mean)
    for exponent in (0.7, 1.4):
        yield f"gamma {exponent}", to_uint8(x**exponent)
    blur = ImageFilter.GaussianBlur(size / 224)
    for name, change in (("JPEG quality 30", jpeg), ("blur", lambda image: image.filter(blur))):
        changed = [np.asarray(change(Image.fromarray(i))) for i in images.numpy()]
        yield name, torch.from_numpy(np.stack(changed))
    edge = round(size * 0.075)
    crop = x[:, None, edge : size - edge, edge : size - edge]
    yield "crop of 85 %", to_uint8(F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)[:, 0])


# --- the demo set ---

DEMO_VERSION = 2


def draw_demo(folder: Path, images: int = 1000, seed: int = 0) -> None:
    """Write a synthetic set: crude chest phantoms with patients, subtypes, varied sizes and names of both schemes.

    One in five is for test; two in three show a pneumonia: focal consolidation (bacterial) or diffuse streaks (viral).
    Brightness, contrast, size and aspect are drawn without regard to the class. opacities.csv holds where each opacity
    lies: path, and an ellipse (x, y, rx, ry in parts of the width and height).
    Every pixel is a function of the seed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} exists and is not empty; choose another folder or remove it")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, patient, rows = Path(temporary, folder.name), 0, ["path,x,y,rx,ry"]
        for split, left in (("train", images - images // 5), ("test", images // 5)):
            while left:
                patient += 1
                subtype = ("", "bacterial", "viral")[patient % 3]
                visits = min(int(np.random.default_rng([seed, patient]).integers(1, 4)), left)
                left -= visits
                for visit in range(1, visits + 1):
                    path = f"{split}/{'PNEUMONIA' if subtype else 'NORMAL'}/{_demo_name(subtype, patient, visit)}"
                    anatomy, today = (np.random.default_rng([seed, patient, v]) for v in (0, visit))
                    image, ellipses = _draw_phantom(anatomy, today, subtype)
                    (new / path).parent.mkdir(parents=True, exist_ok=True)
                    image.save(new / path, quality=90)
                    rows += [",".join([path, *(f"{v:.4f}" for v in ellipse)]) for ellipse in ellipses]
        (new / "opacities.csv").write_text("\n".join([*rows, ""]))
        mark = {"demo": True, "version": DEMO_VERSION, "images": images, "seed": seed}
        (new / DEMO_MARK).write_text(json.dumps(mark) + "\n")
        try:
            os.rename(new, folder)
        except OSError:
            if not is_demo(folder):  # else another process was first, with the same pixels
                raise


def _demo_name(subtype: str, patient: int, visit: int) -> str:
    """By one of the schemes that identify knows; every fourth patient by that of the newer copies."""
    new, old = {"": ("NORMAL", "IM"), "bacterial": ("BACTERIA", "bacteria"), "viral": ("VIRUS", "virus")}[subtype]
    if patient % 4 == 0:
        return f"{new}-{1000000 + patient}-{visit:04d}.jpeg"
    if subtype:
        return f"person{patient}_{old}_{visit}.jpeg"
    return f"{'NORMAL2-' if patient % 2 else ''}{old}-{patient:04d}-{visit:04d}.jpeg"


def _draw_phantom(anatomy: np.random.Generator, visit: np.random.Generator, subtype: str):
    """One phantom as a grey Pillow image, and its opacities as ellipses (x, y, rx, ry) in parts of width and height.

    anatomy draws what stays the same for a patient; visit draws exposure, pose, size and disease.
    """

    def soft(distance: np.ndarray, edge: float) -> np.ndarray:  # 1 inside (distance < 0), 0 outside
        return (0.5 - distance / (2 * edge)).clip(0, 1)

    def bell(distance: np.ndarray) -> np.ndarray:
        return np.exp(-distance * distance)

    def smooth(rng: np.random.Generator, down: int, across: int) -> np.ndarray:  # noise in [-1, 1], with so many bumps
        grid = Image.fromarray(rng.uniform(-1, 1, (down + 2, across + 2)).astype(np.float32))
        return np.asarray(grid.resize((w, h), Image.Resampling.BICUBIC))

    w = int(visit.integers(110, 150))
    h = int(w * visit.uniform(0.75, 1.0))
    sx, sy, turn = visit.uniform(0.82, 1.0), visit.uniform(0.82, 1.0), visit.uniform(-0.08, 0.08)
    cx, cy, cos, sin = visit.uniform(-0.06, 0.06), visit.uniform(-0.06, 0.06), math.cos(turn), math.sin(turn)
    gx, gy = np.linspace(-1, 1, w, dtype=np.float32) - cx, np.linspace(-1, 1, h, dtype=np.float32)[:, None] - cy
    x, y = gx * (cos / sx) + gy * (sin / sx), gy * (cos / sy) - gx * (sin / sy)  # of the body, from image coordinates
    side = np.abs(x)

    wide, heart, arch = anatomy.uniform(0.8, 0.95), anatomy.uniform(0.28, 0.4), anatomy.uniform(0.25, 0.4)
    dome, phase, spacing = anatomy.uniform(0.45, 0.6), anatomy.uniform(0, 1), anatomy.uniform(0.17, 0.2)
    body = soft(side - wide + 0.75 * (y + 0.55).clip(-1, 0), 0.05)
    image = body * (0.62 + 0.1 * soft(side - 0.2, 0.15))
    height = np.where(y < -0.12, np.float32(0.72), np.float32(1.02))  # from the hilum to the apex, and to the base
    lungs = soft(((side - 0.43) / 0.34) ** 2 + ((y + 0.12) / height) ** 2 - 1, 0.25)
    lungs *= soft(y - dome - 0.25 * (side - 0.42) ** 2 + 0.06 * (x < 0), 0.03)  # down to the diaphragm
    hila = np.exp(-(((side - 0.2) / 0.16) ** 2) - ((y + 0.02) / 0.25) ** 2)
    image += lungs * ((0.04 + 0.05 * hila) * (1 + smooth(anatomy, 10, 12)) - 0.34)  # vessels in the air
    bend = side - 0.35
    wave = (y - bend * (0.3 + arch * 1.4 * np.abs(bend))) / spacing + phase
    ribs = bell((wave - np.floor(wave) - 0.5) / 0.11) * (side > 0.1)  # % would take ten times as long
    image += 0.09 * ribs * soft(side - 0.8, 0.03) * soft(np.abs(y) - 0.82, 0.1)
    image += 0.14 * bell((y + 0.7 + 0.22 * side) / 0.028) * (np.abs(side - 0.42) < 0.34)  # collar bones
    image += soft(side - 0.085, 0.02) * (0.12 + 0.03 * np.sin(y * 34 + phase * 6))  # spine
    image += 0.2 * soft(((x - 0.16) / heart) ** 2 + ((y - 0.28) / 0.34) ** 2 - 1, 0.25) * soft(y - dome - 0.1, 0.05)

    spots, ellipses = [], []  # x, y, rx, ry, opacity: one patchy spot, or streaks on both sides
    if subtype == "bacterial":
        place = (-1, 1)[visit.integers(2)] * visit.uniform(0.36, 0.5), visit.uniform(-0.35, 0.2)
        spots = [(*place, visit.uniform(0.26, 0.34), visit.uniform(0.3, 0.45), visit.uniform(0.2, 0.4))]
        texture = 0.8 + 0.8 * smooth(visit, 26, 26)
    elif subtype == "viral":
        places = [(s * 0.43, visit.uniform(-0.2, 0.1), 0.34) for s in (-1, 1)]
        spots = [(*place, visit.uniform(0.5, 0.65), visit.uniform(0.16, 0.34)) for place in places]
        texture = 0.4 + bell((smooth(visit, 26, 16) + smooth(visit, 16, 26)) / 0.3)
    rough = 0.5 * smooth(visit, 9, 9) - 1  # outline
    for ox, oy, rx, ry, opacity in spots:
        image += opacity * texture * lungs * soft(((x - ox) / rx) ** 2 + ((y - oy) / ry) ** 2 + rough, 0.35)
        px, py = ox * sx * cos - oy * sy * sin + cx, ox * sx * sin + oy * sy * cos + cy  # from body to image
        ellipses.append(((px + 1) / 2, (py + 1) / 2, 1.15 * rx * sx / 2, 1.15 * ry * sy / 2))

    image += 0.02 * smooth(visit, h // 2, w // 2) + 0.04 * smooth(visit, 3, 3) * body
    # Exposure: mean and spread are drawn, so that neither tells the class.
    image = (image - image.mean()) * (visit.uniform(42, 62) / float(image.std())) + visit.uniform(95, 145)
    if visit.random() < 0.35:  # a lead L at the patient's left
        row, column = int(0.07 * h), int(0.92 * w)
        image[row : row + 6, column] = image[row + 5, column : column + 4] = 235
    out, zoom = Image.fromarray(image.clip(0, 255).astype(np.uint8)), visit.uniform(1.6, 3)
    return out.resize((int(w * zoom), int(h * zoom)), Image.Resampling.BICUBIC), ellipses


# --- check ---


def check(root: Path) -> dict:
    """The health of a data folder: counts, shapes and what would invalidate a result.

    Returns:
        dict: root; demo; folders: for each SPLIT/CLASS what _summary tells of it; unreadable: path and reason;
        duplicates: groups of paths with the same pixels, across splits, across classes, and within one of each;
        shared_patients; problems: one line for each thing that makes a result invalid. A small val/ counts as train.
    """
    records = scan_all(root)
    if not records:
        raise DataError(f"{root} has none of the folders train/, val/, test/")

    def inspect(record: dict) -> dict:
        pixels, info = _decode(root / record["path"], None)
        return info | {"brightness": float(pixels.mean())}

    folders, by_pixels, unreadable = {}, defaultdict(list), []
    for record, info in zip(records, _parallel(inspect, records, "checking")):
        rows = folders.setdefault("/".join(record["path"].split("/")[:2]), [])
        if "reason" in info:
            unreadable.append({"path": record["path"], "reason": info["reason"]})
        else:
            rows.append(record | info | {"aspect": info["width"] / info["height"]})
            by_pixels[info["width"], info["height"], info["digest"]].append(record)
    groups = [group for group in by_pixels.values() if len(group) > 1]
    by_kind = {
        "across splits": [g for g in groups if len({r["split"] for r in g}) > 1],
        "across classes": [g for g in groups if len({r["class"] for r in g}) > 1],
        "within": [g for g in groups if len({(r["split"], r["class"]) for r in g}) == 1],
    }
    duplicates = {kind: [[r["path"] for r in g] for g in found] for kind, found in by_kind.items()}
    shared = shared_patients(records)
    problems = [f"{folder} holds no readable image" for folder, rows in folders.items() if not rows]
    problems += [f"{len(p)} patients are in both {sides}, such as {p[0]}" for sides, p in shared.items()]
    for kind, what in (("across splits", "on both sides of a split"), ("across classes", "under two classes")):
        if found := duplicates[kind]:
            problems.append(f"{len(found)} images are {what}, such as {', '.join(found[0])}")
    report = {"root": str(root), "demo": is_demo(root), "unreadable": unreadable, "duplicates": duplicates}
    report["folders"] = {folder: _summary(rows) for folder, rows in folders.items() if rows}
    return report | {"shared_patients": shared, "problems": problems}


def _summary(rows: list[dict]) -> dict:
    """Counts of images (unnamed: their names tell no patient), and [5th percentile, median, 95th] of their shapes."""
    unnamed = sum(r["patient"] == r["path"] for r in rows)
    summary = {"images": len(rows), "patients": len({r["patient"] for r in rows}), "unnamed": unnamed}
    summary |= {name: sum(r["subtype"] == name for r in rows) for name in ("bacterial", "viral")}
    for key in ("width", "height", "aspect", "brightness"):
        summary[key] = np.percentile([r[key] for r in rows], (5, 50, 95)).round(2).tolist()
    return summary | {f"mode {mode}": n for mode, n in Counter(r["mode"] for r in rows).most_common()}


def print_check(report: dict) -> None:
    """The report as a table, a column for each folder, and lists of what was found, in 120 columns."""
    print(f"{report['root']}{' (DEMO: synthetic phantoms)' if report['demo'] else ''}\n")
    folders = list(report["folders"].items())
    for start in range(0, len(folders), 6):  # columns that fit beside each other
        names, columns = zip(*folders[start : start + 6])
        print(" " * 16, *(f"{name:>16}" for name in names))
        for key in dict.fromkeys(key for column in columns for key in column):
            values = [column.get(key, 0) for column in columns]
            cells = [" ".join(f"{x:.{0 if x >= 10 else 2}f}" for x in v) if isinstance(v, list) else v for v in values]
            print(f"{key:16}", *(f"{cell:>16}" for cell in cells))
        print()
    print("unnamed: the file name tells no patient, so that the image counts as one. Three numbers: 5th percentile,")
    print("median, 95th. Where these or the modes differ between classes, a model can take them for the disease.\n")
    findings = {"unreadable files": [f"{u['path']}: {u['reason']}" for u in report["unreadable"]]}
    findings |= {f"duplicates {kind}": [" = ".join(g) for g in groups] for kind, groups in report["duplicates"].items()}
    findings["shared patients"] = [f"{p} in {sides}" for sides, ps in report["shared_patients"].items() for p in ps]
    wrap = textwrap.TextWrapper(120, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    for title, lines in findings.items():
        print(f"{title:26} {len(lines)}")
        more = [f"... and {len(lines) - 20} more; --json lists all"] if len(lines) > 20 else []
        for line in lines[:20] + more:
            print(wrap.fill(line))
    for line in report["problems"]:
        print(f"PROBLEM: {line}")
    print("a result on this folder would not be valid" if report["problems"] else "no problem found")


# --- download ---


def download(folder: Path, url: str = URL, sha256: str = SHA256) -> Path:
    """Fetch, verify and unpack the public dataset into folder/chest_xray; nothing is done where it already is.

    Raises:
        DataError: no connection, another checksum, a damaged archive, or one that would write outside of folder.
    """
    target = folder / "chest_xray"
    if (target / "train").exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
        archive, unpacked = Path(temporary, "archive.zip"), Path(temporary, "unpacked")
        socket.setdefaulttimeout(60)  # a dead connection must not hang for ever
        try:
            torch.hub.download_url_to_file(url, str(archive), hash_prefix=sha256)
            with zipfile.ZipFile(archive) as z:
                for member in z.infolist():
                    path, parts = Path(member.filename), Path(member.filename).parts
                    if path.is_absolute() or ".." in parts or "\\" in member.filename:
                        raise DataError(f"the archive would write outside of {folder} ({path}); nothing was unpacked")
                    if len(parts) == 4 and parts[0] == "chest_xray" and parts[1] in SPLITS and is_image(path):
                        z.extract(member, unpacked)
            if not (unpacked / "chest_xray" / "train").is_dir():
                raise RuntimeError("the archive does not hold chest_xray/train")
            os.replace(unpacked / "chest_xray", target)
        except (RuntimeError, OSError, zipfile.BadZipFile) as e:
            raise DataError(
                f"the download failed or is damaged ({e}); try again, or by hand: fetch {url} (or on Kaggle "
                f"paultimothymooney/chest-xray-pneumonia) and unpack it, so that {target}/train and {target}/test exist"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
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

    def work() -> int:
        if args.command == "check":
            report = check(find_root(args.dir))
            print(json.dumps(report, indent=1)) if args.json else print_check(report)
            return 1 if report["problems"] else 0
        if args.command == "download":
            print(f"{download(Path(args.dir))} is there")
        else:
            draw_demo(Path(args.dir), args.images, args.seed)
            print(f"{args.dir}: {args.images} synthetic phantoms; they are no radiographs")
        return 0

    run_script(parser, work)


if __name__ == "__main__":
    main()
