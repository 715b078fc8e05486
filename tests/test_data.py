"""data.py: patients and splits, reading, cache, augmentation, the check, the download and the demo set."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, run_process, run_script
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import data


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No test writes into the user's cache, goes through a proxy, or inherits a distributed run's rank."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("RANK", raising=False)


def touch(root, *paths):
    """Files by name alone, for what never opens an image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def noise(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)


def save(root, images):
    """Arrays by path, as image files."""
    for path, pixels in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / path)
    return root


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


def test_scan_ignores_leftovers_and_keeps_order(tmp_path):
    wanted = ["train/NORMAL/IM-0001-0001.jpeg", "train/PNEUMONIA/deep/person2_virus_1.PNG", "train/PNEUMONIA/x.jpeg"]
    leftovers = ["__MACOSX/NORMAL/a.jpeg", "NORMAL/._IM-0001-0001.jpeg", "NORMAL/.DS_Store", "NORMAL/notes.txt"]
    leftovers += ["PNEUMONIA/__MACOSX/b.jpeg", ".hidden/c.jpeg"]
    touch(tmp_path, *wanted, *(f"train/{p}" for p in leftovers))
    records = data.scan(tmp_path, "train")
    assert [r["path"] for r in records] == wanted
    assert [r["class"] for r in records] == ["NORMAL", "PNEUMONIA", "PNEUMONIA"]
    assert [r["patient"] for r in records] == ["IM-1", "virus-2", "train/PNEUMONIA/x.jpeg"]


LAYOUTS = {
    "no folder train": "",
    "no class folders": "train/a.jpeg",
    "only one class folder, NORMAL": "train/NORMAL/a.jpeg",
    "PNEUMONIA holds no readable image": "train/NORMAL/a.jpeg train/PNEUMONIA/notes.txt",
    "other classes": "train/A/a.jpeg train/B/b.jpeg test/A/c.jpeg test/C/d.jpeg",
    "too few patients": "train/A/a.jpeg train/B/b.jpeg",
}


@pytest.mark.parametrize("message", LAYOUTS)
def test_errors_of_layout(tmp_path, message):
    with pytest.raises(data.DataError, match=message):
        data.find_training(touch(tmp_path, *LAYOUTS[message].split()), 0, 0.2)


def test_find_root(tmp_path):
    with pytest.raises(data.DataError, match="nowhere does not exist"):
        data.find_root(str(tmp_path / "nowhere"))
    touch(tmp_path, "chest_xray/train/NORMAL/a.jpeg")
    assert data.find_root(str(tmp_path)) == data.find_root(str(tmp_path / "chest_xray")) == tmp_path / "chest_xray"


def test_split_by_patient():
    sizes = np.random.default_rng(0).integers(1, 4, 360)
    rows = [(f"p{i}", "NORMAL" if i < 120 else "PNEUMONIA", k) for i, n in enumerate(sizes) for k in range(n)]
    records = [{"path": f"{p}-{k}", "class": c, "patient": p} for p, c, k in rows]
    splits = []
    for seed in (0, 0, 1):
        np.random.seed(len(splits))  # the global generator must play no part
        splits.append(data.split_by_patient(records, seed, 0.2))
    assert splits[0] == splits[1] != splits[2]
    sides = [{r["patient"] for r, v in zip(records, splits[0]) if v == side} for side in (True, False)]
    assert not sides[0] & sides[1] and all(sides)
    for name in ("NORMAL", "PNEUMONIA"):
        assert np.mean([v for r, v in zip(records, splits[0]) if r["class"] == name]) == pytest.approx(0.2, abs=0.02)


def names(split, start, count, series="person{}_virus_1.jpeg"):
    """Half of count images in each class, every one a patient of its own."""
    classes = ("NORMAL/IM-{}-0001.jpeg", "PNEUMONIA/" + series)
    return [f"{split}/{classes[i % 2].format(start + i)}" for i in range(count)]


@pytest.mark.parametrize("count, folded", [(16, True), (98, True), (100, False)])
def test_val_folder(tmp_path, capsys, count, folded):
    touch(tmp_path, *names("train", 0, 40), *names("val", 1000, count), *names("test", 5000, 10))
    records = data.find_training(tmp_path, 0, 0.2)
    warnings = capsys.readouterr().err.splitlines()
    assert len(records) == 40 + count
    held_out = [r["path"] for r in records if r["split"] == "val"]
    if folded:
        assert len(warnings) == 1 and f"val holds only {count} images" in warnings[0]
        assert len(held_out) == pytest.approx(0.2 * len(records), abs=3)
        assert {p.split("/")[0] for p in held_out} == {"train", "val"}
    else:
        assert not warnings and sum(p.startswith("val/") for p in held_out) == len(held_out) == count


