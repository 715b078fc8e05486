"""predict.py as a user runs it, and its parts."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

import data
import models
import predict


@pytest.fixture(scope="module")
def classifier(run_folder):
    return predict.open_classifier(run_folder, "cpu")


@pytest.fixture(scope="module")
def normals(demo) -> list[str]:
    return sorted(map(str, (demo / "test" / "NORMAL").iterdir()))


def as_json(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def save_with(run_folder, path: Path, **fields) -> Path:
    """A copy of the run's checkpoint with other fields."""
    models.save(models.load(run_folder) | fields, path)
    return path


# --- probability and label ---


def test_evaluation_and_prediction_agree_on_every_image(run_folder, demo):
    run_script("evaluate.py", run_folder, "--bootstrap", 20, cwd=demo)
    with open(run_folder / "test.csv") as f:
        expected = {row["path"]: row for row in csv.DictReader(f)}
    rows = as_json(run_script("predict.py", "--ckpt", run_folder, "--json", "test", cwd=demo))
    assert sorted(row["path"] for row in rows) == sorted(expected)
    for row in rows:
        other = expected[row["path"]]
        assert row["probability"] == pytest.approx(float(other["probability"]), abs=1e-12)
        assert row["label"] == other["prediction"]


def test_probability_is_calibrated_and_the_threshold_decides(run_folder, demo, normals, tmp_path):
    """By hand, from the model's logits of the whole images."""
    checkpoint = models.load(run_folder)
    images = np.stack([data.read_image(path, 64)[0] for path in normals])
    x = (images[:, None] / 255 - checkpoint["mean"]) / checkpoint["std"]
    model = models.from_checkpoint(checkpoint, torch.device("cpu"))
    with torch.inference_mode():
        logits = model(torch.from_numpy(x).float()).double().numpy()
    z = 3 * (logits[:, 1] - logits[:, 0]) + 1
    expected = 1 / (1 + np.exp(-z))
    cut = float(np.median(expected))
    threshold = checkpoint["threshold"] | {"value": cut, "logit": float(np.median(z))}
    path = save_with(run_folder, tmp_path / "ckpt.pt", slope=3.0, intercept=1.0, threshold=threshold)
    rows = predict.predict(normals, path, "cpu")
    assert [row["probability"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    for row in rows:
        assert row["threshold"] == cut
        assert (row["label"] == "PNEUMONIA") == (row["probability"] >= cut)


def test_of_three_classes_the_most_probable_is_the_label(run_folder, normals, tmp_path):
    model = models.build("mobilenetv3_small_050", 3, 64)
    fields = {"classes": ["A", "B", "C"], "state_dict": model.state_dict()}
    fields["threshold"] = {"value": None, "logit": None, "rule": "", "from": ""}
    save_with(run_folder, tmp_path / "ckpt.pt", **fields)
    command = ("predict.py", "--ckpt", ".", normals[0])
    (row,) = as_json(run_script(*command, "--json", cwd=tmp_path))
    probability = row["probability"]
    assert row["label"] == max(probability, key=probability.get)
    done = run_script(*command, "--csv", cwd=tmp_path)
    (cells,) = csv.DictReader(io.StringIO(done.stdout))
    assert float(cells["probability_B"]) == probability["B"]


def test_an_output_that_is_not_finite_is_an_error_of_that_file(classifier, normals, monkeypatch):
    forward = classifier.model.forward
    monkeypatch.setattr(classifier.model, "forward", lambda x: forward(x).index_fill(0, torch.tensor([1]), torch.nan))
    _, second = predict.classify(normals[:2], classifier)
    assert "not finite" in second.error
    assert second.label is None


# --- flags ---


def test_each_oddity_has_its_own_flag(run_folder):
    rng = np.random.default_rng(0)
    images = {
        "colour image": np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((16, 16, 1))),
        "near-constant image": rng.integers(90, 95, (128, 128)),
        "under 64 pixels": rng.integers(0, 256, (50, 200)),
        "mask or drawing": np.kron(rng.integers(0, 3, (8, 8)) * 100, np.ones((16, 16))),
    }
    rows = predict.predict([image.astype(np.uint8) for image in images.values()], run_folder)
    for name, row in zip(images, rows):
        expected = [name, "unlike training images"] if row["unlike"] > 1 else [name]
        assert row["flags"] == expected
    lateral = data.ImageInfo(100, 100, "MONOCHROME2", view="LL")
    assert predict.find_flags(np.arange(256).reshape(16, 16), lateral, 0.5) == ["lateral view"]


def test_the_first_of_several_frames_is_used(run_folder, tmp_path):
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 256, (80, 80), dtype=np.uint8)) for _ in range(2))
    first.save(tmp_path / "one.tif")
    first.save(tmp_path / "two.tif", save_all=True, append_images=[second])
    one, two = predict.predict([tmp_path / "one.tif", tmp_path / "two.tif"], run_folder)
    assert one["probability"] == two["probability"]


