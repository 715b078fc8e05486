"""Find, group by patient, split, read, cache and augment images; as a script, three commands.

python data.py check data/chest_xray         # check a data folder; exit code 1 if results would be invalid
python data.py download                      # the public dataset (1.2 GB) into data/chest_xray
python data.py demo data/demo --images 1000  # the synthetic set that the scripts use if there is no data

Sections: command line and files (for all scripts), find, split, read, cache, change (operations on images, with
random parameters to augment and fixed ones for the stress test), copies and shortcuts, demo, check, download.
"""

import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import posixpath
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from warnings import filterwarnings

SCRIPTS = [Path(__file__).resolve().with_name(f"{name}.py") for name in ("data", "evaluate", "predict", "train")]
# Until run_script takes over, Ctrl-C ends a script at once: no traceback from the middle of importing a library.
if Path(sys.argv[0]).resolve() in SCRIPTS and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
CORES = joblib.cpu_count()  # available to this process, given its CPU affinity and container quota

# --- command line and files ---

FORMULA = re.compile("'*[=+@-]")  # the start of text that a spreadsheet would run as a formula
MISSING = re.compile(  # words for "not known", in tables and DICOM headers
    r"(?i)-*|\?|#?n/?a|n\.a\.|<na>|nan|nil|none|null|missing|undefined|unk(nown)?|unspecified"
    r"|not (available|applicable)|removed|redacted|anon(ym(ous|i[sz]ed)?)?( patient)?|de-?identified"
)
AGE_UNITS = {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}  # how many make a year


class UserError(Exception):
    """Something that the user can fix; the message is one line."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser with defaults in its help and one-line errors (exit code 2)."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        return re.sub(r"\s+\(default:\s+None\)", "", super().format_help())

    def error(self, message: str) -> None:
        _, _, unknown = message.partition("unrecognized arguments: --")
        near = difflib.get_close_matches(f"--{unknown.partition(' ')[0]}", self._option_string_actions, n=1)
        if unknown and near:
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def run_script(parser: Parser, work, advise=lambda: "written files are complete") -> None:
    """Run work() and exit with its code, or with one line and 2 for a user's mistake or an I/O error, 1 for a closed
    output pipe, 130 for Ctrl-C or SIGTERM.

    advise: returns a hint on how to continue, shown after an interruption, a closed pipe or a failed read or write.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, so that partial files are removed
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # else it is ignored, as in the background of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(min(torch.get_num_threads(), CORES))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # file names may have bytes that are not valid text
            stream.reconfigure(errors=errors)
    try:
        code = work()
        sys.stdout.flush()  # here a closed pipe can still be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1, f"the output pipe was closed; {advise()}\n")
    except UserError as e:
        parser.error(str(e))
    except OSError as e:
        parser.error(f"{e}; {advise()}")
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted; {advise()}\n")
    sys.exit(code)