@pytest.mark.parametrize("split, count", [("test", 10), ("val", 100)])
def test_shared_patients_are_an_error(tmp_path, split, count):
    touch(tmp_path, *names("train", 0, 40), *names(split, 1000, count), f"{split}/PNEUMONIA/person7_virus_2.jpeg")
    with pytest.raises(data.DataError, match=rf"1 patients are in both train and {split} .*\(virus-7\)"):
        data.find_training(tmp_path, 0, 0.2)


def test_a_class_of_few_patients_holds_out_more_and_says_so(tmp_path, capsys):
    touch(tmp_path, *(f"train/NORMAL/IM-{i}-0001.jpeg" for i in range(3)))
    touch(tmp_path, *(f"train/PNEUMONIA/person{i}_virus_1.jpeg" for i in range(30)))
    records = data.find_training(tmp_path, 0, 0.1)
    assert "NORMAL has only 3 patients: 1 in 3 of all images" in capsys.readouterr().err
    assert sum(r["split"] == "val" for r in records) == 11


@pytest.mark.parametrize("names, index", [("NORMAL PNEUMONIA", 1), ("Pneumonia normal", 0), ("a b c", 2)])
def test_positive_class(names, index):
    assert data.positive_class(names.split()) == index


def test_names_that_tell_no_patient_are_counted(tmp_path, capsys):
    touch(tmp_path, *names("train", 0, 40, series="scan{}.jpeg"))
    assert len({r["patient"] for r in data.find_training(tmp_path, 0, 0.2)}) == 40
    (line,) = capsys.readouterr().err.splitlines()
    assert "20 of 40" in line


# --- read ---

PICTURE = np.add.outer(np.linspace(0, 180, 60), np.linspace(0, 75, 90)).round().astype(np.uint8)
PICTURE[5:20, 50:80] //= 3  # no symmetry, so that no flip or turn goes unnoticed
GREY, DEEP = Image.fromarray(PICTURE), PICTURE.astype(np.uint16) * 257


def white_is_zero(image):
    """TIFF bytes with PhotometricInterpretation (262) set from 1 to 0: Pillow writes no such 16-bit file itself."""
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    entry, patched = struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0)
    assert buffer.getvalue().count(entry) == 1
    return buffer.getvalue().replace(entry, patched)


FORMATS = {  # the picture in another coding, and how far from the 8-bit grey one it may be decoded
    "grey.png": (GREY, 0),
    "grey.tiff": (GREY, 0),
    "rgb.png": (GREY.convert("RGB"), 0),
    "rgba.png": (GREY.convert("RGBA"), 0),
    "la.png": (GREY.convert("LA"), 0),
    "palette.png": (GREY.convert("RGB").quantize(256), 2),
    "cmyk.tiff": (GREY.convert("CMYK"), 1),
    "cmyk.jpeg": (GREY.convert("CMYK"), 6),
    "16bit.png": (Image.fromarray(DEEP), 0),
    "16bit.tiff": (Image.fromarray(DEEP), 0),
    "16bit-big-endian.tiff": (Image.fromarray(DEEP.astype(">u2")), 0),
    "12bit.tiff": (Image.fromarray((PICTURE * (4095 / 255)).round().astype(np.uint16)), 0),
    "8-in-16bit.tiff": (Image.fromarray(PICTURE.astype(np.uint16)), 0),
    "32bit.tiff": (Image.fromarray(PICTURE.astype(np.int32) * 257), 0),
    "float.tiff": (Image.fromarray(PICTURE.astype(np.float32) / 255), 0),
    "float-255.tiff": (Image.fromarray(PICTURE.astype(np.float32)), 0),
    "white-is-zero.tiff": (white_is_zero(Image.fromarray(65535 - DEEP)), 0),
}


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_the_grey_picture(tmp_path, name, size):
    image, tolerance = FORMATS[name]
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, **({"quality": 98} if name.endswith("jpeg") else {}))
    pixels, info = data.read_image(tmp_path / name, size)
    reference = GREY.resize((size, size), Image.Resampling.BICUBIC) if size else GREY
    assert pixels.dtype == np.uint8 and (info["width"], info["height"]) == (90, 60)
    # One grey level more where it is resized: deep images are rounded once, after the resize.
    assert np.abs(pixels.astype(int) - np.asarray(reference)).max() <= tolerance + bool(size)
    assert info["colour"] <= tolerance


