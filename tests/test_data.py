"""data.py: tables, patients and splits, reading, cache, the operations, copies, the check, download and demo set."""

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import EpsImagePlugin, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import data


def touch(root, *paths, content=b"x"):
    """Write files of any content, for tests that never decode an image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def random_image(seed, height=20, width=30):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width)).astype(np.uint8)


def save(root, images):
    """Arrays by path, as image files."""
    for path, image in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / path)
    return root


def file_names(split, start, n, ending="jpeg"):
    """The paths of n images, half in each class, each of its own patient."""
    classes = (f"NORMAL/IM-{{}}-0001.{ending}", f"PNEUMONIA/person{{}}_virus_1.{ending}")
    return [f"{split}/{classes[i % 2].format(start + i)}" for i in range(n)]


def tree(root, n=6, ending="bmp"):
    """Noise images, half of them in each class of train/: nothing separates the classes."""
    for i, path in enumerate(file_names("train", 1, n, ending)):
        save(root, {path: random_image(i)})
    return root


def table(root, text):
    (root / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def contents(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


# --- command line and files ---


def test_to_csv_output_reads_back_and_contains_no_formula(tmp_path):
    rows = [{"note": text, "logit": "-1.5"} for text in ("=1+1", "'=x", "a=b", 'two "quotes", a comma', "two\nlines")]
    text = data.to_csv(rows)
    data.write_text(tmp_path / "t.csv", text)
    assert data.read_table(tmp_path / "t.csv", ()) == rows
    assert text.splitlines()[1:3] == ["'=1+1,'-1.5", "''=x,'-1.5"]


AS_WRITTEN = {  # the same table as other programs write it
    "semicolons, CRLF": "file_name;Age;label\r\nx/1.png;5;A\r\nx/2.png;;B\r\n",
    "tabs, capitals": "FILE_NAME\tAge\tLabel\nx/1.png\t5\tA\nx/2.png\t\tB\n",
    "byte order mark, quotes": '\ufefffile_name,"Age","label"\n"x/1.png","5","A"\nx/2.png,"",B\n',
    "blanks after commas, backslashes": 'file_name, Age, label\nx\\1.png, 5, "A"\nx\\2.png, , B\n',
    "pandas's row numbers, empty rows": ",file_name,Age,label\n0,x/1.png,5,A\n,,,\n1,x/2.png,,B\n\n",
    "a word for missing": "file_name,Age,label\nx/1.png,5,A\nx/2.png,NA,B\n",
}


@pytest.mark.parametrize("kind", AS_WRITTEN)
def test_a_table_reads_the_same_in_every_dialect(tmp_path, kind):
    table(tmp_path, AS_WRITTEN[kind])
    assert data.read_table(tmp_path / "metadata.csv", ("file_name", "label")) == [
        {"file_name": "x/1.png", "Age": "5", "label": "A"},
        {"file_name": "x/2.png", "Age": "", "label": "B"},
    ]


def test_numbers_and_ages_are_distinguished_from_text():
    numbers = {"-1.5": -1.5, "0,75": 0.75, "058Y": 58, "018M": 1.5, "12 kg": None, "nan": None}
    assert {text: data.as_number(text) for text in numbers} == numbers


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
    "Ctrl-C": (interrupted_while_writing, 130, "interrupted; go on\n"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_stopped_script_prints_one_line_and_leaves_no_partial_file(tmp_path, monkeypatch, capsys, case):
    work, code, line = ENDS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Closed())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as during the imports
    with pytest.raises(SystemExit) as end:
        data.run_script(data.Parser(prog="x"), work, lambda: "go on")
    assert (end.value.code, capsys.readouterr().err) == (code, line)
    assert not list(tmp_path.iterdir())


# --- find ---

IDENTIFY = {  # the same number in two series is two patients, but newer releases count all in one series
    "person23_bacteria_78.jpeg": ("bacteria-23", "bacterial"),
    "person23_virus_150.jpeg": ("virus-23", "viral"),
    "IM-0115-0001.jpeg": ("IM-115", ""),
    "NORMAL-1003233-0001.jpeg": ("1003233", ""),
    "BACTERIA-1003233-0001.jpeg": ("1003233", "bacterial"),
    "scan_0001.jpeg": ("x/scan_0001.jpeg", ""),
}


@pytest.mark.parametrize("name", IDENTIFY)
def test_a_file_name_gives_patient_and_subtype(name):
    record = data.make_record(f"x/{name}", "train", {"label": "A"}, ())
    assert (record.patient, record.subtype) == IDENTIFY[name]


def test_scan_takes_images_and_counts_the_rest(tmp_path, capsys):
    wanted = ["train/NORMAL/IM-0001-0001.jpeg", "train/PNEUMONIA/normal/person2_virus_1.PNG", "train/PNEUMONIA/x.jfif"]
    hidden = ["train/__MACOSX/NORMAL/a.jpeg", "train/NORMAL/._IM-0001-0001.jpeg"]
    other = ["train/NORMAL/notes.txt", "train/NORMAL/more.txt", "train/PNEUMONIA/README", "train/loose.png"]
    touch(tmp_path, *wanted, *hidden, *other)
    records = data.scan(tmp_path, "train")
    assert [r.path for r in records] == wanted
    assert [r.label for r in records] == ["NORMAL", "PNEUMONIA", "PNEUMONIA"]
    assert [r.patient for r in records] == ["IM-1", "virus-2", "train/PNEUMONIA/x.jfif"]
    assert not records[2].known_patient
    said = capsys.readouterr().err
    assert "2 .txt, 1 no extension" in said and "not in a class folder: 1 (train/loose.png)" in said
    assert "disagree" not in said  # without a table


def test_masks_and_annotations_are_left_out_by_name_and_counted(tmp_path, capsys):
    images = ["train/A/images/1.png", "train/A/segment_3.png", "train/A/unlabeled_2.png", "train/masks/1.png"]
    masks = ["train/A/lung masks/1.png", "train/A/1_mask.png", "train/A/Label/1.png", "train/A/seg_1.png"]
    touch(tmp_path, *images, *masks)
    assert [r.path for r in data.scan(tmp_path, "train")] == images
    assert "named like masks or annotations: 4" in capsys.readouterr().err


def test_folders_of_one_split_are_read_together_whatever_their_case(tmp_path):
    touch(tmp_path, "TRAIN/A/a.png", "Validation/A/b.png", "vAL/A/a.png")
    assert [r.path for r in data.scan(tmp_path)] == ["TRAIN/A/a.png", "Validation/A/b.png", "vAL/A/a.png"]


def test_a_linked_folder_counts_once_even_in_a_loop(tmp_path):
    root = touch(tmp_path / "d", "train/A/1.png")
    loop = touch(tmp_path / "loop", "2.png")
    (loop / "back").symlink_to(loop, target_is_directory=True)
    (root / "train/A/link").symlink_to(loop, target_is_directory=True)
    assert [r.path for r in data.scan(root)] == ["train/A/1.png", "train/A/link/2.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(folder, onerror, **_):
        onerror(PermissionError(errno.EACCES, "Permission denied", folder))
        return []

    touch(tmp_path, "train/A/1.png")
    monkeypatch.setattr(os, "walk", refuse)
    with pytest.raises(data.UserError, match="train can't be read .Permission denied"):
        data.scan(tmp_path)


def test_the_root_is_found_and_nothing_drawn(tmp_path, monkeypatch):
    assert data.find_root(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert data.find_root(None) == data.DEMO_ROOT
    assert not data.DEMO_ROOT.exists()


def test_a_layout_that_cannot_be_trained_on_is_an_error(tmp_path):
    message = r"images of no class; expected two or more class folders.*or a metadata.csv"
    with pytest.raises(data.UserError, match=message):
        data.find_training(tmp_path)
    touch(tmp_path, "train/A/a.jpeg", "train/B/b.jpeg", "test/A/c.jpeg", "test/C/d.jpeg")
    with pytest.raises(data.UserError, match="test has images of C, but the classes in training are A, B"):
        data.find_training(tmp_path)


def test_a_table_names_patients_subtypes_and_groups(tmp_path, capsys):
    touch(tmp_path, "train/A/a.png", "train/A/b.png", "train/B/IM-0007-1.png", "train/B/c.png")
    rows = "train/A/a.png,p1,,F,test\ntrain/A/b,p1,,F\n"  # one without its extension
    rows += "train/B/c.png,p2,viral,M\ntrain/B/gone.png,p3,viral,M\n"
    records = data.scan(table(tmp_path, "file_name,patient,subtype,sex,split\n" + rows), "train")
    assert [r.patient for r in records] == ["p1", "p1", "IM-7", "p2"]
    assert [r.subtype for r in records] == ["", "", "", "viral"]
    assert [r.groups["sex"] for r in records] == ["F", "F", "", "M"]
    said = capsys.readouterr().err
    assert "a column split but no column label: the folders decide" in said
    assert "rows whose file is missing: 1 (train/B/gone.png)" in said
    assert "has no row for these images: 1 (train/B/IM-0007-1.png)" in said


def test_a_table_with_labels_needs_no_class_folders_and_what_is_odd_is_reported(tmp_path, capsys):
    touch(tmp_path, "x/1.png", "x/2.png", "x/3.png", "x/4.png", "B/5.png", "x/6.png")
    rows = "x/1.png,A,Train\nx/2.png,B,TRAIN\nx/3.png,A,Test\nB/5,A,train\nx/6.png,na,train\n"
    records = data.scan(table(tmp_path, "file_name,label,split\n" + rows))
    found = [(r.path, r.label) for r in records]
    assert found == [("B/5.png", "A"), ("x/1.png", "A"), ("x/2.png", "B"), ("x/3.png", "A")]
    assert [r.split for r in records] == ["train", "train", "train", "test"]
    said = capsys.readouterr().err
    assert "no row for these images: 1 (x/4.png)" in said
    assert "the folder disagree on the label; using metadata.csv: 1 (B/5.png)" in said
    normals = [f"NORMAL/{i}.png" for i in (7, 8, 9)]
    touch(tmp_path, *normals, "PNEUMONIA/7.png", "PNEUMONIA/8.png", "a/b.jpg", "a/b.png")
    rows = "NORMAL/7,sick,test\nNORMAL/8,healthy,test\nNORMAL/9,0,test\n"
    rows += "PNEUMONIA/7,0,test\nPNEUMONIA/8,1,test\na/b,0,test\n"
    data.scan(table(tmp_path, "file_name,label,split\n" + rows))
    said_of_others = capsys.readouterr().err
    assert "label; using metadata.csv: 2 (NORMAL/7.png, PNEUMONIA/7.png)" in said_of_others
    assert "share their row of metadata.csv with another: 1 (a/b.png)" in said_of_others
    assert "no label or not in a class folder: 1 (x/6.png)" in said


def test_a_row_without_a_split_gets_that_of_its_folder(tmp_path):
    table(touch(tmp_path, "train/1.png"), "file_name,label\ntrain/1.png,Überweisung\n")
    (record,) = data.scan(tmp_path, "train")
    assert (record.path, record.label) == ("train/1.png", "Überweisung")


BAD_METADATA = {
    "metadata.csv has no rows": "file_name,label\n",
    "has the column split twice": "file_name,split,Split\nx/1.png,train,test\n",
    "row 2 has more cells": "file_name,split\nx/1.png,upper lobe, train\n",
    "save it as a UTF-8 CSV": b"file_name,split\nx\xff.png,A\n",
    "has no column file_name; its columns are path, label": "path,label\nx,A\n",
    "x/1.png is listed twice": "file_name,label,split\nx/1.png,A,train\nx//../x/1.png,B,train\n",
    "the split of x/1.png is dev; write train, val or test": "file_name,label,split\nx/1.png,A,dev\n",
    "rename column Patient_ID to patient": "file_name,Patient_ID\nx/1.png,A\n",
}


@pytest.mark.parametrize("message", BAD_METADATA)
def test_metadata_that_cannot_be_used_is_an_error(tmp_path, message):
    table(touch(tmp_path, "x/1.png"), BAD_METADATA[message])
    with pytest.raises(data.UserError, match=message):
        data.scan(tmp_path, "train")


@pytest.mark.parametrize(("n", "groups"), [(20, ["age", "place"]), (19, ["date", "case", "age", "place"])])
def test_identifier_columns_are_named_and_not_grouped(tmp_path, capsys, n, groups):
    lines = ["file_name,date,case,age,place"]
    for i in range(n):
        touch(tmp_path, f"train/A/{i}.png")
        lines.append(f"train/A/{i}.png,2015-03-{i:02},{10000 + i},{40 + i:03}Y,ward {i % 3}")  # ages differ too
    records = data.scan(table(tmp_path, "\n".join(lines)))
    assert list(records[0].groups) == groups
    assert ("identifier columns" in capsys.readouterr().err) == ("date" not in groups)


@pytest.mark.parametrize("word", ["", "n/a", "Unknown"])
def test_a_word_for_missing_is_not_a_patient(tmp_path, word):
    touch(tmp_path, "train/A/IM-0001-0001.png", "train/A/x.png")
    table(tmp_path, f"file_name,patient\ntrain/A/IM-0001-0001.png,{word}\ntrain/A/x.png,{word}\n")
    assert [r.patient for r in data.scan(tmp_path)] == ["IM-1", "train/A/x.png"]


def test_a_patient_numbered_0_is_known(tmp_path):
    touch(tmp_path, "train/A/a.png", "train/B/b.png", "test/A/c.png")
    table(tmp_path, "file_name,patient\ntrain/A/a.png,0\ntrain/B/b.png,1\ntest/A/c.png,0.0\n")
    with pytest.raises(data.UserError, match="1 patient in both train and test"):
        data.find_training(tmp_path)


def test_a_table_that_cannot_be_opened_is_not_passed_over(tmp_path):
    touch(tmp_path, "train/A/a.png")
    (tmp_path / "metadata.csv").symlink_to("missing")
    with pytest.raises(FileNotFoundError):
        data.scan(tmp_path)


# --- split ---

STRATA = [("NORMAL", "", "IM"), ("NORMAL", "", "NORMAL2-IM"), ("P", "viral", "virus"), ("P", "bacterial", "bacteria")]


def many_records(patients=600):
    """Patients of one to eight images in four strata of very different sizes."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(patients):
        label, subtype, series = STRATA[min(int(rng.exponential(1.2)), 3)]
        for k in range(rng.integers(1, 9)):
            records.append(data.Record(f"{i}-{k}", label, "train", f"p{i}", subtype, series, {}))
    return records


