"""lafq on a public diffusion model of others: `make terrain` writes results/terrain and
figures/terrain. Rows that are there already are left alone.

The model comes with the package adaptive-terrain-diffusion (MIT): a consistency U-Net in ONNX with
10.4 million parameters. From noise of standard deviation 80 and a difficulty in [0, 1] it makes a
height map of 128 x 128 in one step. onnx2pytorch turns it into a torch module.

Decibels: variance of the FP32 model's output over the mean squared error, on maps from noise that
no plan has seen.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import uniform_filter
from scipy.stats import wasserstein_distance
from shared import Table, figure, run
from torch import Tensor, nn
from tqdm import tqdm

from lafq import allocate, estimate_sensitivity, quantize, save_quantized
from lafq.allocation import allocate as solver
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, nbytes, resident_bytes
from lafq.quantization.plan import Plan, as_plan
from lafq.rng import generator
from lafq.study import workspace
from lafq.study.workspace import Workspace
from lafq.tensors import load_tensors, save_tensors

WORK = Workspace("terrain")
MAPS = WORK.build / "maps.safetensors"
WEIGHTS = "weights/terrain_consistency_unet_difficulty100.onnx"
SIZE, SIGMA = 128, 80.0
PASSES, MAPS_PER_PASS = 32, 2
FRESH, CHUNK = 64, 4
# Seeds of the noise: plans are made from, judged on, and what other noise does.
KNOWN, JUDGED, OTHER = 0, 1, 2
HEIGHT, ASINH = 22.16864013671875, 0.1  # metres; the package's map from the output to heights
SHOWN = 3
UNIFORM = ("int4", "int3", "int2", "int8", "int6")
FEWER = (1, 2, 4, 8, 16, PASSES)
SENSITIVE = 10  # weight tensors that the row "INT4, sensitive tensors FP16" keeps
TENTH = 0.1
CODED, KEEPING = "entropy-coded", "INT4, sensitive tensors FP16"
SMALLER = f"{TENTH:.0%} of FP32"
THEIRS = [("optimum-quanto", kind) for kind in ("qint8", "qint4", "qint2")]
THEIRS += [("torchao", bits) for bits in ("8", "4")]
FP32 = ("fp32", "none")
DRAWN = {
    "FP32": FP32,
    "uniform INT4": ("uniform", "int4"),
    "allocator, INT4's bytes": ("allocator", "bytes of uniform int4"),
    "allocator, smaller": ("allocator", SMALLER),
}


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
    print(f"the model in torch differs from ONNX Runtime's by at most {off:.1g}")
    if off > 1e-4:
        raise RuntimeError("that is too much: use the versions in requirements-terrain.txt")
    return model


def maps(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments for so many maps, as the package generates them: noise, sigma, difficulty."""
    g = generator(seed)
    noise = SIGMA * torch.randn(count, 1, SIZE, SIZE, generator=g)
    return noise, torch.full((count,), SIGMA), torch.randint(100, (count,), generator=g) / 99


def batches(seed: int, count: int, size: int) -> list[tuple[Tensor, ...]]:
    """`maps` in batches."""
    return list(zip(*(part.split(size) for part in maps(seed, count)), strict=True))


@torch.no_grad()
def outputs(model: nn.Module, seed: int) -> Tensor:
    """What the model makes of FRESH maps, (FRESH, 1, 128, 128)."""
    return torch.cat([model(*x) for x in tqdm(batches(seed, FRESH, CHUNK), leave=False)])


def estimated(model: nn.Module, passes: int) -> Sensitivity:
    """Of all weights, from the first of PASSES passes of MAPS_PER_PASS maps."""
    known = batches(KNOWN, PASSES * MAPS_PER_PASS, MAPS_PER_PASS)[:passes]
    return estimate_sensitivity(model, tqdm(known, desc="sensitivity", leave=False), KNOWN)


def sensitivity(model: nn.Module) -> Sensitivity:
    """`estimated` from all passes, kept in build/terrain."""
    paths = [WORK.build / f"{part}.safetensors" for part in ("fisher", "curvature")]
    if not all(path.is_file() for path in paths):
        for path, tensors in zip(paths, estimated(model, PASSES), strict=False):
            save_tensors(path, tensors, passes=PASSES)
    return Sensitivity(*(load_tensors(p, "make terrain", passes=PASSES)[0] for p in paths))


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
    """Wasserstein distances of slopes and roughness (m), RMS difference of the spectra (dB)."""
    of = {n: wasserstein_distance(a[n][::7], b[n][::7]) for n in ("slope", "roughness")}
    return of | {"spectrum": float(np.sqrt(np.mean((a["spectrum"] - b["spectrum"]) ** 2)))}