@pytest.mark.parametrize("size", [None, 32])
def test_one_bit_images(tmp_path, size):
    binary = GREY.point(lambda v: 255 * (v > 127))
    binary.convert("1").save(tmp_path / "bits.png")
    bits, info = data.read_image(tmp_path / "bits.png", size)
    assert info["mode"] == "1"
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
    assert data.read_image(tmp_path / "x.png", 16)[1]["colour"] == pytest.approx(colour)


# From the EXIF standard (where the stored first row and column lie): mirrored or not, quarter turns to the left.
STORED = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 1), 7: (1, 3), 8: (0, 3)}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif, (mirrored, turns) = Image.Exif(), STORED[orientation]
    exif[0x0112] = orientation
    stored = np.rot90(np.fliplr(PICTURE) if mirrored else PICTURE, turns)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.jpeg", quality=98, exif=exif)
    pixels, info = data.read_image(tmp_path / "x.jpeg", None)
    assert (info["width"], info["height"]) == (90, 60) and pixels.shape == (60, 90)
    assert np.abs(pixels.astype(int) - PICTURE).mean() < 1.5


def test_large_jpegs_are_decoded_small_without_loss(tmp_path, monkeypatch):
    coarse = Image.fromarray(noise(0, 100, 130)).resize((1600, 1200), Image.Resampling.BICUBIC)
    full = np.clip(np.asarray(coarse) + np.random.default_rng(1).normal(0, 8, (1200, 1600)), 0, 255).astype(np.uint8)
    Image.fromarray(full).save(tmp_path / "x.jpeg", quality=90)
    with Image.open(tmp_path / "x.jpeg") as image:
        reference = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    resized, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: resized.append(self.size) or resize(self, *a, **k))
    pixels, info = data.read_image(tmp_path / "x.jpeg", 224)
    assert np.abs(pixels - reference).mean() < 1.5
    assert resized == [(800, 600)] and (info["width"], info["height"]) == (1600, 1200)


