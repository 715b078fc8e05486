"""What an image is: find, group by patient, split, read, cache, augment; and three commands of its own.

python data.py check data/chest_xray         # health of a folder; exit code 1 where a result would be invalid
python data.py download                      # the public dataset (1.2 GB) into data/chest_xray
python data.py demo data/demo --images 1000  # the synthetic set that the scripts use where there is no data
"""

import sys


# Set before the libraries are imported, since that takes seconds.
def _end_in_one_line(kind: type, error: BaseException, trace) -> None:
    """A sys.excepthook: Ctrl-C outside of run_script, so while something is being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[0].endswith(("train.py", "evaluate.py", "predict.py", "data.py")):
    sys.excepthook = _end_in_one_line

import argparse
import contextlib
import csv
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import posixpath
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
import urllib.request
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

DEFAULT_ROOT, DEMO_ROOT, DEMO_MARK = Path("data/chest_xray"), Path("data/demo"), "demo.json"
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SMALL_VAL = 100  # a val folder with fewer images (the best-known copy has 16) can't choose anything

# --- command line and files, for all four scripts ---


class UserError(Exception):
    """Something that the user can fix; the message is one line."""


class ImageError(UserError):
    """One file that can't be used as an image; the message is the reason."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception, so that half-written files are removed."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with defaults in its help and one-line errors (exit code 2)."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def run_script(parser: Parser, work, hint=None) -> None:
    """End the process as work() tells: its exit code, one line and 2 for what the user can fix, 130 for Ctrl-C.

    hint: what to say after an interruption, asked for only then, of work that a closed pipe must not end unsaid.
    """
    advise = hint or (lambda: "nothing half-written is left")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, one that is closed would be None
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115

    def terminate(*_) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    torch.set_num_threads(min(torch.get_num_threads(), CORES))
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # file names need not be valid text
        if hasattr(stream, "reconfigure"):
            utf = stream.encoding.lower().startswith("utf")
            stream.reconfigure(errors="surrogateescape" if utf else "backslashreplace")
    try:
        code = work()
        sys.stdout.flush()  # here a closed pipe can still be caught
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if hint:
            parser.exit(1, f"nobody reads the output; {advise()}\n")
        code = 0
    except UserError as e:
        parser.error(str(e))
    except OSError as e:
        parser.error(f"{e}; {advise()}")
    except KeyboardInterrupt as e:
        parser.exit(143 if isinstance(e, Terminated) else 130, f"interrupted; {advise()}\n")
    sys.exit(code or 0)


