"""Experiments that take hours: `make evidence` runs them step by step, and the notebooks load their
tables.

Steps whose tables are there already are left alone (`--anew` makes them again); within a step,
images that were sampled and training that was done before an interruption are kept in
build/<profile>.

Training runs differ from each other in the training seed alone. The first is the shipped model; the
others train anew with the settings of the profile. Every run takes its own Fisher information,
thresholds and images. An interval over images cannot show how a claim varies from run to run. A run
computes with one thread, so that its numbers do not depend on how many runs share a machine.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from dask.system import CPU_COUNT
from torch import nn

from lafq import allocate
from lafq.fisher.sensitivity import CHANNELS, Sensitivity
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize_, quantize, weights_sha256
from lafq.rng import generator
from lafq.study import claims, damage, published_images
from lafq.study.diffusion import training
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.subject import PACKED, load_fisher, load_model
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.fisher_by_timestep import fisher_by_timestep
from lafq.study.images.evaluate import evaluate, evaluate_large
from lafq.study.images.features import mnist_extractor
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import (
    BASELINE,
    Row,
    allocated_at_bits,
    bits_of,
    by_budget,
    claimed_rows,
    coded_at_bits,
    made,
    measured_sensitivity,
    rules_at_bits,
    tuned_rows,
    uniform_at_bits,
    uniform_rows,
)
from lafq.study.workspace import (
    Workspace,
    load_optional,
    profile_parameters,
    save_arrays,
    save_table,
)
from lafq.tensors import load_tensors, save_tensors

SEEDS = (0, 1, 2, 3, 4)
IMAGES, DESCRIBED, SHOWN = 1000, 200, 16
ALLOCATED, RULE_BITS = (3.0, 3.5, 4.0, 5.0, 6.0), (4.0, 6.0)
# Bits per weight: of entropy-coded files, and of the allocator at the poster's size.
CODED_FILES, AT_SIZE, FILES_BELOW = (2.0, 2.5), (2.5, 3.0, 4.0, 6.0), 9
RULES = ("global", "group", "ratio", "magnitude", "random")
SHIPPED_MIB, OTHER_NOISE = 13.0, 1
# Rule and rounding.
FRESH = (
    ("allocate", "feedback"),
    ("allocate", "tuned"),
    *((rule, "feedback") for rule in ("global", "group", "ratio")),
)
# A row of 1,000 images takes minutes: of these no other budgets.
SELECTED = {
    ("uniform", "feedback"): (),
    ("allocate", "nearest"): (4.0,),
    ("allocate_all", "feedback"): (3.5,),
    **{(rule, "feedback"): () for rule in RULES},
}
AT_32_BITS = BASELINE._replace(setting="32.000", bits=32.0)
Tables = dict[str, pd.DataFrame]


def noise_floor(profile: str) -> Tables:
    """What FID and KID show of real and of generated digits at every number of images."""
    return {"noise_floor": published_images.noise_floor(profile_parameters(profile))}


def many_images(profile: str, images: int = IMAGES) -> Tables:
    """The rows that C3 and C4 speak of with ten times the images, on disjoint blocks too, and these
    claims at that N.
    """
    p, work, model = _opened(profile)
    rows = claimed_rows(model, load_fisher(work, p["WIDTH"]), p["THRESHOLDS"])
    sampling = Sampling(images, p["SAMPLING_STEPS"], p["SEED"])
    table, samples = evaluate_large(work, model, rows, sampling)
    of_images = claims.claims_on_images(table, samples, p["SEED"])
    return {"evidence_rows_claims": pd.DataFrame(of_images), "evidence_rows": table}


def training_runs(profile: str, seeds: tuple[int, ...] = SEEDS) -> Tables:
    """Rows and claims of models trained from other seeds, and each claim over them."""
    with one_process_per_core() as pool:
        by_seed = list(pool.map(training_run, repeat(profile_parameters(profile)), seeds))
    table, of_runs = (pd.concat(parts, ignore_index=True) for parts in zip(*by_seed, strict=True))
    return {
        "evidence_runs_claims": of_runs,
        "evidence_runs_over": claims.over_runs(of_runs),
        "evidence_runs": table,
    }


def one_process_per_core() -> Executor:
    """Processes for training runs, each of which computes with one thread."""
    return ProcessPoolExecutor(CPU_COUNT, mp_context=get_context("spawn"))


def training_run(parameters: dict[str, Any], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One run: its rows as `evaluate.evaluate` gives them, and its claims; both with columns seed
    and steps in front.
    """
    p, work = parameters, Workspace.open(parameters["PROFILE"], 1, parameters["DEVICE"])
    model, digits = trained(work, p, seed), mnist(train=True)[0]
    fisher = fisher_by_timestep(
        model,
        list(quantizable(model)),
        digits,
        samples=p["FISHER_SAMPLES"],
        bins=p["TIMESTEP_BINS"],
        seed=seed,
    )
    rows = claimed_rows(model, fisher.by_weight, p["THRESHOLDS"])
    table, images = evaluate(work, model, rows, Sampling(p["IMAGES"], p["SAMPLING_STEPS"], seed))
    weights = fisher.timesteps.drop_duplicates("parameter").set_index("parameter")["weights"]
    of_run = pd.DataFrame(
        [
            *claims.fisher_claims(fisher.blocks, weights, "empirical, noised digits", seed),
            *claims.claims_on_images(table, images, seed),
        ]
    )
    run = {"seed": seed, "steps": p["TRAINING"]["steps"]}
    first, second = (
        t.assign(**run)[[*run, *(c for c in t if c not in run)]] for t in (table, of_run)
    )
    return first, second


