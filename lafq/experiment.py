"""What the notebooks do again and again: set up, train or load the weights, evaluate a list of precision plans."""

import hashlib
import json
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq import classifier, inception, metrics, paths, quantize, storage, training
from lafq.data import mnist
from lafq.diffusion import sample
from lafq.files import load_tensors, replacing, save_tensors, sha256
from lafq.fisher import Fisher
from lafq.memory import sampling_peak_mib
from lafq.plans import Configuration, sizes
from lafq.unet import UNet

CHECKPOINT, WEIGHTS = "checkpoint.safetensors", "ema.safetensors"


def set_up(profile: str, threads: int, device: str = "auto") -> torch.device:
    """Check the profile, fix the number of threads and name the device ("auto": a CUDA GPU where one is visible).

    Raises ValueError for an unknown profile, RuntimeError when CUDA is asked for and absent.
    """
    known = sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))
    if profile not in known:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(known)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("DEVICE is cuda, but no CUDA GPU is visible: set DEVICE to auto or cpu")
    torch.set_num_threads(threads)
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    # Quantization is judged in FP32 compute: TF32 keeps 10 mantissa bits, as FP16 does.
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(chosen)


def train(
    profile: str, width: int, device: torch.device, *, seed: int, steps: int, dropout: float, window: int = 50, **settings: Any
) -> None:
    """Train (or continue) the model of a profile; writes results/<profile>/ema.safetensors and training.csv.

    training.csv has the loss averaged over windows of `window` steps. `settings` are those of `training.fit`.
    """
    torch.manual_seed(seed)
    model = UNet(width, dropout).to(device, memory_format=torch.channels_last)
    checkpoint = paths.BUILD / profile / CHECKPOINT
    weights, losses = training.fit(model, mnist(train=True)[0], checkpoint, steps=steps, seed=seed, **settings)
    save_tensors(paths.RESULTS / profile / WEIGHTS, weights, width=width, steps=steps, seed=seed, dropout=dropout, **settings)
    loss = pd.Series(losses, index=range(1, steps + 1)).groupby(lambda step: -(-step // window) * window).mean()
    with replacing(paths.RESULTS / profile / "training.csv") as temporary:
        loss.rename_axis("step").rename("loss").to_csv(temporary, float_format="%.6f")


def load_model(profile: str, width: int, device: torch.device | str = "cpu") -> UNet:
    """The model of a profile with its trained EMA weights, in evaluation mode.

    Raises FileNotFoundError naming 01_train when there are none, ValueError when they are of another width or damaged.
    """
    tensors, _ = load_tensors(paths.RESULTS / profile / WEIGHTS, "01_train with TRAIN=1", width=width)
    model = UNet(width)
    model.load_state_dict(tensors)
    return model.eval().to(device, memory_format=torch.channels_last)


def save_fisher(profile: str, fisher: Fisher, width: int) -> None:
    """Write every weight's Fisher value to results/<profile>/fisher.safetensors (not committed: 02_fisher makes it)."""
    save_tensors(paths.RESULTS / profile / "fisher.safetensors", fisher.weights, weights=_weights(profile), width=width)


def load_fisher(profile: str, width: int) -> dict[str, Tensor]:
    """The Fisher value of every weight, by parameter name, as 02_fisher wrote them.

    Raises FileNotFoundError when there are none, ValueError when they are of other weights than the profile's.
    """
    path = paths.RESULTS / profile / "fisher.safetensors"
    return load_tensors(path, "02_fisher with COMPUTE=True", weights=_weights(profile), width=width)[0]


def evaluate(
    model: nn.Module,
    configurations: list[Configuration],
    profile: str,
    *,
    images: int,
    steps: int,
    seed: int,
    inception_reference: int = 0,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Sample every configuration from the same noise and score the images.

    Returns one row a configuration (its key, kept_share, mem_mib, mem_share, peak_mib, the metrics, n_images, sample) and the
    uint8 images (N, 32, 32) by `sample`, a digest of the quantized weights and the noise: equal plans are sampled once,
    and what an interrupted run had finished is taken from build/<profile>/samples. All plans are checked first.
    inception_reference: number of reference digits for the Inception columns; 0 leaves them empty.
    """
    if images < 1:
        raise ValueError(f"{images} images asked for: at least one is needed")
    size = sizes(model, [c.plan for c in configurations])
    network = classifier.load()
    reference = metrics.mnist_reference(network)
    seen_by_inception = _inception_scorer(profile, inception_reference)
    against = f"{len(reference.features)} test digits, 32x32"
    if inception_reference:
        against += f" (Inception: {inception_reference})"
    rows, samples = [], {}
    pairs = zip(configurations, size.to_dict("records"), strict=True)
    for i, (configuration, bytes_row) in enumerate(pairs, start=1):
        quantized = quantize.pack(model, configuration.plan)
        peak = _peak(quantized, model, profile)
        quantized = quantize.unpack(quantized)
        key = _key(quantized, images, steps, seed)
        generated = _sampled(quantized, profile, key, images, steps, seed, f"row {i} of {len(size)}")
        samples[key] = generated[:, 0].numpy()
        scores = metrics.score(generated, network, reference)
        scores["fid_inception"] = seen_by_inception(key, generated) if configuration.inception else float("nan")
        key_columns = {k: v for k, v in configuration._asdict().items() if k not in ("plan", "inception")}
        rows.append(
            {**key_columns, **bytes_row, "peak_mib": peak, **scores, "n_images": images, "reference": against, "sample": key}
        )
        print(f"{' '.join(key_columns.values())}: {rows[-1]['mem_mib']:.2f} MiB, FID (MNIST) {scores['fid_mnist']:.2f}")
    return pd.DataFrame(rows), samples


def quality(model: nn.Module, profile: str, *, images: int, block: int, steps: int, seed: int) -> pd.DataFrame:
    """Metrics of the unquantized model on `images` images and on each disjoint block of them, the metric's own spread.

    One row for all and one a block: columns images (a range), n_images, fid_mnist, is_mnist, kid_mnist.
    """
    generated = _sampled(model, profile, _key(model, images, steps, seed), images, steps, seed)
    network = classifier.load()
    reference = metrics.mnist_reference(network)
    parts = {f"0-{images - 1}": generated} | {
        f"{start}-{start + block - 1}": generated[start : start + block] for start in range(0, images - block + 1, block)
    }
    scores = [{"images": k, "n_images": len(x), **metrics.score(x, network, reference)} for k, x in parts.items()]
    return pd.DataFrame(scores)


def _inception_scorer(profile: str, reference_images: int) -> Any:
    if not reference_images:
        print("Inception columns: left empty (this profile asks for no Inception reference)")
        return lambda key, images: float("nan")
    extractor, source = inception.load()
    print(source)
    if extractor is None:
        return lambda key, images: float("nan")
    reference = metrics.inception_reference(extractor, reference_images, paths.BUILD / "inception")
    suffix = f"{inception.digest(extractor)}.safetensors"

    def scored(key: str, images: Tensor) -> float:
        path = paths.BUILD / profile / "samples" / f"{key}.{suffix}"
        if not path.is_file():
            save_tensors(path, {"features": metrics.inception_features(extractor, images)})
        return metrics.fid(load_tensors(path, "this notebook")[0]["features"], reference)

    return scored


def _sampled(model: nn.Module, profile: str, key: str, images: int, steps: int, seed: int, label: str = "sampling") -> Tensor:
    path = paths.BUILD / profile / "samples" / f"{key}.npz"
    if path.is_file():
        return torch.from_numpy(np.load(path)["images"])
    generated = sample(model, images, steps, seed, label=label)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=generated.numpy())
    return generated


def _weights(profile: str) -> str:
    path = paths.RESULTS / profile / WEIGHTS
    return sha256(path) if path.is_file() else "none"


def _key(model: nn.Module, *drawn: int) -> str:
    return hashlib.sha256(f"{quantize.fingerprint(model)} {drawn}".encode()).hexdigest()[:16]


def _peak(packed: nn.Module, model: nn.Module, profile: str) -> float:
    """Whole MiB: the measurement repeats to a few tenths."""
    path = paths.BUILD / profile / "peaks" / f"{_key(packed)}.json"
    if not path.is_file():
        weights = path.with_suffix(".safetensors")
        storage.save(weights, packed, model)
        peak = round(sampling_peak_mib(weights, device=next(model.parameters()).device))
        weights.unlink()
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(peak))
    return json.loads(path.read_text())
