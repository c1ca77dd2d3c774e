"""The tables and sentences that the README and the model card show, each computed from the committed results."""

import json

import pandas as pd

from lafq import paths
from lafq.diffusion.unet import UNet
from lafq.diffusion.weights import PACKED, WEIGHTS
from lafq.io import load_tensors, sha256
from lafq.paper import claims, poster, results
from lafq.paper.audit import published_images
from lafq.paper.budget_study import methods, rules, summaries
from lafq.presentation import audit_tables, benchmarks, sentences, tables
from lafq.workspace import Workspace
from tools import cost, shipping
from tools.notebooks import notebooks, profile_parameters


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub shows it, cells as they are printed."""
    lines = [table.columns.tolist(), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def blocks(profile: str = "mini") -> dict[str, str]:
    """The text of every marked block, from the committed results of a profile and, at the poster's size, of profile paper."""
    work, paper = Workspace(profile), Workspace("paper")
    _, trained = load_tensors(work.results / WEIGHTS, "01_train")
    quality = results.load_table(work, "training_quality")
    names = ("01_baseline", "03_global", "04_group", "05_ratio_sweep")
    of_profile = {w.profile: pd.concat([results.load_table(w, name) for name in names], ignore_index=True) for w in (work, paper)}
    rows = of_profile[profile]
    timed = json.loads((work.results / "timing.json").read_text())["notebooks"]
    classifier = json.loads((paths.RESULTS / "classifier" / "classifier.json").read_text())
    minutes, peak = sum(n["seconds"] for n in timed.values()) / 60, max(n["peak_mib_so_far"] for n in timed.values()) / 1024
    budget, evidence_budget = results.load_table(work, "budget"), results.load_optional(work, "evidence_budget")
    published = poster.compare(results.load_table(paper, "08_published"), "paper")
    terrain = results.load_table(Workspace("terrain"), "terrain")
    int4, int4_claims = (results.load_table(paper, name) for name in ("evidence_int4", "evidence_int4_claims"))
    on_images = summaries.on_images(int4_claims, poster.WIDTH, int4["n_images"].iloc[0])
    coded = results.load_table(work, "06_coded")
    found = sentences.findings(published, budget, coded, on_images)
    claimed = {w.profile: markdown(tables.claims_text(results.load_table(w, "claims"))) for w in (work, paper)}
    drivers = {w.profile: sentences.drivers_of_fisher(results.load_table(w, "02_fisher")) for w in (work, paper)}
    said = [drivers[profile], sentences.published_ratio_sizes(), sentences.changes_by_format(rows), sentences.layerwise_size()]
    measured = {
        name: pd.read_csv(paths.RESULTS / "benchmarks" / f"{name}.csv") for name in ("fisher", "quantizers", "binder", "passes")
    }
    return {
        "findings": "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(found, start=1)),
        "headline": headline(published),
        "verdicts": verdicts(paper, work),
        "comparison": f"{markdown(tables.comparison(work))}\n\n{tables.note(rows)}",
        "comparison_paper": f"{markdown(tables.comparison(paper))}\n\n{tables.note(of_profile['paper'])}",
        "claims": "\n".join([claimed[profile], "", *(f"- {sentence}" for sentence in said)]),
        "claims_paper": f"{claimed['paper']}\n\n{drivers['paper']}",
        "evidence": evidence(work),
        "rules": f"{markdown(rules.rules_at_equal_bytes(budget, methods.FEEDBACK))}\n\n{summaries.best_rule(budget)}",
        "rules_claims": markdown(rules_shown(rule_claims(work))),
        "int4": at_int4_bytes(int4, int4_claims),
        "fresh": markdown(summaries.both_draws(budget, results.load_table(work, "06_fresh"))),
        "published_scores": markdown(audit_tables.published_scores(published_images.load("scores"))),
        "published_sets": (
            f"{markdown(audit_tables.compared_shown(published_images.load('compared')))}\n\n"
            f"{audit_tables.published_sets(published_images.load('compared'))}"
        ),
        "audit": markdown(audit_tables.conclusions(work)),
        "coded": (
            f"{markdown(tables.coded_shown(coded))}\n\n{summaries.coded_sentence(coded)} "
            f"{summaries.coded_with_fid(coded, results.load_optional(work, 'evidence_coded'))}"
        ),
        "passes": f"{markdown(benchmarks.passes_table(measured['passes']))}\n\n{benchmarks.passes_sentence(measured['passes'])}",
        "budget": summaries.summary_sentences(budget, evidence_budget),
        "fisher": markdown(benchmarks.fisher_cost(measured["fisher"])),
        "cost": (
            f"`make reproduce` took {minutes:.0f} minutes on two cores and {peak:.1f} GiB of memory; setting up `.venv` "
            f"comes on top, once."
        ),
        "model": f"{trained['steps']:,} training steps of batch {trained['batch_size']}. {sentences.training_quality(quality)}",
        "classifier": (
            f"test accuracy {classifier['test_accuracy']:.2%}, {classifier['parameters']:,} parameters, sha256 "
            f"`{classifier['sha256']}`"
        ),
        "quantizers": (
            f"{markdown(benchmarks.quantizers_table(measured['quantizers']))}\n\n{benchmarks.quantizers_sentence(measured['quantizers'])}"
        ),
        "terrain": f"{markdown(benchmarks.terrain_table(terrain))}\n\n{benchmarks.terrain_sentence(terrain)}",
        "terrain_character": markdown(benchmarks.terrain_character(terrain)),
        "deviations": markdown(deviations()),
        "counted": counted(),
        "machines": sentences.machines_compared(results.load_table(paper, "machines")),
        "timing": markdown(timing()),
        "card": card(work),
        "packed": shipping.sentence(paper),
        "binder": markdown(measured["binder"]),
    }


