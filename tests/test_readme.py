"""README.md: its Python is run, and its commands are ones that the scripts take."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request

import pytest
from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()
SERVICE, EXPORT, LOAD = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"python ((?:train|evaluate|predict|data)\.py[^\n;#`|}]*)", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_one_that_its_script_takes(command):
    script, *words = shlex.split(re.sub(r"\$\w+", "0", command))
    parser = importlib.import_module(script.removesuffix(".py")).make_parser()
    try:
        parser.parse_args(words)
    except SystemExit:
        assert script != "train.py" and not words, command  # a mention of the script alone


@pytest.fixture
def workplace(run_folder, demo, tmp_path, monkeypatch):
    """A folder as the examples want it: a run and a radiograph."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(run_folder, tmp_path / "runs" / "seed0")
    shutil.copy(next((demo / "test" / "PNEUMONIA").iterdir()), tmp_path / "img.jpeg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def run_python(code, folder, path=None):
    """Run code in a process of its own, in folder, where this suite can be imported from path alone."""
    code = f"import sys; sys.path[:] = [p for p in sys.path if p] + {[str(path)] if path else []}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_exported_program_gives_predicts_probability_without_this_suite(workplace):
    run_python(EXPORT, workplace, path=ROOT)
    assert sum(bool(line) for line in EXPORT.splitlines()) <= 10
    printed = run_python(f"{LOAD}\nassert 'models' not in sys.modules", workplace)
    probabilities = eval(printed.splitlines()[-1])
    done = run_script("predict.py", "--json", "img.jpeg", cwd=workplace)
    assert probabilities["PNEUMONIA"] == pytest.approx(json.loads(done.stdout)["probability"], abs=1e-5)
    batch = LOAD.replace("[None])[0]", "[None].repeat(3, 1, 1))[2]")  # any number of images at once
    assert eval(run_python(batch, workplace).splitlines()[-1]) == pytest.approx(probabilities, abs=1e-5)
