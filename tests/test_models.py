"""Models: families of architectures, weights from files and a hub, checkpoints, decisions, heat maps, input check."""

import functools
import http.server
import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import data
import models

SMALL, VIT, SWIN = "mobilenetv3_small_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
NAMES = (SMALL, "resnet18", "convnext_atto", VIT, SWIN)
DISTILLED = "deit_tiny_distilled_patch16_224"
CLASSES = ["NORMAL", "PNEUMONIA"]
CPU = torch.device("cpu")


def to_checkpoint(name: str, model: nn.Module) -> dict:
    """What models.py reads of a checkpoint."""
    return {
        "model": name,
        "model_arguments": {},
        "state_dict": model.state_dict(),
        "classes": CLASSES,
        "input_size": 64,
        "slope": 1.5,
        "trained_on": {"patients": ["IM-1"], "hashes": torch.tensor([[1, 2, 3, 4]])},
    }


def write_weights(path: Path, state: dict) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def load_weights(path: Path, classes=CLASSES, name: str = SMALL) -> tuple:
    return models.build_pretrained(name, classes, 64, str(path), None)


def one_line_error(work, *arguments) -> str:
    """The message of the UserError that work(*arguments) raises."""
    with pytest.raises(data.UserError) as caught:
        work(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def heat_map(model: nn.Module, x: torch.Tensor, target: int) -> torch.Tensor:
    """Heat maps of images as the model sees them, [n, 1, side, side]."""
    checkpoint = {"classes": [0, 1], "mean": 0.0, "std": 1.0}
    maps = [models.heat_map(model, 255 * image[0].numpy(), target, checkpoint) for image in x]
    return torch.from_numpy(np.stack(maps))


@pytest.fixture
def small():
    torch.manual_seed(1)
    return models.build(SMALL, 2, 64).eval()


# --- five architectures ---


@pytest.fixture(scope="module", params=NAMES)
def trained(request):
    """Name, and the model after two training steps."""
    torch.manual_seed(0)
    model = models.build(request.param, 2, 64).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.tensor([0, 1, 0, 1])
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(torch.randn(4, 1, 64, 64))
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return request.param, model.eval()


def test_a_saved_model_gives_the_same_logits_and_timm_loads_it(trained, tmp_path):
    name, model = trained
    path = tmp_path / "ckpt.pt"
    models.save(to_checkpoint(name, model), path)
    loaded = models.from_checkpoint(models.load(path), CPU)
    options = {"img_size": 64} if name in (VIT, SWIN) else {}
    by_timm = timm.create_model(name, checkpoint_path=str(path), in_chans=1, num_classes=2, **options)
    x = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(x)
        assert expected.std() > 0
        for other in (loaded, by_timm.eval()):
            torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)


def test_each_architecture_has_a_localised_heat_map(trained):
    _, model = trained
    x = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    # In a network that learnt nothing, everything may speak for the same class: look at both.
    maps = torch.stack([heat_map(model, x, target) for target in (0, 1)])
    assert maps.shape == (2, 8, 64, 64) and maps.min() >= 0 and maps.max() <= 1
    has_peak = maps.amax((0, 2, 3)) > 0.7
    assert has_peak.sum() > 4
    spread = maps.flatten(2).std(2).amax(0)
    assert (spread > 0.01).sum() > 4  # localised, not uniform


# --- heat maps ---


def draw_discs(n: int):
    """Noise with a disc of 7 % of the image at a random place in every second one; the labels; the discs."""
    grid = torch.arange(64)
    row, column = torch.randint(12, 52, (2, n, 1, 1))
    disc = (grid[:, None] - row) ** 2 + (grid - column) ** 2 < 100
    labels = torch.arange(n) % 2
    disc &= labels[:, None, None] == 1
    return 0.3 * torch.randn(n, 1, 64, 64) + disc[:, None], labels, disc