def trained(work: Workspace, parameters: dict[str, Any], seed: int) -> UNet:
    """The model of a seed: the shipped one for the profile's seed; else trained, on from its
    checkpoint where there is one.
    """
    if seed == parameters["SEED"]:
        return load_model(work, parameters["WIDTH"])
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator(seed))))
    settings = {**parameters["TRAINING"], "seed": seed}
    model = UNet(parameters["WIDTH"], settings.pop("dropout")).to(
        work.device, memory_format=torch.channels_last
    )
    checkpoint = work.build / f"replicate_{seed}.pt"
    weights, _ = training.fit(model, mnist(train=True)[0], checkpoint, **settings)
    result = UNet(parameters["WIDTH"])
    result.load_state_dict(weights)
    return result.eval().to(work.device, memory_format=torch.channels_last)


def budgets(profile: str, images: int = IMAGES) -> Tables:
    """FID of rows of 06_budget: the unquantized model, uniform formats, the allocator ("mixed";
    tuned too), threshold rules.
    """
    p, work, model = _opened(profile)
    known = measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    allocated = allocated_at_bits(model, known, ALLOCATED, granularities=("mixed",))
    rules = rules_at_bits(model, known, RULE_BITS, p["SEED"], RULES)
    rows = [AT_32_BITS, *uniform_at_bits(model, known), *allocated]
    rows += [*tuned_rows(allocated, **p["TUNED"]), *rules]
    rows = [row for row in rows if row.bits in SELECTED.get((row.rule, row.rounding), (row.bits,))]
    table, _ = evaluate(work, model, rows, Sampling(images, p["SAMPLING_STEPS"], p["SEED"]))
    return {"evidence_budget": by_budget(table).drop(columns="sample")}


def fresh_noise(profile: str, images: int = IMAGES) -> Tables:
    """Rows of 06_budget at 4 bits per weight, the allocator and the rules rounded alike, from noise
    never used before.
    """
    p, work, model = _opened(profile)
    bits, seed = [claims.RATE], p["SEED"] + damage.FRESH_SEED
    known = measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    allocated = allocated_at_bits(model, known, bits, ("mixed",), variants=())
    rows = [*allocated, *tuned_rows(allocated, bits, p["TUNED"]["steps"])]
    rows += rules_at_bits(model, known, bits, p["SEED"])
    sampling = Sampling(images, p["SAMPLING_STEPS"], seed)
    table, samples = evaluate_large(work, model, _rounded_alike(rows), sampling)
    ruled = table[table["rule"].isin(RULES)]
    of_rules = claims.rule_image_claims(ruled, samples, seed)
    return {"evidence_fresh_claims": pd.DataFrame(of_rules), "evidence_fresh": table}


def coded_files(profile: str, images: int = IMAGES) -> Tables:
    """FID of entropy-coded files of 06_budget, from the noise of the other rows."""
    p, work, model = _opened(profile)
    known = measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    rows = [AT_32_BITS, *coded_at_bits(model, known, CODED_FILES)]
    table, _ = evaluate(work, model, rows, Sampling(images, p["SAMPLING_STEPS"], p["SEED"]))
    return {"evidence_coded": by_budget(table).drop(columns="sample")}


