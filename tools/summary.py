"""The tables and sentences that the pages show, each computed from the committed results."""

import pandas as pd

from lafq.study import claims, poster, workspace
from lafq.study.audit import published_images
from lafq.study.budget import rules, summaries
from lafq.study.figures import audit_tables, benchmarks, sentences, tables, terrain
from lafq.study.workspace import Workspace
from tools import facts
from tools.facts import markdown


def blocks(profile: str = "mini") -> dict[str, str]:
    """The text of every marked block, from the committed results of a profile and, at the poster's
    size, of profile paper.
    """
    work, paper = Workspace(profile), Workspace("paper")
    return (
        study(work, paper)
        | beyond(work, paper)
        | published()
        | measured()
        | facts.blocks(work, paper)
    )


def study(work: Workspace, paper: Workspace) -> dict[str, str]:
    """The rows, the claims and what they show."""
    names = ("01_baseline", "03_global", "04_group", "05_ratio_sweep")
    rows = {
        w.profile: pd.concat([workspace.load_table(w, name) for name in names], ignore_index=True)
        for w in (work, paper)
    }
    claimed = {
        w.profile: markdown(tables.claims_text(workspace.load_table(w, "claims")))
        for w in (work, paper)
    }
    drivers = {
        w.profile: sentences.drivers_of_fisher(workspace.load_table(w, "02_fisher"))
        for w in (work, paper)
    }
    own = rows[work.profile]
    said = [
        drivers[work.profile],
        sentences.published_ratio_sizes(),
        sentences.changes_by_format(own),
        sentences.layerwise_size(),
    ]
    return {
        "headline": headline(poster.compare(workspace.load_table(paper, "08_published"), "paper")),
        "verdicts": verdicts(paper, work),
        "comparison": f"{markdown(tables.comparison(work))}\n\n{tables.note(own)}",
        "comparison_paper": f"{markdown(tables.comparison(paper))}\n\n{tables.note(rows['paper'])}",
        "claims": "\n".join([claimed[work.profile], "", *(f"- {sentence}" for sentence in said)]),
        "claims_paper": f"{claimed['paper']}\n\n{drivers['paper']}",
        "evidence": evidence(work),
        "audit": markdown(audit_tables.conclusions(work)),
    }


def beyond(work: Workspace, paper: Workspace) -> dict[str, str]:
    """The four findings, the allocator and the rules at equal bytes."""
    budget, evidence_budget = (
        workspace.load_table(work, "budget"),
        workspace.load_optional(work, "evidence_budget"),
    )
    int4, int4_claims = (
        workspace.load_table(paper, name) for name in ("evidence_int4", "evidence_int4_claims")
    )
    on_images = summaries.on_images(int4_claims, poster.WIDTH, int4["n_images"].iloc[0])
    coded, fresh = (workspace.load_table(work, name) for name in ("11_files", "evidence_fresh"))
    found = sentences.findings(
        poster.compare(workspace.load_table(paper, "08_published"), "paper"),
        budget,
        coded,
        on_images,
    )
    coded_said = summaries.coded_summary(coded, workspace.load_optional(work, "evidence_coded"))
    return {
        "findings": "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(found, start=1)),
        "rules": f"{markdown(rules.rules_at_equal_bytes(budget, 'feedback'))}\n\n{summaries.best_rule(budget)}",
        "rules_claims": markdown(tables.rules_shown(rule_claims(work))),
        "int4": at_int4_bytes(int4, int4_claims),
        "damages": damages_at_size(workspace.load_table(paper, "evidence_damages")),
        "fresh": markdown(summaries.both_draws(budget, workspace.load_table(work, "06_fresh"))),
        "fresh_images": f"{markdown(images_shown(fresh))}\n\n{summaries.order_by_fid(fresh)}",
        "coded": f"{markdown(tables.coded_shown(coded))}\n\n{coded_said}",
        "budget": summaries.summary_sentences(budget, evidence_budget),
    }


