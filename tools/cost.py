"""What a run will cost: floating-point operations counted stage by stage, over the speed of this
machine as measured.

Counted are the passes through the networks (a backward pass as two forward ones); a multiplication
with its addition is two. What comes on top, scores, allocation and figures, is minutes on a laptop
at any width.
"""

import time
from collections import Counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lafq.quantization import tuning
from lafq.quantization.model import weights_sha256
from lafq.study.diffusion.subject import WEIGHTS, load_model
from lafq.study.diffusion.unet import UNet, layer_of, quantizable
from lafq.study.images.sampling import ImageStore, read
from lafq.study.workspace import Workspace, compute_on

INCEPTION = 11.4e9  # operations for one image of 299x299: Szegedy et al. 2016, "Rethinking the Inception Architecture"
EXPLORED = (
    3 * (256 + 128) + 2 * 8 * 20
)  # images that 00_explore sends through the network, a backward pass as two
ROWS = {"01_train": 1, "03_global": 6, "04_group": 3, "07_audit": 6}
PUBLISHED_ROWS = 6  # of 08_published, besides its ratios


def forward_flop(width: int) -> int:
    """Operations of the U-Net for one image."""
    with torch.device("meta"):
        model, x, t = (
            UNet(width).eval().to("meta"),
            torch.empty(1, 1, 32, 32),
            torch.zeros(1, dtype=torch.long),
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    return counter.get_total_flops()


@torch.inference_mode()
def measured_rate(width: int, device: torch.device) -> float:
    """Operations a second of the U-Net's forward pass in FP32, the best of three."""
    batch = 100 if device.type == "cuda" else 25
    model = UNet(width).eval().to(device, memory_format=torch.channels_last)
    x, t = (
        torch.zeros(batch, 1, 32, 32, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        model(x, t).sum().item()
        seconds.append(time.perf_counter() - began)
    return batch * forward_flop(width) / min(seconds[1:])


def sampled_rows(parameters: dict[str, Any]) -> dict[str, int]:
    """Plans that each notebook samples first: equal ones once, as ratios that keep as many tensors
    of every layer are.
    """
    ratios = parameters["RATIOS"]
    layers = Counter(layer_of(name) for name in quantizable(UNet(4)))
    by_tensor = {tuple(int(r * count) for count in layers.values()) for r in ratios}
    between = sum(0 < r < 1 for r in parameters["COARSE_RATIOS"])
    return {**ROWS, "05_ratio_sweep": 2 + 2 * (len(by_tensor) + len(ratios) + between)}


def work(parameters: dict[str, Any]) -> dict[str, float]:
    """Operations of every notebook under these parameters."""
    p, one = parameters, forward_flop(parameters["WIDTH"])
    image = p["SAMPLING_STEPS"] * one
    seen = INCEPTION if p["INCEPTION_REFERENCE"] else 0
    by_vision = {
        "01_train": 1,
        "03_global": 5,
        "04_group": 3,
        "05_ratio_sweep": 4 + 2 * len(p["RATIOS"]),
    }
    found = {
        name: p["IMAGES"] * (by_vision.get(name, 0) * seen + rows * image)
        for name, rows in sampled_rows(p).items()
    }
    found["01_train"] += p["INCEPTION_REFERENCE"] * seen
    if p["TRAIN"]:
        found["01_train"] += training_flop(p)
    if p["TRAIN"] or p["KEEP"]:
        found["01_train"] += p["CHECK_IMAGES"] * image
    # Empirical, and Monte Carlo on as many noised digits and as many states of the reverse process.
    found["02_fisher"] = (
        3 * 3 * one * p["FISHER_SAMPLES"] + p["FISHER_SAMPLES"] // p["TIMESTEP_BINS"] * image
    )
    coded = 10 + len(p["BUDGET_BITS"]) + len(p["CODED_BITS"])
    plans = {
        "06_budget": 11 + 10 * len(p["BUDGET_BITS"]) + len(p["TUNED"]["bits"]),
        "10_damage": 34 * 6 / 2,
        "11_files": coded,
    }
    for name, count in plans.items():
        found[name] = 6 * one * p["TRUE_FISHER_SAMPLES"] + count * p["DAMAGE_DIGITS"] * one
    found["06_budget"] += (
        5 * 7 * image + 4 * one * len(p["TUNED"]["bits"]) * p["TUNED"]["steps"] * tuning.BATCH
    )
    found["00_explore"] = EXPLORED * one
    found["07_audit"] += 3 * one * 4 * p["AUDIT_SAMPLES"] + 500 * 2 * seen
    published = p["PUBLISHED"]
    rows = PUBLISHED_ROWS + len(published["ratios"])
    found["08_published"] = rows * p["IMAGES"] * (published["steps"] * one + seen)
    return dict(sorted(found.items()))


def training_flop(parameters: dict[str, Any]) -> float:
    """Operations of training under these parameters."""
    training = parameters["TRAINING"]
    return 3 * forward_flop(parameters["WIDTH"]) * training["steps"] * training["batch_size"]


def training_time(parameters: dict[str, Any]) -> str:
    """How long training takes, at the FP32 speed that this machine is found to have."""
    rate = measured_rate(
        parameters["WIDTH"], compute_on(parameters["THREADS"], parameters["DEVICE"])
    )
    bound = ", less where it has bfloat16 units" if parameters["TRAINING"]["bf16"] else ""
    return f"{spoken(training_flop(parameters) / rate)} on this machine{bound}"


def kept_flop(work: Workspace, width: int) -> float:
    """Operations that the images kept by their provenance have taken, if they are of the profile's
    own weights; else 0.
    """
    if not (work.results / WEIGHTS).is_file():
        return 0.0
    weights, steps = weights_sha256(load_model(work, width)), 0
    for path in ImageStore(work).folder.glob("*.npz"):
        pixels, record = read(path)
        steps += len(pixels) * record["steps"] * (record["recipe"]["weights"] == weights)
    return steps * forward_flop(width)


def estimate(profile: str, parameters: dict[str, Any], selected: list[str]) -> str:
    """Sentences on the notebooks selected: how fast this machine was found to be, how long it will
    take them, what is there.
    """
    device = compute_on(parameters["THREADS"], parameters["DEVICE"])
    rate = measured_rate(parameters["WIDTH"], device)
    seconds = {name: flop / rate for name, flop in work(parameters).items() if name in selected}
    stages = ", ".join(f"{name} {spoken(s)}" for name, s in seconds.items())
    there = (
        kept_flop(Workspace(profile), parameters["WIDTH"]) / rate
        if parameters["KEEP"] and not parameters["TRAIN"]
        else 0
    )
    kept = (
        f"; images that are kept already save {spoken(there)} of all notebooks' time"
        if there
        else ""
    )
    return (
        f"estimate: {spoken(sum(seconds.values()))} in the networks ({stages}) at "
        f"{rate / 1e9:,.0f} GFLOP/s, as just measured on "
        f"{device.type}{kept}; scores, allocation and figures come on top"
    )


def spoken(seconds: float) -> str:
    """A duration in the unit a reader would choose."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