def png_claiming(width, height):
    """A PNG of a hundred bytes whose header declares a huge picture."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b""))
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(kind, pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


REFUSED = {
    "truncated.jpeg": (encoded("JPEG", noise(0, 200, 200))[:9000], "truncated"),
    "truncated.png": (encoded("PNG", noise(0, 200, 200))[:9000], "cannot be decoded"),
    "zero.jpeg": (b"", "empty"),
    "text.jpeg": (b"patient left early\n", "not an image"),
    "bomb.png": (png_claiming(50_000, 50_000), "pixels"),
    "large.png": (png_claiming(11_000, 11_000), "11000 x 11000 pixels are more than"),
    "missing.jpeg": (None, "no such file"),
    "nan.tiff": (encoded("TIFF", np.array([[0.5, np.nan]], np.float32)), "not finite"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(tmp_path, name):
    content, reason = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for size in (None, 64):
        with pytest.raises(data.ImageError, match=reason):
            data.read_image(tmp_path / name, size)


# --- cache ---


def tree(root, count=6):
    """Noise images, half of them in each class of train/."""
    return save(root, {p.replace("jpeg", "bmp"): noise(i) for i, p in enumerate(names("train", 1, count))})


def load(root, size=16):
    records = data.scan(root, "train")
    return records, *data.load_images(root, records, size)


def expected(root, size=16):
    return np.stack([data.read_image(root / r["path"], size)[0] for r in data.scan(root, "train")])


def test_second_call_decodes_nothing(tmp_path, monkeypatch):
    root = tree(tmp_path / "d")
    np.testing.assert_array_equal(load(root)[1], expected(root))
    want, digests = expected(root), load(root)[2]
    monkeypatch.setattr(data, "read_image", lambda *_: pytest.fail("decoded again"))
    _, images, again, failed = load(root)
    assert images.dtype == torch.uint8 and not failed and torch.equal(again, digests)
    np.testing.assert_array_equal(images, want)
    monkeypatch.setattr(data, "READER_VERSION", data.READER_VERSION + 1)
    with pytest.raises(pytest.fail.Exception):
        load(root)


@pytest.mark.parametrize("keep", [0, 900, -3])  # of 6 x 256 bytes of pixels, and notes after them
def test_a_damaged_cache_is_rebuilt(tmp_path, capsys, keep):
    root = tree(tmp_path / "d")
    want, digests = expected(root), load(root)[2]
    (path,) = (root / ".cache").iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    (leftover := root / ".cache" / f".{path.name}.1.tmp").write_bytes(b"x")  # of a build that was killed
    os.utime(leftover, (0, 0))
    _, images, again, failed = load(root)
    np.testing.assert_array_equal(images, want)
    assert torch.equal(again, digests) and not failed and not capsys.readouterr().err
    assert list((root / ".cache").iterdir()) == [path]


def repaint(root):
    """Other pixels under the same name and in as many bytes: the time alone tells."""
    path = next((root / "train/NORMAL").iterdir())
    before = path.stat()
    Image.fromarray(noise(77)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size


CHANGES = {
    "touch": repaint,
    "add": lambda root: save(root, {"train/NORMAL/IM-0900-0001.png": noise(99)}),
    "remove": lambda root: next((root / "train/NORMAL").iterdir()).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_rebuilds(tmp_path, change):
    root = tree(tmp_path / "d")
    load(root), load(root, size=8)
    CHANGES[change](root)
    np.testing.assert_array_equal(load(root)[1], expected(root))
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
    np.testing.assert_array_equal(load(root)[1], expected(root))


def test_two_processes_build_at_once(tmp_path, monkeypatch, capfd):
    root, read, fork = tree(tmp_path / "d"), data.read_image, multiprocessing.get_context("fork")
    want, gate, results = expected(root).tobytes(), fork.Barrier(2), fork.SimpleQueue()

    def slow(*arguments):  # long enough to overlap
        time.sleep(0.1)
        return read(*arguments)

    def build():
        gate.wait(30)
        results.put(load(root)[1].numpy().tobytes())

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


@pytest.mark.parametrize("user_cache", [True, False])
def test_a_cache_folder_that_cannot_be_written(tmp_path, capsys, user_cache):
    root = touch(tree(tmp_path / "d"), ".cache")  # a file where the folder should be: holds for root as well
    if not user_cache:
        touch(tmp_path, "user-cache")
    np.testing.assert_array_equal(load(root)[1], expected(root))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (1 if user_cache else 2) and all("no image cache in" in w for w in warnings)
    assert len(list(tmp_path.glob("user-cache/pneumonia/*/*.bin"))) == user_cache


def test_unreadable_files_are_reported_by_both_calls(tmp_path, capsys, monkeypatch):
    root = tree(tmp_path / "d")
    bad = [f"train/NORMAL/IM-8{i:02}-0001.jpeg" for i in range(12)]
    for path in bad:
        (root / path).write_bytes(b"")
    records, images, _, failed = load(root)
    monkeypatch.setattr(data, "read_image", lambda *_: pytest.fail("decoded again"))
    assert failed == load(root)[3] == {i: "the file is empty" for i, r in enumerate(records) if r["path"] in bad}
    assert not images[list(failed)].any() and images[-1].any()
    capsys.readouterr()
    assert data.report_left_out(records, failed) == [{"path": p, "reason": "the file is empty"} for p in bad]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and bad[0] in lines[0] and "2 more" in lines[-1]


def test_digests_tell_equal_pixels(tmp_path):
    root = save(tmp_path / "d", {f"train/{c}/{n}": noise(0) for c in "AB" for n in ("a.png", "b.tiff")})
    save(root, {"train/B/c.png": noise(1)})
    digests = load(root)[2].tolist()
    assert len(set(digests[:4])) == 1 and digests[4] != digests[0]


# --- augment ---

SMOOTH = torch.from_numpy(np.asarray(Image.fromarray(noise(3, 8, 8)).resize((64, 64), Image.Resampling.BICUBIC)).copy())


def single(c=0.75, **strength):
    """SMOOTH under one kind of change alone, with every random number at c: each parameter lies at 2c - 1."""
    strength = data.AUGMENT["none"] | strength
    return data.augment(SMOOTH[None], torch.full((1, data.DRAWS), c), strength, 64)


X, BILINEAR = SMOOTH[None, None] / 255, InterpolationMode.BILINEAR
INSIDE = (..., slice(12, 52), slice(12, 52))
OPERATIONS = {
    "flip": ({"flip": 1.0}, lambda: TF.horizontal_flip(X), ...),
    "no flip": ({"flip": 0.5}, lambda: X, ...),  # 0.75 is not below 0.5
    "brightness": ({"brightness": 0.8}, lambda: TF.adjust_brightness(X, 1.4), ...),
    "contrast": ({"contrast": 0.8}, lambda: TF.adjust_contrast(X, 1.4), ...),
    "gamma": ({"gamma": 2 * np.log(1.7)}, lambda: TF.adjust_gamma(X, 1.7), ...),
    "rotation": ({"degrees": 20.0}, lambda: TF.rotate(X, 10.0, BILINEAR), INSIDE),
    # Area 1 - 0.75 (1 - scale) = 0.75 squared, moved by half of the room: 48 pixels from 12 on.
    "crop": (
        {"scale": 1 - 0.4375 / 0.75},
        lambda: TF.resized_crop(X, 12, 12, 48, 48, [64, 64], BILINEAR, False),
        INSIDE,
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_single_operations_equal_torchvision(operation):
    strength, reference, where = OPERATIONS[operation]
    torch.testing.assert_close(single(**strength)[where], reference()[where], atol=1e-4, rtol=0)


@pytest.mark.parametrize("c", [0.0, 0.3, 0.999])
def test_erasing_blanks_one_rectangle(c):
    images = SMOOTH.clamp(min=1)[None]
    out = data.augment(images, torch.full((1, data.DRAWS), c), data.AUGMENT["none"] | {"erase": 1.0}, 64)
    y, x = torch.nonzero(out[0, 0] == 0, as_tuple=True)
    h, w = int(y.max() - y.min() + 1), int(x.max() - x.min() + 1)
    assert torch.equal(out, TF.erase(images[None] / 255, int(y.min()), int(x.min()), h, w, torch.zeros(1, 1, 1)))
    assert 0.01 < h * w / 64**2 < 0.22


def test_erasing_keeps_its_probability():
    images, strength = BATCH[:1].expand(800, -1, -1) | 1, data.AUGMENT["none"] | {"erase": 0.25}
    out = data.augment(images, data.draw(800, 0, 0), strength, 40)
    assert (out == 0).any(3).any(2).float().mean() == pytest.approx(0.25, abs=0.05)


BATCH = torch.from_numpy(np.stack([noise(i, 40, 40) for i in range(12)]))


def test_no_strength_is_identity():
    before = BATCH.clone()
    out = data.augment(BATCH, data.draw(12, 0, 0), data.AUGMENT["none"], 40)
    assert torch.equal(out, BATCH[:, None].float() / 255) and torch.equal(BATCH, before)


@pytest.mark.parametrize("preset", ["light", "medium", "strong"])
def test_presets(preset):
    draws, strength = data.draw(12, 0, 0), data.AUGMENT[preset]
    out = data.augment(BATCH, draws, strength, 32)
    assert out.shape == (12, 1, 32, 32) and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1 and not out.isnan().any()
    extremes = data.augment(BATCH[:2], torch.tensor([[0.0], [0.99999]]).expand(2, data.DRAWS), strength, 32)
    assert extremes.min() >= 0 and extremes.max() <= 1 and not extremes.isnan().any()
    # What an image becomes depends on its own draw: not on its place, its batch mates or their number.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(data.augment(BATCH[order], draws[order], strength, 32), out[order], atol=1e-6, rtol=0)
    alone = torch.cat([data.augment(BATCH[i : i + 1], draws[i : i + 1], strength, 32) for i in range(12)])
    torch.testing.assert_close(alone, out, atol=1e-6, rtol=0)
    twins = data.augment(BATCH[:1].expand(12, -1, -1), draws, strength, 32)
    assert len({t.numpy().tobytes() for t in twins}) == 12  # each has its own draw


def test_draws_are_a_function_of_seed_and_epoch():
    def both(seed, epoch):
        return data.draw(50, seed, epoch), data.shuffle(50, seed, epoch)

    first = both(3, 4)
    torch.manual_seed(99)  # the global generator must play no part
    state = torch.get_rng_state()
    assert all(map(torch.equal, first, both(3, 4)))
    assert torch.equal(torch.get_rng_state(), state)
    for other in ((3, 5), (4, 4), (4, 3)):
        assert not any(map(torch.equal, first, both(*other)))
    assert 0 <= first[0].min() and first[0].max() < 1
    assert sorted(first[1].tolist()) == list(range(50)) != first[1].tolist()


def test_stress():
    images = torch.full((2, 40, 40), 100, dtype=torch.uint8)
    images[:, :, 20:] = 200
    images[1, :2] = images[1, -2:] = 0  # rows that the central 85 % leave out
    before, copies = images.clone(), dict(data.stress(images))
    assert len(copies) == 9 and torch.equal(images, before)
    assert all(c.shape == images.shape and c.dtype == torch.uint8 for c in copies.values())
    assert all(not torch.equal(c, images) for c in copies.values())
    by_hand = {"brightness x 0.65": (65, 130), "brightness x 1.4": (140, 255)}
    by_hand |= {"contrast x 1.4": (80, 220)}  # 150 -+ 70
    by_hand |= {"gamma 0.7": (132, 215), "gamma 1.4": (69, 181)}  # 255 (100 / 255) ^ 0.7 = 132.4
    by_hand |= {"blur": (100, 200), "crop of 85 %": (100, 200)}  # far from the edge
    for name, values in by_hand.items():
        assert (copies[name][0, 20, 2].item(), copies[name][0, 20, -3].item()) == values, name
    assert copies["crop of 85 %"][1].min() == 100
    assert copies["blur"][0, 20].unique().numel() > 2  # the edge is no longer sharp


# --- check ---


# IM-1 is in train and val, but so small a val is folded into train.
SOUND = ["train/NORMAL/IM-0001-0001.png", *(f"train/PNEUMONIA/person1_{n}.png" for n in ("bacteria_1", "bacteria_2"))]
SOUND += ["train/PNEUMONIA/person1_virus_3.png", "val/NORMAL/IM-0001-0002.png", "val/PNEUMONIA/person3_virus_1.png"]
SOUND += ["test/NORMAL/NORMAL2-IM-0001-0001.png", "test/PNEUMONIA/person4_virus_1.png"]


def sound(root):
    images = {path: noise(i) for i, path in enumerate(SOUND)}
    return save(root, images | {"test/PNEUMONIA/IM-dup.bmp": images[SOUND[-1]]})


PROBLEMS = {
    "a patient on both sides": ({"test/PNEUMONIA/person1_bacteria_9.png": noise(50)}, "1 patients .* bacteria-1"),
    "an image on both sides": ({"test/NORMAL/other.bmp": noise(0)}, "1 images are on both sides .*IM-0001-0001.png"),
    "an image under two classes": ({"train/PNEUMONIA/x.bmp": noise(0)}, "1 images are under two classes"),
}


def test_check_counts(tmp_path):
    root = touch(sound(tmp_path), "train/NORMAL/broken.jpeg")
    report = data.check(root)
    assert report["problems"] == [] and report["shared_patients"] == {}
    assert report["unreadable"] == [{"path": "train/NORMAL/broken.jpeg", "reason": "not an image that Pillow can read"}]
    twins = ["test/PNEUMONIA/IM-dup.bmp", "test/PNEUMONIA/person4_virus_1.png"]  # one side, one class: harmless
    assert report["duplicates"] == {"across splits": [], "across classes": [], "within": [twins]}
    s = report["folders"]["train/PNEUMONIA"]
    assert {k: v for k, v in s.items() if isinstance(v, int)} == (
        {"images": 3, "patients": 2, "unnamed": 0, "bacterial": 2, "viral": 1, "mode L": 3}
    )
    assert s["width"] == [30, 30, 30] and s["height"] == [20, 20, 20] and s["aspect"] == [1.5, 1.5, 1.5]
    assert s["brightness"][1] == pytest.approx(np.median([noise(i).mean() for i in (1, 2, 3)]), abs=0.01)
    assert report["folders"]["train/NORMAL"]["images"] == 1  # the broken one doesn't count
    assert report["folders"]["test/PNEUMONIA"]["unnamed"] == 1  # IM-dup
    assert list(report["folders"]) == [f"{s}/{c}" for s in ("train", "val", "test") for c in ("NORMAL", "PNEUMONIA")]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_check_finds(tmp_path, problem):
    extra, message = PROBLEMS[problem]
    problems = data.check(save(sound(tmp_path), extra))["problems"]
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_check_prints_what_it_found_in_120_columns(tmp_path, capsys):
    root, twins = sound(tmp_path), [f"train/PNEUMONIA/deep/person{100 + i}-{'x' * 30}_virus_1.png" for i in range(3)]
    save(
        root,
        {p: noise(60) for p in twins} | {f"test/NORMAL/IM-9-{i // 2}-{i}.png": noise(i // 2) for i in range(180, 230)},
    )
    touch(root, "train/NORMAL/broken.jpeg")
    save(root, PROBLEMS["a patient on both sides"][0])
    data.print_check(data.check(root))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    table = {line[:16].strip(): line[16:].split() for line in lines[2:] if line.strip()}
    assert table[""] == [f"{s}/{c}" for s in ("train", "val", "test") for c in ("NORMAL", "PNEUMONIA")]
    assert table["images"] == ["1", "6", "1", "1", "51", "3"] and table["unnamed"] == ["0", "3", "0", "0", "0", "1"]
    assert table["viral"] == ["0", "1", "0", "1", "0", "1"] and table["aspect"] == ["1.50"] * 18
    text = " ".join(" ".join(lines).split())
    assert "unreadable files 1 train/NORMAL/broken.jpeg: not an image" in text and " = ".join(twins) in text
    assert "duplicates across splits 0" in text and "duplicates within 27" in text and "... and 7 more" in text
    assert "shared patients 1 bacteria-1 in train and test PROBLEM: 1 patients" in text


def test_check_without_a_split_or_classes(tmp_path):
    with pytest.raises(data.DataError, match="none of the folders"):
        data.check(tmp_path)
    save(tmp_path, {f"test/{c}/x.png": noise(i) for i, c in enumerate("AB")})
    assert data.check(tmp_path)["problems"] == []
    touch(tmp_path, "val/A/broken.png", "val/B/broken.png")
    assert data.check(tmp_path)["problems"] == [f"val/{c} holds no readable image" for c in "AB"]


def test_check_script(tmp_path):
    good, bad = sound(tmp_path / "good"), save(sound(tmp_path / "bad"), PROBLEMS["a patient on both sides"][0])
    done = run_script("data.py", "check", good, "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(json.dumps(data.check(good)))
    done = run_script("data.py", "check", good, cwd=tmp_path)
    assert done.returncode == 0 and "no problem found" in done.stdout
    done = run_process("data.py", "check", bad, cwd=tmp_path)
    assert done.returncode == 1 and "PROBLEM: 1 patients" in done.stdout
    done = run_script("data.py", "check", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


def test_a_closed_pipe_ends_the_check_quietly(tmp_path):
    command = f"{sys.executable} {ROOT / 'data.py'} check {sound(tmp_path / 'd')} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- download ---


def archive(*extra):
    files = [f"chest_xray/{s}/{c}/x.jpeg" for s in ("train", "test") for c in ("NORMAL", "PNEUMONIA")]
    leftovers = ["__MACOSX/chest_xray/train/NORMAL/._x.jpeg", "chest_xray/.DS_Store", "chest_xray/train/.DS_Store"]
    leftovers += ["chest_xray/train/NORMAL/._x.jpeg", "chest_xray/train/NORMAL/.DS_Store", "__MACOSX/x.jpeg"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name in (*files, *leftovers, *extra):
            z.writestr(name, os.urandom(2000))
    return buffer.getvalue()


@pytest.fixture
def server():
    """A local server: .body is what it serves, .sent the part that it sends before it hangs up, .requests a count."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body[: self.server.sent])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.requests, s.sent, s.url = 0, None, f"http://127.0.0.1:{s.server_port}/file"
        threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield s
        s.shutdown()


