"""data.py: tables, patients and splits, reading, cache, the operations, copies, the check, download and demo set."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import EpsImagePlugin, Image
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import data


def touch(root, *paths):
    """Files by name alone, for what never opens an image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def random_image(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)


def save(root, images):
    """Arrays by path, as image files."""
    for path, image in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / path)
    return root


def file_names(split, start, n, ending="jpeg"):
    """Half of n images in each class, every one a patient of its own."""
    classes = (f"NORMAL/IM-{{}}-0001.{ending}", f"PNEUMONIA/person{{}}_virus_1.{ending}")
    return [f"{split}/{classes[i % 2].format(start + i)}" for i in range(n)]


def tree(root, n=6):
    """Noise images, half of them in each class of train/."""
    return save(root, {path: random_image(i) for i, path in enumerate(file_names("train", 1, n, "bmp"))})


def table(root, text, folder=""):
    (root / folder / "metadata.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return root


# --- command line and files ---


def test_what_to_csv_writes_reads_back_and_no_spreadsheet_runs_it(tmp_path):
    texts = ["=1+1", "+x", "-x", "@x", "'=x", "'quoted'", "a=b", 'two "quotes", a comma', "two\nlines"]
    data.write_text(tmp_path / "t.csv", data.to_csv([{"note": text, "logit": -1.5} for text in texts]))
    assert data.read_table(tmp_path / "t.csv", ()) == [{"note": text, "logit": "-1.5"} for text in texts]
    assert all(line.startswith("'") for line in (tmp_path / "t.csv").read_text().splitlines()[1:6])


AS_WRITTEN = {  # the same table as other programs write it
    "plain": "file_name,Age,label\nx/1.png,5,A\nx/2.png,,B\n",
    "semicolons, CRLF": "file_name;Age;label\r\nx/1.png;5;A\r\nx/2.png;;B\r\n",
    "tabs, capitals": "FILE_NAME\tAge\tLabel\nx/1.png\t5\tA\nx/2.png\t\tB\n",
    "byte order mark, quotes": '\ufefffile_name,"Age","label"\n"x/1.png","5","A"\nx/2.png,"",B\n',
    "blanks after commas": 'file_name, Age, label\nx/1.png, 5, "A"\nx/2.png, , B\n',
    "backslashes": "file_name,Age,label\nx\\1.png,5,A\nx\\2.png,,B\n",
    "pandas's row numbers, empty rows": ",file_name,Age,label\n0,x/1.png,5,A\n,,,\n1,x/2.png,,B\n\n",
    **{f"missing: {word}": f"file_name,Age,label\nx/1.png,5,A\nx/2.png,{word},B\n" for word in ("NA", "Unknown", "-")},
}


@pytest.mark.parametrize("kind", AS_WRITTEN)
def test_a_table_reads_alike_however_it_is_written(tmp_path, kind):
    expected = [
        {"file_name": f"x/{i}.png", "Age": age, "label": label} for i, age, label in ((1, "5", "A"), (2, "", "B"))
    ]
    assert data.read_table(table(tmp_path, AS_WRITTEN[kind]) / "metadata.csv", ("file_name", "label")) == expected


NUMBERS = {"12": 12, "-1.5": -1.5, "0,75": 0.75, "058Y": 58, "018M": 1.5, "026w": 0.498, "365D": 0.999, "1e3": 1000}


def test_numbers_and_ages_are_distinguished_from_text():
    assert {text: data.as_number(text) for text in NUMBERS} == pytest.approx(NUMBERS, rel=0.01)
    assert {data.as_number(text) for text in ("", "M", "x12", "12 kg", "nan", "inf", "2015-03-01")} == {None}


def test_messages_are_one_short_line_without_control_characters(capsys):
    data.warn("a\x1b[31mb\nc" + "x" * 1000 + "the end")
    data.warn("odd", [])
    data.warn("odd", list("abcde"))
    first, second = capsys.readouterr().err.splitlines()
    assert "\x1b" not in first and len(first) < 320 and first.endswith("the end")
    assert second == "WARNING: odd: 5 (a, b, c, ...)"
    assert [data.count(n, "file") for n in (0, 1, 2)] == ["no file", "1 file", "2 files"]


def test_a_full_disk_is_named_with_its_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*/x'"):
        data.write_text(tmp_path / "x", "y")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


class Closed(io.StringIO):
    """A pipe that nobody reads any more."""

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)

    def write(self, text):
        raise BrokenPipeError


def interrupted_while_writing():
    with data.replacing(Path("x")) as f:
        f.write(b"half")
        signal.raise_signal(signal.SIGINT)


ENDS = {  # what the work does, the exit code, what is printed on stderr
    "a closed pipe": (lambda: print("a row"), 1, "the output pipe was closed; go on\n"),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "interrupted; go on\n"),
    "Ctrl-C": (interrupted_while_writing, 130, "interrupted; go on\n"),
    "a problem was found": (lambda: 1, 1, ""),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_script_ends_with_the_right_code_at_most_one_line_and_nothing_half_written(
    tmp_path, monkeypatch, capsys, case
):
    work, code, line = ENDS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Closed())
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        data.run_script(data.Parser(prog="x"), work, lambda: "go on")
    signal.signal(signal.SIGTERM, handler)
    assert (end.value.code, capsys.readouterr().err) == (code, line)
    assert not list(tmp_path.iterdir())


# --- find ---

IDENTIFY = {  # the same number in two series is two patients, but v3 counts all patients in one series
    "person23_bacteria_78.jpeg": ("bacteria-23", "bacterial"),
    "person23_virus_150.jpeg": ("virus-23", "viral"),
    "IM-0115-0001.jpeg": ("IM-115", ""),
    "NORMAL-1003233-0001.jpeg": ("1003233", ""),
    "BACTERIA-1003233-0001.jpeg": ("1003233", "bacterial"),
    "scan_0001.jpeg": (None, ""),
    "person_bacteria_1.jpeg": (None, ""),
}


def test_file_names_say_patient_and_subtype():
    assert {name: data.identify(name)[:2] for name in IDENTIFY} == IDENTIFY


def test_scan_takes_images_and_counts_the_rest(tmp_path, capsys):
    wanted = ["train/NORMAL/IM-0001-0001.jpeg", "train/PNEUMONIA/deep/person2_virus_1.PNG", "train/PNEUMONIA/x.jfif"]
    hidden = ["__MACOSX/NORMAL/a.jpeg", "NORMAL/._IM-0001-0001.jpeg", "NORMAL/@eaDir/a.jpeg", ".hidden/c.jpeg"]
    other = ["NORMAL/notes.txt", "NORMAL/more.txt", "PNEUMONIA/Thumbs.db", "PNEUMONIA/README", "loose.png"]
    touch(tmp_path, *wanted, *(f"train/{p}" for p in hidden + other))
    records = data.scan(tmp_path, "train")
    assert [(r.path, r.label) for r in records] == list(zip(wanted, ["NORMAL", "PNEUMONIA", "PNEUMONIA"]))
    assert [r.patient for r in records] == ["IM-1", "virus-2", "train/PNEUMONIA/x.jfif"]
    assert [r.known_patient for r in records] == [True, True, False]
    skipped, loose = capsys.readouterr().err.splitlines()
    assert "2 .txt, 1 no extension, 1 .db" in skipped and "in no class folder: 1 (train/loose.png)" in loose


def test_masks_and_annotations_are_left_out_by_name_and_counted(tmp_path, capsys):
    images = ["train/A/images/1.png", "train/A/unlabeled_2.png", "train/masks/1.png", "train/A/segment_3.png"]
    masks = ["train/A/masks/1.png", "train/A/lung masks/1.png", "train/A/1_mask.png", "train/A/Label/1.png"]
    masks += ["train/A/1-annotation.png", "train/A/seg_1.png"]
    assert sorted(r.path for r in data.scan(touch(tmp_path, *images, *masks), "train")) == sorted(images)
    assert "as masks or annotations, by their names: 6" in capsys.readouterr().err


def test_images_come_sorted_by_split_class_and_path(tmp_path):
    """The order decides an image's random numbers and the fingerprint."""
    paths = ["train/A/a/1.png", "train/A/a-b/1.png", "train/A/b.png", "train/B/a/2.png", "test/A/1.png", "test/B/1.png"]
    assert [r.path for r in data.scan(touch(tmp_path, *paths))] == paths
    rows = "".join(f"{path},{label}\n" for path, label in zip(paths, "YXYXXY"))
    by_label = [paths[i] for i in (1, 3, 0, 2, 4, 5)]
    assert [r.path for r in data.scan(table(tmp_path, "file_name,label\n" + rows))] == by_label


@pytest.mark.parametrize("names", ["TRAIN Val Test", "Train VALID TEST", "train Validation test"])
def test_folders_of_splits_are_found_in_any_case_and_once_each(tmp_path, names):
    train, val, test = names.split()
    touch(tmp_path, *file_names(train, 0, 40), *file_names(val, 1000, 100), *file_names(test, 5000, 10))
    assert Counter(r.split for r in data.scan(tmp_path)) == {"train": 40, "val": 100, "test": 10}
    touch(tmp_path, "vAL/NORMAL/a.png")
    with pytest.raises(data.UserError, match="several folders for val: .*, vAL"):
        data.scan(tmp_path)


LINKS = {  # where a link in train/NORMAL leads, relative to that folder, and how many images are then found in it
    "within the root": ("../../pool/more", 22),
    "a loop outside": ("../../../loop", 22),
    "another class": ("../PNEUMONIA", 41),
}