def headline(table: pd.DataFrame) -> str:
    """The poster's rows beside ours at the poster's size: `poster.compare` of 08_published."""
    base = poster.POSTER[0]
    cells = [
        (
            f"{row.method} {row.threshold if row.method == 'ratio' else ''}".strip() + f", {row.format.upper()}",
            f"{row.fid_paper - base.fid:+.2f}" if pd.notna(row.fid_paper) else "",
            f"{row.delta_fid_inception:+.2f} [{row.delta_fid_inception_low:+.2f}, {row.delta_fid_inception_high:+.2f}]",
            f"{row.mem_share_paper:.1%}" if pd.notna(row.mem_share_paper) else "",
            f"{row.mem_share:.1%}",
        )
        for row in tables.listed(table[table["method"] != "baseline"]).itertuples()
    ]
    columns = ["row", "FID difference, poster", "FID difference, ours", "bytes, poster", "bytes, ours"]
    images, steps = table["n_images"].iloc[0], table["steps"].iloc[0]
    baseline = table[table["method"] == "baseline"]["fid_inception"].item()
    return (
        f"{markdown(pd.DataFrame(cells, columns=columns))}\n\n"
        f"Differences from FP32 (positive: worse); bytes as shares of FP32's. Width {poster.WIDTH}, N = {images}, Inception "
        f"features. Poster: {poster.SAMPLING_STEPS:,} steps, other noise in every row, baseline {base.fid:.2f}. Ours: {steps:,} "
        f"steps, the same noise, baseline {baseline:.2f}, thresholds on single weights, 95 % intervals."
    )