# --- order, batches, threads ---


def test_rows_keep_their_order_when_a_later_batch_finishes_first(monkeypatch):
    second_is_done = threading.Event()

    def work(numbers, **_):
        if numbers[0] == 0:
            assert second_is_done.wait(60)
        if numbers[0] == predict.BATCH:
            second_is_done.set()
        return numbers

    monkeypatch.setattr(predict, "classify", work)
    monkeypatch.setattr(data, "CORES", 2)
    assert list(predict.classify_all(range(1000), None)) == list(range(1000))


def test_threads_take_turns_with_the_model(classifier, normals):
    turns, free = threading.Semaphore(1), []
    hook = classifier.model.register_forward_pre_hook(lambda *_: free.append(turns.acquire(blocking=False)))
    predict.classify(normals[:2], dataclasses.replace(classifier, turns=turns))
    hook.remove()
    assert free == [False]
    assert turns.acquire(blocking=False)


def test_a_slow_list_on_stdin_gives_each_row_at_once(run_folder, normals):
    command = [sys.executable, str(ROOT / "predict.py"), "--ckpt", str(run_folder), "--json", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(120, process.kill)  # if it waited for more, so would this test
        watchdog.daemon = True
        watchdog.start()
        for path in normals[:3]:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["path"] == path  # before the next one is known
        process.stdin.close()
        assert process.wait(60) == 0


# --- inputs and the calls from Python ---


def test_mixed_inputs_are_classified_and_the_bad_ones_named(run_folder, normals, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy(normals[0], tmp_path / "sub" / "a b.jpeg")
    for name in ("text.jpeg", "notes.doc"):
        (tmp_path / "sub" / name).write_text("no picture")
    command = ("predict.py", "--ckpt", run_folder, "--json", "missing.png", "sub", "empty", "-")
    done = run_script(*command, cwd=tmp_path, input=f"{normals[2]}\r\n\n")
    assert done.returncode == 1
    assert "skipped 1 other file in sub" in done.stderr
    errors = {row["path"]: row["error"] for row in as_json(done)}
    assert errors == {
        "missing.png": "no such file",
        "sub/a b.jpeg": "",
        "sub/text.jpeg": "not an image of a known format",
        "empty": "a folder that gave no image",
        normals[2]: "",
    }


def test_a_path_on_stdin_need_not_be_valid_text(run_folder, normals, tmp_path):
    """In a process of its own: the encoding of its streams matters."""
    path = os.fsencode(tmp_path / "a") + b"\xe4.jpeg"
    shutil.copy(normals[0], path)
    command = [sys.executable, ROOT / "predict.py", "--ckpt", run_folder, "--csv", "-"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=path, capture_output=True, env=strict, check=True)
    assert b"a\\udce4.jpeg," in done.stdout


def test_folders_and_globs_name_each_image_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "c[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert list(predict.find_inputs(["a", "[b]*", "c[1].png"])) == ["a/1.png", "a/deep/2.png", "b/3.png", "c[1].png"]
    assert sorted(predict.find_inputs(["a/**"])) == ["a/1.png", "a/deep/2.png"]


def test_paths_files_pictures_and_arrays_give_the_same_rows(run_folder, normals):
    image = np.asarray(Image.open(normals[0]))
    with Image.open(normals[0]) as picture, open(normals[0], "rb") as file:
        good = predict.predict([normals[0], file, picture, image, np.stack([image] * 3, 2)], run_folder)
    bad = predict.predict([None, image[:0], "nope"], run_folder)
    for row in good:
        assert row["error"] == ""
        assert row["probability"] == pytest.approx(good[0]["probability"], abs=1e-2)
    assert good[1]["probability"] == good[0]["probability"]
    assert all(row["error"] for row in bad)


def test_the_model_is_loaded_once_until_its_file_changes(run_folder, tmp_path):
    path = save_with(run_folder, tmp_path / "ckpt.pt")
    first = predict.open_classifier(tmp_path, "cpu")
    assert predict.open_classifier(str(path), "cpu") is first
    save_with(run_folder, path, intercept=5.0)
    os.utime(path, (1, 1))
    assert predict.open_classifier(path, "cpu").checkpoint["intercept"] == 5


# --- what is written ---


def test_csv_names_the_model_and_contains_no_formula(run_folder, normals, tmp_path):
    shutil.copy(normals[0], tmp_path / "=1+1.jpeg")
    done = run_script("predict.py", "--ckpt", run_folder, "--csv", "=1+1.jpeg", "nope.png", cwd=tmp_path)
    assert done.stdout.startswith("path,label,probability,threshold,flags,unlike,error,demo,model,checksum,run\n")
    row, bad = csv.DictReader(io.StringIO(done.stdout))
    assert row["path"] == "'=1+1.jpeg"
    assert row["checksum"] == hashlib.sha256((run_folder / "ckpt.pt").read_bytes()).hexdigest()[:12]
    assert bad["error"] == "no such file"
    none = run_script("predict.py", "--ckpt", run_folder, "--csv", "-", cwd=tmp_path)  # no path on stdin
    assert none.returncode == 2
    assert none.stdout == done.stdout.splitlines(keepends=True)[0]


def test_table_columns_are_aligned_and_the_last_lines_give_counts(run_folder, normals, tmp_path):
    names = ["a.jpeg", "a\x1b[2Jb.jpeg"]
    for name in names:
        shutil.copy(normals[0], tmp_path / name)
    done = run_script("predict.py", "--ckpt", run_folder, "--cam", "maps", *names, "gone.png", cwd=tmp_path)
    header, *rows = done.stdout.splitlines()
    assert "P(PNEUMONIA)" in header
    column = header.index("image")
    shown = [row[column:].split("  [")[0] for row in rows]
    assert shown == ["a.jpeg", "a?[2Jb.jpeg", "gone.png"]
    assert "2 heat maps in maps" in done.stderr
    assert done.stderr.endswith(" flagged, 1 error\n")


def test_one_image_is_classified_without_training_code(run_folder, normals):
    code = (
        "import sys, contextlib, predict\n"
        "with contextlib.suppress(SystemExit): predict.main()\n"
        "print({'sklearn', 'scipy', 'train', 'evaluate', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--ckpt", str(run_folder), normals[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.splitlines()[-1] == "set()", done.stderr


# --- heat maps ---


@pytest.mark.parametrize(("label", "logit"), [(0, 1e9), (1, -1e9)])
def test_the_heat_map_is_of_the_class_that_was_predicted(run_folder, normals, tmp_path, label, logit):
    threshold = models.load(run_folder)["threshold"] | {"logit": logit}
    path = save_with(run_folder, tmp_path / "ckpt.pt", threshold=threshold)
    classifier = predict.open_classifier(path, "cpu")
    predict.classify(normals[:1], classifier, tmp_path)
    drawn = np.asarray(Image.open(next(tmp_path.glob("*_cam.png"))))
    image, _ = data.read_image(normals[0], 64)
    radiograph, _ = data.read_image(normals[0], None)
    height, _ = radiograph.shape
    for c, name in enumerate(classifier.checkpoint["classes"]):
        heat = models.heat_map(classifier.model, image, name, classifier.checkpoint)
        expected = np.asarray(predict.draw_heat_map(radiograph, heat, []))
        assert np.array_equal(drawn[:height], expected[:height]) == (c == label)


@pytest.mark.parametrize(("size", "panel"), [((500, 250), (500, 250)), ((100, 50), (224, 112))])
def test_radiograph_and_heat_map_are_side_by_side_over_the_caption(size, panel):
    image = np.full(size[::-1], 128, np.uint8)
    heat = np.zeros((40, 40), np.float32)
    heat[:, :20] = 1
    heat[:, 20:] = 0.28  # under the limit
    drawn = np.asarray(predict.draw_heat_map(image, heat, ["胸\n" * 40, "x" * 400])).astype(int)
    width, height = panel
    colour = np.ptp(drawn[:height], axis=2)
    assert width * 2 <= drawn.shape[1] < width * 2.05
    assert colour[:, :width].max() == 0
    assert colour[:, -width : -width * 3 // 5].min() > 20
    assert colour[:, -width * 2 // 5 :].max() == 0
    assert drawn[height:].max() == 255  # there is a caption


def test_the_caption_gives_file_label_probability_threshold_and_flags(classifier, tmp_path, monkeypatch):
    lines = []
    draw = lambda image, heat, text: lines.extend(text) or Image.new("L", (1, 1))
    monkeypatch.setattr(predict, "draw_heat_map", draw)
    row = predict.Prediction("a/b.png", "NORMAL", 0.25, 0.5, ["colour image"], demo=True)
    predict.write_heat_map(row, np.zeros((64, 64), np.uint8), classifier, tmp_path)
    assert lines[:2] == ["b.png", "NORMAL: P(PNEUMONIA) = 0.250, threshold 0.500"]
    assert lines[2:] == ["tinted: evidence for NORMAL", "DEMO MODEL, trained on synthetic phantoms", "colour image"]


def test_a_heat_map_is_not_taken_for_a_radiograph(run_folder, normals, tmp_path):
    shutil.copy(normals[0], tmp_path)
    for _ in range(2):
        done = run_script("predict.py", "--ckpt", run_folder, "--cam", ".", ".", cwd=tmp_path)
        assert "1 heat map in ." in done.stderr
