"""A public diffusion model that others have trained, its maps, and what a user of terrain looks at.

The model comes with the package adaptive-terrain-diffusion (MIT): a consistency U-Net in ONNX with
10.4 million parameters. From noise of standard deviation 80 and a difficulty in [0, 1] it makes a
height map of 128 x 128 in one step. onnx2pytorch turns it into a torch module.
"""

from importlib.resources import files

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from tqdm import tqdm

from lafq import estimate_sensitivity
from lafq.fisher.sensitivity import Sensitivity
from lafq.rng import generator
from lafq.study.workspace import Workspace
from lafq.tensors import load_tensors, save_tensors

WORK = Workspace("terrain")
WEIGHTS = "weights/terrain_consistency_unet_difficulty100.onnx"
SIZE, SIGMA = 128, 80.0
PASSES, MAPS_PER_PASS = 32, 2
FRESH, CHUNK = 64, 4
# Seeds of the noise: plans are made from, judged on, and what other noise does.
KNOWN, JUDGED, OTHER = 0, 1, 2
STORED = ("fisher", "curvature")
HEIGHT, ASINH = 22.16864013671875, 0.1  # metres; the package's map from the output to heights


def load() -> nn.Module:
    """The model in torch, without the buffers in which the converter repeats every weight; checked
    against ONNX Runtime.
    """
    import onnx
    import onnxruntime
    from onnx2pytorch import ConvertModel

    path = str(files("terrain_diffusion") / WEIGHTS)
    model = ConvertModel(onnx.load(path)).eval()
    weights = [p for p in model.parameters() if p.ndim > 1]
    for name, buffer in list(model.named_buffers()):
        if any(buffer.shape == w.shape and torch.equal(buffer, w) for w in weights):
            delattr(model, name)
    x = maps(OTHER, CHUNK)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = dict(zip(("noisy", "sigma", "difficulty"), (part.numpy() for part in x), strict=True))
    with torch.inference_mode():
        off = (model(*x) - torch.from_numpy(session.run(["denoised"], named)[0])).abs().max().item()
    if off > 1e-4:
        raise RuntimeError(
            f"the model in torch differs from ONNX Runtime's by {off:.2g}: use the versions in "
            f"requirements-terrain.txt"
        )
    print(f"the model in torch differs from ONNX Runtime's by at most {off:.1g}")
    return model


def maps(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The model's arguments for so many maps, as the package's generator gives them: noise, sigma,
    difficulty.
    """
    g = generator(seed)
    noise = SIGMA * torch.randn(count, 1, SIZE, SIZE, generator=g)
    return noise, torch.full((count,), SIGMA), torch.randint(100, (count,), generator=g) / 99


@torch.no_grad()
def outputs(model: nn.Module, seed: int) -> Tensor:
    """What the model makes of FRESH maps, (FRESH, 1, 128, 128)."""
    parts = [part.split(CHUNK) for part in maps(seed, FRESH)]
    return torch.cat([model(*x) for x in tqdm(list(zip(*parts, strict=True)), leave=False)])


def estimated(model: nn.Module, passes: int) -> Sensitivity:
    """Of all weights, from the first of PASSES passes of MAPS_PER_PASS maps."""
    parts = [part.split(MAPS_PER_PASS)[:passes] for part in maps(KNOWN, PASSES * MAPS_PER_PASS)]
    batches = tqdm(list(zip(*parts, strict=True)), desc="sensitivity", leave=False)
    return estimate_sensitivity(model, batches, KNOWN)


def sensitivity(model: nn.Module) -> Sensitivity:
    """`estimated` from all passes, kept in build/terrain."""
    path = WORK.build / "sensitivity.safetensors"
    if not path.is_file():
        known = estimated(model, PASSES)
        by_kind = {(kind, n): t for kind in STORED for n, t in getattr(known, kind).items()}
        tensors = {f"{kind} {n}": t.contiguous() for (kind, n), t in by_kind.items()}
        save_tensors(path, tensors, passes=PASSES, noise=known.noise)
    stored, about = load_tensors(path, "make terrain", passes=PASSES)
    fields = [
        {n.partition(" ")[2]: t for n, t in stored.items() if n.startswith(f"{kind} ")}
        for kind in STORED
    ]
    return Sensitivity(*fields, PASSES, about["noise"])


def heights(output: Tensor) -> np.ndarray:
    """Metres, (N, 128, 128), as the package computes them."""
    unit = ((output[:, 0].double() + 1) / 2).clamp(0, 1).numpy()
    return ASINH * np.sinh(unit * np.arcsinh(HEIGHT / ASINH))


def character(output: Tensor) -> dict[str, np.ndarray]:
    """What a user of terrain looks at: slopes, roughness (height over the mean of 5 x 5 cells), and
    the power spectrum in dB.
    """
    z = heights(output)
    slope = np.hypot(*np.gradient(z, axis=(1, 2)))
    rough = np.abs(z - uniform_filter(z, (0, 5, 5)))
    power = np.abs(np.fft.fft2(z - z.mean((1, 2), keepdims=True))) ** 2
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(SIZE) * SIZE] * 2)).round().astype(int)
    rings = [power[:, frequency == k].mean() for k in range(1, SIZE // 2)]
    return {"slope": slope.ravel(), "roughness": rough.ravel(), "spectrum": 10 * np.log10(rings)}


def distances(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """Wasserstein distances of slopes and roughness (metres), root mean square difference of the
    spectra (dB).
    """
    of = {n: wasserstein_distance(a[n][::7], b[n][::7]) for n in ("slope", "roughness")}
    return of | {"spectrum": float(np.sqrt(np.mean((a["spectrum"] - b["spectrum"]) ** 2)))}


def decibels(expected: Tensor, found: Tensor) -> float:
    """Variance of the expected output over the mean squared error."""
    return 10 * torch.log10(expected.var() / (found - expected).square().mean()).item()