def test_download(tmp_path, server):
    server.body = archive()
    sha = hashlib.sha256(server.body).hexdigest()
    for _ in range(2):
        assert data.download(tmp_path / "d", server.url, sha) == tmp_path / "d" / "chest_xray"
    assert server.requests == 1
    found = sorted(p.relative_to(tmp_path / "d").as_posix() for p in (tmp_path / "d").rglob("*") if p.is_file())
    assert found == [f"chest_xray/{s}/{c}/x.jpeg" for s in ("test", "train") for c in ("NORMAL", "PNEUMONIA")]
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["chest_xray"]


BAD_DOWNLOADS = {  # the body, how much of it is sent, its checksum where not the true one, what the message says
    "wrong checksum": (archive(), None, "0" * 64, "invalid hash.*Kaggle"),
    "cut half-way": (archive(), 5000, None, "download failed.*Kaggle"),
    "path out of the folder": (archive("../evil.jpeg"), None, None, "outside"),
    "hidden path out": (archive("chest_xray/train/NORMAL/../../../../evil.jpeg"), None, None, "outside"),
    "absolute path": (archive("/evil.jpeg"), None, None, "outside"),
    "no archive": (b"<html>gone</html>", None, None, "damaged.*Kaggle"),
    "another archive": (archive()[:0] + bytes.fromhex("504b0506" + "00" * 18), None, None, "does not hold.*Kaggle"),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
def test_failed_download_leaves_nothing(tmp_path, server, case):
    server.body, server.sent, sha, message = BAD_DOWNLOADS[case]
    with pytest.raises(data.DataError, match=message) as caught:
        data.download(tmp_path / "d", server.url, sha or hashlib.sha256(server.body).hexdigest())
    assert "\n" not in str(caught.value) and server.requests == 1
    assert not (tmp_path / "d").exists() or not list((tmp_path / "d").iterdir())
    assert not list(tmp_path.rglob("evil*"))


# --- the demo set ---


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_demo_is_a_function_of_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data.draw_demo(tmp_path / name, images=40, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and sum(p.endswith(".jpeg") for p in a) == 40
    assert not {v for k, v in a.items() if k.endswith("jpeg")} & {v for k, v in c.items() if k.endswith("jpeg")}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "user-cache") == ["a", "b", "c"]


def test_demo_overwrites_nothing(tmp_path):
    touch(tmp_path, "demo/mine.txt")
    with pytest.raises(data.DataError, match="not empty"):
        data.draw_demo(tmp_path / "demo", images=40)
    assert list(contents(tmp_path)) == ["demo/mine.txt"]


def test_two_processes_draw_the_demo_set_at_once(tmp_path, monkeypatch):
    def late(source, target):  # the other one has finished in the meantime
        shutil.copytree(source, target)
        rename(source, target)

    rename = os.rename
    monkeypatch.setattr(os, "rename", late)
    data.draw_demo(tmp_path / "demo", images=40)
    assert data.is_demo(tmp_path / "demo") and [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize(("first", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_second_signal_does_not_disturb_the_end(first, code):
    """Whatever else arrives while a script ends, it ends in order, with the code of the first signal and no traceback."""
    script = f"""
import atexit, os, signal, data
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
send = lambda name: os.kill(os.getpid(), getattr(signal, name))
atexit.register(lambda: [send(name) for name in ("SIGTERM", "SIGINT")] and print("ended in order"))
data.run_script(data.Parser(prog="x"), lambda: send("{first}"))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout == "ended in order\n" and "Traceback" not in done.stderr


def test_demo_is_sound(demo):
    records = data.scan(demo, "train") + data.scan(demo, "test")
    assert len(records) == 120 and data.is_demo(demo) and data.check(demo)["problems"] == []
    assert {data.identify(r["path"].split("/")[2])[2] for r in records} >= {
        "bacteria",
        "virus",
        "IM",
        "VIRUS",
        "NORMAL",
    }
    assert set(Counter(r["subtype"] for r in records)) == {"", "bacterial", "viral"}
    assert all((r["subtype"] == "") == (r["class"] == "NORMAL") for r in records)
    rows = [line.split(",") for line in (demo / "opacities.csv").read_text().splitlines()]
    assert rows.pop(0) == ["path", "x", "y", "rx", "ry"]
    assert {r[0] for r in rows} == {r["path"] for r in records if r["class"] == "PNEUMONIA"}
    x, y, rx, ry = np.array([r[1:] for r in rows], float).T
    assert min(rx.min(), ry.min()) > 0.02
    assert min((x - rx).min(), (y - ry).min()) >= 0 and max((x + rx).max(), (y + ry).max()) <= 1


def test_demo_class_is_not_in_brightness_or_shape(tmp_path):
    data.draw_demo(tmp_path / "demo", images=400)
    features, ill = [], []
    for r in data.scan(tmp_path / "demo", "train") + data.scan(tmp_path / "demo", "test"):
        pixels, info = data.read_image(tmp_path / "demo" / r["path"], None)
        features.append([pixels.mean(), info["width"], info["height"], info["width"] / info["height"]])
        ill.append(r["class"] == "PNEUMONIA")
    model = make_pipeline(StandardScaler(), LogisticRegression())
    logits = cross_val_predict(model, features, ill, cv=5, method="decision_function")
    assert roc_auc_score(ill, logits) <= 0.6
