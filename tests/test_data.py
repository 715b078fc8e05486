"""data.py: patients and splits, reading, cache, augmentation, the check, the download and the demo set."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
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


def random_pixels(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)


def save(root, images):
    """Arrays by path, as image files."""
    for path, pixels in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / path)
    return root


# --- command line and files ---


def test_a_cell_that_a_spreadsheet_would_run_is_text(tmp_path):
    rows = [{"path": path, "logit": -1.5} for path in ("=1+1", "+x", "-x", "@x", "a=b", 'two "quotes", a comma')]
    data.write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", newline="") as f:
        read = list(csv.DictReader(f))
    assert [r["path"] for r in read] == ["'=1+1", "'+x", "'-x", "'@x", "a=b", 'two "quotes", a comma']
    assert {r["logit"] for r in read} == {"-1.5"}  # a negative number is no formula


def test_messages_are_one_short_line_without_control_characters(capsys):
    data.warn("a\x1b[31mb\nc" + "x" * 1000 + "the end")
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line and len(line) < 320 and line.endswith("the end")


# --- patients and splits ---


IDENTIFY = {  # the same number in two series is two patients, but v3 counts all patients in one series
    "person23_bacteria_78.jpeg": ("bacteria-23", "bacterial"),
    "person23_virus_150.jpeg": ("virus-23", "viral"),
    "IM-0115-0001.jpeg": ("IM-115", ""),
    "NORMAL2-IM-0115-0001.jpeg": ("NORMAL2-IM-115", ""),
    "IM-0011-0001-0002.jpeg": ("IM-11", ""),
    "NORMAL2-IM-1103-0001-0002.jpeg": ("NORMAL2-IM-1103", ""),
    "NORMAL-1003233-0001.jpeg": ("1003233", ""),
    "BACTERIA-1003233-0001.jpeg": ("1003233", "bacterial"),
    "VIRUS-1012345-0003.jpeg": ("1012345", "viral"),
    "scan_0001.jpeg": (None, ""),
    "person_bacteria_1.jpeg": (None, ""),
}


@pytest.mark.parametrize("name", IDENTIFY)
def test_identify(name):
    assert data.identify(name)[:2] == IDENTIFY[name]


def test_scan_takes_images_and_counts_what_it_passes_over(tmp_path, capsys):
    wanted = ["train/NORMAL/IM-0001-0001.jpeg", "train/PNEUMONIA/deep/person2_virus_1.PNG", "train/PNEUMONIA/x.jfif"]
    hidden = ["__MACOSX/NORMAL/a.jpeg", "NORMAL/._IM-0001-0001.jpeg", "NORMAL/.DS_Store", ".hidden/c.jpeg"]
    hidden += ["PNEUMONIA/__MACOSX/b.jpeg", "NORMAL/.ipynb_checkpoints/a.jpeg", "NORMAL/@eaDir/a.jpeg"]
    other = ["NORMAL/notes.txt", "NORMAL/more.txt", "PNEUMONIA/Thumbs.db", "PNEUMONIA/README"]
    touch(tmp_path, *wanted, *(f"train/{p}" for p in hidden + other))
    records = data.scan(tmp_path, "train")
    assert [r.path for r in records] == wanted
    assert [r.label for r in records] == ["NORMAL", "PNEUMONIA", "PNEUMONIA"]
    assert [r.patient for r in records] == ["IM-1", "virus-2", "train/PNEUMONIA/x.jfif"]
    assert [r.known_patient for r in records] == [True, True, False]
    (line,) = capsys.readouterr().err.splitlines()
    assert "4 files" in line and "(2 .txt, 1 no ending, 1 .db)" in line


def test_images_come_sorted_by_folder(tmp_path):
    """The order goes into a run's fingerprint of its data."""
    paths = ["train/A/a/1.png", "train/A/a-b/1.png", "train/A/b.png", "train/B/a/2.png", "train/B/a-b/1.png"]
    assert [r.path for r in data.scan(touch(tmp_path, *paths), "train")] == paths
    table(tmp_path, "file_name,label\n" + "".join(f"{p},{'YX'[i % 2]}\n" for i, p in enumerate(paths)))
    by_label = [paths[3], paths[1], *sorted(paths[::2])]
    assert [r.path for r in data.scan(tmp_path, "train")] == sorted(by_label[:2]) + by_label[2:]


def test_images_in_no_class_folder_are_counted(tmp_path, capsys):
    touch(tmp_path, *file_names("train", 0, 6), "train/a.png", "train/b.jpeg", "train/._c.png", "train/README.txt")
    assert len(data.scan(tmp_path, "train")) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert f"2 images that lie in {tmp_path}/train itself" in line


@pytest.mark.parametrize("names", ["TRAIN Val Test", "Train VALID TEST", "train Validation test"])
def test_folders_of_splits_in_any_case(tmp_path, names):
    train, val, test = names.split()
    touch(tmp_path, *file_names(train, 0, 40), *file_names(val, 1000, 100), *file_names(test, 5000, 10))
    records = data.scan_all(data.find_root(str(tmp_path)))
    assert Counter(r.split for r in records) == {"train": 40, "val": 100, "test": 10}
    assert {r.path.split("/")[0] for r in records} == set(names.split())


