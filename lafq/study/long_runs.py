"""Experiments that take hours: `make evidence` runs them step by step, and the notebooks load their
tables.

Steps whose tables are there already are left alone (`--anew` makes them again). An interrupted step
goes on from the images and the training that build/<profile> keeps.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cached_property
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from dask.system import CPU_COUNT

from lafq import allocate
from lafq.fisher.sensitivity import CHANNELS, Sensitivity
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize_, quantize, weights_sha256
from lafq.rng import generator
from lafq.study import budget_rows, claims, damage, published_images, workspace
from lafq.study import rows as study_rows
from lafq.study.diffusion import subject, training
from lafq.study.diffusion.subject import HELD_OUT, UNet, load_fisher, load_model, mnist, quantizable
from lafq.study.fisher_by_timestep import fisher_by_timestep
from lafq.study.images import metrics
from lafq.study.images.evaluate import evaluate, evaluate_large
from lafq.study.images.features import inception_extractor, mnist_extractor
from lafq.study.images.reference import save_reference
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.results import load_rows
from lafq.study.rows import BASELINE, KEY, Row
from lafq.study.workspace import Workspace, compute_on, load_optional, profile_parameters

SEEDS = (0, 1, 2, 3, 4)
IMAGES, DESCRIBED, SHOWN = 1000, 200, 16
# Bits per weight: of entropy-coded files, and of the allocator at the poster's size.
CODED_FILES, AT_SIZE, FILES_BELOW = (2.0, 2.5), (2.5, 3.0, 4.0, 6.0), 9
SHIPPED_MIB, OTHER_NOISE = 13.0, 1
Tables = dict[str, pd.DataFrame]
Claims = Callable[..., list[claims.Claim]]


class Experiment:
    """What the steps of a profile share: parameters, model, sensitivity, how images are drawn."""

    def __init__(self, profile: str) -> None:
        self.p = profile_parameters(profile)
        self.seed, self.samples = self.p["SEED"], self.p["TRUE_FISHER_SAMPLES"]
        self.work = Workspace.of(self.p)

    @cached_property
    def model(self) -> UNet:
        """The trained model."""
        return load_model(self.work, self.p["WIDTH"])

    @cached_property
    def known(self) -> Sensitivity:
        """The sensitivity that the plans of the notebook budget are made from."""
        return budget_rows.measured_sensitivity(self.model, self.samples, self.seed)

    def kept_sensitivity(self, seed: int) -> Sensitivity:
        """`known` at the poster's size: fewer channels a pass, and kept for a run that goes on."""
        return budget_rows.kept_sensitivity(self.work, self.model, self.samples, seed, CHANNELS)

    def sampling(self, images: int) -> Sampling:
        """So many images in the profile's steps and batches, from its noise."""
        return Sampling(images, self.p["SAMPLING_STEPS"], self.seed, self.p["SAMPLING_BATCH"])

    def with_claims(self, name: str, rows: list[Row], sampling: Sampling, judged: Claims) -> Tables:
        """The table of rows `name`, and what `judged` claims of them."""
        table, images = evaluate_large(self.work, self.model, rows, sampling)
        of_rows = pd.DataFrame(judged(table, images, sampling.seed))
        return {f"{name}_claims": of_rows, name: table}


def noise_floor(run: Experiment) -> Tables:
    """What FID and KID show of real and of generated digits at every number of images."""
    generated = ImageStore(run.work).draw(run.model, run.sampling(run.p["CHECK_IMAGES"])).images
    inception = run.p["INCEPTION_REFERENCE"] > 0
    return {"noise_floor": published_images.noise_floor(generated, run.seed, inception)}


def many_images(run: Experiment, images: int = IMAGES) -> Tables:
    """The rows of C3 and C4 with ten times the images, on disjoint blocks too, and these claims."""
    fisher = load_fisher(run.work, run.p["WIDTH"])
    rows = study_rows.claimed_rows(run.model, fisher, run.p["THRESHOLDS"])
    return run.with_claims("evidence_rows", rows, run.sampling(images), claims.claims_on_images)


def training_runs(run: Experiment, seeds: tuple[int, ...] = SEEDS) -> Tables:
    """Rows and claims of models of other seeds: no interval over images shows how they vary."""
    with one_process_per_core() as pool:
        by_seed = list(pool.map(training_run, repeat(run.p), seeds))
    table, of_runs = (pd.concat(parts, ignore_index=True) for parts in zip(*by_seed, strict=True))
    over = claims.over_runs(of_runs)
    return {"evidence_runs_claims": of_runs, "evidence_runs_over": over, "evidence_runs": table}