def verdicts(paper: Workspace, small: Workspace) -> str:
    """One row per claim: what was measured at the poster's size and at a quarter of its width, and the verdicts."""
    cells = []
    for claim in ("C1", "C2", "C3", "C4 images"):
        row = [f"{claim.removesuffix(' images')}: {claims.SAID[claim]}"]
        for work in (paper, small):
            found = results.load_table(work, "claims")
            found = found[found["claim"] == claim]
            found = found[found["quantity"].str.contains("INT8")] if claim == "C3" else found
            known = [f"**{r.verdict}** ({r.measured:.3g} [{r.low:.3g}, {r.high:.3g}])" for r in found.itertuples()]
            row.append(known[0] if known else "not tested yet")
        cells.append(row)
    quantities = (
        "C1: mean Fisher information at t < 500 divided by that at t >= 500; C2: per weight, Layers 1-2 divided by 3-6. "
        "C3, C4: FID differences (negative: better), INT8, 100 and 50 sampling steps."
    )
    table = pd.DataFrame(cells, columns=["the poster's claim", "at the poster's size", "at a quarter of its width"])
    return f"{markdown(table)}\n\n{quantities}"


def rule_claims(work: Workspace) -> pd.DataFrame:
    """The claims about threshold rules: on damage and, where `make evidence` has made them, on images."""
    found = (results.load_optional(work, name) for name in ("06_claims", "evidence_fresh_claims"))
    return pd.concat([table for table in found if table is not None], ignore_index=True)


def rules_shown(found: pd.DataFrame) -> pd.DataFrame:
    """Claims about threshold rules as text; the poster makes none, and each is tested once."""
    return tables.claims_text(found).drop(columns=["paper", "p", "note"])


def at_int4_bytes(rows: pd.DataFrame, found: pd.DataFrame) -> str:
    """The rows and claims of `make evidence` at the bytes of uniform INT4, and what they say."""
    columns = ["method", "format", "mem_mib", "mem_share", "fid_mnist", "delta_fid_mnist", "psnr", "class_changed"]
    shown = tables.format_table(rows, columns, ("delta_fid_mnist",))
    return f"{markdown(shown)}\n\n{summaries.at_int4_bytes(rows, poster.WIDTH)}\n\n{markdown(rules_shown(found))}"


def evidence(work: Workspace) -> str:
    """The claims with more images and over other training runs, as far as `make evidence` has been run."""
    steps, table = ("evidence_rows", "evidence_runs"), tables.evidence_claims(work)
    missing = [step for step in steps if results.load_optional(work, step) is None]
    lines = [f"Not made yet: {step} (`make evidence`)." for step in missing]
    if "evidence_rows" not in missing:
        lines.append(sentences.ratios_with_many_images(results.load_table(work, "evidence_rows")))
    if "evidence_runs" not in missing:
        runs = results.load_table(work, "evidence_runs")
        fids = runs[runs["method"] == "baseline"]["fid_mnist"]
        shipped = results.load_table(work, "01_baseline")["fid_mnist"].item()
        lines.append(
            f"The {len(fids)} training runs took {runs['steps'].iloc[0]:,} steps each. The FID of their unquantized models (MNIST "
            f"features, N = {runs['n_images'].iloc[0]}) is {fids.min():,.0f} to {fids.max():,.0f}; that of the shipped model is "
            f"{shipped:.0f}. Their images are far worse, so they say little about C3 and C4."
        )
    return "\n".join(([markdown(table), ""] if table is not None else []) + lines)


def deviations() -> pd.DataFrame:
    """What the profiles mini and paper do otherwise than the paper: setting, paper, and one column per profile."""
    published = poster.TRAINING
    settings = {
        "width of the model": f"{poster.WIDTH} ({poster.BASELINE_MIB:.2f} MiB)",
        "groups of each GroupNorm": f"{poster.WIDTH // 2}",
        "training steps of batch 64": f"{published['steps']:,} (15 epochs)",
        "Adam learning rate": f"{published['peak']:g}, constant",
        "dropout": f"{published['dropout']}",
        "EMA decay": f"{published['ema_decay']}",
        "compute in training": "FP32",
        "sampling steps": f"{poster.SAMPLING_STEPS:,}",
    }
    table = pd.DataFrame({"setting": settings.keys(), "paper": settings.values()})
    for name in ("mini", "paper"):
        p, training = profile_parameters(name), profile_parameters(name)["TRAINING"]
        rate = f"{training['peak']:g}, {training['warmup']} steps of warm-up, linear decay over the last {training['decay']:,}"
        table[f"profile {name}"] = [
            f"{p['WIDTH']} ({4 * sum(t.numel() for t in UNet(p['WIDTH']).parameters()) / 2**20:.2f} MiB)",
            f"{p['WIDTH'] // 2}",
            f"{training['steps']:,}",
            rate,
            f"{training['dropout']}",
            f"{training['ema_decay']}, warmed up",
            ("bfloat16 autocast" if training["bf16"] else "FP32") + (", torch.compile" if training.get("compile") else ""),
            f"{p['SAMPLING_STEPS']:,} (trailing stride)"
            + (f"; the published rows also {p['PUBLISHED']['steps']:,}" if name == "paper" else ""),
        ]
    return table


