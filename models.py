"""Build timm models, give them weights, save and load them, run them, compute heat maps, and detect unusual images.

Every model has one grey input channel and one logit per class; the positive class is the last.

Sections: build; weights; save and load; inference; heat maps; input check.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import json
import sys
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePath

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

import data
from data import UserError, warn

FORMAT = "chest radiograph classifier"
FORMAT_VERSION = 10


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu, cuda, cuda:1, mps ...: auto takes an accelerator if there is one, else the CPU."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).partition("\n")[0]  # which may be empty
        raise UserError(f"--device {name} can't be used here ({reason}); try --device auto") from None
    torch.backends.cudnn.allow_tf32 = False  # otherwise a probability depends on the batch
    return device


# --- build ---


@functools.cache  # a look-up on the hub takes a request
def resolve(name: str) -> tuple[str, timm.models.PretrainedCfg, dict]:
    """timm's name of the architecture, its configuration (input, where the weights are), and arguments to build it.

    name: a timm model, with or without a tag; or one on the hub or in a folder: hf-hub:OWNER/NAME, timm/NAME,
    local-dir:FOLDER.

    Raises:
        UserError: unknown model; suggests similar names.
    """
    source, _, place = name.rpartition(":")
    if source or "/" in name:
        look_up = timm.models._hub.load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
        try:
            config, architecture, arguments = look_up(place)
        except Exception as e:  # noqa: BLE001, the hub, the network and foreign files fail in many ways
            raise UserError(f"model {name} can't be looked up: {data.one_line(e)}") from None
        return architecture, timm.models.PretrainedCfg(**config), arguments or {}
    if timm.is_model(name):
        with contextlib.suppress(RuntimeError):  # no such tag
            config = timm.get_pretrained_cfg(name)
            if config or "." not in name:
                return name, config or timm.models.PretrainedCfg(), {}  # old names have no configuration
    nearest = timm.list_models(f"{name}*") or difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
    raise UserError(f"timm has no model {name!r}; nearest: {', '.join(nearest[:4]) or 'none'}")


def settings(name: str, size: int | None) -> dict:
    """What a checkpoint says about a model besides its weights: model and model_arguments (see resolve), input_size in
    pixels, and mean and std of grey levels in [0, 1] as timm's weights expect them.

    size: None for the model's own if that is fixed, else 160.
    """
    architecture, config, arguments = resolve(name)
    if size is None:
        size = config.input_size[-1] if config.fixed_input_size else data.DEFAULT_SIZE
    return {
        "model": architecture,
        "model_arguments": arguments,
        "input_size": size,
        "mean": float(np.mean(config.mean)),
        "std": float(np.mean(config.std)),
    }


def build(name: str, n_classes: int, size: int, pretrained: bool = False, **kwargs) -> nn.Module:
    """A timm model with one input channel and n_classes logits; kwargs go to timm.create_model.

    Raises:
        UserError: unknown name, or a model that can't have this input or a new classifier.
    """
    architecture, config, arguments = resolve(name)
    options = {**arguments, **kwargs, "in_chans": 1, "num_classes": n_classes}
    if config.fixed_input_size:
        options["img_size"] = size
    try:
        model = timm.create_model(architecture, pretrained, config, **options)
        if not pretrained:
            # timm scales some heads by the number of classes: with two, logits would start 20 times too large.
            model.reset_classifier(n_classes)
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as e:
        if pretrained:
            raise
        needs = f"one input channel, {n_classes} classes and {size} x {size} pixels"
        raise UserError(f"{name} can't be built for {needs}: {data.one_line(e)}") from None
    return model


def require_size(model: nn.Module, n_classes: int, size: int) -> None:
    """Raise UserError unless the model makes logits from size x size pixels; leaves it in evaluation mode.

    model: on the CPU.
    """
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, 1, size, size))
    except (RuntimeError, AssertionError, ValueError) as e:
        reason = data.one_line(e)
        raise UserError(f"the model does not take {size} x {size} pixels ({reason}); try another size") from None
    if not isinstance(logits, Tensor) or logits.shape != (2, n_classes):
        raise UserError("the model has no classifier that can be replaced: it does not give one logit per class")


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, which is faster, except where it crashes, is wrong or is not supported."""
    is_bad = device.type == "mps"  # batch norm's backward pass is wrong there (PyTorch issue 175189)
    is_bad |= any(parameter.ndim == 5 for parameter in model.parameters())
    for layer in model.modules():
        # In the backward pass of these layers oneDNN writes out of bounds (its issue 6035).
        if device.type == "cpu" and isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            is_bad |= layer.stride == (2, 2) and layer.in_channels < 16
    return torch.contiguous_format if is_bad else torch.channels_last


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- weights ---