@pytest.mark.parametrize("case", LINKS)
def test_each_folder_counts_once_whatever_the_links(tmp_path, capsys, case):
    target, n = LINKS[case]
    root = touch(tmp_path / "d", *file_names("train", 0, 40), "train/NORMAL/deep/IM-900-0001.jpeg")
    touch(tmp_path, "d/pool/more/IM-901-0001.jpeg", "loop/IM-904-0001.jpeg")
    (tmp_path / "loop/back").symlink_to("../loop", target_is_directory=True)
    (root / "train/NORMAL/link").symlink_to(target, target_is_directory=True)
    assert Counter(r.label for r in data.scan(root))["NORMAL"] == n
    assert ("1 folder linked twice" in capsys.readouterr().err) == (case != "within the root")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    touch(tmp_path, "train/A/deep/1.png")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(data.UserError, match="train/A/deep can't be read .Permission denied"):
        data.scan(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    root = tree(tmp_path / "d")
    for name in ("pipe", "pipe.dcm", "pipe.png"):
        os.mkfifo(root / "train" / "NORMAL" / name)
    assert [item["reason"] for item in load(root).left_out.values()] == ["not a regular file"] * 2


def test_the_root_is_found_or_its_absence_explained(tmp_path, monkeypatch):
    touch(tmp_path, "chest_xray/train/NORMAL/a.jpeg", "file")
    for name, message in (("nowhere", "nowhere does not exist"), ("file", "file is a file; name the folder")):
        with pytest.raises(data.UserError, match=message):
            data.find_root(str(tmp_path / name))
    assert data.find_root(str(tmp_path)) == data.find_root(str(tmp_path / "chest_xray")) == tmp_path / "chest_xray"
    monkeypatch.chdir(tmp_path)
    assert data.find_root(None) == data.DEMO_ROOT and not data.DEMO_ROOT.exists()  # finds, and draws nothing


LAYOUTS = {
    "images of no class; expected two or more class folders.*or a metadata.csv": "",
    "images of NORMAL; expected two": "train/NORMAL/a.jpeg train/PNEUMONIA/notes.txt",
    "class C, which is not one of A, B": "train/A/a.jpeg train/B/b.jpeg test/A/c.jpeg test/C/d.jpeg",
    "class Normal, which is not one of NORMAL, X": "train/NORMAL/a.png train/X/b.png test/Normal/c.png test/X/d.png",
}


@pytest.mark.parametrize("message", LAYOUTS)
def test_a_layout_that_cannot_be_trained_on_is_an_error(tmp_path, message):
    with pytest.raises(data.UserError, match=message):
        data.find_training(touch(tmp_path, *LAYOUTS[message].split()))
    with pytest.raises(data.UserError, match="has no folder val/; expected images in"):
        data.scan(tmp_path, "val")


def test_a_table_names_patients_subtypes_and_groups(tmp_path, capsys):
    paths = ["train/A/a.png", "train/A/b.png", "train/B/IM-0007-1.png", "train/B/c.png"]
    rows = "file_name,patient,subtype,sex,split\ntrain/A/a.png,p1,,F,test\ntrain/A/b,p1,,F\n"  # one without its ending
    rows += "train/B/c.png,p2,viral,M\ntrain/B/gone.png,p3,viral,M\n"
    records = data.scan(table(touch(tmp_path, *paths), rows), "train")
    found = [(r.patient, r.subtype, r.groups.get("sex")) for r in records]
    assert found == [("p1", "", "F"), ("p1", "", "F"), ("IM-7", "", ""), ("p2", "viral", "M")]
    split, gone, unlisted = capsys.readouterr().err.splitlines()
    assert "a column split but no column label: the folders decide" in split
    assert "rows whose file is missing: 1 (train/B/gone.png)" in gone
    assert "has no row for these images: 1 (train/B/IM-0007-1.png)" in unlisted


def test_a_table_with_labels_needs_no_class_folders_and_what_is_odd_is_said(tmp_path, capsys):
    touch(tmp_path, "x/1.png", "x/2.png", "x/3.png", "x/4.png", "B/5.png", "x/6.png")
    rows = "x/1.png,A,Train,p\nx/2.png,B,TRAIN,q\nx/3.png,A,Test,r\nB/5,A,train,s\nx/6.png,na,train,t\n"
    records = data.scan(table(tmp_path, "file_name,label,split,patient\n" + rows))
    expected = [("B/5.png", "A", "train", "s"), ("x/1.png", "A", "train", "p"), ("x/2.png", "B", "train", "q")]
    assert [(r.path, r.label, r.split, r.patient) for r in records] == [*expected, ("x/3.png", "A", "test", "r")]
    said = capsys.readouterr().err
    assert "no row for these images: 1 (x/4.png)" in said
    assert "the folder differ in the label; metadata.csv is used: 1 (B/5.png)" in said
    assert "without a label or in no class folder: 1 (x/6.png)" in said


def test_a_table_that_overrules_every_folder_is_said_and_one_class_is_a_problem(demo, tmp_path):
    root = shutil.copytree(demo, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*.jpeg")]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *(f"{path},NORMAL" for path in paths)]))
    report = data.check(root)
    assert report["problems"]["only one class"] == ["NORMAL"]
    (overruled,) = [paths for message, paths in report["warnings"].items() if "differ in the label" in message]
    assert len(overruled) == sum("/PNEUMONIA/" in path for path in paths)


def test_a_table_in_the_folder_of_a_split_decides_its_split(tmp_path):
    for folder, i in (("train", 1), ("valid", 3)):
        table(touch(tmp_path, f"{folder}/{i}.png"), f"file_name,label\n{i}.png,Überweisung\n", folder)
    assert [(r.path, r.label) for r in data.scan(tmp_path, "train")] == [("train/1.png", "Überweisung")]
    assert [(r.path, r.split) for r in data.scan(tmp_path)][1] == ("valid/3.png", "train")  # a small val


BAD_METADATA = {
    "has the column split twice": "file_name,split,Split\nx/1.png,train,test\n",
    "row 2 has more cells": "file_name,split\nx/1.png,upper lobe, train\n",
    "save it as CSV in UTF-8": b"file_name,split\nx\xff.png,A\n",
    "quotation mark closed": 'file_name,split\n"x/1.png,train\n',
    "no column file_name; its columns are path, label": "path,label\nx,A\n",
    "x/1.png is listed twice": "file_name,label,split\nx/1.png,A,train\nx//../x/1.png,B,train\n",
    "1.png is outside of": "file_name,label,split\n../1.png,A,train\n",
    "the split of x/1.png is dev; write train, val or test": "file_name,label,split\nx/1.png,A,dev\n",
    "the split of x/1.png is missing;.*crc32": "file_name,label\nx/1.png,A\n",
    "rename column Patient_ID to patient": "file_name,Patient_ID\nx/1.png,A\n",
    "class NORMAL, which is not one of normal": "file_name,label,split\nx/1.png,NORMAL,train\nx/2.png,normal,train\n",
    "control characters": "file_name,label,split\nx/1.png,NOR\x1b[31mMAL,train\n",
}


@pytest.mark.parametrize("message", BAD_METADATA)
def test_metadata_that_cannot_be_used_is_an_error(tmp_path, message):
    with pytest.raises(data.UserError, match=message):
        data.scan(table(touch(tmp_path, "x/1.png", "x/2.png"), BAD_METADATA[message]), "train")


def test_columns_of_identifiers_are_no_groups_and_named(tmp_path, capsys):
    paths = [f"train/{'AB'[i % 2]}/{i}.png" for i in range(20)]
    rows = [f"{path},{i // 2},2015-03-{i:02},{40 + i:03}Y,ward {i % 3}" for i, path in enumerate(paths)]
    for n, groups in ((20, ("age", "place")), (19, ("date", "age", "place"))):  # ages differ too, but are numbers
        table(touch(tmp_path, *paths), "\n".join(["file_name,patient,date,age,place", *rows[:n]]))
        assert tuple(data.scan(tmp_path)[0].groups) == groups
        assert ("columns of identifiers" in (said := capsys.readouterr().err) and "1 (date)" in said) == (n == 20)


@pytest.mark.parametrize("word", ["", "0", "000", "nan", "Unknown", "ANONYMIZED"])
def test_a_word_for_missing_is_not_a_patient(tmp_path, word):
    touch(tmp_path, "train/A/IM-0001-0001.png", "train/A/x.png")
    table(tmp_path, f"file_name,patient\ntrain/A/IM-0001-0001.png,{word}\ntrain/A/x.png,{word}\n")
    assert [r.patient for r in data.scan(tmp_path)] == ["IM-1", "train/A/x.png"]


# --- split ---


STRATA = [("NORMAL", "", "IM"), ("NORMAL", "", "NORMAL2-IM"), ("P", "viral", "virus"), ("P", "bacterial", "bacteria")]


def many_records(patients=600):
    """Patients of one to eight images in four strata of very different sizes."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(patients):
        stratum = STRATA[min(int(rng.exponential(1.2)), 3)]
        label, subtype, series = stratum
        for k in range(rng.integers(1, 9)):
            records.append(data.Record(f"{i}-{k}", label, "train", f"p{i}", subtype, series, ""))
    return records


def records_of(*patients, split="train", label="A"):
    return [data.Record(f"{split}/{label}/{i}", label, split, p, "", "", "") for i, p in enumerate(patients)]


def deal(records, folds, copies=None):
    """The fold of each record."""
    index = data.number_patients(records, np.arange(len(records)) if copies is None else copies)
    chosen = np.stack([data.is_validation(records, index, folds, fold) for fold in range(folds)])
    assert (chosen.sum(0) == 1).all()  # each image is held out by one fold
    return chosen.argmax(0).tolist()


def test_folds_keep_patients_together_and_strata_even_and_never_change():
    records = many_records()
    folds = deal(records, 10)
    assert len({(r.patient, fold) for r, fold in zip(records, folds)}) == 600
    for stratum in {(r.label, r.subtype, r.series) for r in records}:
        inside = [f for r, f in zip(records, folds) if (r.label, r.subtype, r.series) == stratum]
        counts = [inside.count(k) for k in range(10)]
        assert max(counts) - min(counts) <= 8  # the largest patient
    shuffled = records.copy()
    np.random.default_rng(1).shuffle(shuffled)
    again = dict(zip([r.path for r in shuffled], deal(shuffled, 10)))  # in whatever order the files come
    assert [again[r.path] for r in records] == folds
    # Else earlier runs could not be compared with new ones.
    assert hashlib.sha256("".join(map(str, folds)).encode()).hexdigest()[:16] == "bda192c75a7e91e5"


def test_copies_make_two_patients_one_in_numbers_and_folds():
    records = many_records(60)
    paths, copies = [r.path for r in records], np.arange(len(records))
    copies[paths.index("7-0")] = copies[paths.index("40-0")]
    copies[paths.index("40-1")] = copies[paths.index("21-0")]
    patients = [r.patient for r in records]
    numbers = dict(zip(patients, data.number_patients(records, copies).tolist()))
    assert list(dict.fromkeys(numbers.values())) == list(range(58))  # from 0 in order of appearance
    together, apart = dict(zip(patients, deal(records, 5, copies))), dict(zip(patients, deal(records, 5)))
    for found, n in ((numbers, 1), (together, 1), (apart, 3)):
        assert len({found[patient] for patient in ("p7", "p40", "p21")}) == n


@pytest.mark.parametrize(
    ("folder", "n", "is_small"), [("val", 16, True), ("valid", 98, True), ("validation", 100, False)]
)
def test_a_val_folder_validates_unless_it_is_small(tmp_path, capsys, folder, n, is_small):
    touch(tmp_path, *file_names("train", 0, 40), *file_names(folder, 1000, n), *file_names("test", 5000, 10))
    records = data.find_training(tmp_path)
    chosen = data.is_validation(records, data.number_patients(records, np.arange(40 + n)), 5, 0)
    if is_small:
        assert f"val has only {n} images" in capsys.readouterr().err
        assert {r.split for r in records} == {"train"} and chosen.sum() == pytest.approx(0.2 * len(records), abs=3)
    else:
        assert not capsys.readouterr().err and chosen.tolist() == [r.path.startswith(folder) for r in records]


@pytest.mark.parametrize(("split", "n"), [("test", 10), ("val", 100)])
def test_shared_patients_are_an_error(tmp_path, split, n):
    leak = f"{split}/PNEUMONIA/person7_virus_2.jpeg"
    touch(tmp_path, *file_names("train", 0, 40), *file_names(split, 1000, n), leak)
    with pytest.raises(data.UserError, match=rf"1 patient in both train and {split} .*\(virus-7\)"):
        data.find_training(tmp_path)


ODD_PATIENTS = {
    "images of unknown patients, each counted as a patient, among 2: 1 (train/A/1)": records_of("p", "train/A/1"),
    "more than 5 % of all images; placeholders?: 1 (p)": records_of(*["p"] * 21, "q"),
    "images of several classes: 1 (p)": [*records_of("p", "q"), *records_of("p", label="B")],
    "on both sides of a split; use one spelling: 1 (00017b = 17B)": [
        *records_of("00017b", "8"),
        *records_of("17B", "x8", split="test"),
    ],
    "on both sides of a split; use one spelling: 1 (17 = 17.0)": [*records_of("17"), *records_of("17.0", split="val")],
    "": [*records_of(*["p"] * 20, "1", "10"), *records_of("01x", "100", split="test")],  # nothing odd
}


@pytest.mark.parametrize("message", ODD_PATIENTS)
def test_odd_patients_are_said(capsys, message):
    data.remark_patients(ODD_PATIENTS[message])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(message) and message in "".join(lines)


POSITIVE = {  # classes, what is asked for, the order, whether it is a guess that is said
    "by name": ("Pneumonia normal", None, "normal Pneumonia", False),
    "the last": ("Covid Flu", None, "Covid Flu", True),
    "not one that says negative": ("effusion no_finding", None, "no_finding effusion", True),
    "abnormal is not normal": ("abnormal control", None, "control abnormal", True),
    "against the name": ("NORMAL PNEUMONIA", "NORMAL", "PNEUMONIA NORMAL", False),
    "three classes": ("COVID NORMAL PNEUMONIA VIRAL", None, "COVID NORMAL VIRAL PNEUMONIA", False),
}


@pytest.mark.parametrize("case", POSITIVE)
def test_the_positive_class_is_last(capsys, case):
    names, asked, order, is_guess = POSITIVE[case]
    assert data.sort_classes(names.split(), asked) == order.split()
    assert ("the positive class is a guess" in capsys.readouterr().err) == is_guess
    with pytest.raises(data.UserError, match="--positive X is not one of|--positive is for two classes"):
        data.sort_classes(names.split(), "X")


def test_a_class_of_few_patients_is_said_or_refused(capsys):
    records = [*records_of("p", "q", "r", label="A"), *records_of("s", "s", "t", label="B")]
    deal(records, 3)
    assert "class B has 2 patients for 3 folds" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="class B has too few patients"):
        deal(records, 3, copies=np.array([0, 1, 2, 3, 4, 4]))


# --- read ---


def encoded(kind, image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def read(content, size=None):
    return data.read_image(io.BytesIO(content), size)


PICTURE = np.add.outer(np.linspace(0, 180, 60), np.linspace(0, 75, 90)).round().astype(np.uint8)
PICTURE[5:20, 50:80] //= 3  # no symmetry, so that no flip or turn goes unnoticed
GREY, DEEP, SHARE = Image.fromarray(PICTURE), PICTURE.astype(np.uint16) * 257, (PICTURE / 255).astype(np.float32)


def deepened(bits, picture=PICTURE):
    """The picture's levels on the scale of so many bits."""
    return (picture * ((2**bits - 1) / 255)).round().astype(np.uint16)


def white_is_zero(samples):
    """TIFF bytes with PhotometricInterpretation (262) set from 1 to 0: Pillow writes no such deep file itself."""
    entry, patched = struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0)
    content = encoded("TIFF", samples)
    assert content.count(entry) == 1
    return content.replace(entry, patched)


def twelve_bit_tiff(values):
    """TIFF bytes whose samples take 12 bits each, two of them in three bytes; Pillow only reads such files."""
    height, width = values.shape
    digits = "".join(f"{value:03x}" for value in values.ravel())
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(digits) // 2}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(digits) // 2) + bytes.fromhex(digits) + directory


FORMATS = {  # the picture in another coding, and how far from the 8-bit grey one it may be decoded
    "grey.tiff": (GREY, 0),
    "grey.jp2": (GREY, 0),
    "rgb.webp": (GREY.convert("RGB"), 0),
    "palette.png": (GREY.convert("RGB").quantize(256), 2),
    "cmyk.jpeg": (GREY.convert("CMYK"), 6),
    "16bit.pgm": (Image.fromarray(DEEP), 0),
    "32bit.tiff": (Image.fromarray(PICTURE.astype(np.int32) * 257), 0),
    "float-overshoot.tiff": (Image.fromarray(SHARE * np.float32(255 / 254)), 1),
    "float-signed.tiff": (Image.fromarray(2 * SHARE - 1), 0),
    "white-is-zero.tiff": (white_is_zero(65535 - DEEP), 0),
    "white-is-zero-float.tiff": (white_is_zero(1 - SHARE), 0),
}


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_the_grey_picture(tmp_path, name, size):
    image, tolerance = FORMATS[name]
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, quality=98, lossless=True)
    found, info = data.read_image(tmp_path / name, size)
    reference = GREY.resize((size, size), Image.Resampling.BICUBIC) if size else GREY
    assert np.abs(found.astype(int) - np.asarray(reference)).max() <= tolerance and found.dtype == np.uint8
    assert (info.width, info.height, info.is_mask) == (90, 60, False) and info.colour <= tolerance
    assert data.is_image(tmp_path / name)


