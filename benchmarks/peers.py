"""The allocator beside other libraries at equal bytes, and the ladder from one of them to it:
`make peers` writes results/benchmarks/peers.csv, ladder.csv and a figure.

Each library quantizes the diffusion model beside packages of its own (`peer.py`), and its weights
are judged here: damage on held-out digits and noise that no plan has seen. The allocator then gets
exactly the library's bytes, once for all weights and once for the weights that the library
quantized. Rows that are there already are left alone.
"""

import hashlib
import os
import subprocess
import sys
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peer import LIBRARIES
from shared import DIGITS, PROFILES, SAMPLES, SEED, WORK, Subject, Table, figure, in_a_process, run
from torch import Tensor, nn

from lafq.allocation import allocate as solver
from lafq.quantization.formats import MIB, bit_bytes
from lafq.quantization.model import dequantize_, nbytes, quantize
from lafq.quantization.plan import Plan
from lafq.study import workspace
from lafq.study.damage import FRESH_SEED, HALF_PIXELS, over, rungs
from lafq.study.diffusion.ddpm import sampler, sampler_noise
from lafq.study.diffusion.subject import load_model, quantizable
from lafq.study.images.metrics import image_psnr
from lafq.study.workspace import Workspace
from lafq.tensors import load_tensors

HERE = Path(__file__).parent
BITS = (8, 6, 4, 3, 2)
OURS, ALLOCATOR = "lafq, uniform", "lafq, allocator"
SCALE_BYTES = 2  # a scale counts as FP16, as ours do
# By library and width the bits, where all would take hours.
FEWER = {("aimet-torch", 16): (4, 2), ("brevitas", 64): (4,), ("aimet-torch", 64): ()}
FEWER |= {(name, 64): () for name in ("coremltools", "torchao, HQQ scales", "nncodec", "sdnq")}
FIRST = "nvidia-modelopt"  # the lowest rung
IMAGES, STEPS = 100, 50  # of image_psnr


def installed(library: str) -> Path:
    """The folder with a library and what it needs beside .venv, pinned in requirements-peers/."""
    library = library.partition(",")[0]
    pinned = HERE / "requirements-peers" / f"{library}.txt"
    digest = hashlib.sha256(pinned.read_bytes()).hexdigest()[:8]
    folder = WORK.build / "peers" / f"{library}-{digest}"
    if not folder.is_dir():
        # An interrupted installation is not taken for a whole one.
        whole = folder.with_suffix(".part")
        options = ["--quiet", "--no-deps", "--upgrade", "--target", str(whole)]
        command = [sys.executable, "-m", "pip", "install", *options, "-r", str(pinned)]
        subprocess.run(command, check=True)
        whole.rename(folder)
    return folder


def stored_bytes(model: nn.Module, stored: dict[str, tuple[float, int, int]]) -> int:
    """Bytes that must be stored, what is not quantized in FP32.

    stored: by parameter name the bits per code (or zero point), the scales and the zero points.
    """
    total = nbytes(model, {})
    for name, (bits, scales, zero_points) in stored.items():
        count = model.get_parameter(name).numel()
        codes = 8 * bit_bytes(int(bits), count) if bits % 1 == 0 else bits * count
        total += codes / 8 + bit_bytes(int(bits), zero_points)
        total += SCALE_BYTES * scales - 4 * count
    return round(total)