def at_int4_bytes(profile: str, images: int = IMAGES) -> Tables:
    """Uniform INT8 and INT4, and at the bytes of INT4 the allocator and two rules, rounded alike;
    the noise of the other tables.
    """
    p, work, model = _opened(profile)
    seed, samples = p["SEED"], p["TRUE_FISHER_SAMPLES"]
    known = measured_sensitivity(model, samples, seed)
    uniform = uniform_rows(model, ("int8", "int4"))
    bits = [bits_of(model, uniform[-1].plan)]
    rows = allocated_at_bits(model, known, bits, ("mixed",), variants=())
    rows += rules_at_bits(model, known, bits, seed, ("global", "ratio"))
    rows = [row._replace(made=made(samples, seed)) for row in _rounded_alike(rows)]
    sampling = Sampling(images, p["SAMPLING_STEPS"], seed, p["SAMPLING_BATCH"])
    table, generated = evaluate_large(work, model, [*uniform, *rows], sampling)
    ruled = table[table["rule"].isin(RULES)]
    of_rules = claims.rule_image_claims(ruled, generated, seed)
    return {"evidence_int4_claims": pd.DataFrame(of_rules), "evidence_int4": table}


def damages(profile: str) -> Tables:
    """06_budget at the poster's size without images: bytes in memory and in a file, and damage on
    digits never used before.
    """
    p, work, model = _opened(profile)
    seed, samples = p["SEED"], p["TRUE_FISHER_SAMPLES"]
    known, other = (kept_sensitivity(work, model, samples, s) for s in (seed, seed + 1))
    allocated = allocated_at_bits(model, known, AT_SIZE, ("mixed",), variants=())
    rows = [*uniform_at_bits(model, known), *allocated, *coded_at_bits(model, known, CODED_FILES)]
    rules = rules_at_bits(model, known, [claims.RATE], seed)
    table = damage.measure_damage(model, rows + rules, other, seed, p["DAMAGE_DIGITS"], fresh=True)
    files = damage.coded_files(model, [row for row in rows if row.bits < FILES_BELOW], seed)
    return {"evidence_damages": table.merge(files, how="left")}


