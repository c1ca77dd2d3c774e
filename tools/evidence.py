"""Experiments that take hours: `make evidence` runs them step by step, and the notebooks load their
tables.

Steps whose tables are there already are left alone (`--anew` makes them again); within a step,
images that were sampled and training that was done before an interruption are kept in
build/<profile>.
"""

import argparse
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
from dask.system import CPU_COUNT
from torch import nn

from lafq.fisher.sensitivity import CHANNELS, Sensitivity
from lafq.quantization.model import dequantize_, quantize, weights_sha256
from lafq.quantization.plan import Plan
from lafq.study import replicates, threshold_rows, workspace
from lafq.study.audit import published_images
from lafq.study.audit.noise_floor import noise_floor
from lafq.study.budget import budget, methods, rules
from lafq.study.budget.image_statistics import REAL, image_statistics
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.subject import load_fisher, load_model
from lafq.study.diffusion.unet import quantizable
from lafq.study.images.evaluate import evaluate, evaluate_large
from lafq.study.images.features import mnist_extractor
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import BASELINE, by_budget
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import load_tensors, save_tensors

IMAGES, DESCRIBED, SHOWN = 1000, 200, 16
ALLOCATED, RULE_BITS = (3.0, 3.5, 4.0, 5.0, 6.0), (4.0, 6.0)
# Bits per weight: of entropy-coded files, and of the allocator at the poster's size.
CODED_FILES, AT_SIZE, FILES_BELOW = (2.0, 2.5), (2.5, 3.0, 4.0, 6.0), 9
RULES = ("global", "group", "ratio", "magnitude", "random")
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


def rows(profile: str, images: int = IMAGES) -> dict[str, pd.DataFrame]:
    """The rows that C3 and C4 speak of with ten times the images, on disjoint blocks too, and these
    claims at that N.
    """
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model, fisher = load_model(work, p["WIDTH"]), load_fisher(work, p["WIDTH"])
    claimed = replicates.claimed_rows(model, fisher, p["THRESHOLDS"])
    table, samples = evaluate_large(
        work, model, claimed, Sampling(images, p["SAMPLING_STEPS"], p["SEED"])
    )
    return {
        "rows": table,
        "rows_claims": pd.DataFrame(replicates.on_images(table, samples, p["SEED"])),
    }


def one_process_per_core() -> Executor:
    """Processes for training runs, each of which computes with one thread."""
    return ProcessPoolExecutor(CPU_COUNT, mp_context=get_context("spawn"))


def runs(profile: str, seeds: tuple[int, ...] = replicates.SEEDS) -> dict[str, pd.DataFrame]:
    """Rows and claims of models trained from other seeds, and each claim over them."""
    with one_process_per_core() as pool:
        found = list(pool.map(replicates.replicate, repeat(profile_parameters(profile)), seeds))
    table, claims = (pd.concat(parts, ignore_index=True) for parts in zip(*found, strict=True))
    return {"runs": table, "runs_claims": claims, "runs_over": replicates.over_runs(claims)}


def budgets(profile: str, images: int = IMAGES) -> dict[str, pd.DataFrame]:
    """FID of rows of 06_budget: the unquantized model, uniform formats, the allocator ("mixed";
    tuned too), threshold rules.
    """
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model = load_model(work, p["WIDTH"])
    known = methods.measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    allocated = methods.allocated(model, known, list(ALLOCATED), granularities=("mixed",))
    rows = [
        BASELINE._replace(setting="32.000", bits=32.0),
        *methods.uniform(model, known),
        *allocated,
    ]
    rows += methods.tuned(allocated, **p["TUNED"])
    rows += [
        row
        for row in methods.thresholds(model, known, list(RULE_BITS), p["SEED"])
        if row.rule in RULES
    ]
    rows = [row for row in rows if row.bits in SELECTED.get((row.rule, row.rounding), (row.bits,))]
    table, _ = evaluate(work, model, rows, Sampling(images, p["SAMPLING_STEPS"], p["SEED"]))
    return {"budget": by_budget(table).drop(columns="sample")}


