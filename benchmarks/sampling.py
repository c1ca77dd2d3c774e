"""Sensitivities that know the sampler, judged by images: python benchmarks/sampling.py TABLE, of
the diffusion model of width 16 in 50 steps, in one of

timesteps: what noise in eps at one step alone does to each image.
chosen: plans from every sensitivity, on images from the noise by which we chose among them.
fresh: plans from the chosen one and from today's, uniform formats and threshold rules, on noise
    never used before, with FID; transfer: the plans under the deterministic sampler, which no
    sensitivity knows.

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
from lafq.allocation.rules import RULES
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, nbytes, quantize
from lafq.quantization.plan import Plan
from lafq.rng import generator
from lafq.study.budget_rows import bits_of, free_groups, kept, mib_at, rules_at_bits
from lafq.study.damage import HALF_PIXELS
from lafq.study.diffusion import ddpm
from lafq.study.diffusion.subject import mnist, quantizable
from lafq.study.figures import plots
from lafq.study.images import evaluate, metrics
from lafq.study.images.evaluate import Measured
from lafq.study.images.features import mnist_extractor
from lafq.study.long_runs import one_process_per_core
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
FP32 = ("FP32", 0, "")  # in place of sensitivity, seed and size
FIDS = ("delta_fid_mnist", "delta_fid_mnist_low", "delta_fid_mnist_high")


def scaled(model: nn.Module, noise: Tensor, scale: Tensor) -> Tensor:
    """The images, each times its scale."""
    return ddpm.sampler(model, noise) * scale.view(-1, 1, 1, 1)


def floored(error: Tensor) -> Tensor:
    """Of every image, at least FLOOR of the median."""
    return error.clamp_min(FLOOR * error.median())


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

    def response(
        self, noise: Tensor, at: Iterable[int], whole: Tensor, sampler: str = "ddpm"
    ) -> Tensor:
        """The response (N,) of FP32's images to noise at these timesteps."""
        change = self.images(disturbed(self.model, at), noise, sampler) - whole
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
        batches = zip(noise.split(PASS), floored(error).rsqrt().split(PASS), strict=True)
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
        known, frontiers = self.known(name if name in ESTIMATES else TODAY, seed), None
        for size in sizes:
            bits = bits_of(self.model, dict.fromkeys(self.names, size)) if size != FILE else 0.0
            if name == "uniform, error feedback":
                yield Plan(dict.fromkeys(self.names, size), known.recipe)
            elif name == "free":
                yield free_groups(self.model, known, bits).plan
            elif name in RULES:
                rows = rules_at_bits(self.model, known, [bits], SEED, [name])
                yield next(row.plan for row in rows if row.rounding == "feedback")
            elif size == FILE:
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
# Rounded with error feedback, as the allocator's plans are, and of noised digits' Fisher values.
ROUNDED_ALIKE = ("uniform, error feedback", "global", "group", "free", "ratio")
# The rows of the picture after FP32's: sensitivity, its seed, size.
PICTURE = {
    "INT8, nearest codes": ("uniform", 0, "int8"),
    "INT4, nearest codes": ("uniform", 0, "int4"),
    "INT4, error feedback": ("uniform, error feedback", 0, "int4"),
    "lafq, bytes of INT4": (ALIKE, 0, "int4"),
    "lafq, file on disk": (ALIKE, 0, FILE),
}
# Of every table: sampler, sensitivity, its seed, sizes.
Asked = tuple[str, str, int, tuple[str, ...]]
ROWS: dict[str, list[Asked]] = {
    "chosen": [
        *(("ddpm", name, 0, ("int6", "int4")) for name in ("uniform", *ESTIMATES)),
        ("ddpm", ALIKE, 1, ("int4",)),
    ],
    "fresh": [
        ("ddpm", "uniform", 0, ("int8", "int6", "int4", "int3")),
        *(("ddpm", name, 0, ("int8", "int6", "int4", FILE, "int3")) for name in (TODAY, ALIKE)),
        *(("ddpm", name, 0, ("int8", "int6", "int4", "int3")) for name in ROUNDED_ALIKE),
    ],
    "transfer": [("ddim", name, 0, ("int6", "int4")) for name in (TODAY, ALIKE)],
}


@cache
def subject() -> Sampled:
    """The model of this process, which computes on one thread."""
    compute_on(1, "cpu")
    return Sampled()


@cache
def noise_of(noise: str) -> Tensor:
    """The noise of IMAGES."""
    return ddpm.sampler_noise(range(IMAGES[noise]), STEPS, NOISES[noise])


def kept_file(noise: str, sampler: str, name: str, seed: int, size: str) -> Path:
    """Where what is measured of a plan is kept."""
    return WORK.build / "sampling" / f"{noise}_{sampler}_{name}_{seed}_{size}.npz"


