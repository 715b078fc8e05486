"""predict.py as a user runs it, and its parts."""

import csv
import io
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_process, run_script
from PIL import Image

import data
import models
import predict

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(run_folder):
    return predict.load_models([str(run_folder / "ckpt.pt")], CPU)


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
    assert [r["error"] for r in results[:4]] == ["no such file", "", "not an image that Pillow can read", ""]
    assert [os.path.basename(r["path"]) for r in results[:4]] == ["missing.png", "a b.jpeg", "text.jpeg", "c.jpeg"]
    assert results[0]["label"] is None and results[0]["probability"] is None
    count = len(list(good[0].parent.glob("*.jpeg")))
    assert len(results) == 4 + count + 1 and results[-1]["path"] == str(good[2])
    assert all(r["label"] in ("NORMAL", "PNEUMONIA") for r in results[4:])


def test_csv_and_table(run_folder, demo):
    path = min((demo / "test" / "PNEUMONIA").iterdir())
    done = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--csv", path, "nope.png", cwd=demo)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert list(rows[0]) == ["path", "label", "probability", "threshold", "flags", "error"]
    assert rows[1]["error"] == "no such file" and rows[1]["probability"] == ""
    assert "demo model" in rows[0]["flags"]
    table = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "a\nb.png", cwd=demo)
    assert table.stdout == "a?b.png  error: no such file\n"
    table = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", path, cwd=demo)
    assert table.returncode == 0 and "DEMO" in table.stderr
    assert table.stdout.split()[:3] == [str(path), rows[0]["label"], f"{float(rows[0]['probability']):.4f}"]


def test_ensemble_averages_calibrated_probabilities(run_folder, demo, tmp_path):
    other = models.load(run_folder / "ckpt.pt")
    other["temperature"] *= 3
    other["threshold"]["value"] = 0.9
    models.save(other, tmp_path / "b.pt")
    image = min((demo / "test" / "NORMAL").iterdir())
    a, b = run_folder / "ckpt.pt", tmp_path / "b.pt"
    p = [
        as_json(run_script("predict.py", *(x for c in ckpts for x in ("--ckpt", c)), "--json", image, cwd=demo))[0]
        for ckpts in ([a], [b], [a, b])
    ]
    assert p[0]["probability"] != p[1]["probability"]
    assert p[2]["probability"] == pytest.approx((p[0]["probability"] + p[1]["probability"]) / 2, abs=1e-9)
    assert p[2]["threshold"] == pytest.approx((p[0]["threshold"] + 0.9) / 2)
    other["positive"] = "NORMAL"
    models.save(other, tmp_path / "b.pt")
    done = run_script("predict.py", "--ckpt", a, "--ckpt", b, image, cwd=demo)
    assert done.returncode == 2 and "can't be averaged" in done.stderr and done.stdout == ""


def test_flags(loaded, tmp_path):
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
        ((result, _),) = predict.classify([predict.read(str(path), {loaded[0][0]["input_size"]})], loaded, CPU)
        assert name in result["flags"]
        assert (result["label"] == "PNEUMONIA") == (result["probability"] >= result["threshold"])


def test_the_flag_changes_nothing_else(loaded, demo):
    paths = sorted(map(str, (demo / "test" / "NORMAL").iterdir()))[:5]
    (ckpt, model) = loaded[0]
    batch, seen = [predict.read(path, {ckpt["input_size"]}) for path in paths], []
    for cut in (-1.0, 1e9):
        other = ckpt | {"input_check": ckpt["input_check"] | {"cut": cut}}
        results = [r for r, _ in predict.classify(batch, [(other, model)], CPU)]
        assert all(("unlike training images" in r["flags"]) == (cut < 0) for r in results)
        seen.append([(r["label"], r["probability"]) for r in results])
    assert seen[0] == seen[1]