def published() -> dict[str, str]:
    """The authors' published images."""
    scores, compared = published_images.load("scores"), published_images.load("compared")
    said = audit_tables.published_sets(compared)
    return {
        "published_scores": markdown(audit_tables.published_scores(scores)),
        "published_sets": f"{markdown(audit_tables.compared_shown(compared))}\n\n{said}",
    }


def measured() -> dict[str, str]:
    """The benchmarks and the terrain model."""
    names = ("fisher", "running", "binder", "passes", "peers", "growth", "blocks", "groups")
    by = {name: pd.read_csv(workspace.RESULTS / "benchmarks" / f"{name}.csv") for name in names}
    maps, passes = (
        workspace.load_table(Workspace("terrain"), name) for name in ("terrain", "passes")
    )
    return {
        "passes": f"{markdown(benchmarks.passes_table(by['passes']))}\n\n{benchmarks.passes_sentence(by['passes'])}",
        "fisher": markdown(benchmarks.fisher_cost(by["fisher"])),
        "groups": f"{markdown(benchmarks.groups_table(by['groups']))}\n\n{benchmarks.groups_sentence(by['groups'])}",
        "running": markdown(benchmarks.running_table(by["running"])),
        "peers": f"{markdown(benchmarks.peers_table(by['peers'], 'all'))}\n\n{benchmarks.peers_sentence(by['peers'])}",
        "peers_shared": markdown(benchmarks.peers_table(by["peers"], "shared")),
        "growth": f"{markdown(benchmarks.growth_table(by['growth']))}\n\n{benchmarks.growth_sentence(by['growth'])}",
        "blocks": markdown(benchmarks.blocks_table(by["blocks"])),
        "terrain": f"{markdown(terrain.rows_table(maps))}\n\n{terrain.rows_sentence(maps)}",
        "terrain_passes": f"{markdown(terrain.passes_table(passes))}\n\n{terrain.passes_sentence(passes)}",
        "terrain_character": markdown(terrain.character_table(maps)),
        "binder": markdown(by["binder"]),
    }


def headline(table: pd.DataFrame) -> str:
    """The poster's rows beside ours at the poster's size: `poster.compare` of 08_published."""
    base = poster.POSTER[0]
    cells = [
        (
            f"{row.method} {row.threshold if row.method == 'ratio' else ''}".strip()
            + f", {row.format.upper()}",
            f"{row.fid_paper - base.fid:+.2f}" if pd.notna(row.fid_paper) else "",
            f"{row.delta_fid_inception:+.2f} [{row.delta_fid_inception_low:+.2f}, "
            f"{row.delta_fid_inception_high:+.2f}]",
            f"{row.mem_share_paper:.1%}" if pd.notna(row.mem_share_paper) else "",
            f"{row.mem_share:.1%}",
        )
        for row in tables.listed(table[table["method"] != "baseline"]).itertuples()
    ]
    columns = [
        "row",
        "FID difference, poster",
        "FID difference, ours",
        "bytes, poster",
        "bytes, ours",
    ]
    images, steps = table["n_images"].iloc[0], table["steps"].iloc[0]
    baseline = table[table["method"] == "baseline"]["fid_inception"].item()
    return (
        f"{markdown(pd.DataFrame(cells, columns=columns))}\n\n"
        f"Differences from FP32 (positive: worse); bytes as shares of FP32's. Width "
        f"{poster.WIDTH}, N = {images}, {steps:,} "
        f"steps, Inception features. Poster: new noise per row; FP32 FID {base.fid:.2f}; formats "
        f"not stated (INT8 assumed); "
        "bytes of FP16 and group from the authors' README. Ours: same noise for all rows; FP32 FID "
        f"{baseline:.2f}; rules choose per weight; 95 % intervals."
    )


