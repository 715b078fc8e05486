"""What a model is: build it with timm, take pretrained weights, save it, load it, explain it, know its inputs.

Every model has one grey input channel and one logit per class.
"""

import contextlib
import copy
import difflib
import io
import itertools
import os
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import load_state_dict
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

FORMAT = "chest radiograph classifier"
FORMAT_VERSION = 1
KEYS = {"model", "state_dict", "classes", "positive", "input_size", "mean", "std", "temperature", "threshold", "data"}
KEYS |= {"input_check"}  # without which nothing can be classified


class ModelError(Exception):
    """Something about a model, a weights file or a checkpoint that the user can mend; the message is one line."""


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu, cuda, cuda:1, mps ...: auto takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ModelError(f"--device {name} can't be used here ({reason}); try --device auto") from None
    torch.backends.cudnn.allow_tf32 = False  # or a probability would depend on the batch that an image stood in
    return device


# --- build ---


def check_name(name: str) -> None:
    """Raise ModelError with the nearest names where timm has no such model."""
    try:
        known = timm.is_model(name) and bool(timm.get_pretrained_cfg(name) or "." not in name)
    except RuntimeError:  # an unknown tag of a known model
        known = False
    if not known:
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        raise ModelError(f"timm has no model {name!r}; " + (f"nearest: {', '.join(near)}" if near else "see its list"))


def preprocessing(name: str, size: int | None) -> dict:
    """Input size, and mean and std of grey levels in [0, 1] as timm's weights expect them.

    Where size is None, it is 160 pixels, or the model's own if it takes one size alone.
    """
    check_name(name)
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    mean, std = (sum(v) / len(v) for v in (config.mean, config.std))
    return {"input_size": size or (config.input_size[-1] if takes_one_size(name) else 160), "mean": mean, "std": std}


def takes_one_size(name: str) -> bool:
    """Whether the architecture is built for one input size, as models of tokens are for their position table."""
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def build(name: str, classes: int, size: int, **kwargs) -> nn.Module:
    """A timm model with one input channel and classes logits; kwargs go to timm.create_model.

    Raises:
        ModelError: unknown name, or an input size that the architecture does not take.
    """
    check_name(name)
    if takes_one_size(name):
        kwargs["img_size"] = size
    try:
        model = timm.create_model(name, in_chans=1, num_classes=classes, **kwargs)
    except AssertionError as e:
        raise ModelError(f"{name} can't be built for {size} x {size} pixels ({e}); try another --img-size") from None
    if not kwargs.get("pretrained"):
        # timm scales some heads by the number of classes: with two, logits would start 20 times too large.
        model.reset_classifier(classes)
    return model