@pytest.mark.parametrize("bits", range(8, 17))
def test_any_depth_gives_the_same_grey_levels(bits):
    signed = deepened(bits).astype(np.int32) - 2 ** (bits - 1)
    signed[0, :5], signed[1, :5] = 10**6, -(10**6)  # of 5,400 pixels five are odd, at either end
    for content in (encoded("PNG", deepened(bits)), encoded("TIFF", deepened(bits)), encoded("TIFF", signed)):
        found, info = read(content)
        np.testing.assert_array_equal(found[2:], PICTURE[2:])
        assert info.depth == bits
    large = np.tile(PICTURE, (20, 20))  # 2.2 million pixels are scaled in parts
    np.testing.assert_array_equal(read(encoded("TIFF", deepened(bits, large)))[0], large)


@pytest.mark.parametrize(("value", "n"), [(65535, 1), (20000, 5), (65535, 900)])
@pytest.mark.parametrize("bits", [8, 12, 14])
def test_a_few_odd_pixels_or_a_marker_at_the_extreme_of_the_type_set_no_depth(bits, value, n):
    samples = deepened(bits)
    samples[:10].reshape(-1)[:n] = value
    found, info = read(encoded("PNG", samples))
    np.testing.assert_array_equal(found[10:], PICTURE[10:])
    assert (found[:10].reshape(-1)[:n] == 255).all() and info.depth == bits


