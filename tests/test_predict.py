"""predict.py as a user runs it, and its parts."""

import csv
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from conftest import ROOT, run_process, run_script
from PIL import Image

import data
import models
import predict


@pytest.fixture(scope="module")
def classifier(run_folder):
    return predict.open_classifier(run_folder, "cpu")


def as_json(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_probability_equals_the_evaluation_whatever_the_batch(run_folder, demo):
    """One image alone, and all of them in batches, give what test.csv holds."""
    assert run_script("evaluate.py", run_folder / "ckpt.pt", cwd=demo).returncode == 0
    with open(run_folder / "test.csv") as f:
        rows = {r["path"]: r for r in csv.DictReader(f)}
    everything = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--csv", demo / "test", cwd=demo)
    found = {r["path"]: r for r in csv.DictReader(io.StringIO(everything.stdout))}
    assert len(found) == len(rows) > 20
    for path, row in rows.items():
        other = found[str(demo / path)]
        assert float(other["probability"]) == pytest.approx(float(row["probability"]), abs=1e-5)
        assert other["label"] == row["prediction"]
    path = next(iter(rows))
    (alone,) = as_json(run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--json", path, cwd=demo))
    assert alone["probability"] == pytest.approx(float(rows[path]["probability"]), abs=1e-5)


def test_mixed_inputs_are_done_and_the_bad_ones_named(run_folder, demo, tmp_path):
    """Exit code 1, nothing but results on stdout, and the good files classified all the same."""
    good = sorted((demo / "test" / "NORMAL").iterdir())[:3]
    shutil.copy(good[0], tmp_path / "a b.jpeg")
    (tmp_path / "sub").mkdir()
    shutil.copy(good[1], tmp_path / "sub" / "c.jpeg")
    (tmp_path / "text.jpeg").write_text("no picture")
    (tmp_path / "._a.jpeg").write_bytes(b"x")
    done = run_process(
        "predict.py", "--ckpt", run_folder / "ckpt.pt", "--json", "missing.png", ".", str(good[0].parent / "*.jpeg"), "-",
        cwd=tmp_path, input=f"{good[2]}\n",
    )  # fmt: skip
    results = as_json(done)
    assert done.returncode == 1
    assert [r["error"] for r in results[:4]] == ["no such file", "", "not an image of a known format", ""]
    assert [os.path.basename(r["path"]) for r in results[:4]] == ["missing.png", "a b.jpeg", "text.jpeg", "c.jpeg"]
    assert results[0]["label"] is None and results[0]["probability"] is None
    count = len(list(good[0].parent.glob("*.jpeg")))
    assert len(results) == 4 + count + 1 and results[-1]["path"] == str(good[2])
    assert all(r["label"] in ("NORMAL", "PNEUMONIA") for r in results[4:])


def test_csv(run_folder, demo, tmp_path):
    """The rows say which model they come from, and a spreadsheet takes no cell for a formula."""
    shutil.copy(min((demo / "test" / "PNEUMONIA").iterdir()), tmp_path / "=1+1.jpeg")
    done = run_script("predict.py", "--ckpt", run_folder, "--csv", "=1+1.jpeg", "nope.png", cwd=tmp_path)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    columns = ["path", "label", "probability", "threshold", "flags", "unlike", "error", "model", "checksum"]
    assert list(rows[0]) == columns
    assert rows[0]["path"] == "'=1+1.jpeg" and 0 < float(rows[0]["unlike"]) < 5 and "demo model" in rows[0]["flags"]
    assert rows[1]["error"] == "no such file" and rows[1]["probability"] == ""
    digest = hashlib.sha256((run_folder / "ckpt.pt").read_bytes()).hexdigest()
    assert [(r["model"], r["checksum"]) for r in rows] == [("mobilenetv3_small_050", digest[:12])] * 2


@pytest.mark.parametrize("cam", [(), ("--cam", "maps")])
def test_table(run_folder, demo, tmp_path, cam):
    """Columns stand where they are whatever names come; names move no cursor; the last line counts."""
    image = min((demo / "test" / "PNEUMONIA").iterdir())
    (tmp_path / "deep" / ("x" * 90)).mkdir(parents=True)
    names = ["a.jpeg", f"deep/{'x' * 90}/b.jpeg", "a\x1b[2Jb.jpeg"]
    for name in names:
        shutil.copy(image, tmp_path / name)
    done = run_script("predict.py", "--ckpt", run_folder, *cam, *names, "gone.png", cwd=tmp_path)
    assert done.returncode == 1
    header, *rows = done.stdout.splitlines()
    threshold = models.load(run_folder)["threshold"]["value"]
    assert "P(PNEUMONIA)" in header and f"threshold {threshold:.3f}" in header
    column = header.index("image")
    shown = ["a.jpeg", names[1], "a?[2Jb.jpeg", "gone.png"]
    assert [row[column:].split("  [")[0] for row in rows] == shown
    assert rows[3].startswith("error ") and "no such file" in rows[3]
    p = float(rows[0][: column - 2].split()[1])
    positives = 3 * (p >= threshold)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"4 images: {positives} positive, {3 - positives} negative, ") and last.endswith(
        ", 1 errors"
    )


def test_an_output_that_is_not_finite_is_an_error_of_that_file(classifier, demo, monkeypatch):
    paths = sorted(map(str, (demo / "test" / "NORMAL").iterdir()))[:3]
    forward = classifier.model.forward

    def spoiled(x):
        return forward(x).index_fill(0, torch.tensor([1]), float("nan"))

    monkeypatch.setattr(classifier.model, "forward", spoiled)
    rows = predict.classify(paths, classifier)
    assert [row.label is None for row in rows] == [False, True, False]
    assert "not finite" in rows[1].error and rows[1].probability is None


def test_one_call_from_python(run_folder, demo):
    """Paths, open files, Pillow images and arrays give the dicts of --json; the model is loaded once."""
    path = min((demo / "test" / "NORMAL").iterdir())
    with Image.open(path) as picture, open(path, "rb") as file:
        pixels = np.asarray(picture)
        found = predict.predict([path, file, picture, pixels, np.stack([pixels] * 3, 2), "nope"], run_folder, "cpu")
    (expected,) = as_json(run_script("predict.py", "--ckpt", run_folder, "--json", path, cwd=demo))
    assert found[0].keys() == expected.keys() and found[0]["label"] == expected["label"]
    assert [r["path"] for r in found] == [str(path), str(path), "", "", "", "nope"]
    assert [r["probability"] for r in found[:5]] == pytest.approx([expected["probability"]] * 5, abs=2e-3)
    assert found[5]["error"] == "no such file" and found[5]["label"] is None
    assert predict.open_classifier(run_folder, "cpu") is predict.open_classifier(str(run_folder), "cpu")
    assert predict.predict([], run_folder) == []
    rows = predict.predict((image for image in [pixels, None, pixels]), run_folder)  # as of a reader that failed
    assert [bool(row["error"]) for row in rows] == [False, True, False]


def test_a_service_in_a_few_lines(run_folder, demo):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            (result,) = predict.predict([io.BytesIO(body)], run_folder)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(result).encode())

        def log_message(self, *_):
            pass

    image = min((demo / "test" / "NORMAL").iterdir())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        result = json.loads(urllib.request.urlopen(url, image.read_bytes()).read())
        server.shutdown()
    (expected,) = predict.predict([image], run_folder)
    assert result["probability"] == pytest.approx(expected["probability"], abs=1e-6) and result["error"] == ""