@pytest.mark.skipif(os.name == "nt", reason="names differ in case alone")
@pytest.mark.parametrize("folders", ["Val val", "val valid", "Train train", "TEST test"])
def test_two_folders_for_a_split_are_an_error(tmp_path, folders):
    a, b = folders.split()
    touch(tmp_path, *file_names("train", 0, 40), *file_names(a, 1000, 10), *file_names(b, 2000, 10))
    done = run_script("data.py", "check", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and f"several folders for {data.split_of(a)}: {a}, {b}" in done.stderr
    with pytest.raises(data.UserError, match=f"{a}, {b}"):
        data.find_training(tmp_path, 5, 0)


LINKS = {  # where a link in train/NORMAL leads, relative to that folder, and how many images are then found in it
    "itself": (".", 21),
    "within the class": ("deep", 21),
    "within the root": ("../../pool/more", 24),
    "outside": ("../../../outside", 24),
    "a loop outside": ("../../../loop", 22),
}


@pytest.mark.parametrize("case", LINKS)
def test_each_folder_counts_once_whatever_the_links(tmp_path, case):
    target, count = LINKS[case]
    root = touch(tmp_path / "d", *file_names("train", 0, 40), "train/NORMAL/deep/IM-900-0001.jpeg")
    for folder in (root / "pool/more", tmp_path / "outside"):
        touch(folder, *(f"IM-{i}-0001.jpeg" for i in (901, 902, 903)))
    touch(tmp_path, "loop/IM-904-0001.jpeg")
    (tmp_path / "loop/back").symlink_to("../loop", target_is_directory=True)
    (root / "train/NORMAL/link").symlink_to(target, target_is_directory=True)
    assert Counter(r.label for r in data.scan_all(root)) == {"NORMAL": count, "PNEUMONIA": 20}


def test_a_link_to_another_class_or_split_is_said_by_what_it_brings(tmp_path, capsys):
    root = tree(tmp_path / "d")
    (root / "train/OTHER").symlink_to("NORMAL", target_is_directory=True)
    records = data.scan(root, "train")
    data.warn_contradictions(records, data.load_images(root, records, 16).digests)
    assert "3 images appear under several labels" in capsys.readouterr().err
    assert any("3 images have copies across classes" in line for line in data.check(root)["problems"])
    (root / "test").symlink_to("train", target_is_directory=True)
    with pytest.raises(data.UserError, match="6 patients are in both train and test"):
        data.find_training(root, 2, 0)


LAYOUTS = {
    "train has no class folders": "",
    "no class folders": "train/a.jpeg",
    "only one class with images, NORMAL": "train/NORMAL/a.jpeg train/PNEUMONIA/notes.txt",
    "C, which is not among A, B": "train/A/a.jpeg train/B/b.jpeg test/A/c.jpeg test/C/d.jpeg",
    "calls a class Normal that is NORMAL elsewhere": "train/NORMAL/a.png train/X/b.png test/Normal/c.png test/X/d.png",
    "too few patients": "train/A/a.jpeg train/B/b.jpeg",
}


@pytest.mark.parametrize("message", LAYOUTS)
def test_errors_of_layout(tmp_path, message):
    with pytest.raises(data.UserError, match=message):
        data.find_training(touch(tmp_path, *LAYOUTS[message].split()), 5, 0)


def test_a_class_that_test_lacks_is_a_problem(tmp_path):
    root = save(tree(tmp_path / "d"), {"test/PNEUMONIA/x.bmp": random_pixels(99)})
    assert "test/ has no image of NORMAL" in data.check(root)["problems"]


def test_check_refuses_what_training_refuses(tmp_path):
    touch(tmp_path / "d", *file_names("train", 0, 40), "train/normal/a.jpeg")
    done = run_script("data.py", "check", "d", cwd=tmp_path)
    assert done.returncode == 2 and "differ in case alone" in done.stderr


@pytest.mark.parametrize("test", ["", "test/notes.txt", "test/NORMAL/notes.txt", "test/NORMAL/a.png"])
def test_training_does_without_a_whole_test_folder(tmp_path, test):
    touch(tmp_path, *file_names("train", 0, 40), *test.split())
    assert len(data.find_training(tmp_path, 5, 0)) == 40


def test_find_root(tmp_path, monkeypatch):
    with pytest.raises(data.UserError, match="nowhere does not exist"):
        data.find_root(str(tmp_path / "nowhere"))
    touch(tmp_path, "chest_xray/train/NORMAL/a.jpeg")
    assert data.find_root(str(tmp_path)) == data.find_root(str(tmp_path / "chest_xray")) == tmp_path / "chest_xray"
    monkeypatch.chdir(tmp_path)
    assert data.find_root(None) == data.DEMO_ROOT and not data.DEMO_ROOT.exists()  # finds, and draws nothing


def many_records(patients=600):
    """Patients of one to eight images in five strata of very different sizes."""
    rng = np.random.default_rng(0)
    strata = [
        ("NORMAL", "", "IM"),
        ("NORMAL", "", "NORMAL2-IM"),
        ("P", "viral", "virus"),
        ("P", "bacterial", "bacteria"),
    ]
    records = []
    for i in range(patients):
        label, subtype, series = strata[min(int(rng.exponential(1.2)), 3)]
        for k in range(rng.integers(1, 9)):
            records.append(data.Record(f"{i}-{k}", label, "train", f"p{i}", subtype, series, 0, 0))
    return records


def test_folds_keep_patients_together_and_strata_even():
    records = many_records()
    folds = data.draw_folds(records, 10)
    np.random.default_rng(1).shuffle(records)
    again = dict(zip([r.path for r in records], data.draw_folds(records, 10)))  # in whatever order the files come
    records = many_records()
    assert [again[r.path] for r in records] == folds
    assert max(Counter(p for p, _ in {(r.patient, f) for r, f in zip(records, folds)}).values()) == 1
    for stratum in {(r.label, r.subtype, r.series) for r in records}:
        inside = [f for r, f in zip(records, folds) if (r.label, r.subtype, r.series) == stratum]
        counts = [inside.count(k) for k in range(10)]
        assert max(counts) - min(counts) <= 8  # the largest patient


def test_each_image_is_held_out_by_one_fold(tmp_path):
    touch(tmp_path, *file_names("train", 0, 60))
    held_out = []
    for fold in range(5):
        held_out += [r.path for r in data.find_training(tmp_path, 5, fold) if r.split == "val"]
    assert sorted(held_out) == sorted(r.path for r in data.scan(tmp_path, "train"))


def file_names(split, start, count, series="person{}_virus_1.jpeg"):
    """Half of count images in each class, every one a patient of its own."""
    classes = ("NORMAL/IM-{}-0001.jpeg", "PNEUMONIA/" + series)
    return [f"{split}/{classes[i % 2].format(start + i)}" for i in range(count)]


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
@pytest.mark.parametrize("count, folded", [(16, True), (98, True), (100, False)])
def test_val_folder(tmp_path, capsys, folder, count, folded):
    touch(tmp_path, *file_names("train", 0, 40), *file_names(folder, 1000, count), *file_names("test", 5000, 10))
    records = data.find_training(tmp_path, 5, 0)
    warnings = capsys.readouterr().err.splitlines()
    assert len(records) == 40 + count
    held_out = [r.path for r in records if r.split == "val"]
    if folded:
        assert len(warnings) == 1 and f"val holds only {count} images" in warnings[0]
        assert len(held_out) == pytest.approx(0.2 * len(records), abs=3)
    else:
        assert not warnings and sum(p.startswith(f"{folder}/") for p in held_out) == len(held_out) == count


@pytest.mark.parametrize("split, count", [("test", 10), ("val", 100)])
def test_shared_patients_are_an_error(tmp_path, split, count):
    touch(
        tmp_path,
        *file_names("train", 0, 40),
        *file_names(split, 1000, count),
        f"{split}/PNEUMONIA/person7_virus_2.jpeg",
    )
    with pytest.raises(data.UserError, match=rf"1 patients are in both train and {split} .*\(virus-7\)"):
        data.find_training(tmp_path, 5, 0)


POSITIVE = {  # classes, what is asked for, the index, whether it is a guess that is said
    "by name": ("NORMAL PNEUMONIA", None, 1, False),
    "by name, in other case": ("Pneumonia normal", None, 0, False),
    "guessed": ("NEUMONIA NORMAL", None, 1, True),
    "asked for": ("NEUMONIA NORMAL", "NEUMONIA", 0, False),
    "against the name": ("NORMAL PNEUMONIA", "NORMAL", 0, False),
}


@pytest.mark.parametrize("case", POSITIVE)
def test_positive_class(capsys, case):
    names, asked, index, guessed = POSITIVE[case]
    assert data.positive_index(names.split(), asked) == index
    assert ("is a guess: NORMAL" in capsys.readouterr().err) == guessed
    with pytest.raises(data.UserError, match="--positive X is not one of"):
        data.positive_index(names.split(), "X")


def test_names_that_tell_no_patient_are_counted(tmp_path, capsys):
    touch(tmp_path, *file_names("train", 0, 40, series="scan{}.jpeg"))
    assert len({r.patient for r in data.find_training(tmp_path, 5, 0)}) == 40
    (line,) = capsys.readouterr().err.splitlines()
    assert "20 of 40" in line


# --- read ---


def encoded(kind, pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = np.add.outer(np.linspace(0, 180, 60), np.linspace(0, 75, 90)).round().astype(np.uint8)
PICTURE[5:20, 50:80] //= 3  # no symmetry, so that no flip or turn goes unnoticed
GREY, DEEP = Image.fromarray(PICTURE), PICTURE.astype(np.uint16) * 257


def deepened(bits, picture=PICTURE):
    """The picture's levels on the scale of so many bits."""
    return (picture * ((2**bits - 1) / 255)).round().astype(np.uint16)


def white_is_zero(pixels):
    """TIFF bytes with PhotometricInterpretation (262) set from 1 to 0: Pillow writes no such deep file itself."""
    entry, patched = struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0)
    content = encoded("TIFF", pixels)
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
    "grey.png": (GREY, 0),
    "grey.tiff": (GREY, 0),
    "grey.bmp": (GREY, 0),
    "grey.pgm": (GREY, 0),
    "grey.jp2": (GREY, 0),
    "grey.gif": (GREY, 0),
    "rgb.png": (GREY.convert("RGB"), 0),
    "rgb.webp": (GREY.convert("RGB"), 0),
    "rgba.png": (GREY.convert("RGBA"), 0),
    "la.png": (GREY.convert("LA"), 0),
    "palette.png": (GREY.convert("RGB").quantize(256), 2),
    "cmyk.tiff": (GREY.convert("CMYK"), 1),
    "cmyk.jpeg": (GREY.convert("CMYK"), 6),
    "16bit.pgm": (Image.fromarray(DEEP), 0),
    "16bit-big-endian.tiff": (Image.fromarray(DEEP.astype(">u2")), 0),
    "32bit.tiff": (Image.fromarray(PICTURE.astype(np.int32) * 257), 0),
    "float.tiff": (Image.fromarray(PICTURE.astype(np.float32) / 255), 0),
    "float-255.tiff": (Image.fromarray(PICTURE.astype(np.float32)), 0),
    "float-overshoot.tiff": (Image.fromarray((PICTURE / 254).astype(np.float32)), 1),
    "float-below-zero.tiff": (Image.fromarray(PICTURE.astype(np.float32) / 255 - np.float32(1e-5)), 0),
    "float-signed.tiff": (Image.fromarray((PICTURE / 127.5 - 1).astype(np.float32)), 0),
    "white-is-zero.tiff": (white_is_zero(65535 - DEEP), 0),
    "white-is-zero-12.tiff": (white_is_zero(4095 - deepened(12)), 0),
    "white-is-zero-float.tiff": (white_is_zero((1 - PICTURE / 255).astype(np.float32)), 0),
}


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_the_grey_picture(tmp_path, name, size):
    image, tolerance = FORMATS[name]
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, quality=98, lossless=True)
    pixels, info = data.read_image(tmp_path / name, size)
    reference = GREY.resize((size, size), Image.Resampling.BICUBIC) if size else GREY
    assert pixels.dtype == np.uint8 and (info.width, info.height) == (90, 60)
    assert np.abs(pixels.astype(int) - np.asarray(reference)).max() <= tolerance
    assert info.colour <= tolerance
    assert (tmp_path / name).suffix in data.IMAGE_SUFFIXES


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", range(8, 17))
def test_any_depth_gives_the_same_grey_levels(kind, bits):
    pixels, info = data.read_image(io.BytesIO(encoded(kind, deepened(bits))), None)
    np.testing.assert_array_equal(pixels, PICTURE)
    assert info.depth == bits