def records_of(*patients, split="train", label="A"):
    return [data.Record(f"{split}/{label}/{i}", label, split, p, "", "", {}) for i, p in enumerate(patients)]


def deal(records, folds, copies=None):
    """The fold of each record."""
    if copies is None:
        copies = np.arange(len(records))
    index = data.number_patients(records, copies)
    chosen = np.stack([data.is_validation(records, index, folds, fold) for fold in range(folds)])
    assert (chosen.sum(0) == 1).all()  # each image is held out by one fold
    return chosen.argmax(0).tolist()


def test_folds_keep_patients_together_and_strata_balanced_and_never_change():
    records = many_records()
    folds = deal(records, 10)
    assert len({(r.patient, fold) for r, fold in zip(records, folds)}) == 600
    counts = {stratum: [0] * 10 for stratum in STRATA}
    for r, fold in zip(records, folds):
        counts[r.label, r.subtype, r.series][fold] += 1
    for images in counts.values():
        assert max(images) - min(images) <= 8  # the largest patient
    assert deal(records[::-1], 10)[::-1] == folds  # in whatever order the files come
    # Otherwise earlier runs could not be compared with new ones.
    assert hashlib.sha256("".join(map(str, folds)).encode()).hexdigest()[:16] == "bda192c75a7e91e5"


