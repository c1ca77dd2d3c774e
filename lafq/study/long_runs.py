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
    compute_on,
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
# A row of 1,000 images takes minutes: of these (rule, rounding) no other budgets.
SELECTED = {
    ("uniform", "feedback"): (),
    ("allocate", "nearest"): (4.0,),
    ("allocate_all", "feedback"): (3.5,),
    **{(rule, "feedback"): () for rule in RULES},
}
AT_32_BITS = BASELINE._replace(setting="32.000", bits=32.0)
Tables = dict[str, pd.DataFrame]


class Experiment:
    """What the steps of a profile share: parameters, model, sensitivity, how images are drawn."""

    def __init__(self, profile: str) -> None:
        self.p = profile_parameters(profile)
        self.seed, self.samples = self.p["SEED"], self.p["TRUE_FISHER_SAMPLES"]
        self.work = Workspace.of(self.p)
        self.model = load_model(self.work, self.p["WIDTH"])

    @cached_property
    def known(self) -> Sensitivity:
        """The sensitivity that the plans of 06_budget are made from."""
        return measured_sensitivity(self.model, self.samples, self.seed)

    def kept_sensitivity(self, seed: int) -> Sensitivity:
        """Sensitivity at the poster's size: fewer channels a pass, and kept in build/<profile>, so
        that an interrupted run goes on from there.
        """
        weights = weights_sha256(self.model)[:12]
        paths = [
            self.work.build / f"{part}_{weights}_{self.samples}_{seed}.safetensors"
            for part in ("fisher", "curvature")
        ]
        if not all(path.is_file() for path in paths):
            known = measured_sensitivity(self.model, self.samples, seed, CHANNELS)
            for path, tensors in zip(paths, known, strict=False):
                save_tensors(path, tensors)
        return Sensitivity(*(load_tensors(path, "make evidence")[0] for path in paths))

    def sampling(self, images: int, seed: int | None = None) -> Sampling:
        """So many images in the profile's steps and batches, from its noise or that of a seed."""
        seed = self.seed if seed is None else seed
        return Sampling(images, self.p["SAMPLING_STEPS"], seed, self.p["SAMPLING_BATCH"])

    def rounded_alike(self, bits: list[float], rules: tuple[str, ...]) -> list[Row]:
        """The allocator's rows and the rules', all with error feedback."""
        rows = allocated_at_bits(self.model, self.known, bits, ("mixed",), variants=())
        rows += rules_at_bits(self.model, self.known, bits, self.seed, rules)
        return [row for row in rows if row.rounding == "feedback"]

    def with_claims(self, name: str, rows: list[Row], sampling: Sampling) -> Tables:
        """The table of rows `name`, and the claims about its rules."""
        table, images = evaluate_large(self.work, self.model, rows, sampling)
        ruled = table[table["rule"].isin(RULES)]
        of_rules = pd.DataFrame(claims.rule_image_claims(ruled, images, sampling.seed))
        return {f"{name}_claims": of_rules, name: table}

    def at_budgets(self, name: str, rows: list[Row], images: int) -> Tables:
        """The table of rows `name` by their budget, after the unquantized model."""
        table, _ = evaluate(self.work, self.model, [AT_32_BITS, *rows], self.sampling(images))
        return {name: by_budget(table).drop(columns="sample")}


def noise_floor(profile: str) -> Tables:
    """What FID and KID show of real and of generated digits at every number of images."""
    run = Experiment(profile)
    generated = ImageStore(run.work).draw(run.model, run.sampling(run.p["CHECK_IMAGES"])).images
    inception = run.p["INCEPTION_REFERENCE"] > 0
    return {"noise_floor": published_images.noise_floor(generated, run.seed, inception)}


def many_images(profile: str, images: int = IMAGES) -> Tables:
    """The rows of C3 and C4 with ten times the images, on disjoint blocks too, and these claims."""
    run = Experiment(profile)
    fisher = load_fisher(run.work, run.p["WIDTH"])
    rows = claimed_rows(run.model, fisher, run.p["THRESHOLDS"])
    table, samples = evaluate_large(run.work, run.model, rows, run.sampling(images))
    of_images = claims.claims_on_images(table, samples, run.seed)
    return {"evidence_rows_claims": pd.DataFrame(of_images), "evidence_rows": table}


