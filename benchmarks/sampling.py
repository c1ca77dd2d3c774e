"""Sensitivities that know the sampler, judged by images: python benchmarks/sampling.py TABLE, of
the diffusion model of width 16 in 50 steps, in one of

timesteps: what noise in eps at one step alone does to each image.
chosen: plans from every sensitivity, on images from the noise by which we chose among them.
fresh: plans from the chosen one and from today's, on noise never used before; transfer: the same
    plans under the deterministic sampler, which no sensitivity knows.

An image's *response* is its squared error over that of eps, from noise in eps at every step. A few
images that stand between two digits respond a thousand times as much as the typical one and would
decide everything: where images count *alike*, each is divided by the root of its response.

Estimates and what is measured of a plan are kept in build/benchmarks, so an interrupted run goes
on. Each process computes on one thread.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from shared import DIGITS, SEED, WORK, Subject, figure, run
from torch import Tensor, nn

from lafq.allocation import allocate as solver
from lafq.allocation.coded import allocate_coded
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, nbytes, quantize
from lafq.quantization.plan import Plan
from lafq.rng import generator
from lafq.study.damage import HALF_PIXELS
from lafq.study.diffusion import ddpm
from lafq.study.diffusion.subject import mnist, quantizable
from lafq.study.figures import plots
from lafq.study.images import metrics
from lafq.study.images.features import mnist_extractor
from lafq.study.long_runs import one_process_per_core
from lafq.study.rows import kept, mib_at
from lafq.study.workspace import (
    compute_on,
    load_optional,
    load_table,
    save_arrays,
    save_figure,
    save_table,
)

STEPS, SIZE = 50, 3e-3  # sampling steps; standard deviation of the noise in eps
# Seeds of noise: of estimates (plus the estimate's own), of the choice between them, of the report.
ESTIMATED, NOISES = 10, {"chosen": 20, "fresh": 21, "transfer": 22}
IMAGES = {"chosen": 200, "fresh": 1000, "transfer": 200}
SAMPLERS = {"ddpm": ddpm.ancestral_step, "ddim": ddpm.ddim_step}
LOOKED_AT, SHOWN = 40, 12  # images whose timesteps are told apart; of a row of the picture
DRAWS, PASS = 2000, 2  # noised digits or states of an estimate; images of a pass of the sampler
FILE_BITS = 2.8
FILE = f"file of {FILE_BITS:g} bits"
FLOOR = 0.1  # of the median error, below which an image counts no more
TODAY, ALIKE = "noised digits", "whole sampler, alike"
KEY = ("noise", "sampler", "sensitivity", "seed", "size")


def scaled(model: nn.Module, noise: Tensor, scale: Tensor) -> Tensor:
    """The images, each times its scale."""
    return ddpm.sampler(model, noise) * scale.view(-1, 1, 1, 1)


def disturbed(model: nn.Module, at: Iterable[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The model with noise of SIZE in eps at these timesteps, the same for every batch."""

    def noisy(x: Tensor, t: Tensor) -> Tensor:
        eps, step = model(x, t), int(t[0])
        noise = torch.randn(x.shape, generator=generator(ESTIMATED, step))
        return eps + SIZE * noise if step in at else eps

    return noisy