def within(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number in [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def filled(text: str) -> str:
    """An argparse type: text that is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def printable(text: str) -> str:
    """Text as one line that moves no cursor: a file name or a field of a checkpoint may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(message: str) -> str:
    """A message for people: no line breaks or control characters, at most 300 characters."""
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"


def warn(message: str) -> None:
    """One loud line on stderr, from one process of a distributed run only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"WARNING: {one_line(message)}", file=sys.stderr, flush=True)


def command_line(*words) -> str:
    """A command to show, quoted as the user's shell wants it."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


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


def write_text(path: Path, text: str) -> None:
    """Write the whole file, or leave the one that is there."""
    with replacing(path) as f:
        f.write(text.encode(errors="surrogateescape"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def harmless(cell):
    """A CSV cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe."""
    if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")):
        return f"'{cell}"
    return cell


def to_csv(rows: list[dict], header: bool = True) -> str:
    """Rows as CSV text; the columns are the first row's keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({column: harmless(cell) for column, cell in row.items()})
    return text.getvalue()


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_csv(path: Path, rows: list[dict]) -> None:
    write_text(path, to_csv(rows))


def call_within(seconds: float, work, *arguments):
    """work(*arguments), in a thread that is left behind at the limit, since networks know ways to wait for ever.

    Raises:
        TimeoutError: at the limit.
    """
    try:
        with ThreadPool(1) as pool:
            return pool.apply_async(work, arguments).get(seconds)
    except multiprocessing.TimeoutError:
        raise TimeoutError from None


CORES = joblib.cpu_count()  # that this process may use: its affinity and its container's quota count


def parallel(work, items, name: str):
    """Yield work(item) of each item in order, on all cores, with a progress bar; a bounded number in memory."""
    with (
        ThreadPoolExecutor(CORES) as pool,
        tqdm(total=len(items), desc=name, leave=False, unit="img", disable=None) as bar,
    ):
        for start in range(0, len(items), 512):
            for result in pool.map(work, items[start : start + 512]):
                bar.update()
                yield result


# --- find, group by patient, split ---


@dataclass(slots=True)
class Record:
    """One image file, and what is known of it before it is opened."""

    path: str  # relative to the root, with forward slashes
    label: str  # class name
    split: str  # train, val, test, or left out
    patient: str  # the path itself where nothing tells the patient
    subtype: str  # bacterial, viral, or whatever metadata.csv says
    series: str  # of file names, such as NORMAL2-IM
    bytes: int
    mtime_ns: int
    groups: dict[str, str] = field(default_factory=dict)  # further columns of metadata.csv

    @property
    def known_patient(self) -> bool:
        return self.patient != self.path


def identify(name: str) -> tuple[str | None, str, str]:
    """Patient key, subtype (bacterial, viral or empty) and name series, as the file names of the public copies tell.

    The patient is None for names of no known scheme.
    """
    m = re.match(r"person(?P<number>\d+)_(?P<series>bacteria|virus)_\d", name)
    m = m or re.match(r"(?P<series>IM|NORMAL2-IM|NORMAL|BACTERIA|VIRUS)-(?P<number>\d+)-\d", name)
    if m is None:
        return None, "", ""
    series = m["series"]
    subtype = {"bacteria": "bacterial", "virus": "viral"}.get(series.lower(), "")
    if series in ("NORMAL", "BACTERIA", "VIRUS"):  # the newer copies number all patients in one go
        return m["number"], subtype, series
    return f"{series}-{int(m['number'])}", subtype, series


def is_hidden(name: str) -> bool:
    """Files and folders of systems and programs."""
    return name.startswith((".", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE"))


def is_dicom(path: Path) -> bool:
    """By its first bytes, where the ending allows it: such files often have none, or a number."""
    if not re.fullmatch(r"(\.dcm|\.\d+)?", path.suffix.lower()):
        return False
    with contextlib.suppress(OSError):
        if path.is_file():  # a named pipe would wait for ever
            with open(path, "rb") as f:
                return f.read(132)[128:] == b"DICM"
    return False


def is_image(path: Path) -> bool:
    """By its ending, but for DICOM files."""
    return path.suffix.lower() in IMAGE_SUFFIXES or is_dicom(path)


def refuse_folder(error: OSError) -> None:
    raise UserError(f"folder {error.filename} can't be read ({error.strerror})")


def walk(folder: Path, passed_over: Counter, onerror=refuse_folder):
    """Yield the images under folder, sorted by folder; links are followed, each folder counts once.

    passed_over counts the other files by ending; onerror is told of unreadable folders.
    """
    seen = set()
    for top, subfolders, files in os.walk(folder, onerror=onerror, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(itertools.filterfalse(is_hidden, subfolders))
        for name in sorted(itertools.filterfalse(is_hidden, files)):
            path = Path(top, name)
            if is_image(path):
                yield path
            else:
                passed_over[path.suffix.lower() or "no ending"] += 1


def find_root(data: str | None) -> Path:
    """The folder with train/ and test/. Without data: data/chest_xray, else that of the demo set."""
    if data is None:
        return DEFAULT_ROOT if DEFAULT_ROOT.exists() else DEMO_ROOT
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist; name another, or run python data.py download")
    inner = root / "chest_xray"
    if inner.is_dir() and not any(split_folder(root, split).is_dir() for split in ("train", "test")):
        return inner
    return root


def is_demo(root: Path) -> bool:
    return (root / DEMO_MARK).exists()


def prepare_demo(root: Path) -> None:
    """Draw the demo set where root is its place and it is missing; say so loudly wherever root is a demo set."""
    if root == DEMO_ROOT and not root.exists():
        draw_demo(root)
    if is_demo(root):
        warn(f"DEMO DATA: {root} holds synthetic phantoms, not radiographs. No result says anything about patients.")


def split_of(folder: str) -> str | None:
    """The split that a folder or a word in metadata.csv names, in any case."""
    return SPLIT_NAMES.get(folder.lower())


def split_folder(root: Path, split: str) -> Path:
    """The folder whose name means the split; ROOT/split where there is none.

    Raises:
        UserError: there are several.
    """
    folders = sorted(folder for folder in root.glob("*/") if split_of(folder.name) == split)
    if len(folders) > 1:
        raise UserError(f"{root} has several folders for {split}: {', '.join(f.name for f in folders)}; merge them")
    return folders[0] if folders else root / split


Metadata = dict[str, dict[str, str | None]]  # rows of metadata.csv by path; each has its split, one of SPLITS, or None
TABLE_COLUMNS = ("patient", "subtype", "label", "split")  # further columns are groups


def read_metadata(root: Path) -> Metadata:
    """The rows of ROOT/metadata.csv, or of ROOT/SPLIT/metadata.csv, by path relative to root; empty without one.

    The convention of Hugging Face's image folders: file_name is relative to the table's folder. Separated by commas,
    semicolons or tabs; UTF-8 with or without a byte order mark.

    Raises:
        UserError: not readable as such a table, a file is listed twice, or one in a table of labels has no split.
    """
    rows = {}
    for table in [*root.glob("metadata.csv"), *sorted(root.glob("*/metadata.csv"))]:
        folder = table.parent.relative_to(root).as_posix()
        try:
            text = table.read_text(encoding="utf-8-sig")
            header = text.split("\n", 1)[0]
            delimiter = max(",;\t", key=header.count)
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
            columns, lines = reader.fieldnames or [], list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise UserError(
                f"{table} can't be read ({e}); save it as CSV in UTF-8; is a quotation mark missing?"
            ) from None
        if len(set(columns)) < len(columns):
            raise UserError(f"{table} has a column twice: {', '.join(columns)}")
        if "file_name" not in columns:
            raise UserError(f"{table} has no column file_name; its columns are {', '.join(columns)}")
        for column in columns:
            meant = re.sub(r"[ _-]?id$", "", column.strip().lower())
            if meant in TABLE_COLUMNS and column != meant:
                raise UserError(f"{table}: call the column {meant} instead of {column}, or otherwise if it is none")
        if "split" in columns and "label" not in columns:
            warn(f"{table} has a column split but no column label: the folders tell the split")
        for row in lines:
            if any(row.pop(None, [])):
                raise UserError(f"{table}: the row of {row['file_name']} has more cells than there are columns")
            name = row.pop("file_name").replace("\\", "/")
            if not name and not any(row.values()):
                continue
            path = posixpath.normpath(posixpath.join(folder, name))
            if path.startswith(("/", "../")):
                raise UserError(f"{table}: {name} is not within the folder; file_name is relative to that of the table")
            if path in rows:
                raise UserError(f"{table}: {path} is listed twice")
            row = {key: value.strip() for key, value in row.items()}
            told = row.get("split") if "label" in columns else None
            row["split"] = split_of(told or path.split("/")[0])
            if "label" in columns and row["split"] is None:
                raise UserError(f"{table}: the split of {path} is {told or 'not told'}: train, val or test?")
            rows[path] = row
    return rows


def make_record(root: Path, path: str, label: str, split: str, row: dict[str, str]) -> Record:
    """What the table, the file's name, or the header of a DICOM file tells; row: of metadata.csv, may be empty."""
    file = os.path.join(root, path)  # a Path would take longer than the look at the file
    patient, subtype, series = identify(os.path.basename(path))
    try:
        info = os.stat(file)
    except OSError:  # a broken link is named when it is read
        info = os.lstat(file)
    return Record(
        path=path,
        label=label,
        split=split,
        patient=row.get("patient") or patient or dicom_patient(Path(file)) or path,
        subtype=row.get("subtype") or subtype,
        series=series,
        bytes=info.st_size,
        mtime_ns=info.st_mtime_ns,
        groups={k: v for k, v in row.items() if k not in TABLE_COLUMNS},
    )


def warn_rows(message: str, paths: list[str]) -> None:
    """One line where there are such paths: how many, and the first few."""
    if paths:
        more = ", ..." if len(paths) > 3 else ""
        warn(f"metadata.csv {message}: {len(paths)} ({', '.join(paths[:3])}{more})")


def label_by_folder(root: Path, split: str) -> dict[str, str]:
    """The class of each image, by path, of ROOT/split/CLASS/, sorted, as ImageFolder finds them."""
    folder = split_folder(root, split)
    if not folder.is_dir():
        raise UserError(f"{root} has no folder {split}/; expected {root}/{split}/CLASS/*.jpeg")
    labels, loose, passed_over = {}, 0, Counter()
    for place in sorted(folder.iterdir()):
        if is_hidden(place.name):
            continue
        if not place.is_dir():
            loose += is_image(place)
            continue
        files = sorted(walk(place, passed_over))
        if not files:
            warn(f"{place} holds no image")
        for file in files:
            labels[file.relative_to(root).as_posix()] = place.name
    if loose:
        warn(f"{loose} images that lie in {folder} itself, in no class folder, are passed over")
    if passed_over:
        counts = ", ".join(f"{n} {suffix}" for suffix, n in passed_over.most_common(6))
        warn(f"passed over in {folder}: {passed_over.total()} files that are no images by their ending ({counts})")
    return labels


def scan(root: Path, split: str, table: Metadata | None = None) -> list[Record]:
    """The images of a split, sorted by class and path: those of ROOT/split/CLASS/, or, in whatever folders, those that
    metadata.csv gives labels.

    No image is decoded. One whose patient nothing tells is its own patient. table: of read_metadata, where it was read.

    Raises:
        UserError: no such folder, or names of classes that can't be told apart or printed.
    """
    table = read_metadata(root) if table is None else table
    rows = {path: row for path, row in table.items() if row["split"] == split}
    if any("label" in row for row in table.values()):
        there = [path for path in rows if os.path.isfile(os.path.join(root, path))]
        labels = {path: rows[path].get("label", "") for path in sorted(there)}
    else:
        labels = label_by_folder(root, split)
    if table:
        warn_rows(f"does not know these images of {split}", [path for path in labels if path not in table])
    warn_rows(f"has rows of {split} whose file is not there", [path for path in rows if path not in labels])
    warn_rows(f"has rows of {split} without a label, left out", [path for path in labels if not labels[path]])
    records = [make_record(root, path, label, split, table.get(path, {})) for path, label in labels.items() if label]
    records.sort(key=lambda r: r.label)
    classes = sorted({r.label for r in records})
    for name in classes:
        if not name.isprintable():
            raise UserError(f"the class {name!r} of {root}/{split} has control characters in its name; rename it")
    if len({name.lower() for name in classes}) < len(classes):
        raise UserError(f"classes of {root}/{split} differ in case alone: {', '.join(classes)}; rename one of them")
    return records


def check_classes(records: list[Record], classes: list[str], where: str) -> None:
    """Raise UserError where the records' classes are not among classes, naming those that differ in case alone."""
    known = {c.lower(): c for c in classes}
    for label in sorted({r.label for r in records} - set(classes)):
        if label.lower() in known:
            raise UserError(
                f"{where} calls a class {label} that is {known[label.lower()]} elsewhere; rename one of them"
            )
        raise UserError(f"{where} has the class {label}, which is not among {', '.join(classes)}")


def scan_all(root: Path) -> list[Record]:
    """scan of train/, val/ and test/, where there are such with images; the split of a small val/ is train.

    Raises:
        UserError: as scan, or the splits have other classes than train.
    """
    records = []
    table = read_metadata(root)  # once: it may have hundreds of thousands of rows
    listed = {row["split"] for row in table.values()}
    for split in SPLITS:
        if split not in listed and not split_folder(root, split).is_dir():
            continue
        more = scan(root, split, table)
        if not more:
            warn(f"{root}/{split} has no class folders with images")
        if records:
            check_classes(more, sorted({r.label for r in records}), f"{root}/{split}")
        if split == "val" and len(more) < SMALL_VAL:
            warn(
                f"{root}/val holds only {len(more)} images: they are used for training; validation is drawn by patient"
            )
            for r in more:
                r.split = "train"
        records += more
    return records


def positive_index(classes: list[str], asked: str | None) -> int:
    """Index of the positive class: the one asked for, else PNEUMONIA in any case, else (with a warning) the last."""
    if asked is not None:
        if len(classes) != 2:
            raise UserError(f"--positive is for two classes; here there are {', '.join(classes)}")
        if asked not in classes:
            raise UserError(f"--positive {asked} is not one of the classes {', '.join(classes)}")
        return classes.index(asked)
    names = [name.upper() for name in classes]
    if "PNEUMONIA" in names:
        return names.index("PNEUMONIA")
    if len(classes) == 2:
        warn(f"the positive class is a guess: {classes[-1]}, not {classes[0]}; name it with --positive CLASS")
    return len(classes) - 1


def named_patients(records: list[Record]) -> set[str]:
    """Patients that are known."""
    return {r.patient for r in records if r.known_patient}


def count_seen(records: list[Record], digests: Tensor, pixels: Tensor, patients: list[str]) -> tuple[int, int]:
    """How many of the images, by their digests, and of their known patients are among those pixels and patients."""
    seen_images = torch.isin(digests, pixels).sum()
    seen_patients = named_patients(records) & set(patients)
    return int(seen_images), len(seen_patients)


def shared_patients(records: list[Record]) -> dict[str, list[str]]:
    """Known patients on both sides of a split: {"train and test": [patient, ...]}."""
    named = {s: named_patients([r for r in records if r.split == s]) for s in SPLITS}
    shared = {}
    for a, b in itertools.combinations(SPLITS, 2):
        both = named[a] & named[b]
        if both:
            shared[f"{a} and {b}"] = sorted(both)
    return shared


def seed_from(*numbers) -> int:
    """A seed from several numbers or names, so that neighbours share nothing."""
    text = repr(numbers).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())


def generator_from(*numbers) -> torch.Generator:
    """PyTorch's random numbers, on the CPU, as a function of several numbers or names."""
    return torch.Generator().manual_seed(seed_from(*numbers))


def draw_folds(records: list[Record], folds: int) -> list[int]:
    """The fold, 0 to folds - 1, of each record: a function of the records and folds alone.

    Patients stay together. Within each stratum of class, subtype and name series they are dealt out in an order drawn
    from their keys, those with most images first, each to the fold with the fewest images of the stratum so far.
    """
    images, kinds = Counter(), defaultdict(set)
    for r in records:
        images[r.patient] += 1
        kinds[r.patient].add((r.label, r.subtype, r.series))
    strata = {patient: tuple(sorted(kinds[patient])) for patient in kinds}
    fold_of, count, total = {}, Counter(), Counter()
    for patient in sorted(strata, key=lambda p: (strata[p], -images[p], seed_from(p))):
        stratum = strata[patient]
        fold = min(range(folds), key=lambda k: (count[stratum, k], total[k]))
        fold_of[patient] = fold
        count[stratum, fold] += images[patient]
        total[fold] += images[patient]
    return [fold_of[r.patient] for r in records]


def find_training(root: Path, folds: int, fold: int) -> list[Record]:
    """The records of train/ (and val/), each with its split, train or val; no pixel of test/ is read.

    Where there is no val/ to speak of, the patients of one of the folds are val.

    Raises:
        UserError: a patient on both sides of a split, or a class with fewer patients than it takes to hold some out.
    """
    records = scan_all(root)
    classes = sorted({r.label for r in records if r.split == "train"})
    if len(classes) < 2:
        found = f"only one class with images, {classes[0]}" if classes else "no class folders with images"
        raise UserError(f"{root}/train has {found}; expected two or more, such as NORMAL/ and PNEUMONIA/")
    for sides, shared in shared_patients(records).items():
        raise UserError(
            f"{len(shared)} patients are in both {sides} of {root} ({', '.join(shared[:3])}), so no result would hold; "
            f"remove them from one side (python data.py check --json {root} lists them)"
        )
    records = [r for r in records if r.split != "test"]
    unnamed = sum(not r.known_patient for r in records)
    if unnamed:
        warn(
            f"the patient can't be parsed from {unnamed} of {len(records)} file names: "
            "each such image counts as its own patient"
        )
    if any(r.split == "val" for r in records):
        return records
    for label in classes:
        patients = {r.patient for r in records if r.label == label}
        if len(patients) < 2:
            raise UserError(f"class {label} has too few patients to hold some out for validation")
        if len(patients) < folds:
            warn(f"class {label} has {len(patients)} patients for {folds} folds: some folds hold none of it")
    for record, its_fold in zip(records, draw_folds(records, folds)):
        record.split = "val" if its_fold == fold else "train"
    return records


# --- read ---

# Part of the cache's name: raise it when read_image gives other pixels, or build_cache writes other notes.
READER_VERSION = 3
MAX_PIXELS = 100_000_000  # the largest image of the public set has 7.4 million

# Pillow's own bomb warning and its remarks on odd metadata: read_image decides by itself what is an error.
warnings.filterwarnings("ignore", module="PIL|pydicom")


FORMATS = {  # no others are opened: for PostScript, whatever the file is called, Pillow would start another program
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo",
    "PNG": ".png",
    "TIFF": ".tif .tiff",
    "BMP": ".bmp",
    "GIF": ".gif",
    "WEBP": ".webp",
    "JPEG2000": ".jp2 .j2k",
    "PPM": ".pbm .pgm .ppm .pnm",
}
FULL_SCALES = {2**bits - 1 for bits in range(8, 16)}
IMAGE_SUFFIXES = [".dcm", *" ".join(FORMATS.values()).split()]


@dataclass(slots=True)
class ImageInfo:
    """What a file tells beside its grey levels."""

    width: int  # as stored, before EXIF rotation
    height: int
    mode: str  # Pillow's, or the DICOM photometric interpretation
    depth: int = 8  # bits from black to white; 1 for floats in [0, 1]
    colour: float = 0.0  # mean distance between the largest and the smallest of red, green and blue: 0 to 255

    def __post_init__(self) -> None:  # so that nothing too large is decoded
        if not self.width * self.height:
            raise ImageError("it has no pixels")
        if self.width * self.height > MAX_PIXELS:
            raise ImageError(f"{self.width} x {self.height} pixels are more than the {MAX_PIXELS:,} allowed")


def read_image(source, size: int | None) -> tuple[ndarray, ImageInfo]:
    """Any image as grey levels: the one function that opens images, for training, evaluation and prediction.

    Args:
        source: path, open seekable binary file, Pillow image, or uint8 array [height, width] or [height, width, 3].
            Of several frames the first one counts.
        size: side of the square that the whole image is resized to, antialiased; None keeps its own resolution.

    Returns:
        uint8 array [size, size] (or [height, width]), and what else the file tells.

    Samples of 8 bits keep their levels. Deeper ones are scaled linearly: of DICOM files the first window or else the
    full range of the stored bits, of others, and of DICOM files without a window that state 16 bits (as many do
    whatever the depth), from black to white as the file states them or find_range guesses. Transparent pixels are
    black, EXIF rotation is applied.

    Raises:
        ImageError: missing, empty, damaged, no image, too large, not finite, or a DICOM file without pydicom.
    """
    try:
        if not isinstance(source, str | os.PathLike):
            return _read(source, size)
        if os.path.getsize(source) == 0:
            raise ImageError("the file is empty" if os.path.isfile(source) else "not a regular file")
        with open(source, "rb") as file:
            return _read(file, size)
    except ImageError:
        raise
    except Exception as e:  # noqa: BLE001, decoders raise whatever a damaged file makes them stumble over
        known = {
            FileNotFoundError: "no such file",
            IsADirectoryError: "a folder without images",
            Image.UnidentifiedImageError: "not an image of a known format",
        }
        raise ImageError(known.get(type(e), f"cannot be decoded: {one_line(str(e) or type(e).__name__)}")) from None


def _read(source, size):
    image, info = _open(source)
    if size and image is not source:  # the JPEG decoder halves the image while that leaves twice what the resize needs
        image.draft(None, (2 * size, 2 * size))
    image.load()
    deep = image.mode[0] in "IF"
    if deep:
        black, white = find_range(image)  # now, since a turned copy lacks the file's tags
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if deep:
        image = _scale(_bands(image), image.size[::-1], black, white)
        info.depth = int(abs(white - black)).bit_length()
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if image.mode not in ("L", "1"):
        image = image if image.mode == "RGB" else image.convert("RGB")  # of what is RGB it would make a copy
        thumbnail = np.asarray(image.resize((64, 64), Image.BOX))
        info.colour = float(np.ptp(thumbnail, axis=2).mean())
    if image.mode != "L":
        image = image.convert("L")
    if size:
        image = image.resize((size, size), Image.BICUBIC)
    return np.array(image), info


def _open(source):
    """A Pillow image, not yet decoded, and its ImageInfo."""
    if isinstance(source, ndarray):
        source = Image.fromarray(source)
    if not isinstance(source, Image.Image):
        source.seek(128)
        if source.read(4) == b"DICM":
            return _open_dicom(source)
        source = Image.open(source, formats=list(FORMATS))
        if source.mode[0] not in "IF" and ";16" in str(source.tile):
            raise ImageError("16 bits a channel can't be read in colour or with transparency; save it as grey")
    return source, ImageInfo(*source.size, source.mode)


def _bands(image: Image.Image):
    """Yield the rows of an image as arrays of about a million pixels: the whole as one would take gigabytes."""
    rows = 1 + 2**20 // image.width
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _scale(bands, shape: tuple[int, int], black: float, white: float) -> Image.Image:
    """8-bit image from bands of any samples; black may lie above white."""
    levels, top = np.empty(shape, np.uint8), 0
    for band in bands:
        scaled = (band - black) * (255 / (white - black))
        if not np.isfinite(scaled).all():
            raise ImageError("holds values that are not finite")
        levels[top : top + len(band)] = scaled.clip(0, 255).round()
        top += len(band)
    return Image.fromarray(levels)


def find_range(image: Image.Image) -> tuple[float, float]:
    """Black and white of samples of 16 or 32 bits, or of floats: as the file states them, else guessed from the values.

    White is guessed as the smallest 2^d - 1, from 8 bits on, that all but a thousandth of the pixels (at least one)
    keep to, on a grid of up to 1024 x 1024. So a few odd pixels change nothing, and every depth is found of a picture
    that has more than a thousandth of its pixels in the upper half of its range (as all of 1,665 public radiographs
    had). A darker picture can't be told from a brighter one of fewer bits: it comes out brighter, by a power of two.
    Black is 0, or the power of two below it that the negative samples keep to likewise. Floats may end at 1, 3, 7 ...
    """
    grid = image.resize((min(image.width, 1024), min(image.height, 1024)), Image.NEAREST)
    samples = np.sort(grid, axis=None).astype(float)
    odd = max(1, len(samples) // 1000)
    lowest, highest = samples[odd], samples[-1 - odd]
    black = -(2.0 ** np.ceil(np.log2(-lowest))) if lowest < 0 else 0.0
    white = 2.0 ** np.ceil(np.log2(max(highest, 1) + 1)) - 1
    white = max(white, -black - 1)  # of signed samples either end tells the depth
    tags = getattr(image, "tag_v2", {})
    (largest,) = tags.get(281, (0,))  # MaxSampleValue
    if image.mode != "F":
        white = max(white, black + 255)
        if image.format in ("PPM", "JPEG2000"):  # Pillow has scaled these to 16 bits
            white = 65535.0
        elif tags.get(258) == (12,):  # BitsPerSample
            white = 4095.0
        elif largest in FULL_SCALES:  # another number is no depth but the brightest pixel's
            white = float(largest)
    if tags.get(262) == 0:  # white is zero, which Pillow sees to for 8 bits only
        return white, black
    return black, white


def _open_dicom(file):
    """The first frame of a DICOM file, 8 bits grey or RGB, as PS3.3 C.7.6.3 and C.11.2 say; no lookup tables."""
    try:
        from pydicom import dcmread
        from pydicom.pixels import pixel_array
    except ImportError:
        raise ImageError("a DICOM file needs pydicom: pip install pydicom") from None
    file.seek(0)
    dataset = dcmread(file)
    if "PixelData" not in dataset:  # a report, a plan or an index
        raise ImageError("a DICOM file without an image")
    bits = dataset.BitsStored
    info = ImageInfo(dataset.Columns, dataset.Rows, dataset.PhotometricInterpretation, bits)
    values = pixel_array(dataset, index=0)
    del dataset.PixelData  # as large again
    if values.ndim == 3:
        return Image.fromarray(values), info  # pydicom makes RGB of YBR
    if info.mode not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"DICOM pixels of kind {info.mode}")
    slope = dataset.get("RescaleSlope") or 1
    intercept = dataset.get("RescaleIntercept") or 0
    lowest = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
    highest = lowest + 2**bits - 1
    if dataset.get("HighBit", bits - 1) != bits - 1:
        raise ValueError("DICOM samples that are shifted: their high bit is not the last of those stored")
    center = np.ravel(dataset.get("WindowCenter") or 0)[0]  # of several windows the first
    width = np.ravel(dataset.get("WindowWidth") or 0)[0]
    if width <= 1 and bits == 16:  # many writers say 16 whatever the depth
        lowest, highest = find_range(Image.fromarray(values))
        info.depth = int(highest - lowest).bit_length()
    black, white = sorted((slope * lowest + intercept, slope * highest + intercept))
    if width > 1:
        black, white = center - width / 2, center + width / 2 - 1
    if info.mode == "MONOCHROME1":
        black, white = white, black
    bands = np.array_split(values, 1 + values.size // 2**20)
    return _scale(bands, values.shape, (black - intercept) / slope, (white - intercept) / slope), info


def dicom_patient(path: Path) -> str | None:
    """What stands for the PatientID of a DICOM file, since no part of a header is written anywhere.

    None where the header tells none, can't be read, or the file is of another kind.
    """
    patient = ""
    with contextlib.suppress(Exception):
        if is_dicom(path):
            from pydicom import dcmread

            header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
            patient = str(header.get("PatientID") or "").strip()
    return hashlib.sha256(patient.encode()).hexdigest()[:16] if patient else None


# --- cache ---


@dataclass
class Images:
    """Decoded images, in the order of their records."""

    pixels: Tensor  # uint8 [n, size, size]; zeros where the file can't be read
    digests: Tensor  # int64 [n], equal where the pixels are
    failed: dict[int, str]  # position and reason of each file that can't be read


def digest(pixels: ndarray) -> int:
    """64-bit BLAKE2b of an image's pixels, signed."""
    return int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), signed=True)


def decode(source, size: int | None) -> tuple[ndarray, ImageInfo | None, str]:
    """read_image's pixels and info, and the reason where it fails."""
    try:
        pixels, info = read_image(source, size)
    except ImageError as e:
        return np.zeros((size or 1, size or 1), np.uint8), None, str(e)
    return pixels, info, ""


def cache_paths(root: Path, records: list[Record], size: int) -> list[Path]:
    """Where the decoded images may lie: beside the data, or in the user's cache folder."""
    key = hash_lines(f"{r.path} {r.bytes} {r.mtime_ns}" for r in records)
    kind = "test" if records[0].split == "test" else "train"
    name = f"{kind}-{size}-v{READER_VERSION}-{key[:16]}.bin"
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = hash_lines([str(root.resolve())])[:16]
    return [root / ".cache" / name, user_cache / "pneumonia" / folder / name]


def build_cache(path: Path, root: Path, records: list[Record], size: int) -> None:
    """Write the pixels of all records and, as JSON, digest, depth and reason of failure of each.

    Other caches of the same split and size go, and so does what a build that was killed left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = []
    with replacing(path) as f:
        for pixels, info, reason in parallel(lambda r: decode(root / r.path, size), records, "decoding"):
            notes.append([digest(pixels), info and info.depth, reason])
            f.write(pixels)
        f.write(json.dumps(notes).encode())
    split_and_size, _, _ = path.name.rsplit("-", 2)
    for old in path.parent.glob(f"*{split_and_size}-*"):
        with contextlib.suppress(OSError):  # another process was faster, or uses it
            if old != path and (old.suffix == ".bin" or time.time() - old.stat().st_mtime > 86400):
                old.unlink()


def open_cache(path: Path, root: Path, records: list[Record], size: int) -> Images:
    """What build_cache wrote, checked; images of several depths are said.

    Raises:
        ValueError, TypeError: the bytes are not those that were written, or a file that could not be read then can be.
        OSError: no such cache.
    """
    stored = np.memmap(path, mode="c")  # copy-on-write, since torch wants to be able to write
    pixels, notes = np.split(stored, [len(records) * size**2])
    digests, depths, reasons = zip(*json.loads(notes.tobytes()))
    pixels = pixels.reshape(-1, size, size)
    if tuple(parallel(digest, pixels, "checking")) != digests:
        raise ValueError("damaged")
    failed = {i: reason for i, reason in enumerate(reasons) if reason}
    for i in failed:
        if not decode(root / records[i].path, size)[2]:
            raise ValueError("readable now")
    counts = Counter(filter(None, depths))
    if len(counts) > 1:
        mixed = " and ".join(f"of {depth} bits ({counts[depth]})" for depth in sorted(counts))
        warn(f"images {mixed} are mixed, each scaled from its own black to white: python data.py check shows where")
    return Images(torch.from_numpy(pixels), torch.tensor(digests), failed)


def load_images(root: Path, records: list[Record], size: int) -> Images:
    """The records' images, decoded once and kept in one memory-mapped cache file: beside the data, or where that can't
    be written in the user's cache folder.

    Args:
        records: from scan or find_training; the file is rebuilt when a path, size or time of one of them changes.
        size: side of the square images.

    Raises:
        UserError: neither place can be written.
    """
    paths = cache_paths(root, records, size)
    for path in paths:
        try:
            return open_cache(path, root, records, size)
        except (ValueError, TypeError, RecursionError) as e:
            warn(f"the image cache {path} is outdated or damaged ({e}): decoding again")
        except OSError:
            pass  # not there, or just replaced
    for path in paths:
        try:
            build_cache(path, root, records, size)
            return open_cache(path, root, records, size)
        except OSError as e:
            reason = f"no image cache in {path.parent} ({e.strerror or e})"
            if path == paths[0]:
                warn(f"{reason}; trying the user's cache folder")
    raise UserError(f"{reason}; set XDG_CACHE_HOME to a folder that can be written")


def hash_lines(lines) -> str:
    """SHA-256 of lines of text, none of which is kept."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode(errors="surrogateescape") + b"\n")
    return total.hexdigest()


def fingerprint(records: list[Record], digests: Tensor) -> str:
    """SHA-256 over paths, labels, splits and pixels, as decoded at one size: the same for every copy of the data."""
    return hash_lines(f"{r.path} {r.label} {r.split} {d}" for r, d in zip(records, digests.tolist()))


def find_copies(records: list[Record], digests: list, attribute: str) -> list[list[str]]:
    """Groups of paths whose pixels are the same, by their digests, and whose records differ in the attribute."""
    paths, found = defaultdict(list), defaultdict(set)
    for record, digest_of_pixels in zip(records, digests):
        paths[digest_of_pixels].append(record.path)
        found[digest_of_pixels].add(getattr(record, attribute))
    return [paths[d] for d in paths if len(found[d]) > 1]


def warn_contradictions(records: list[Record], digests: Tensor) -> None:
    """Say loudly where the same pixels appear under several labels."""
    several = len(find_copies(records, digests.tolist(), "label"))
    if several:
        warn(f"{several} images appear under several labels: python data.py check --json lists them")


def report_left_out(records: list[Record], failed: dict[int, str]) -> list[dict]:
    """Name and count the files that can't be read; the same as a list of {path, reason}."""
    left_out = [{"path": records[i].path, "reason": reason} for i, reason in failed.items()]
    for item in left_out[:10]:
        warn(f"left out: {item['path']}: {item['reason']}")
    if len(left_out) > 10:
        warn(f"left out: {len(left_out) - 10} more files that can't be read")
    return left_out


# --- augment ---
#
# An operation is a function (x, u, strength): x float32 [batch, 1, side, side] in [0, 1] on any device, which it may
# overwrite; u float32 [batch, NUMBERS] in [0, 1), the operation's own random numbers of each image; it returns the
# changed images. To add one, write the function and give it an entry in a preset.

NUMBERS = 4  # random numbers that an operation has for each image


def to_float(images: Tensor) -> Tensor:
    """float32 [n, 1, side, side] in [0, 1] from uint8 [n, side, side]."""
    return images.unsqueeze(1).float().div_(255)


def to_uint8(x: Tensor) -> Tensor:
    """uint8 [n, side, side] from float32 [n, 1, side, side] in [0, 1]."""
    return x[:, 0].mul(255).round_().clamp_(0, 255).byte()


def column(values: Tensor) -> Tensor:
    """[batch] as [batch, 1, 1, 1], to go with images."""
    return values.view(-1, 1, 1, 1)


def signed(u: Tensor) -> Tensor:
    """[0, 1) as [-1, 1)."""
    return 2 * u - 1


@dataclass(frozen=True)
class Crop:
    """Strength of random_resized_crop."""

    size: int  # side of the result in pixels
    scale: float  # smallest part of the area that is kept


def random_resized_crop(x: Tensor, u: Tensor, crop: Crop) -> Tensor:
    """A window of random area, aspect (3:4 to 4:3) and place, resampled bilinearly (Szegedy et al. 2015)."""
    area = 1 - u[:, 0] * (1 - crop.scale)
    distortion = torch.exp(signed(u[:, 1]) * math.log(4 / 3) / 2)
    side = area.sqrt()
    sides = torch.stack([side * distortion, side / distortion]).clamp(max=1)  # width and height
    middles = signed(u[:, 2:4].T) * (1 - sides)
    centres = (torch.arange(crop.size, device=x.device) * 2 + 1) / crop.size - 1
    columns, rows = sides[:, :, None] * centres + middles[:, :, None]
    # By broadcasting: F.affine_grid's batched product takes longer than the resampling itself.
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), 3)
    return F.grid_sample(x, grid, align_corners=False)


