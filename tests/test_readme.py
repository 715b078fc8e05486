"""README.md: its commands and its Python are run."""

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.request

import bench
import numpy as np
import pytest
import torch.distributed.run
from conftest import ROOT, run_script

import data
import evaluate
import train

README = (ROOT / "README.md").read_text()
TABLE, CALL, SERVICE, EXPORT, LOAD = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# --- commands ---

NOT_RUN = {  # what a command begins with, and why
    "pip": ".ci/run installs as the first page says, and the optional extras",
    "curl": "test_the_service_answers_as_predict_does asks in its place",
    "0..2 |": "PowerShell: its arguments are parsed",
    "python -m pytest": "this is a part of it",
    "python tests/bench.py": "takes minutes, by hand: its arguments are parsed",
    "python tests/coverage_simulation.py": "takes minutes, by hand",
    "torchrun --nnodes": "two machines: its arguments are parsed",
}
CHEAP = {  # appended: of an option that stands twice the last one counts
    "train.py": shlex.split("--epochs 1 --img-size 32 --batch-size 32 --threshold youden --device cpu"),
    "evaluate.py": ["--bootstrap", "20"],
}
SHELL = """
say() { local IFS=$'\\t'; echo "$*"; }
python() { say python "$@"; }
torchrun() { say torchrun "$@"; }
pip() { say pip "$@"; }
curl() { say curl "$@"; }
"""


def find_commands(text):
    """The lines of indented and fenced blocks, and the words set as code, that start a program; Python apart."""
    text = re.sub(r"```(.*)\n([^`]*)```", lambda m: "" if m[1] == "python" else textwrap.indent(m[2], "    "), text)
    code = [" ".join("".join(m).split()) for m in re.findall(r"^ {4}(\S.*)$|`([^`]+)`", text, re.MULTILINE)]
    return [line for line in code if re.search(r"(^|[;&|{(] *|\bdo )(python|torchrun|pip|curl) ", line)]


SECTIONS = {s.partition("\n")[0]: find_commands(s) for s in re.split("^#+ ", README, flags=re.MULTILINE)}
COMMANDS = [line for lines in SECTIONS.values() for line in lines]


def expand(line, folder):
    """The programs that bash would start, as lists of words: loops, globs, quotes and comments are its own."""
    command = ["bash", "-euc", SHELL + line]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [words.split("\t") for words in done.stdout.splitlines()]