def one_process_per_core() -> Executor:
    """Processes of one thread each, so that no number depends on how many share a machine."""
    return ProcessPoolExecutor(CPU_COUNT, mp_context=get_context("spawn"))


def training_run(p: dict[str, Any], seed: int) -> tuple[pd.DataFrame, ...]:
    """Rows and claims of one run, from Fisher information, thresholds and images of its own."""
    work = Workspace(p["PROFILE"], compute_on(1, p["DEVICE"]))
    model, digits = trained(work, p, seed), mnist(train=True)[0]
    draws = {"samples": p["FISHER_SAMPLES"], "bins": p["TIMESTEP_BINS"], "seed": seed}
    fisher = fisher_by_timestep(model, list(quantizable(model)), digits, **draws)
    rows = study_rows.claimed_rows(model, fisher.by_weight, p["THRESHOLDS"])
    table, images = evaluate(work, model, rows, Sampling(p["IMAGES"], p["SAMPLING_STEPS"], seed))
    weights = fisher.timesteps.drop_duplicates("parameter").set_index("parameter")["weights"]
    of_fisher = claims.fisher_claims(fisher.blocks, weights, "empirical, noised digits", seed)
    of_run = pd.DataFrame([*of_fisher, *claims.claims_on_images(table, images, seed)])
    run = {"seed": seed, "steps": p["TRAINING"]["steps"]}
    tables = (t.assign(**run) for t in (table, of_run))
    return tuple(t[[*run, *t.columns.drop(list(run))]] for t in tables)


def trained(work: Workspace, parameters: dict[str, Any], seed: int) -> UNet:
    """The model of a seed: the profile's own is there; others are trained, or trained on."""
    width, settings = parameters["WIDTH"], {**parameters["TRAINING"], "seed": seed}
    if seed == parameters["SEED"]:
        return load_model(work, width)
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator(seed))))
    model = UNet(width, settings.pop("dropout")).to(work.device, memory_format=torch.channels_last)
    checkpoint = work.build / f"replicate_{seed}.safetensors"
    weights, _ = training.fit(model, mnist(train=True)[0], checkpoint, **settings)
    model.load_state_dict(weights)
    return model.eval()


def at_int4_bytes(run: Experiment, images: int = IMAGES) -> Tables:
    """Uniform INT8 and INT4; at INT4's bytes uniform, allocator and rules with error feedback."""
    uniform = study_rows.uniform_rows(run.model, ("int8", "int4"))
    bits = budget_rows.bits_of(run.model, uniform[-1].plan)
    how = budget_rows.made(run.samples, run.seed)
    rules = "global", "group", "ratio"
    rows = budget_rows.uniform_at_bits(run.model, run.known)
    rows += budget_rows.allocated_at_bits(run.model, run.known, [bits], ("mixed",), variants=())
    rows += budget_rows.rules_at_bits(run.model, run.known, [bits], run.seed, rules)
    alike = (row for row in rows if row.rounding == "feedback" and row.bits == bits)
    rows = [*uniform, *(row._replace(made=how) for row in alike)]
    return run.with_claims("evidence_int4", rows, run.sampling(images), claims.rule_image_claims)


def damages(run: Experiment) -> Tables:
    """Rows as in `budget.csv`: bytes in memory and in a file, damage on digits never used."""
    model, seed = run.model, run.seed
    known, other = run.kept_sensitivity(seed), run.kept_sensitivity(seed + 1)
    rows = budget_rows.uniform_at_bits(model, known)
    rows += budget_rows.allocated_at_bits(model, known, AT_SIZE, ("mixed",), variants=())
    rows += budget_rows.coded_at_bits(model, known, CODED_FILES)
    files = damage.coded_files(model, [row for row in rows if row.bits < FILES_BELOW], seed)
    rows += budget_rows.rules_at_bits(model, known, [claims.RATE], seed)
    table = damage.measure_damage(model, rows, other, seed, run.p["DAMAGE_DIGITS"], fresh=True)
    return {"evidence_damages": table.merge(files, how="left")}


def described(run: Experiment, images: int = DESCRIBED) -> Tables:
    """What the images are like of rows that FID and damage order differently."""
    uniform = study_rows.uniform_rows(run.model, ("int3", "int4", "int6"))
    plans = {f"uniform {row.format.upper()}": row.plan for row in uniform}
    rules = "global", "magnitude"
    for row in budget_rows.rules_at_bits(run.model, run.known, [6.0], run.seed, rules):
        if row.rounding == "nearest":
            plans[f"{row.rule}, {row.bits:g} bits per weight"] = row.plan
    store, sampling = ImageStore(run.work), run.sampling(images)
    sets = {"FP32": store.draw(run.model, sampling).images}
    for name, plan in plans.items():
        small = dequantize_(quantize(run.model, plan))
        sets[name] = store.draw(small, sampling, name).images
    sets[published_images.REAL_DIGITS] = mnist(train=False)[0][HELD_OUT][:images]
    shown = {name: x[:SHOWN, 0].numpy() for name, x in sets.items()}
    workspace.save_arrays(run.work.results / "evidence_images.npz", shown)
    return {"evidence_images": published_images.image_statistics(sets, mnist_extractor())}