def fresh(profile: str, images: int = IMAGES) -> dict[str, pd.DataFrame]:
    """Rows of 06_budget at 4 bits per weight, the allocator and the rules rounded alike, from noise
    never used before.
    """
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model, seed = load_model(work, p["WIDTH"]), p["SEED"] + budget.FRESH_SEED
    known = methods.measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    allocated = methods.allocated(model, known, [rules.RATE], ("mixed",), ablations=())
    found = [*allocated, *methods.tuned(allocated, [rules.RATE], p["TUNED"]["steps"])]
    found += methods.thresholds(model, known, [rules.RATE], p["SEED"])
    chosen = [row for row in found if (row.rule, row.rounding) in FRESH]
    table, samples = evaluate_large(
        work, model, chosen, Sampling(images, p["SAMPLING_STEPS"], seed)
    )
    claims = rules.image_claims(table[table["rule"].isin(RULES)], samples, seed)
    return {"fresh": table, "fresh_claims": pd.DataFrame(claims)}


def coded(profile: str, images: int = IMAGES) -> dict[str, pd.DataFrame]:
    """FID of entropy-coded files of 06_budget, from the noise of the other rows."""
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model = load_model(work, p["WIDTH"])
    known = methods.measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    rows = [
        BASELINE._replace(setting="32.000", bits=32.0),
        *methods.coded(model, known, list(CODED_FILES)),
    ]
    table, _ = evaluate(work, model, rows, Sampling(images, p["SAMPLING_STEPS"], p["SEED"]))
    return {"coded": by_budget(table).drop(columns="sample")}


def at_int4_bytes(profile: str, images: int = IMAGES) -> dict[str, pd.DataFrame]:
    """Uniform INT8 and INT4, and at the bytes of INT4 the allocator and two rules, rounded alike;
    the noise of the other tables.
    """
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model, seed, samples = load_model(work, p["WIDTH"]), p["SEED"], p["TRUE_FISHER_SAMPLES"]
    known = methods.measured_sensitivity(model, samples, seed)
    same = threshold_rows.uniform(model, ("int8", "int4"))
    bits = methods.bits_of(model, same[-1].plan)
    found = methods.allocated(model, known, [bits], ("mixed",), ablations=())
    found += methods.thresholds(model, known, [bits], seed, ("global", "ratio"))
    chosen = [
        row._replace(made=methods.made(samples, seed))
        for row in found
        if (row.rule, row.rounding) in FRESH
    ]
    sampling = Sampling(images, p["SAMPLING_STEPS"], seed, p["SAMPLING_BATCH"])
    table, generated = evaluate_large(work, model, [*same, *chosen], sampling)
    ruled = table[table["rule"].isin(RULES)]
    claims = rules.image_claims(ruled, generated, seed, f"width {p['WIDTH']}, the bytes of INT4")
    return {"int4": table, "int4_claims": pd.DataFrame(claims)}


def sensitivity(work: Workspace, model: nn.Module, samples: int, seed: int) -> Sensitivity:
    """A sensitivity to make plans from; kept in build/<profile>, so that an interrupted run goes on
    from there.
    """
    path, made = (
        work.build / f"sensitivity_{seed}.safetensors",
        {"weights": weights_sha256(model), "samples": samples},
    )
    if path.is_file():
        kept, _ = load_tensors(path, "make evidence", **made)
    else:
        found = methods.measured_sensitivity(model, samples, seed, CHANNELS)
        kept = {
            f"{part}/{name}": t
            for part in ("fisher", "curvature")
            for name, t in getattr(found, part).items()
        }
        save_tensors(path, kept, **made)
    parts = [
        {n.removeprefix(part): t for n, t in kept.items() if n.startswith(part)}
        for part in ("fisher/", "curvature/")
    ]
    return Sensitivity(*parts)


def damages(profile: str) -> dict[str, pd.DataFrame]:
    """06_budget at the poster's size without images: bytes in memory and in a file, and damage on
    digits never used before.
    """
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model, seed, samples = load_model(work, p["WIDTH"]), p["SEED"], p["TRUE_FISHER_SAMPLES"]
    known, other = (sensitivity(work, model, samples, s) for s in (seed, seed + 1))
    rows = [
        *methods.uniform(model, known),
        *methods.allocated(model, known, list(AT_SIZE), ("mixed",), ablations=()),
    ]
    in_files = rows + methods.coded(model, known, list(CODED_FILES))
    ruled = methods.thresholds(model, known, [rules.RATE], seed)
    table = budget.measure_candidates(
        model, in_files + ruled, other, seed, p["DAMAGE_DIGITS"], fresh=True
    )
    files = budget.coded_files(model, [row for row in in_files if row.bits < FILES_BELOW], seed)
    return {"damages": table.merge(files, how="left")}