def start(program, words, folder):
    """Run one command of README at little cost."""
    words = [*words, *CHEAP.get(words[0], [])]
    if program == "python":
        if not importlib.util.find_spec("matplotlib"):  # optional: without it, the rest of the command
            words = [w for w in words if w != "--plots"]
        return run_script(*words, cwd=folder)
    words = [w.replace("--nproc-per-node=4", "--nproc-per-node=2") for w in words] + CHEAP["train.py"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {**os.environ, "PET_MASTER_PORT": str(s.getsockname()[1])}  # as --master-port
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def material(demo, tmp_path_factory):
    """A data folder with the image that README names, the same as an archive, and a run."""
    folder = tmp_path_factory.mktemp("material")
    images = shutil.copytree(demo, folder / "chest_xray", ignore=shutil.ignore_patterns(".cache"))
    next(images.glob("test/PNEUMONIA/*virus*")).rename(images / "test" / "PNEUMONIA" / "person1_virus_6.jpeg")
    shutil.make_archive(folder / "archive", "zip", folder, "chest_xray")
    done = run_script("train.py", "--data", images, "--output", "run", *CHEAP["train.py"], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def clone(material, tmp_path, monkeypatch):
    """A folder as the commands want it, with what they call FILE, DIR (data and a run in one), other/ and so on."""
    archive = material / "archive.zip"
    address = {"url": archive.as_uri(), "checksum": data.sha256(archive)}
    monkeypatch.setattr(data, "download", functools.partial(data.download, **address))
    monkeypatch.setattr(evaluate, "save_figure", lambda path, figure: path.touch())  # seconds each, tested elsewhere
    shutil.copytree(material / "run", tmp_path / "DIR")
    (tmp_path / "data").mkdir()
    links = {"FILE": "run/ckpt.pt", "other": "run", "chest_xray": "chest_xray", "data/demo": "chest_xray"}
    links |= {"DIR/train": "chest_xray/train", "DIR/test": "chest_xray/test", "data/chest_xray": "chest_xray"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(material / target)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    rows = [f"{i}.jpeg,{'NORMAL' if i % 2 else 'PNEUMONIA'},{i / 40}\n" for i in range(1, 40)]
    (tmp_path / "predictions.csv").write_text("path,label,probability\n" + "".join(rows))
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="README's commands are bash's but where it says PowerShell")
@pytest.mark.parametrize("section", [name for name, lines in SECTIONS.items() if lines])
def test_the_commands_of_a_section_work_one_after_another(section, clone):
    if any("data.py download" in line for line in SECTIONS[section]):
        (clone / "data" / "chest_xray").unlink()
    for line in SECTIONS[section]:
        for program, *words in expand(line, clone) if "$_" not in line else []:  # in PowerShell, what bash calls $s
            if not f"{program} {shlex.join(words)}".startswith(tuple(NOT_RUN)):
                done = start(program, words, clone)
                assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_the_commands_that_are_not_run_are_taken():
    (powershell,) = [line for line in COMMANDS if line.startswith("0..2 |")]
    train.make_parser().parse_args(powershell.replace("$_", "0").partition("train.py ")[2].rstrip("} ").split())
    (machines,) = [line for line in COMMANDS if line.startswith("torchrun --nnodes")]
    launched = torch.distributed.run.parse_args(machines.split()[1:])
    assert launched.training_script == "train.py" and launched.nproc_per_node == "4"
    train.make_parser().parse_args(launched.training_script_args)
    for line in COMMANDS:
        if line.startswith("python tests/bench.py"):
            bench.make_parser().parse_args(line.split()[2:])
    assert all(any(begin in line for line in COMMANDS) for begin in NOT_RUN)


# --- Python ---


@pytest.fixture
def workplace(run_folder, demo, tmp_path, monkeypatch):
    """A folder as the examples want it: a run and a radiograph."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(run_folder, tmp_path / "runs" / "seed0")
    shutil.copy(next((demo / "test" / "PNEUMONIA").iterdir()), tmp_path / "img.jpeg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_of_a_public_set_becomes_metadata(workplace):
    (workplace / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender\n"
        "a.png,Cardiomegaly|Pneumonia,0,1,58,M\nb.png,No Finding,1,5,60,F\n"
    )
    run_python(TABLE, workplace)
    rows = data.read_metadata(workplace)
    assert rows["a.png"] == {"patient": "1", "label": "PNEUMONIA", "split": "train", "Patient Gender": "M"}
    assert rows["b.png"] == {"patient": "5", "label": "NORMAL", "split": "test", "Patient Gender": "F"}


def test_predict_takes_what_the_example_hands_it(workplace):
    shutil.copy("img.jpeg", "a.jpeg")
    shutil.copy("img.jpeg", "b.dcm")  # what a file is stands in it, not in its name
    names = {"array": np.zeros((80, 80), np.uint8)}
    exec(compile(CALL, "README.md", "exec"), names)  # noqa: S102, it is our own
    assert [row["error"] for row in names["rows"]] == 3 * [""]
    assert names["rows"][0]["probability"] == pytest.approx(names["rows"][1]["probability"], abs=1e-6)


def test_the_service_answers_as_predict_does(workplace):
    code = (
        SERVICE.replace("8000", "0").replace("HTTPServer((", "server = HTTPServer((").replace(").serve_forever()", ")")
    )
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102, it is our own
    with names["server"] as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        body = (workplace / "img.jpeg").read_bytes()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", body, timeout=60) as response:
            answer = json.loads(response.read())
        server.shutdown()
    done = run_script("predict.py", "--json", "img.jpeg", cwd=workplace)
    expected = json.loads(done.stdout)
    assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-6)
    assert answer["label"] == expected["label"] and answer["checksum"] == expected["checksum"]


def run_python(code, folder):
    """Run code in a process of its own, in folder, where this suite can't be imported."""
    code = f"import sys; sys.path[:] = [p for p in sys.path if p]\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_exported_program_gives_predicts_probability_without_this_suite(workplace):
    exec(compile(EXPORT, "README.md", "exec"), {})  # noqa: S102, it is our own
    assert sum(bool(line) for line in EXPORT.splitlines()) <= 10
    batch = LOAD.replace("[None])[0]", "[None].repeat(3, 1, 1))[2]")  # any number of images at once
    printed = run_python(f"{LOAD}\n{batch}\nassert 'models' not in sys.modules", workplace)
    probabilities, of_three = map(eval, printed.splitlines()[-2:])
    done = run_script("predict.py", "--json", "img.jpeg", cwd=workplace)
    assert probabilities["PNEUMONIA"] == pytest.approx(json.loads(done.stdout)["probability"], abs=1e-5)
    assert of_three == pytest.approx(probabilities, abs=1e-5)