def test_flags(classifier, tmp_path):
    """Each oddity gets its own name; none of them changes the label."""
    rng = np.random.default_rng(0)
    pictures = {
        "colour image": np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((16, 16, 1))),
        "near-constant image": np.full((128, 128), 90),
        "under 64 pixels": rng.integers(0, 256, (50, 200)),
        "unlike training images": rng.integers(0, 256, (128, 128)),
    }
    for name, pixels in pictures.items():
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        (row,) = predict.classify([str(path)], classifier)
        assert name in row.flags
        assert (row.unlike > 1) == ("unlike training images" in row.flags)
        assert (row.label == "PNEUMONIA") == (row.probability >= row.threshold)


def test_phantoms_are_seldom_flagged(run_folder, demo):
    """The input check fits 120 images here; most of the held-back ones must pass."""
    results = as_json(run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--json", demo / "test", cwd=demo))
    flagged = [r for r in results if r["flags"]]
    assert all((r["unlike"] > 1) == ("unlike training images" in r["flags"]) for r in results)
    assert len(flagged) <= len(results) / 2
    assert "colour image" not in {f for r in results for f in r["flags"]}


def test_three_classes(demo, run_folder, tmp_path):
    """All probabilities are given, and the label is the largest; there is no threshold."""
    ckpt = models.load(run_folder / "ckpt.pt")
    model = models.build(ckpt["model"], 3, ckpt["input_size"])
    ckpt |= {"classes": ["A", "B", "C"], "positive": "C", "state_dict": model.state_dict()}
    ckpt["threshold"] = {"value": None, "rule": "largest probability", "from": ""}
    ckpt["border"] = None
    models.save(ckpt, tmp_path / "three.pt")
    image = min((demo / "test" / "NORMAL").iterdir())
    (result,) = as_json(run_script("predict.py", "--ckpt", tmp_path / "three.pt", "--json", image, cwd=demo))
    assert sum(result["probability"].values()) == pytest.approx(1)
    assert result["label"] == max(result["probability"], key=result["probability"].get)
    assert result["threshold"] is None
    table = run_script("predict.py", "--ckpt", tmp_path / "three.pt", "--cam", "maps", image, cwd=tmp_path)
    assert "P(label)" in table.stdout and len(list((tmp_path / "maps").iterdir())) == 1
    assert table.stderr.splitlines()[-1].startswith("1 image: ")


@pytest.mark.parametrize("size", [(224, 224), (2500, 2000), (100, 50)])
def test_heat_map_is_the_radiograph_beside_itself(size):
    """Coloured where the map is high and nowhere else; the caption does not widen the picture, however long it is."""
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, size[::-1], dtype=np.uint8))
    heat = np.zeros((40, 40), np.float32)
    heat[:20, :20] = 1
    heat[20:, 20:] = 0.28
    short = predict.draw_heat_map(picture, heat, ["a", "b"])
    drawn = predict.draw_heat_map(picture, heat, ["胸\n" * 40, "x" * 400])
    assert drawn.size == short.size
    panel = max(size[0], 224), max(size[0], 224) * size[1] // size[0]
    gap = drawn.width - 2 * panel[0]
    assert 0 < gap < 0.02 * drawn.width + 4
    colour = np.ptp(np.asarray(drawn).astype(int), axis=2)
    left, right = colour[: panel[1], : panel[0]], colour[: panel[1], panel[0] + gap :]
    assert left.max() == 0 and right[:, panel[0] * 3 // 5 :].max() == 0
    assert right[: panel[1] * 2 // 5, : panel[0] * 2 // 5].min() > 20
    assert np.asarray(drawn)[panel[1] :].max() == 255  # there is a caption


def test_caption_tells_threshold_and_scale():
    row = predict.Prediction("a/b.png", "PNEUMONIA", 0.75, 0.5, ["colour image"], demo=True)
    lines = predict.caption(row, "PNEUMONIA")
    assert lines[0] == "b.png" and "0.750" in lines[1] and "threshold 0.500" in lines[1]
    assert "own maximum" in lines[2] and "DEMO" in lines[3] and lines[4] == "colour image"


def test_the_margin_is_not_seen(run_folder):
    """What stands in the outer tenth of each side can change a probability by the image's mean alone."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    ring = data.border_ring(64, 6).numpy()
    margin, inside = image.copy(), image.copy()
    margin[ring] = rng.permutation(image[ring])
    inside[~ring] = rng.permutation(image[~ring])
    seen, same, other = (row["probability"] for row in predict.predict([image, margin, inside], run_folder))
    assert same == pytest.approx(seen, abs=1e-7) and abs(other - seen) > 1e-5


@pytest.mark.parametrize(
    ("path", "start"),
    [
        (PurePosixPath("x/a/b\n\x1b[2J.png"), "x_a_b_2J_png_"),
        (PureWindowsPath("C:\\scans\\p1.png"), "scans_p1_png_"),
        (PurePosixPath("胸" * 100 + ".jpeg"), "胸"),
    ],
)
def test_heat_map_names(path, start):
    """No control characters, no drive, no more bytes than file systems take."""
    name = predict.map_name(path)
    assert name.startswith(start) and name.endswith("_cam.png") and len(name.encode()) < 200
    assert name != predict.map_name(path / "other")


def test_a_file_that_goes_before_its_map_is_drawn_is_one_bad_row(run_folder, demo, tmp_path, monkeypatch):
    read_image = data.read_image

    def gone(path, size):
        if size is None and str(path).endswith("2.jpeg"):
            raise data.ImageError("no such file")
        return read_image(path, size)

    monkeypatch.setattr(data, "read_image", gone)
    for i in range(3):
        shutil.copy(min((demo / "test" / "NORMAL").iterdir()), tmp_path / f"{i}.jpeg")
    done = run_script(
        "predict.py", "--ckpt", run_folder, "--json", "--cam", "m", "0.jpeg", "1.jpeg", "2.jpeg", cwd=tmp_path
    )
    assert done.returncode == 1
    assert [r["error"] for r in as_json(done)] == ["", "", "no map: no such file"]
    assert [r["label"] is None for r in as_json(done)] == [False, False, True]


def test_maps_are_not_mixed_with_radiographs(run_folder, demo, tmp_path):
    """A map among the images of a class would be scored as one; maps from before are in nobody's way."""
    image = min((demo / "test" / "NORMAL").iterdir())
    (tmp_path / "class").mkdir()
    shutil.copy(image, tmp_path / "class")
    common = ("predict.py", "--ckpt", run_folder, "--cam")
    refused = run_script(*common, "class", image, cwd=tmp_path)
    assert refused.returncode == 2 and "class holds images" in refused.stderr
    for _ in range(2):
        assert run_script(*common, "maps", image, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "maps").iterdir())) == 1 and len(list((tmp_path / "class").iterdir())) == 1