def flip(x: Tensor, u: Tensor, probability: float) -> Tensor:
    """Left and right exchanged."""
    chosen = u[:, 0] < probability
    x[chosen] = x[chosen].flip(3)
    return x


def brightness(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Grey levels times a factor in [1 - strength, 1 + strength]."""
    return x.mul_(column(1 + signed(u[:, 0]) * strength)).clamp_(max=1)


def contrast(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Distances from the image's mean times a factor in [1 - strength, 1 + strength]."""
    factor = column(1 + signed(u[:, 0]) * strength)
    mean = x.mean((1, 2, 3), keepdim=True)
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def gamma(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Grey levels to a power in [exp(-strength), exp(strength)]."""
    return x.pow_(column(torch.exp(signed(u[:, 0]) * strength)))


def exchange_border(x: Tensor, u: Tensor, probability: float) -> Tensor:
    """A ring of 4 to 18 % of the sides comes from the image before in the batch.

    The border shows the device and the technique, not the lungs; exchanged, it tells nothing of the label (a cut-and-
    paste augmentation as CutMix, Yun et al. 2019, whose label stays that of the lungs).
    """
    width = (u[:, 0] < probability) * (0.04 + 0.14 * u[:, 1])
    place = torch.linspace(0, 1, x.shape[-1], device=x.device)
    to_edge = torch.minimum(place, 1 - place)
    depth = torch.minimum(to_edge[:, None], to_edge)
    return torch.where(depth < column(width), x.roll(1, 0), x)


@functools.cache
def standard_normals(count: int, device: torch.device) -> Tensor:
    """float32 [count], always the same: drawing them anew in each step takes longer than all else in noise."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)


def noise(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Gaussian noise on half of the images, its standard deviation uniform up to strength (1 is the whole range)."""
    pixels = x[0].numel()
    normals = standard_normals(2**20 + pixels, x.device)
    start = (u[:, 1] * 2**20).long()
    windows = normals.unfold(0, pixels, 1)[start]  # unfold is a view: only these windows are copied
    deviation = strength * signed(u[:, 0]).clamp(min=0)  # 0 for half of the images
    return torch.addcmul(x, windows.view_as(x), column(deviation)).clamp_(0, 1)


def preset(name: str, size: int) -> list[tuple]:
    """The operations of an --augment preset with their strengths, in order; crops come out at size pixels."""
    medium = [
        (random_resized_crop, Crop(size, 0.08)),
        (flip, 0.5),
        (brightness, 0.3),
        (contrast, 0.3),
        (gamma, 0.4),
    ]
    robust = [(exchange_border, 0.7), *medium, (noise, 0.05)]
    return {"none": [], "medium": medium, "robust": robust}[name]


PRESETS = ("none", "medium", "robust")


def draw(operations: list[tuple], count: int, seed: int, epoch: int) -> list[Tensor]:
    """One epoch's random numbers of each operation: float32 [count, NUMBERS] in [0, 1), row i for image i, on the CPU.

    They are a function of (seed, epoch, the operation's name, i), so neither a batch size, a rank or a thread nor
    another operation changes what an operation draws for an image.
    """
    names = [operation.__name__ for operation, _ in operations]
    return [torch.rand(count, NUMBERS, generator=generator_from(seed, epoch, name)) for name in names]


def shuffle(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of range(count), a function of (seed, epoch)."""
    return torch.randperm(count, generator=generator_from(seed, epoch, "order"))


def augment(images: Tensor, operations: list[tuple], numbers: list[Tensor]) -> Tensor:
    """Apply a preset.

    Args:
        images: uint8 [batch, side, side], on any device.
        operations: from preset; numbers: for each of them float32 [batch, NUMBERS], the rows of draw for these images.

    Returns:
        float32 [batch, 1, size, size] in [0, 1].
    """
    x = to_float(images)
    for (operation, strength), u in zip(operations, numbers):
        x = operation(x, u, strength)
    return x


def normalise(x: Tensor, mean: float, std: float) -> Tensor:
    """What the model sees: float32 [batch, 1, side, side] from augment's or to_float's output, which is overwritten."""
    return x.sub_(mean).div_(std)


def hide_margin(images: Tensor, margin: float) -> Tensor:
    """uint8 [batch, side, side] whose outer part, margin of each side, is filled with the image's mean.

    What stands there tells of the device and the technique rather than of the lungs.
    """
    width = round(images.shape[-1] * margin)
    inside = slice(width, images.shape[-1] - width)
    mean = images.mean((1, 2), keepdim=True, dtype=torch.float32)
    hidden = mean.round().byte().expand_as(images).clone()  # torch.where would take three times as long
    hidden[:, inside, inside] = images[:, inside, inside]
    return hidden


def to_input(images: Tensor, pre: dict) -> Tensor:
    """What a model sees of whole images: float32 [batch, 1, side, side] from uint8 [batch, side, side].

    pre: mean, std and margin, as a checkpoint has them.
    """
    return normalise(to_float(hide_margin(images, pre["margin"])), pre["mean"], pre["std"])


# --- stress and shortcuts ---


def draw_partners(records: list[Record]) -> Tensor | None:
    """For each record the position of one with another label, drawn from its path: int64 [n]; None with one label."""
    labels = np.array([r.label for r in records])
    others = {label: np.flatnonzero(labels != label) for label in np.unique(labels)}
    if len(others) < 2:
        return None
    partners = []
    for r in records:
        choice = others[r.label]
        partners.append(choice[seed_from(r.path) % len(choice)])
    return torch.tensor(partners)


def border_ring(size: int, width: int) -> Tensor:
    """bool [size, size]: true on the outer width pixels."""
    ring = torch.ones(size, size, dtype=torch.bool)
    ring[width : size - width, width : size - width] = False
    return ring


def border_features(images: Tensor) -> Tensor:
    """What an image shows without any lung, float32 [n, 348] in [0, 1]: the outer 3 pixels of a 32 x 32 thumbnail."""
    thumbnails = F.adaptive_avg_pool2d(to_float(images.cpu()), 32)[:, 0]
    return thumbnails[:, border_ring(32, 3)]


def stress(images: Tensor, partners: Tensor | None, paths: list[str]):
    """Yield (name, copy) of uint8 images [batch, side, side] under changes that leave the diagnosis as it is.

    Exposure (brightness and contrast x 0.65 and x 1.4, gamma 0.7 and 1.4), JPEG at quality 30, a Gaussian blur of
    1 pixel at 224 (in proportion elsewhere), the central 85 % of each side, resized back, Gaussian noise with a
    standard deviation of 2 and 5 % of the range, and the outer 10 % of each side exchanged with those of another image.

    Args:
        partners: uint8 like images, each of another class; None leaves out the exchange.
        paths: of the images; the noise is a function of them.
    """
    from torchvision.transforms.v2 import functional as TF  # takes as long to import as a small folder to classify

    size = images.shape[-1]
    x = to_float(images)

    for factor in (0.65, 1.4):
        yield f"brightness x {factor}", to_uint8(TF.adjust_brightness(x, factor))
        yield f"contrast x {factor}", to_uint8(TF.adjust_contrast(x, factor))
    for exponent in (0.7, 1.4):
        yield f"gamma {exponent}", to_uint8(TF.adjust_gamma(x, exponent))
    yield "JPEG quality 30", torch.from_numpy(np.stack([recompress(i) for i in images.numpy()]))
    kernel = 2 * max(4, math.ceil(size / 56)) + 1  # to four standard deviations
    yield "blur", to_uint8(TF.gaussian_blur(x, kernel, size / 224))
    edge = round(size * 0.075)
    inner = size - 2 * edge
    yield "crop of 85 %", to_uint8(TF.resized_crop(x, edge, edge, inner, inner, [size, size]))
    for sd in (0.02, 0.05):
        normals = [torch.randn(1, size, size, generator=generator_from(path)) for path in paths]
        yield f"noise {sd}", to_uint8(x + sd * torch.stack(normals))
    if partners is not None:
        yield "border exchanged", torch.where(border_ring(size, round(size * 0.1)), partners, images)


def recompress(pixels: ndarray) -> ndarray:
    """A grey image [height, width] as JPEG at quality 30 (Pillow's: torchvision's JPEG operation is deprecated)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=30)
    return np.asarray(Image.open(buffer))


# --- the demo set ---

PHANTOM_SIDE = 112  # pixels; drawn at this size, then resized
KINDS = (  # class, subtype, and file names as in the best-known and in the newer copies of the public set
    ("NORMAL", "", "IM-{:04d}-{:04d}.jpeg", "NORMAL-{}-{:04d}.jpeg"),
    ("PNEUMONIA", "bacterial", "person{}_bacteria_{}.jpeg", "BACTERIA-{}-{:04d}.jpeg"),
    ("PNEUMONIA", "viral", "person{}_virus_{}.jpeg", "VIRUS-{}-{:04d}.jpeg"),
)


def draw_demo(folder: Path, images: int = 1000, seed: int = 0) -> None:
    """Write a synthetic set: crude chest phantoms of patients with two images each, in varied sizes.

    One patient in five is for test; two in three have a pneumonia: focal consolidation (bacterial) or diffuse streaks
    (viral). All but the pattern in the lungs is drawn without regard to the class. Every pixel is a function of the
    seed. demo.json marks the set and says where the opacities are: for each path ellipses [x, y, rx, ry] in parts of
    the image's width and height.

    Raises:
        UserError: folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; choose another folder or remove it")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary, folder.name)
        opacities = {}
        for i in range(images):
            patient, visit = 1 + i // 2, 1 + i % 2
            label, subtype, usual, newer = KINDS[patient % 3]
            name = (usual if patient % 4 else newer).format(patient, visit)
            path = f"{'train' if patient % 5 else 'test'}/{label}/{name}"
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            anatomy = np.random.default_rng([seed, patient, 0])
            today = np.random.default_rng([seed, patient, visit])
            phantom, opacities[path] = _draw_phantom(anatomy, today, subtype)
            phantom.save(new / path, quality=int(today.integers(20, 96)))
        write_json(new / DEMO_MARK, {"images": images, "seed": seed, "opacities": opacities})
        try:
            os.rename(new, folder)
        except OSError:
            if not is_demo(folder):  # else another process was first
                raise


def _draw_phantom(anatomy, today, subtype: str):
    """One phantom, drawn with two random generators, as a grey Pillow image, and its opacities as in demo.json."""
    x = np.linspace(0, 1, PHANTOM_SIDE)
    y = x[:, None]
    middle = anatomy.uniform(0.46, 0.54)
    side = np.abs(x - middle)
    trunk = side < anatomy.uniform(0.37, 0.45)
    ribs = np.cos(55 * (y - 0.3 * side)).clip(0) ** 6
    heart = _ellipse(x, y, middle + 0.07, 0.65, 0.15, 0.16)
    lungs = _ellipse(side, y, 0.2, 0.5, 0.16, 0.35) * (1 - heart)

    pattern = np.exp(-side / 0.15) + 0.2 * _smooth(anatomy, 8)  # denser towards the middle
    sides = {"": [], "bacterial": [today.choice([-0.2, 0.2])], "viral": [-0.2, 0.2]}[subtype]
    ellipses = [(middle + s, today.uniform(0.4, 0.55), 0.14, today.uniform(0.16, 0.25)) for s in sides]
    patches = 0.5 + 0.9 * _smooth(today, 26)
    lines = 0.9 - 3 * np.abs(_smooth(today, 20))
    for ellipse in ellipses:
        pattern += 0.6 * _ellipse(x, y, *ellipse) * (patches if subtype == "bacterial" else lines)
    # An opacity moves the grey levels of the lungs about but adds none, so that no histogram tells the class.
    levels = ImageOps.equalize(_to_image(50 * pattern + 100), _to_image(255 * lungs))
    air = 0.5 - 0.5 * (np.asarray(levels) / 255) ** today.uniform(1, 3)

    image = trunk * (0.7 + 0.1 * ribs + 0.1 * heart - lungs * air)
    image += today.uniform(0, 0.04) * today.standard_normal(image.shape)
    image = image * today.uniform(120, 200) + today.uniform(0, 60)  # exposure
    width = today.integers(180, 450)
    height = int(width * today.uniform(0.75, 1))
    return _to_image(image).resize((width, height), Image.BICUBIC), ellipses


def _to_image(levels):
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _ellipse(x, y, cx, cy, rx, ry):
    """1 inside, 0 outside, over a soft edge."""
    distance = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2
    return (3 - 2.5 * distance).clip(0, 1)


def _smooth(rng, bumps):
    """Noise in [-1, 1] with so many bumps a side: float32 [PHANTOM_SIDE, PHANTOM_SIDE]."""
    grid = Image.fromarray(rng.uniform(-1, 1, (bumps, bumps)).astype(np.float32))
    return np.asarray(grid.resize((PHANTOM_SIDE, PHANTOM_SIDE), Image.BICUBIC))


# --- check ---

COPIES = {"across splits": "split", "across classes": "label", "of other or unknown patients": "patient"}


@dataclass(slots=True)
class Inspected:
    """What check() keeps of an image."""

    record: Record
    info: ImageInfo
    file: dict[str, float]  # measures that no grey level has a part in
    levels: dict[str, float]  # mean and standard deviation of the grey levels
    pixel_key: tuple  # shape and digest
    border: ndarray  # uint8 [348], see border_features


def check(root: Path) -> dict:
    """The health of a data folder: counts, shapes, what would invalidate a result, and what tells the classes too.

    Returns:
        dict: root; demo; folders: for each SPLIT/CLASS what _summarise tells of it; unreadable: paths and reasons;
        duplicates: for each kind groups of paths with the same pixels; shared_patients: of "train and test" and so on;
        audit: see _audit; problems: one line for each thing that makes a result invalid; warnings: one line for each
        thing that a model could take for the disease.

    Raises:
        UserError: the folder has no images.
    """
    records = scan_all(root)
    if not records:
        raise UserError(f"{root} has none of the folders train/, val/, test/")
    folders, unreadable, problems, remarks = defaultdict(list), [], [], []
    results = parallel(functools.partial(_inspect, root), records, "checking")
    for record, (inspected, reason) in zip(records, results):
        readable = folders[f"{record.split}/{record.label}"]  # there even where it stays empty
        if inspected:
            readable.append(inspected)
        else:
            unreadable.append({"path": record.path, "reason": reason})
    images = list(itertools.chain(*folders.values()))
    read, keys = [i.record for i in images], [i.pixel_key for i in images]
    duplicates = {kind: find_copies(read, keys, attribute) for kind, attribute in COPIES.items()}
    shared = shared_patients(records)
    audited = [i for i in images if i.record.split != "test"]
    audit = _audit(audited[:: 1 + len(audited) // 20_000])  # more would tell no more, but take time and memory

    for sides, patients in shared.items():
        problems.append(f"{len(patients)} patients are in both {sides}, such as {patients[0]}")
    labels = {r.label for r in records}
    for split in dict.fromkeys(r.split for r in records):
        missing = labels - {r.label for r in records if r.split == split}
        if missing:
            problems.append(f"{split}/ has no image of {', '.join(sorted(missing))}")
    for kind, groups in duplicates.items():
        if groups:
            problems.append(f"{len(groups)} images have copies {kind}, such as {', '.join(groups[0])}")
    for folder, inspected in folders.items():
        depths = sorted({i.info.depth for i in inspected})
        if not depths:
            problems.append(f"{folder} holds no readable image")
        if len(depths) > 1:
            remarks.append(f"{folder} mixes images of {' and '.join(map(str, depths))} bits")
    if unreadable:
        remarks.append(f"{len(unreadable)} files can't be read, such as {': '.join(unreadable[0].values())}")
    for row in audit:
        low, high = row["ci95"]
        if low > 0.6:
            remarks.append(
                f"{row['from']} tells {row['classes']} with AUROC {row['auroc']:.2f} [{low:.2f}, {high:.2f}]: "
                "a model can learn the device instead of the disease"
            )
    return {
        "root": str(root),
        "demo": is_demo(root),
        "folders": {folder: _summarise(inspected) for folder, inspected in folders.items() if inspected},
        "unreadable": unreadable,
        "duplicates": duplicates,
        "shared_patients": shared,
        "audit": audit,
        "problems": problems,
        "warnings": remarks,
    }


def _inspect(root: Path, record: Record) -> tuple[Inspected | None, str]:
    """The image of a record, or None and the reason why it can't be read."""
    pixels, info, reason = decode(root / record.path, None)
    if reason:
        return None, reason
    height, width = pixels.shape
    file = {
        "width": width,
        "height": height,
        "aspect": width / height,
        "bytes per pixel": record.bytes / pixels.size,
    }
    levels = {"brightness": float(pixels.mean()), "contrast": float(pixels.std())}
    thumbnail = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.BOX))
    border = thumbnail[border_ring(32, 3).numpy()]
    key = pixels.shape, digest(pixels)
    return Inspected(record, info, file, levels, key, border), ""


def _summarise(images: list[Inspected]) -> dict:
    """Counts, and [5th percentile, median, 95th] of the measures, of one folder."""
    records = [i.record for i in images]
    measures = [[*i.file.values(), *i.levels.values()] for i in images]
    percentiles = np.percentile(measures, (5, 50, 95), axis=0).T
    names = [*images[0].file, *images[0].levels]
    subtypes = sorted(r.subtype for r in records if r.subtype)
    modes = sorted(f"mode {i.info.mode}, {i.info.depth} bits" for i in images)
    return {
        "images": len(images),
        "patients": len({r.patient for r in records}),
        "unknown patients": sum(not r.known_patient for r in records),
        **dict(zip(names, percentiles.round(3).tolist())),
        **Counter(subtypes + modes),
    }


def _audit(images: list[Inspected]) -> list[dict]:
    """How well two classes are told without the lungs: gradient boosting on border and file, out of fold by patient.

    Returns:
        for each pair of classes with 10 or more patients each, and for border (outer 3 pixels of a 32 x 32 thumbnail)
        and file: dict of from, classes, auroc and ci95 (Hanley and McNeil 1982, of as many images as patients, since
        those of one patient are alike).
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    labels = np.array([i.record.label for i in images])
    patients = np.array([i.record.patient for i in images])
    modes = np.unique([i.info.mode for i in images], return_inverse=True)[1]
    file = [[*i.file.values(), i.info.depth] for i in images]
    sources = {
        "the border alone, without any lung,": np.array([i.border for i in images]),
        "the file alone (size, bytes per pixel, mode, depth)": np.column_stack([file, modes]),
    }
    count = {str(label): len(set(patients[labels == label])) for label in np.unique(labels)}
    enough = [label for label in count if count[label] >= 10]
    rows = []
    for a, b in itertools.combinations(enough, 2):
        pair = np.isin(labels, (a, b))
        is_b = labels[pair] == b
        for source, features in sources.items():
            scores = cross_val_predict(
                HistGradientBoostingClassifier(learning_rate=0.2, max_iter=30, max_leaf_nodes=15, random_state=0),
                features[pair],
                is_b,
                groups=patients[pair],
                cv=StratifiedGroupKFold(5),
                method="predict_proba",
            )
            auroc = float(roc_auc_score(is_b, scores[:, 1]))
            half = 1.96 * auroc_error(auroc, count[b], count[a])
            ci95 = [max(auroc - half, 0), min(auroc + half, 1)]
            rows.append({"from": source, "classes": f"{a} from {b}", "auroc": auroc, "ci95": ci95})
    return rows


def auroc_error(auroc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC from so many positive and negative images, or patients (Hanley and McNeil 1982)."""
    pair = auroc / (2 - auroc) - auroc**2
    triple = 2 * auroc**2 / (1 + auroc) - auroc**2
    variance = auroc * (1 - auroc) + (positives - 1) * pair + (negatives - 1) * triple
    return math.sqrt(max(variance, 0.0) / (positives * negatives))


def print_check(report: dict) -> None:
    """The report in 100 columns: a column for each folder, then what was found."""
    print(f"{report['root']}{' (DEMO: synthetic phantoms)' if report['demo'] else ''}")
    folders = report["folders"]
    width = max([19, *map(len, folders)])
    columns = max(1, 80 // (width + 1))
    for start in range(0, len(folders), columns):
        names = list(folders)[start : start + columns]
        print("\n" + " " * 19, *(f"{name:>{width}}" for name in names))
        for row in dict.fromkeys(itertools.chain(*(folders[name] for name in names))):
            print(f"{row:19}", *(f"{_cell(folders[name].get(row, 0)):>{width}}" for name in names))
    print("\nThree numbers: 5th percentile, median, 95th. Where they differ between classes, a model can")
    print("take it for the disease. An image of unknown patient counts as a patient. --json lists all findings.\n")
    for kind in ("problem", "warning"):
        for line in report[f"{kind}s"]:
            text = printable(f"{kind.upper()}: {line}")
            print(textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False))
    print("a result on this folder would not be valid" if report["problems"] else "no problem found")


def _cell(value: int | list[float]) -> str:
    """A count, or three percentiles."""
    if isinstance(value, int):
        return str(value)
    return " ".join(f"{x:.{0 if x >= 10 else 2}f}" for x in value)


# --- download ---

URL = "https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
URL += "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded"
SHA256 = "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36"


def download(folder: Path, url: str = URL, checksum: str = SHA256, hours: float = 6) -> Path:
    """Fetch, verify and unpack the public dataset into folder/chest_xray; nothing is done where it already is.

    Raises:
        UserError: no connection, no end after so many hours, another checksum, or a damaged archive.
    """
    target = folder / "chest_xray"
    if (target / "train").exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
        archive, unpacked = Path(temporary, "archive.zip"), Path(temporary, "unpacked")
        try:
            call_within(3600 * hours, _fetch, url, archive)  # a server can drip its answer, headers too
            if sha256(archive) != checksum:
                raise ValueError("the checksum is another one")
            shutil.unpack_archive(archive, unpacked)  # a known one, by its checksum
            os.replace(unpacked / "chest_xray", target)
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise UserError(
                f"the download failed, is damaged or took more than {hours:g} hours ({e!r}); try again, or by hand: "
                f"fetch {url} (or on Kaggle paultimothymooney/chest-xray-pneumonia) and unpack it, so that "
                f"{target}/train and {target}/test exist"
            ) from None
    return target


def _fetch(url: str, path: Path) -> None:
    """Write what url holds to path."""
    with (
        urllib.request.urlopen(url, timeout=60) as response,
        open(path, "wb") as f,
        tqdm.wrapattr(f, "write", desc="downloading", unit="B", unit_scale=True, leave=False, disable=None) as counted,
    ):
        shutil.copyfileobj(response, counted)


def make_parser() -> Parser:
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
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the command says; returns the exit code."""
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


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    run_script(parser, lambda: run(args))


if __name__ == "__main__":
    main()