def packed(run: Experiment) -> Tables:
    """Write packed.safetensors, small enough to be committed, and measure what that costs."""
    model, seed = run.model, run.seed + OTHER_NOISE
    plan = allocate(model, run.kept_sensitivity(run.seed), file_mib=SHIPPED_MIB)
    small = quantize(model, plan)
    save_quantized(run.work.results / subject.PACKED, small, model, compress=True)
    key = "allocate", f"{SHIPPED_MIB:g} MiB", "coded", "channel", "feedback"
    shipped = Row(*key, plan, inception=True, made=budget_rows.made(run.samples, run.seed))
    rows, sampling = [BASELINE._replace(inception=True), shipped], run.sampling(run.p["IMAGES"])
    table, _ = evaluate(run.work, model, rows, sampling, run.p["INCEPTION_REFERENCE"])
    outputs = training.held_out_outputs(model, seed)
    errors = [damage.output_errors(m, outputs, seed)[0] for m in (model, dequantize_(small))]
    measured = [damage.over("damage", e, torch.ones_like(e), seed) for e in errors]
    return {"packed": table.join(pd.DataFrame(measured))}


def digit_sizes(run: Experiment) -> Tables:
    """FID of the headline's images against real digits of 32x32 and of 28x28, as the poster does
    not say which it takes; keeps the statistics of the former (`reference`).
    """
    table, images = load_rows(run.work, "05_published")
    if not (inception := inception_extractor(run.p["INCEPTION_REFERENCE"])):
        raise ValueError("FID against 28x28 digits needs Inception's weights")
    digits = mnist(train=False)[0][subject.REFERENCE][: inception.reference_images]
    both = (inception.features(x).features for x in (digits, subject.unpadded(digits)))
    whole, small = map(metrics.Reference, both)
    save_reference(whole, digits, weights_sha256(inception.network))
    sizes = table[[*KEY, "sample", "n_images"]].copy()
    for name, reference in {"fid_32": whole, "fid_28": small}.items():
        seen = (
            inception.features(torch.from_numpy(images[key])[:, None]) for key in table["sample"]
        )
        sizes[name] = [metrics.fid(of_row.features, reference) for of_row in seen]
    return {"evidence_digits": sizes}


# The table that a step writes last: where it is, the step's others are.
STEPS: dict[str, Callable[[Experiment], Tables]] = {
    "noise_floor": noise_floor,
    "evidence_int4": at_int4_bytes,
    "evidence_damages": damages,
    "evidence_rows": many_images,
    "evidence_images": described,
    "evidence_runs": training_runs,
    "evidence_digits": digit_sizes,
    "packed": packed,
}
# The other steps would take days at the poster's width.
AT_POSTERS_SIZE = ("evidence_int4", "evidence_damages", "evidence_digits", "packed")


def make_missing(profile: str, only: str = "", anew: bool = False) -> None:
    """Make the steps whose table is missing."""
    work = Workspace(profile)
    for name, make in STEPS.items():
        if only not in ("", name) or (profile == "paper") != (name in AT_POSTERS_SIZE):
            continue
        if load_optional(work, name) is not None and not anew:
            print(f"{name}: there already, in results/{profile}")
            continue
        for table, content in sorted(make(Experiment(profile)).items(), key=lambda t: t[0] == name):
            workspace.save_table(work, table, content)
            print(f"{table}: written to results/{profile}")


def main() -> int:
    """`make evidence`; errors are one sentence and exit status 1, with earlier steps kept."""
    parser = argparse.ArgumentParser(prog="lafq.study.long_runs")
    parser.add_argument("--profile", default="small")
    parser.add_argument("--anew", action="store_true", help="make every step again")
    parser.add_argument("--only", default="", choices=["", "published", *STEPS])
    parser.add_argument("--published", type=Path, help="the authors' images: clone or npz file")
    args = parser.parse_args()
    try:
        if args.published:
            published_images.measure(args.published, profile_parameters(args.profile)["SEED"])
        elif args.only in ("", "published"):
            print("published: left out; PUBLISHED=path scores the authors' images (07_audit)")
        make_missing(args.profile, args.only, args.anew)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