COUNTERS = ("total_ops", "total_params", "n_averaged", "num_batches_tracked")  # buffers that not every program saves
SAFE = [  # types that may be saved beside the weights and run no code
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePath, f"pathlib{place}.{kind}") for place in ("", "._local") for kind in ("PosixPath", "WindowsPath")),
]


def build_pretrained(
    name: str, classes: list[str], size: int, weights: str | None, pretrained: bool | None
) -> tuple[nn.Module, dict, dict | None]:
    """A model with weights from a file, or else timm's own from the hub or its cache.

    Args:
        weights: path of a .safetensors file, of a state dict saved by torch, or of a run of this suite; None for timm's
            pretrained ones.
        pretrained: True requires timm's, False keeps random weights, None uses timm's if available.

    Returns:
        the model; the weights' origin: note (one line: what was used and what was not) and sha256 (of a file, else
        empty); and, for weights of a run of this suite, what that run was trained on, else None.
    """
    if weights is not None:
        return from_file(name, classes, size, in_run_folder(weights))
    if pretrained is not False:
        try:
            return from_hub(name, len(classes), size)
        except UserError as e:
            if pretrained:
                raise UserError(f"{e}; use --weights FILE or --no-pretrained") from None
            warn(f"RANDOM WEIGHTS: {e}. Training starts from scratch; --weights FILE takes a local file")
    return build(name, len(classes), size), {"note": "random weights", "sha256": ""}, None


def from_hub(name: str, n_classes: int, size: int) -> tuple[nn.Module, dict, None]:
    """timm's pretrained model with a new head; returns what build_pretrained does.

    Raises:
        UserError: there are none, or they can't be fetched.
    """
    _, config, _ = resolve(name)
    if not config.has_weights:
        raise UserError(f"timm has no pretrained weights for {name}")
    try:
        with ThreadPool(1) as pool:  # a thread, since looking up the server's name may block for longer
            pool.apply_async(get_session().head, (constants.ENDPOINT,), {"timeout": 4}).get(6)
    except Exception:  # noqa: BLE001, the error depends on the HTTP library
        # To the end of the process. Offline, the hub's library uses its cache at once; else it retries for minutes.
        constants.HF_HUB_OFFLINE = True
    try:
        model = build(name, config.num_classes, size, pretrained=True)  # timm checks all weights only with its own head
    except Exception as e:  # noqa: BLE001, the hub, the network and the cache fail in many ways
        reason = data.one_line(e).partition(". ")[0].rstrip(".") or type(e).__name__
        raise UserError(f"no pretrained weights for {name}: {reason}") from None
    model.reset_classifier(n_classes)
    note = f"timm's pretrained weights ({config.hf_hub_id or config.url}); stem summed to 1 channel; new head"
    return model, {"note": note, "sha256": ""}, None