@pytest.mark.parametrize("bits", range(8, 17))
def test_any_depth_of_signed_samples(bits):
    """Of 5,400 pixels five are odd, at either end."""
    samples = deepened(bits).astype(np.int32) - 2 ** (bits - 1)
    samples[0, :5], samples[1, :5] = 10**6, -(10**6)
    pixels, info = data.read_image(io.BytesIO(encoded("TIFF", samples)), None)
    np.testing.assert_array_equal(pixels[2:], PICTURE[2:])
    assert info.depth == bits


@pytest.mark.parametrize("odd", [1, 5])
@pytest.mark.parametrize("bits", [8, 9, 12, 15])
def test_odd_pixels_change_only_themselves(bits, odd):
    samples = deepened(bits)
    samples[0, :odd] = 65535
    pixels, info = data.read_image(io.BytesIO(encoded("PNG", samples)), None)
    np.testing.assert_array_equal(pixels[1:], PICTURE[1:])
    assert (pixels[0, :odd] == 255).all() and info.depth == bits


def test_depth_of_a_dark_picture():
    """A third as bright: its own values tell 11 bits, so that it comes out brighter, unless the file states 12."""
    samples = deepened(12, PICTURE / 3)
    pixels, info = data.read_image(io.BytesIO(encoded("TIFF", samples)), None)
    assert info.depth == 11 and np.abs(pixels - PICTURE * (2 / 3)).max() <= 1
    for stated in (encoded("TIFF", samples, tiffinfo={281: 4095}), twelve_bit_tiff(samples)):
        pixels, info = data.read_image(io.BytesIO(stated), None)
        assert info.depth == 12 and np.abs(pixels - PICTURE / 3).max() <= 1
    assert data.read_image(io.BytesIO(encoded("TIFF", samples, tiffinfo={281: 65535})), None)[1].depth == 11


@pytest.mark.parametrize("bits, lowest", [(8, 0), (8, -128), (12, -2048)])
def test_dark_pictures_whose_depth_is_known(bits, lowest):
    """No fewer than 8 bits are guessed, and signed samples tell their depth by the lowest."""
    samples = deepened(bits, PICTURE / 3).astype(np.int32) + lowest
    pixels, info = data.read_image(io.BytesIO(encoded("TIFF", samples)), None)
    assert info.depth == bits and np.abs(pixels - PICTURE / 3).max() <= 1