def kept_sensitivity(work: Workspace, model: nn.Module, samples: int, seed: int) -> Sensitivity:
    """`measured_sensitivity`, kept in build/<profile>, so that an interrupted run goes on from
    there.
    """
    path = work.build / f"sensitivity_{seed}.safetensors"
    origin = {"weights": weights_sha256(model), "samples": samples}
    if not path.is_file():
        measured = measured_sensitivity(model, samples, seed, CHANNELS)
        parts = {"fisher/": measured.fisher, "curvature/": measured.curvature}
        tensors = {f"{part}{n}": t for part, by_name in parts.items() for n, t in by_name.items()}
        save_tensors(path, tensors, **origin)
    tensors, _ = load_tensors(path, "make evidence", **origin)
    return Sensitivity(
        *(
            {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
            for part in ("fisher/", "curvature/")
        )
    )


def described(profile: str, images: int = DESCRIBED) -> Tables:
    """What the images are like of rows that FID and damage order differently: uniform INT3 to INT6,
    and two rules at 6 bits.
    """
    p, work, model = _opened(profile)
    sampling = Sampling(images, p["SAMPLING_STEPS"], p["SEED"])
    known = measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    plans = {
        f"uniform {row.format.upper()}": row.plan
        for row in uniform_rows(model, ("int3", "int4", "int6"))
    }
    plans |= {
        f"{row.rule}, {row.bits:g} bits per weight": row.plan
        for row in rules_at_bits(model, known, [6.0], p["SEED"], ("global", "magnitude"))
        if row.rounding == "nearest"
    }
    store = ImageStore(work)
    sets = {"FP32": store.draw(model, sampling).images}
    for name, plan in plans.items():
        small = dequantize_(quantize(model, plan))
        sets[name] = store.draw(small, sampling, name).images
    sets[published_images.REAL_DIGITS] = mnist(train=False)[0][HELD_OUT][:images]
    shown = {name: x[:SHOWN, 0].numpy() for name, x in sets.items()}
    save_arrays(work.results / "evidence_images.npz", shown)
    return {"evidence_images": published_images.image_statistics(sets, mnist_extractor())}


def ship(
    work: Workspace,
    model: nn.Module,
    known: Sensitivity,
    file_mib: float,
    origin: dict[str, Any],
    sampling: Sampling,
    inception_reference: int = 0,
) -> pd.DataFrame:
    """Write results/<profile>/packed.safetensors, at most `file_mib` MiB, and measure what that
    costs.

    origin: what the recipe of its images says besides the size (`rows.made`). Returns the rows of
    `evaluate.evaluate`, of the FP32 weights and of the packed ones, with `damage`, the mean squared
    change of the model's output on held-out digits, and its 95 % interval. Raises ValueError, as
    `allocate`, for a file below the smallest possible size.
    """
    plan = allocate(model, known, file_mib=file_mib)
    small = quantize(model, plan)
    save_quantized(work.results / PACKED, small, model, compress=True)
    rows = [
        BASELINE._replace(inception=True),
        Row(
            "allocate",
            f"{file_mib:g} MiB",
            "coded",
            "channel",
            "feedback",
            plan,
            inception=True,
            made=origin,
        ),
    ]
    table, _ = evaluate(work, model, rows, sampling, inception_reference)
    seed = sampling.seed + OTHER_NOISE
    outputs = training.held_out_outputs(model, seed)
    rises = [
        damage.output_mse(*damage.output_errors(m, outputs, seed), seed)
        for m in (model, dequantize_(small))
    ]
    return table.join(pd.DataFrame(rises)[["damage", "damage_low", "damage_high"]])


def packed(profile: str) -> Tables:
    """The weights of a profile in a file small enough to be committed, beside the FP32 weights."""
    p, work, model = _opened(profile)
    samples, seed = p["TRUE_FISHER_SAMPLES"], p["SEED"]
    known = measured_sensitivity(model, samples, seed, CHANNELS)
    sampling = Sampling(p["IMAGES"], p["SAMPLING_STEPS"], seed, p["SAMPLING_BATCH"])
    origin, reference = made(samples, seed), p["INCEPTION_REFERENCE"]
    return {"packed": ship(work, model, known, SHIPPED_MIB, origin, sampling, reference)}


STEPS: dict[str, Callable[[str], Tables]] = {
    "noise_floor": noise_floor,
    "evidence_budget": budgets,
    "evidence_fresh": fresh_noise,
    "evidence_coded": coded_files,
    "evidence_int4": at_int4_bytes,
    "evidence_damages": damages,
    "evidence_rows": many_images,
    "evidence_images": described,
    "evidence_runs": training_runs,
    "packed": packed,
}
# The other steps would take days at the poster's width.
AT_POSTERS_SIZE = ("evidence_int4", "evidence_damages", "packed")


def make_missing(profile: str, only: str = "", anew: bool = False) -> None:
    """Make the tables of the steps whose table is missing; the step's own table is written last:
    where it is, its others are.
    """
    work = Workspace(profile)
    for name, make in STEPS.items():
        if only not in ("", name) or (profile == "paper") != (name in AT_POSTERS_SIZE):
            continue
        if load_optional(work, name) is not None and not anew:
            print(f"{name}: there already, in results/{profile}")
            continue
        for table, content in sorted(make(profile).items(), key=lambda item: item[0] == name):
            save_table(work, table, content)
            print(f"{table}: written to results/{profile}")


def main() -> int:
    """`make evidence`; errors are one sentence and exit status 1, with the steps made before left
    as they were.
    """
    parser = argparse.ArgumentParser(prog="lafq.study.long_runs")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--anew", action="store_true", help="make every step again")
    parser.add_argument("--only", default="", choices=["", "published", *STEPS])
    help = "the authors' published images: a clone of their repository, or an npz file"
    parser.add_argument("--published", type=Path, help=help)
    args = parser.parse_args()
    try:
        if args.published:
            published_images.measure(args.published, profile_parameters(args.profile)["SEED"])
        elif args.only in ("", "published"):
            print(
                "published: the authors' images are not in this repository; PUBLISHED=path scores "
                "them (07_audit)"
            )
        make_missing(args.profile, args.only, args.anew)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


def _opened(profile: str) -> tuple[dict[str, Any], Workspace, UNet]:
    p = profile_parameters(profile)
    work = Workspace.of(p)
    return p, work, load_model(work, p["WIDTH"])


def _rounded_alike(rows: list[Row]) -> list[Row]:
    return [row for row in rows if (row.rule, row.rounding) in FRESH]


if __name__ == "__main__":
    sys.exit(main())