def quantized_by(library: str, width: int, bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that a library quantized, and what it says of them; or its error."""
    path = WORK.build / "peers" / f"{library}-{width}-{bits}.safetensors"
    if not path.is_file():
        search = os.pathsep.join((str(installed(library)), os.environ.get("PYTHONPATH", "")))
        asked = (HERE / "peer.py", library, width, bits, SAMPLES[width], path)
        in_a_process(*asked, environment={"PYTHONPATH": search})
    return load_tensors(path, "make peers")


class Judge(Subject):
    """The diffusion model of one width, and its sensitivity."""

    rungs = cached_property(lambda self: rungs(self.model, self.known))
    reference = cached_property(lambda self: self.images(self.model))

    def __init__(self, width: int) -> None:
        super().__init__(width, DIGITS[width], SEED + FRESH_SEED)
        self.known = known = self.sensitivity(SAMPLES[width])
        self.fronts, self.recipe = solver.frontiers_of(self.model, known), known.recipe

    @torch.inference_mode()
    def images(self, model: nn.Module) -> Tensor:
        """Images (IMAGES, 1, 32, 32) in [0, 1], from the same noise for every model."""
        return sampler(model, sampler_noise(range(IMAGES), STEPS, SEED)).clamp(0, 1)

    def psnr(self, whole: nn.Module) -> float:
        """Mean over images of the PSNR to FP32's image from the same noise, in dB."""
        return image_psnr(self.images(whole), self.reference).mean().item()

    def of(self, library: str, bits: int) -> dict[str, Any]:
        """A library's row; its error where it fails. OURS: lafq without the allocator, rounded to
        the nearest code.
        """
        if library == OURS:
            plan = Plan(dict.fromkeys(self.fronts, f"int{bits}"))
            whole = dequantize_(quantize(self.model, plan))
            return self._row("", nbytes(self.model, plan), whole, set(self.fronts))
        try:
            weights, about = quantized_by(library, self.width, bits)
        except RuntimeError as error:
            return {"error": str(error)}
        whole = load_model(Workspace(PROFILES[self.width]), self.width)
        whole.load_state_dict(weights, strict=False)
        size = stored_bytes(self.model, about["stored"])
        return self._row(about["version"], size, whole, set(weights))

    def _row(self, version: str, size: int, whole: nn.Module, names: set[str]) -> dict[str, Any]:
        """Bytes and damage, and over it the allocator's at these bytes, paired over the digits: in
        a plan for all weights, and for those that the library quantized; in a file, where the
        library packed all parameters into one.
        """
        theirs, full = self.errors(whole), nbytes(self.model, {})
        row = {"version": version, "mem_mib": size / MIB, "mem_share": size / full}
        row |= {"tensors_fp32": len(self.fronts.keys() - names), "damage": theirs.mean().item()}
        for name, chosen in (("all", set(self.fronts)), ("shared", names)):
            if names <= self.fronts.keys():
                fronts = {n: front for n, front in self.fronts.items() if n in chosen}
                plan = solver.solve_budget(self.model, fronts, size / MIB, self.recipe)
            else:
                plan = solver.allocate_coded(self.model, self.known, size / MIB, progress=False)
            ours = self.planned(plan)
            row[f"damage_{name}"] = ours.mean().item()
            row |= over(f"over_{name}", ours, theirs, SEED)
        return row | {"image_psnr": self.psnr(whole)}

    def ladder(self, table: Table, bits: int) -> None:
        """Add FIRST and our plans of its bytes: damage over FIRST's, paired over the digits. Input
        and output convolutions, and layers that FIRST leaves alone, count as FP16.
        """
        weights, about = quantized_by(FIRST, self.width, bits)
        layers, edges = quantizable(self.model), self.fronts.keys() - quantizable(self.model)
        stored = {n: s for n, s in about["stored"].items() if n in layers}
        size = stored_bytes(self.model, dict.fromkeys(self.fronts, (16, 0, 0)) | stored)
        first = dequantize_(quantize(self.model, dict.fromkeys(self.fronts, "fp16")))
        first.load_state_dict({n: weights[n] for n in stored}, strict=False)
        theirs, rest = self.errors(first), sum(2 * self.known.fisher[n].numel() for n in edges)

        def row(whole: nn.Module, size: int, predicted: float) -> dict[str, Any]:
            errors = self.errors(whole)
            row = {"mem_mib": size / MIB, "predicted": predicted, "damage": errors.mean().item()}
            return row | over("over", errors, theirs, SEED) | {"image_psnr": self.psnr(whole)}

        table.add((self.width, bits, FIRST), row, first, size, float("nan"))
        for rung, (fronts, recipe) in self.rungs.items():
            within = {n: fronts[n] for n in layers}
            plan = solver.solve_budget(self.model, within, (size + rest) / MIB, recipe)
            whole_plan = plan.with_entries(dict.fromkeys(edges, "fp16"))
            whole = dequantize_(quantize(self.model, whole_plan))
            size_of = nbytes(self.model, whole_plan)
            table.add((self.width, bits, rung), row, whole, size_of, plan.damage / HALF_PIXELS)


def draw(table: pd.DataFrame) -> None:
    """Damage over stored MiB by width."""
    rows = table[table["damage"].notna()].sort_values("mem_mib")
    plot, axes = figure(1, rows["width"].nunique(), figsize=(9.5, 4), squeeze=False)
    for ax, (width, part) in zip(axes[0], rows.groupby("width"), strict=True):
        for i, (library, marker) in enumerate(zip((OURS, *LIBRARIES), "sv^XP*odp<", strict=True)):
            line = part[part["library"] == library]
            label = library if ax is axes[0, 0] else ""  # where all libraries were run
            ax.plot("mem_mib", "damage", f"C{i}{marker}:", data=line, ms=5, lw=1, label=label)
        in_memory = part[part["library"] != "nncodec"]  # beside which stands our coded file
        ax.plot("mem_mib", "damage_all", "kD-", data=in_memory, ms=4, label=label and ALLOCATOR)
        ax.set(xscale="log", yscale="log", xlabel="stored MiB", title=f"width {width}")
        ax.xaxis.set_major_formatter("{x:.2g}")
        ax.xaxis.set_minor_formatter("{x:.2g}")
        ax.tick_params(axis="x", which="both", labelsize=8)
    axes[0, 0].set_ylabel("damage (mean squared change of the output)")
    plot.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    workspace.save_figure(WORK, "peers", plot, "held-out digits and noise that no plan has seen")


def main() -> None:
    """Make the rows that are missing and the figure."""
    table, judge = Table("peers", ("width", "library", "bits")), cache(Judge)

    def row(width: int, library: str, bits: int) -> dict[str, Any]:
        return judge(width).of(library, bits)

    for width, library in product(PROFILES, (OURS, *LIBRARIES)):
        for bits in FEWER.get((library, width), BITS):
            table.add((key := (width, library, bits)), row, *key)
    ladder = Table("ladder", ("width", "bits", "rung"))
    for bits in BITS:
        if (16, bits, "mixed") not in ladder:
            judge(16).ladder(ladder, bits)
    draw(table.frame)


if __name__ == "__main__":
    sys.exit(run(main))
