"""What quantized models and the ways to them cost: python benchmarks/cost.py TABLE, in one of

running: one forward pass of the trained models, batches of 1 and 100 noised digits. Packed models
    unpack one layer at a time, "dequantized" was unpacked when it was loaded. Times are medians of
    ratios to an FP32 pass run just before.
fisher: diagonal Fisher information by method. cost_ratio: per pass, over one ordinary batched
    forward and backward pass. relative_error: of one pass over one batch, the mean over the weight
    tensors of |tensor's sum / exact sum - 1|. Exact is, for the empirical Fisher, the loop over
    single samples; for the true Fisher, the mean over 64 other draws on the same batch.
allocation: an allocation of the width-64 model, from random values.
binder: committed notebooks under what Binder gives, one core and 2 GiB of data for a process
    (RLIMIT_DATA; what needs more fails). peak_mib: the largest resident set of a process (Linux).
growth: each step of a user's work, on U-Nets of five widths with random weights. peak_mib: above
    the model, its inputs and the libraries (Linux). Rows that are there already are left alone.
peak_memory: of sampling a digit from a packed model, for the rows of the poster's table and, in
    results/small/files_peak_memory.csv, the files of files: above the interpreter with its
    libraries, on a CPU by the resident set (Linux). It varies by some tenths of a MiB.
"""

import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from shared import PROFILES, Table, in_a_process, run, seconds, time_ratio, write
from torch import Tensor, nn

from lafq import allocate, estimate_sensitivity, load_quantized, quantize, save_quantized
from lafq.allocation.allocate import ALLOCATED
from lafq.fisher.empirical import empirical_fisher
from lafq.fisher.sensitivity import CHANNELS, LARGEST, Sensitivity
from lafq.fisher.shrinkage import Moments
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, resident_bytes
from lafq.rng import generator
from lafq.study import budget_rows, results, workspace
from lafq.study import rows as study_rows
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import add_noise, sample, unit_interval
from lafq.study.diffusion.subject import HELD_OUT, UNet, load_fisher, load_model, mnist, quantizable
from lafq.study.workspace import Workspace, profile_parameters, save_table

FORMATS = ("fp16", "int8", "int4", "int2")
RUNNING_ROUNDS = {(16, 1): 15, (16, 100): 5, (64, 1): 5, (64, 100): 1}
FISHER_BATCH, FISHER_ROUNDS = {16: 32, 64: 8}, {16: 7, 64: 3}
DRAWS = 64
CURVED_PASSES = 8  # the curvature's last step comes once for all passes
ALLOCATED_MIB = 17.0
WIDTHS = (8, 16, 32, 64, 128)
STEPS = ("estimate_sensitivity", "allocate", "quantize", "save_quantized", "load_quantized")
PASSES, BATCH, BITS = 2, 8, 4.0
LIMIT = 2 * 2**30
EXECUTE = """
import nbformat, resource, sys
from nbclient import NotebookClient

notebook, resources = nbformat.read(sys.argv[1], as_version=4), {"metadata": {"path": sys.argv[2]}}
NotebookClient(notebook, resources=resources).execute()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
# glibc then returns what is freed at once: the peak is of live memory, not of the allocator's
# habits.
MALLOC = {"ARENA_MAX": "1", "MMAP_THRESHOLD_": str(2**16), "TRIM_THRESHOLD_": "0"}
Fisher = dict[str, Tensor]


@torch.no_grad()
def running_rows(width: int) -> Iterator[dict]:
    """One row per model: MiB in memory, damage, and its time over FP32's for each batch."""
    model = load_model(Workspace(PROFILES[width]), width)
    small = {low: quantize(model, dict.fromkeys(quantizable(model), low)) for low in FORMATS}
    runs = {f"{low}, packed": (m, resident_bytes(m)) for low, m in small.items()}
    int8 = dequantize_(quantize(model, dict.fromkeys(quantizable(model), "int8")))
    bfloat16 = torch.autocast("cpu", torch.bfloat16)(model.forward)  # the weights stay FP32
    large = {"int8, dequantized": int8, "bfloat16 compute": bfloat16}
    runs |= {name: (forward, resident_bytes(model)) for name, forward in large.items()}
    x0 = unit_interval(mnist(train=False)[0][HELD_OUT][:100])
    t = torch.linspace(0, subject.TIMESTEPS - 1, len(x0)).long()
    x = add_noise(x0, t, torch.randn(x0.shape, generator=generator(0, 1)))
    x = x.contiguous(memory_format=torch.channels_last)
    expected = model(x, t)
    for name, (forward, size) in runs.items():
        row = {"width": width, "model": name, "mem_mib": size / MIB}
        row["damage"] = (forward(x, t) - expected).square().mean().item()
        for batch in (1, 100):
            rounds, part = RUNNING_ROUNDS[width, batch], (x[:batch], t[:batch])
            row[f"time_batch_{batch}"] = time_ratio(rounds, forward, model, *part)
        yield row