@pytest.mark.parametrize("kind", ["PPM", "JPEG2000"])
def test_formats_that_fill_their_range_are_not_guessed(kind):
    pixels, info = data.read_image(io.BytesIO(encoded(kind, DEEP // 4)), None)
    assert info.depth == 16 and np.abs(pixels - PICTURE / 4).max() <= 1


def test_large_deep_images_are_scaled_in_parts():
    picture = np.tile(PICTURE, (20, 20))  # 2.2 million pixels
    pixels, info = data.read_image(io.BytesIO(encoded("TIFF", deepened(10, picture))), None)
    np.testing.assert_array_equal(pixels, picture)
    assert info.depth == 10


@pytest.mark.parametrize("size", [None, 32])
def test_one_bit_images(tmp_path, size):
    binary = GREY.point(lambda v: 255 * (v > 127))
    binary.convert("1").save(tmp_path / "bits.png")
    bits, info = data.read_image(tmp_path / "bits.png", size)
    assert info.mode == "1"
    np.testing.assert_array_equal(bits, binary.resize((size, size), Image.Resampling.BICUBIC) if size else binary)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_pixels_are_black(tmp_path, mode):
    white = np.full((8, 8), 255, np.uint8)
    clear = Image.fromarray(np.pad(white[:, 4:], ((0, 0), (4, 0))))  # left half transparent
    if mode in ("RGBA", "LA"):
        image = Image.merge(mode, [Image.fromarray(white)] * (len(mode) - 1) + [clear])
        image.save(tmp_path / "x.png")
    else:  # one grey level or palette entry stands for "nothing here"
        image = Image.fromarray(np.where(np.asarray(clear) > 0, 255, 200).astype(np.uint8))
        image.convert(mode).save(tmp_path / "x.png", transparency=200)
    np.testing.assert_array_equal(data.read_image(tmp_path / "x.png", None)[0], np.asarray(clear))


@pytest.mark.parametrize("rgb, colour", [((255, 0, 0), 255), ((90, 90, 90), 0), ((100, 150, 120), 50)])
def test_colour_is_measured(tmp_path, rgb, colour):
    Image.new("RGB", (40, 30), rgb).save(tmp_path / "x.png")
    assert data.read_image(tmp_path / "x.png", 16)[1].colour == pytest.approx(colour)


# From the EXIF standard (where the stored first row and column lie): mirrored or not, quarter turns to the left.
STORED = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 1), 7: (1, 3), 8: (0, 3)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied(tmp_path, orientation, kind):
    exif, (mirrored, turns) = Image.Exif(), STORED[orientation]
    exif[0x0112] = orientation
    stored = np.rot90(np.fliplr(PICTURE) if mirrored else PICTURE, turns)
    if kind == "PNG":
        stored = deepened(12, stored)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x", kind, quality=98, exif=exif)
    pixels, _ = data.read_image(tmp_path / "x", None)
    assert pixels.shape == (60, 90) and np.abs(pixels.astype(int) - PICTURE).mean() < 1.5


def test_large_jpegs_are_decoded_small_without_loss(tmp_path, monkeypatch):
    coarse = Image.fromarray(random_pixels(0, 100, 130)).resize((1600, 1200), Image.Resampling.BICUBIC)
    full = np.clip(np.asarray(coarse) + np.random.default_rng(1).normal(0, 8, (1200, 1600)), 0, 255).astype(np.uint8)
    Image.fromarray(full).save(tmp_path / "x.jpeg", quality=90)
    with Image.open(tmp_path / "x.jpeg") as image:
        reference = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    resized, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: resized.append(self.size) or resize(self, *a, **k))
    pixels, info = data.read_image(tmp_path / "x.jpeg", 224)
    assert np.abs(pixels - reference).mean() < 1.5
    assert resized == [(800, 600)] and (info.width, info.height) == (1600, 1200)


def test_what_else_may_be_read_than_a_path(tmp_path):
    GREY.resize((900, 600)).save(tmp_path / "x.jpeg")
    expected, info = data.read_image(tmp_path / "x.jpeg", None)
    with open(tmp_path / "x.jpeg", "rb") as file, Image.open(tmp_path / "x.jpeg") as image:
        small = data.read_image(image, 64)[0]  # does not shrink the caller's own image
        assert image.size == (900, 600)
        sources = (str(tmp_path / "x.jpeg"), file, image, expected, np.stack([expected] * 3, axis=2))
        for source in sources:
            pixels, found = data.read_image(source, None)
            np.testing.assert_array_equal(pixels, expected)
            assert pixels.flags.writeable and (found.width, found.height) == (info.width, info.height)
        assert not file.closed
    np.testing.assert_array_equal(small, Image.fromarray(expected).resize((64, 64), Image.Resampling.BICUBIC))


def png_claiming(width, height):
    """A PNG of a hundred bytes whose header declares a huge picture."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b""))
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


REFUSED = {
    "truncated.jpeg": (encoded("JPEG", random_pixels(0, 200, 200))[:9000], "truncated"),
    "truncated.png": (encoded("PNG", random_pixels(0, 200, 200))[:9000], "cannot be decoded"),
    "truncated.tiff": (encoded("TIFF", random_pixels(0, 200, 200))[:9000], "not enough image data|truncated"),
    "zero.jpeg": (b"", "empty"),
    "text.jpeg": (b"patient left early\n", "not an image"),
    "postscript.jpeg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "bomb.png": (png_claiming(50_000, 50_000), "pixels"),
    "large.png": (png_claiming(11_000, 11_000), "11000 x 11000 pixels are more than"),
    "missing.jpeg": (None, "no such file"),
    "nan.tiff": (encoded("TIFF", np.array([[0.5, np.nan, 1]], np.float32)), "not finite"),
    "infinite.tiff": (encoded("TIFF", np.array([[-np.inf, 0.5, np.inf]], np.float32)), "not finite"),
    "damaged.dcm": (bytes(128) + b"DICM" + b"\1\n" * 99, "without an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(tmp_path, monkeypatch, name):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("another program would be started"))
    content, reason = REFUSED[name]
    if name == "damaged.dcm":
        pytest.importorskip("pydicom")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for size in (None, 64):
        with pytest.raises(data.ImageError, match=reason) as refused:
            data.read_image(tmp_path / name, size)
        assert str(refused.value).isprintable()


def test_deep_colour_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + struct.pack(">12H", *range(0, 12 * 300, 300)) for _ in range(4))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "deep.png").write_bytes(content)
    with pytest.raises(data.ImageError, match="16 bits a channel"):
        data.read_image(tmp_path / "deep.png", 32)


def test_reasons_are_one_printable_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("two\nlines \x1b[31m")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(data.ImageError, match="two lines") as refused:
        data.read_image(io.BytesIO(b"x"), None)
    assert str(refused.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpeg")
    with pytest.raises(data.ImageError, match="not a regular file"):
        data.read_image(tmp_path / "x.jpeg", None)


def dicom(samples, bits, photometric="MONOCHROME2", **fields):
    """A DICOM file of samples [height, width] or [height, width, 3], as an open file; fields are DICOM keywords."""
    pydicom = pytest.importorskip("pydicom")
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
        setattr(dataset, keyword, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file


def stored(bits, signed, photometric):
    """The picture as DICOM samples."""
    samples = deepened(bits).astype(np.int64)
    if photometric == "MONOCHROME1":
        samples = 2**bits - 1 - samples
    kind = f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
    return (samples - signed * 2 ** (bits - 1)).astype(kind)


@pytest.mark.extra("pydicom")
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_reads_as_the_grey_picture(bits, signed, photometric):
    samples, middle = stored(bits, signed, photometric), 2 ** (bits - 1) * (1 - signed)
    window = {"WindowCenter": [middle, 7], "WindowWidth": [2**bits, 9]}  # the first is the full range
    rescaled = {"RescaleSlope": 2, "RescaleIntercept": -100}
    low = 2 * (middle - 2 ** (bits - 1)) - 100
    high = low + 2 * (2**bits - 1)
    both = rescaled | {"WindowCenter": (low + high + 1) / 2, "WindowWidth": high - low + 1}
    for fields in ({}, window, rescaled, both, {"WindowCenter": None, "WindowWidth": None}):
        pixels, info = data.read_image(dicom(samples, bits, photometric, **fields), None)
        np.testing.assert_array_equal(pixels, PICTURE)
        assert (info.width, info.height, info.mode, info.depth) == (90, 60, photometric, bits)


@pytest.mark.extra("pydicom")
@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_dicom_that_states_16_bits_without_a_window_is_guessed(bits, signed):
    samples = stored(bits, signed, "MONOCHROME2").astype("i2" if signed else "u2")
    rescaled = {"RescaleSlope": 2, "RescaleIntercept": -100}
    for fields in ({}, rescaled):
        pixels, info = data.read_image(dicom(samples, 16, **fields), None)
        np.testing.assert_array_equal(pixels, PICTURE)
        assert info.depth == bits
    inverse, _ = data.read_image(dicom(samples, 16, "MONOCHROME1"), None)
    np.testing.assert_array_equal(inverse, 255 - PICTURE)
    window = {"WindowCenter": 0 if signed else 2**15, "WindowWidth": 2**16}
    pixels, info = data.read_image(dicom(samples, 16, **window), None)
    assert np.ptp(pixels) <= 2 ** (bits - 8) and info.depth == 16  # a window is taken at its word


@pytest.mark.extra("pydicom")
def test_dicom_window_and_rescale():
    """Against the definitions in the standard, PS3.3 C.11.1.1.2 and C.11.2.1.2.1."""
    samples = stored(12, 0, "MONOCHROME2")
    for slope, intercept, center, width in ((1, 0, 2000, 1000), (0.5, -300, 400.5, 333), (-1, 4095, 2500, 901)):
        window = {"WindowCenter": center, "WindowWidth": width}
        file = dicom(samples, 12, RescaleSlope=slope, RescaleIntercept=intercept, **window)
        shares = (samples.astype(float) * slope + intercept - (center - 0.5)) / (width - 1) + 0.5
        assert np.abs(data.read_image(file, None)[0] - 255 * shares.clip(0, 1)).max() <= 0.5 + 1e-6
    turned, _ = data.read_image(dicom(samples, 12, RescaleSlope=-1, RescaleIntercept=0), None)
    np.testing.assert_array_equal(turned, 255 - PICTURE)


@pytest.mark.extra("pydicom")
def test_dicom_of_many_frames_of_colour_and_compressed():
    pydicom = pytest.importorskip("pydicom")
    frames = np.stack([PICTURE, 255 - PICTURE])
    first, _ = data.read_image(dicom(PICTURE, 8, NumberOfFrames=2, PixelData=frames.tobytes()), None)
    np.testing.assert_array_equal(first, PICTURE)
    red = np.stack([PICTURE, 0 * PICTURE, 0 * PICTURE], axis=2)
    pixels, info = data.read_image(dicom(red, 8, "RGB"), None)
    np.testing.assert_array_equal(pixels, Image.fromarray(red).convert("L"))
    assert info.colour == pytest.approx(PICTURE.mean(), abs=1)
    syntaxes = {"JPEGBaseline8Bit": ("JPEG", PICTURE, 8), "JPEG2000Lossless": ("JPEG2000", DEEP, 16)}
    for syntax, (kind, samples, bits) in syntaxes.items():
        dataset = pydicom.dcmread(io.BytesIO(dicom(samples, bits).getvalue()))
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        options = {"quality": 98} if kind == "JPEG" else {"no_jp2": True}
        dataset.PixelData = pydicom.encaps.encapsulate([encoded(kind, samples, **options)])
        dataset["PixelData"].VR = "OB"
        file = io.BytesIO()
        dataset.save_as(file)
        assert np.abs(data.read_image(file, None)[0].astype(int) - PICTURE).max() <= 6


@pytest.mark.extra("pydicom")
def test_dicom_patients_are_hashed(tmp_path):
    samples = stored(12, 0, "MONOCHROME2")
    for i, patient in enumerate(("Miller 1970", "Miller 1970", "Miller 1971", "", None)):
        content = dicom(samples, 12, PatientID=patient, PatientName="Miller^Ann").getvalue()
        (touch(tmp_path, f"train/A/{i}.dcm") / f"train/A/{i}.dcm").write_bytes(content)
    records = data.scan(tmp_path, "train")
    patients = [r.patient for r in records]
    assert patients[0] == patients[1] != patients[2] and "Miller" not in str(records)
    assert all(len(bytes.fromhex(patient)) == 8 for patient in patients[:3])
    assert patients[3:] == ["train/A/3.dcm", "train/A/4.dcm"]


@pytest.mark.extra("pydicom")
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_dicom_that_cannot_be_read(monkeypatch):
    samples = stored(12, 0, "MONOCHROME2")
    for fields in ({"PhotometricInterpretation": "PALETTE COLOR"}, {"RescaleSlope": "nan"}, {"Rows": 9999}):
        with pytest.raises(data.ImageError):
            data.read_image(dicom(samples, 12, **fields), None)
    with pytest.raises(data.ImageError, match="pixels are more than"):
        data.read_image(dicom(samples, 12, Rows=60_000, Columns=60_000), None)
    report = dicom(samples, 12, PixelData=None).getvalue().replace(b"\xe0\x7f\x10\x00", b"\xe0\x7f\x11\x00")
    with pytest.raises(data.ImageError, match="without an image"):
        data.read_image(io.BytesIO(report), None)
    file = dicom(samples, 12)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(data.ImageError, match="pip install pydicom"):
        data.read_image(file, None)


# --- metadata.csv ---


def table(root, text, folder=""):
    (root / folder / "metadata.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return root


@pytest.mark.parametrize("name", ["pipe", "pipe.dcm", "pipe.png"])
def test_a_named_pipe_is_not_waited_for(tmp_path, name):
    root = tree(tmp_path / "d")
    os.mkfifo(root / "train" / "NORMAL" / name)
    assert len(data.load_images(root, data.scan(root, "train"), 16).failed) <= 1


def test_a_table_tells_patients_subtypes_and_groups(tmp_path, capsys):
    touch(
        tmp_path, "train/NORMAL/a.png", "train/NORMAL/b.png", "train/PNEUMONIA/c.png", "train/PNEUMONIA/IM-0007-1.png"
    )
    rows = "file_name,patient,subtype,sex\ntrain/NORMAL/a.png,p1,,F\ntrain/NORMAL/b.png,p1,,F\n"
    rows += "train/PNEUMONIA/c.png,p2,viral,M\ntrain/PNEUMONIA/gone.png,p3,viral,M\n"
    records = data.scan(table(tmp_path, rows), "train")
    assert [(r.patient, r.subtype, r.groups) for r in records] == [
        ("p1", "", {"sex": "F"}),
        ("p1", "", {"sex": "F"}),
        ("IM-7", "", {}),
        ("p2", "viral", {"sex": "M"}),
    ]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "file is not there: 1 (train/PNEUMONIA/gone.png)" in warnings[1]
    assert "does not know these images of train: 1 (train/PNEUMONIA/IM-0007-1.png)" in warnings[0]


WRITTEN = {  # the same table as other programs write it
    "plain": "file_name,label,split,patient\nx/1.png,A,train,p\nx/2.png,B,train,q\nx/3.png,A,test,r\n",
    "semicolons, CRLF": "file_name;label;split;patient\r\nx/1.png;A;train;p\r\nx/2.png;B;train;q\r\nx/3.png;A;test;r\r\n",
    "byte order mark, quotes": '\ufefffile_name,"label",split,patient\n"x/1.png","A",train,p\nx/2.png,B,train,q\nx/3.png,A,test,r\n',
    "backslashes, capitals, tabs": "file_name\tlabel\tsplit\tpatient\nx\\1.png\tA\tTrain\tp\nx\\2.png\tB\tTRAIN\tq\nx\\3.png\tA\tTest\tr\n",
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_table_with_labels_and_splits_needs_no_class_folders(tmp_path, kind):
    root = table(touch(tmp_path, "x/1.png", "x/2.png", "x/3.png", "x/4.png"), WRITTEN[kind])
    train, test = data.scan(root, "train"), data.scan(root, "test")
    assert [(r.path, r.label, r.patient) for r in train] == [("x/1.png", "A", "p"), ("x/2.png", "B", "q")]
    assert [(r.path, r.label, r.patient) for r in test] == [("x/3.png", "A", "r")]


def test_a_table_in_the_splits_folder(tmp_path, capsys):
    touch(tmp_path, "train/1.png", "train/2.png", "valid/3.png")
    table(tmp_path, "file_name,label\n1.png,Überweisung\n2.png,\n", "train")
    records = data.scan(table(tmp_path, "file_name,label\n3.png,B\n", "valid"), "train")
    assert [(r.path, r.label) for r in records] == [("train/1.png", "Überweisung")]
    assert "has rows of train without a label, left out: 1 (train/2.png)" in capsys.readouterr().err
    assert [r.path for r in data.scan(tmp_path, "val")] == ["valid/3.png"]


BAD_TABLES = {
    "no column file_name; its columns are path, label": "path,label\nx,A\n",
    "x/1.png is listed twice": "file_name,label,split\nx/1.png,A,train\nx//../x/1.png,B,train\n",
    "has a column twice": "file_name,label,split,split\nx/1.png,A,train,test\n",
    "../1.png is not within the folder": "file_name,label,split\n../1.png,A,train\n",
    "the split of x/1.png is dev": "file_name,label,split\nx/1.png,A,dev\n",
    "the split of x/1.png is not told": "file_name,label\nx/1.png,A\n",
    "save it as CSV in UTF-8": b"file_name,label\nx\xff.png,A\n",
    "has no column file_name": "",
    "call the column patient instead of Patient_ID": "file_name,Patient_ID\nx/1.png,A\n",
    "differ in case alone: NORMAL, normal": "file_name,label,split\nx/1.png,normal,train\nx/2.png,NORMAL,train\n",
    "the row of x/1.png has more cells": "file_name,label,split\nx/1.png,A, upper lobe,train\n",
    "control characters": "file_name,label,split\nx/1.png,NOR\x1b[31mMAL,train\n",
}


def test_a_split_that_does_not_count_is_said(tmp_path, capsys):
    touch(tmp_path, "train/A/1.png", "train/B/2.png")
    rows = "file_name,patient,split,\ntrain/A/1.png,p,train,\ntrain/B/2.png,q,test,\n"
    assert [r.patient for r in data.scan(table(tmp_path, rows), "train")] == ["p", "q"]  # an empty cell more is none
    (line,) = capsys.readouterr().err.splitlines()
    assert "a column split but no column label" in line


@pytest.mark.parametrize("message", BAD_TABLES)
def test_a_table_that_can_not_be_used_is_an_error(tmp_path, message):
    with pytest.raises(data.UserError, match=message):
        data.scan(table(touch(tmp_path, "x/1.png", "x/2.png"), BAD_TABLES[message]), "train")


def test_what_is_wrong_with_a_split_of_the_table_is_said(tmp_path):
    touch(tmp_path, *(f"x/{i}.png" for i in range(4)))
    rows = "file_name,label,split\nx/0.png,A,train\nx/1.png,B,train\nx/2.png,A,test\nx/3.png,a,test\n"
    with pytest.raises(data.UserError, match="test differ in case alone: A, a"):
        data.scan_all(table(tmp_path, rows))


def test_a_patient_of_the_table_in_train_and_test_is_an_error(tmp_path):
    touch(tmp_path, "train/A/1.png", "train/B/2.png", "test/A/3.png", "test/B/4.png")
    names = ["train/A/1.png,p", "train/B/2.png,q", "test/A/3.png,p", "test/B/4.png,r"]
    table(tmp_path, "\n".join(["file_name,patient", *names]))
    with pytest.raises(data.UserError, match=r"1 patients are in both train and test .*\(p\)"):
        data.find_training(tmp_path, 2, 0)


# --- cache ---


def tree(root, count=6):
    """Noise images, half of them in each class of train/."""
    paths = [p.replace("jpeg", "bmp") for p in file_names("train", 1, count)]
    return save(root, {p: random_pixels(i) for i, p in enumerate(paths)})


def load(root, size=16):
    return data.load_images(root, data.scan(root, "train"), size)


def expected(root, size=16):
    return np.stack([data.read_image(root / r.path, size)[0] for r in data.scan(root, "train")])


def fail_to_read(*_):
    pytest.fail("decoded again")


def test_second_call_decodes_nothing(tmp_path, monkeypatch):
    root = tree(tmp_path / "d")
    first = load(root)
    np.testing.assert_array_equal(first.pixels, expected(root))
    monkeypatch.setattr(data, "read_image", fail_to_read)
    again = load(root)
    assert again.pixels.dtype == torch.uint8 and not again.failed
    assert torch.equal(again.digests, first.digests) and torch.equal(again.pixels, first.pixels)
    monkeypatch.setattr(data, "READER_VERSION", data.READER_VERSION + 1)
    with pytest.raises(pytest.fail.Exception):
        load(root)


def cut(length):
    return lambda stored: stored[:length]


def zero_some_pixels(stored):
    return stored[:300] + bytes(256) + stored[556:]


def flip_one_bit(stored):
    return stored[:1000] + bytes([stored[1000] ^ 1]) + stored[1001:]


@pytest.mark.parametrize("damage", [cut(0), cut(900), cut(-3), zero_some_pixels, flip_one_bit])
def test_a_damaged_cache_is_rebuilt(tmp_path, capsys, damage):
    root = tree(tmp_path / "d")
    first = load(root)
    (path,) = (root / ".cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))  # 6 x 256 bytes of pixels, and notes after them
    leftover = root / ".cache" / f".{path.name}.1.tmp"  # of a build that was killed
    leftover.write_bytes(b"x")
    os.utime(leftover, (0, 0))
    again = load(root)
    np.testing.assert_array_equal(again.pixels, expected(root))
    assert torch.equal(again.digests, first.digests) and not again.failed
    assert "damaged" in capsys.readouterr().err
    assert list((root / ".cache").iterdir()) == [path]


def repaint(root):
    """Other pixels under the same name and in as many bytes: the time alone tells."""
    path = next((root / "train/NORMAL").iterdir())
    before = path.stat()
    Image.fromarray(random_pixels(77)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size


CHANGES = {
    "touch": repaint,
    "add": lambda root: save(root, {"train/NORMAL/IM-0900-0001.png": random_pixels(99)}),
    "remove": lambda root: next((root / "train/NORMAL").iterdir()).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_rebuilds(tmp_path, change):
    root = tree(tmp_path / "d")
    load(root), load(root, size=8)
    CHANGES[change](root)
    np.testing.assert_array_equal(load(root).pixels, expected(root))
    assert len(list((root / ".cache").glob("train-16-*"))) == 1  # the outdated file is gone, the other size stays
    assert len(list((root / ".cache").glob("train-8-*"))) == 1


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    root, read, calls = tree(tmp_path / "d", 12), data.read_image, []

    def interrupted(path, size):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(path, size)

    with monkeypatch.context() as m:
        m.setattr(data, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(root)
    assert not [p for p in tmp_path.rglob("*") if "cache" in p.parts[-2] and p.is_file()]
    np.testing.assert_array_equal(load(root).pixels, expected(root))


def test_two_processes_build_at_once(tmp_path, monkeypatch, capfd):
    root, read, fork = tree(tmp_path / "d"), data.read_image, multiprocessing.get_context("fork")
    want, gate, results = expected(root).tobytes(), fork.Barrier(2), fork.SimpleQueue()

    def slow(*arguments):  # long enough to overlap
        time.sleep(0.1)
        return read(*arguments)

    def build():
        gate.wait(30)
        results.put(load(root).pixels.numpy().tobytes())

    monkeypatch.setattr(data, "read_image", slow)
    processes = [fork.Process(target=build, daemon=True) for _ in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(30)
    assert [p.exitcode for p in processes] == [0, 0]
    assert [results.get(), results.get()] == [want, want]
    assert "WARNING" not in capfd.readouterr().err
    assert [p.suffix for p in (root / ".cache").iterdir()] == [".bin"]


def test_a_cache_folder_that_cannot_be_written(tmp_path, capsys):
    root = touch(tree(tmp_path / "d"), ".cache")  # a file where the folder should be: holds for root as well
    np.testing.assert_array_equal(load(root).pixels, expected(root))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no image cache in {root}/.cache" in line and line.endswith("trying the user's cache folder")
    assert len(list(tmp_path.glob("user-cache/pneumonia/*/*.bin"))) == 1
    load(root)
    assert not capsys.readouterr().err  # the second start takes it from there


def test_no_place_for_the_cache_is_an_error_that_says_what_to_set(tmp_path):
    root = touch(tree(tmp_path / "d"), ".cache", "../user-cache")
    with pytest.raises(data.UserError, match="no image cache in .*user-cache.*directory.*; set XDG_CACHE_HOME to"):
        load(root)


def test_unreadable_files_are_reported_by_both_calls(tmp_path, capsys):
    root = tree(tmp_path / "d")
    bad = [f"train/NORMAL/IM-8{i:02}-0001.jpeg" for i in range(12)]
    for path in bad:
        (root / path).write_bytes(b"")
    records = data.scan(root, "train")
    first, second = load(root), load(root)
    assert first.failed == second.failed == {i: "the file is empty" for i, r in enumerate(records) if r.path in bad}
    assert not second.pixels[list(second.failed)].any() and second.pixels[-1].any()
    capsys.readouterr()
    assert data.report_left_out(records, first.failed) == [{"path": p, "reason": "the file is empty"} for p in bad]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and bad[0] in lines[0] and "2 more" in lines[-1]


def test_mixed_depths_are_said_at_each_start(tmp_path, capsys):
    root = tree(tmp_path / "d")
    save(root, {"train/NORMAL/IM-901-1.png": random_pixels(1)})
    load(root)
    assert not capsys.readouterr().err
    save(root, {f"train/NORMAL/IM-90{i}-1.png": deepened(12, random_pixels(i)) for i in (2, 3)})
    (root / "train/NORMAL/IM-904-1.png").write_bytes(b"broken")
    for _ in range(2):
        load(root)
        (line,) = capsys.readouterr().err.splitlines()
        assert "images of 8 bits (7) and of 12 bits (2) are mixed" in line


def test_a_file_that_was_unreadable_for_a_moment_is_read_again(tmp_path, monkeypatch):
    root, read = tree(tmp_path / "d"), data.read_image

    def for_a_moment(path, size):
        if "IM-1-" in str(path):
            raise data.ImageError("a stale file handle")
        return read(path, size)

    with monkeypatch.context() as m:
        m.setattr(data, "read_image", for_a_moment)
        assert list(load(root).failed.values()) == ["a stale file handle"]
    again = load(root)
    assert not again.failed
    np.testing.assert_array_equal(again.pixels, expected(root))


def test_digests_and_fingerprint_tell_equal_pixels(tmp_path):
    root = save(tmp_path / "d", {f"train/{c}/{n}": random_pixels(0) for c in "AB" for n in ("a.png", "b.tiff")})
    save(root, {"train/B/c.png": random_pixels(1)})
    shutil.copytree(root, tmp_path / "copy")
    digests = load(root).digests
    assert len(set(digests[:4].tolist())) == 1 and digests[4] != digests[0]
    records = data.scan(root, "train")
    before = data.fingerprint(records, digests)
    assert data.fingerprint(data.scan(tmp_path / "copy", "train"), load(tmp_path / "copy").digests) == before
    save(root, {"train/B/c.png": random_pixels(2)})
    assert data.fingerprint(records, load(root).digests) != before


# --- augment ---

SMOOTH = Image.fromarray(random_pixels(3, 8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
X, BILINEAR = torch.from_numpy(np.asarray(SMOOTH).copy())[None, None] / 255, InterpolationMode.BILINEAR
INSIDE = (..., slice(12, 52), slice(12, 52))
OPERATIONS = {  # with the random numbers at 0.75, so each parameter half-way to its largest value
    "flip": (data.flip, 1.0, lambda: TF.horizontal_flip(X), ...),
    "no flip": (data.flip, 0.5, lambda: X, ...),  # 0.75 is not below 0.5
    "brightness": (data.brightness, 0.8, lambda: TF.adjust_brightness(X, 1.4), ...),
    "contrast": (data.contrast, 0.8, lambda: TF.adjust_contrast(X, 1.4), ...),
    "gamma": (data.gamma, 2 * np.log(1.7), lambda: TF.adjust_gamma(X, 1.7), ...),
    # Area 1 - 0.75 (1 - scale) = 0.75 squared, moved by half of the room: 48 pixels from 12 on.
    "crop": (
        data.random_resized_crop,
        data.Crop(64, 1 - 0.4375 / 0.75),
        lambda: TF.resized_crop(X, 12, 12, 48, 48, [64, 64], BILINEAR, False),
        INSIDE,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_single_operations_equal_torchvision(name):
    operation, strength, reference, where = OPERATIONS[name]
    u = torch.full((1, data.NUMBERS), 0.75)
    u[:, 1] = 0.5  # the crop is a square
    changed = operation(X.clone(), u, strength)
    torch.testing.assert_close(changed[where], reference()[where], atol=1e-4, rtol=0)


def test_noise_has_the_standard_deviation_that_it_says():
    x, u = torch.full((4, 1, 96, 96), 0.5), torch.tensor([[0.2], [0.75], [0.999], [0.75]]).expand(4, 4).clone()
    u[3, 1] = 0.1
    change = data.noise(x.clone(), u, 0.04) - x
    assert torch.equal(change[0], torch.zeros(1, 96, 96))  # half of the images are left alone
    for i, sd in ((1, 0.02), (2, 0.04), (3, 0.02)):
        assert change[i].mean().abs() < 0.001 and change[i].std() == pytest.approx(sd, rel=0.05)
    assert abs(np.corrcoef(change[1].flatten(), change[3].flatten())[0, 1]) < 0.05  # another place in the normals


def test_the_border_comes_from_the_image_before():
    x = torch.stack([torch.full((1, 100, 100), v) for v in (0.1, 0.5, 0.9)])
    u = torch.tensor([[0.1, 0.0, 0, 0], [0.1, 0.999, 0, 0], [0.8, 0.5, 0, 0]])
    out = data.exchange_border(x.clone(), u, 0.7)
    for i, (width, border) in enumerate(((4, 0.9), (18, 0.1), (0, None))):
        inside = out[i, 0, width : 100 - width, width : 100 - width]
        assert inside.unique().tolist() == x[i].unique().tolist()
        assert width == 0 or out[i, 0, width - 1, 50] == out[i, 0, 50, -width] == pytest.approx(border)


BATCH = torch.from_numpy(np.stack([random_pixels(i, 40, 40) for i in range(12)]))


def apply(name, images=BATCH, seed=0, epoch=0, size=32):
    operations = data.preset(name, size)
    return data.augment(images, operations, data.draw(operations, len(images), seed, epoch))


def test_no_augmentation_is_identity():
    before = BATCH.clone()
    assert torch.equal(apply("none"), BATCH[:, None].float() / 255) and torch.equal(BATCH, before)


@pytest.mark.parametrize("name", data.PRESETS[1:])
def test_presets(name):
    operations = data.preset(name, 32)
    out = apply(name)
    assert out.shape == (12, 1, 32, 32) and out.dtype == torch.float32
    for number in (0.0, 0.99999):
        numbers = [torch.full((12, data.NUMBERS), number) for _ in operations]
        extreme = data.augment(BATCH, operations, numbers)
        assert extreme.min() >= 0 and extreme.max() <= 1 and not extreme.isnan().any()
    twins = apply(name, BATCH[:1].expand(12, -1, -1))
    assert len({t.numpy().tobytes() for t in twins}) == 12  # each has its own random numbers
    # What an image becomes depends on its own numbers: not on its place, its batch mates or their number.
    alone = [(f, s) for f, s in operations if f is not data.exchange_border]
    numbers = data.draw(alone, 12, 0, 0)
    whole = data.augment(BATCH, alone, numbers)
    parts = [data.augment(BATCH[i : i + 1], alone, [u[i : i + 1] for u in numbers]) for i in range(12)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def darken(x, u, strength):
    """An operation as a user adds one."""
    return x * (1 - strength * data.column(u[:, 0]))


def test_another_operation_changes_no_others_numbers():
    before = data.preset("medium", 32)
    after = [(darken, 0.2), *before[:2], (darken, 0.1), *before[2:]]
    numbers = dict(zip(["a", *"01", "b", *"2345"], data.draw(after, 12, 3, 7)))
    for i, u in enumerate(data.draw(before, 12, 3, 7)):
        assert torch.equal(u, numbers[str(i)])
    assert not torch.equal(numbers["a"], numbers["0"])
    darker = data.augment(BATCH, [(darken, 0.2)], [numbers["a"]])
    torch.testing.assert_close(darker, BATCH[:, None] / 255 * (1 - 0.2 * numbers["a"][:, 0].view(-1, 1, 1, 1)))


@pytest.mark.parametrize(("margin", "width"), [(0, 0), (0.1, 3), (0.4, 13)])
def test_a_margin_is_filled_with_the_mean_of_its_image(margin, width):
    images = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hidden = data.hide_margin(images, margin)
    inside = slice(width, 32 - width)
    assert torch.equal(hidden[:, inside, inside], images[:, inside, inside]) and hidden.dtype == torch.uint8
    for image, expected in zip(hidden, images.float().mean((1, 2)).round()):
        outside = image[data.border_ring(32, width)]
        assert len(outside) == 32**2 - (32 - 2 * width) ** 2 and (outside == expected).all()


def test_random_numbers_are_a_function_of_seed_and_epoch():
    def both(seed, epoch):
        return *data.draw(data.preset("robust", 32), 50, seed, epoch), data.shuffle(50, seed, epoch)

    first = both(3, 4)
    torch.manual_seed(99)  # the global generator must play no part
    state = torch.get_rng_state()
    assert all(map(torch.equal, first, both(3, 4)))
    assert torch.equal(torch.get_rng_state(), state)
    for other in ((3, 5), (4, 4), (4, 3)):
        assert not any(map(torch.equal, first, both(*other)))
    assert 0 <= first[0].min() and first[0].max() < 1
    assert sorted(first[-1].tolist()) == list(range(50)) != first[-1].tolist()


# --- stress and shortcuts ---


def test_stress():
    images = torch.full((2, 160, 160), 100, dtype=torch.uint8)
    images[:, :, 80:] = 200
    images[1, :8] = images[1, -8:] = 0  # rows that the central 85 % leave out
    partners = torch.full((2, 160, 160), 7, dtype=torch.uint8)
    before = images.clone()
    copies = dict(data.stress(images, partners, ["a.png", "b.png"]))
    assert len(copies) == 12 and torch.equal(images, before)
    assert all(c.shape == images.shape and c.dtype == torch.uint8 for c in copies.values())
    assert all(not torch.equal(c, images) for c in copies.values())
    by_hand = {
        "brightness x 0.65": (65, 130),
        "brightness x 1.4": (140, 255),
        "contrast x 1.4": (80, 220),  # 150 -+ 70
        "gamma 0.7": (132, 215),  # 255 (100 / 255) ^ 0.7 = 132.4
        "gamma 1.4": (69, 181),
        "blur": (100, 200),  # far from the edge
        "crop of 85 %": (100, 200),
    }
    for name, values in by_hand.items():
        assert (copies[name][0, 80, 8].item(), copies[name][0, 80, -9].item()) == values, name
    assert copies["crop of 85 %"][1].min() == 100
    assert copies["blur"][0, 80].unique().numel() > 2  # the edge is no longer sharp
    for sd in (0.02, 0.05):
        change = copies[f"noise {sd}"].float() - images.float()
        assert change[0].std() == pytest.approx(255 * sd, rel=0.1) and change[0].mean().abs() < 1
    exchanged = copies["border exchanged"][0]
    assert torch.equal(exchanged[16:-16, 16:-16], images[0, 16:-16, 16:-16])
    assert exchanged[:16].unique().tolist() == exchanged[:, -16:].unique().tolist() == [7]
    # The noise of an image is its own, whatever stands beside it; without partners there is no exchange.
    alone = dict(data.stress(images[1:], None, ["b.png"]))
    assert len(alone) == 11 and torch.equal(alone["noise 0.05"][0], copies["noise 0.05"][1])
    assert not torch.equal(copies["noise 0.05"][0, 5], copies["noise 0.05"][1, 5])


def test_partners_are_of_another_class_and_a_function_of_the_path():
    records = many_records(60)
    partners = data.draw_partners(records)
    assert all(records[j].label != r.label for r, j in zip(records, partners.tolist()))
    assert len(partners.unique()) > 30 and torch.equal(partners, data.draw_partners(records))


def test_border_features_see_no_lung():
    images = torch.zeros(1, 160, 160, dtype=torch.uint8)
    images[:, 15:145, 15:145] = 255
    assert data.border_features(images).shape == (1, 348) and data.border_features(images).max() == 0
    images[:, :5] = 255  # one row of the thumbnail
    assert data.border_features(images).sum() == 32


# --- the demo set and the check ---


@pytest.fixture(scope="module")
def large_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "demo"
    data.draw_demo(folder, images=1000, seed=0)
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the demo set ---


def test_demo_is_a_function_of_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.draw_demo(tmp_path / name, images=40, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_demo_overwrites_nothing(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").touch()
    with pytest.raises(data.UserError, match="not empty"):
        data.draw_demo(tmp_path / "demo", images=40)
    assert list(contents(tmp_path)) == ["demo/mine.txt"]


def test_two_processes_draw_the_demo_set_at_once(tmp_path, monkeypatch):
    rename = os.rename

    def second(new, folder):
        shutil.copytree(new, folder)  # the other process was first
        rename(new, folder)

    monkeypatch.setattr(os, "rename", second)
    data.draw_demo(tmp_path / "demo", images=40)
    assert data.is_demo(tmp_path / "demo") and [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_demo_is_sound(demo):
    records = data.scan_all(demo)
    assert len(records) == 120 and data.is_demo(demo)
    assert all(r.known_patient for r in records) and not data.shared_patients(records)
    assert set(Counter(r.patient for r in records).values()) == {2}
    assert {(r.label, r.subtype) for r in records} == {
        ("NORMAL", ""),
        ("PNEUMONIA", "bacterial"),
        ("PNEUMONIA", "viral"),
    }
    assert {data.identify(r.path.split("/")[-1])[2] for r in records} >= {"IM", "NORMAL", "bacteria", "BACTERIA"}
    opacities = json.loads((demo / "demo.json").read_text())["opacities"]
    assert opacities.keys() == {r.path for r in records}
    for r in records:
        assert len(opacities[r.path]) == {"": 0, "bacterial": 1, "viral": 2}[r.subtype]
        for x, y, rx, ry in opacities[r.path]:
            assert 0.2 < x < 0.8 and 0.3 < y < 0.7 and 0.1 < rx < 0.2 and 0.1 < ry < 0.3


def test_demo_class_is_not_in_the_histogram(large_demo):
    records = data.scan_all(large_demo)
    pixels = [data.read_image(large_demo / r.path, None)[0] for r in records]
    histograms = [np.histogram(p, 32, (0, 256))[0] / p.size for p in pixels]
    ill = np.array([r.label == "PNEUMONIA" for r in records])
    options = {"groups": [r.patient for r in records], "cv": StratifiedGroupKFold(5), "method": "predict_proba"}
    scores = cross_val_predict(HistGradientBoostingClassifier(random_state=0), histograms, ill, **options)
    assert roc_auc_score(ill, scores[:, 1]) < 0.75


# --- check ---


def draw(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (48, 40), dtype=np.uint8)).save(path, compress_level=0)


def plain(root, images=40):
    """Noise under both classes: nothing tells them."""
    rng = np.random.default_rng(0)
    for label, i in itertools.product(("NORMAL", "PNEUMONIA"), range(images)):
        series = {"NORMAL": "NORMAL", "PNEUMONIA": "BACTERIA"}[label]
        number = i if label == "NORMAL" else 1000 + i
        draw(root / f"train/{label}/{series}-{number}-0001.png", rng)
    return root


def test_audit_of_the_demo_set(large_demo):
    report = data.check(large_demo)
    assert report["problems"] == report["warnings"] == []
    assert len(report["audit"]) == 2
    for row in report["audit"]:
        a, n, m = row["auroc"], 133, 267  # training patients
        q1, q2 = a / (2 - a), 2 * a * a / (1 + a)  # Hanley and McNeil 1982
        half = 1.96 * math.sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (n * m))
        assert a < 0.6 and row["ci95"] == pytest.approx([a - half, a + half])


def mark_corner(path):
    image = np.array(Image.open(path))
    image[-6:, -12:] = 255
    Image.fromarray(image).save(path, compress_level=0)  # so that the file is as large as before


def pad_file(path):
    path.write_bytes(path.read_bytes() + bytes(500))  # Pillow ignores what follows the image


def make_colour(path):
    Image.open(path).convert("RGB").save(path)


def make_deep(path):
    Image.fromarray(np.array(Image.open(path)).astype(np.uint16) * 257).save(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [(None, []), (mark_corner, ["border"]), (pad_file, ["file"]), (make_colour, ["file"]), (make_deep, ["file"])],
)
def test_audit_finds_what_marks_one_class(tmp_path, change, found):
    root = plain(tmp_path / "d", images=60)
    for path in sorted((root / "train" / "PNEUMONIA").iterdir()):
        if change:
            change(path)
    report = data.check(root)
    said = [line for line in report["warnings"] if "tells NORMAL from PNEUMONIA with AUROC" in line]
    assert len(said) == len(found) and all(f"the {what} alone" in line for what, line in zip(found, said))
    for row in report["audit"]:
        assert (row["auroc"] > 0.95) == (row["from"].split()[1] in found)


def test_check_counts(tmp_path):
    root = plain(tmp_path / "d", images=4)
    shutil.copy(root / "train/NORMAL/NORMAL-0-0001.png", root / "train/NORMAL/NORMAL-0-0002.png")  # of one patient
    flat = np.full((20, 40), 100, np.uint8)
    flat[:10] = 140
    (root / "test/NORMAL").mkdir(parents=True)
    Image.fromarray(flat).save(root / "test/NORMAL/own.png")
    draw(root / "test/PNEUMONIA/VIRUS-2000-0001.png", np.random.default_rng(1))
    report = data.check(root)
    assert report["problems"] == [] and report["audit"] == [] and not report["demo"]
    train, test = report["folders"]["train/NORMAL"], report["folders"]["test/NORMAL"]
    assert (train["images"], train["patients"], train["unknown patients"]) == (5, 4, 0)
    assert report["folders"]["train/PNEUMONIA"]["bacterial"] == 4
    assert test["unknown patients"] == 1 and test["mode L, 8 bits"] == 1
    size = (root / "test/NORMAL/own.png").stat().st_size
    values = {"width": 40, "height": 20, "aspect": 2, "brightness": 120, "contrast": 20, "bytes per pixel": size / 800}
    for name, value in values.items():
        assert test[name] == pytest.approx([value] * 3, abs=1e-3)
    assert json.loads(json.dumps(report)) == report


NORMAL = "train/NORMAL/NORMAL-0-0001.png"
COPIES = {  # where a copy of NORMAL is put, the problem
    "unknown patient": ("train/NORMAL/own.png", "of other or unknown patients"),
    "other patient": ("train/NORMAL/NORMAL-9-0001.png", "of other or unknown patients"),
    "other class": ("train/PNEUMONIA/NORMAL-0-0001.png", "across classes"),
    "other split": ("test/NORMAL/NORMAL-9-0001.png", "across splits"),
    "shared patient": ("test/NORMAL/NORMAL-0-0002.png", "1 patients are in both train and test"),
}


@pytest.mark.parametrize("case", COPIES)
def test_check_finds_copies(tmp_path, case):
    root, (place, problem) = plain(tmp_path / "d", images=3), COPIES[case]
    for i, label in enumerate(("NORMAL", "PNEUMONIA")):
        draw(root / f"test/{label}/VIRUS-{3000 + i}-0001.png", np.random.default_rng(7 + i))
    assert data.check(root)["problems"] == []
    shutil.copy(root / NORMAL, root / place)
    problems = data.check(root)["problems"]
    assert any(problem in line and (place in line or "both" in line) for line in problems)


def test_check_prints_in_100_columns(tmp_path, capsys):
    root = plain(tmp_path / "d", images=3)
    make_deep(root / NORMAL)
    (root / "train/PNEUMONIA/broken.png").write_bytes(b"no image")
    for label in ("NORMAL", "PNEUMONIA"):
        shutil.copytree(root / "train" / label, root / "test" / label)
    report = data.check(root)
    data.print_check(report)
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 or str(root) in line for line in printed.splitlines())
    assert "train/NORMAL mixes images of 8 and 16 bits" in printed
    assert "2 files can't be read" in printed and "a result on this folder would not be valid" in printed
    assert len(report["unreadable"]) == 2
    table = printed.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1  # aligned to the right


# --- download ---


def archive(*names):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as z:
        for name in names or ("chest_xray/train/NORMAL/a.jpeg", "chest_xray/test/NORMAL/b.jpeg"):
            z.writestr(name, name)
        z.writestr("__MACOSX/train/NORMAL/c.jpeg", "not of chest_xray")
    return held.getvalue()


@contextlib.contextmanager
def serve(*parts, pause=0.0):
    """The URL of a server that answers one request with these bytes, waiting after each part."""
    listener, done = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def answer():
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                for part in parts:
                    connection.sendall(part)
                    if done.wait(pause):
                        break

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/x.zip"
    done.set()
    listener.close()
    thread.join()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
BODY = archive()


def test_download(tmp_path):
    with serve(OK % len(BODY), BODY) as url:
        target = data.download(tmp_path / "d", url, hashlib.sha256(BODY).hexdigest())
    held = sorted(p.relative_to(tmp_path / "d").as_posix() for p in (tmp_path / "d").rglob("*") if p.is_file())
    assert held == ["chest_xray/test/NORMAL/b.jpeg", "chest_xray/train/NORMAL/a.jpeg"]
    assert data.download(tmp_path / "d", "http://127.0.0.1:1/gone") == target  # nothing is fetched again


UP, ROOTED, UP_WINDOWS = archive("../../evil.jpeg"), archive("/evil.jpeg"), archive("..\\evil.jpeg")
BAD_SERVERS = {  # what is sent, the body that its checksum is of, what the message says
    "another checksum": ([OK % len(BODY), BODY], b"other", "checksum"),
    "cut half-way": ([OK % len(BODY), BODY[:100]], BODY, "checksum"),
    "status line broken": ([b"nonsense\r\n\r\n"], BODY, "BadStatusLine"),
    "closed at once": ([], BODY, "RemoteDisconnected"),
    "not found": ([b"HTTP/1.1 404 Not Found\r\n\r\n"], BODY, "404"),
    "length is no number": ([b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"], BODY, "checksum"),
    "length is negative": ([b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"], BODY, "checksum"),
    "chunk broken": ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n"], BODY, "IncompleteRead"),
    "no archive": ([OK % 5, b"hello"], b"hello", "zip"),
    "writes outside": ([OK % len(UP), UP], UP, "chest_xray/train"),
    "writes to the root": ([OK % len(ROOTED), ROOTED], ROOTED, "chest_xray/train"),
    "writes outside on Windows": ([OK % len(UP_WINDOWS), UP_WINDOWS], UP_WINDOWS, "chest_xray/train"),
}


@pytest.mark.parametrize("case", BAD_SERVERS)
def test_bad_server_is_one_line_and_leaves_nothing(tmp_path, case):
    parts, body, message = BAD_SERVERS[case]
    with serve(*parts) as url, pytest.raises(data.UserError, match=message) as caught:
        data.download(tmp_path / "d", url, hashlib.sha256(body).hexdigest())
    assert "\n" not in str(caught.value) and "Kaggle" in str(caught.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["d"]


@pytest.mark.parametrize("url", ["foo://bar", "no scheme", "http://127.0.0.1:1/nobody", "http://[broken"])
def test_bad_url_is_one_line(tmp_path, url):
    with pytest.raises(data.UserError, match="download failed"):
        data.download(tmp_path / "d", url)


DRIPS = {"body": [OK % 1000, *[b"x"] * 1000], "headers": [b"HTTP/1.1 200 OK\r\nX-Drip: ", *[b"x"] * 1000]}


@pytest.mark.parametrize("case", DRIPS)
def test_a_drip_ends_at_the_limit(tmp_path, case):
    start = time.monotonic()
    with (
        serve(*DRIPS[case], pause=0.01) as url,
        pytest.raises(data.UserError, match="took more than 2e-05 hours"),
    ):
        data.download(tmp_path / "d", url, hours=2e-5)  # 72 ms
    assert time.monotonic() - start < 5  # the whole drip takes 10 s
    assert [p.name for p in tmp_path.rglob("*")] == ["d"]


# --- ends ---


def run_code(code, tmp_path, number):
    """Run Python code that prints a line when it is ready for the signal; returns the exit code and what it printed."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    # What a shell starts in the background ignores SIGINT, and would hand that down.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, **options)
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


WORK = """
import data, pathlib, time
def work():
    with data.replacing(pathlib.Path("x")) as f:
        f.write(b"half")
        print("ready", flush=True)
        time.sleep(60)
data.run_script(data.Parser(prog="x"), work, lambda: "go on like this")
"""


def test_ctrl_c_leaves_nothing_half_written_and_says_how_to_go_on(tmp_path):
    assert run_code(WORK, tmp_path, signal.SIGINT) == (130, "interrupted; go on like this\n")
    assert not list(tmp_path.iterdir())


class Closed(io.StringIO):
    """A pipe that nobody reads any more."""

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)

    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize(("hint", "code"), [(None, 0), (lambda: "go on like this", 1)])
def test_a_closed_pipe_ends_quietly_what_may_end(monkeypatch, capsys, hint, code):
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as end:
        data.run_script(data.Parser(prog="x"), lambda: print("a row"), hint)
    assert end.value.code == code
    assert capsys.readouterr().err == ("nobody reads the output; go on like this\n" if hint else "")


def test_closed_streams_change_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        data.run_script(data.Parser(prog="x"), lambda: sys.stdout.write("a row") + sys.stderr.write("a line") - 10)
    assert end.value.code == 1


def test_an_interruption_while_importing_is_one_line(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = ['train.py'];"
    code += "import data; print(1, flush=True); time.sleep(60)"
    assert run_code(code, tmp_path, signal.SIGINT) == (-signal.SIGINT, "interrupted\n")