def decibels(expected: Tensor, output: Tensor) -> float:
    """Variance of the expected output over the mean squared error."""
    return 10 * torch.log10(expected.var() / (output - expected).square().mean()).item()


def plans(model: nn.Module, known: Sensitivity) -> Iterator[tuple[str, str, Callable[[], Plan]]]:
    """Method and format of every row of ours, and what makes its plan; allocations are named for
    the row whose bytes they have.
    """
    frontiers = cache(partial(solver.frontiers_of, model, known))
    alike = {low: Plan(dict.fromkeys(known.fisher, low)) for low in UNIFORM}
    int4 = alike["int4"]
    kept = int4.with_entries(dict.fromkeys(sensitive(model, known, int4), "fp16"))
    sizes = {f"bytes of uniform {low}": nbytes(model, plan) / MIB for low, plan in alike.items()}
    coded = (SMALLER, *list(sizes)[:3])
    sizes[SMALLER] = TENTH * resident_bytes(model) / MIB
    sizes[f"bytes of {KEEPING}"] = nbytes(model, kept) / MIB
    # Their own rows come first, so their bytes are known.
    for library, setting in THEIRS:
        sizes[f"bytes of {library} {setting}"] = known_mib(library, setting)

    def allocated(mib: float) -> Plan:
        return solver.solve_budget(model, frontiers(), mib, known.recipe)

    yield from (("uniform", low, partial(as_plan, plan)) for low, plan in alike.items())
    yield KEEPING, "int4", partial(as_plan, kept)
    yield from (("allocator", name, partial(allocated, mib)) for name, mib in sizes.items())
    for name in coded:
        yield CODED, name, partial(allocate, model, known, file_mib=sizes[name])


def sensitive(model: nn.Module, known: Sensitivity, plan: Plan) -> list[str]:
    """The SENSITIVE weight tensors that a plan harms most by the Fisher information."""
    rounded = dequantize_(quantize(model, plan))
    change = {n: rounded.get_parameter(n) - model.get_parameter(n) for n in known.fisher}
    error = {n: (f * change[n].square()).sum().item() for n, f in known.fisher.items()}
    return sorted(error, key=error.get)[-SENSITIVE:]


def known_mib(method: str, format: str) -> float:
    """Resident MiB of a row that is in the table."""
    table = workspace.load_table(WORK, "terrain")
    return table[(table["method"] == method) & (table["format"] == format)]["mem_mib"].item()


def quantize_by(library: str, setting: str, layer: nn.Sequential) -> None:
    """Quantize the one layer that is in there, with the defaults of a library."""
    if library == "optimum-quanto":
        from optimum import quanto

        quanto.quantize(layer, weights=getattr(quanto, setting))
        quanto.freeze(layer)
    else:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_

        # Not Int8WeightOnlyConfig: that runs no convolution. On a CPU a code keeps a byte.
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{setting}"))
        quantize_(layer, config, lambda m, _: not isinstance(m, nn.Sequential))


def quantize_layers(
    model: nn.Module, inputs: dict[str, Tensor], apply: Callable[[nn.Sequential], None]
) -> tuple[nn.Module, int]:
    """A copy whose layers a library has quantized one by one, as it may not be able to as a whole;
    and the number of layers left in FP32.
    """
    result, left = copy.deepcopy(model), 0
    for name, x in inputs.items():
        layer = nn.Sequential(copy.deepcopy(model.get_submodule(name)))
        try:
            apply(layer)
            layer(x)
            if stored_bytes(layer) >= resident_bytes(model.get_submodule(name)):
                raise ValueError("it is no smaller")
            result.set_submodule(name, layer[0])
        except Exception as error:  # whatever a library does with a layer that it cannot handle
            left += 1
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            tqdm.write(f"  {name} stays FP32: {reason}")
    return result.eval(), left


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, looking into tensor subclasses."""
    return sum(parts(t) for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor))


def parts(tensor: Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(parts(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@torch.no_grad()
def layer_inputs(model: nn.Module, names: Iterable[str], *x: Tensor) -> dict[str, Tensor]:
    """What each layer that has one of these weights is given in a forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[name] = arguments[0]

    layers = [name.removesuffix(".weight") for name in names]
    hooks = [model.get_submodule(n).register_forward_pre_hook(partial(keep, n)) for n in layers]
    model(*x)
    for hook in hooks:
        hook.remove()
    return seen