def running() -> Iterator[dict]:
    """The poster's width only where its weights are."""
    yield from running_rows(16)
    try:
        yield from running_rows(64)
    except FileNotFoundError as error:
        print(f"without width 64: {error}")


class Estimates:
    """Fisher values by weight on one batch: noised digits (B, 1, 32, 32), timesteps and noise."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        trained = load_model(Workspace("small"), width) if width == 16 else UNet(width).eval()
        self.model = trained.to(memory_format=torch.channels_last)
        self.names = list(quantizable(self.model))
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(name in self.names)
        x0 = unit_interval(mnist(train=True)[0][: FISHER_BATCH[width]])
        self.t = torch.linspace(0, subject.TIMESTEPS - 1, len(x0)).long()
        self.noise = torch.randn(x0.shape, generator=generator(0, 2))
        self.x = add_noise(x0, self.t, self.noise)

    def _gradients(self, outputs: Tensor, factors: Tensor | None = None) -> Fisher:
        weights = [self.model.get_parameter(name) for name in self.names]
        return dict(zip(self.names, torch.autograd.grad(outputs, weights, factors), strict=True))

    def ordinary(self, part: slice = slice(None)) -> Fisher:
        """Gradients of the loss of the whole batch."""
        output = self.model(self.x[part], self.t[part])
        return self._gradients(0.5 * (self.noise[part] - output).square().sum())

    def loop(self) -> Fisher:
        """lafq's: squared gradients of single samples, one backward pass each."""
        batches = [((self.x, self.t), self.noise)]
        return empirical_fisher(self.model, self.names, batches).by_weight

    def random_signs(self) -> Fisher:
        """One batched backward pass, residuals under random signs: its squares are unbiased."""
        output = self.model(self.x, self.t)
        signs = torch.randint(2, (len(self.x), 1, 1, 1), generator=generator(0, 1)) * 2 - 1
        gradients = self._gradients(output, (output - self.noise).detach() * signs)
        return {name: g.square() / len(self.x) for name, g in gradients.items()}

    def backpack(self) -> Fisher:
        """BackPACK's SumGradSquared, which leaves hooks on the model."""
        from backpack import backpack, extend
        from backpack.extensions import SumGradSquared

        for name in self.names:
            extend(self.model.get_submodule(name.removesuffix(".weight")))
        with backpack(SumGradSquared()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (0.5 * (self.noise - self.model(self.x, self.t)).square().sum()).backward()
        weights = {name: self.model.get_parameter(name) for name in self.names}
        return {name: w.sum_grad_squared / len(self.x) for name, w in weights.items()}

    def true(self, passes: int = 1, seed: int = 0, curvature: bool = False) -> Fisher:
        """The true Fisher information, one batched backward pass per pass."""
        how = {"names": self.names, "shrink": passes > 1, "curvature": curvature}
        return estimate_sensitivity(self.model, [(self.x, self.t)] * passes, seed, **how).fisher


def error(estimate: Fisher, exact: Fisher) -> float:
    """relative_error, as the module says."""
    ratios = [estimate[name].sum().item() / exact[name].sum().item() for name in exact]
    return statistics.mean(abs(ratio - 1) for ratio in ratios)


def fisher() -> Iterator[dict]:
    """The trained model of width 16, and one of width 64."""
    for width, rounds in FISHER_ROUNDS.items():
        of = Estimates(width)
        exact = {"empirical": of.loop(), "true": of.true(DRAWS, seed=1)}
        curved = partial(of.true, curvature=True)
        several = partial(curved, CURVED_PASSES)
        methods = {
            "true, one batched backward pass (lafq)": of.true,
            "true, the same with the curvature (lafq)": curved,
            "empirical, random signs (lafq)": of.random_signs,
            "empirical, loop over single samples": of.loop,
        }
        if width == 16:  # at width 64 it takes minutes a pass
            methods["empirical, BackPACK SumGradSquared"] = Estimates(width).backpack
        for method, estimate in methods.items():
            timed, passes = (several, CURVED_PASSES) if estimate is curved else (estimate, 1)
            ratio = time_ratio(rounds, timed, of.ordinary) / passes
            row = {"method": method, "width": width, "batch": FISHER_BATCH[width]}
            off = error(estimate(), exact[method.partition(",")[0]])
            yield row | {"cost_ratio": ratio, "relative_error": off}


def random_sensitivity(model: nn.Module, curvature: bool = True) -> Sensitivity:
    """Values of the right shapes; curvature of random columns, so that rounding has work to do."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    known = Sensitivity({name: torch.rand(w.shape) for name, w in weights.items()}, {})
    for name in weights if curvature else ():
        empty = Moments(torch.empty(1, channel_view(model, name).size[1]), LARGEST, CHANNELS)
        factor = torch.randn(*empty.curvature.shape[:-1], 16)
        known.curvature[name] = factor @ factor.mT / 16 + torch.eye(factor.shape[-2])
    return known


def allocation() -> Iterator[dict]:
    """Seconds at every granularity by Fisher values, then with curvature."""
    torch.manual_seed(0)
    model = UNet(64).eval()
    for granularity, feedback in (*((kind, False) for kind in ALLOCATED), ("mixed", True)):
        known = random_sensitivity(model, feedback)
        how = {"memory_mib": ALLOCATED_MIB, "granularity": granularity, "progress": False}
        row = {"width": 64, "granularity": granularity, "curvature": feedback}
        row |= {"budget_mib": ALLOCATED_MIB, "seconds": seconds(allocate, model, known, **how)}
        yield row


def confine() -> None:
    """Runs in the notebook's process: one core, 2 GiB."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def binder() -> Iterator[dict]:
    """Every committed notebook of profile small; seconds with its imports."""
    with TemporaryDirectory() as folder:
        os.symlink(workspace.RESULTS, os.path.join(folder, "results"))
        how = {"environment": {"LAFQ_OUTPUT": folder}, "preexec_fn": confine}
        for path in (p for n in ("*", "beyond/*") for p in workspace.NOTEBOOKS.glob(f"{n}.ipynb")):
            start = time.perf_counter()
            kib = in_a_process("-c", EXECUTE, path, workspace.NOTEBOOKS, **how)
            row = {"notebook": path.stem, "cores": 1, "limit_mib": LIMIT // 2**20}
            row["seconds"] = round(time.perf_counter() - start, 1)
            yield row | {"peak_mib": round(kib / 1024, 1)}


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the most since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> None:
    """Let VmHWM start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def step(name: str, width: str) -> dict[str, float]:
    """Seconds and MiB of a step, run in this process; of estimate_sensitivity, seconds per pass."""
    torch.manual_seed(0)
    model = UNet(int(width)).eval()
    known = random_sensitivity(model) if name == "allocate" else None
    mib = budget_rows.mib_at(model, BITS)
    inputs, times = (BATCH, 1, 32, 32), (BATCH,)
    batches = [(torch.randn(inputs), torch.randint(1000, times)) for _ in range(PASSES)]
    uniform = {n: "int4" for n, p in model.named_parameters() if p.ndim > 1}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        # Only where it is needed: memory that a call has freed would not be taken anew.
        small = quantize(model, uniform) if name in STEPS[3:] else None
        if name == "load_quantized":
            save_quantized(path, small, model)
        work = {
            "estimate_sensitivity": partial(estimate_sensitivity, model, batches),
            "allocate": partial(allocate, model, known, memory_mib=mib, progress=False),
            "quantize": partial(quantize, model, uniform),
            "save_quantized": partial(save_quantized, path, small, model),
            "load_quantized": partial(load_quantized, path, model),
        }[name]
        before = memory("VmRSS")
        forget_peak()
        cost = {"seconds": seconds(work), "peak_mib": memory("VmHWM") - before}
    if name == "estimate_sensitivity":
        cost["seconds"] /= PASSES
    return cost | {"weights": sum(p.numel() for p in model.parameters())}


def growth() -> None:
    """Each step in a process of its own."""
    table = Table("growth", ("width", "step"))
    for width in WIDTHS:
        for name in STEPS:
            table.add((width, name), in_a_process, __file__, "step", name, width)


def peak(path: str | Path, width: str, device: str, steps: str) -> float:
    """Peak MiB of this process while a U-Net of `save_quantized` samples a digit."""
    # Once with a tiny model, so that the libraries' own pages are there before.
    with TemporaryDirectory() as folder:
        tiny, warm = UNet(4), Path(folder) / "tiny.safetensors"
        save_quantized(warm, quantize(tiny, dict.fromkeys(quantizable(tiny), "int8")), tiny)
        small = load_quantized(warm, tiny).to(device, memory_format=torch.channels_last)
        sample(small, 1, 2, seed=0)
        del tiny, small
    before = memory("VmRSS")
    with torch.device("meta"):
        skeleton = UNet(int(width))
    model = load_quantized(path, skeleton).to(device, memory_format=torch.channels_last)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    sample(model, 1, int(steps), seed=0, batch_size=1)
    return torch.cuda.max_memory_allocated() / MIB if device == "cuda" else memory("VmHWM") - before


def peak_mib(path: Path, width: int, device: str = "cpu", steps: int = 4) -> float:
    """`peak` of a process of its own."""
    environment = {f"MALLOC_{name}": value for name, value in MALLOC.items()}
    return in_a_process(__file__, "peak", path, width, device, steps, environment=environment)


def peaks(
    model: nn.Module, rows: Iterable[study_rows.Row], device: str, compress: bool
) -> list[int]:
    """Peak memory of each row, whole MiB."""
    with TemporaryDirectory() as folder:
        path, mib = Path(folder) / "row.safetensors", []
        for row in rows:
            save_quantized(path, quantize(model, row.plan), model, compress=compress)
            mib.append(round(peak_mib(path, model.width, device)))
    return mib


def peaks_of_profile(profile: str) -> None:
    """Write the tables of a profile whose weights and Fisher values are there."""
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model, fisher = load_model(work, p["WIDTH"]), load_fisher(work, p["WIDTH"])
    rows = study_rows.published_rows(model, fisher, p["RATIOS"], p["THRESHOLDS"])
    table = pd.DataFrame([row.key for row in rows], columns=study_rows.KEY)
    table["peak_mib"] = peaks(model, rows, work.device.type, compress=False)
    results.update(work, "peak_memory", table)
    if profile == "small":
        known = budget_rows.measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
        rows = budget_rows.uniform_at_bits(model, known)
        bits = sorted({*p["BUDGET_BITS"], *(row.bits for row in rows)})
        kinds = [("allocate_all", "feedback")]
        rows += budget_rows.allocated_at_bits(model, known, bits, (), kinds)
        rows = [row for row in rows if row.bits < 10]
        rows += budget_rows.coded_at_bits(model, known, p["CODED_BITS"])
        table = pd.DataFrame([row.budget_key for row in rows])
        table["peak_mib"] = peaks(model, rows, work.device.type, compress=True)
        save_table(work, "files_peak_memory", table)


def peak_memory() -> None:
    """Both profiles, where their weights are."""
    for profile in PROFILES.values():
        try:
            peaks_of_profile(profile)
        except FileNotFoundError as error:
            print(f"without profile {profile}: {error}")


ANEW = {rows.__name__: partial(write, rows) for rows in (running, fisher, allocation, binder)}
VERBS = ANEW | {verb.__name__: verb for verb in (growth, peak_memory, step, peak)}

if __name__ == "__main__":
    sys.exit(run(VERBS[sys.argv[1]], *sys.argv[2:]))
