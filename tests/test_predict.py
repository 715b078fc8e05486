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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image, ImageFont

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
    assert run_script("evaluate.py", run_folder, "--bootstrap", 20, cwd=demo).returncode == 0
    with open(run_folder / "test.csv") as f:
        expected = {r["path"]: r for r in csv.DictReader(f)}
    rows = as_json(run_script("predict.py", "--ckpt", run_folder, "--json", "test", cwd=demo))
    assert sorted(r["path"] for r in rows) == sorted(expected)
    for row in rows:
        other = expected[row["path"]]
        assert row["probability"] == pytest.approx(float(other["probability"]), abs=1e-6)
        assert row["label"] == other["prediction"]


def test_probability_is_calibrated_and_the_threshold_decides(run_folder, demo, tmp_path):
    """By hand, from the model's logits of the whole images."""
    checkpoint = models.load(run_folder)
    paths = [str(demo / r.path) for r in data.scan(demo, "test")]
    images = np.stack([data.read_image(path, 64)[0] for path in paths])
    x = (images[:, None] / 255 - checkpoint["mean"]) / checkpoint["std"]
    model = models.from_checkpoint(checkpoint, torch.device("cpu"))
    with torch.inference_mode():
        logits = model(torch.from_numpy(x).float()).double().numpy()
    difference = logits[:, 1] - logits[:, 0]
    slope = 3 / difference.std()
    intercept = 1 - slope * difference.mean()
    expected = 1 / (1 + np.exp(-slope * difference - intercept))
    cut = float(np.median(expected))  # about 0.7
    point = {"slope": float(slope), "intercept": float(intercept)}
    point["threshold"] = checkpoint["threshold"] | {"value": cut, "logit": float(np.log(cut / (1 - cut)))}
    rows = predict.predict(paths, save_with(run_folder, tmp_path / "ckpt.pt", **point), "cpu")
    assert [r["path"] for r in rows] == paths
    assert [r["probability"] for r in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [r["label"] == "PNEUMONIA" for r in rows] == [r["probability"] >= r["threshold"] == cut for r in rows]


def test_of_three_classes_the_most_probable_is_the_label(run_folder, normals, tmp_path):
    model = models.build("mobilenetv3_small_050", 3, 64)
    fields = {"classes": ["A", "B", "C"], "state_dict": model.state_dict()}
    fields["threshold"] = {"value": None, "logit": None, "rule": "", "from": "", "weighting": ""}
    command = ("predict.py", "--ckpt", save_with(run_folder, tmp_path / "three.pt", **fields), normals[0])
    (row,) = as_json(run_script(*command, "--json", cwd=tmp_path))
    probability = row["probability"]
    assert sum(probability.values()) == pytest.approx(1) and row["threshold"] is None
    assert row["label"] == max(probability, key=probability.get)
    (cells,) = csv.DictReader(io.StringIO(run_script(*command, "--csv", cwd=tmp_path).stdout))
    assert float(cells["probability_B"]) == probability["B"] and "probability" not in cells
    header, line = run_script(*command, "--cam", "maps", cwd=tmp_path).stdout.splitlines()
    assert "P(label)" in header and f"{probability[row['label']]:.4f}" in line


def test_an_output_that_is_not_finite_is_an_error_of_that_file(classifier, normals, monkeypatch):
    forward = classifier.model.forward
    monkeypatch.setattr(classifier.model, "forward", lambda x: forward(x).index_fill(0, torch.tensor([1]), torch.nan))
    rows = predict.classify(normals[:3], classifier)
    assert [row.label is None for row in rows] == [False, True, False]
    assert "not finite" in rows[1].error and rows[1].probability is None


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
        unlike = ["unlike training images"] * (row["unlike"] > 1)
        assert row["flags"] == [name, *unlike]
    assert rows[2]["unlike"] > 1  # noise


@pytest.mark.parametrize(("view", "n_flags"), [("LL", 1), ("RL", 1), ("LATERAL", 1), ("PA", 0), ("", 0)])
def test_a_lateral_view_is_flagged(view, n_flags):
    image = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    info = data.ImageInfo(100, 100, "MONOCHROME2", view=view)
    assert predict.find_flags(image, info, 0.5) == ["lateral view"] * n_flags


# --- order, batches, threads ---


def test_rows_keep_their_order_where_a_later_batch_is_done_first(monkeypatch):
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


@pytest.mark.parametrize(("one_by_one", "ahead"), [(True, 1), (False, 8 * predict.BATCH)])
def test_few_sources_are_taken_ahead_of_the_rows(one_by_one, ahead, monkeypatch):
    monkeypatch.setattr(predict, "classify", lambda sources, **_: sources)
    monkeypatch.setattr(data, "CORES", 2)
    taken = []
    numbers = (taken.append(i) or i for i in range(2000))
    for i, row in enumerate(predict.classify_all(numbers, None, one_by_one=one_by_one)):
        assert row == i and len(taken) <= i + ahead
    assert len(taken) == 2000


def test_threads_take_turns_with_the_model(classifier, normals):
    turns, free = threading.Semaphore(1), []
    hook = classifier.model.register_forward_pre_hook(lambda *_: free.append(turns.acquire(blocking=False)))
    predict.classify(normals[:2], dataclasses.replace(classifier, turns=turns))
    hook.remove()
    assert free == [False] and turns.acquire(blocking=False)


def test_a_slow_list_on_stdin_gives_each_row_at_once(run_folder, normals):
    command = [sys.executable, str(ROOT / "predict.py"), "--ckpt", str(run_folder), "--json", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(120, process.kill)  # where it waits for more, so would this test
        watchdog.daemon = True
        watchdog.start()
        for path in normals[:3]:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["path"] == path  # before the next one is known
        process.stdin.write(normals[0])  # without an end of line
        process.stdin.close()
        assert json.loads(process.stdout.readline())["path"] == normals[0]
        assert process.wait(60) == 0


# --- inputs and the calls from Python ---


def test_mixed_inputs_are_classified_and_the_bad_ones_named(run_folder, normals, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy(normals[0], tmp_path / "sub" / "a b.jpeg")
    for name in ("text.jpeg", "._a.jpeg", "notes.doc"):
        (tmp_path / "sub" / name).write_text("no picture")
    inputs = ("missing.png", "sub", "empty", Path(normals[0]).parent / "*.jpeg", "-")
    stdin = f"{normals[2]}\r\n\n-\nsub\n"
    done = run_script("predict.py", "--ckpt", run_folder, "--json", *inputs, cwd=tmp_path, input=stdin)
    rows = as_json(done)
    assert done.returncode == 1 and "skipped 1 non-image file in sub" in done.stderr
    sub = ["sub/a b.jpeg", "sub/text.jpeg"]
    assert [r["path"] for r in rows] == ["missing.png", *sub, "empty", *normals, normals[2], *sub]
    errors = ["no such file", "", "not an image of a known format", "a folder without images"]
    assert [r["error"] for r in rows] == [*errors, *[""] * len(normals), "", *errors[1:3]]
    for row in rows:
        assert (row["label"] is None) == (row["probability"] is None) == bool(row["error"])


def test_folders_and_globs_name_each_image_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "c[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert list(predict.find_inputs(["a", "[b]*", "c[1].png"])) == ["a/1.png", "a/deep/2.png", "b/3.png", "c[1].png"]
    assert sorted(predict.find_inputs(["a/**"])) == ["a/1.png", "a/deep/2.png"]
    assert list(predict.find_inputs(["none*"])) == ["none*"]


def test_a_folder_that_can_not_be_read_is_a_row_of_its_own(tmp_path, monkeypatch):
    def walk(folder, passed_over, onerror):
        yield folder / "1.png"
        onerror(PermissionError(13, "Permission denied", "locked"))

    monkeypatch.setattr(data, "walk", walk)
    assert list(predict.find_inputs([str(tmp_path)])) == [str(tmp_path / "1.png"), "locked"]


@pytest.mark.parametrize(("style", "header"), [("--csv", "path,label,probability,"), ("--json", "")])
def test_a_list_without_paths_is_a_mistake_and_the_message_says_the_way_out(run_folder, tmp_path, style, header):
    done = run_script("predict.py", "--ckpt", run_folder, style, "-", cwd=tmp_path, input="\n")
    assert done.returncode == 2 and "no paths on stdin; write one per line" in done.stderr
    assert done.stdout.startswith(header) and done.stdout.count("\n") == bool(header)


def test_paths_files_pictures_and_arrays_give_the_rows_of_json(run_folder, normals, tmp_path):
    (expected,) = as_json(run_script("predict.py", "--ckpt", run_folder, "--json", normals[0], cwd=tmp_path))
    image = np.asarray(Image.open(normals[0]))
    with Image.open(normals[0]) as picture, open(normals[0], "rb") as file:
        sources = [normals[0], file, picture, image, np.stack([image] * 3, 2), None, image[:0], "nope"]
        rows = predict.predict(iter(sources), run_folder)
    assert [r["path"] for r in rows] == [normals[0]] * 2 + [""] * 5 + ["nope"]
    assert [bool(r["error"]) for r in rows] == [False] * 5 + [True] * 3
    assert [r["probability"] for r in rows[:5]] == pytest.approx([expected["probability"]] * 5, abs=2e-3)
    assert rows[0].keys() == expected.keys() and rows[0]["label"] == expected["label"]


def test_the_model_is_loaded_once_until_its_file_changes(run_folder, tmp_path):
    path = save_with(run_folder, tmp_path / "ckpt.pt")
    first = predict.open_classifier(tmp_path, "cpu")
    assert predict.open_classifier(str(path), "cpu") is first
    save_with(run_folder, path, intercept=5.0)
    os.utime(path, (1, 1))
    assert predict.open_classifier(path, "cpu").checkpoint["intercept"] == 5


# --- what is written ---


def test_csv_names_the_model_and_gives_a_spreadsheet_no_formula(run_folder, normals, tmp_path):
    shutil.copy(normals[0], tmp_path / "=1+1.jpeg")
    done = run_script("predict.py", "--ckpt", run_folder, "--csv", "=1+1.jpeg", "nope.png", cwd=tmp_path)
    assert done.stdout.startswith("path,label,probability,threshold,flags,unlike,error,demo,model,checksum,run\n")
    row, bad = csv.DictReader(io.StringIO(done.stdout))
    assert row["path"] == "'=1+1.jpeg" and 0 < float(row["unlike"]) < 5 and row["demo"] == "True"
    assert bad["error"] == "no such file" and bad["probability"] == ""
    path = run_folder / "ckpt.pt"
    assert row["checksum"] == bad["checksum"] == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert row["model"] == "mobilenetv3_small_050"
    assert row["run"] == str(path) and f"model: {path}" in done.stderr.splitlines()


def test_the_table_has_straight_columns_and_the_last_lines_count(run_folder, normals, tmp_path):
    names = ["a.jpeg", f"{'x' * 90}.jpeg", "a\x1b[2Jb.jpeg"]
    for name in names:
        shutil.copy(normals[0], tmp_path / name)
    done = run_script("predict.py", "--ckpt", run_folder, "--cam", "maps", *names, "gone.png", cwd=tmp_path)
    header, *rows = done.stdout.splitlines()
    threshold = models.load(run_folder)["threshold"]["value"]
    assert done.returncode == 1 and "P(PNEUMONIA)" in header and f"threshold {threshold:.3f}" in header
    column = header.index("image")
    assert [row[column:].split("  [")[0] for row in rows] == [*names[:2], "a?[2Jb.jpeg", "gone.png"]
    assert rows[3].startswith("error ") and "no such file" in rows[3] and "DEMO MODEL" in rows[0]
    n_positive = 3 * (float(rows[0].split()[1]) >= threshold)
    maps, summary = done.stderr.splitlines()[-2:]
    assert maps == "3 heat maps in maps" and len(os.listdir(tmp_path / "maps")) == 3
    assert summary.startswith(f"4 images: {3 - n_positive} NORMAL, {n_positive} PNEUMONIA, ")
    assert summary.endswith(" flagged, 1 error")


def test_one_image_is_classified_without_training_code(run_folder, normals):
    code = (
        "import sys, contextlib, predict\n"
        "with contextlib.suppress(SystemExit): predict.main()\n"
        "print({'sklearn', 'scipy', 'train', 'evaluate', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--ckpt", str(run_folder), normals[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert len(done.stdout.splitlines()) == 2 and done.stderr.splitlines()[-1] == "set()", done.stderr


# --- heat maps ---


@pytest.mark.parametrize(("label", "logit"), [(0, 1e9), (1, -1e9)])
def test_the_heat_map_is_of_the_class_that_was_predicted(run_folder, normals, tmp_path, label, logit):
    point = models.load(run_folder)["threshold"] | {"logit": logit}
    classifier = predict.open_classifier(save_with(run_folder, tmp_path / "ckpt.pt", threshold=point), "cpu")
    predict.classify(normals[:1], classifier, tmp_path)
    drawn = np.asarray(Image.open(next(tmp_path.glob("*_cam.png"))))
    x = data.normalise(data.to_float(torch.from_numpy(data.read_image(normals[0], 64)[0])[None]), classifier.checkpoint)
    radiograph, _ = data.read_image(normals[0], None)
    height, width = radiograph.shape
    for c in (0, 1):
        expected = predict.overlay(radiograph, models.heat_map(classifier.model, x, c)[0].numpy())
        assert np.array_equal(drawn[:height, -width:], expected) == (c == label)
    assert np.array_equal(drawn[:height, :width], np.stack([radiograph] * 3, 2))


@pytest.mark.parametrize(("size", "panel"), [((300, 240),) * 2, ((900, 450), (500, 250)), ((100, 50), (224, 112))])
def test_radiograph_and_heat_map_are_side_by_side_over_the_caption(size, panel, monkeypatch):
    monkeypatch.setattr(predict, "LARGEST", 500)
    image = np.random.default_rng(0).integers(60, 200, size[::-1], dtype=np.uint8)
    heat = np.zeros((40, 40), np.float32)
    heat[:20, :20] = 1
    heat[20:, 20:] = 0.28
    drawn = predict.draw_heat_map(image, heat, ["胸\n" * 40, "x" * 400])
    assert drawn.size == predict.draw_heat_map(image, heat, ["a", "b"]).size
    width, height = panel
    colour = np.ptp(np.asarray(drawn).astype(int), axis=2)
    right = colour[:height, -width:]
    assert drawn.width < 2.05 * width and colour[:height, :width].max() == 0
    assert right[: height * 2 // 5, : width * 2 // 5].min() > 20 and right[:, width * 3 // 5 :].max() == 0
    assert np.asarray(drawn)[height:].max() == 255  # there is a caption


def test_the_caption_says_file_label_probability_threshold_and_flags():
    row = predict.Prediction("a/b.png", "NORMAL", 0.25, 0.5, ["colour image"], demo=True)
    name, result, tinted, demo, flag = predict.caption(row, ["NORMAL", "PNEUMONIA"])
    assert name == "b.png" and result == "NORMAL: P(PNEUMONIA) = 0.250, threshold 0.500"
    assert tinted.endswith("for NORMAL") and "DEMO" in demo and flag == "colour image"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("unauffällig", "unauffallig"), ("a\u0308", "a"), ("Жё", r"\u0416\u0435"), ("胸", r"\u80f8")],
)
def test_a_font_with_the_letters_is_used_else_they_lose_their_marks_or_are_escaped(name, shown, monkeypatch):
    ascii_alone = ImageFont.load_default(12)
    monkeypatch.setattr(predict, "load_fonts", lambda: [ascii_alone])
    assert predict.typeset(name, 12, 400)[0] == shown
    every_letter = SimpleNamespace(getmask=str.encode, getlength=len, font_variant=lambda size: every_letter)
    monkeypatch.setattr(predict, "load_fonts", lambda: [ascii_alone, every_letter])
    assert predict.typeset(f"{name}\n\udcff", 12, 400)[0] == rf"{name}\n\udcff"


@pytest.mark.parametrize(("path", "start"), [("x/b\n\x1b[2J.png", "x_b_2J_png_"), ("C:\\p", "C_p_"), ("胸" * 99, "胸")])
def test_heat_maps_have_names_that_file_systems_take(path, start):
    name = predict.map_name(path)
    assert name.startswith(start) and name.endswith("_cam.png") and len(name.encode()) < 200
    assert name != predict.map_name(f"y/{path}")


@pytest.mark.parametrize(("folder", "path"), [("class", "x.png"), ("class/maps", "class")])
def test_maps_are_not_mixed_with_radiographs(run_folder, normals, tmp_path, folder, path):
    (tmp_path / "class").mkdir()
    shutil.copy(normals[0], tmp_path / "class")
    command = ("predict.py", "--ckpt", run_folder, "--cam")
    refused = run_script(*command, folder, path, cwd=tmp_path)
    assert refused.returncode == 2 and "mixed with images" in refused.stderr
    for _ in range(2):  # maps from before are no obstacle
        assert run_script(*command, "maps", "class", cwd=tmp_path).returncode == 0


def test_an_interrupted_run_has_printed_each_image_that_has_its_map(run_folder, normals, tmp_path, monkeypatch):
    def write_heat_map(row, *rest):
        if row.path == normals[2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict, "write_heat_map", write_heat_map)
    folder = Path(normals[0]).parent
    done = run_script("predict.py", "--ckpt", run_folder, "--json", "--cam", "m", folder, cwd=tmp_path)
    assert done.returncode == 130 and [r["path"] for r in as_json(done)] == normals[:2]