class Sampled(Subject):
    """The model, its images, and every estimate of its sensitivity."""

    def __init__(self) -> None:
        super().__init__(16, DIGITS[16])
        self.names, self.times = list(quantizable(self.model)), ddpm.trailing_timesteps(STEPS)

    @torch.inference_mode()
    def images(self, model: Callable, noise: Tensor, sampler: str = "ddpm") -> Tensor:
        """Images (N, 1, 32, 32) in [0, 1]."""
        step = SAMPLERS[sampler]
        return torch.cat([ddpm.sampler(model, n, step).clamp(0, 1) for n in noise.split(100)])

    def response(self, noise: Tensor, at: Iterable[int], whole: Tensor) -> Tensor:
        """The response (N,) of FP32's images to noise at these timesteps."""
        change = self.images(disturbed(self.model, at), noise) - whole
        return change.square().flatten(1).mean(1) / SIZE**2

    def timesteps(self) -> pd.DataFrame:
        """The response of every image to noise at every second step alone, and at the last."""
        noise = ddpm.sampler_noise(range(LOOKED_AT), STEPS, ESTIMATED)
        whole = self.images(self.model, noise)
        at = *self.times[::2], self.times[-1]
        table = pd.DataFrame({t: self.response(noise, [t], whole) for t in at})
        return table.rename_axis("image").reset_index().melt("image", None, "t", "response")

    @cached_property
    def weights(self) -> np.ndarray:
        """That table with the steps between: (images, steps)."""
        table = load_table(WORK, "timesteps").pivot(index="image", columns="t", values="response")
        logs = np.log(table.to_numpy().clip(1e-12))
        return np.exp([np.interp(self.times, table.columns, row) for row in logs])

    def on_digits(self, seed: int, draws: int = DRAWS, by: Callable | None = None) -> Sensitivity:
        """From noised digits; `by` weighs the timesteps from the responses (images, steps)."""
        if by is None:
            return self.sensitivity(draws, seed, names=self.names)
        g, digits = generator(seed, ESTIMATED), mnist(train=True)[0]
        t = self._drawn(by(self.weights, axis=0)[None], draws, g)[1]
        x_0 = ddpm.unit_interval(digits[torch.randint(len(digits), (draws,), generator=g)])
        t = torch.tensor(self.times)[t]
        return self._estimate(ddpm.add_noise(x_0, t, torch.randn(x_0.shape, generator=g)), t, seed)

    def on_states(self, seed: int, by: Callable) -> Sensitivity:
        """From states of the reverse process of the images looked at, drawn by weights."""
        noise = ddpm.sampler_noise(range(LOOKED_AT), STEPS, ESTIMATED)
        with torch.no_grad():
            *states, _ = (x for _, x in ddpm.reverse_process(self.model, noise))
        weights = np.broadcast_to(by(self.weights, axis=0), self.weights.shape)
        i, t = self._drawn(weights, DRAWS, generator(seed, ESTIMATED))
        return self._estimate(torch.stack(states)[t, i], torch.tensor(self.times)[t], seed)

    def _drawn(self, weights: np.ndarray, draws: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        flat = torch.from_numpy(weights.reshape(-1).copy())
        chosen = torch.multinomial(flat, draws, replacement=True, generator=g)
        return chosen // STEPS, chosen % STEPS

    def _estimate(self, x: Tensor, t: Tensor, seed: int) -> Sensitivity:
        batches = zip(x.split(ddpm.BATCH), t.split(ddpm.BATCH), strict=True)
        return estimate_sensitivity(self.model, batches, seed, self.names)

    def whole(self, seed: int, images: int = 128, scale: str = "alike") -> Sensitivity:
        """Through the whole sampler."""
        noise = ddpm.sampler_noise(range(images), STEPS, ESTIMATED + seed)
        whole, error = self.images(self.model, noise), torch.ones(images)
        if scale == "alike":
            error = self.response(noise, self.times, whole)
        elif scale != "equal":  # the error of the plan of another estimate at INT4's bytes
            small = self.quantized(next(self.plans(scale, seed, ["int4"])))
            error = (self.images(small, noise) - whole).square().flatten(1).mean(1)
        error = error.clamp_min(FLOOR * error.median())
        batches = zip(noise.split(PASS), error.rsqrt().split(PASS), strict=True)
        return estimate_sensitivity(self.model, batches, seed, self.names, through=scaled)

    def known(self, name: str, seed: int = 0) -> Sensitivity:
        """An estimate by its name in ESTIMATES, kept."""
        words = f"{name.replace(' ', '_').replace(',', '')}_{seed}"
        return kept(WORK, words, partial(ESTIMATES[name], self, seed))

    def plans(self, name: str, seed: int, sizes: Iterable[str]) -> Iterator[Plan]:
        """At the bytes of uniform formats, or at bits per weight of a file."""
        if name == "uniform":
            yield from (Plan(dict.fromkeys(self.names, size)) for size in sizes)
            return
        known, frontiers = self.known(name, seed), None
        for size in sizes:
            if size == FILE:
                mib = mib_at(self.model, FILE_BITS)
                yield allocate_coded(self.model, known, mib, progress=False)
            else:
                frontiers = frontiers or solver.frontiers_of(self.model, known, progress=False)
                mib = nbytes(self.model, dict.fromkeys(self.names, size)) / MIB
                yield solver.solve_budget(self.model, frontiers, mib, known.recipe)

    def quantized(self, plan: Plan) -> nn.Module:
        """The copy under a plan, in FP32."""
        return dequantize_(quantize(self.model, plan))


def _alike(weights: np.ndarray, axis: int) -> np.ndarray:
    """Every image's weights over their sum: which of its timesteps matter, images alike."""
    return weights / weights.sum(1, keepdims=True)


def _mixed(fisher: str, curvature: str, sampled: Sampled, seed: int) -> Sensitivity:
    return Sensitivity(sampled.known(fisher, seed).fisher, sampled.known(curvature, seed).curvature)


ERROR = "whole sampler, by error"
ESTIMATES: dict[str, Callable[..., Sensitivity]] = {
    TODAY: Sampled.on_digits,
    "noised digits, 8,000": partial(Sampled.on_digits, draws=8000),
    "noised digits, t by mean": partial(Sampled.on_digits, by=np.mean),
    "noised digits, t by mean, 8,000": partial(Sampled.on_digits, by=np.mean, draws=8000),
    "states, t by mean": partial(Sampled.on_states, by=np.mean),
    "states, t by median": partial(Sampled.on_states, by=np.median),
    "states, images alike": partial(Sampled.on_states, by=_alike),
    "whole sampler": partial(Sampled.whole, scale="equal"),
    ALIKE: Sampled.whole,
    ERROR: partial(Sampled.whole, scale=TODAY),
    "digits' Fisher, sampler's curvature": partial(_mixed, TODAY, ALIKE),
    "sampler's Fisher, digits' curvature": partial(_mixed, ALIKE, TODAY),
}
# The rows of the picture after FP32's: sensitivity, its seed, size.
PICTURE = {
    "uniform INT8": ("uniform", 0, "int8"),
    "uniform INT4": ("uniform", 0, "int4"),
    "lafq, bytes of INT4": (ALIKE, 0, "int4"),
    "lafq, file": (ALIKE, 0, FILE),
}
# Of every table: sampler, sensitivity, its seed, sizes.
Asked = tuple[str, str, int, tuple[str, ...]]
ROWS: dict[str, list[Asked]] = {
    "chosen": [
        *(("ddpm", name, 0, ("int6", "int4")) for name in ("uniform", *ESTIMATES)),
        ("ddpm", ALIKE, 1, ("int4",)),
    ],
    "fresh": [
        ("ddpm", "uniform", 0, ("int8", "int6", "int4")),
        *(("ddpm", name, 0, ("int8", "int6", "int4", FILE)) for name in (TODAY, ALIKE)),
    ],
    "transfer": [("ddim", name, 0, ("int6", "int4")) for name in (TODAY, ALIKE)],
}


@cache
def subject() -> Sampled:
    """The model of this process, which computes on one thread."""
    compute_on(1, "cpu")
    return Sampled()


@cache
def reference(noise: str, sampler: str) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of IMAGES, FP32's images of it, and the digits seen in them."""
    drawn = ddpm.sampler_noise(range(IMAGES[noise]), STEPS, NOISES[noise])
    images = subject().images(subject().model, drawn, sampler)
    return drawn, images, digits_in(images)


def digits_in(images: Tensor) -> Tensor:
    """What the classifier sees in images in [0, 1]."""
    return mnist_extractor().features((images * 255).round().to(torch.uint8)).logits.argmax(1)


def kept_file(noise: str, sampler: str, name: str, seed: int, size: str) -> Path:
    """Where what is measured of a plan is kept."""
    return WORK.build / "sampling" / f"{noise}_{sampler}_{name}_{seed}_{size}.npz"


def measure(noise: str, asked: Asked) -> None:
    """Of the plan at each size: bytes, damage, and by image error, PSNR and whether the digit
    changes.
    """
    *key, sizes = asked
    if not (sizes := [size for size in sizes if not kept_file(noise, *key, size).is_file()]):
        return
    one, (drawn, whole, digits) = subject(), reference(noise, key[0])
    for size, plan in zip(sizes, one.plans(*key[1:], sizes), strict=True):
        small = one.quantized(plan)
        images = one.images(small, drawn, key[0])
        arrays = {
            "psnr": metrics.image_psnr(images, whole),
            "error": (images - whole).square().flatten(1).mean(1),
            "changed": digits_in(images) != digits,
            "mib": (getattr(plan, "file_bytes", 0) or nbytes(one.model, plan)) / MIB,
            "damage": one.errors(small).mean(),
            "predicted": getattr(plan, "damage", np.nan) / HALF_PIXELS,
            "shown": torch.stack((whole, images))[:, :SHOWN, 0],
        }
        save_arrays(kept_file(noise, *key, size), {n: np.asarray(a) for n, a in arrays.items()})
        print(noise, *key, size, arrays["psnr"].mean().item(), flush=True)


def lines(noise: str) -> Iterator[dict[str, Any]]:
    """The rows of a table. image_psnr: mean over images, with its interval; gain: its paired
    difference from today's plan of the same size; psnr: over all pixels; predicted: the plan's own
    damage, of images over their response where they count alike.
    """
    indices = metrics.resamples(IMAGES[noise], SEED)
    for *key, sizes in ROWS[noise]:
        for size in sizes:
            row = np.load(kept_file(noise, *key, size))
            today = kept_file(noise, key[0], TODAY, 0, size)
            before = np.load(today)["psnr"] if today.is_file() else np.nan
            psnr, gain = (torch.from_numpy(x) for x in (row["psnr"], row["psnr"] - before))
            line = dict(zip(KEY, (noise, *key, size), strict=True)) | {"mib": row["mib"].item()}
            for name, values in (("image_psnr", psnr), ("gain", gain)):
                draws = metrics.mean_draws(values, indices)
                line |= metrics.with_interval(name, values.double().mean().item(), draws)
            below, of_all = (psnr < 30).double().mean().item(), -10 * np.log10(row["error"].mean())
            line |= {"psnr": of_all, "below_30": below, "digits_changed": row["changed"].mean()}
            yield line | {"images": len(psnr)} | {n: row[n].item() for n in ("damage", "predicted")}


def judged(noise: str) -> None:
    """Measure every plan on a noise, a process per core, and write its rows of sampling.csv."""
    with one_process_per_core() as pool:
        list(pool.map(partial(measure, noise), ROWS[noise]))
    table, known = pd.DataFrame(lines(noise)), load_optional(WORK, "sampling")
    others = pd.DataFrame() if known is None else known[known["noise"] != noise]
    whole = pd.concat([others, table])
    order = whole["noise"].map(list(ROWS).index)
    save_table(WORK, "sampling", whole.iloc[order.argsort(kind="stable")])
    if noise == "fresh":
        picture()


def picture() -> None:
    """Digits of FP32 and of plans from the same noise, as README shows them."""
    kept_rows = [np.load(kept_file("fresh", "ddpm", *key)) for key in PICTURE.values()]
    rows = {"FP32": kept_rows[0]["shown"][0]}
    for title, row in zip(PICTURE, kept_rows, strict=True):
        rows[f"{title}\n{row['mib']:.2f} MiB"] = row["shown"][1]
    strip, axes = figure(len(rows), 1, figsize=(10, 0.85 * len(rows)))
    for ax, (title, shown) in zip(axes, rows.items(), strict=True):
        plots.digits(ax, (shown * 255).round(), SHOWN)
        ax.set_ylabel(title, rotation=0, ha="right", va="center")
    save_figure(WORK, "digits", strip, "the same noise", pixels=True, model="width 16, 50 steps")


def timesteps() -> None:
    """The table of responses by timestep."""
    save_table(WORK, "timesteps", Sampled().timesteps())


TABLES = {"timesteps": timesteps} | {noise: partial(judged, noise) for noise in ROWS}

if __name__ == "__main__":
    sys.exit(run(TABLES[sys.argv[1]]))