def test_the_spellings_of_an_id_are_one_patient():
    records = records_of("0017", "x", "17", "17.0", "X", "train/A/5", "train/a/5")
    assert data.number_patients(records, np.arange(7)).tolist() == [0, 1, 0, 0, 1, 2, 3]


def test_patients_who_share_a_copy_become_one():
    records = many_records(60)
    paths = [r.path for r in records]
    copies = np.arange(len(records))
    copies[paths.index("7-0")] = copies[paths.index("40-0")]
    copies[paths.index("40-1")] = copies[paths.index("21-0")]
    assert len(set(data.number_patients(records, copies).tolist())) == 58
    for found, n in ((deal(records, 5), 3), (deal(records, 5, copies), 1)):
        assert len({fold for r, fold in zip(records, found) if r.patient in ("p7", "p40", "p21")}) == n


def test_a_val_folder_is_used_for_validation(tmp_path, capsys):
    touch(tmp_path, *file_names("train", 0, 40), *file_names("val", 1000, 100))
    records = data.find_training(tmp_path)
    chosen = data.is_validation(records, np.arange(140), 5, 0)
    assert chosen.tolist() == [False] * 40 + [True] * 100
    assert not capsys.readouterr().err


def test_a_small_val_folder_is_trained_on(tmp_path, capsys):
    touch(tmp_path, *file_names("train", 0, 40), *file_names("valid", 1000, 98))
    records = data.find_training(tmp_path)
    assert {r.split for r in records} == {"train"}
    assert data.is_validation(records, np.arange(138), 5, 0).sum() == pytest.approx(28, abs=3)
    assert "val has only 98 images" in capsys.readouterr().err


def test_shared_patients_are_an_error(tmp_path):
    touch(tmp_path, *file_names("train", 0, 40), *file_names("test", 5000, 10), "test/PNEUMONIA/person7_virus_2.jpeg")
    with pytest.raises(data.UserError, match=r"1 patient in both train and test .*\(virus-7\)"):
        data.find_training(tmp_path)


ODD_PATIENTS = {
    "of 2 images, these have no patient id, so each counts as a patient: 1 (train/A/1)": records_of("p", "train/A/1"),
    "more than 5 % of all images (placeholders?): 1 (p)": records_of(*["p"] * 21, "q"),
    "images of several classes: 1 (p)": [*records_of("p", "q"), *records_of("p", label="B")],
    "use one spelling: 1 (00017b = 17B.0)": records_of("00017b", "8", "17B.0", "x8"),
    "as a patient: 2 (train/A/0, train/a/0)": [*records_of("train/A/0"), *records_of("train/a/0", label="a")],
}


@pytest.mark.parametrize("message", ODD_PATIENTS)
def test_odd_patients_are_reported(capsys, message):
    data.remark_patients(ODD_PATIENTS[message])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


POSITIVE = {  # classes, what is asked for, the order, whether a guess is announced
    "by name": ("Pneumonia normal", None, "normal Pneumonia", False),
    "abnormal is not normal": ("abnormal control", None, "control abnormal", True),
    "against the name": ("NORMAL PNEUMONIA", "NORMAL", "PNEUMONIA NORMAL", False),
    "no pneumonia": ("COVID No_Pneumonia", None, "No_Pneumonia COVID", True),
    "three classes": ("COVID NORMAL PNEUMONIA VIRAL", None, "NORMAL COVID VIRAL PNEUMONIA", False),
}


@pytest.mark.parametrize("case", POSITIVE)
def test_the_positive_class_is_last(capsys, case):
    names, asked, order, is_guess = POSITIVE[case]
    assert data.sort_classes(names.split(), asked) == order.split()
    assert ("guessing that" in capsys.readouterr().err) == is_guess
    with pytest.raises(data.UserError, match="the positive class X is not one of"):
        data.sort_classes(names.split(), "X")


# --- read ---