def measure(noise: str, asked: Asked) -> None:
    """Draw and keep the images of FP32, with their response, and of the plan at each size, with its
    bytes and damage.
    """
    sampler, *key, sizes = asked
    whole = kept_file(noise, sampler, *FP32)
    one = subject()
    if not whole.is_file():
        images = one.images(one.model, noise_of(noise), sampler)
        response = one.response(noise_of(noise), one.times, images, sampler)
        save_arrays(whole, {"images": images.numpy(), "response": response.numpy()})
    if not (sizes := [s for s in sizes if not kept_file(noise, sampler, *key, s).is_file()]):
        return
    for size, plan in zip(sizes, one.plans(*key, sizes), strict=True):
        small = one.quantized(plan)
        arrays = {
            "images": one.images(small, noise_of(noise), sampler),
            "mib": (getattr(plan, "file_bytes", 0) or nbytes(one.model, plan)) / MIB,
            "damage": one.errors(small).mean(),
            "predicted": getattr(plan, "damage", np.nan) / HALF_PIXELS,
        }
        path = kept_file(noise, sampler, *key, size)
        save_arrays(path, {name: np.asarray(array) for name, array in arrays.items()})
        print(path.stem, flush=True)


def seen(images: Tensor, noise: str) -> Measured:
    """What the classifier makes of images in [0, 1]; scores, where there are enough for FID."""
    pixels = (images * 255).round().to(torch.uint8)
    if noise == "fresh":
        return evaluate.measure(pixels, [mnist_extractor()], SEED)
    return Measured(pixels, mnist_extractor().features(pixels).logits.argmax(1), {}, {})


def lines(noise: str) -> Iterator[dict[str, Any]]:
    """The rows of a table. Columns of `evaluate`, of images that are not rounded; gain: image_psnr
    less that of today's plan of the same size, paired; over_response: mean over images of the error
    over the response; predicted: the plan's own damage, which is that where images count alike.
    """
    indices = metrics.resamples(IMAGES[noise], SEED)
    known = {s: load_images(kept_file(noise, s, *FP32)) for s in {row[0] for row in ROWS[noise]}}
    wholes = {sampler: (images, seen(images, noise)) for sampler, images in known.items()}
    for sampler, *key, sizes in ROWS[noise]:
        whole, baseline = wholes[sampler]
        response = floored(torch.from_numpy(np.load(kept_file(noise, sampler, *FP32))["response"]))
        for size in sizes:
            path, today = (kept_file(noise, sampler, *k, size) for k in (key, (TODAY, 0)))
            images, kept_row = load_images(path), np.load(path)
            compared = evaluate.compare(seen(images, noise), baseline, SEED)
            line = dict(zip(KEY, (noise, sampler, *key, size), strict=True))
            line |= {"mib": kept_row["mib"].item()} | evaluate.image_error(images, whole, SEED)
            if today.is_file():
                before = metrics.image_psnr(load_images(today), whole)
                gain = metrics.image_psnr(images, whole) - before
                draws = metrics.mean_draws(gain, indices)
                line |= metrics.with_interval("gain", gain.double().mean().item(), draws)
            line |= {n: v for n, v in compared.items() if n in (*FIDS, "class_changed")}
            line |= {"images": len(images), "damage": kept_row["damage"].item()}
            errors = (images - whole).square().flatten(1).mean(1)
            line["over_response"] = (errors / response).mean().item()
            yield line | {"predicted": kept_row["predicted"].item()}


def load_images(path: Path) -> Tensor:
    """The images that `measure` kept."""
    return torch.from_numpy(np.load(path)["images"])


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
    table = load_table(WORK, "sampling").query("noise == 'fresh'").set_index(list(KEY[2:]))
    rows = {"FP32": load_images(kept_file("fresh", "ddpm", *FP32))[:SHOWN]}
    for title, key in PICTURE.items():
        mib, changed = table.loc[key, ["mib", "class_changed"]]
        images = load_images(kept_file("fresh", "ddpm", *key))[:SHOWN]
        rows[f"{title}\n{mib:.2f} MiB, {changed:.0%} changed"] = images
    strip, axes = figure(len(rows), 1, figsize=(10, 0.85 * len(rows)))
    for ax, (title, images) in zip(axes, rows.items(), strict=True):
        plots.digits(ax, (images[:, 0] * 255).round().numpy(), SHOWN)
        ax.set_ylabel(title, rotation=0, ha="right", va="center")
    note = "changed: digits, of 1,000, that our classifier reads differently"
    save_figure(WORK, "digits", strip, note, pixels=True, model="width 16, 50 steps")


def timesteps() -> None:
    """The table of responses by timestep."""
    save_table(WORK, "timesteps", Sampled().timesteps())


TABLES = {"timesteps": timesteps} | {noise: partial(judged, noise) for noise in ROWS}

if __name__ == "__main__":
    sys.exit(run(TABLES[sys.argv[1]]))