def test_the_map_of_a_trained_model_lies_on_the_planted_opacity():
    torch.manual_seed(0)
    model = models.build(SMALL, 2, 64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(40):
        x, labels, _ = draw_discs(16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    x, _, disc = draw_discs(40)
    peaks = heat_map(model.eval(), x[1::2], 1).flatten(1).argmax(1)
    is_hit = disc[1::2].flatten(1)[range(20), peaks]
    assert is_hit.float().mean() > 0.6


class Toy(nn.Module):
    """A stage whose features are the image in cells of 8 pixels, in one of several layouts; logit 1 sums them up."""

    def __init__(self, layout):
        super().__init__()
        self.stage = nn.Identity()
        self.feature_info = [{"module": "stage", "reduction": 8}]
        self.layout = layout
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        features = self.layout(self.gain * nn.functional.avg_pool2d(x, 8).repeat(1, 3, 1, 1))
        out = self.stage(features)
        score = sum(part.flatten(1).sum(1) for part in (out if isinstance(out, tuple) else (out,)))
        return torch.stack([-score, score], 1)


def tokens(f, others: int):
    """Cells as tokens, after tokens that belong to no cell."""
    return torch.cat([100 * f.mean((2, 3))[:, None].expand(-1, others, -1), f.flatten(2).transpose(1, 2)], 1)


LAYOUTS = {
    "NCHW": lambda f: f,
    "NHWC": lambda f: f.permute(0, 2, 3, 1),
    "class token": lambda f: tokens(f, 1),
    "beside another": lambda f: (tokens(f, 9), f),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_line_in_the_image_is_a_line_in_the_map(layout):
    """From the upper left down to the middle: a transposed, mirrored or sheared map would show."""
    x = torch.zeros(2, 1, 80, 80)
    cells = [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    for row, column in cells:
        x[:, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 1
    heat = heat_map(Toy(layout), x, 1)[1, 4::8, 4::8]
    assert [tuple(cell) for cell in (heat > 0.6).nonzero().tolist()] == cells
    assert heat_map(Toy(layout), x, 0).max() == 0


def test_unusual_models_get_a_map_or_an_error():
    x = torch.randn(1, 1, 224, 224)
    # A class token joins late; a stage gives several maps, and timm names one that is not there.
    for name in ("xcit_nano_12_p16_224", "hrnet_w18_small"):
        assert heat_map(models.build(name, 2, 224).eval(), x, 1).shape == (1, 224, 224)
    hiera = models.build("hiera_tiny_224", 2, 224).eval()  # its tokens are in another order
    for model in (hiera, nn.Conv2d(1, 2, 1)):
        assert "no feature map" in one_line_error(heat_map, model, x, 1)


# --- build ---


def test_models_that_fail_with_channels_last_are_contiguous():
    fit = {SMALL: ["cpu", "cuda"], "repvgg_a0": ["cuda"], "lambda_resnet26t": []}
    for name, devices in fit.items():
        model = models.build(name, 2, 64)
        for device in ("cpu", "cuda", "mps"):
            is_fit = models.memory_format(model, torch.device(device)) == torch.channels_last
            assert is_fit == (device in devices), (name, device)


def test_input_size_is_as_requested_else_the_models_own():
    names = (SMALL, VIT, "mobilenetv3_large_100_miil")  # the last one is an old name of timm
    assert [models.settings(name, None)["input_size"] for name in names] == [160, 224, 160]
    assert models.settings(VIT, 64)["input_size"] == 64


def test_a_model_that_does_not_fit_is_refused(small):
    assert "timm's resnet18" in one_line_error(models.from_checkpoint, to_checkpoint("resnet18", small), CPU)
    assert "no classifier that can be replaced" in one_line_error(models.require_size, nn.Conv2d(1, 2, 1), 2, 64)


def test_a_model_is_taken_from_a_folder_with_its_own_arguments(tmp_path):
    config = {"architecture": SMALL, "num_classes": 3, "model_args": {"drop_rate": 0.4}}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.25] * 3, "first_conv": "conv_stem"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    expected = {"input_size": 160, "mean": 0.5, "std": 0.25, "model": SMALL, "model_arguments": {"drop_rate": 0.4}}
    assert models.settings(name, None) == expected
    model = models.build(name, 2, 64)
    assert model.drop_rate == 0.4 and model.classifier.out_features == 2
    # Those of a checkpoint may name another size than the run's.
    checkpoint = to_checkpoint(VIT, models.build(VIT, 2, 64)) | {"model_arguments": {"img_size": 224}}
    assert models.from_checkpoint(checkpoint, CPU)(torch.zeros(1, 1, 64, 64)).shape == (1, 2)


# --- weights from a file ---


@pytest.mark.parametrize(("name", "file"), [(SMALL, "w.safetensors"), (VIT, "w.pt"), (DISTILLED, "w.pt")])
def test_weights_for_colour_images_are_adapted(tmp_path, name, file):
    state = timm.create_model(name, num_classes=5).state_dict()
    path = write_weights(tmp_path / file, state)
    model, origin, _ = load_weights(path, name=name)
    found = model.state_dict()
    stem = f"{timm.get_pretrained_cfg(name).first_conv}.weight"
    assert torch.equal(found[stem], state[stem].sum(1, keepdim=True))
    for key in state.keys() - {stem, "pos_embed"}:
        if key.startswith(("head", "classifier")):
            assert len(found[key]) == 2
        else:
            assert torch.equal(found[key], state[key]), key
    assert origin["sha256"] == data.sha256(path)
    assert origin["note"].endswith(f"tensors of {path}; new head")


@pytest.mark.parametrize(
    ("wrap", "not_used"),
    [
        (lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}, 0),
        (lambda s: {"model": {"state_dict": s}, "best": np.float64(0.9), "n": np.uint16(3), "path": Path("a/b")}, 0),
        (lambda s: {"state_dict": s | {"criterion.weight": torch.ones(2), "total_ops": torch.ones(1)}}, 2),
        (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s}, 244),
    ],
)
def test_weights_may_be_wrapped_as_other_programs_do(tmp_path, small, wrap, not_used):
    """Averaged weights are preferred; what is beside them is passed over and counted."""
    torch.save(wrap(small.state_dict()), tmp_path / "w.pt")
    model, origin, _ = load_weights(tmp_path / "w.pt")
    assert torch.equal(model.conv_head.weight, small.conv_head.weight)
    assert (f"not used: {not_used} other" in origin["note"]) == bool(not_used)


def test_a_head_is_taken_from_a_run_of_the_same_classes(tmp_path, small):
    before = small.state_dict()
    models.save(to_checkpoint(SMALL, small), tmp_path / "ckpt.pt")
    model, origin, trained_on = load_weights(tmp_path, CLASSES)
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []
    assert "head kept, for NORMAL, PNEUMONIA" in origin["note"]
    assert trained_on["patients"] == ["IM-1"]
    model, origin, _ = load_weights(tmp_path, CLASSES[::-1])
    assert not torch.equal(model.classifier.weight, small.classifier.weight)
    assert "new head" in origin["note"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("blocks.0.0.conv_dw.weight"), "does not fit"),
        (lambda s: s.update({"blocks.9.weight": torch.zeros(3)}), "does not fit"),
        (lambda s: s["conv_head.weight"].fill_(math.nan), "NaN or infinite weights: conv_head.weight"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(tmp_path, small, change, expected):
    state = small.state_dict()
    change(state)
    path = write_weights(tmp_path / "w.pt", state)
    message = one_line_error(load_weights, path)
    assert expected in message and str(path) in message


@pytest.mark.parametrize(("read", "named"), [(load_weights, "mkdir"), (models.load, "damaged")])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, read, named):
    mark = tmp_path / "ran"
    malicious = type("Malicious", (), {"__reduce__": lambda self: (os.mkdir, (str(mark),))})()
    content = {"format": models.FORMAT, "format_version": models.FORMAT_VERSION, "state_dict": malicious}
    torch.save(content, tmp_path / "w.pt")
    message = one_line_error(read, tmp_path / "w.pt")
    assert "w.pt" in message and named in message and not mark.exists()
    # Objects in numpy's dtypes: their bytes would be read as addresses.
    reduced = (np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0))
    torch.save({"n": type("ObjectDtype", (), {"__reduce__": lambda self: reduced})()}, tmp_path / "w.pt")
    assert "w.pt" in one_line_error(read, tmp_path / "w.pt")


# --- weights from the hub ---


@pytest.fixture
def close_hub(monkeypatch, tmp_path):
    """Start a hub that serves tmp_path, with an empty cache; the fixture is the function that closes it."""
    from huggingface_hub import constants

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", 4 * "0123456789")
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def close():
        server.shutdown()
        server.server_close()

    yield close
    close()


def test_weights_come_from_the_hub_then_from_its_cache(close_hub, tmp_path):
    folder = tmp_path / "timm" / "mobilenetv3_small_050.lamb_in1k" / "resolve" / "main"
    folder.mkdir(parents=True)
    state = timm.create_model(SMALL).state_dict()
    write_weights(folder / "model.safetensors", state)
    for _ in range(2):
        model, origin, _ = models.build_pretrained(SMALL, CLASSES, 64, None, True)
        assert "timm/mobilenetv3_small_050.lamb_in1k" in origin["note"]
        assert torch.equal(model.conv_stem.weight, state["conv_stem.weight"].sum(1, keepdim=True))
        assert torch.equal(model.conv_head.weight, state["conv_head.weight"])
        close_hub()


def test_without_a_hub_training_goes_on_from_random_weights(close_hub, capsys):
    close_hub()
    _, origin, _ = models.build_pretrained(SMALL, CLASSES, 64, None, None)
    assert origin == {"note": "random weights", "sha256": ""}
    assert f"RANDOM WEIGHTS: no pretrained weights for {SMALL}" in capsys.readouterr().err


# --- save and load ---


@pytest.mark.parametrize(
    ("kind", "version", "expected"),
    [
        ("training state", 6, "is not a chest radiograph classifier of this suite"),
        (models.FORMAT, 5, f"has format version 5; this code reads {models.FORMAT_VERSION}: train again"),
        (models.FORMAT, models.FORMAT_VERSION, "was altered or damaged after it was written"),  # it has no seal
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_an_error(tmp_path, kind, version, expected):
    torch.save({"format": kind, "format_version": version}, tmp_path / "ckpt.pt")
    assert expected in one_line_error(models.load, tmp_path)


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path):
    path = tmp_path / "file.pt"
    models.save({"a": [1, "text", None]}, path, "x")
    original = path.read_bytes()
    assert models.load(path, "x")["a"] == [1, "text", None]
    for i in range(0, len(original), 3):
        path.write_bytes(original[:i] + bytes([original[i] ^ 0x41]) + original[i + 1 :])
        one_line_error(models.load, path, "x")


def test_an_altered_field_is_refused(tmp_path, small):
    """A file that PyTorch reads without complaint, with the seal of other content."""
    path = tmp_path / "ckpt.pt"
    files = []
    for slope in (1.5, 2.5):
        models.save({**to_checkpoint(SMALL, small), "slope": slope}, path)
        assert models.load(path)["slope"] == slope
        files.append(path.read_bytes())
    path.write_bytes(files[1][:-64] + files[0][-64:])
    assert torch.load(path, weights_only=True)["slope"] == 2.5
    assert "was altered or damaged" in one_line_error(models.load, path)


def test_the_newest_run_is_found_and_finished_ones_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, time in (("a", 3e8), ("b", 1e8), ("c", 2e8)):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "ckpt.pt").touch()
        os.utime(Path("runs", name, "ckpt.pt"), (time, time))
    assert models.newest_checkpoint() == Path("runs/a/ckpt.pt")
    for name in ("b", "c"):
        Path("runs", name, "metrics.json").write_text('{"finished": true}')
    assert models.newest_checkpoint() == Path("runs/c/ckpt.pt")


# --- inference ---


def test_logits_are_of_the_normalised_image_for_any_batch_size(small):
    images = torch.randint(0, 256, (10, 64, 64), dtype=torch.uint8)
    found = [models.infer(small, images[:size], {"mean": 0.4, "std": 0.2}) for size in (4, 10)]
    with torch.inference_mode():
        expected = small((images[:, None] / 255 - 0.4) / 0.2)
    for logits in found:
        torch.testing.assert_close(logits, expected[: len(logits)].double(), rtol=1e-4, atol=1e-6)


def decide(logits, slope=1.0, intercept=0.0, threshold=0.0) -> models.Decision:
    point = {"slope": slope, "intercept": intercept, "threshold": {"logit": threshold}}
    return models.decide(torch.tensor(logits, dtype=torch.float64), point)


def test_two_classes_are_calibrated_on_their_difference_and_decided_by_the_threshold():
    logits = [[1.0, 3.0], [2.0, 2.0], [5.0, 1.0]]
    found = decide(logits, slope=0.5, intercept=0.25, threshold=0.25)
    assert found.calibrated_logits[:, 1].tolist() == pytest.approx([1.25, 0.25, -1.75])
    assert found.calibrated_logits[:, 0].tolist() == pytest.approx([-1.25, -0.25, 1.75])
    expected = [1 / (1 + math.exp(-z)) for z in (1.25, 0.25, -1.75)]
    assert found.probabilities[:, 1].tolist() == pytest.approx(expected)
    assert found.predicted.tolist() == [1, 1, 0]  # positive from the threshold on
    assert decide(logits, slope=0.5, intercept=0.25, threshold=0.26).predicted.tolist() == [1, 0, 0]


def test_where_probabilities_saturate_logits_still_decide():
    found = decide([[0.0, 100.0], [0.0, 100.5], [0.0, 101.0]], slope=2.0, threshold=201.0)
    assert found.probabilities[:, 1].tolist() == [1, 1, 1]
    assert found.predicted.tolist() == [0, 1, 1]


# --- input check ---


@pytest.fixture(scope="module")
def phantoms(demo):
    """uint8 images of the demo set at 64 px: of training and validation, of test."""
    records = data.find_training(demo) + data.scan(demo, "test")
    images = torch.stack([torch.from_numpy(data.read_image(demo / r.path, 64)[0]) for r in records])
    n_test = sum(r.split == "test" for r in records)
    return images[:-n_test], images[-n_test:]


def flagged(check: dict, images: torch.Tensor) -> float:
    return float((models.unlikeness(check, images) > 1).float().mean())


UNLIKE = {
    "noise": lambda images: torch.randint_like(images, 256),
    "inverted": lambda images: 255 - images,
    "upside down": lambda images: images.flip(1),
}


@pytest.mark.parametrize("change", UNLIKE.values(), ids=UNLIKE)
def test_what_is_not_an_upright_radiograph_is_flagged(phantoms, change):
    torch.manual_seed(7)
    images, test = phantoms
    check = models.fit_input_check(images, torch.arange(20, len(images)), torch.arange(20))
    assert flagged(check, change(test)) >= 0.9
    assert flagged(check, test) <= 0.25


def test_the_cut_flags_one_in_a_hundred_of_the_validation_images():
    g = torch.Generator().manual_seed(8)
    images = nn.functional.interpolate(torch.rand(1200, 1, 6, 6, generator=g) * 255, (32, 32), mode="bicubic")
    images = images[:, 0].clamp(0, 255).to(torch.uint8)
    check = models.fit_input_check(images, torch.arange(700), torch.arange(700, 1200))
    assert flagged(check, images[700:]) == pytest.approx(0.01, abs=0.002)


def test_the_border_logit_depends_on_the_border_alone():
    images = torch.randint(0, 256, (120, 64, 64), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    is_positive = np.arange(120) % 2 == 0
    images[is_positive, :4] //= 2
    images[~is_positive, 20:40] //= 2  # says as much, but is not in the border
    index = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    border = models.fit_border(images, index, is_positive[index])
    found = models.border_logit(border, images)
    assert ((found[60:] > 0) == is_positive[60:]).all()
    images[:, 8:-8, 8:-8] = 0
    assert np.array_equal(models.border_logit(border, images), found)