def within(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite number in [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__  # argparse shows it if the text is not a number
    return parse


def non_empty(text: str) -> str:
    """An argparse type: text, but not "", the value of an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def printable(text: str) -> str:
    """Text with ? for every unprintable character: a file name or a checkpoint's field may contain any."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(message: str, names: list[str] | None = None) -> str:
    """A message for people, with the number of names and the first three: no line breaks or control characters, at
    most 300 characters.
    """
    if names:
        message = f"{message}: {len(names)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"


def warn(message: str, names: list[str] | None = None) -> None:
    """Print a line on stderr, in the first process of a distributed run only; nothing if the list of names is empty."""
    if names != [] and os.environ.get("RANK", "0") == "0":
        print(f"WARNING: {one_line(message, names)}", file=sys.stderr)


def count(n: int, noun: str) -> str:
    """A number with its noun: "no files", "1 file", "2 files"."""
    return f"{n or 'no'} {noun}{'s' * (n != 1)}"


def without(content: dict, *keys: str) -> dict:
    """A copy of a dict that lacks some of its keys."""
    return {key: value for key, value in content.items() if key not in keys}


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write, moved to path once it is complete: no reader ever sees a partial file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:  # the error of a full disk does not name the file
        size = temporary.stat().st_size if temporary.exists() else 0
        raise OSError(e.errno, f"{e.strerror or e}, {size:,} bytes written", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write the whole file; if that fails, an existing one is left unchanged."""
    with replacing(path) as f:
        f.write(text.encode(errors="surrogateescape"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def to_csv(rows: list[dict]) -> str:
    """Rows as CSV text with a header; all have the same keys in the same order.

    Text that a spreadsheet would take for a formula gets an apostrophe, which read_table removes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([f"'{c}" if isinstance(c, str) and FORMULA.match(c) else c for c in row.values()])
    return text.getvalue()


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table, as spreadsheets, programs and to_csv write them; empty rows are left out.

    Cells are separated by commas, semicolons or tabs, perhaps followed by spaces; UTF-8 with or without a byte order
    mark. Words for "missing" become "", except in file_name and path, where backslashes become slashes.

    Args:
        columns: lower-case names, matched in any case; other columns keep their names as written.

    Raises:
        UserError: not a table, no rows, a duplicate column, or a row with more cells than the header.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        header = [name.strip() for name in next(lines, [])]
        header = [name.lower() if name.lower() in columns else name for name in header]
        for name in header:
            if name and header.count(name) > 1:
                raise UserError(f"{path} has the column {name} twice")
        for number, cells in enumerate(lines, 2):
            if any(cells[len(header) :]):
                raise UserError(f"{path}: row {number} has more cells than the header; is there an unquoted comma?")
            row = dict.fromkeys(header, "")
            for name, cell in zip(header, cells):
                cell = cell.strip()
                if FORMULA.match(cell):
                    cell = cell.removeprefix("'")
                if name in ("file_name", "path"):
                    cell = cell.replace("\\", "/")
                elif MISSING.fullmatch(cell):
                    cell = ""
                row[name] = sys.intern(cell)  # a million rows share two labels
            row.pop("", None)  # a column without a name, like the row numbers of pandas
            if any(row.values()):
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} can't be read ({e}); save it as a UTF-8 CSV with balanced quotes") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def as_number(text: str) -> float | None:
    """Text as a number (decimal commas are allowed) or, for a DICOM age (058Y, 003M), in years; None for other text."""
    unit = AGE_UNITS.get(text[-1:].upper())
    try:
        number = float((text[:-1] if unit else text).replace(",", "."))
    except ValueError:
        return None
    return number / (unit or 1) if math.isfinite(number) else None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_lines(lines) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def parallel(work, items, name: str):
    """Yield work(item) of each item in order, on all cores, with a progress bar; at most 512 in memory."""
    with ThreadPoolExecutor(CORES) as pool, tqdm(total=len(items), desc=name, leave=False, disable=None) as bar:
        for start in range(0, len(items), 512):
            for result in pool.map(work, items[start : start + 512]):
                bar.update()
                yield result


# --- find ---

HIDDEN = re.compile(r"\.|@eaDir|__MACOSX|#recycle|\$RECYCLE")  # created by operating systems and other programs
# The extensions of the formats that are read; see FORMATS.
IMAGE_NAME = re.compile(r"(?i)\.(dcm|jpe|jpe?g|jfif|mpo|png|tiff?|bmp|gif|webp|jp2|j2k|p[bgnp]m)\Z")
MASK = re.compile(r"(?i)(?<![a-z])(masks?|labels?|annotations?|seg|segmentations?)(?![a-z])")  # in the names of masks
# A DICOM file begins with a preamble or, without one, with a low element of group 2 or 8.
DICOM_START = re.compile(rb"(?s).{128}DICM|\x02\0.\0[A-Z]{2}|\x08\0.\0(?:[A-Z]{2}|..\0\0)")
TABLE_COLUMNS = ("file_name", "patient", "subtype", "label", "split")  # of metadata.csv
IS_NEGATIVE = {"normal": True, "pneumonia": False}  # class folders that a table's labels are compared with


@dataclass
class Record:
    """One image file, and what is known about it before it is decoded."""

    path: str  # relative to the root, with forward slashes
    label: str  # class name
    split: str  # train, val or test
    patient: str  # the path itself where the patient is unknown
    subtype: str  # bacterial, viral, or whatever metadata.csv says
    series: str  # of file names, such as NORMAL2-IM
    groups: dict[str, str]  # further columns of metadata.csv, the same keys for all

    @property
    def known_patient(self) -> bool:
        return self.patient != self.path


def normal_form(patient: str) -> str:
    """A patient's id without what spreadsheets change (case, blanks around it, leading zeros, a trailing .0), or ""
    for a word for "not known".
    """
    form = re.sub(r"^0+(?=[^.])|\.0+$", "", patient.strip().lower())
    return "" if MISSING.fullmatch(form) else form


def is_dicom(path: str | Path) -> bool:
    """Whether the first bytes are those of a DICOM file, whatever its extension."""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        return DICOM_START.match(f.read(132)) is not None
    return False


def walk(folder: Path, passed_over: Counter, onerror):
    """Yield the images under folder (by extension, or the content of a DICOM file), sorted by folder; links are
    followed, each folder is visited once.

    passed_over counts the other files by extension; onerror is called with the OSError of each unreadable folder.
    """
    seen = set()
    for top, subfolders, files in os.walk(folder, onerror=onerror, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(itertools.filterfalse(HIDDEN.match, subfolders))
        for name in sorted(itertools.filterfalse(HIDDEN.match, files)):
            path = Path(top, name)
            is_image = IMAGE_NAME.search(name) or is_dicom(path)
            if is_image and not name.endswith("_cam.png"):  # a heat map of predict.py
                yield path
            else:
                passed_over[path.suffix.lower() or "no extension"] += 1


def find_root(data: str | None) -> Path:
    """The folder with train/ and test/. Without data: data/chest_xray if it exists, else the demo folder."""
    if data is None:
        return DEFAULT_ROOT if DEFAULT_ROOT.exists() else DEMO_ROOT
    root = Path(data)
    if not root.is_dir():
        problem = "is a file" if root.is_file() else "does not exist"
        raise UserError(f"{root} {problem}; give the folder with train/ and test/, or run python data.py download")
    return root


def is_demo(root: Path) -> bool:
    return (root / DEMO_MARK).exists()


def read_metadata(root: Path, say=warn) -> dict[str, dict]:
    """The rows of ROOT/metadata.csv by path relative to root; empty without a table.

    Each row gets its split, one of SPLITS or None, and loses the columns that look like identifiers. say(message,
    names) is called with each warning.

    Raises:
        UserError: see read_table; also a missing file_name, a file listed twice, or a labelled one without a split.
    """
    table, rows = root / "metadata.csv", {}
    if not os.path.lexists(table):
        return rows
    lines = read_table(table, TABLE_COLUMNS)
    columns = list(lines[0])
    if "file_name" not in columns:
        raise UserError(f"{table} has no column file_name; its columns are {', '.join(columns)}")
    identifiers = []
    for column in columns:
        if column in TABLE_COLUMNS:
            continue
        meant = re.sub(r"[ _-]?id$", "", column.lower())
        if meant in TABLE_COLUMNS:
            raise UserError(f"{table}: rename column {column} to {meant} if it is that, else to another name")
        values = [line[column] for line in lines if line[column]]
        is_code = any(as_number(value) is None or re.fullmatch(r"\d{5,}", value) for value in values)
        if is_code and len(values) >= 20 and len(set(values)) > len(values) / 2:
            identifiers.append(column)
    say(f"{table}: ignored identifier columns (most of their values differ)", identifiers)
    has_labels = "label" in columns
    if "split" in columns and not has_labels:
        say(f"{table} has a column split but no column label: the folders decide the split")
    for line in lines:
        path = posixpath.normpath(line.pop("file_name"))
        if path in rows:
            raise UserError(f"{table}: {path} is listed twice")
        asked = line.get("split") if has_labels else None
        line["split"] = SPLIT_NAMES.get((asked or path.split("/")[0]).lower())
        if has_labels and line["split"] is None:
            raise UserError(
                f"{table}: the split of {path} is {asked or 'missing'}; write train, val or test, the same for all "
                "images of a patient, for example test where zlib.crc32(patient.encode()) % 5 == 0, else train"
            )
        rows[path] = without(line, *identifiers)
    return rows


def scan(root: Path, split: str | None = None, say=warn) -> list[Record]:
    """The images of one split, or of all, sorted by split, class and path: those in ROOT/SPLIT/CLASS/ or, if
    metadata.csv has labels, those listed there, in any folder.

    No image is decoded. An image without a known patient is its own patient. The images of a small val/ count as train.
    In metadata.csv file_name may omit the extension. say(message, names) is called with each warning.

    Raises:
        UserError: a folder can't be read, or a class is missing in train.
    """
    splits = SPLITS if split is None else (split,)
    table = read_metadata(root, say)
    table_labels = {row["label"].lower() for row in table.values() if "label" in row}
    names = table_labels and table_labels | IS_NEGATIVE.keys()  # of folders, to be compared with the labels
    folders = [folder for folder in sorted(root.glob("*/")) if SPLIT_NAMES.get(folder.name.lower()) in splits]

    def refuse(error):
        raise UserError(f"folder {error.filename} can't be read ({error.strerror})")

    files, passed_over = [], Counter()
    for folder in [root] if table_labels else folders:
        files += sorted(walk(folder, passed_over, refuse))
    if passed_over and not table_labels:
        say(f"skipped other files: {', '.join(f'{n} {ending}' for ending, n in passed_over.most_common(6))}")

    records, listed, odd = [], set(), defaultdict(list)
    blank = {column: "" for row in table.values() for column in row}
    for file in files:
        path = file.relative_to(root).as_posix()
        name = path if path in table else posixpath.splitext(path)[0]
        if table and name not in table:
            odd["metadata.csv has no row for these images"].append(path)
        elif table and name in listed:
            odd["these images share their row of metadata.csv with another"].append(path)
        listed.add(name)
        row = blank | table.get(name, {})
        if not table_labels:
            first, second, *below = path.split("/")
            row |= {"split": SPLIT_NAMES[first.lower()], "label": second if below else ""}
        if row["split"] not in splits:
            continue
        if not row["label"]:
            odd["left out, no label or not in a class folder"].append(path)
        elif not table_labels and MASK.search("/".join(below)):
            odd["left out, named like masks or annotations"].append(path)
        else:
            records.append(make_record(path, row["split"], row, TABLE_COLUMNS, file))
            in_path = [part for part in path.lower().split("/") if part in names]
            label = row["label"].lower()
            is_negative = NEGATIVE.search(label) is not None
            if in_path and label not in in_path and IS_NEGATIVE.get(in_path[-1]) != is_negative:
                odd["metadata.csv and the folder disagree on the label; using metadata.csv"].append(path)
    missing = [path for path, row in table.items() if row["split"] in splits and path not in listed]
    say("metadata.csv has rows whose file is missing", missing)
    for message, paths in odd.items():
        say(message, paths)

    records.sort(key=lambda r: (SPLITS.index(r.split), r.label))
    n_val = sum(r.split == "val" for r in records)
    if 0 < n_val < 100:  # the best-known release has 16: too few to choose a model
        say(f"{root}/val has only {count(n_val, 'image')}: used for training; validation is split off by patient")
        records = [replace(r, split="train") if r.split == "val" else r for r in records]
    known = {r.label for r in records if r.split == records[0].split}  # of train, if it was scanned
    check_classes(records, sorted(known), root)
    remark_patients(records, say)
    return records


def make_record(path: str, split: str, row: dict[str, str], known, file: Path | None = None) -> Record:
    """A record from a labelled row of metadata.csv or of predictions; columns that are not in known become groups.

    The patient comes from the row, else from the header of a DICOM file (as a hash: the id itself is never stored),
    else from a name as in the public set (which also gives series and a missing subtype), else it is the path.
    """
    name = posixpath.basename(path)
    m = re.match(r"person(?P<number>\d{1,9})_(?P<series>bacteria|virus)_\d", name)
    m = m or re.match(r"(?P<series>IM|NORMAL2-IM|NORMAL|BACTERIA|VIRUS)-(?P<number>\d{1,9})-\d", name)
    patient, series = path, ""
    if m:
        series, number = m["series"], m["number"]
        is_newer = series in ("NORMAL", "BACTERIA", "VIRUS")  # those releases number all patients in one series
        patient = number if is_newer else f"{series}-{int(number)}"
    if file and is_dicom(file):
        with contextlib.suppress(Exception):  # no pydicom, or a damaged file: decoding reports the reason
            from pydicom import dcmread

            header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=["PatientID"])
            in_header = normal_form(str(header.PatientID))
            if in_header.strip("0"):  # zeros alone: de-identified
                patient = hash_lines([in_header])[:16]
    if normal_form(row.get("patient", "")):
        patient = row["patient"]
    return Record(
        path=path,
        label=row["label"],
        split=split,
        patient=patient,
        subtype=row.get("subtype") or {"bacteria": "bacterial", "virus": "viral"}.get(series.lower(), ""),
        series=series,
        groups=without(row, *known),
    )


def check_classes(records: list[Record], classes: list[str], root: Path) -> None:
    """Raise UserError if a record's class is not one of classes."""
    for r in records:
        if r.label not in classes:
            raise UserError(
                f"{root}/{r.split} has images of {r.label}, but the classes in training are {', '.join(classes)}"
            )


# --- split ---

NEGATIVE = re.compile(r"(?i)^0$|(?<![a-z])(normal|healthy|negative|no[ _-]?(findings?|pneumonia)|controls?)(?![a-z])")


def find_training(root: Path) -> list[Record]:
    """The records of train/ and val/; no image is decoded.

    Raises:
        UserError: fewer than two classes, or a patient in two splits.
    """
    records = scan(root)
    classes = sorted({r.label for r in records if r.split == "train"})
    if len(classes) < 2:
        raise UserError(
            f"{root}/train has images of {', '.join(classes) or 'no class'}; "
            "expected two or more class folders, such as NORMAL/ and PNEUMONIA/, or a metadata.csv with labels"
        )
    for sides, patients in shared_patients(records):
        raise UserError(
            f"{count(len(patients), 'patient')} in both {sides} of {root} ({', '.join(patients[:3])}): results would "
            f"be invalid; remove them from one split (python data.py check --json {root} lists them)"
        )
    return [r for r in records if r.split != "test"]


def shared_patients(records: list[Record]):
    """Yield the known patients in two splits: ("train and test", [patient, ...])."""
    spellings = {split: {} for split in SPLITS}  # for each split and normal form, one as given
    for r in records:
        if r.known_patient:
            spellings[r.split][normal_form(r.patient)] = r.patient
    for a, b in itertools.combinations(SPLITS, 2):
        shared = spellings[a].keys() & spellings[b].keys()
        if shared:
            yield f"{a} and {b}", sorted(spellings[a][patient] for patient in shared)


def remark_patients(records: list[Record], say=warn) -> None:
    """Call say(message, names) for each oddity in the patients; names: the patients or images concerned."""
    images, spellings = defaultdict(list), defaultdict(list)
    for r in records:
        images[r.patient].append(r)
    for patient in sorted({r.patient for r in records if r.known_patient}):
        spellings[normal_form(patient)].append(patient)
    unknown = [r.path for r in records if not r.known_patient]
    say(f"of {len(records)} images, these have no patient id, so each counts as a patient", unknown)
    large = [patient for patient, own in images.items() if len(own) > max(20, 0.05 * len(records))]
    say("patients with more than 5 % of all images (placeholders?)", large)
    several = [patient for patient, own in images.items() if len({r.label for r in own}) > 1]
    say("patients with images of several classes", several)
    alike = [" = ".join(names) for names in spellings.values() if len(names) > 1]
    say("patient ids that differ only in spelling; use one spelling", alike)


def sort_classes(labels, asked: str | None) -> list[str]:
    """The classes, the positive one last: the one asked for, else PNEUMONIA, else the last by name.

    Names that mean negative come first.
    """

    def rank(name):
        return name == asked, name.upper() == "PNEUMONIA", not NEGATIVE.search(name), name

    classes = sorted(set(labels), key=rank)
    if asked is not None and asked not in classes:
        raise UserError(f"the positive class {asked} is not one of the classes {', '.join(classes)}")
    positive = classes[-1]
    if len(classes) == 2 and not asked and positive.upper() != "PNEUMONIA":
        warn(f"guessing that {positive} is positive, not {classes[0]}; set it with --positive CLASS")
    return classes


def number_patients(records: list[Record], copy_index: ndarray) -> ndarray:
    """int64 [n], from 0 in order of appearance: images of one patient (in any spelling), and copies of each other,
    share a number.

    copy_index: from copy_groups.
    """
    first, links = {}, []
    for i, record in enumerate(records):
        patient = normal_form(record.patient) if record.known_patient else record.path
        for group in (patient, int(copy_index[i])):
            links.append((i, first.setdefault(group, i)))
    return _connected(len(records), np.array(links))


def is_validation(records: list[Record], patient_index: ndarray, folds: int, fold: int) -> ndarray:
    """bool [n]: the images of val/, or else of one of the folds; no seed changes them.

    Patients stay together. Within each stratum of class, subtype and name series, those with most images come first
    (ties in an order hashed from their ids), and each goes to the fold with the fewest images of the stratum so far.

    Args:
        patient_index: from number_patients.
        fold: 0 to folds - 1.
    """
    in_val = np.array([r.split == "val" for r in records])
    if in_val.any():
        return in_val
    images = defaultdict(list)  # of each patient
    for record, number in zip(records, patient_index.tolist()):
        images[number].append(record)
    order = []
    for number, own in images.items():
        stratum = tuple(sorted({(r.label, r.subtype, r.series) for r in own}))
        order.append((stratum, -len(own), seed_from(min(r.patient for r in own)), number))
    dealt, total, chosen = Counter(), Counter(), []
    for stratum, _, _, number in sorted(order):
        n = len(images[number])
        smallest = min(range(folds), key=lambda k: (dealt[stratum, k], total[k]))
        dealt[stratum, smallest] += n
        total[smallest] += n
        if smallest == fold:
            chosen.append(number)
    return np.isin(patient_index, chosen)


def seed_from(*numbers) -> int:
    """A seed hashed from numbers or names, so that similar ones give unrelated seeds."""
    text = repr(numbers).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())


# --- read ---

# Part of the cache's name: raise it when the pixels of read_image or the fields of ImageInfo change.
READER_VERSION = 8
DEFAULT_SIZE = 160  # side in pixels of what is cached, unless a model or --img-size wants another one

# Pillow warns about large images and odd metadata; it refuses more than 179 million pixels.
filterwarnings("ignore", module="PIL|pydicom")


# No other formats are opened: for PostScript, whatever the file's name, Pillow would run another program.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
EXTREMES = (-2147483648, -32768, 32767, 65535, 2147483647)  # of samples of 16 and 32 bits


@dataclass
class ImageInfo:
    """What is known about an image besides its grey levels."""

    width: int = 0  # as stored, before EXIF rotation
    height: int = 0
    mode: str = ""  # Pillow's, or the DICOM photometric interpretation
    depth: int = 8  # bits from black to white; 1 for floats in [0, 1]
    colour: float = 0.0  # mean distance between the largest and the smallest of red, green and blue: 0 to 255
    is_mask: bool = False  # at most three grey levels
    view: str = ""  # ViewPosition of a DICOM header
    hash: str = ""  # 256 bits, in hexadecimal, that hardly change when the image is compressed, resized or brightened
    error: str = ""  # why the file can't be used
    digest: str = ""  # in a cache: the first 16 hexadecimal digits of the file's SHA-256


def read_image(source, size: int | None) -> tuple[ndarray, ImageInfo]:
    """Any image as grey levels: the one function that opens images, for training, evaluation and prediction.

    Args:
        source: path, open seekable binary file, Pillow image, or uint8 array [height, width] or [height, width, 3].
            Of several frames the first one is used. A path or a file gives exactly the levels used in training; an
            array or a Pillow image of a large JPEG differs slightly after resizing, since the JPEG decoder halves large
            files while reading.
        size: side of the square that the whole image is resized to, antialiased; None keeps its own resolution.

    Returns:
        uint8 array [size, size] (or [height, width]), and its ImageInfo. If the source is missing, empty, damaged,
        not an image, too large, not finite, or a DICOM file without pydicom: zeros, and the reason as the info's error.

    For DICOM files see _open_dicom. In others, samples of 8 bits keep their levels, and deeper ones are scaled linearly
    from the black and white that find_range guesses. EXIF rotation is applied, transparency is ignored.
    """
    try:
        if not isinstance(source, str | os.PathLike):
            return _read(source, size)
        with open(source, "rb") as file:
            return _read(file, size)
    except Exception as e:  # noqa: BLE001, decoders raise all kinds of exceptions for damaged files
        known = {
            FileNotFoundError: "no such file",
            IsADirectoryError: "a folder that gave no image",
            Image.UnidentifiedImageError: "not an image of a known format",
            UserError: str(e),
        }
        reason = known.get(type(e), f"cannot be decoded: {one_line(str(e) or type(e).__name__)}")
        return np.zeros((size or 1, size or 1), np.uint8), ImageInfo(error=reason)


def _read(source, size):
    if isinstance(source, ndarray):
        source = Image.fromarray(source)
    is_file = not isinstance(source, Image.Image)
    if is_file:
        source.seek(0)
    if is_file and DICOM_START.match(source.read(132)):
        image, info = _open_dicom(source)
    else:
        image = Image.open(source, formats=FORMATS) if is_file else source
        info = ImageInfo(*image.size, image.mode)
    if not image.width * image.height:
        raise UserError("it has no pixels")
    if is_file and size:  # the JPEG decoder halves the image while at least twice the size is left
        image.draft(None, (2 * size, 2 * size))
    is_deep = image.mode[0] in "IF"
    if not is_deep and ";16" in str(getattr(image, "tile", "")):
        raise UserError("16-bit colour or transparency can't be read; save it as greyscale")
    is_inverted = getattr(image, "tag_v2", {}).get(262) == 0  # which Pillow handles for 8 bits only
    image = ImageOps.exif_transpose(image)
    if is_deep:
        samples = np.asarray(image)
        black, white = find_range(samples)
        info.depth = int(white - black).bit_length()
        if is_inverted:
            black, white = white, black
        bands = np.array_split(samples, 1 + samples.size // 2**20)  # the whole as floats would take gigabytes
        image = Image.fromarray(np.concatenate([_to_levels(band, black, white) for band in bands]))
    if image.mode not in ("L", "1", "RGB"):
        image = image.convert("RGB")
    thumbnail = np.asarray(image.resize((64, 64), Image.BOX).convert("RGB"))
    info.colour = float(np.ptp(thumbnail, axis=2).mean())
    image = image.convert("L")
    info.is_mask = image.resize((64, 64), Image.NEAREST).getcolors(3) is not None
    # 16 x 16 bits: 17 x 16 area-averaged pixels, each compared with its right neighbour.
    small = np.asarray(image.resize((17, 16), Image.BOX))
    info.hash = np.packbits(small[:, :-1] > small[:, 1:]).tobytes().hex()
    if size:
        image = image.resize((size, size), Image.BICUBIC)
    return np.array(image), info


def find_range(samples: ndarray) -> tuple[float, float]:
    """Black and white of samples of unknown depth, guessed from their values.

    White is guessed as the smallest 2^d - 1, d >= 8, that at most about a thousandth of the pixels exceed.
    Pixels at an extreme of the type don't count: they are saturated or part of a burned-in marker. So a few odd pixels
    change nothing, and the depth is right if more than a thousandth of the pixels are in the upper half of the range
    (as in all of 1,665 public radiographs). A darker picture can't be distinguished from a brighter one of fewer bits:
    it comes out too bright, by a power of two. Black is 0 or, for negative samples, minus the power of two that they
    stay within, with the same tolerance. For floats white may also be 1, 3, 7 ...
    """
    is_float = samples.dtype.kind == "f"
    some = samples.ravel()[:: 1 + samples.size // 2**20]
    inner = some[~np.isin(some, EXTREMES)]
    some = (inner if inner.size else some).astype(float)
    lowest, highest = np.quantile(some, (0.001, 0.999), method="nearest")
    black = -(2.0 ** np.ceil(np.log2(-lowest))) if lowest < 0 else 0.0
    white = 2.0 ** np.ceil(np.log2(max(highest, 1) + 1)) - 1
    white = max(white, -black - 1)  # of signed samples either end shows the depth
    return black, white if is_float else max(white, black + 255)


def _to_levels(samples, black, white):
    """uint8 from samples of any kind."""
    scaled = (samples - black) * (255 / (white - black))
    if not np.isfinite(scaled).all():
        raise UserError("has values that are not finite")
    return scaled.clip(0, 255).round().astype(np.uint8)


@np.errstate(all="ignore")
def _open_dicom(file):
    """The first frame of a DICOM file in 8 bits, grey or RGB, as PS3.3 C.7.6.3, C.11.1 and C.11.2 say.

    Black and white are the lowest and highest values that the last lookup table or the first window can return.
    Without either, they follow from the stored bits; of 16 stored bits the range is guessed, since many programs write
    16 whatever the depth. A dark picture stays dark. Padding is black.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, pixel_array
    except ImportError:
        raise UserError("a DICOM file needs pydicom: pip install pydicom") from None
    file.seek(0)
    dataset = dcmread(file, force=True)
    if "PixelData" not in dataset:  # a report, a plan or an index
        raise UserError("a DICOM file without an image")
    dataset.file_meta.setdefault("TransferSyntaxUID", "1.2.840.10008.1.2.1")  # a file without its preamble
    bits = dataset.BitsStored
    view = str(dataset.get("ViewPosition", "")).strip()
    info = ImageInfo(dataset.Columns, dataset.Rows, dataset.PhotometricInterpretation, bits, view=view)
    values = pixel_array(dataset, index=0)
    del dataset.PixelData  # it takes as much memory again
    if values.ndim == 3:
        return Image.fromarray(values), info  # pydicom converts YBR
    size, high_bit = values.itemsize, dataset.get("HighBit", bits - 1)
    if info.mode not in ("MONOCHROME1", "MONOCHROME2") or size > 2 or high_bit != bits - 1:
        raise UserError(f"unsupported DICOM pixels: {info.mode}, {bits} of {8 * size} bits, high bit {high_bit}")

    # Tables and window are applied to every possible sample value, and the pixels are looked up there. A
    # negative sample indexes from the end, like its bits read as an unsigned number.
    stored = np.arange(256**size).astype(values.dtype).astype(int)
    padding = dataset.get("PixelPaddingValue")
    is_padding = np.zeros(len(stored), bool)
    if padding is not None:
        ends = np.array([padding, dataset.get("PixelPaddingRangeLimit", padding)])
        unused = 8 * size - bits
        ends = ends.astype(values.dtype) << unused >> unused  # wraps like the samples, whose unused bits are dropped
        is_padding = (stored >= ends.min()) & (stored <= ends.max())
    dataset.RescaleSlope = dataset.get("RescaleSlope") or 1
    dataset.RescaleIntercept = dataset.get("RescaleIntercept") or 0
    black = white = None
    for lookup in filter(None, map(dataset.get, ("ModalityLUTSequence", "VOILUTSequence"))):
        descriptor = lookup[0].LUTDescriptor
        black, white = 0, 2 ** descriptor[2] - 1
        descriptor[2] = 16  # else pydicom uses uint8 for 8 bits, and refuses 12
    shown = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        shown = apply_voi_lut(np.rint(shown).astype(int), dataset)
    elif dataset.get("WindowCenter") is not None and np.any(dataset.get("WindowWidth")):  # a width of 0: a placeholder
        black, white = apply_windowing(np.array([-np.inf, np.inf]), dataset)
        shown = apply_windowing(shown, dataset)
    if white is None:
        lowest = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
        highest = lowest + 2**bits - 1
        if bits == 16:
            picture = values[~is_padding[values]]
            lowest, highest = find_range(picture if picture.size else values)
            info.depth = int(highest - lowest).bit_length()
        possible = shown[(stored >= lowest) & (stored <= highest)]
        black, white = possible.min(), possible.max()
    levels = _to_levels(shown, black, white)
    if info.mode == "MONOCHROME1":
        levels = 255 - levels
    levels[is_padding] = 0
    return Image.fromarray(levels[values]), info


# --- cache ---


@dataclass
class Folder:
    """The images of test/, or of train/ and val/, decoded; arrays have a row for each record."""

    records: list[Record]
    images: Tensor  # uint8 [n, size, size]; zeros if the file can't be read
    hashes: Tensor  # int64 [n, 4], see ImageInfo; that of an unusable file matches no other
    copy_index: ndarray  # int64 [n], see copy_groups
    patient_index: ndarray  # int64 [n], see number_patients
    infos: list[ImageInfo]  # of each file, also of those that can't be used
    fingerprint: str

    @property
    def usable(self) -> ndarray:
        """Which files can be used, bool [n]."""
        return np.array([not info.error for info in self.infos])

    def traces(self, index) -> dict:
        """What later identifies the images at index: their known patients, and their hashes as int64 [n, 4]."""
        patients = {self.records[i].patient for i in index if self.records[i].known_patient}
        return {"patients": sorted(patients), "hashes": self.hashes[index]}


@functools.lru_cache(maxsize=2)
def read_folder(root: Path, is_test: bool, size: int) -> Folder:
    """Read a data folder and warn about it, once for all runs of a comparison; the demo set is drawn if it is missing.

    size: side of the square images.

    Raises:
        UserError: see scan, find_training and load_images.
    """
    if root == DEMO_ROOT and not root.exists():
        draw_demo(root)
    if is_demo(root):
        warn(f"DEMO DATA: {root} contains synthetic phantoms, not radiographs. No result says anything about patients.")
    records = scan(root, "test") if is_test else find_training(root)
    if not records:
        raise UserError(f"{root} has no images in the test split")
    images, infos, hashes, fingerprint = load_images(root, records, size)
    warn("left out, can't be used", [f"{r.path}: {info.error}" for r, info in zip(records, infos) if info.error])
    copy_index = copy_groups(hashes)
    labels = {(copy, r.label) for copy, r in zip(copy_index.tolist(), records)}
    n_contradictions = len(labels) - len(np.unique(copy_index))
    if n_contradictions:
        warn(f"copies whose labels differ: {n_contradictions} (python data.py check --json {root} lists them)")
    return Folder(
        records=records,
        images=images,
        hashes=hashes,
        copy_index=copy_index,
        patient_index=number_patients(records, copy_index),
        infos=infos,
        fingerprint=fingerprint,
    )


def load_images(root: Path, records: list[Record], size: int) -> tuple[Tensor, list[ImageInfo], Tensor, str]:
    """The images of one split, or of train/ and val/, decoded once and kept in one memory-mapped cache file: beside the
    data or, if that can't be written, in the user's cache folder.

    Args:
        records: from scan or find_training; the file is rebuilt when path, size, times, inode or patient of one change.

    Returns:
        images, uint8 [n, size, size]; what is known about each; hashes, see Folder; and a fingerprint, SHA-256 over
        digests, paths, labels, splits, patients and subtypes: the same for every copy of the data and every size.

    Raises:
        UserError: neither place can be written.
    """
    stamps = []
    for record in records:
        file = root / record.path
        info = file.stat(follow_symlinks=file.exists())  # a broken link is reported by decoding
        times = f"{info.st_mtime_ns} {info.st_ctime_ns}"
        # The patient too: without pydicom a DICOM file loses it, and then its pixels must not come from the cache.
        stamps.append(f"{record.path} {record.patient} {info.st_size} {times} {info.st_ino}")
    kind = "test" if records[0].split == "test" else "train"
    name = f"{kind}-{size}-v{READER_VERSION}-{hash_lines(stamps)[:16]}.bin"
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    places = [root / ".cache", user_cache / "pneumonia" / hash_lines([str(root.resolve())])[:16]]
    for may_build, place in itertools.product((False, True), places):  # look in both before building in one
        try:
            if may_build:
                _build_cache(place / name, root, records, size)
        except OSError as e:
            warn(f"no image cache in {place} ({e.strerror or e})")
        if cached := _open_cache(place / name, root, records, size):
            images, infos = cached
            bits = bytearray.fromhex("".join(info.hash for info in infos))
            hashes = torch.frombuffer(bits, dtype=torch.int64).view(-1, 4)
            lines = []
            for r, info in zip(records, infos):
                lines.append(repr((info.digest, r.path, r.label, r.split, r.patient, r.subtype)))
            return images, infos, hashes, hash_lines(lines)
    raise UserError(f"the image cache can't be written to {' or '.join(map(str, places))}; set XDG_CACHE_HOME")


def _build_cache(path, root, records, size):
    """Write the levels of all images, what is known about each as JSON, and a SHA-256 of both.

    Other caches of the same split and size are removed.
    """

    def examine(record):
        file = root / record.path
        image, info = read_image(file, size)
        info.digest = "" if info.error else sha256(file)[:16]
        if info.is_mask:
            info.error = "a mask or drawing: at most three grey levels"
        if info.error:
            info.hash = hash_lines([record.path])  # so that it matches no other
        return image, info

    path.parent.mkdir(parents=True, exist_ok=True)
    infos, checksum = [], hashlib.sha256()
    with replacing(path) as f:
        for image, info in parallel(examine, records, "decoding"):
            infos.append(info)
            checksum.update(image)
            f.write(image)
        text = json.dumps(infos, default=asdict).encode()
        checksum.update(text)
        f.write(text + checksum.digest())
    split, _ = path.name.split(f"-v{READER_VERSION}-")
    for old in path.parent.glob(f"{split}-v*.bin"):
        with contextlib.suppress(OSError):  # another process was faster, or uses it
            if old != path:
                old.unlink()


def _open_cache(path, root, records, size):
    """The images, and what is known about each, that _build_cache wrote; None if missing, damaged or outdated."""
    if not os.access(path, os.R_OK) or not path.stat().st_size:
        return None
    stored = np.memmap(path, mode="c")  # copy-on-write: torch needs a writable array
    if hashlib.sha256(stored[:-32]).digest() != stored[-32:].tobytes():
        warn(f"the image cache {path} is damaged: decoding again")
        return None
    images, text = np.split(stored[:-32], [len(records) * size**2])
    infos = json.loads(text.tobytes(), object_hook=lambda fields: ImageInfo(**fields))
    for record, info in zip(records, infos):
        if info.error and not info.is_mask and not read_image(root / record.path, size)[1].error:
            warn(f"{record.path} can be read now: decoding again")
            return None
    return torch.from_numpy(images.reshape(-1, size, size)), infos


# --- change ---
#
# An operation is a function (x, parameters) that returns the changed images: x float32 [n, 1, side, side] in [0, 1] on
# any device, which it may overwrite; each parameter is a number for all images, or a tensor [n, 1, 1, 1] with one for
# each. To add an augmentation, write the operation and a line in a preset that draws its parameters.

NUMBERS = 4  # random numbers for each operation and image
STARTS = 2**20  # places in the table of standard normals


def to_float(images: Tensor) -> Tensor:
    """float32 [n, 1, side, side] in [0, 1] from uint8 [n, side, side]."""
    return images.unsqueeze(1).float().div_(255)


def resample(x: Tensor, size: int, width, height, right=0.0, down=0.0, turn=None) -> Tensor:
    """A window of the image as size x size pixels, bilinearly; outside of the image its edge is repeated.

    Args:
        width, height: of the window, relative to the image's sides; above 1 it zooms out.
        right, down: how far its centre is from the image's, relative to the image's sides.
        turn: degrees by which the window is turned clockwise about its centre; the picture turns the other way.
    """
    centres = (torch.arange(size, device=x.device) * 2 + 1) / size - 1  # of pixels; the image goes from -1 to 1
    columns = width * centres
    rows = height * centres[:, None]
    if turn is not None:  # without it, one row and one column are enough: five times faster
        angle = torch.as_tensor(turn, device=x.device).deg2rad()
        cos, sin = angle.cos(), angle.sin()
        columns, rows = columns * cos - rows * sin, columns * sin + rows * cos
    # By broadcasting: F.affine_grid's batched product takes longer than the resampling itself.
    grid = torch.stack(torch.broadcast_tensors(columns + 2 * right, rows + 2 * down), -1).view(-1, size, size, 2)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False, padding_mode="border")


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the images where chosen, bool [n, 1, 1, 1]."""
    return torch.where(chosen, x.flip(3), x)


def brightness(x: Tensor, factor) -> Tensor:
    """Grey levels times a factor."""
    return x.mul_(factor).clamp_(max=1)


def contrast(x: Tensor, factor) -> Tensor:
    """Distances from the image's mean times a factor."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def gamma(x: Tensor, exponent) -> Tensor:
    """Grey levels to a power."""
    return x.pow_(exponent)


def lower_resolution(x: Tensor, factor: float) -> Tensor:
    """Images shrunk by a factor and enlarged again, bilinearly."""
    shrunk = F.interpolate(x, size=round(factor * x.shape[-1]), mode="bilinear", antialias=True)
    return F.interpolate(shrunk, size=x.shape[-1], mode="bilinear")


def exchange_border(x: Tensor, width, others: Tensor | None = None) -> Tensor:
    """Replace the outer ring, of a width relative to the side, by that of others (like x) or of the previous image.

    The border shows the device and the technique, not the lungs; once exchanged, it is unrelated to the label (cut and
    paste as in CutMix, Yun et al. 2019, but the label stays that of the lungs).
    """
    place = torch.linspace(0, 1, x.shape[-1], device=x.device)
    to_edge = torch.minimum(place, 1 - place)
    depth = torch.minimum(to_edge[:, None], to_edge)
    return torch.where(depth < width, x.roll(1, 0) if others is None else others, x)


@functools.cache
def standard_normals(n: int, device: torch.device) -> Tensor:
    """float32 [n], always the same: drawing new ones in each step would dominate the cost of noise()."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)


def noise(x: Tensor, sd, start: Tensor) -> Tensor:
    """Gaussian noise; sd: its standard deviation, as a share of the range from black to white.

    start: int64 [n] or [n, 1, 1, 1], below STARTS: where each image's noise begins in the table of standard normals.
    """
    n_pixels = x[0].numel()
    normals = standard_normals(STARTS + n_pixels, x.device)
    windows = normals.unfold(0, n_pixels, 1)[start]  # unfold is a view: only these windows are copied
    return torch.addcmul(x, windows.view_as(x), torch.as_tensor(sd)).clamp_(0, 1)


PRESETS = ("none", "medium", "robust")


def preset(name: str, size: int) -> list[tuple]:
    """The operations of an --augment preset in order, each with a function that draws its parameters.

    The function takes float32 [n, NUMBERS, 1, 1, 1] in [0, 1), the operation's own random numbers of each image, and
    returns the parameters by name. Crops come out at size pixels.
    """

    def crop(u):
        """50 to 100 % of the area, aspect 3:4 to 4:3, anywhere in the image (after Szegedy et al. 2015)."""
        side = (1 - 0.5 * u[:, 0]).sqrt()
        distortion = (4 / 3) ** (u[:, 1] - 0.5)
        width = (side * distortion).clamp(max=1)
        height = (side / distortion).clamp(max=1)
        right = (u[:, 2] - 0.5) * (1 - width)
        down = (u[:, 3] - 0.5) * (1 - height)
        return {"size": size, "width": width, "height": height, "right": right, "down": down}

    medium = [
        (resample, crop),
        (flip, lambda u: {"chosen": u[:, 0] < 0.5}),
        (brightness, lambda u: {"factor": 0.7 + 0.6 * u[:, 0]}),
        (contrast, lambda u: {"factor": 0.7 + 0.6 * u[:, 0]}),
        (gamma, lambda u: {"exponent": torch.exp(0.8 * u[:, 0] - 0.4)}),
    ]
    robust = [
        (exchange_border, lambda u: {"width": (u[:, 0] < 0.3) * (0.04 + 0.14 * u[:, 1])}),
        *medium,
        # The standard deviation is 0 for half of the images.
        (noise, lambda u: {"sd": (0.1 * u[:, 0] - 0.05).clamp(min=0), "start": (u[:, 1] * STARTS).long()}),
    ]
    return {"none": [], "medium": medium, "robust": robust}[name]


def draw_numbers(operations: list[tuple], n: int, seed: int, epoch: int) -> list[Tensor]:
    """One epoch's random numbers of each operation: float32 [n, NUMBERS, 1, 1, 1] in [0, 1), row i for image i.

    They are a function of (seed, epoch, the operation's name, i): batch size, rank, threads and other operations do
    not change what an operation draws for an image.
    """
    numbers = []
    for operation, _ in operations:
        generator = torch.Generator().manual_seed(seed_from(seed, epoch, operation.__name__))
        numbers.append(torch.rand(n, NUMBERS, 1, 1, 1, generator=generator))
    return numbers


def shuffle(n: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of range(n), a function of (seed, epoch)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_from(seed, epoch, "order")))


def augment(images: Tensor, operations: list[tuple], numbers: list[Tensor]) -> Tensor:
    """Apply a preset.

    Args:
        images: uint8 [n, side, side], on any device.
        operations: from preset; numbers: for each of them the rows of draw_numbers for these images.

    Returns:
        float32 [n, 1, size, size] in [0, 1].
    """
    x = to_float(images)
    for (operation, draw), u in zip(operations, numbers):
        x = operation(x, **draw(u))
    return x


def normalise(x: Tensor, preprocessing: dict) -> Tensor:
    """What the model sees, float32 [n, 1, side, side]; x, from augment or to_float, is overwritten."""
    return x.sub_(preprocessing["mean"]).div_(preprocessing["std"])


def draw_partners(records: list[Record]) -> Tensor | None:
    """For each record the position of one with another label, chosen by its path: int64 [n]; None with one label."""
    labels = np.array([r.label for r in records])
    others = {label: np.flatnonzero(labels != label) for label in np.unique(labels)}
    if len(others) < 2:
        return None
    return torch.tensor([others[r.label][seed_from(r.path) % len(others[r.label])] for r in records])


def stress(images: Tensor, partners: Tensor | None, paths: list[str]):
    """Yield (name, copy) of uint8 images [n, side, side] under changes that leave the diagnosis as it is.

    Exposure, compression, a Gaussian blur with a standard deviation of 1 pixel at 224 (at other sizes in proportion),
    geometry (percentages of the side), resolution, noise with a standard deviation of 2 and 5 % of the range, and the
    outer 10 % of each side taken from an image of another class.

    Args:
        partners: uint8 like images, each of another class; None leaves out the exchange.
        paths: of the images; the noise is a function of them.
    """
    from torchvision.transforms.v2.functional import gaussian_blur  # slow to import, and predict.py does not need it

    size = images.shape[-1]
    compressed = []
    for image in images.numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=30)
        compressed.append(np.asarray(Image.open(buffer)))
    start = torch.tensor([seed_from(path) % STARTS for path in paths])
    changes = [
        ("brightness x 0.65", brightness, 0.65),
        ("contrast x 0.65", contrast, 0.65),
        ("brightness x 1.4", brightness, 1.4),
        ("contrast x 1.4", contrast, 1.4),
        ("gamma 0.7", gamma, 0.7),
        ("gamma 1.4", gamma, 1.4),
        ("JPEG quality 30", lambda _: to_float(torch.from_numpy(np.stack(compressed)))),
        ("blur", gaussian_blur, 2 * max(4, math.ceil(size / 56)) + 1, size / 224),  # to four standard deviations
        ("crop of 85 %", resample, size, 0.85, 0.85),
        ("zoomed out to 115 %", resample, size, 1.15, 1.15),
        ("shifted by 7 %", resample, size, 1, 1, -0.07, -0.07),
        ("turned by 7 degrees", resample, size, 1, 1, 0, 0, 7.0),
        ("turned by -7 degrees", resample, size, 1, 1, 0, 0, -7.0),
        ("stretched by 15 %", resample, size, 1 / 1.15, 1),
        ("half resolution", lower_resolution, 0.5),
        ("noise 0.02", noise, 0.02, start),
        ("noise 0.05", noise, 0.05, start),
    ]
    if partners is not None:
        changes.append(("border exchanged", exchange_border, 0.1, to_float(partners)))
    for name, operation, *parameters in changes:
        x = operation(to_float(images), *parameters)
        yield name, x[:, 0].mul(255).round_().clamp_(0, 255).byte()


# --- copies and shortcuts ---

# Bits in which hashes of copies may differ. The 99th percentile of the bits that changed in 250 radiographs: 10.5 by
# JPEG at quality 30, 8.5 by half the size, 7 by 0.8 times the brightness. The two most similar different images of
# 5,840 differ in 13.
SAME = 10
BORDER = np.pad(np.zeros((26, 26), bool), 3, constant_values=True)  # of a thumbnail of 32 x 32


def _connected(n, links):
    """Numbers of the connected components of n nodes, int64 [n], from 0 in order of appearance; links: int64 [m, 2]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(links), bool), tuple(links.T)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def copy_groups(hashes: Tensor) -> ndarray:
    """int64 [n]: equal numbers for copies: images whose hashes (int64 [n, 4]) differ in at most SAME bits.

    Copies of copies are copies too.
    """
    unique, place = np.unique(hashes.numpy().view(np.uint64), axis=0, return_inverse=True)
    folded = np.bitwise_xor.reduce(unique, axis=1)  # differs in no more bits than the whole

    def find_links(start):
        """Pairs of copies: 64 hashes against themselves and all that follow; the folded bits rule out most pairs."""
        links = []
        for other in range(start, len(unique), 4096):
            near = np.bitwise_count(folded[start : start + 64, None] ^ folded[other : other + 4096]) <= SAME
            pairs = np.argwhere(near) + (start, other)
            a, b = unique[pairs.T]
            links.append(pairs[np.bitwise_count(a ^ b).sum(1) <= SAME])
        return np.concatenate(links)

    links = list(parallel(find_links, range(0, len(unique), 64), "comparing"))
    return _connected(len(unique), np.concatenate(links))[place.ravel()]


def seen_before(traces: dict, seen: dict) -> str:
    """How many images are copies of one that was seen, and how many patients were seen, in words; "" if none.

    Both arguments: see Folder.traces.
    """
    groups = copy_groups(torch.cat([traces["hashes"], seen["hashes"]]))
    n_images = np.isin(groups[: len(traces["hashes"])], groups[len(traces["hashes"]) :]).sum()
    n_patients = len(set(map(normal_form, traces["patients"])).intersection(map(normal_form, seen["patients"])))
    return f"{n_images} of these images and {n_patients} of these patients" if n_images or n_patients else ""


def border_features(images: Tensor) -> Tensor:
    """The border of an image, without any lung, float32 [n, 348] in [0, 1]: the outer 3 pixels of a 32 x 32 thumbnail.

    images: uint8 [n, height, width].
    """
    thumbnails = F.adaptive_avg_pool2d(to_float(images.cpu()), 32)[:, 0]
    return thumbnails[:, torch.from_numpy(BORDER)]


def auroc_error(auroc: float, n_positive: int, n_negative: int) -> float:
    """Standard error of an AUROC from its numbers of positives and negatives (Hanley and McNeil 1982)."""
    pair = auroc / (2 - auroc) - auroc**2
    triple = 2 * auroc**2 / (1 + auroc) - auroc**2
    variance = auroc * (1 - auroc) + (n_positive - 1) * pair + (n_negative - 1) * triple
    return math.sqrt(max(variance, 0.0) / (n_positive * n_negative))


# --- demo ---

PHANTOM_SIDE = 112  # pixels; drawn at this size, then resized
KINDS = (  # class, subtype, and file names as in the best-known and the newer releases of the public set
    ("NORMAL", "", "IM-{:04d}-{:04d}.jpeg", "NORMAL-{}-{:04d}.jpeg"),
    ("PNEUMONIA", "bacterial", "person{}_bacteria_{}.jpeg", "BACTERIA-{}-{:04d}.jpeg"),
    ("PNEUMONIA", "viral", "person{}_virus_{}.jpeg", "VIRUS-{}-{:04d}.jpeg"),
)


def draw_demo(folder: Path, images: int = 1000, seed: int = 0) -> None:
    """Write a synthetic set: crude chest phantoms of patients with two images each, in varied sizes.

    One patient in five is for test; two in three have pneumonia: focal consolidation (bacterial) or diffuse streaks
    (viral). All but the pattern in the lungs is drawn without regard to the class. Every pixel is a function of the
    seed. demo.json marks the set.

    Raises:
        UserError: folder is a file or not empty.
    """
    if folder.is_file() or any(folder.glob("*")):
        raise UserError(f"{folder} exists and is not an empty folder; choose another one or remove it")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary, folder.name)
        for i in range(images):
            patient, visit = 1 + i // 2, 1 + i % 2
            label, subtype, usual, newer = KINDS[patient % 3]
            name = (usual if patient % 4 else newer).format(patient, visit)
            path = new / ("train" if patient % 5 else "test") / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            anatomy = np.random.default_rng([seed, patient, 0])
            today = np.random.default_rng([seed, patient, visit])
            phantom = _draw_phantom(anatomy, today, subtype)
            phantom.save(path, quality=int(today.integers(20, 96)))
        write_json(new / DEMO_MARK, {"images": images, "seed": seed})
        os.rename(new, folder)


def _draw_phantom(anatomy, today, subtype):
    """One phantom as a grey Pillow image, from two random generators."""
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
    # An opacity rearranges the grey levels of the lungs but adds none, so that no histogram shows the class.
    levels = ImageOps.equalize(_to_image(50 * pattern + 100), _to_image(255 * lungs))
    air = 0.5 - 0.5 * (np.asarray(levels) / 255) ** today.uniform(1, 3)

    image = trunk * (0.7 + 0.1 * ribs + 0.1 * heart - lungs * air)
    image += 0.04 * (1 + _smooth(today, 7))  # scattered radiation: no two films are alike
    image += today.uniform(0, 0.04) * today.standard_normal(image.shape)
    image = image * today.uniform(120, 200) + today.uniform(0, 60)  # exposure
    width = today.integers(180, 450)
    height = int(width * today.uniform(0.75, 1))
    return _to_image(image).resize((width, height), Image.BICUBIC)


def _to_image(levels):
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _ellipse(x, y, cx, cy, rx, ry):
    """1 inside, 0 outside, with a soft edge."""
    distance = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2
    return (3 - 2.5 * distance).clip(0, 1)


def _smooth(rng, bumps):
    """Noise in [-1, 1] with this many bumps along a side: float32 [PHANTOM_SIDE, PHANTOM_SIDE]."""
    grid = Image.fromarray(rng.uniform(-1, 1, (bumps, bumps)).astype(np.float32))
    return np.asarray(grid.resize((PHANTOM_SIDE, PHANTOM_SIDE), Image.BICUBIC))


# --- check ---

LATERAL = ("LL", "RL", "LATERAL")
# Sizes before EXIF rotation; mean and standard deviation of the grey levels at DEFAULT_SIZE.
MEASURES = ("width", "height", "aspect", "bytes per pixel", "brightness", "contrast")


def check(root: Path) -> dict:
    """Check a data folder: counts, shapes, what makes results invalid, and what a model could learn instead.

    Images are read through the cache that training uses, at DEFAULT_SIZE, so a second run is fast.

    Returns:
        dict: root; demo; fingerprints: of train (with val) and test; folders: for each SPLIT/CLASS, counts and medians
        of the measures; audit: see _audit; problems, which make results invalid, and warnings: for each message the
        list of what it is about, or None.

    Raises:
        UserError: the folder has no images; also see scan and load_images.
    """
    problems, warnings = defaultdict(list), defaultdict(list)

    def remark(message, names=None):
        if names != []:
            warnings[message] = names

    records = scan(root, say=remark)
    if not records:
        raise UserError("; ".join([f"{root} has no images in train/, val/ or test/, nor in metadata.csv", *warnings]))
    for sides, patients in shared_patients(records):
        problems[f"patients in both {sides}"] = patients
    for split in SPLITS:
        classes = {r.label for r in records if r.split == split}
        if len(classes) == 1:
            warnings[f"only one class in {split}"] = list(classes)

    usable, folders = [], defaultdict(list)  # (record, info, image, measures) of each; the same by folder
    hashes, fingerprints = [], {}
    for name, part in itertools.groupby(records, lambda r: "test" if r.split == "test" else "train"):
        part = list(part)
        images, infos, part_hashes, fingerprints[name] = load_images(root, part, DEFAULT_SIZE)
        hashes.append(part_hashes)
        for record, info, image in zip(part, infos, images.numpy()):
            if info.error:
                warnings["left out, can't be used"].append(f"{record.path}: {info.error}")
            else:
                bytes_per_pixel = os.path.getsize(root / record.path) / (info.width * info.height)
                shape = info.width, info.height, info.width / info.height
                usable.append((record, info, image, (*shape, bytes_per_pixel, image.mean(), image.std())))
                folders[f"{record.split}/{record.label}"].append(usable[-1])
    lateral = [record.path for record, info, *_ in usable if info.view in LATERAL]
    remark(f"lateral views among {len(usable)} images", lateral)
    audit = _audit([item for item in usable if item[0].split != "test"], remark)

    copies = defaultdict(list)
    for record, number in zip(records, copy_groups(torch.cat(hashes)).tolist()):
        copies[number].append(record)
    rules = (
        ("split", problems, "copies across splits"),
        ("label", problems, "copies whose labels differ"),
        ("patient", warnings, "copies without a common patient id, counted as one patient"),
    )
    for group in copies.values():
        for attribute, findings, message in rules:
            if len({getattr(r, attribute) for r in group}) > 1:
                findings[message].append(" = ".join(r.path for r in group))
                break
    return {
        "root": str(root),
        "demo": is_demo(root),
        "fingerprints": fingerprints,
        "folders": {folder: _summarise(own) for folder, own in folders.items()},
        "audit": audit,
        "problems": problems,
        "warnings": warnings,
    }


def _summarise(usable):
    """Counts, and medians of the measures, of one folder; usable: see check."""
    records, infos, _, measures = zip(*usable)
    medians = np.median(measures, axis=0)
    subtypes = sorted(r.subtype for r in records if r.subtype)
    modes = sorted(f"mode {info.mode}, {info.depth} bits" for info in infos)
    return {
        "images": len(usable),
        "patients": len({r.patient for r in records}),
        **dict(zip(MEASURES, medians.round(3).tolist())),
        **Counter(subtypes + modes),
    }


def _audit(usable, say):
    """How well two classes are separated without the lungs: gradient boosting on border or file, cross-validated
    by patient.

    Returns:
        for each pair of classes with 10 or more patients each, and for border (see border_features) and file: dict of
        from, classes, auroc and ci95 (Hanley and McNeil 1982, counting one image per patient, since a patient's
        images are alike).

    usable: see check; say(message) is called with each clear separation.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    usable = usable[:: 1 + len(usable) // 20_000]  # more would add nothing, but take time and memory
    labels = np.array([record.label for record, *_ in usable])
    patients = np.array([record.patient for record, *_ in usable])
    modes = sorted({info.mode for _, info, *_ in usable})
    borders, file = [], []
    for record, info, image, (*shape, bytes_per_pixel, _, _) in usable:
        borders.append(border_features(torch.from_numpy(image[None]))[0].numpy())
        # The bytes of a lossless file depend on its content.
        is_lossy = re.search(r"(?i)\.(jpe?g?|jfif|mpo|webp|jp2|j2k)\Z", record.path) is not None
        file.append([*shape, bytes_per_pixel * is_lossy, info.depth, modes.index(info.mode)])
    sources = {
        "the border alone, without any lung,": np.array(borders),
        "the file alone (size, bytes per pixel, mode, depth)": np.array(file),
    }
    boosting = HistGradientBoostingClassifier(learning_rate=0.2, max_iter=30, max_leaf_nodes=15, random_state=0)
    n_patients = Counter(label for label, _ in set(zip(labels.tolist(), patients.tolist())))
    enough = sorted(label for label, n in n_patients.items() if n >= 10)
    rows = []
    for a, b in itertools.combinations(enough, 2):
        pair = np.isin(labels, (a, b))
        is_b = labels[pair] == b
        options = {"groups": patients[pair], "cv": StratifiedGroupKFold(5), "method": "predict_proba"}
        for source, features in sources.items():
            probabilities = cross_val_predict(boosting, features[pair], is_b, **options)
            auroc = float(roc_auc_score(is_b, probabilities[:, 1]))
            half = 1.96 * auroc_error(auroc, n_patients[b], n_patients[a])
            low, high = max(auroc - half, 0), min(auroc + half, 1)
            rows.append({"from": source, "classes": f"{a} from {b}", "auroc": auroc, "ci95": [low, high]})
            if low > 0.6:
                say(
                    f"{source} separates {a} from {b} with AUROC {auroc:.2f} [{low:.2f}, {high:.2f}]: "
                    "a model can learn the device instead of the disease"
                )
    return rows


def print_check(report: dict) -> None:
    """Print a column for each folder, then the findings."""
    print(f"{report['root']}{' (DEMO: synthetic phantoms)' if report['demo'] else ''}\n")
    folders = report["folders"]
    print(f"{'':19}", *(f"{name:>20}" for name in folders))
    for row in dict.fromkeys(itertools.chain(*folders.values())):
        print(f"{row:19}", *(f"{folder.get(row, 0):>20.6g}" for folder in folders.values()))
    print("\nFrom width to contrast: medians. Where they differ between classes, a model can mistake the difference")
    print("for the disease. --json lists all findings.\n")
    for name, value in report["fingerprints"].items():
        print(f"fingerprint of {name}: {value}")
    for kind in ("problem", "warning"):
        for message, names in report[f"{kind}s"].items():
            print(f"{kind.upper()}: {one_line(message, names)}")
    verdict = "; results on this folder would be invalid" if report["problems"] else ""
    print(f"{count(len(report['problems']), 'problem')}, {count(len(report['warnings']), 'warning')}{verdict}")


# --- download ---

URL = "https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
URL += "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded"
SHA256 = "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36"


def download(folder: Path, url: str = URL, checksum: str = SHA256) -> Path:
    """Fetch, verify and unpack the public dataset into folder/chest_xray; does nothing if it is already there.

    Raises:
        UserError: no connection, a wrong checksum, or a damaged archive.
    """
    target = folder / "chest_xray"
    if (target / "train").exists():
        return target
    if target.is_file() or any(target.glob("*")):
        raise UserError(f"{target} exists, but has no train/; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
        archive, unpacked = Path(temporary, "archive.zip"), Path(temporary, "unpacked")
        try:
            torch.hub.download_url_to_file(url, str(archive), hash_prefix=checksum, progress=sys.stderr.isatty())
            shutil.unpack_archive(archive, unpacked)  # safe, since its checksum is known
            os.replace(unpacked / "chest_xray", target)
        except Exception as e:  # noqa: BLE001, the network, the server and the archive fail in many ways
            raise UserError(
                f"can't download {url} (on Kaggle: paultimothymooney/chest-xray-pneumonia): {e!r}; "
                f"try again, or unpack it by hand, so that {target}/train exists"
            ) from None
    return target


def main() -> None:
    parser = Parser(description="Check a data folder, download the public dataset, or draw a demo set.")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("check", help="check a data folder; exit code 1 if results would be invalid")
    sub.add_argument("dir", metavar="DIR", help="folder with train/ and test/")
    sub.add_argument("--json", action="store_true", help="print only JSON")
    sub = commands.add_parser("download", help="fetch the public dataset (Kermany et al. 2018, CC BY 4.0, 1.2 GB)")
    sub.add_argument("dir", metavar="DIR", nargs="?", default="data", help="the data goes into DIR/chest_xray")
    sub = commands.add_parser("demo", help="draw a set of synthetic phantoms")
    sub.add_argument("dir", metavar="DIR", help="a new or empty folder")
    sub.add_argument("--images", type=within(int, 40), default=1000, help="number of images")
    sub.add_argument("--seed", type=within(int, 0), default=0, help="random seed")
    args = parser.parse_args()

    def work():
        if args.command == "check":
            report = check(find_root(args.dir))
            print(json.dumps(report, indent=1)) if args.json else print_check(report)
            return 1 if report["problems"] else 0
        if args.command == "download":
            socket.setdefaulttimeout(60)  # seconds for a silent server; download_url_to_file has no parameter for it
            print(f"dataset ready in {download(Path(args.dir))}")
        else:
            draw_demo(Path(args.dir), args.images, args.seed)
            print(f"{args.dir}: {args.images} synthetic phantoms, not radiographs")

    run_script(parser, work)


if __name__ == "__main__":
    main()