def test_a_dark_picture_comes_out_brighter_unless_its_depth_is_known():
    """A third as bright: its own values say 11 bits of 12, and no fewer than 8."""
    dark = deepened(12, PICTURE / 3)
    for content, depth, share in (
        (encoded("TIFF", dark), 11, 2 / 3),
        (encoded("TIFF", dark, tiffinfo={281: 65535}), 11, 2 / 3),  # not a depth but the brightest pixel's
        (encoded("TIFF", dark, tiffinfo={281: 4095}), 12, 1 / 3),
        (twelve_bit_tiff(dark), 12, 1 / 3),
        (encoded("TIFF", dark.astype(np.int32) - 2048), 12, 1 / 3),  # signed samples show it by the lowest
        (encoded("TIFF", deepened(8, PICTURE / 3)), 8, 1 / 3),
        (encoded("PPM", DEEP // 4), 16, 1 / 4),
        (encoded("JPEG2000", DEEP // 4), 16, 1 / 4),
    ):
        found, info = read(content)
        assert info.depth == depth and np.abs(found - PICTURE * share).max() <= 1


def test_a_picture_of_three_grey_levels_is_a_mask_and_one_of_four_is_not():
    for n, is_mask in ((1, True), (2, True), (3, True), (4, False)):
        image = (PICTURE.astype(int) * n // 256 * (255 // n)).astype(np.uint8)
        for content in (encoded("PNG", image), encoded("PNG", image.astype(np.uint16) * 257), encoded("GIF", image)):
            assert read(content, 32)[1].is_mask == is_mask
    bits = GREY.point(lambda level: 255 * (level > 99)).convert("1")
    found, info = data.read_image(bits, 32)
    assert info.is_mask and info.mode == "1"
    np.testing.assert_array_equal(found, bits.convert("L").resize((32, 32), Image.Resampling.BICUBIC))


# From the EXIF standard (where the stored first row and column lie): mirrored or not, quarter turns to the left.
STORED = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 1), 7: (1, 3), 8: (0, 3)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied(orientation, kind):
    exif, (mirrored, turns) = Image.Exif(), STORED[orientation]
    exif[0x0112] = orientation
    samples = np.rot90(np.fliplr(PICTURE) if mirrored else PICTURE, turns)
    samples = deepened(12, samples) if kind == "PNG" else np.ascontiguousarray(samples)
    found, _ = read(encoded(kind, samples, quality=98, exif=exif))
    assert found.shape == (60, 90) and np.abs(found.astype(int) - PICTURE).mean() < 1.5


def test_a_large_jpeg_is_decoded_small_and_alike_however_it_is_handed_over(tmp_path, monkeypatch):
    coarse = np.asarray(Image.fromarray(random_image(0, 100, 130)).resize((1600, 1200), Image.Resampling.BICUBIC))
    full = np.clip(coarse + np.random.default_rng(1).normal(0, 8, (1200, 1600)), 0, 255).astype(np.uint8)
    (path := tmp_path / "x.jpeg").write_bytes(encoded("JPEG", full, quality=90))
    with Image.open(path) as image:
        reference = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    resized, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: resized.append(self.size) or resize(self, *a, **k))
    expected, info = data.read_image(path, 224)
    assert np.abs(expected - reference).mean() < 1.5
    assert set(resized) == {(800, 600)} and (info.width, info.height) == (1600, 1200)
    with open(path, "rb") as file, Image.open(path) as image:
        for source in (str(path), file, image):
            np.testing.assert_array_equal(data.read_image(source, 224)[0], expected)
        image.load()  # the caller's own image is not shrunk, and from now on it is read as it is
        image.paste(0, (0, 0, 1600, 1200))
        assert not file.closed and not data.read_image(image, 224)[0].any()


def test_arrays_and_images_are_read_as_they_are_with_colour_measured_and_transparency_black():
    clear = GREY.convert("RGBA")
    clear.paste((255, 255, 255, 0), (0, 0, 20, 60))
    blackened = PICTURE.copy()
    blackened[:, :20] = 0
    keyed = GREY.copy()  # one grey level means "nothing here"
    keyed.info["transparency"] = 7
    red = np.stack([PICTURE, 0 * PICTURE, 0 * PICTURE], axis=2)
    for source, expected, colour in (
        (PICTURE, PICTURE, 0),
        (GREY.convert("RGB"), PICTURE, 0),
        (clear, blackened, 0),
        (keyed, np.where(PICTURE == 7, 0, PICTURE), 0),
        (red, Image.fromarray(red).convert("L"), PICTURE.mean()),
    ):
        found, info = data.read_image(source, None)
        np.testing.assert_array_equal(found, expected)
        assert found.flags.writeable and (info.width, info.height) == (90, 60)
        assert info.colour == pytest.approx(colour, abs=1)


def png(width, height, depth, colour, content):
    """PNG bytes with what the header claims."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


DEEP_COLOUR = zlib.compress(b"".join(b"\0" + struct.pack(">12H", *range(0, 12 * 300, 300)) for _ in range(4)))
REFUSED = {
    "truncated.jpeg": (encoded("JPEG", random_image(0, 200, 200))[:9000], "truncated"),
    "zero.jpeg": (b"", "empty"),
    "postscript.jpeg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "large.png": (png(11_000, 11_000, 8, 0, b"x"), "11000 x 11000 pixels are more than"),
    "deep-colour.png": (png(4, 4, 16, 2, DEEP_COLOUR), "16 bits a channel"),
    "missing.jpeg": (None, "no such file"),
    "nan.tiff": (encoded("TIFF", np.array([[0.5, np.nan, 1]], np.float32)), "not finite"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_usable_image_is_refused_with_a_reason(tmp_path, monkeypatch, name):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("another program would be started"))
    content, reason = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    image, info = data.read_image(tmp_path / name, 64)
    assert re.search(reason, info.error) and image.shape == (64, 64) and not image.any()


# --- DICOM ---

needs_pydicom = pytest.mark.extra("pydicom")


def dicom(samples, bits, photometric="MONOCHROME2", **fields):
    """A DICOM file of samples [height, width] or [height, width, 3], as bytes; fields are DICOM keywords."""
    import pydicom

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = samples.shape[:2]
    dataset.SamplesPerPixel = 3 if samples.ndim == 3 else 1
    dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = samples.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = int(samples.dtype.kind == "i")
    dataset.PhotometricInterpretation = photometric
    dataset.add_new("PixelData", "OW" if samples.itemsize == 2 else "OB", samples.tobytes())
    for keyword, value in fields.items():
        if keyword == "PixelPaddingValue":
            dataset.add_new(keyword, "US" if value >= 0 else "SS", value)
        else:
            setattr(dataset, keyword, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def stored(bits, signed=0, photometric="MONOCHROME2", picture=PICTURE):
    """The picture as DICOM samples."""
    samples = deepened(bits, picture).astype(np.int64)
    if photometric == "MONOCHROME1":
        samples = 2**bits - 1 - samples
    return (samples - signed * 2 ** (bits - 1)).astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")


@needs_pydicom
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_reads_as_the_grey_picture(bits, signed, photometric):
    samples, middle = stored(bits, signed, photometric), 2 ** (bits - 1) * (1 - signed)
    window = {"WindowCenter": [middle, 7], "WindowWidth": [2**bits, 9]}  # the first is the full range
    rescaled = {"RescaleSlope": 2, "RescaleIntercept": -100}
    low = 2 * (middle - 2 ** (bits - 1)) - 100
    high = low + 2 * (2**bits - 1)
    both = rescaled | {"WindowCenter": (low + high + 1) / 2, "WindowWidth": high - low + 1}
    placeholders = {"WindowCenter": 0, "WindowWidth": 0, "RescaleSlope": None}
    for fields in ({}, window, rescaled, both, {"WindowCenter": None, "WindowWidth": None}, placeholders):
        found, info = read(dicom(samples, bits, photometric, **fields))
        np.testing.assert_array_equal(found, PICTURE)
        assert (info.width, info.height, info.mode, info.depth) == (90, 60, photometric, bits)


@needs_pydicom
@pytest.mark.parametrize("kind", ["u2", "i2"])
@pytest.mark.parametrize("bits", [8, 12, 14])
def test_dicom_that_states_16_bits_is_guessed_unless_it_has_a_window(bits, kind):
    samples = stored(bits, kind == "i2").astype(kind)
    samples[:10, :30] = np.iinfo(kind).max  # a burned-in marker
    window = {"WindowCenter": 0 if kind == "i2" else 2**15, "WindowWidth": 2**16}
    for fields, sign in (({}, 1), ({"RescaleSlope": 2, "RescaleIntercept": -100}, 1), ({"RescaleSlope": -1}, -1)):
        found, info = read(dicom(samples, 16, **fields))
        np.testing.assert_array_equal(found[10:], PICTURE[10:] if sign > 0 else 255 - PICTURE[10:])
        assert info.depth == bits and (found[:10, :30] == (255 if sign > 0 else 0)).all()
    found, info = read(dicom(samples, 16, **window))
    assert np.ptp(found[10:]) <= 2 ** (bits - 8) and info.depth == 16  # a window is taken at its word


WINDOWS = {  # function: its definition in PS3.3 C.11.2.1.2 and C.11.2.1.3, and slope, intercept, center and width
    "LINEAR": (
        lambda x, center, width: (x - (center - 0.5)) / (width - 1) + 0.5,
        [(1, 0, 2000, 1000), (-1, 4095, 2500, 901)],
    ),
    "": (lambda x, center, width: (x - (center - 0.5)) / (width - 1) + 0.5, [(0.5, -300, 400.5, 333)]),
    "LINEAR_EXACT": (lambda x, center, width: (x - center) / width + 0.5, [(0.0001, 0, 0.2, 0.3), (1, 0, 900, 1500)]),
    "SIGMOID": (lambda x, center, width: 1 / (1 + np.exp(-4 * (x - center) / width)), [(1, -1024, 900, 1500)]),
}


@needs_pydicom
@pytest.mark.parametrize("function", WINDOWS)
def test_dicom_windows_follow_their_definitions(function):
    share, cases = WINDOWS[function]
    for slope, intercept, center, width in cases:
        fields = {"RescaleSlope": slope, "RescaleIntercept": intercept, "WindowCenter": center, "WindowWidth": width}
        fields |= {"VOILUTFunction": function} if function else {}
        found, _ = read(dicom(stored(12), 12, **fields))
        expected = 255 * share(stored(12).astype(float) * slope + intercept, center, width).clip(0, 1)
        assert np.abs(found - expected).max() <= 0.5 + 1e-6


@needs_pydicom
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("first", [0, -100])
@pytest.mark.parametrize("name", ["VOILUTSequence", "ModalityLUTSequence"])
def test_dicom_lookup_tables_are_applied_and_their_depth_is_the_range(bits, first, name):
    import pydicom

    curve = (np.linspace(0, 1, 4096) ** 2 * (2**bits - 1) / 2).round().astype(int)  # up to half of the range
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [4096, first, bits])
    item.add_new("LUTData", "US", curve.tolist())
    lookup = {name: pydicom.Sequence([item])}
    fields = {}
    if name == "VOILUTSequence":  # it counts where there is a window too, and is applied after the slope
        fields = {"RescaleSlope": 0.5, "RescaleIntercept": first, "WindowCenter": 1, "WindowWidth": 2}
    samples = stored(12).astype(np.int16)
    samples = samples * np.int16(2) if fields else samples + np.int16(first)
    found, _ = read(dicom(samples, 16, **lookup, **fields))
    assert np.abs(found - curve[stored(12)] * (255 / (2**bits - 1))).max() <= 0.5 + 1e-6


PADDINGS = {  # type, stored bits, the padding's value, header fields
    "signed": ("i2", 16, -32768, {"PixelPaddingValue": -32768}),
    "signed, written as unsigned": ("i2", 16, -2000, {"PixelPaddingValue": 63536}),
    "a range": ("u2", 16, 60001, {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 60002}),
    "white in MONOCHROME1": ("u2", 16, 0, {"PixelPaddingValue": 0, "PhotometricInterpretation": "MONOCHROME1"}),
    "beside a window": ("u2", 12, 4095, {"PixelPaddingValue": 4095, "WindowCenter": 2048, "WindowWidth": 4096}),
}


@needs_pydicom
@pytest.mark.parametrize("case", PADDINGS)
def test_dicom_padding_is_black_and_a_dark_picture_beside_it_stays_dark(case):
    kind, bits, value, fields = PADDINGS[case]
    picture = (PICTURE.clip(1, 254) + 20) * 0.6 if bits == 16 else PICTURE.clip(1, 254) // 4
    samples = stored(12, 0, fields.get("PhotometricInterpretation", ""), picture).astype(kind)
    samples[:25] = value
    found, _ = read(dicom(samples, bits, **fields))
    assert not found[:25].any() and np.abs(found[25:] - picture[25:]).max() <= 0.6


@needs_pydicom
def test_dicom_of_many_frames_of_colour_and_compressed():
    import pydicom

    frames = np.stack([PICTURE, 255 - PICTURE])
    np.testing.assert_array_equal(read(dicom(PICTURE, 8, NumberOfFrames=2, PixelData=frames.tobytes()))[0], PICTURE)
    red = np.stack([PICTURE, 0 * PICTURE, 0 * PICTURE], axis=2)
    np.testing.assert_array_equal(read(dicom(red, 8, "RGB"))[0], Image.fromarray(red).convert("L"))
    syntaxes = {"JPEGBaseline8Bit": ("JPEG", PICTURE, 8), "JPEG2000Lossless": ("JPEG2000", DEEP, 16)}
    for syntax, (kind, samples, bits) in syntaxes.items():
        dataset = pydicom.dcmread(io.BytesIO(dicom(samples, bits)))
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        options = {"quality": 98} if kind == "JPEG" else {"no_jp2": True}
        dataset.PixelData = pydicom.encaps.encapsulate([encoded(kind, samples, **options)])
        dataset["PixelData"].VR = "OB"
        dataset.save_as(file := io.BytesIO())
        assert np.abs(data.read_image(file, None)[0].astype(int) - PICTURE).max() <= 6


@needs_pydicom
def test_dicom_is_known_by_its_content(tmp_path):
    import pydicom

    content = dicom(stored(12), 12, PatientID="Miller", ViewPosition="LL")
    kinds = [content, content[132:]]  # as some programs export it: without the preamble
    for is_implicit in (True, False):  # and without the group that says how the rest is written
        buffer = pydicom.filebase.DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, is_implicit
        pydicom.filewriter.write_dataset(buffer, pydicom.dcmread(io.BytesIO(content)))
        kinds.append(buffer.getvalue())
    for kind, name in itertools.product(kinds, ("x.dcm", "x.IMA", "x", "1.2.840.7", "x.jpeg")):
        path = touch(tmp_path, f"train/A/{name}") / f"train/A/{name}"
        path.write_bytes(kind)
        found, info = data.read_image(path, None)
        np.testing.assert_array_equal(found, PICTURE)
        (record,) = data.scan(tmp_path, "train")
        assert record.known_patient and info.view == "LL"
        path.unlink()


@needs_pydicom
def test_the_patient_is_named_by_table_header_and_file_name_in_this_order(tmp_path):
    """A header is hashed, so that nothing of it is written anywhere."""
    (tmp_path / "train/A").mkdir(parents=True)
    for i, patient in enumerate(("Miller 1970", "Miller 1970", "Miller 1971", "", None, "anonymous", "0")):
        content = dicom(stored(12), 12, PatientID=patient, PatientName="Miller^Ann")
        (tmp_path / f"train/A/IM-000{i}-0001.dcm").write_bytes(content)
    patients = [r.patient for r in data.scan(tmp_path, "train")]
    assert patients[0] == patients[1] != patients[2] and "Miller" not in str(data.scan(tmp_path, "train"))
    assert all(len(bytes.fromhex(patient)) == 8 for patient in patients[:3])
    assert patients[3:] == ["IM-3", "IM-4", "IM-5", "IM-6"]
    table(tmp_path, "file_name,patient\ntrain/A/IM-0000-0001.dcm,p\ntrain/A/IM-0001-0001.dcm,none\n")
    assert [r.patient for r in data.scan(tmp_path, "train")] == ["p", *patients[1:]]


UNREADABLE = {  # what the reason says, and the header fields
    "PALETTE COLOR": {"PhotometricInterpretation": "PALETTE COLOR"},
    "not finite": {"RescaleSlope": "nan"},
    "VOI LUT Function": {"WindowCenter": 5, "WindowWidth": 30, "VOILUTFunction": "CUBIC"},
    "up to bit 14": {"HighBit": 14},
    "cannot be decoded": {"Rows": 9999},
    "pixels are more than": {"Rows": 60_000, "Columns": 60_000},
}


@needs_pydicom
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("reason", UNREADABLE)
def test_dicom_that_cannot_be_shown_right_is_refused_by_name(reason):
    assert reason in read(dicom(stored(12), 12, **UNREADABLE[reason]))[1].error


@needs_pydicom
def test_dicom_without_an_image_or_without_pydicom_is_refused(monkeypatch):
    content = dicom(stored(12), 12)
    report = content.replace(b"\xe0\x7f\x10\x00", b"\xe0\x7f\x11\x00")
    for damaged in (report, bytes(128) + b"DICM" + b"\1\n" * 99):
        assert "without an image" in read(damaged)[1].error
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in read(content)[1].error


# --- cache ---


def load(root, size=16):
    data.read_folder.cache_clear()  # as a new process would start
    return data.read_folder(root, False, size)


def decoded(root, size=16):
    return np.stack([data.read_image(root / r.path, size)[0] for r in data.scan(root, "train")])


def test_a_second_call_decodes_nothing(tmp_path, monkeypatch):
    root = tree(tmp_path / "d")
    first = load(root)
    np.testing.assert_array_equal(first.images, decoded(root))
    assert first.images.dtype == torch.uint8 and first.hashes.dtype == np.uint64 and first.hashes.shape == (6, 4)
    digests = [data.sha256(root / r.path)[:16] for r in first.records]
    assert first.fingerprint == data.fingerprint(first.records, digests)
    monkeypatch.setattr(data, "read_image", lambda *_, **__: pytest.fail("decoded again"))
    again = load(root)
    assert torch.equal(again.images, first.images) and (again.hashes == first.hashes).all()
    assert again.fingerprint == first.fingerprint and again.left_out == first.left_out == {}
    monkeypatch.setattr(data, "READER_VERSION", data.READER_VERSION + 1)
    with pytest.raises(pytest.fail.Exception):
        load(root)


DAMAGES = {
    "end missing": lambda stored: stored[:-3],
    "one bit": lambda stored: stored[:1000] + bytes([stored[1000] ^ 1]) + stored[1001:],
    "a digest": lambda stored: stored.replace(b'"digest": "', b'"digest": "0', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt(tmp_path, capsys, damage):
    root = tree(tmp_path / "d")
    first = load(root)
    (path,) = (root / ".cache").iterdir()
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()  # the old file stays mapped
    path.write_bytes(content)
    leftover = root / ".cache" / f".{path.name}.1.tmp"  # of a build that was killed
    leftover.write_bytes(b"x")
    os.utime(leftover, (0, 0))
    again = load(root)
    assert torch.equal(again.images, first.images) and again.fingerprint == first.fingerprint
    assert "damaged: decoding again" in capsys.readouterr().err
    assert list((root / ".cache").iterdir()) == [path]


def repaint(root, shift=0):
    """Other pixels under the same name and in as many bytes."""
    path = next((root / "train/NORMAL").iterdir())
    before = path.stat()
    Image.fromarray(random_image(77)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + shift))
    assert path.stat().st_size == before.st_size


CHANGES = {
    "another time": lambda root: repaint(root, shift=1),
    "size and time kept": repaint,
    "one more": lambda root: save(root, {"train/NORMAL/IM-0900-0001.png": random_image(99)}),
    "one less": lambda root: next((root / "train/NORMAL").iterdir()).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_decoded_again(tmp_path, change):
    root = tree(tmp_path / "d")
    load(root), load(root, size=8)
    CHANGES[change](root)
    np.testing.assert_array_equal(load(root).images, decoded(root))
    # The outdated file is gone, the other size stays.
    assert sorted(path.name.split("-v")[0] for path in (root / ".cache").iterdir()) == ["train-16", "train-8"]


def test_an_interrupted_build_leaves_nothing_and_what_failed_for_a_moment_is_read_again(tmp_path, monkeypatch):
    root, read_image = tree(tmp_path / "d"), data.read_image

    def interrupted(path, *_, **__):
        raise KeyboardInterrupt

    def failing(path, *rest, **options):
        image, info = read_image(path, *rest, **options)
        info.error = "a stale file handle" if "IM-1-" in str(path) else ""
        return image, info

    with monkeypatch.context() as m:
        m.setattr(data, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(root)
        assert not list((root / ".cache").iterdir())
        m.setattr(data, "read_image", failing)
        assert [item["reason"] for item in load(root).left_out.values()] == ["a stale file handle"]
    again = load(root)
    assert not again.left_out
    np.testing.assert_array_equal(again.images, decoded(root))


def test_a_cache_that_cannot_be_beside_the_data_goes_to_the_users_folder(tmp_path, monkeypatch, capsys):
    root = touch(tree(tmp_path / "d"), ".cache")  # a file where the folder should be: stops root as well
    np.testing.assert_array_equal(load(root).images, decoded(root))
    assert f"no image cache in {root}/.cache" in capsys.readouterr().err
    load(root)
    assert not capsys.readouterr().err  # the second start takes it from there
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / ".cache"))
    with pytest.raises(data.UserError, match="set XDG_CACHE_HOME"):
        load(root)


def test_what_cannot_be_used_is_reported_by_both_calls_and_is_not_a_copy(tmp_path, capsys):
    root = tree(tmp_path / "d")
    bad = [f"train/NORMAL/IM-8{i:02}-0001.jpeg" for i in range(4)]
    mask = "train/PNEUMONIA/person1_virus_9.png"
    save(touch(root, *bad), {mask: np.eye(20, dtype=np.uint8)})
    first, second = load(root), load(root)
    reasons = dict.fromkeys(bad, "not an image of a known format")
    reasons[mask] = "a mask or drawing: at most three grey levels"
    items = [{"path": path, "reason": reason} for path, reason in reasons.items()]
    assert list(first.left_out.values()) == items and first.left_out == second.left_out
    assert all(first.records[i].path == item["path"] for i, item in first.left_out.items())
    assert len(np.unique(first.copies)) == len(first.records)
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"left out, can't be used: 5 ({bad[0]}: not an image" in line for line in lines) == 2


def test_mixed_depths_are_said_at_each_start(tmp_path, capsys):
    root = tree(tmp_path / "d")
    load(root)
    assert not capsys.readouterr().err
    save(touch(root, "train/NORMAL/IM-904-1.png"), {"train/NORMAL/IM-902-1.png": deepened(12, random_image(2))})
    for _ in range(2):
        load(root)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "several depths" in line]
        assert "6 of 8 bits, 1 of 12 bits" in line


def test_the_fingerprint_is_of_files_paths_labels_and_splits(tmp_path):
    root = tree(tmp_path / "d")
    shutil.copytree(root, tmp_path / "copy")
    before = load(root)
    assert load(tmp_path / "copy", 8).fingerprint == before.fingerprint
    digests = [data.sha256(root / r.path)[:16] for r in before.records]
    assert data.fingerprint(before.records, digests) == before.fingerprint
    for name in ("path", "label", "split"):
        changed = data.scan(root, "train")
        setattr(changed[0], name, "x")
        assert data.fingerprint(changed, digests) != before.fingerprint
    repaint(root)
    assert load(root).fingerprint != before.fingerprint


# --- change ---

SMOOTH = Image.fromarray(random_image(3, 8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
X, BILINEAR = torch.from_numpy(np.asarray(SMOOTH).copy())[None, None] / 255, InterpolationMode.BILINEAR
INSIDE, ALL = (..., slice(12, 52), slice(12, 52)), ...


def resized(x, *sides, antialias=False):
    for side in sides:
        x = TF.resize(x, [side, side], BILINEAR, antialias=antialias and side < x.shape[-1])
    return x


OPERATIONS = {  # operation, parameters, the same by torchvision, where it is compared
    "brightness": (data.brightness, {"factor": 1.4}, lambda x: TF.adjust_brightness(x, 1.4), ALL),
    "contrast": (data.contrast, {"factor": 1.4}, lambda x: TF.adjust_contrast(x, 1.4), ALL),
    "gamma": (data.gamma, {"exponent": 1.7}, lambda x: TF.adjust_gamma(x, 1.7), ALL),
    "lower resolution": (data.lower_resolution, {"factor": 0.5}, lambda x: resized(x, 32, 64, antialias=True), ALL),
    "smaller": (data.resample, {"size": 32, "width": 1.0, "height": 1.0}, lambda x: resized(x, 32), ALL),
    "window": (  # 48 x 32 pixels from (row 12, column 12) on
        data.resample,
        {"size": 64, "width": 0.75, "height": 0.5, "right": 4 / 64, "down": -4 / 64},
        lambda x: TF.resized_crop(x, 12, 12, 32, 48, [64, 64], BILINEAR, False),
        INSIDE,
    ),
    "turn to the left": (
        data.resample,
        {"size": 64, "width": 1.0, "height": 1.0, "turn": 20.0},
        lambda x: TF.rotate(x, 20, BILINEAR),
        INSIDE,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvision_by_numbers_and_by_tensors(name):
    operation, parameters, reference, where = OPERATIONS[name]
    changed = operation(X.clone(), **parameters)
    torch.testing.assert_close(changed[where], reference(X)[where], atol=1e-4, rtol=0)
    if operation is data.lower_resolution:  # the stress test alone uses it, with a number
        return
    each = {k: torch.tensor([v, v]) if isinstance(v, float) else v for k, v in parameters.items()}
    torch.testing.assert_close(operation(torch.cat([X, X.flip(3)]), **each)[:1], changed, atol=1e-6, rtol=0)


def test_outside_of_the_image_its_edge_is_repeated():
    x = torch.zeros(1, 1, 40, 40)
    x[..., -1] = 1
    wider = data.resample(x, 40, 2.0, 2.0)
    assert (wider[..., 30:] == 1).all() and not wider[..., :29].any()


def test_only_the_chosen_images_are_flipped():
    x = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    flipped = data.flip(x.clone(), torch.tensor([True, False, True]))
    assert torch.equal(flipped, torch.stack([x[0].flip(2), x[1], x[2].flip(2)]))


def test_noise_has_the_standard_deviation_that_it_says():
    x, start = torch.full((4, 1, 96, 96), 0.5), torch.tensor([500_000, 1000, 2000, 999_999])
    change = data.noise(x.clone(), torch.tensor([0, 0.02, 0.04, 0.02]), start) - x
    assert torch.equal(change[0], torch.zeros(1, 96, 96))
    for i, sd in ((1, 0.02), (2, 0.04), (3, 0.02)):
        assert change[i].mean().abs() < 0.001 and change[i].std() == pytest.approx(sd, rel=0.05)
    assert abs(np.corrcoef(change[1].flatten(), change[3].flatten())[0, 1]) < 0.05  # another place in the normals
    torch.testing.assert_close(data.noise(x.clone(), 0.02, start)[1], x[1] + change[1])


def test_the_border_comes_from_the_image_before_or_from_others():
    x = torch.stack([torch.full((1, 100, 100), v) for v in (0.1, 0.5, 0.9)])
    changed = data.exchange_border(x.clone(), torch.tensor([0.04, 0.18, 0]))
    for i, (width, border) in enumerate(((4, 0.9), (18, 0.1), (0, None))):
        inside = changed[i, 0, width : 100 - width, width : 100 - width]
        assert inside.unique().tolist() == x[i].unique().tolist()
        assert width == 0 or changed[i, 0, width - 1, 50] == changed[i, 0, 50, -width] == pytest.approx(border)
    others = data.exchange_border(x.clone(), 0.1, torch.zeros_like(x))
    assert not others[:, :, :10].any() and torch.equal(others[..., 10:90, 10:90], x[..., 10:90, 10:90])


BATCH = torch.from_numpy(np.stack([random_image(i, 40, 40) for i in range(12)]))


def apply(operations, images=BATCH, seed=0):
    return data.augment(images, operations, data.draw_numbers(operations, len(images), seed, 0))


DRAWN = {  # what each operation of robust draws: parameter, lowest, median and largest
    "exchange_border": {"width": (0, 0.08, 0.18)},
    "resample": {
        "width": (0.26, 0.74, 1),
        "height": (0.26, 0.74, 1),
        "right": (-0.37, 0, 0.37),
        "down": (-0.37, 0, 0.37),
    },
    "flip": {"chosen": (0, 0.5, 1)},
    "brightness": {"factor": (0.7, 1, 1.3)},
    "contrast": {"factor": (0.7, 1, 1.3)},
    "gamma": {"exponent": (0.67, 1, 1.49)},
    "noise": {"sd": (0, 0, 0.05), "start": (0, 2**19, 2**20)},
}


def test_robust_draws_the_parameters_that_it_says_and_medium_the_same_without_border_and_noise():
    operations = data.preset("robust", 32)
    assert [operation.__name__ for operation, _ in operations] == list(DRAWN)
    names = [operation.__name__ for operation, _ in data.preset("medium", 32)]
    assert names == [name for name in DRAWN if name not in ("exchange_border", "noise")]
    for (operation, draw), u in zip(operations, data.draw_numbers(operations, 20_000, 0, 0)):
        parameters = draw(u)
        for name, (low, middle, high) in DRAWN[operation.__name__].items():
            drawn = parameters[name].double()
            centre = drawn.mean() if name == "chosen" else drawn.median()
            found = [value.item() for value in (drawn.min(), centre, drawn.max())]
            assert found == pytest.approx([low, middle, high], abs=0.03 * (high - low)), (operation, name)
        if operation is data.resample:
            area, aspect = (parameters["width"] * parameters["height"]), parameters["width"] / parameters["height"]
            assert 0.079 < area.min() < 0.1 and 0.74 < aspect.min() < 0.76 and 1.31 < aspect.max() < 1.34
            assert (parameters["right"].abs() <= (1 - parameters["width"]) / 2 + 1e-6).all()  # within the image


def test_each_image_gets_a_crop_of_its_own():
    """Of a ramp from black to white a crop shows a part, in another place and size for each image."""
    crop = data.preset("medium", 32)[:1]
    images = torch.linspace(0, 255, 64).byte().expand(200, 64, 64)
    x = data.augment(images, crop, data.draw_numbers(crop, 200, 0, 1))
    width = x.amax((1, 2, 3)) - x.amin((1, 2, 3))
    assert 0.25 < width.min() < 0.45 and 0.95 < width.max() <= 1 and 0.6 < width.mean() < 0.8
    assert x.mean((1, 2, 3)).std() > 0.05


@pytest.mark.parametrize("name", data.PRESETS)
def test_presets_keep_shape_and_range_and_each_operation_changes_something(name):
    operations, before = data.preset(name, 32 if name != "none" else 40), BATCH.clone()
    numbers = data.draw_numbers(operations, 12, 0, 0)
    whole = data.augment(BATCH, operations, numbers)
    assert whole.shape == (12, 1, *[32 if operations else 40] * 2) and torch.equal(BATCH, before)
    assert operations or torch.equal(whole, BATCH[:, None].float() / 255)
    for number in (0.0, 0.99999):
        extreme = data.augment(BATCH, operations, [torch.full((12, data.NUMBERS), number) for _ in operations])
        assert extreme.min() >= 0 and extreme.max() <= 1 and not extreme.isnan().any()
    for i, (operation, _) in enumerate(operations):
        without = data.augment(BATCH, operations[:i] + operations[i + 1 :], numbers[:i] + numbers[i + 1 :])
        assert without.shape != whole.shape or (without - whole).abs().mean() > 0.003, operation


def test_what_an_image_becomes_depends_on_its_own_numbers_alone():
    twins = apply(data.preset("robust", 32), BATCH[:1].expand(12, -1, -1))
    assert len({twin.numpy().tobytes() for twin in twins}) == 12  # each has its own random numbers
    alone = [line for line in data.preset("robust", 32) if line[0] is not data.exchange_border]
    numbers = data.draw_numbers(alone, 12, 0, 0)
    parts = [data.augment(BATCH[i : i + 1], alone, [u[i : i + 1] for u in numbers]) for i in range(12)]
    torch.testing.assert_close(torch.cat(parts), data.augment(BATCH, alone, numbers), atol=1e-6, rtol=0)


def darken(x, share):
    """An operation as a user adds one."""
    return x * (1 - data.column(share))


def test_another_operation_changes_no_others_numbers():
    line = (darken, lambda u: {"share": 0.2 * u[:, 0]})
    before = data.preset("medium", 32)
    numbers = data.draw_numbers([line, *before[:2], line, *before[2:]], 12, 3, 7)
    assert all(map(torch.equal, data.draw_numbers(before, 12, 3, 7), numbers[1:3] + numbers[4:]))
    assert not torch.equal(numbers[0], numbers[1])
    darker = data.augment(BATCH, [line], [numbers[0]])
    torch.testing.assert_close(darker, BATCH[:, None] / 255 * (1 - 0.2 * numbers[0][:, 0].view(-1, 1, 1, 1)))


def test_random_numbers_are_a_function_of_seed_and_epoch_and_never_change():
    def both(seed, epoch):
        return *data.draw_numbers(data.preset("robust", 32), 50, seed, epoch), data.shuffle(50, seed, epoch)

    first, state = both(3, 4), torch.get_rng_state()
    torch.manual_seed(99)  # the global generator must play no part
    assert all(map(torch.equal, first, both(3, 4)))
    for other in ((3, 5), (4, 4), (4, 3)):
        assert not any(map(torch.equal, first, both(*other)))
    torch.set_rng_state(state)
    assert 0 <= first[0].min() and first[0].max() < 1
    assert sorted(first[-1].tolist()) == list(range(50)) != first[-1].tolist()
    # Else earlier runs could not be compared with new ones.
    torch.testing.assert_close(both(5, 2)[1][0, 0].item(), 0.876353, atol=1e-4, rtol=0)


def test_the_model_sees_normalised_levels():
    preprocessing = {"input_size": 40, "mean": 0.4, "std": 0.2, "more": "keys of a checkpoint"}
    torch.testing.assert_close(
        data.normalise(data.to_float(BATCH), preprocessing), (BATCH[:, None].float() / 255 - 0.4) / 0.2
    )


LEVELS = {  # of the halves of a picture of 100 and 200, far from the edge between them
    "brightness x 0.65": (65, 130),
    "brightness x 1.4": (140, 255),
    "contrast x 0.65": (118, 182),  # 150 -+ 32.5
    "contrast x 1.4": (80, 220),
    "gamma 0.7": (132, 215),  # 255 (100 / 255) ^ 0.7 = 132.4
    "gamma 1.4": (69, 181),
    **dict.fromkeys(("blur", "half resolution", "crop of 85 %", "JPEG quality 30"), (100, 200)),
}
EDGES = {  # the column where the brighter half begins, in the first and in the last row, and the number of black rows
    "zoomed out to 115 %": (80, 80, 35),
    "shifted by 7 %": (91, 91, 19),
    "turned by 7 degrees": (70, 90, 16),
    "turned by -7 degrees": (90, 70, 16),
    "stretched by 15 %": (80, 80, 16),
    "crop of 85 %": (80, 80, 0),
}


def test_stress_changes_what_it_says():
    images = torch.full((2, 160, 160), 100, dtype=torch.uint8)
    images[:, :, 80:] = 200
    images[1, :8] = images[1, -8:] = 0  # rows that the central 85 % leave out
    before = images.clone()
    copies = dict(data.stress(images, torch.full_like(images, 7), ["a.png", "b.png"]))
    assert len(copies) == 18 and torch.equal(images, before)
    assert all(c.shape == images.shape and c.dtype == torch.uint8 for c in copies.values())
    assert all(not torch.equal(c, images) for c in copies.values())
    for name, levels in LEVELS.items():
        assert (copies[name][0, 80, 8].item(), copies[name][0, 80, -9].item()) == pytest.approx(levels, abs=1), name
    for name, (first, last, n_black) in EDGES.items():
        is_bright = (copies[name][0] > 150).byte()
        n = (copies[name][1, :, 80] < 50).sum().item()
        assert (is_bright[0].argmax().item(), is_bright[-1].argmax().item(), n) == pytest.approx(
            (first, last, n_black), abs=1
        )
    assert copies["blur"][0, 80].unique().numel() > 2  # the edge is no longer sharp
    for sd in (0.02, 0.05):
        change = copies[f"noise {sd}"].float() - images.float()
        assert change[0].std() == pytest.approx(255 * sd, rel=0.1) and change[0].mean().abs() < 1
    exchanged = copies["border exchanged"][0]
    assert torch.equal(exchanged[16:-16, 16:-16], images[0, 16:-16, 16:-16])
    assert exchanged[:16].unique().tolist() == exchanged[:, -16:].unique().tolist() == [7]
    # The noise of an image is its own, whatever lies beside it; without partners there is no exchange.
    alone = dict(data.stress(images[1:], None, ["b.png"]))
    assert len(alone) == 17 and torch.equal(alone["noise 0.05"][0], copies["noise 0.05"][1])
    assert not torch.equal(copies["noise 0.05"][0, 80], copies["noise 0.05"][1, 80])


def test_partners_are_of_another_class_and_a_function_of_the_path():
    records = many_records(60)
    partners = data.draw_partners(records)
    assert all(records[j].label != r.label for r, j in zip(records, partners.tolist()))
    assert len(partners.unique()) > 30 and torch.equal(partners, data.draw_partners(records))
    assert data.draw_partners(records_of("p", "q")) is None


# --- copies and shortcuts ---


def texture(seed):
    """Something smooth, as a radiograph is."""
    return np.asarray(Image.fromarray(random_image(seed, 12, 12)).resize((240, 240), Image.Resampling.BICUBIC))


def differing(a, b):
    a, b = (np.frombuffer(data.difference_hash(Image.fromarray(image)), np.uint8) for image in (a, b))
    return np.bitwise_count(a ^ b).sum()


def test_the_hash_survives_what_copying_does_and_differs_between_images():
    images = [texture(seed) for seed in range(20)]
    for image in images:
        copies = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for size in ((120, 120), (300, 200))]
        for copy in (
            *map(np.asarray, copies),
            read(encoded("JPEG", image, quality=30))[0],
            (image * 0.8).astype(np.uint8),
        ):
            assert differing(image, copy) <= data.SAME
        assert differing(image, image[:, ::-1]) > 60 and differing(image, image[::-1]) > 60
    assert min(differing(a, b) for a, b in itertools.combinations(images, 2)) > 60


def flip_bits(hashes, row, bits):
    """One of the hashes with so many of its bits changed."""
    changed = np.unpackbits(hashes[row].view(np.uint8))
    changed[np.random.default_rng(row).permutation(256)[:bits]] ^= 1
    return np.packbits(changed).view(np.uint64)


def test_copies_are_found_up_to_the_limit_across_blocks_and_through_others():
    hashes = np.random.default_rng(0).integers(0, 2**64, (9000, 4), dtype=np.uint64)
    hashes[8999] = flip_bits(hashes, 3, data.SAME)  # a copy
    hashes[8998] = flip_bits(hashes, 4, data.SAME + 1)  # none
    hashes[8997] = ~hashes[5]  # all bits differ
    hashes[5000] = hashes[71] = hashes[70]
    hashes[7000] = flip_bits(hashes, 8999, data.SAME)  # a copy of a copy
    groups = data.copy_groups(hashes)
    assert groups[3] == groups[8999] == groups[7000] and groups[70] == groups[71] == groups[5000]
    assert len(np.unique(groups)) == 9000 - 4 and len(data.copy_groups(hashes[:0])) == 0


def test_what_was_seen_before_is_found_by_image_and_by_patient():
    hashes = np.random.default_rng(0).integers(0, 2**64, (5, 4), dtype=np.uint64)
    old = np.stack([flip_bits(hashes, 1, 5), hashes[3]])
    seen = {"patients": ["p", "r", "train/A/2"], "hashes": torch.from_numpy(old.view(np.int64))}
    records = records_of("o", "p", "train/A/2", "q", "s")  # the third names no patient
    is_copy, patients = data.seen_before(records, hashes, seen)
    assert is_copy.tolist() == [False, True, False, True, False] and patients == {"p"}
    nothing = {"patients": [], "hashes": torch.empty(0, 4, dtype=torch.int64)}
    assert not data.seen_before(records, hashes, nothing)[0].any()


def test_border_features_see_no_lung():
    images = torch.zeros(1, 160, 160, dtype=torch.uint8)
    images[:, 15:145, 15:145] = 255
    assert data.border_features(images).shape == (1, 348) and data.border_features(images).max() == 0
    images[:, :5] = 255  # one row of the thumbnail
    assert data.border_features(images).sum() == 32


# --- the demo set ---


@pytest.fixture(scope="module")
def large_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "demo"
    data.draw_demo(folder, images=1000, seed=0)
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_demo_set_is_a_function_of_the_seed_and_overwrites_nothing(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.draw_demo(tmp_path / name, images=40, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and all(a[name] != c[name] for name in a)
    for folder in (tmp_path / "a", touch(tmp_path, "file") / "file"):
        with pytest.raises(data.UserError, match="not an empty folder"):
            data.draw_demo(folder, images=40, seed=1)
    assert contents(tmp_path / "a") == a


def test_two_processes_may_draw_the_demo_set_at_once(tmp_path, monkeypatch):
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda new, folder: (shutil.copytree(new, folder), rename(new, folder)))
    data.draw_demo(tmp_path / "demo", images=40)  # the other process was first
    assert data.is_demo(tmp_path / "demo") and [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_the_demo_set_is_drawn_where_data_are_missing_and_announced(tmp_path, monkeypatch, capsys):
    draw_demo = data.draw_demo
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "draw_demo", lambda root: draw_demo(root, images=40))
    data.prepare_demo(tmp_path)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err
    data.prepare_demo(data.find_root(None))
    assert len(data.scan(data.DEMO_ROOT)) == 40 and "DEMO DATA" in capsys.readouterr().err


def test_the_demo_set_is_sound_and_a_histogram_does_not_show_its_class(large_demo):
    records = data.scan(large_demo)
    assert len(records) == 1000 and all(r.known_patient for r in records) and not data.shared_patients(records)
    assert set(Counter(r.patient for r in records).values()) == {2}
    kinds = {("NORMAL", ""), ("PNEUMONIA", "bacterial"), ("PNEUMONIA", "viral")}
    assert {(r.label, r.subtype) for r in records} == kinds
    images = [data.read_image(large_demo / r.path, None)[0] for r in records]
    histograms = [np.histogram(image, 32, (0, 256))[0] / image.size for image in images]
    is_ill = np.array([r.label == "PNEUMONIA" for r in records])
    options = {"groups": [r.patient for r in records], "cv": StratifiedGroupKFold(5), "method": "predict_proba"}
    probabilities = cross_val_predict(HistGradientBoostingClassifier(random_state=0), histograms, is_ill, **options)
    assert roc_auc_score(is_ill, probabilities[:, 1]) < 0.75


# --- check ---


def draw(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (48, 40), dtype=np.uint8)).save(path, quality=90)


def plain(root, n=40, ending="png"):
    """Noise under both classes: nothing separates them."""
    rng = np.random.default_rng(0)
    for i in range(n):
        draw(root / f"train/NORMAL/NORMAL-{i}-0001.{ending}", rng)
        draw(root / f"train/PNEUMONIA/BACTERIA-{1000 + i}-0001.{ending}", rng)
    return root


def test_the_demo_set_has_no_problem(large_demo):
    report = data.check(large_demo)
    assert report["problems"] == report["warnings"] == {} and len(report["audit"]) == 2
    for row in report["audit"]:
        a, n, m = row["auroc"], 133, 267  # training patients
        q1, q2 = a / (2 - a), 2 * a * a / (1 + a)  # Hanley and McNeil 1982
        half = 1.96 * math.sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (n * m))
        assert a < 0.6 and row["ci95"] == pytest.approx([a - half, a + half])
    for split in ("train", "test"):
        records = data.scan(large_demo, split)
        digests = [data.sha256(large_demo / r.path)[:16] for r in records]
        assert report["fingerprints"][split] == data.fingerprint(records, digests)


def mark_corner(path):
    image = np.array(Image.open(path))
    image[-6:, -12:] = 255
    Image.fromarray(image).save(path)


def make_deep(path):
    Image.fromarray(np.array(Image.open(path)).astype(np.uint16) * 257).save(path)


def pad_file(path):
    path.write_bytes(path.read_bytes() + bytes(500))  # Pillow ignores what follows the image


MARKS = {  # how the images of one class are changed, their ending, what separates the classes then
    "corner": (mark_corner, "png", ["border"]),
    "bytes of JPEG": (pad_file, "jpeg", ["file"]),
    "bytes of PNG, which depend on the picture": (pad_file, "png", []),
    "colour": (lambda path: Image.open(path).convert("RGB").save(path), "png", ["file"]),
    "depth": (make_deep, "png", ["file"]),
}


@pytest.mark.parametrize("case", MARKS)
def test_the_audit_finds_what_marks_one_class(tmp_path, case):
    change, ending, found = MARKS[case]
    root = plain(tmp_path / "d", 60, ending)
    for path in sorted((root / "train" / "PNEUMONIA").iterdir()):
        change(path)
    report = data.check(root)
    said = [line.split()[1] for line in report["warnings"] if "separates NORMAL from PNEUMONIA with AUROC" in line]
    assert said == found == [row["from"].split()[1] for row in report["audit"] if row["auroc"] > 0.95]


def test_check_counts_and_measures(tmp_path):
    root = plain(tmp_path / "d", 4)
    shutil.copy(root / "train/NORMAL/NORMAL-0-0001.png", root / "train/NORMAL/NORMAL-0-0002.png")  # of one patient
    flat = np.repeat(np.array([100, 140, 100, 140], np.uint8), 10) + np.arange(20, dtype=np.uint8)[:, None] % 5
    save(root, {"test/NORMAL/own.png": flat, "test/PNEUMONIA/VIRUS-2000-0001.png": random_image(1)})
    report = data.check(root)
    assert report["problems"] == {} and report["audit"] == [] and not report["demo"]
    train, test = report["folders"]["train/NORMAL"], report["folders"]["test/NORMAL"]
    assert (train["images"], train["patients"], train["unknown patients"]) == (5, 4, 0)
    assert report["folders"]["train/PNEUMONIA"]["bacterial"] == 4
    assert test["unknown patients"] == 1 and test["mode L, 8 bits"] == 1
    measures = {"width": 40, "height": 20, "aspect": 2, "brightness": 122, "contrast": math.hypot(20, math.sqrt(2))}
    measures["bytes per pixel"] = (root / "test/NORMAL/own.png").stat().st_size / 800
    for name, value in measures.items():
        assert test[name] == pytest.approx([value] * 3, rel=0.01), name  # the contrast is of the resized image
    assert json.loads(json.dumps(report)) == report


NORMAL = "train/NORMAL/NORMAL-0-0001.png"
FINDINGS = {  # where a darker copy of NORMAL is put, which kind of finding it is, and its message
    "same patient": ("train/NORMAL/NORMAL-0-0002.png", None, ""),
    "unknown patient": ("train/NORMAL/own.png", "warnings", "copies under several patients, counted as one"),
    "other patient": ("train/NORMAL/NORMAL-9-0001.png", "warnings", "copies under several patients, counted as one"),
    "other class": ("train/PNEUMONIA/NORMAL-0-0001.png", "problems", "copies under several labels"),
    "other split": ("test/NORMAL/NORMAL-9-0001.png", "problems", "copies across splits"),
    "shared patient": ("test/NORMAL/NORMAL-0-0002.png", "problems", "patients in both train and test"),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_check_finds_copies_and_leaks(tmp_path, case):
    root, (place, kind, message) = plain(tmp_path / "d", 3), FINDINGS[case]
    for i, label in enumerate(("NORMAL", "PNEUMONIA")):
        draw(root / f"test/{label}/VIRUS-{3000 + i}-0001.png", np.random.default_rng(7 + i))
    save(root, {place: (np.asarray(Image.open(root / NORMAL)) * 0.8).astype(np.uint8)})
    report = data.check(root)
    if kind is None:
        assert report["problems"] == report["warnings"] == {}
    else:
        assert report[kind][message] in (["0"], [f"{NORMAL} = {place}"], [f"{place} = {NORMAL}"])
    assert run_script("data.py", "check", root, cwd=tmp_path).returncode == (kind == "problems")


def test_what_check_says_is_counted_and_printed(tmp_path):
    root = plain(tmp_path / "d", 3)
    make_deep(root / NORMAL)
    save(root, {"train/NORMAL/drawing.png": np.eye(30, dtype=np.uint8), "train/NORMAL/1_mask.png": random_image(0)})
    touch(root, "test/NORMAL/only.png", "train/PNEUMONIA/broken.png")
    done = run_script("data.py", "check", root, cwd=tmp_path)
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    for start in (
        "PROBLEM: test has no readable image of: 2 (NORMAL, PNEUMONIA)",
        "WARNING: left out as masks or annotations, by their names: 1 (train/NORMAL/1_mask.png)",
        "WARNING: left out, a mask or drawing: at most three grey levels: 1 (train/NORMAL/drawing.png)",
        "WARNING: left out, can't be read: 2 (train/PNEUMONIA/broken.png: not an image of a known format,",
        "WARNING: images of unknown patients, each counted as a patient, among 9: 3",
        "fingerprint of train: ",
        "fingerprint of test: ",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, start
    counts = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in lines if line.startswith(("images", "mode L"))}
    assert counts["images"] == ["3", "3"] and counts["mode L, 8 bits"] == ["2", "3"]
    assert lines[-1] == "1 problem, 4 warnings; results on this folder would be invalid"
    report = json.loads(run_script("data.py", "check", root, "--json", cwd=tmp_path).stdout)
    assert [len(report[kind]) for kind in ("problems", "warnings")] == [1, 4]


def test_check_of_a_folder_without_images_says_what_was_skipped(tmp_path):
    done = run_script("data.py", "check", touch(tmp_path, "train/A/1.nii"), cwd=tmp_path)
    assert done.returncode == 2 and "has no images in train/, val/, test/" in done.stderr and "1 .nii" in done.stderr


@needs_pydicom
def test_check_counts_lateral_views_among_frontal_ones(tmp_path):
    (tmp_path / "train/A").mkdir(parents=True)
    for i, view in enumerate(("PA", "LL", "LATERAL")):
        content = dicom(stored(12, picture=random_image(i)), 12, PatientID=str(i + 1), ViewPosition=view)
        (tmp_path / f"train/A/{i}.dcm").write_bytes(content)
    lateral = ["train/A/1.dcm", "train/A/2.dcm"]
    assert data.check(tmp_path)["warnings"] == {"lateral views among 3 images": lateral}
    (tmp_path / "train/A/0.dcm").unlink()
    assert data.check(tmp_path)["warnings"] == {}


# --- download ---


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name in (*names, "__MACOSX/train/NORMAL/c.jpeg"):
            z.writestr(name, name)
    return buffer.getvalue()


@contextlib.contextmanager
def serve(*parts, silent=False):
    """The URL of a server that answers one request with these bytes, and then is silent or closes."""
    listener, done = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def answer():
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"".join(parts))
                done.wait(60 * silent)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/x.zip"
    done.set()
    listener.close()
    thread.join()


OK, UP = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", archive("../../evil.jpeg")
BODY = archive("chest_xray/train/NORMAL/a.jpeg", "chest_xray/test/NORMAL/b.jpeg")


def test_the_download_is_unpacked_and_not_repeated(tmp_path):
    with serve(OK % len(BODY), BODY) as url:
        target = data.download(tmp_path / "d", url, hashlib.sha256(BODY).hexdigest())
    assert list(contents(tmp_path / "d")) == ["chest_xray/test/NORMAL/b.jpeg", "chest_xray/train/NORMAL/a.jpeg"]
    assert data.download(tmp_path / "d", "http://127.0.0.1:1/gone") == target  # nothing is fetched again


BAD_SERVERS = {  # what is sent, the body that its checksum is of, what the message says
    "another checksum": ([OK % len(BODY), BODY], b"other", "invalid hash value"),
    "not found": ([b"HTTP/1.1 404 Not Found\r\n\r\n"], BODY, "404"),
    "not an archive": ([OK % 5, b"hello"], b"hello", "zip"),
    "writes outside": ([OK % len(UP), UP], UP, "chest_xray/train"),
}


@pytest.mark.parametrize("case", BAD_SERVERS)
def test_a_bad_server_is_one_line_and_leaves_nothing(tmp_path, case):
    parts, body, message = BAD_SERVERS[case]
    with serve(*parts) as url, pytest.raises(data.UserError, match=message) as caught:
        data.download(tmp_path / "d", url, hashlib.sha256(body).hexdigest())
    assert "\n" not in str(caught.value) and "Kaggle" in str(caught.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["d"]


def test_a_server_that_stops_answering_or_is_not_there_is_one_line(tmp_path, monkeypatch):
    limit = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: limit(0.1 if seconds == 60 else seconds))
    with serve(OK % 1000, b"x", silent=True) as url, pytest.raises(data.UserError, match="timed out|TimeoutError"):
        data.download(tmp_path / "d", url)
    assert socket.getdefaulttimeout() is None and [p.name for p in tmp_path.rglob("*")] == ["d"]
    for url in ("foo://bar", "http://127.0.0.1:1/nobody"):
        with pytest.raises(data.UserError, match="download failed"):
            data.download(tmp_path / "d", url)
