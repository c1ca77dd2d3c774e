"""Every figure draws from the committed tables."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lafq.study import poster, workspace
from lafq.study.figures import budget_plots, fisher_plots, plots, text
from lafq.study.fisher_by_timestep import by_layer
from lafq.study.workspace import Workspace

SMALL, PAPER = Workspace("small"), Workspace("paper")
ROWS = ("03_global", "04_group", "05_ratio_sweep")


def load(name, work=SMALL):
    return workspace.load_table(work, name)


FIGURES = {
    "sizes": lambda ax: plots.size_curve(ax, load("04_group_sizes"), "group", 0.5, "factor"),
    **{
        name: lambda ax, name=name: plots.published_differences(
            ax, poster.compare(load(name, PAPER)[:9]), "fid_inception", noise=3.7
        )
        for name in ROWS
    },
    "ratio": lambda ax: plots.poster_and_ours(
        ax, load("05_ratio_sweep").assign(n_images=100), "fid_inception"
    ),
    "many images": lambda ax: plots.ratio_with_many_images(ax, load("evidence_rows")),
    "runs": lambda ax: plots.claim_by_run(
        ax, load("evidence_runs_claims"), load("evidence_runs_over")
    ),
    "noise": lambda ax: plots.poster_and_noise(ax, 3.7),
    "Fisher and images": lambda ax: fisher_plots.fisher_and_images(
        ax, load("02_fisher"), load("02_fisher_kinds"), load("timesteps", Workspace("benchmarks"))
    ),
    "Fisher map": lambda ax: fisher_plots.fisher_map(ax, load("02_fisher")),
    "damage": lambda ax: budget_plots.over_size(ax, load("budget"), "Damage"),
    "nearness": lambda ax: budget_plots.nearness(
        ax, load("sampling", Workspace("benchmarks")).query("noise == 'fresh'")
    ),
    "bits": lambda ax: budget_plots.bits_by_fisher(ax, load("budget_bits"), [3.0, 4.0, 6.0]),
    "files": lambda ax: budget_plots.over_size(ax, load("files"), "Damage", "file_mib"),
    "rules": lambda ax: budget_plots.rules(ax, load("budget"), load("evidence_damages", PAPER)),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_draws_from_the_committed_tables(name):
    figure, ax = plt.subplots()
    FIGURES[name](ax)
    assert ax.has_data()
    assert ax.get_title() and not any(c.isdigit() for c in ax.get_title().replace("C3", ""))
    figure.canvas.draw()
    assert all(t.get_fontsize() >= 8 for t in figure.findobj(plt.Text) if t.get_text())


def test_figures_of_several_panels_draw_from_the_committed_tables():
    axes = plt.subplots(2, 3)[1].ravel()
    fisher_plots.fisher_by_tensor(axes, load("02_fisher"))
    assert [len(ax.lines) for ax in axes] == [load("02_fisher")["t_low"].nunique()] * 6
    axes = plt.subplots(2, 3)[1].ravel()
    budget_plots.predictions(axes, load("damage_by_tensor"))
    assert [ax.get_xlabel() for ax in axes] == load("damage_ranks")["prediction"].tolist()
    axes = plt.subplots(1, 2)[1]
    plots.noise_floor(axes, load("noise_floor"))
    assert all(ax.has_data() for ax in axes)


def test_every_row_of_the_budget_has_its_line():
    table = load("budget")
    kinds = table.groupby(["rule", "granularity", "rounding"]).ngroups
    ax = plt.figure().subplots()
    budget_plots.over_size(ax, table, "")
    labels = [entry.get_text() for entry in ax.get_legend().get_texts()]
    assert len(labels) == len(set(labels)) == kinds
    assert len(budget_plots.chosen(table, budget_plots.BY_DAMAGE)) < len(table)


def test_differences_of_images_are_brighter():
    table, samples = load("03_global"), workspace.load_images(SMALL, "03_global")
    figure = plt.figure()
    plots.paired_digits(figure, table, samples)
    first, *_, last = (np.asarray(ax.images[0].get_array()) for ax in figure.axes)
    off = last[:32].astype(int) - first
    assert len(first) == 32 and off.any()
    assert (last[32:] == (plots.AMPLIFIED * abs(off)).clip(0, 255)).all()


def test_the_tables_of_rows_have_every_column():
    assert len(text.table(load("03_global"), text.ROWS)) == len(load("03_global"))
    compared = poster.compare(load("05_published", PAPER))
    assert len(text.table(compared, text.COMPARED)) == len(compared)
    layers = by_layer(load("02_fisher"))
    assert layers["share_of_all"].sum() == pytest.approx(1)
    assert (
        layers["weights"].sum() == load("02_fisher").drop_duplicates("parameter")["weights"].sum()
    )