def from_file(name: str, classes: list[str], size: int, path: Path) -> tuple[nn.Module, dict, dict | None]:
    """A model with the weights in a file: every tensor must fit; only a run with these classes keeps its head.

    Returns what build_pretrained does.

    Raises:
        UserError: missing, damaged, weights of another architecture, or not finite.
    """
    content = read_weights(path)
    checkpoint = load(path) if "format" in content else {"state_dict": content}
    _, config, _ = resolve(name)
    state, others = find_state(checkpoint["state_dict"], build(name, len(classes), size), config.classifier)
    if not state:
        raise UserError(f"{path} is not a state dict of tensors")
    stem, head = (x[0] if isinstance(x, tuple) else x for x in (config.first_conv, config.classifier))
    n_rows = len(state.get(f"{head}.weight", ()))
    channels = state[f"{stem}.weight"].shape[1] if f"{stem}.weight" in state else 3
    overlay = {"state_dict": state, "num_classes": n_rows, "input_size": (channels, size, size)}
    try:
        # Strict: one tensor too many, too few or of another shape means another architecture.
        model = build(name, n_rows, size, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as e:  # noqa: BLE001, timm's filters fail on foreign tensors in many ways
        raise UserError(f"{path} does not fit {name}: {data.one_line(e)}") from None
    for key, value in model.named_parameters():
        if not value.isfinite().all():
            raise UserError(f"{path} has NaN or infinite weights: {key}")
    note = f"{data.count(len(state), 'tensor')} of {path}"
    if others:
        note += f"; not used: {data.count(len(others), 'other')} ({others[0]})"
    if checkpoint.get("classes") == classes:
        note += f"; head kept, for {', '.join(classes)}"
    else:
        model.reset_classifier(len(classes))
        note += "; new head"
    return model, {"note": note, "sha256": data.sha256(path)}, checkpoint.get("trained_on")


def in_run_folder(path: str | Path) -> Path:
    """The checkpoint in a run's folder; any other path as it is."""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() else path


def read_weights(path: Path) -> dict:
    """The dict in a .safetensors file, or in a file saved by torch."""
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    reason = ""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(SAFE):
            reason = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # noqa: BLE001, unpicklers fail in many ways
        reason = reason and f"; it contains {reason}, which may run code"
        raise UserError(f"{path} is not a .safetensors or torch weights file{reason}") from None


def find_state(content: dict, model: nn.Module, heads: str | tuple) -> tuple[dict[str, Tensor], list[str]]:
    """The model's state dict in what a training program saved, and the names of the other tensors.

    A prefix under which all of the model's names are found is removed; of several, one of averaged weights is
    preferred. Without one, the tensors keep their names: timm's filters can convert those of other programs.
    """
    tensors = dict(flatten(content))
    known = model.state_dict().keys()
    needed = [key for key in known if not key.startswith(heads or ".") and not key.endswith(COUNTERS)]
    candidates = [name.removesuffix(needed[0]) for name in tensors if name.endswith(needed[0])]
    prefixes = [prefix for prefix in candidates if all(prefix + key in tensors for key in needed)]
    if not prefixes:
        return tensors, []
    prefix = min(prefixes, key=lambda prefix: "ema" not in prefix)
    layers = tuple(f"{layer}." for layer, _ in model.named_children())
    state, others = {}, []
    for name, tensor in tensors.items():
        key = name.removeprefix(prefix)
        # An unknown tensor in one of the model's layers is kept, and makes loading fail: another architecture.
        belongs = key in known or (key.startswith(layers) and not key.endswith(COUNTERS))
        if name.startswith(prefix) and belongs:
            state[key] = tensor
        else:
            others.append(name)
    return state, others


def flatten(content: dict, prefix: str = ""):
    """Yield (name, tensor) for each tensor in nested dicts; the name is the keys that lead to it, joined by dots."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


# --- save and load ---


def save(content: dict, path: Path, kind: str = FORMAT) -> None:
    """Write a dict of plain types and tensors with torch.save, followed by its SHA-256, the seal; no reader ever sees a
    partial file.
    """
    buffer = io.BytesIO()  # on a full disk torch.save raises RuntimeError, but f.write OSError
    torch.save(canonical({**content, "format": kind, "format_version": FORMAT_VERSION}), buffer)
    with data.replacing(path) as f:
        f.write(buffer.getbuffer())
        f.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())


def canonical(x):
    """A copy in which equal strings are one object: otherwise pickle may write equal runs as different files."""
    if isinstance(x, dict):
        return {canonical(k): canonical(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [canonical(v) for v in x]
    return sys.intern(str(x)) if isinstance(x, str) else x


def load(path: str | Path, kind: str = FORMAT) -> dict:
    """Load a saved file onto the CPU, and verify its seal; for a run's folder, the checkpoint in it.

    kind: the format that it must have.

    Raises:
        UserError: the file is missing, altered, damaged, not of this suite, or of another format version.
    """
    path = in_run_folder(path)
    if not path.is_file():
        runs = sorted(path.parent.glob("*/ckpt.pt"))
        way_out = f"; name one of the runs, such as {runs[-1].parent}" if runs else ""
        raise UserError(f"checkpoint {path} does not exist{way_out}")
    stored = path.read_bytes()
    try:
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        found, version = content.get("format"), content.get("format_version")
    except Exception:  # noqa: BLE001, unpicklers fail in many ways on a damaged file
        raise UserError(f"{path} is damaged, or not a file of this suite") from None
    if found != kind:
        raise UserError(f"{path} is not a {kind} of this suite")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this code reads {FORMAT_VERSION}: train again")
    if hashlib.sha256(stored[:-64]).hexdigest().encode() != stored[-64:]:
        raise UserError(f"{path} was altered or damaged after it was written")
    return content


def from_checkpoint(checkpoint: dict, device: torch.device) -> nn.Module:
    """The model of a checkpoint, in evaluation mode.

    Raises:
        UserError: the weights do not fit this version of timm's model.
    """
    name = checkpoint["model"]
    model = build(name, len(checkpoint["classes"]), checkpoint["input_size"], **checkpoint["model_arguments"])
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as e:
        raise UserError(f"the weights do not fit this version of timm's {name}: {data.one_line(e)}") from None
    return model.eval().to(device, memory_format=memory_format(model, device))


def newest_checkpoint() -> Path:
    """The newest ckpt.pt of a finished run under runs/, else the newest of all."""
    found = list(Path("runs").glob("*/ckpt.pt"))
    if not found:
        raise UserError("no runs/*/ckpt.pt found; train a model first (python train.py) or name a checkpoint")
    return max(found, key=lambda path: (is_finished(path.parent), path.stat().st_mtime))


def is_finished(folder: Path) -> bool:
    """Whether a run is finished, by its metrics.json, which is faster to read than its checkpoint."""
    with contextlib.suppress(Exception):  # missing, or damaged in any way
        return json.loads((folder / "metrics.json").read_text())["finished"] is True
    return False


# --- inference ---


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor, preprocessing: dict) -> Tensor:
    """Logits, float64 [n, classes] on the CPU, of one batch of uint8 images [n, side, side]; the model runs in float32.

    preprocessing: mean and std, as a checkpoint has them.
    """
    x = data.to_float(images.to(next(model.parameters()).device))
    return model(data.normalise(x, preprocessing)).float().cpu().double()


@dataclass
class Decision:
    """A model's calibrated output, one row per image."""

    calibrated_logits: Tensor  # float64 [n, classes]: log-odds of each class against the rest
    probabilities: Tensor  # float64 [n, classes]: their sigmoid, which has ties near 1
    predicted: Tensor  # int64 [n]: positions in classes


def decide(logits: Tensor, checkpoint: dict) -> Decision:
    """The decision rule of training, evaluation and prediction.

    Two classes: the last one at the threshold or above. More: the most probable one.

    Args:
        logits: float64 [n, classes]. checkpoint: its slope, intercept and threshold are used.
    """
    calibrated_logits = calibrate(logits, checkpoint["slope"], checkpoint["intercept"])
    if logits.shape[1] == 2:
        predicted = (calibrated_logits[:, 1] >= checkpoint["threshold"]["logit"]).long()
    else:
        predicted = calibrated_logits.argmax(1)
    return Decision(calibrated_logits, calibrated_logits.sigmoid(), predicted)


def calibrate(logits: Tensor, slope: float, intercept: float) -> Tensor:
    """Log-odds of each class against the rest, float64 [n, classes], from logits of that shape (Platt 1999).

    All logits are multiplied by slope; intercept is added to the last.
    """
    scaled = logits.double() * slope
    scaled[:, -1] += intercept
    itself = torch.eye(scaled.shape[1], dtype=torch.bool)
    others = scaled[:, None].masked_fill(itself, -torch.inf)  # [n, classes, classes]
    return scaled - others.logsumexp(2)


# --- heat maps ---

STRIDE = 8  # of the feature map that is shown: 20 x 20 cells at 160 pixels
MOST_PREFIX_TOKENS = 8  # class token, distillation token, registers


def heat_map(model: nn.Module, image: np.ndarray, target: str, checkpoint: dict) -> np.ndarray:
    """Where the model sees evidence for a class: HiResCAM (Draelos and Carin 2020), the sum over channels of feature
    times gradient.

    The gradient is taken of the target's logit minus the mean of all logits, since what raises all of them equally
    changes no probability. The features are those of the last stage of stride 8 or less, or else of the finest (of
    several with that stride, the last but one): the 32-pixel cells of most last stages are too coarse for an opacity.

    Args:
        model: in evaluation mode. image: uint8 [side, side].
        target: one of the classes. checkpoint: its classes, mean and std are used.

    Returns:
        float32 [side, side] in [0, 1], divided by its maximum; all zero if nothing supports the class.

    Raises:
        UserError: timm lists no stages of this model, or their output is not a map of the image.
    """
    no_map = "this model has no feature map that could be shown as a heat map"
    if hasattr(model, "reroll"):  # its tokens are not in the order of the image's cells (Hiera)
        raise UserError(no_map)
    try:
        strides = [info["reduction"] for info in model.feature_info]
        stride = max([s for s in strides if s <= STRIDE] or [min(strides)])
        layers = [info["module"] for info in model.feature_info if info["reduction"] == stride]
        # If several blocks share the stride, as in a plain transformer, the last but one: of the last block's tokens,
        # the head may read the class token alone.
        layer = model.get_submodule(layers[-2:][0])
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError(no_map) from None
    side = round(len(image) / stride)
    outputs = []

    def keep(layer, inputs, output):
        outputs.extend(output if isinstance(output, list | tuple) else [output])

    x = data.to_float(torch.from_numpy(image)[None].to(next(model.parameters()).device))
    with torch.enable_grad(), layer.register_forward_hook(keep):
        logits = model(data.normalise(x, checkpoint))[0]
        score = logits[checkpoint["classes"].index(target)] - logits.mean()
    maps = [t for t in outputs if isinstance(t, Tensor) and len(t) == 1 and to_grid(t, side) is not None]
    if not maps:
        raise UserError(no_map)
    (gradient,) = torch.autograd.grad(score, maps[0])
    contribution = to_grid(maps[0].detach() * gradient, side)
    heat = F.relu(contribution.sum(1, keepdim=True)).float()
    heat = F.interpolate(heat, image.shape, mode="bilinear", align_corners=False)[0, 0]
    return (heat / heat.max().clamp(min=1e-12)).cpu().numpy()


def to_grid(t: Tensor, side: int) -> Tensor | None:
    """Features as [n, channels, height, width], or None if their shape fits none of three layouts.

    Channels first or last, with about side cells along a side (convolutions without padding lose some); or tokens row
    by row, after the prefix tokens, which belong to no cell.
    """
    if t.ndim == 3 and 0 <= t.shape[1] - side**2 <= MOST_PREFIX_TOKENS:
        return t[:, -(side**2) :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if t.ndim != 4:
        return None
    for grid in (t, t.permute(0, 3, 1, 2)):
        height, width = grid.shape[2:]
        if height == width and abs(height - side) <= 2:
            return grid
    return None


# --- input check ---

CELLS, FINE_CELLS = 16, 4  # along a side, see image_features


def image_features(images: Tensor) -> Tensor:
    """What an image looks like at a glance, float32 [n, 274], from uint8 [n, side, side].

    Standardised grey levels on a coarse grid, the fine structure on a coarser one, contrast and brightness. Always
    computed on the CPU, so that the check gives the same result on every device.
    """
    x = images.cpu().unsqueeze(1).float()
    coarse = F.adaptive_avg_pool2d(x, CELLS).flatten(1)
    across = F.adaptive_avg_pool2d(x.diff(dim=3).abs_(), FINE_CELLS)
    down = F.adaptive_avg_pool2d(x.diff(dim=2).abs_(), FINE_CELLS)
    fine = (across + down).flatten(1) / 2
    mean = coarse.mean(1, keepdim=True)
    std = coarse.std(1, keepdim=True)
    return torch.cat([(coarse - mean) / (std + 4), (fine + 0.5).log(), (std + 1).log(), mean / 64], 1)


def fit_input_check(images: Tensor, train: Tensor, val: Tensor) -> dict[str, Tensor | float]:
    """Mean and whitening of the training images' features, and the cut that flags 1 % of the validation images.

    A Mahalanobis distance as in Lee et al. 2018, on plain features instead of a network's: a network trained for a
    diagnosis ignores much of what makes an image a frontal radiograph.

    Args:
        images: uint8 [n, side, side]. train, val: int64, positions in images.
    """
    # Include mirrored images, so that they are not flagged.
    batches = (images[part] for part in train.split(64))
    features = torch.cat([image_features(both) for batch in batches for both in (batch, batch.flip(2))]).double()
    # Shrunk towards the variances alone, so that it is not singular with few images.
    covariance = 0.9 * features.T.cov(correction=0) + 0.1 * features.var(0).clamp(min=1e-8).diag()
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    check = {"mean": features.mean(0).float(), "whiten": whiten.float(), "cut": 1.0}
    scores = torch.cat([unlikeness(check, images[part]) for part in val.split(64)])
    check["cut"] = float(scores.quantile(0.99).clamp(min=1e-6))
    return check


def unlikeness(check: dict, images: Tensor) -> Tensor:
    """float32 [n]; above 1 an image is unlike the training images.

    The distance of the features from the training mean, divided by the cut. If it is smaller for the image flipped
    upside down, the image is probably upside down, and the distance is multiplied by the ratio of the two.
    """
    both = [image_features(images), image_features(images.flip(1))]
    here, turned = (((features - check["mean"]) @ check["whiten"]).norm(dim=1) for features in both)
    return here * (here / turned.clamp(min=1e-6)).clamp(min=1) / check["cut"]


def fit_border(images: Tensor, index: Tensor, labels: np.ndarray) -> dict[str, Tensor | float]:
    """A logistic regression of the class on the border alone; if it predicts well, the border is a shortcut.

    Args:
        images: uint8 [n, side, side]. index: int64 [m], positions in images. labels: 0 or 1 for each position, [m].

    Returns:
        weight of each of data.border_features, float64 [348], and bias.
    """
    from sklearn.linear_model import LogisticRegression  # here, since prediction does not need it

    features = torch.cat([data.border_features(images[part]) for part in index.split(64)]).double()
    fitted = LogisticRegression(max_iter=1000).fit(features.numpy(), labels)
    return {"weight": torch.from_numpy(fitted.coef_[0]), "bias": float(fitted.intercept_[0])}


def border_logit(border: dict, images: Tensor) -> np.ndarray:
    """Logit of the positive class from the border alone, float64 [n], of uint8 images [n, side, side]."""
    return (data.border_features(images).double() @ border["weight"] + border["bias"]).numpy()