def training_runs(profile: str, seeds: tuple[int, ...] = SEEDS) -> Tables:
    """Rows and claims of models trained from other seeds, and each claim over them."""
    with one_process_per_core() as pool:
        by_seed = list(pool.map(training_run, repeat(profile_parameters(profile)), seeds))
    table, of_runs = (pd.concat(parts, ignore_index=True) for parts in zip(*by_seed, strict=True))
    over = claims.over_runs(of_runs)
    return {"evidence_runs_claims": of_runs, "evidence_runs_over": over, "evidence_runs": table}


def one_process_per_core() -> Executor:
    """Processes for training runs, each of which computes with one thread."""
    return ProcessPoolExecutor(CPU_COUNT, mp_context=get_context("spawn"))


def training_run(p: dict[str, Any], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and claims of one run, columns seed and steps (of training) in front."""
    work = Workspace(p["PROFILE"], compute_on(1, p["DEVICE"]))
    model, digits = trained(work, p, seed), mnist(train=True)[0]
    draws = {"samples": p["FISHER_SAMPLES"], "bins": p["TIMESTEP_BINS"], "seed": seed}
    fisher = fisher_by_timestep(model, list(quantizable(model)), digits, **draws)
    rows = claimed_rows(model, fisher.by_weight, p["THRESHOLDS"])
    table, images = evaluate(work, model, rows, Sampling(p["IMAGES"], p["SAMPLING_STEPS"], seed))
    weights = fisher.timesteps.drop_duplicates("parameter").set_index("parameter")["weights"]
    of_fisher = claims.fisher_claims(fisher.blocks, weights, "empirical, noised digits", seed)
    of_run = pd.DataFrame([*of_fisher, *claims.claims_on_images(table, images, seed)])
    run = {"seed": seed, "steps": p["TRAINING"]["steps"]}
    tables = (t.assign(**run) for t in (table, of_run))
    return tuple(t[[*run, *t.columns.drop(list(run))]] for t in tables)


def trained(work: Workspace, parameters: dict[str, Any], seed: int) -> UNet:
    """The model of a seed: the shipped one for the profile's seed; else trained, on from its
    checkpoint where there is one.
    """
    width, settings = parameters["WIDTH"], {**parameters["TRAINING"], "seed": seed}
    if seed == parameters["SEED"]:
        return load_model(work, width)
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator(seed))))
    model = UNet(width, settings.pop("dropout"))
    model = model.to(work.device, memory_format=torch.channels_last)
    checkpoint = work.build / f"replicate_{seed}.safetensors"
    weights, _ = training.fit(model, mnist(train=True)[0], checkpoint, **settings)
    result = UNet(width)
    result.load_state_dict(weights)
    return result.eval().to(work.device, memory_format=torch.channels_last)


def budgets(profile: str, images: int = IMAGES) -> Tables:
    """FID of rows of 06_budget: uniform formats, the allocator (tuned too), threshold rules."""
    run = Experiment(profile)
    rows = allocated_at_bits(run.model, run.known, ALLOCATED, granularities=("mixed",))
    rows += tuned_rows(rows, **run.p["TUNED"])
    rows += rules_at_bits(run.model, run.known, RULE_BITS, run.seed, RULES)
    rows = [*uniform_at_bits(run.model, run.known), *rows]
    rows = [row for row in rows if row.bits in SELECTED.get((row.rule, row.rounding), (row.bits,))]
    return run.at_budgets("evidence_budget", rows, images)


def fresh_noise(profile: str, images: int = IMAGES) -> Tables:
    """The allocator and the rules rounded alike at 4 bits per weight, from noise never used."""
    run, bits = Experiment(profile), [claims.RATE]
    rows = run.rounded_alike(bits, ("global", "group", "ratio"))
    rows[1:1] = tuned_rows(rows, bits, run.p["TUNED"]["steps"])
    sampling = run.sampling(images, run.seed + damage.FRESH_SEED)
    return run.with_claims("evidence_fresh", rows, sampling)


def coded_files(profile: str, images: int = IMAGES) -> Tables:
    """FID of entropy-coded files of 06_budget, from the noise of the other rows."""
    run = Experiment(profile)
    rows = coded_at_bits(run.model, run.known, CODED_FILES)
    return run.at_budgets("evidence_coded", rows, images)


def at_int4_bytes(profile: str, images: int = IMAGES) -> Tables:
    """Uniform INT8 and INT4; at INT4's bytes the allocator and two rules, rounded alike."""
    run = Experiment(profile)
    uniform, how = uniform_rows(run.model, ("int8", "int4")), made(run.samples, run.seed)
    rows = run.rounded_alike([bits_of(run.model, uniform[-1].plan)], ("global", "ratio"))
    rows = [*uniform, *(row._replace(made=how) for row in rows)]
    return run.with_claims("evidence_int4", rows, run.sampling(images))


def damages(profile: str) -> Tables:
    """06_budget without images: bytes in memory and in a file, damage on digits never used."""
    run = Experiment(profile)
    model, seed = run.model, run.seed
    known, other = run.kept_sensitivity(seed), run.kept_sensitivity(seed + 1)
    allocated = allocated_at_bits(model, known, AT_SIZE, ("mixed",), variants=())
    rows = [*uniform_at_bits(model, known), *allocated, *coded_at_bits(model, known, CODED_FILES)]
    files = damage.coded_files(model, [row for row in rows if row.bits < FILES_BELOW], seed)
    rows += rules_at_bits(model, known, [claims.RATE], seed)
    table = damage.measure_damage(model, rows, other, seed, run.p["DAMAGE_DIGITS"], fresh=True)
    return {"evidence_damages": table.merge(files, how="left")}


def described(profile: str, images: int = DESCRIBED) -> Tables:
    """What the images are like of rows that FID and damage order differently: uniform INT3 to INT6,
    and two rules at 6 bits.
    """
    run = Experiment(profile)
    uniform = uniform_rows(run.model, ("int3", "int4", "int6"))
    plans = {f"uniform {row.format.upper()}": row.plan for row in uniform}
    for row in rules_at_bits(run.model, run.known, [6.0], run.seed, ("global", "magnitude")):
        if row.rounding == "nearest":
            plans[f"{row.rule}, {row.bits:g} bits per weight"] = row.plan
    store, sampling = ImageStore(run.work), run.sampling(images)
    sets = {"FP32": store.draw(run.model, sampling).images}
    for name, plan in plans.items():
        small = dequantize_(quantize(run.model, plan))
        sets[name] = store.draw(small, sampling, name).images
    sets[published_images.REAL_DIGITS] = mnist(train=False)[0][HELD_OUT][:images]
    shown = {name: x[:SHOWN, 0].numpy() for name, x in sets.items()}
    save_arrays(run.work.results / "evidence_images.npz", shown)
    return {"evidence_images": published_images.image_statistics(sets, mnist_extractor())}


def packed(profile: str) -> Tables:
    """Write the weights in a file small enough to be committed (results/<profile>/
    packed.safetensors), and measure what that costs.

    The rows of `evaluate.evaluate`, of the FP32 weights and of the packed ones, with `damage`, the
    mean squared change of the model's output on held-out digits, and its 95 % interval.
    """
    run = Experiment(profile)
    plan = allocate(run.model, run.kept_sensitivity(run.seed), file_mib=SHIPPED_MIB)
    small = quantize(run.model, plan)
    save_quantized(run.work.results / PACKED, small, run.model, compress=True)
    key = "allocate", f"{SHIPPED_MIB:g} MiB", "coded", "channel", "feedback"
    rows = [BASELINE, Row(*key, plan, made=made(run.samples, run.seed))]
    rows = [row._replace(inception=True) for row in rows]
    sampling, reference = run.sampling(run.p["IMAGES"]), run.p["INCEPTION_REFERENCE"]
    table, _ = evaluate(run.work, run.model, rows, sampling, reference)
    seed = run.seed + OTHER_NOISE
    outputs = training.held_out_outputs(run.model, seed)
    models = run.model, dequantize_(small)
    errors = [damage.output_errors(model, outputs, seed) for model in models]
    rises = pd.DataFrame([damage.output_mse(*of_model, seed) for of_model in errors])
    return {"packed": table.join(rises.drop(columns="delta_loss"))}


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
    """Make the steps whose table is missing; it is written last: where it is, its others are."""
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
    """`make evidence`; errors are one sentence and exit status 1, with earlier steps kept."""
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


if __name__ == "__main__":
    sys.exit(main())