def check_size(model: nn.Module, size: int) -> None:
    """Raise ModelError where the model can't take size x size pixels."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, 1, size, size))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ModelError(f"the model does not take {size} x {size} pixels ({e}); try another --img-size") from None


def build_pretrained(name: str, classes: int, size: int, weights: str | None, insist: bool) -> tuple[nn.Module, dict]:
    """A model with weights from a file, or else timm's own from the hub or its cache.

    Args:
        weights: path of a .safetensors file or of a state dict saved by torch; None for timm's pretrained ones.
        insist: raise where there are none; otherwise the model keeps its random weights.

    Returns:
        the model, and a dict: source (a file, hub or random), note (what was taken and what was not, one line), and
        failed (why there are none).
    """
    if weights:
        state, path = _read_state(Path(weights)), str(weights)
        model, note = _from_state(name, classes, size, state, path)
        return model, {"source": path, "note": note, "failed": ""}
    config = timm.get_pretrained_cfg(name)
    if not config or not (config.has_weights or config.url or config.hf_hub_id):
        failure = f"timm has no pretrained weights for {name}"
    else:
        failure = ""
        with _offline_unless_reachable():
            try:
                model = build(name, config.num_classes, size, pretrained=True)
            except ModelError:
                raise
            except Exception as e:  # noqa: BLE001, the hub, the network and the cache fail in many ways
                reason = str(e).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(e).__name__
                failure = f"no pretrained weights for {name}: {reason}"
    if failure and insist:
        raise ModelError(f"{failure}; use --weights FILE or --no-pretrained")
    if failure:
        return build(name, classes, size), {"source": "random", "note": "random weights", "failed": failure}
    model.reset_classifier(classes)
    note = f"timm's pretrained weights ({config.hf_hub_id or config.url}); stem summed to 1 channel; new head"
    return model, {"source": "hub", "note": note, "failed": ""}


def _from_state(name: str, classes: int, size: int, state: dict, path: str) -> tuple[nn.Module, str]:
    """Build with a state dict: every tensor must fit, but for the head, which is new where the classes differ."""
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    stem, head = (n[0] if isinstance(n, tuple) else n or "" for n in (config.first_conv, config.classifier))
    try:
        count = len(state[f"{head}.weight"]) if f"{head}.weight" in state else 0
        channels = state[f"{stem}.weight"].shape[1] if f"{stem}.weight" in state else 3
        overlay = {"state_dict": state, "num_classes": count, "input_size": (channels, size, size)}
        # Strict: one tensor too many, too few or of another shape is another architecture.
        model = build(name, count, size, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError, IndexError) as e:
        detail = next((line.strip() for line in str(e).splitlines()[1:]), str(e))[:160]
        raise ModelError(f"{path} does not hold weights of {name}: {detail}") from None
    if count != classes:
        model.reset_classifier(classes)
    stem_note = f"; {stem}: {channels} input channels summed to 1" if channels != 1 else ""
    head_note = f"head of {count} classes taken" if count == classes else f"new head ({count or 'none'} there)"
    return model, f"{len(state)} tensors of {path} taken{stem_note}; {head_note}"


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors or torch's own format (bare, or under state_dict, model or model_ema)."""
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist")
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001, unpicklers too
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ModelError(f"{path} can't be read as weights: {reason}") from None
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ModelError(f"{path} does not hold a state dict of tensors")
    return dict(state)


@contextlib.contextmanager
def _offline_unless_reachable():
    """Within, the hub's own library takes its cache alone, unless its server answers within a few seconds."""
    from huggingface_hub import constants

    answered = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=4)
            except urllib.error.HTTPError:
                pass  # an answer too
            answered.append(True)

    # In a thread, since looking up a name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(6)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not answered
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# --- save and load ---