class Judge:
    """Makes the rows of results/terrain/terrain.csv: bytes, decibels and distances of a model."""

    def __init__(self, model: nn.Module, known: Sensitivity, expected: Tensor) -> None:
        self.model, self.expected, self.look = model, expected, character(expected)
        self.full = resident_bytes(model)
        self.inputs = layer_inputs(model, known.fisher, *maps(OTHER, MAPS_PER_PASS))
        self.drawn = {" ".join(FP32): expected[:CHUNK]}  # the first maps by row
        if MAPS.is_file():
            self.drawn, _ = load_tensors(MAPS, "make terrain")

    def _row(self, name: str, whole: nn.Module, size: int, **sizes: float) -> dict[str, Any]:
        output = outputs(whole, JUDGED)
        self.drawn[name] = output[:CHUNK]
        sizes = {"mem_mib": size / MIB, "mem_share": size / self.full, **sizes}
        look = distances(self.look, character(output))
        return {**sizes, "decibels": decibels(self.expected, output), **look}

    def other_noise(self) -> dict[str, Any]:
        """How far maps of the same model from other noise are: what a distance is held against."""
        sizes = {"mem_mib": self.full / MIB, "mem_share": 1.0, "decibels": float("nan")}
        return sizes | distances(self.look, character(outputs(self.model, OTHER)))

    @torch.no_grad()
    def theirs(self, library: str, setting: str) -> dict[str, Any]:
        """Another library with one of its settings."""
        apply = partial(quantize_by, library, setting)
        small, left = quantize_layers(self.model, self.inputs, apply)
        return self._row(f"{library} {setting}", small, stored_bytes(small), layers_left_fp32=left)

    def ours(self, name: str, plan_of: Callable[[], Plan]) -> dict[str, Any]:
        """lafq with a plan."""
        small = quantize(self.model, plan_of())
        with TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            save_quantized(path, small, self.model, compress=True)
            file_mib = path.stat().st_size / MIB
        size = resident_bytes(small)
        return self._row(name, dequantize_(small), size, file_mib=file_mib)


def make_rows(model: nn.Module, known: Sensitivity, expected: Tensor) -> None:
    """The table results/terrain/terrain.csv and the figure.

    A row that is there is made again only where the figure needs its maps, kept in build/.
    """
    table, judge = Table("terrain", ("method", "format"), WORK), Judge(model, known, expected)
    table.add(("fp32", "other noise"), judge.other_noise)
    for key in THEIRS:
        table.add(key, judge.theirs, *key)
    for method, format, plan_of in plans(model, known):
        key, name = (method, format), f"{method} {format}"
        if key in table and key in DRAWN.values() and name not in judge.drawn:
            judge.ours(name, plan_of)
        table.add(key, judge.ours, name, plan_of)
        save_tensors(MAPS, judge.drawn)
    draw(table.frame, judge.drawn)


def by_passes(model: nn.Module, expected: Tensor) -> None:
    """results/terrain/passes.csv: decibels of the allocator's plan at INT4's bytes by passes."""

    def row(passes: int) -> dict[str, float]:
        known = sensitivity(model) if passes == PASSES else estimated(model, passes)
        mib = nbytes(model, dict.fromkeys(known.fisher, "int4")) / MIB
        plan = allocate(model, known, memory_mib=mib)
        mse = 2 * plan.damage / SIZE**2
        measured = decibels(expected, outputs(dequantize_(quantize(model, plan)), JUDGED))
        return {"decibels": measured, "predicted": 10 * np.log10(expected.var().item() / mse)}

    table = Table("passes", ("passes",), WORK)
    for passes in FEWER:
        table.add((passes,), row, passes)


def draw(table: pd.DataFrame, drawn: dict[str, Tensor]) -> None:
    """Maps by row: FP32, uniform INT4, the allocator at INT4's bytes and at a tenth of FP32's."""
    plot, axes = figure(len(DRAWN), SHOWN, figsize=(5.6, 7.2))
    by = table.set_index(["method", "format"])
    scale = heights(drawn[" ".join(FP32)]).max((1, 2))
    for row, (title, key) in zip(axes, DRAWN.items(), strict=True):
        if key != FP32:
            share, quality = by.loc[key, ["mem_share", "decibels"]]
            title += f"\n{share:.1%} of the bytes\n{quality:.1f} dB"
        for ax, z, top in zip(row, heights(drawn[" ".join(key)]), scale, strict=False):
            ax.imshow(z, cmap="viridis", vmin=0, vmax=top)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=8)
    plot.suptitle("Height maps from the same noise", fontsize=10)
    note = "colours from 0 to the highest point of the FP32 map"
    workspace.save_figure(WORK, "maps", plot, note, pixels=True, model="a public model of others")


def main() -> None:
    """Make the rows that are missing and the figure."""
    # The converter warns of what its resizing leaves out; `load` compares the output with ONNX
    # Runtime's.
    warnings.filterwarnings("ignore", module="onnx2pytorch")
    try:
        model = load()
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed: `make terrain` installs it") from None
    expected = outputs(model, JUDGED)
    make_rows(model, sensitivity(model), expected)
    by_passes(model, expected)


if __name__ == "__main__":
    sys.exit(run(main))