def encoded(kind, image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def read(content, size=None):
    return data.read_image(io.BytesIO(content), size)


def deviation(found, expected):
    """The largest difference between grey levels."""
    return np.abs(found.astype(float) - expected).max()


PICTURE = np.add.outer(np.linspace(0, 180, 60), np.linspace(0, 75, 90)).round().astype(np.uint8)
PICTURE[5:20, 50:80] //= 3  # no symmetry, so that no flip or turn goes unnoticed
GREY = Image.fromarray(PICTURE)
DEEP = PICTURE.astype(np.uint16) * 257
SHARE = (PICTURE / 255).astype(np.float32)


def deepened(bits, picture=PICTURE):
    """The picture's levels, scaled to a bit depth."""
    scale = (2**bits - 1) / 255
    return (picture * scale).round().astype(np.uint16)


def white_is_zero(samples):
    """TIFF bytes with PhotometricInterpretation (262) set from 1 to 0: Pillow writes no such deep file itself."""
    entry = struct.pack("<HHIH", 262, 3, 1, 1)
    return encoded("TIFF", samples).replace(entry, struct.pack("<HHIH", 262, 3, 1, 0))


FORMATS = {  # the picture in another encoding, and how far its levels may be from the 8-bit ones
    "grey.jp2": (encoded("JPEG2000", PICTURE), 0),
    "rgb.webp": (encoded("WEBP", np.dstack([PICTURE] * 3), lossless=True), 0),
    "palette.gif": (encoded("GIF", PICTURE), 2),
    "16bit.pgm": (encoded("PPM", DEEP), 0),
    "32bit.tiff": (encoded("TIFF", PICTURE.astype(np.int32) * 257), 0),
    "float-overshoot.tiff": (encoded("TIFF", SHARE * np.float32(255 / 254)), 1),
    "float-signed.tiff": (encoded("TIFF", 2 * SHARE - 1), 0),
    "white-is-zero.tiff": (white_is_zero(65535 - DEEP), 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_the_grey_picture(tmp_path, name):
    content, tolerance = FORMATS[name]
    path = tmp_path / name
    path.write_bytes(content)
    found, info = data.read_image(path, 32)
    assert found.dtype == np.uint8
    assert deviation(found, GREY.resize((32, 32), Image.Resampling.BICUBIC)) <= tolerance
    assert (info.width, info.height, info.is_mask) == (90, 60, False)
    assert list(data.walk(tmp_path, Counter(), None)) == [path]


@pytest.mark.parametrize("bits", [8, 11, 16])
def test_any_depth_gives_the_same_grey_levels(bits):
    signed = deepened(bits).astype(np.int32) - 2 ** (bits - 1)
    signed[0, :5], signed[1, :5] = 10**6, -(10**6)  # five of 5,400 pixels are odd at each end
    for content in (encoded("PNG", deepened(bits)), encoded("TIFF", signed)):
        found, info = read(content)
        np.testing.assert_array_equal(found[2:], PICTURE[2:])
        assert info.depth == bits


def test_a_saturated_marker_does_not_set_the_depth_and_a_large_picture_is_scaled_uniformly():
    large = np.tile(PICTURE, (20, 20))  # 2.2 million pixels
    samples = deepened(12, large)
    samples[:10] = 65535
    found, info = read(encoded("PNG", samples))
    np.testing.assert_array_equal(found[10:], large[10:])
    assert info.depth == 12 and (found[:10] == 255).all()
    white, _ = read(encoded("PNG", np.full((9, 9), 65535, np.uint16)))
    assert (white == 255).all()


DARK = deepened(12, PICTURE / 3)  # its own values say 11 bits
DARK_FILES = {  # bytes, the depth, how bright it comes out
    "guessed": (encoded("TIFF", DARK), 11, 2 / 3),
    "no fewer than 8 bits": (encoded("TIFF", deepened(8, PICTURE / 3)), 8, 1 / 3),
    "floats": (encoded("PPM", (PICTURE / 255 / 3).astype(np.float32)), 1, 1 / 3),
}


@pytest.mark.parametrize("case", DARK_FILES)
def test_the_depth_of_a_dark_picture_is_guessed_from_its_own_levels(case):
    content, depth, share = DARK_FILES[case]
    found, info = read(content)
    assert info.depth == depth and deviation(found, PICTURE * share) <= 1


@pytest.mark.parametrize(("n", "is_mask"), [(2, True), (3, True), (4, False)])
def test_a_picture_of_three_grey_levels_is_a_mask_and_one_of_four_is_not(n, is_mask):
    levels = PICTURE.astype(np.uint16) * n // 256
    for content in (encoded("PNG", levels.astype(np.uint8) * (255 // n)), encoded("PNG", levels * 10_000)):
        _, info = read(content, 32)
        assert info.is_mask == is_mask


@pytest.mark.parametrize(("kind", "bits"), [("JPEG", 8), ("PNG", 12)])
def test_exif_rotation_is_applied(kind, bits):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to display
    samples = np.rot90(deepened(bits)).astype(np.uint8 if bits == 8 else np.uint16)
    found, _ = read(encoded(kind, samples, quality=98, exif=exif))
    assert found.shape == (60, 90) and np.abs(found.astype(int) - PICTURE).mean() < 1.5


def test_a_large_jpeg_is_decoded_small_and_alike_from_a_path_and_a_file(tmp_path):
    path = tmp_path / "x.jpeg"
    coarse = Image.fromarray(random_image(0, 100, 130))
    coarse.resize((1600, 1200), Image.Resampling.BICUBIC).save(path, quality=90)
    expected, info = data.read_image(path, 224)
    assert (info.width, info.height) == (1600, 1200)
    with Image.open(path) as image:
        image.draft(None, (448, 448))  # 800 x 600
        np.testing.assert_array_equal(expected, image.resize((224, 224), Image.Resampling.BICUBIC))
    with open(path, "rb") as file:
        np.testing.assert_array_equal(data.read_image(file, 224)[0], expected)


def test_colour_is_measured():
    image = np.dstack([PICTURE, 0 * PICTURE, 0 * PICTURE, PICTURE])  # transparency is ignored
    found, info = data.read_image(Image.fromarray(image), None)
    np.testing.assert_array_equal(found, Image.fromarray(image[..., :3]).convert("L"))
    assert info.colour == pytest.approx(PICTURE.mean(), abs=1)


REFUSED = {  # a file's bytes, and the reason
    "truncated.jpeg": (encoded("JPEG", random_image(0, 200, 200))[:9000], "truncated"),
    "zero.jpeg": (b"", "not an image"),
    "postscript.jpeg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "large.png": (encoded("PNG", random_image(0, 300, 300)), "could be decompression bomb"),
    "missing.jpeg": (None, "no such file"),
    "nan.tiff": (encoded("TIFF", np.array([[0.5, np.nan, 1]], np.float32)), "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_usable_image_is_refused_with_a_reason(tmp_path, monkeypatch, name):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("another program would be started"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # more than twice as many are refused
    content, reason = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    image, info = data.read_image(tmp_path / name, 64)
    assert reason in info.error
    assert image.shape == (64, 64) and not image.any()


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
        if keyword.startswith("PixelPadding"):
            dataset.add_new(keyword, "US", value)
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
    if signed:
        samples -= 2 ** (bits - 1)
    kind = "i" if signed else "u"
    return samples.astype(f"{kind}{1 if bits == 8 else 2}")


@needs_pydicom
@pytest.mark.parametrize(
    ("bits", "signed", "photometric"), [(8, 0, "MONOCHROME2"), (12, 1, "MONOCHROME1"), (16, 1, "MONOCHROME2")]
)
def test_dicom_reads_as_the_grey_picture_without_and_with_a_window(bits, signed, photometric):
    lowest = -(2 ** (bits - 1)) if signed else 0
    rescaled = {"RescaleSlope": 2, "RescaleIntercept": -100}
    middle = 2 * lowest - 100 + 2**bits - 0.5
    window = {"WindowCenter": [middle, 7], "WindowWidth": [2 * 2**bits - 1, 9]}  # the first is the full range
    placeholders = {"WindowCenter": 0, "WindowWidth": 0, "RescaleSlope": None}
    for fields in ({}, rescaled, rescaled | window, placeholders):
        found, info = read(dicom(stored(bits, signed, photometric), bits, photometric, **fields))
        np.testing.assert_array_equal(found, PICTURE)
        assert (info.width, info.height, info.mode, info.depth) == (90, 60, photometric, bits)


@needs_pydicom
@pytest.mark.parametrize("signed", [0, 1])
def test_the_depth_of_16_bit_dicom_is_guessed_unless_it_has_a_window(signed):
    samples = stored(12, signed)
    samples[:10, :30] = np.iinfo(samples.dtype).max  # a burned-in marker
    found, info = read(dicom(samples, 16, RescaleSlope=2, RescaleIntercept=-100))
    np.testing.assert_array_equal(found[10:], PICTURE[10:])
    assert info.depth == 12 and (found[:10, :30] == 255).all()
    found, info = read(dicom(samples, 16, WindowCenter=0 if signed else 2**15, WindowWidth=2**16))
    assert info.depth == 16 and np.ptp(found[10:]) <= 16  # a window is taken at its word


WINDOWS = {  # function: its definition in PS3.3 C.11.2.1.2 and C.11.2.1.3
    "LINEAR": lambda x, center, width: (x - (center - 0.5)) / (width - 1) + 0.5,
    "LINEAR_EXACT": lambda x, center, width: (x - center) / width + 0.5,
    "SIGMOID": lambda x, center, width: 1 / (1 + np.exp(-4 * (x - center) / width)),
}


@needs_pydicom
@pytest.mark.parametrize("function", WINDOWS)
def test_dicom_windows_follow_their_definitions(function):
    window = {"WindowCenter": 400.5, "WindowWidth": 333, "VOILUTFunction": function}
    found, _ = read(dicom(stored(12), 12, RescaleSlope=0.5, RescaleIntercept=-300, **window))
    shown = stored(12) * 0.5 - 300
    share = WINDOWS[function](shown, 400.5, 333)
    assert deviation(found, 255 * share.clip(0, 1)) <= 0.5 + 1e-6


@needs_pydicom
@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("name", ["VOILUTSequence", "ModalityLUTSequence"])
def test_dicom_lookup_tables_are_applied_and_their_depth_is_the_range(bits, name):
    import pydicom

    white = 2**bits - 1
    curve = (np.linspace(0, 1, 4096) ** 2 * white / 2).round().astype(int)  # up to half of the range
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS", [4096, -100, bits])
    item.add_new("LUTData", "US", curve.tolist())
    fields = {name: pydicom.Sequence([item])}
    samples = stored(12).astype(np.int16)
    if name == "VOILUTSequence":  # it overrules a window, and is applied after the slope
        fields |= {"RescaleSlope": 0.5, "RescaleIntercept": -100, "WindowCenter": 1, "WindowWidth": 2}
        samples *= 2
    else:
        samples -= 100
    found, _ = read(dicom(samples, 16, **fields))
    assert deviation(found, curve[stored(12)] * (255 / white)) <= 0.5 + 1e-6


PADDINGS = {  # type, the padding's value, stored bits, header fields
    "signed, written as unsigned": ("i2", -2000, 16, {"PixelPaddingValue": 63536}),
    "a range": ("u2", 60001, 16, {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 60002}),
    "more bits than are stored": ("u2", 65535, 12, {"PixelPaddingValue": 65535}),
    "white in MONOCHROME1": ("u2", 0, 16, {"PixelPaddingValue": 0, "PhotometricInterpretation": "MONOCHROME1"}),
}


@needs_pydicom
@pytest.mark.parametrize("case", PADDINGS)
def test_dicom_padding_is_black_and_a_dark_picture_beside_it_stays_dark(case):
    kind, value, bits, fields = PADDINGS[case]
    picture = (PICTURE.clip(1, 254) + 20) * 0.6
    samples = stored(12, 0, fields.get("PhotometricInterpretation"), picture).astype(kind)
    samples[:25] = value
    found, _ = read(dicom(samples, bits, **fields))
    assert not found[:25].any() and deviation(found[25:], picture[25:]) <= 0.6


@needs_pydicom
def test_multi_frame_colour_and_preambleless_dicom_files_are_read():
    found, _ = read(dicom(PICTURE, 8)[132:])
    np.testing.assert_array_equal(found, PICTURE)
    frames = np.stack([PICTURE, 255 - PICTURE])
    found, _ = read(dicom(PICTURE, 8, NumberOfFrames=2, PixelData=frames.tobytes()))
    np.testing.assert_array_equal(found, PICTURE)
    red = np.dstack([PICTURE, 0 * PICTURE, 0 * PICTURE])
    found, _ = read(dicom(red, 8, "RGB"))
    np.testing.assert_array_equal(found, Image.fromarray(red).convert("L"))


@needs_pydicom
def test_the_patient_is_from_the_table_else_the_header_else_the_name(tmp_path):
    """The id in a header is hashed, so that it is written nowhere."""
    for i, patient in enumerate(("Miller 1970", "0miller 1970", "Miller 1971", None, "anonymous", "0")):
        path = f"train/A/IM-000{i}-0001"  # recognised by its content
        content = dicom(stored(12), 12, PatientID=patient, PatientName="Miller^Ann")
        touch(tmp_path, path, content=content)
    records = data.scan(tmp_path, "train")
    assert "Miller" not in str(records)
    patients = [r.patient for r in records]
    assert patients[0] == patients[1] != patients[2]
    assert patients[3:] == ["IM-3", "IM-4", "IM-5"]
    table(tmp_path, "file_name,patient\ntrain/A/IM-0000-0001,p\ntrain/A/IM-0001-0001,none\n")
    assert [r.patient for r in data.scan(tmp_path, "train")] == ["p", *patients[1:]]


@needs_pydicom
def test_no_patient_of_a_dicom_file_gets_lost_without_pydicom(tmp_path, monkeypatch):
    """Even if the pixels are in the cache: such files are left out."""
    for i in range(4):
        content = dicom(stored(12, picture=random_image(i)), 12, PatientID=str(1 + i // 2))
        touch(tmp_path, f"train/{'AB'[i % 2]}/{i}.dcm", content=content)
    load(tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert all("pip install pydicom" in info.error for info in load(tmp_path).infos)


UNREADABLE = {  # what the reason says, and the header fields
    "PALETTE COLOR": {"PhotometricInterpretation": "PALETTE COLOR"},
    "not finite": {"RescaleSlope": "nan", "RescaleIntercept": "0"},
    "VOI LUT Function": {"WindowCenter": 5, "WindowWidth": 30, "VOILUTFunction": "CUBIC"},
    "high bit 14": {"HighBit": 14},
    "cannot be decoded": {"Rows": 9999},
}


@needs_pydicom
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("reason", UNREADABLE)
def test_dicom_that_cannot_be_shown_correctly_is_refused_with_a_reason(reason):
    _, info = read(dicom(stored(12), 12, **UNREADABLE[reason]))
    assert reason in info.error


@needs_pydicom
def test_dicom_without_an_image_or_without_pydicom_is_refused(monkeypatch):
    content = dicom(stored(12), 12)
    report = content.replace(b"\xe0\x7f\x10\x00", b"\xe0\x7f\x11\x00")
    _, info = read(report)
    assert "without an image" in info.error
    monkeypatch.setitem(sys.modules, "pydicom", None)
    _, info = read(content)
    assert "pip install pydicom" in info.error


# --- cache ---


def load(root, size=16):
    data.read_folder.cache_clear()  # start as a new process would
    return data.read_folder(root, False, size)


def decoded(root):
    records = data.scan(root, "train")
    return np.stack([data.read_image(root / r.path, 16)[0] for r in records])


def test_a_second_call_decodes_nothing(tmp_path, monkeypatch):
    root = tree(tmp_path / "d")
    first = load(root)
    np.testing.assert_array_equal(first.images, decoded(root))
    monkeypatch.setattr(data, "read_image", lambda *_, **__: pytest.fail("decoded again"))
    again = load(root)
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.hashes, first.hashes)
    assert again.fingerprint == first.fingerprint
    monkeypatch.setattr(data, "READER_VERSION", data.READER_VERSION + 1)
    with pytest.raises(pytest.fail.Exception):
        load(root)


def test_a_cache_with_one_wrong_bit_is_rebuilt(tmp_path, capsys):
    root = tree(tmp_path / "d")
    first = load(root)
    (path,) = (root / ".cache").iterdir()
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.unlink()  # the old file stays mapped
    path.write_bytes(content)
    again = load(root)
    np.testing.assert_array_equal(again.images, first.images)
    assert "damaged: decoding again" in capsys.readouterr().err
    assert list((root / ".cache").iterdir()) == [path]


def test_a_changed_file_is_decoded_again(tmp_path):
    root = tree(tmp_path / "d")
    before = load(root)
    load(root, size=8)
    path = root / before.records[0].path
    status = path.stat()
    save(root, {before.records[0].path: random_image(77)})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size  # neither size nor time has changed
    after = load(root)
    np.testing.assert_array_equal(after.images, decoded(root))
    assert after.fingerprint != before.fingerprint
    path.unlink()
    assert len(load(root).images) == 5
    # The outdated files are gone, the other size stays.
    assert sorted(path.name.split("-v")[0] for path in (root / ".cache").iterdir()) == ["train-16", "train-8"]


def test_an_interrupted_build_leaves_nothing_and_a_transient_failure_is_retried(tmp_path, monkeypatch):
    def interrupted(path, size):
        raise KeyboardInterrupt

    def failing(path, size):
        return np.zeros((size, size), np.uint8), data.ImageInfo(error="a stale file handle")

    root = tree(tmp_path / "d")
    with monkeypatch.context() as m:
        m.setattr(data, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(root)
        assert not list((root / ".cache").iterdir())
        m.setattr(data, "read_image", failing)
        assert sum(~load(root).usable) == 6
    np.testing.assert_array_equal(load(root).images, decoded(root))


def test_the_cache_falls_back_to_the_users_folder(tmp_path, monkeypatch, capsys):
    root = touch(tree(tmp_path / "d"), ".cache")  # a file where the folder should be: stops even the superuser
    np.testing.assert_array_equal(load(root).images, decoded(root))
    assert f"no image cache in {root}/.cache" in capsys.readouterr().err
    load(root)
    assert not capsys.readouterr().err  # the second start takes it from there
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / ".cache"))
    with pytest.raises(data.UserError, match="set XDG_CACHE_HOME"):
        load(root)


def test_unusable_files_are_reported_on_every_call_and_are_not_copies(tmp_path, capsys):
    root = tree(tmp_path / "d")
    bad, mask = "train/NORMAL/IM-80-0001.jpeg", "train/PNEUMONIA/person1_virus_9.png"
    save(touch(root, bad), {mask: np.eye(20, dtype=np.uint8)})
    first = load(root)
    assert load(root).infos == first.infos
    reasons = {r.path: info.error for r, info in zip(first.records, first.infos) if info.error}
    assert reasons == {bad: "not an image of a known format", mask: "a mask or drawing: at most three grey levels"}
    assert [first.records[i].path for i in np.flatnonzero(~first.usable)] == list(reasons)
    assert len(np.unique(first.copy_index)) == len(first.records)
    assert capsys.readouterr().err.count(f"left out, can't be used: 2 ({bad}: not an image") == 2


def test_the_fingerprint_covers_files_paths_and_all_that_decides_the_split(tmp_path):
    root = tree(tmp_path / "d")
    before = load(root).fingerprint
    shutil.copytree(root, tmp_path / "copy")
    assert load(tmp_path / "copy", size=8).fingerprint == before
    for name in ("label", "split", "patient", "subtype"):
        changed = data.scan(root, "train")
        setattr(changed[0], name, "x")
        assert data.load_images(root, changed, 16)[3] != before
    alike = [data.replace(changed[0], patient=p, subtype=s) for p, s in (("a", "b c"), ("a b", "c"))]
    first, second = (data.load_images(root, [record], 16)[3] for record in alike)
    assert first != second
    path = root / changed[0].path
    content = path.read_bytes()
    path.write_bytes(content + b"x")  # ignored by decoders
    assert load(root).fingerprint != before
    path.write_bytes(content)
    assert load(root).fingerprint == before
    path.rename(path.with_name("IM-0-0001.bmp"))  # the first by name, as before
    assert load(root).fingerprint != before


# --- change ---

SMOOTH = Image.fromarray(random_image(3, 8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
X = torch.from_numpy(np.array(SMOOTH))[None, None] / 255
BILINEAR = InterpolationMode.BILINEAR
ALL = (...,)
INSIDE = (..., slice(12, 52), slice(12, 52))


OPERATIONS = {  # operation, parameters, the same by torchvision, where it is compared
    "brightness": (data.brightness, {"factor": 1.4}, lambda x: TF.adjust_brightness(x, 1.4), ALL),
    "contrast": (data.contrast, {"factor": 1.4}, lambda x: TF.adjust_contrast(x, 1.4), ALL),
    "gamma": (data.gamma, {"exponent": 1.7}, lambda x: TF.adjust_gamma(x, 1.7), ALL),
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
def test_operations_match_torchvision(name):
    operation, parameters, reference, where = OPERATIONS[name]
    changed = operation(X.clone(), **parameters)
    torch.testing.assert_close(changed[where], reference(X)[where], atol=1e-4, rtol=0)


def test_only_the_chosen_images_are_flipped():
    x = torch.cat([X, X])
    flipped = data.flip(x.clone(), torch.tensor([True, False]).view(2, 1, 1, 1))
    assert torch.equal(flipped[0], X[0].flip(2)) and torch.equal(flipped[1], X[0])


def test_the_border_comes_from_the_previous_image():
    x = torch.stack([torch.full((1, 100, 100), level) for level in (0.1, 0.5, 0.9)])
    changed = data.exchange_border(x.clone(), torch.tensor([0.04, 0.18, 0]).view(3, 1, 1, 1))
    assert torch.equal(changed[2], x[2])
    for i, width, border in ((0, 4, 0.9), (1, 18, 0.1)):
        image = changed[i, 0]
        assert torch.equal(image[width:-width, width:-width], x[i, 0, width:-width, width:-width])
        assert image[width - 1, 50] == image[50, -width] == pytest.approx(border)


BATCH = torch.from_numpy(np.stack([random_image(i, 40, 40) for i in range(12)]))

DRAWN = [  # operation of robust, its parameter, and the lowest, mean and highest value that is drawn
    ("exchange_border", "width", 0, 0.033, 0.18),
    ("resample", "width", 0.612, 0.858, 1),
    ("resample", "height", 0.612, 0.858, 1),
    ("resample", "right", -0.185, 0, 0.185),
    ("resample", "down", -0.185, 0, 0.185),
    ("flip", "chosen", 0, 0.5, 1),
    ("brightness", "factor", 0.7, 1, 1.3),
    ("contrast", "factor", 0.7, 1, 1.3),
    ("gamma", "exponent", 0.67, 1.03, 1.49),
    ("noise", "sd", 0, 0.0125, 0.05),
    ("noise", "start", 0, 2**19, 2**20),
]


@pytest.mark.parametrize(("name", "parameter", "low", "mean", "high"), DRAWN)
def test_robust_draws_the_documented_parameters(name, parameter, low, mean, high):
    ((operation, draw),) = [line for line in data.preset("robust", 32) if line[0].__name__ == name]
    (numbers,) = data.draw_numbers([(operation, draw)], 20_000, seed=0, epoch=0)
    drawn = draw(numbers)[parameter].double()
    found = [drawn.min().item(), drawn.mean().item(), drawn.max().item()]
    assert found == pytest.approx([low, mean, high], abs=0.03 * (high - low))


def test_each_operation_of_robust_changes_images_and_keeps_their_range():
    operations = data.preset("robust", 40)
    numbers = data.draw_numbers(operations, 12, seed=0, epoch=0)
    whole = data.augment(BATCH, operations, numbers)
    for i, (operation, _) in enumerate(operations):
        without = data.augment(BATCH, operations[:i] + operations[i + 1 :], numbers[:i] + numbers[i + 1 :])
        assert (without - whole).abs().mean() > 0.003, operation
    assert 0 <= whole.min() and whole.max() <= 1


def test_augmentation_does_not_depend_on_the_batch():
    operations = data.preset("robust", 32)[1:]  # the first exchanges borders within the batch
    numbers = data.draw_numbers(operations, 12, seed=0, epoch=0)
    together = data.augment(BATCH, operations, numbers)
    for i in range(12):
        alone = data.augment(BATCH[i : i + 1], operations, [u[i : i + 1] for u in numbers])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-6, rtol=0)


def test_adding_an_operation_keeps_the_numbers_of_the_others():
    medium = data.preset("medium", 32)
    robust = data.preset("robust", 32)  # has one more before and one more after
    assert [operation for operation, _ in robust[1:-1]] == [operation for operation, _ in medium]
    more = data.draw_numbers(robust, 12, seed=3, epoch=7)
    assert all(map(torch.equal, data.draw_numbers(medium, 12, seed=3, epoch=7), more[1:-1]))
    assert not torch.equal(more[0], more[1])


def test_random_numbers_are_a_function_of_seed_and_epoch_and_never_change():
    def draw_all(seed, epoch):
        numbers = data.draw_numbers(data.preset("robust", 32), 50, seed, epoch)
        return [*numbers, data.shuffle(50, seed, epoch)]

    first = draw_all(3, 4)
    torch.manual_seed(99)  # the global generator must play no part
    assert all(map(torch.equal, first, draw_all(3, 4)))
    for seed, epoch in ((3, 5), (4, 4), (4, 3)):
        assert not any(map(torch.equal, first, draw_all(seed, epoch)))
    order = first[-1].tolist()
    assert sorted(order) == list(range(50))
    # Otherwise earlier runs could not be compared with new ones.
    assert draw_all(5, 2)[1][0, 0].item() == pytest.approx(0.281299, abs=1e-4)


# Two images, 100 on the left and 200 on the right; the second has black rows that the central 85 % leave out.
HALVES = torch.full((2, 160, 160), 100, dtype=torch.uint8)
HALVES[:, :, 80:] = 200
HALVES[1, :8] = HALVES[1, -8:] = 0


@pytest.fixture(scope="module")
def stressed():
    partners = torch.full_like(HALVES, 7)
    return dict(data.stress(HALVES, partners, ["a.png", "b.png"]))


def test_stress_makes_18_stressed_copies(stressed):
    assert len(stressed) == 18
    for copy in stressed.values():
        assert copy.shape == HALVES.shape and copy.dtype == torch.uint8
        assert not torch.equal(copy, HALVES)


LEVELS = {  # of the halves, far from the edge between them
    "brightness x 0.65": (65, 130),
    "brightness x 1.4": (140, 255),
    "contrast x 0.65": (118, 182),  # 150 -+ 32.5
    "contrast x 1.4": (80, 220),
    "gamma 0.7": (132, 215),  # 255 (100 / 255) ^ 0.7 = 132.4
    "gamma 1.4": (69, 181),
    "JPEG quality 30": (100, 200),
}


@pytest.mark.parametrize("name", LEVELS)
def test_stress_changes_levels_as_it_says(stressed, name):
    row = stressed[name][0, 80]
    assert (row[8].item(), row[-9].item()) == pytest.approx(LEVELS[name], abs=1)


EDGES = {  # the column where the brighter half begins, in the first and in the last row, and the number of black rows
    "zoomed out to 115 %": (80, 80, 35),
    "shifted by 7 %": (91, 91, 19),
    "turned by 7 degrees": (70, 90, 16),
    "turned by -7 degrees": (90, 70, 16),
    "stretched by 15 %": (80, 80, 16),
    "crop of 85 %": (80, 80, 0),
}


@pytest.mark.parametrize("name", EDGES)
def test_stress_moves_edges_as_it_says(stressed, name):
    plain, marked = stressed[name]
    is_bright = (plain > 150).byte()
    first, last = is_bright[0].argmax().item(), is_bright[-1].argmax().item()
    n_black = (marked[:, 80] < 50).sum().item()
    assert (first, last, n_black) == pytest.approx(EDGES[name], abs=1)


def test_stress_blurs_and_adds_noise_and_exchanges_the_border(stressed):
    for name in ("blur", "half resolution"):
        assert stressed[name][0, 80].unique().numel() > 2  # the edge is no longer sharp
    for sd in (0.02, 0.05):
        change = stressed[f"noise {sd}"][0].float() - HALVES[0]
        assert change.std().item() == pytest.approx(255 * sd, rel=0.1)
    exchanged = stressed["border exchanged"][0]
    assert torch.equal(exchanged[16:-16, 16:-16], HALVES[0, 16:-16, 16:-16])
    assert (exchanged[:16] == 7).all() and (exchanged[:, -16:] == 7).all()


def test_the_noise_of_stress_depends_on_the_path_alone(stressed):
    alone = dict(data.stress(HALVES[1:], None, ["b.png"]))
    assert "border exchanged" not in alone  # there are no partners
    first, second = stressed["noise 0.05"]
    assert torch.equal(alone["noise 0.05"][0], second)
    assert not torch.equal(first[80], second[80])


def test_partners_are_of_another_class_and_a_function_of_the_path():
    records = many_records(60)
    partners = data.draw_partners(records)
    assert all(records[j].label != r.label for r, j in zip(records, partners.tolist()))
    assert len(partners.unique()) > 30 and torch.equal(partners, data.draw_partners(records))
    assert data.draw_partners(records_of("p", "q")) is None


# --- copies and shortcuts ---


def texture(seed):
    """Something smooth, as a radiograph is."""
    small = Image.fromarray(random_image(seed, 12, 12))
    return np.asarray(small.resize((240, 240), Image.Resampling.BICUBIC))


def differing(a, b):
    """The number of bits in which the hashes of two images differ."""
    hashes = [data.read_image(image, None)[1].hash for image in (a, b)]
    bits = [np.frombuffer(bytes.fromhex(h), np.uint8) for h in hashes]
    return np.bitwise_count(bits[0] ^ bits[1]).sum()


def test_the_hash_survives_resizing_compression_and_darkening():
    for seed in range(20):
        image = texture(seed)
        smaller = Image.fromarray(image).resize((120, 120), Image.Resampling.BICUBIC)
        compressed, _ = read(encoded("JPEG", image, quality=30))
        darker = (image * 0.8).astype(np.uint8)
        for copy in (np.asarray(smaller), compressed, darker):
            assert differing(image, copy) <= data.SAME


def test_the_hash_differs_between_images():
    images = [texture(seed) for seed in range(20)]
    for a, b in itertools.combinations(images, 2):
        assert differing(a, b) > 60
    assert differing(images[0], images[0][:, ::-1]) > 60


def flip_bits(hashes, row, bits):
    """One of the hashes, with this many bits flipped."""
    changed = np.unpackbits(hashes[row].view(np.uint8))
    order = np.random.default_rng(row).permutation(256)
    changed[order[:bits]] ^= 1
    return np.packbits(changed).view(np.uint64)


def test_copies_are_found_up_to_ten_bits_across_blocks_and_through_others():
    hashes = np.random.default_rng(0).integers(0, 2**64, (9000, 4), dtype=np.uint64)
    hashes[8999] = flip_bits(hashes, 3, 10)  # a copy
    hashes[8998] = flip_bits(hashes, 4, 11)  # not a copy
    hashes[8997] = ~hashes[5]  # all bits differ
    hashes[5000] = hashes[70]
    hashes[7000] = flip_bits(hashes, 8999, 10)  # a copy of a copy
    groups = data.copy_groups(torch.from_numpy(hashes.view(np.int64)))
    assert groups[3] == groups[8999] == groups[7000]
    assert groups[70] == groups[5000]
    assert len(np.unique(groups)) == 9000 - 3


def test_what_was_seen_before_is_found_by_image_and_by_patient():
    hashes = np.random.default_rng(0).integers(0, 2**64, (5, 4), dtype=np.uint64)
    old = np.stack([flip_bits(hashes, 1, 5), hashes[3]])
    seen = {"patients": ["p", "r", "train/A/2"], "hashes": torch.from_numpy(old.view(np.int64))}
    records = records_of("o", "00P.0", "train/A/2", "q", "s")  # p in another spelling; the third names no patient
    folder = data.Folder(records, None, torch.from_numpy(hashes.view(np.int64)), None, None, [], "")
    assert data.seen_before(folder.traces(np.arange(5)), seen) == "2 of these images and 1 of these patients"
    assert data.seen_before(folder.traces(np.array([3])), seen) == "1 of these images and 0 of these patients"
    assert data.seen_before(folder.traces(np.array([0, 2, 4])), seen) == ""


# --- the demo set ---


def test_the_demo_set_is_a_function_of_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.draw_demo(tmp_path / name, images=40, seed=seed)
    a, c = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert contents(tmp_path / "b") == a
    assert all(a[name] != c[name] for name in a)


def test_without_data_the_demo_set_is_drawn_and_announced(tmp_path, monkeypatch, capsys):
    draw_demo = data.draw_demo
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "draw_demo", lambda root: draw_demo(root, images=40))
    with pytest.raises(data.UserError, match="images of no class"):
        load(tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(load(data.find_root(None)).records) == 32
    assert "DEMO DATA" in capsys.readouterr().err


def test_the_demo_set_has_two_images_per_patient_all_kinds_and_no_problem(demo):
    records = data.scan(demo)
    assert set(Counter(r.patient for r in records).values()) == {2}
    kinds = {(r.label, r.subtype) for r in records}
    assert kinds == {("NORMAL", ""), ("PNEUMONIA", "bacterial"), ("PNEUMONIA", "viral")}
    report = data.check(demo)
    assert report["problems"] == report["warnings"] == {}


# --- check ---


def mark_corner(path):
    image = np.array(Image.open(path))
    image[-6:, -12:] = 255
    Image.fromarray(image).save(path)


def pad_file(path):
    path.write_bytes(path.read_bytes() + bytes(500))  # Pillow ignores what follows the image


MARKS = {  # how the images of one class are changed, their extension, what separates the classes then
    "corner": (mark_corner, "png", ["border"]),
    "bytes of JPEG": (pad_file, "jpeg", ["file"]),
    "bytes of PNG, which depend on the picture": (pad_file, "png", []),
}


@pytest.mark.parametrize("case", MARKS)
def test_the_audit_finds_what_marks_one_class(tmp_path, case):
    change, ending, found = MARKS[case]
    root = tree(tmp_path / "d", 120, ending)
    for path in (root / "train/PNEUMONIA").iterdir():
        change(path)
    report = data.check(root)
    said = [line.split()[1] for line in report["warnings"] if "separates NORMAL from PNEUMONIA with AUROC" in line]
    assert said == found
    for row in report["audit"]:
        is_marked = row["from"].split()[1] in found
        assert (row["auroc"] > 0.95) == is_marked


def test_the_error_of_an_auroc_matches_hanley_and_mcneil():
    assert data.auroc_error(0.8, 50, 100) == pytest.approx(0.04125, abs=1e-5)


def test_check_counts_and_measures(tmp_path):
    root = tree(tmp_path / "d", 8, "png")
    shutil.copy(root / "train/NORMAL/IM-1-0001.png", root / "train/NORMAL/IM-1-0002.png")  # of one patient
    save(root, {"test/NORMAL/own.png": random_image(70, 20, 40), "test/PNEUMONIA/VIRUS-2-0001.png": random_image(71)})
    folders = data.check(root)["folders"]
    train, test = folders["train/NORMAL"], folders["test/NORMAL"]
    assert (train["images"], train["patients"]) == (5, 4)
    assert folders["train/PNEUMONIA"]["viral"] == 4
    assert test["mode L, 8 bits"] == 1
    assert (test["width"], test["height"], test["aspect"]) == (40, 20, 2)
    assert test["brightness"] == pytest.approx(random_image(70, 20, 40).mean(), rel=0.02)


NORMAL = "train/NORMAL/IM-1-0001.png"
COUNTED = "copies without a common patient id, counted as one patient"
FINDINGS = {  # where a darker copy of NORMAL is put, which kind of finding it is, and its message
    "same patient": ("train/NORMAL/IM-1-0002.png", None, ""),
    "other patient": ("train/NORMAL/IM-9-0001.png", "warnings", COUNTED),
    "other class": ("train/PNEUMONIA/IM-1-0001.png", "problems", "copies whose labels differ"),
    "other split": ("test/NORMAL/IM-9-0001.png", "problems", "copies across splits"),
    "shared patient": ("test/NORMAL/IM-1-0002.png", "problems", "patients in both train and test"),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_check_finds_copies_and_leaks(tmp_path, case):
    place, kind, message = FINDINGS[case]
    root = tree(tmp_path / "d", 6, "png")
    for i, path in enumerate(file_names("test", 3000, 2, "png")):
        save(root, {path: random_image(70 + i)})
    save(root, {place: (random_image(0) * 0.8).astype(np.uint8)})
    report = data.check(root)
    if kind is None:
        assert report["problems"] == report["warnings"] == {}
    else:
        assert report[kind][message] in (["IM-1"], [f"{NORMAL} = {place}"], [f"{place} = {NORMAL}"])
    done = run_script("data.py", "check", root, cwd=tmp_path)
    assert done.returncode == (kind == "problems")


FOUND = (
    "PROBLEM: patients in both train and test: 1 (IM-1)",
    "WARNING: only one class in test: 1 (NORMAL)",
    "WARNING: left out, can't be used: 2 (train/NORMAL/drawing.png: a mask or drawing: at most three grey levels,",
    "WARNING: of 9 images, these have no patient id, so each counts as a patient: 2",
    "fingerprint of train: ",
    "fingerprint of test: ",
)


def test_what_check_finds_is_printed_and_counted(tmp_path):
    root = tree(tmp_path / "d", 6, "png")
    save(root, {"train/NORMAL/drawing.png": np.eye(30, dtype=np.uint8)})
    touch(root, "train/PNEUMONIA/broken.png")
    save(root, {"test/NORMAL/IM-1-0003.png": random_image(70)})
    done = run_script("data.py", "check", root, cwd=tmp_path)
    assert done.returncode == 1 and not done.stderr
    for start in FOUND:
        assert sum(line.startswith(start) for line in done.stdout.splitlines()) == 1, start
    assert done.stdout.endswith("1 problem, 3 warnings; results on this folder would be invalid\n")
    report = json.loads(run_script("data.py", "check", root, "--json", cwd=tmp_path).stdout)
    assert (len(report["problems"]), len(report["warnings"])) == (1, 3)


def test_check_of_a_folder_without_a_usable_image_names_the_files(tmp_path):
    report = data.check(touch(tmp_path, "train/A/1.png", "train/B/1.png"))
    assert len(report["warnings"]["left out, can't be used"]) == 2
    assert report["audit"] == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.UserError, match="nor in metadata.csv$"):  # and no warning that applies to nothing
        data.check(tmp_path / "empty")


@needs_pydicom
def test_check_counts_lateral_views_among_frontal_ones(tmp_path):
    for i, view in enumerate(("PA", "LL", "LATERAL")):
        path = f"train/A/{i}.dcm"
        content = dicom(stored(12, picture=random_image(i)), 12, PatientID=str(i + 1), ViewPosition=view)
        touch(tmp_path, path, content=content)
    report = data.check(tmp_path)
    lateral = {"lateral views among 3 images": ["train/A/1.dcm", "train/A/2.dcm"]}
    assert report["warnings"] == {**lateral, "only one class in train": ["A"]}


# --- download ---


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as z:
        for name in ("chest_xray/train/NORMAL/a.jpeg", "chest_xray/test/NORMAL/b.jpeg", "__MACOSX/train/NORMAL/c.jpeg"):
            z.writestr(name, name)
    return path


def test_the_download_is_unpacked_and_not_repeated(tmp_path, archive):
    target = data.download(tmp_path / "d", archive.as_uri(), data.sha256(archive))
    assert list(contents(tmp_path / "d")) == ["chest_xray/test/NORMAL/b.jpeg", "chest_xray/train/NORMAL/a.jpeg"]
    archive.unlink()
    assert data.download(tmp_path / "d", archive.as_uri()) == target  # nothing is fetched again


@pytest.mark.parametrize(("checksum", "message"), [("0" * 64, "invalid hash value"), (None, "zip")])
def test_a_bad_download_is_one_line_and_leaves_nothing(tmp_path, archive, checksum, message):
    archive.write_bytes(b"not an archive")
    with pytest.raises(data.UserError, match=message) as caught:
        data.download(tmp_path / "d", archive.as_uri(), checksum or data.sha256(archive))
    assert "\n" not in str(caught.value) and "Kaggle" in str(caught.value)
    assert not list((tmp_path / "d").iterdir())
    touch(tmp_path, "chest_xray/notes.txt")
    with pytest.raises(data.UserError, match="chest_xray exists, but has no train/"):
        data.download(tmp_path, archive.as_uri())


def test_a_server_that_is_silent_for_a_minute_is_an_error(tmp_path, monkeypatch):
    def wait(*_, **__):
        raise TimeoutError(f"timed out after {socket.getdefaulttimeout()} s")

    monkeypatch.setattr(torch.hub, "download_url_to_file", wait)
    try:
        done = run_script("data.py", "download", "d", cwd=tmp_path)
    finally:
        socket.setdefaulttimeout(None)
    assert done.returncode == 2 and "timed out after 60.0 s" in done.stderr
