"""The result that opens a notebook: sentences computed from results/, between the marks of its
first cell.
"""

import re
from pathlib import Path

import nbformat

from lafq.study import poster, workspace
from lafq.study.audit import published_images
from lafq.study.budget import predictions, summaries
from lafq.study.figures import audit_tables, sentences
from lafq.study.rows import BASELINE
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import atomic_write

MARKS = re.compile(r"(<!-- result -->\n).*?(<!-- /result -->)", flags=re.DOTALL)


def fill(path: Path, work: Workspace) -> None:
    """Write the result of a profile into the first cell of the notebook `path`, where that has the
    marks.
    """
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    if MARKS.search(first.source):
        first.source = filled(first.source, path.stem, work)
        with atomic_write(path) as temporary, temporary.open("w") as file:
            nbformat.write(notebook, file)


def filled(source: str, name: str, work: Workspace) -> str:
    """The first cell of the notebook `name` with the result of a profile between its marks."""
    said, width = result(name, work), f"has width {profile_parameters(work.profile)['WIDTH']}."
    if width not in said:
        said = f"{said} {'Our own model, below,' if name == '12_noise' else 'Our model'} {width}"
    return MARKS.sub(lambda marks: f"{marks[1]}{said}\n{marks[2]}", source)


def result(name: str, work: Workspace) -> str:
    """What the notebook `name` found, in a few sentences."""
    if name == "01_train":
        return baseline(work)
    if name == "02_fisher":
        drivers = sentences.drivers_of_fisher(workspace.load_table(work, "02_fisher"))
        return f"{fisher_claim(work, 'C1')} {fisher_claim(work, 'C2')} {drivers}"
    if name in ("03_global", "04_group"):
        return threshold_row(work, name, name.partition("_")[2])
    if name == "05_ratio_sweep":
        return f"{claim(work, 'C3', 'INT8')} {claim(work, 'C4 images', 'INT8')}"
    if name in ("07_audit", "08_published", "12_noise"):
        return audit(name, work)
    return beyond(name, work)


def audit(name: str, work: Workspace) -> str:
    """What the released code, the poster's rows and the published images show."""
    published = poster.compare(workspace.load_table(Workspace("paper"), "08_published"), "paper")
    if name == "08_published":
        return f"{sentences.by_format(published)} {sentences.published_inside(published)}"
    if name == "12_noise":
        return f"{sentences.against_noise(published)} {audit_tables.published_sets(published_images.load('compared'))}"
    rows, choices = (
        workspace.load_table(work, "07_audit"),
        workspace.load_table(work, "07_fisher_choices"),
    )
    drawn = audit_tables.images_of_r1(
        workspace.load_table(work, "07_protocol"), rows["n_images"].iloc[0]
    )
    return (
        f"{drawn} {audit_tables.fisher_of_r2(choices, rows['threshold'].iloc[0].partition(',')[0])}"
    )


def beyond(name: str, work: Workspace) -> str:
    """What the study of budgets found."""
    if name == "10_damage":
        return predictions.best_predictors(
            workspace.load_table(work, "10_ranks"), workspace.load_table(work, "10_by_proxy")
        )
    if name == "11_files":
        return summaries.coded_sentence(workspace.load_table(work, "11_files"))
    budget = workspace.load_table(work, "budget")
    if name == "09_rules":
        paper = Workspace("paper")
        int4, claims = (
            workspace.load_table(paper, table)
            for table in ("evidence_int4", "evidence_int4_claims")
        )
        own = f"Our model has width {profile_parameters(work.profile)['WIDTH']}."
        return f"{summaries.best_rule(budget)} {own} {summaries.on_images(claims, poster.WIDTH, int4['n_images'].iloc[0])}"
    return summaries.summary_sentences(budget, workspace.load_optional(work, "evidence_budget"))


def baseline(work: Workspace) -> str:
    """The unquantized model's scores beside the poster's."""
    [row] = workspace.load_table(work, "01_baseline").itertuples()
    return (
        f"FID: {row.fid_inception:.1f} (Inception features; poster: {poster.POSTER[0].fid:.1f}) "
        f"and {row.fid_mnist:.1f} (MNIST "
        f"features); {row.mem_mib:.2f} MiB; N = {row.n_images}, {row.steps:,} sampling steps."
    )


def claim(work: Workspace, name: str, kind: str) -> str:
    """The verdict on a claim, from its row of this kind."""
    table = workspace.load_table(work, "claims")
    row = next(table[(table["claim"] == name) & table["quantity"].str.contains(kind)].itertuples())
    head, _, how = row.quantity.rpartition(" (")
    return f"{name.split()[0]}: {head}: {row.measured:.3g} [{row.low:.3g}, {row.high:.3g}] ({how[:-1]}); {row.verdict}."


def fisher_claim(work: Workspace, name: str) -> str:
    """The verdict on C1 or C2, by the empirical and by the Monte Carlo estimate."""
    table = workspace.load_table(work, "claims")
    rows = table[(table["claim"] == name) & table["quantity"].str.contains("noised digits")]
    empirical, monte_carlo = (
        next(rows[rows["quantity"].str.contains(kind)].itertuples(), None)
        for kind in ("empirical", "Monte")
    )
    other = f"; Monte Carlo: {monte_carlo.measured:.3g}" if monte_carlo else ""
    return (
        f"{name}: {empirical.verdict}; {empirical.quantity.partition(' (')[0]}: "
        f"{empirical.measured:.3g} "
        f"[{empirical.low:.3g}, {empirical.high:.3g}] (empirical{other})."
    )


def threshold_row(work: Workspace, name: str, method: str) -> str:
    """What the INT8 row nearest to the poster's size does to FID, beside the poster's."""
    table = workspace.load_table(work, name)
    rows = table[
        (table["method"] == method)
        & (table["format"] == "int8")
        & table["delta_fid_inception"].notna()
    ]
    row = rows.iloc[0]
    theirs = next(p.fid for p in poster.POSTER if p.method == method) - poster.POSTER[0].fid
    return (
        f"The rule {method} with INT8 by weight ({row['mem_share']:.1%} of FP32's bytes) changes "
        f"FID by "
        f"{sentences.difference(row, 'delta_fid_inception')} (Inception features, N = "
        f"{row['n_images']}, the same noise as "
        f"{BASELINE.format.upper()}). The poster's row (other noise) differs from its FP32 by "
        f"{theirs:+.2f}."
    )