def test_phantoms_are_seldom_flagged(run_folder, demo):
    """The input check fits 120 images here; most of the held-back ones must pass."""
    results = as_json(run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--json", demo / "test", cwd=demo))
    flagged = [r for r in results if r["flags"]]
    assert len(flagged) <= len(results) / 4
    assert "colour image" not in {f for r in results for f in r["flags"]}


def test_three_classes(demo, run_folder, tmp_path):
    """All probabilities are given, and the label is the largest; there is no threshold."""
    ckpt = models.load(run_folder / "ckpt.pt")
    model = models.build(ckpt["model"], 3, ckpt["input_size"])
    ckpt |= {"classes": ["A", "B", "C"], "positive": "C", "state_dict": model.state_dict()}
    ckpt["threshold"] = {"value": None, "rule": "largest probability", "from": ""}
    models.save(ckpt, tmp_path / "three.pt")
    image = min((demo / "test" / "NORMAL").iterdir())
    (result,) = as_json(run_script("predict.py", "--ckpt", tmp_path / "three.pt", "--json", image, cwd=demo))
    assert sum(result["probability"].values()) == pytest.approx(1)
    assert result["label"] == max(result["probability"], key=result["probability"].get)
    assert result["threshold"] is None


def test_cam_is_the_radiograph_with_a_caption(run_folder, demo, tmp_path, monkeypatch):
    def upper_left(model, x, target):
        heat = torch.zeros(len(x), *x.shape[-2:])
        heat[:, : x.shape[-2] // 2, : x.shape[-1] // 2] = 1
        return heat

    monkeypatch.setattr(models, "grad_cam", upper_left)
    image = min((demo / "test" / "PNEUMONIA").iterdir())
    done = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--cam", "maps", image, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "maps").iterdir()
    original, overlay = Image.open(image), Image.open(written)
    assert overlay.width >= original.width and overlay.height > original.height
    assert not np.asarray(overlay)[original.height :, -3:].any()  # no line of the caption is cut off
    drawn = np.asarray(overlay)[: original.height, : original.width].astype(float)
    # The map adds red and takes blue away, at most half of it: the radiograph still shows through.
    grey = np.asarray(original).astype(float)
    assert (drawn[..., 0] >= grey - 1).all() and (drawn[..., 2] <= grey + 1).all()
    assert (drawn[..., 2] >= grey / 2 - 1).all()
    h, w = grey.shape
    colour = np.ptp(drawn, axis=2)
    assert colour[: h // 2 - 9, : w // 2 - 9].min() > 40 and colour[h // 2 + 9 :, w // 2 + 9 :].max() == 0


def test_a_file_that_goes_before_its_map_is_drawn_is_one_bad_row(run_folder, demo, tmp_path, monkeypatch):
    def save_cam(result, *rest):
        if result["path"].endswith("2.jpeg"):
            raise data.ImageError("no such file")

    monkeypatch.setattr(predict, "save_cam", save_cam)
    for i in range(3):
        shutil.copy(min((demo / "test" / "NORMAL").iterdir()), tmp_path / f"{i}.jpeg")
    done = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--json", "--cam", "m", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert [r["error"] for r in as_json(done)] == ["", "", "no map: no such file"]
    assert [r["label"] is None for r in as_json(done)] == [False, False, True]


def test_each_map_gives_its_row_at_once(run_folder, demo, tmp_path, monkeypatch):
    """A heat map takes long: whoever interrupts waits for one, and what was done is printed."""

    def save_cam(result, *rest):
        if result["path"] == str(third):
            raise KeyboardInterrupt

    monkeypatch.setattr(predict, "save_cam", save_cam)
    first, second, third = sorted((demo / "test" / "NORMAL").iterdir())[:3]
    done = run_script(
        "predict.py", "--ckpt", run_folder / "ckpt.pt", "--json", "--cam", "m", third.parent, cwd=tmp_path
    )
    assert done.returncode == 130
    assert [r["path"] for r in as_json(done)] == [str(first), str(second)]


def test_the_map_of_a_long_name(run_folder, demo, tmp_path):
    """File systems count bytes, captions lines."""
    image = tmp_path / ("胸" * 60) / ("胸" * 80 + "\n.jpeg")
    image.parent.mkdir()
    shutil.copy(min((demo / "test" / "PNEUMONIA").iterdir()), image)
    done = run_script("predict.py", "--ckpt", run_folder / "ckpt.pt", "--cam", "maps", "--json", image, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "maps").iterdir()
    assert "胸" in written.name and "jpeg" in written.name and "\n" not in predict.printable(image.name)


def test_rows_and_bar_share_a_terminal(run_folder, demo):
    """Each row begins on a line of its own, though the bar is drawn on the same terminal."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    paths = sorted(map(str, (demo / "test").rglob("*.jpeg")))
    command = [sys.executable, str(ROOT / "predict.py"), "--ckpt", str(run_folder / "ckpt.pt"), *paths * 10]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=os.environ | {"TQDM_MININTERVAL": "0"})
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:  # the terminal is closed: the process has ended
            break
    assert process.wait(60) == 0 and b"img/s" in shown
    # What stands on a line in the end: what follows the last return to its beginning, over what stood there.
    rows = [line for line in shown.decode().splitlines() if demo.name in line and "0." in line]
    assert len(rows) == 10 * len(paths)
    assert all(row.lstrip(" \r").startswith(str(demo)) for row in rows)


@pytest.mark.parametrize("stderr", ["2>&-", "2> >(exec true)"])
def test_nobody_needs_to_read_the_warnings(run_folder, demo, tmp_path, stderr):
    image = min((demo / "test" / "NORMAL").iterdir())
    command = f"{sys.executable} {ROOT / 'predict.py'} --ckpt {run_folder / 'ckpt.pt'} --csv {image} {stderr}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0 and [line.split(",")[0] for line in done.stdout.splitlines()] == ["path", str(image)]


def test_closed_pipe_ends_quietly(run_folder, demo):
    command = f"{sys.executable} {ROOT / 'predict.py'} --ckpt {run_folder / 'ckpt.pt'} --json {demo} {demo} {demo}"
    command += " | head -n 1; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert len(done.stdout.splitlines()) == 1 and done.returncode == 0
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_stream_keeps_order_and_little_in_memory(count):
    """However many paths there are, no more than a few batches are ever taken ahead of what came out."""
    taken, out = [], []

    def paths():
        for i in range(count):
            taken.append(i)
            yield str(i)

    for batch in predict.stream(paths(), str, list, 3):
        out += batch
        assert 0 < len(batch) <= predict.BATCH and len(taken) <= len(out) + 6 * predict.BATCH
    assert out == [str(i) for i in range(count)]


def test_threads_are_shared_out_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for count, each in ((1, 4), (2, 2), (100, 1)):
            for _ in predict.stream(map(str, range(count)), str, list, 4):
                assert torch.get_num_threads() == each
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_folders_are_walked_however_they_are_named(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "c/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("c\na/1.png\n"))
    found = list(predict.find_inputs(["a", "[b]*", "-"]))
    assert found == ["a/1.png", "a/deep/2.png", "b/3.png", "c/4.png", "a/1.png"]


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


def test_names_that_the_output_can_not_encode(run_folder, demo, tmp_path):
    shutil.copy(min((demo / "test" / "NORMAL").iterdir()), tmp_path / "胸.jpeg")
    arguments = ("predict.py", "--ckpt", run_folder / "ckpt.pt", "--csv", "胸.jpeg")
    for encoding, name in (("ascii", "\\u80f8.jpeg"), ("utf-8", "胸.jpeg")):
        done = run_process(*arguments, cwd=tmp_path, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
        assert done.returncode == 0 and done.stdout.splitlines()[1].split(",")[0] == name


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
    with pytest.raises(data.DataError, match="locked can't be read"):
        list(data.walk(tmp_path / "d"))


def test_an_error_in_a_worker_is_not_swallowed():
    def fail(_):
        raise ZeroDivisionError

    for read, work in ((fail, list), (str, fail)):
        with pytest.raises(ZeroDivisionError):
            list(predict.stream(map(str, range(100)), read, work, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png"], "train a model first"),
        (["--ckpt", "none.pt", "x.png"], "does not exist"),
        (["--device", "cuda:99", "x.png"], "--device cuda:99"),
        ([], "PATH"),
        (["--json", "--csv", "x.png"], "not allowed"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run_script("predict.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


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
    image = data.find_root(str(demo)) / data.scan(demo, "test")[0]["path"]
    (result,) = as_json(run_script("predict.py", "--json", image, cwd=tmp_path))
    assert result["threshold"] == 0.123