def counted() -> str:
    """The operations of the profile paper, and how many rows they are for."""
    p = profile_parameters("paper")
    one, published, rows = cost.forward_flop(p["WIDTH"]), p["PUBLISHED"], cost.sampled_rows(p)
    strided, full = (p["IMAGES"] * steps * one / 1e15 for steps in (p["SAMPLING_STEPS"], published["steps"]))
    count, of_08 = sum(rows.values()) - rows["07_audit"], cost.PUBLISHED_ROWS + len(published["ratios"])
    return (
        f"Training, which `TRAIN=1` repeats, takes {cost.training_flop(p) / 1e15:.1f} PFLOP (bfloat16 autocast). 01 and 03 to 05 "
        f"have {count} rows of {p['IMAGES']} images at {p['SAMPLING_STEPS']} steps; a row takes {strided:.2f} PFLOP. 08 has "
        f"{of_08} rows at {published['steps']:,} steps; a row takes {full:.2f} PFLOP."
    )


def timing(profiles: tuple[str, ...] = ("mini", "paper")) -> pd.DataFrame:
    """Minutes of every notebook in each profile's last timed run, and the largest memory of any; "not timed" without one."""
    names = [path.stem for path in notebooks()]
    table = pd.DataFrame({"notebook": [*names, "largest memory"]})
    for profile in profiles:
        path = Workspace(profile).results / "timing.json"
        record = json.loads(path.read_text()) if path.is_file() else {"gpu": None, "notebooks": {}}
        device = record["gpu"] or "two CPU cores"
        cells = [record["notebooks"].get(name) for name in names]
        peak = max((cell["peak_mib_so_far"] for cell in cells if cell), default=0)
        minutes = [f"{cell['seconds'] / 60:.1f} min" if cell else "not timed" for cell in cells]
        table[f"{profile}, {device}"] = [*minutes, f"{peak / 1024:.1f} GiB" if peak else "not measured"]
    return table


def card(work: Workspace) -> str:
    """The shipped weights: file, what it is, size, sha256."""
    _, trained = load_tensors(work.results / WEIGHTS, "01_train")
    classifier = json.loads((paths.RESULTS / "classifier" / "classifier.json").read_text())
    count = sum(p.numel() for p in UNet(trained["width"]).parameters())
    model = f"diffusion model, width {trained['width']}, {count:,} parameters, EMA, FP32, {trained['steps']:,} training steps"
    judge = f"digit classifier, {classifier['parameters']:,} parameters, test accuracy {classifier['test_accuracy']:.2%}"
    packed = f"diffusion model, width {poster.WIDTH}, quantized by the allocator"
    files = {f"{work.profile}/{WEIGHTS}": model, f"paper/{PACKED}": packed, "classifier/classifier.safetensors": judge}
    rows = [
        (f"`{name}`", what, f"{(paths.RESULTS / name).stat().st_size:,}", f"`{sha256(paths.RESULTS / name)}`")
        for name, what in files.items()
    ]
    return markdown(pd.DataFrame(rows, columns=["file", "weights of", "bytes", "sha256"]))