def test_each_map_gives_its_row_at_once(run_folder, demo, tmp_path, monkeypatch):
    """A heat map takes long: whoever interrupts waits for one, and what was done is printed."""
    first, second, third = sorted((demo / "test" / "NORMAL").iterdir())[:3]

    def add_heat_map(row, *rest):
        if row.path == str(third):
            raise KeyboardInterrupt

    monkeypatch.setattr(predict, "add_heat_map", add_heat_map)
    done = run_script("predict.py", "--ckpt", run_folder, "--json", "--cam", "m", third.parent, cwd=tmp_path)
    assert done.returncode == 130
    assert [r["path"] for r in as_json(done)] == [str(first), str(second)]


def test_a_slow_list_on_stdin_gives_each_row_at_once(run_folder, demo):
    paths = sorted(map(str, (demo / "test" / "NORMAL").iterdir()))[:3]
    command = [sys.executable, str(ROOT / "predict.py"), "--ckpt", str(run_folder), "--json", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for path in paths:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["path"] == path  # before the next one is known
        process.stdin.write(paths[0])  # without an end of line
        process.stdin.close()
        assert json.loads(process.stdout.readline())["path"] == paths[0]
        assert process.wait(60) == 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 9)])
def test_an_image_without_pixels_is_an_error(run_folder, shape):
    (row,) = predict.predict([np.zeros(shape, np.uint8)], run_folder, "cpu")
    assert row["error"] == "it has no pixels" and row["label"] is None


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_stream_keeps_order_and_little_in_memory(count):
    """However many paths there are, no more than a few batches are ever taken ahead of what came out."""
    taken, out = [], []

    def paths():
        for i in range(count):
            taken.append(i)
            yield str(i)

    for batch in predict.stream(paths(), list, 3, 32):
        out += batch
        assert 0 < len(batch) <= 32 and len(taken) <= len(out) + 8 * 32
    assert out == [str(i) for i in range(count)]