def save(checkpoint: dict, path: Path) -> None:
    """Write a dict of plain types and tensors to a temporary name, then move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    buffer = io.BytesIO()
    torch.save(_canonical(checkpoint), buffer)
    try:
        with open(temporary, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _canonical(x):
    """The same, with equal strings being one object: a pickle tells them apart, and equal runs shall give equal files."""
    if isinstance(x, dict):
        return {_canonical(k): _canonical(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_canonical(v) for v in x]
    return sys.intern(str(x)) if isinstance(x, str) else x


def load(path: str | Path, kind: str = FORMAT) -> dict:
    """Read a checkpoint as it was saved, onto the CPU.

    Raises:
        ModelError: missing, damaged, no checkpoint of this suite, or of a later format version.
    """
    if Path(path).is_dir():
        path = Path(path) / "ckpt.pt"
    if not Path(path).is_file():
        raise ModelError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as z:
            if z.testzip():  # torch would not notice
                raise ValueError("a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001, a damaged file makes unpicklers fail in any way
        raise ModelError(f"{path} is damaged or no checkpoint of this suite") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != kind:
        raise ModelError(f"{path} is no {kind} checkpoint of this suite")
    found, missing = checkpoint.get("format_version"), KEYS - checkpoint.keys() if kind == FORMAT else ()
    if not isinstance(found, int):
        raise ModelError(f"{path} has no format version: it is damaged")
    if found > FORMAT_VERSION:
        raise ModelError(f"{path} has format version {found}, this code reads up to {FORMAT_VERSION}: update the code")
    if missing:
        raise ModelError(f"{path} is damaged: it holds no {', '.join(sorted(missing))}")
    return checkpoint


def from_checkpoint(checkpoint: dict, device: torch.device) -> nn.Module:
    """The model of a checkpoint, in evaluation mode."""
    model = build(checkpoint["model"], len(checkpoint["classes"]), checkpoint["input_size"])
    if any(v.isnan().any() for v in checkpoint["state_dict"].values()):  # infinity may be a mask
        raise ModelError("the checkpoint's weights are no numbers (NaN): it is damaged; train again")
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as e:
        raise ModelError(f"the weights do not fit this version of timm's {checkpoint['model']}: {e}") from None
    return model.eval().to(device, memory_format=torch.channels_last)


def fold_batch_norms(model: nn.Module, size: int) -> nn.Module:
    """A copy with each batch norm put into the convolution before it: the same logits in two thirds of the time.

    Args:
        model: in evaluation mode, on any device; it comes back as it is where it has none, or the copy's logits differ
            by more than rounding. size: side of its input.
    """
    folded = copy.deepcopy(model)
    norms = {m: name for name, m in folded.named_modules() if type(m) in (nn.BatchNorm2d, BatchNormAct2d)}
    convolved, pairs, handles = {}, [], []

    def follow(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if module not in norms:
            convolved[id(output)] = module, output
        elif id(inputs[0]) in convolved:
            pairs.append((convolved[id(inputs[0])][0], module))

    if not norms:
        return model
    for m in folded.modules():
        if m in norms or type(m) is nn.Conv2d:  # its subclasses may change their weights before they use them
            handles.append(m.register_forward_hook(follow))
    x = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    with torch.no_grad():
        before = folded(x)
        for handle in handles:
            handle.remove()
        for conv, norm in pairs:
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            rest = [norm.drop, norm.act] if isinstance(norm, BatchNormAct2d) else []
            folded.set_submodule(norms[norm], nn.Sequential(*rest))
        return folded if torch.allclose(folded(x), before, rtol=1e-3, atol=1e-4 * float(before.abs().max())) else model


def newest_checkpoint() -> Path:
    """The ckpt.pt of the newest run under runs/."""
    found = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ModelError("there is no runs/*/ckpt.pt; train a model first (python train.py) or name a checkpoint")
    return found[-1]


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Calibrated probabilities [n, classes] from logits [n, classes]; see Guo et al. 2017 for the temperature."""
    return F.softmax(logits.double() / temperature, dim=1)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- explain ---