def verdicts(paper: Workspace, small: Workspace) -> str:
    """One row per claim: what was measured at the poster's size and at a quarter of its width, and
    the verdicts.
    """
    cells = []
    for claim in ("C1", "C2", "C3", "C4 images"):
        row = [f"{claim.removesuffix(' images')}: {claims.SAID[claim]}"]
        for work in (paper, small):
            found = workspace.load_table(work, "claims")
            found = found[found["claim"] == claim]
            found = found[found["quantity"].str.contains("INT8")] if claim == "C3" else found
            write, unit = ("{:+.2f}", " FID") if claim[:2] in ("C3", "C4") else ("{:.3g}", " times")
            known = [
                f"**{r.verdict}**: {write.format(r.measured)}{unit} [{write.format(r.low)}, "
                f"{write.format(r.high)}]"
                for r in found.itertuples()
            ]
            row.append(known[0] if known else "not tested yet")
        cells.append(row)
    inside = sum(poster.BEST_RATIOS[0] <= ratio <= poster.BEST_RATIOS[1] for ratio in poster.RATIOS)
    quantities = (
        "C1: empirical Fisher information at t < 500, divided by that at t >= 500. C2: mean Fisher "
        "information per weight of "
        f"Layers 1-2, divided by that of Layers 3-6. C3: mean FID of {inside} ratios in 0.35-0.40, "
        f"minus that of "
        f"{len(poster.RATIOS) - inside} others. C4: FID of the layer or group rule nearest to FP16 "
        f"in bytes, minus "
        "FID of uniform FP16. C3, C4: below 0 is better; N = 100; 100 steps (width 16: 50)."
    )
    table = pd.DataFrame(cells, columns=["the poster's claim", "width 64", "width 16"])
    return f"{markdown(table)}\n\n{quantities}"


def rule_claims(work: Workspace) -> pd.DataFrame:
    """The claims about threshold rules: on damage and, where `make evidence` has made them, on
    images.
    """
    found = (workspace.load_optional(work, name) for name in ("09_claims", "evidence_fresh_claims"))
    return pd.concat([table for table in found if table is not None], ignore_index=True)


def at_int4_bytes(rows: pd.DataFrame, found: pd.DataFrame) -> str:
    """The rows and claims of `make evidence` at the bytes of uniform INT4, and what they say."""
    parts = (
        markdown(images_shown(rows)),
        summaries.at_int4_bytes(rows, poster.WIDTH),
        markdown(tables.rules_shown(found)),
    )
    return "\n\n".join(parts)


def damages_at_size(table: pd.DataFrame) -> str:
    """06_budget at the poster's size: bytes and damage, and what they say."""
    return f"{markdown(tables.at_posters_size(table))}\n\n{summaries.against_int8(table)} {summaries.best_rule(table)}"


def images_shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of 1,000 images: sizes, FID and its difference from FP32, and how near the images are to
    FP32's.
    """
    columns = [
        "method",
        "format",
        "mem_mib",
        "mem_share",
        "fid_mnist",
        "delta_fid_mnist",
        "psnr",
        "class_changed",
    ]
    return tables.format_table(rows, columns, ("delta_fid_mnist",))


def evidence(work: Workspace) -> str:
    """The claims with more images and over other training runs, as far as `make evidence` has been
    run.
    """
    steps, table = ("evidence_rows", "evidence_runs"), tables.evidence_claims(work)
    missing = [step for step in steps if workspace.load_optional(work, step) is None]
    lines = [f"Not made yet: {step} (`make evidence`)." for step in missing]
    if "evidence_rows" not in missing:
        lines.append(sentences.ratios_with_many_images(workspace.load_table(work, "evidence_rows")))
    if "evidence_runs" not in missing:
        runs = workspace.load_table(work, "evidence_runs")
        fids = runs[runs["method"] == "baseline"]["fid_mnist"]
        lines.append(
            f"The {len(fids)} runs trained for {runs['steps'].iloc[0]:,} steps each. The FID of "
            f"their unquantized models (MNIST "
            f"features, N = {runs['n_images'].iloc[0]}) is {fids.min():,.0f} to {fids.max():,.0f}. "
            f"Their best single "
            f"ratios, by seed: {sentences.best_ratios(runs)}."
        )
    return "\n".join(([markdown(table), ""] if table is not None else []) + lines)