def test_a_flush_among_the_sources_brings_out_what_came_before():
    out = []

    def paths():
        yield from range(100)
        yield predict.FLUSH
        assert out == list(range(100))
        yield 100

    for batch in predict.stream(paths(), list, 2, 32):
        out += batch
    assert out == list(range(101))


def test_threads_are_shared_out_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for workers, each in ((1, 4), (2, 2), (8, 1)):
            for _ in predict.stream(range(100), list, workers, 32):
                assert torch.get_num_threads() == each
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_folders_are_walked_however_they_are_named(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "c/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    found = list(predict.find_inputs(["a", "[b]*", "c"]))
    assert found == ["a/1.png", "a/deep/2.png", "b/3.png", "c/4.png"]


def test_a_glob_names_each_image_once(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/deep/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert sorted(predict.find_inputs(["a/**"])) == ["a/1.png", "a/deep/2.png"]


def test_a_folder_without_images_is_one_bad_row(run_folder, demo, tmp_path):
    (tmp_path / "empty").mkdir()
    image = min((demo / "test" / "NORMAL").iterdir())
    done = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--json", "empty", image, cwd=tmp_path)
    assert done.returncode == 1
    assert [r["error"] for r in as_json(done)] == ["a folder without images", ""]


def test_names_that_the_output_can_not_encode(run_folder, demo, tmp_path, monkeypatch):
    image = shutil.copy(min((demo / "test" / "NORMAL").iterdir()), tmp_path / "胸.jpeg")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["predict.py", "--ckpt", str(run_folder), "--csv", str(image)])
    with pytest.raises(SystemExit) as end:
        predict.main()
    assert end.value.code == 0 and b"\\u80f8.jpeg," in out.buffer.getvalue()


def test_a_folder_that_can_not_be_read_is_one_bad_row(tmp_path, monkeypatch):
    for name in ("d/1.png", "d/locked/2.png", "e/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scandir, locked = os.scandir, str(tmp_path / "d" / "locked")

    def refuse(path):
        if str(path) == locked:
            raise PermissionError(13, "Permission denied", locked)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list(predict.find_inputs([str(tmp_path / "d"), str(tmp_path / "e")]))
    assert found == [str(tmp_path / "d" / "1.png"), locked, str(tmp_path / "e" / "3.png")]
    with pytest.raises(data.UserError, match="locked can't be read"):
        list(data.walk(tmp_path / "d", Counter()))


def test_an_error_in_a_worker_is_not_swallowed():
    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(predict.stream(range(100), fail, 2, 32))


def test_prediction_does_without_training_code(run_folder, demo):
    """What one image needs to be classified leaves scikit-learn and the training script alone."""
    image = min((demo / "test" / "NORMAL").iterdir())
    code = (
        "import sys, predict; sys.argv = ['predict.py', '--ckpt', sys.argv[1], sys.argv[2]];"
        "predict.run(predict.make_parser().parse_args());"
        "print({'sklearn', 'scipy', 'train', 'evaluate', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_folder / "ckpt.pt"), str(image)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "set()", done.stderr


def test_newest_run_is_taken(run_folder, demo, tmp_path):
    for name, age in (("new", 10), ("old", 20)):
        shutil.copytree(run_folder, tmp_path / "runs" / name)
        ckpt = tmp_path / "runs" / name / "ckpt.pt"
        os.utime(ckpt, (ckpt.stat().st_mtime - age,) * 2)
    ckpt = models.load(tmp_path / "runs" / "new" / "ckpt.pt")
    stamp = (tmp_path / "runs" / "new" / "ckpt.pt").stat().st_mtime
    ckpt["threshold"]["value"] = 0.123
    models.save(ckpt, tmp_path / "runs" / "new" / "ckpt.pt")
    os.utime(tmp_path / "runs" / "new" / "ckpt.pt", (stamp, stamp))
    image = demo / data.scan(demo, "test")[0].path
    (result,) = as_json(run_script("predict.py", "--json", image, cwd=tmp_path))
    assert result["threshold"] == 0.123