def grad_cam(model: nn.Module, x: torch.Tensor, target: int) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of the logit of class target, the mean over each image and its mirror image.

    The map is that of the last stage; in models that read a class token alone, of the block before, the last one whose
    other tokens matter. Such a map is coarse (5 x 5 at 160 pixels), so to that of the whole image comes the mean of the
    maps of nine overlapping windows, each enlarged to the input size, as random crops are in training.

    Args:
        x: normalised images [batch, 1, side, side].

    Returns:
        float32 [batch, side, side] in [0, 1]; all zero where nothing speaks for the class.
    """
    kept, size = {}, x.shape[-1]
    stage = -2 if getattr(model, "global_pool", "") == "token" else -1
    try:
        layer = model.get_submodule(model.feature_info[stage]["module"])
    except (AttributeError, LookupError, TypeError):
        raise ModelError("timm names no feature map of this model; leave out --cam") from None
    handle = layer.register_forward_hook(lambda _, __, output: kept.update(map=output))

    def one(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            logits = model(x.detach().requires_grad_())
            score = logits[:, target].sum() - logits.sum() / logits.shape[1]
            (gradient,) = torch.autograd.grad(score, kept["map"])
        features, gradient = (_to_nchw(model, t.detach().float()) for t in (kept["map"], gradient))
        return F.relu((features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))

    def view(x: torch.Tensor) -> torch.Tensor:
        enlarged = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        cam = one(enlarged) + one(enlarged.flip(3)).flip(3)
        return F.interpolate(cam, x.shape[-2:], mode="bicubic", align_corners=False).clamp(min=0)[:, 0]

    try:
        model(x[:1])
        if not isinstance(kept.get("map"), torch.Tensor) or kept["map"].ndim not in (3, 4):
            raise ModelError("this model has no feature map to show; leave out --cam")
        side = round(0.6 * size)
        inside, weight = torch.zeros_like(x[:, 0]), torch.zeros_like(x[0, 0])
        taper = torch.hann_window(side + 2, periodic=False, device=x.device)[1:-1]  # or the windows' edges would show
        taper = torch.outer(taper, taper)
        for top, left in itertools.product((0, (size - side) // 2, size - side), repeat=2):
            window = ..., slice(top, top + side), slice(left, left + side)
            inside[window] += taper * view(x[window])
            weight[window] += taper
        total = view(x) + inside / weight
    finally:
        handle.remove()
    return total / total.amax((1, 2), keepdim=True).clamp(min=1e-12)


def _to_nchw(model: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """Features as [batch, channels, height, width] from that, from channels last, or from tokens."""
    if t.ndim == 3:
        t = t[:, getattr(model, "num_prefix_tokens", 0) :]
        side = int(t.shape[1] ** 0.5)
        t = t.unflatten(1, (side, -1))
        return t.permute(0, 3, 1, 2)
    return t.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else t


# --- know what it has not seen ---

GRID, FINE = 16, 4  # cells along a side


def layout(images: torch.Tensor) -> torch.Tensor:
    """What an image looks like at a glance, float32 [n, GRID ** 2 + FINE ** 2 + 2], from uint8 [n, side, side].

    Standardised grey levels on a coarse grid, the fine structure on a coarser one, contrast and brightness. On the CPU,
    wherever the images are, so that the check is one and the same for every device.
    """
    x = images.cpu().unsqueeze(1).float()
    coarse = F.adaptive_avg_pool2d(x, GRID).flatten(1)
    across, down = (x[..., 1:] - x[..., :-1]).abs_(), (x[..., 1:, :] - x[..., :-1, :]).abs_()
    fine = sum(F.adaptive_avg_pool2d(d, FINE).flatten(1) for d in (across, down)) / 2
    mean, std = coarse.mean(1, keepdim=True), coarse.std(1, keepdim=True)
    return torch.cat([(coarse - mean) / (std + 4), (fine + 0.5).log(), (std + 1).log(), mean / 64], 1)


def upside_down(v: torch.Tensor) -> torch.Tensor:
    """The layout of images turned upside down, from their layout [n, ...]: the rows of both grids in reverse."""
    coarse, fine, rest = v.split([GRID**2, FINE**2, 2], 1)
    turned = [grid.unflatten(1, (side, side)).flip(1).flatten(1) for grid, side in ((coarse, GRID), (fine, FINE))]
    return torch.cat([*turned, rest], 1)


def fit_input_check(train_batches, val_batches) -> dict[str, torch.Tensor | float]:
    """Mean and whitening of the training images' layout, and the cut that flags 1 % of the validation images.

    A Mahalanobis distance as in Lee et al. 2018, on the layout instead of on features: what a network learnt for a
    diagnosis ignores much of what makes an image a frontal radiograph. Batches are uint8 [n, side, side].
    """
    count, total, outer = 0, 0.0, 0.0
    for batch in train_batches:
        v = torch.cat([layout(batch), layout(batch.flip(2))]).double()  # mirrored is as good: an augmentation
        count, total, outer = count + len(v), total + v.sum(0), outer + v.T @ v
    mean = total / count
    covariance = outer / count - torch.outer(mean, mean)
    scale = covariance.diagonal().clamp(min=1e-8).sqrt()
    # Shrunk to the identity: few images must not make it singular.
    correlation = 0.9 * covariance / torch.outer(scale, scale) + 0.1 * torch.eye(len(mean), dtype=torch.float64)
    whiten = torch.linalg.inv(torch.linalg.cholesky(correlation)).T / scale[:, None]
    check = {"mean": mean.float(), "whiten": whiten.float(), "cut": 1.0}
    scores = torch.cat([unlikeness(check, b) for b in val_batches])
    return check | {"cut": float(scores.quantile(0.99))}


def unlikeness(check: dict, images: torch.Tensor) -> torch.Tensor:
    """float32 [n]; above check["cut"] an image is unlike the training images.

    The distance of the layout, weighed against that of the image turned upside down: where that one is the nearer,
    something stands on its head.
    """
    v = layout(images)
    here, turned = (((t - check["mean"]) @ check["whiten"]).norm(dim=1) for t in (v, upside_down(v)))
    return here * (here / turned.clamp(min=1e-6)).clamp(min=1)