def described(profile: str, images: int = DESCRIBED) -> dict[str, pd.DataFrame]:
    """What the images are like of rows that FID and damage order differently: uniform INT3 to INT6,
    and two rules at 6 bits.
    """
    p = profile_parameters(profile)
    work, sampling = Workspace.of(p), Sampling(images, p["SAMPLING_STEPS"], p["SEED"])
    model = load_model(work, p["WIDTH"])
    known = methods.measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
    chosen = {
        f"uniform {low.upper()}": Plan(dict.fromkeys(quantizable(model), low))
        for low in ("int3", "int4", "int6")
    }
    rules_at_6 = {
        row.rule: row.plan
        for row in methods.thresholds(model, known, [6.0], p["SEED"])
        if row.rounding == "nearest"
    }
    chosen |= {f"{rule}, 6 bits per weight": rules_at_6[rule] for rule in ("global", "magnitude")}
    sets = {"FP32": ImageStore(work).draw(model, sampling).images}
    sets |= {
        name: ImageStore(work).draw(dequantize_(quantize(model, plan)), sampling, name).images
        for name, plan in chosen.items()
    }
    sets[REAL] = mnist(train=False)[0][HELD_OUT][:images]
    workspace.save_images(
        work, "evidence_images", {name: x[:SHOWN, 0].numpy() for name, x in sets.items()}
    )
    return {"images": image_statistics(sets, mnist_extractor())}


STEPS = {
    "noise_floor": lambda profile: {"noise_floor": noise_floor(profile_parameters(profile))},
    "evidence_budget": lambda profile: {
        f"evidence_{name}": table for name, table in budgets(profile).items()
    },
    "evidence_fresh": lambda profile: {
        f"evidence_{name}": table for name, table in fresh(profile).items()
    },
    "evidence_coded": lambda profile: {
        f"evidence_{name}": table for name, table in coded(profile).items()
    },
    "evidence_int4": lambda profile: {
        f"evidence_{name}": table for name, table in at_int4_bytes(profile).items()
    },
    "evidence_damages": lambda profile: {
        f"evidence_{name}": table for name, table in damages(profile).items()
    },
    "evidence_rows": lambda profile: {
        f"evidence_{name}": table for name, table in rows(profile).items()
    },
    "evidence_images": lambda profile: {
        f"evidence_{name}": table for name, table in described(profile).items()
    },
    "evidence_runs": lambda profile: {
        f"evidence_{name}": table for name, table in runs(profile).items()
    },
}
# The other steps would take days at the poster's width.
AT_POSTERS_SIZE = ("evidence_int4", "evidence_damages")


def main() -> int:
    """Make the steps that are missing; errors are one sentence and exit status 1, with the steps
    made before left as they were.
    """
    parser = argparse.ArgumentParser(prog="tools.evidence")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--anew", action="store_true", help="make every step again")
    parser.add_argument("--only", default="", choices=["", "published", *STEPS])
    parser.add_argument(
        "--published",
        type=Path,
        help="the authors' published images: a clone of their repository, or an npz file",
    )
    args = parser.parse_args()
    work = Workspace(args.profile)
    try:
        if args.published:
            published_images.measure(args.published, profile_parameters(args.profile)["SEED"])
        elif args.only in ("", "published"):
            print(
                "published: the authors' images are not in this repository; PUBLISHED=path scores "
                "them (07_audit)"
            )
        for name, make in STEPS.items():
            if args.only not in ("", name) or (args.profile == "paper") != (
                name in AT_POSTERS_SIZE
            ):
                continue
            if workspace.load_optional(work, name) is not None and not args.anew:
                print(f"{name}: there already, in results/{args.profile}")
                continue
            # The step's own table comes last: where it is, the others are.
            for table, content in sorted(
                make(args.profile).items(), key=lambda item: item[0] == name
            ):
                workspace.save_table(work, table, content)
                print(f"{table}: written to results/{args.profile}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
