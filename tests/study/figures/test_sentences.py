import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from lafq.study import poster, published_images
from lafq.study.budget import summaries
from lafq.study.budget.summaries import CODED, FEEDBACK
from lafq.study.damage import PROXIES
from lafq.study.figures import audit_tables, budget_plots, claim_plots, plots, sentences


def published(ours, low, high):
    """Rows as `poster.compare` gives them: ours differ from FP32 by `ours` with the interval
    low..high.
    """
    rows = [("baseline", "none", "fp32", 59.30, 0.0)]
    rows += [("uniform", "all", f, np.nan, ours) for f in ("fp16", "int8")]
    rows += [("ratio", "0.35", "int8", 56.21, ours), ("global", "tau=1", "int8", 59.71, ours)]
    columns = ["method", "threshold", "format", "fid_paper", "delta_fid_inception"]
    table = pd.DataFrame(rows, columns=columns).assign(n_images=100, steps=1000)
    return table.assign(delta_fid_inception_low=low, delta_fid_inception_high=high)


def budget(group=5.0):
    """Rows as `budget.measure_candidates` gives them: damage over that of one threshold, and the
    allocator's over INT8's.
    """
    over = {
        "global": 1.0,
        "group": group,
        "ratio": 15.0,
        "mean_std": 7.0,
        "magnitude": 9.0,
        "random": 30.0,
    }
    rows = [
        {"method": f"{m}, {FEEDBACK}", "granularity": "weight", "over_global": d}
        for m, d in over.items()
    ]
    rows += [{"method": "allocator", "granularity": "mixed", "over_int8": 0.2}]
    table = pd.DataFrame(
        [{"budget_bits": 4.0, "mem_mib": 1.0, "mem_share": 0.125} | r for r in rows]
    )
    table = pd.concat(
        [
            table,
            pd.DataFrame(
                [{"method": "uniform", "granularity": "tensor", "budget_bits": 8.0, "mem_mib": 2.0}]
            ),
        ]
    )
    ends = {
        f"{c}{end}": table[c] * f
        for c in ("over_global", "over_int8")
        for end, f in (("_low", 0.5), ("_high", 1.5))
    }
    return table.assign(damage=1.0, **ends)


def coded(bits=(2.0, 3.0, 4.0), damages=(4e-5, 2.2e-6, 2e-7)):
    """Rows of 11_files: entropy-coded files, and uniform INT8."""
    rows = [
        {"method": CODED, "budget_bits": b, "damage": d, "over_int8": d / 1e-5}
        for b, d in zip(bits, damages, strict=True)
    ]
    rows += [
        {"method": "uniform", "budget_bits": 8.0, "damage": 1e-5, "over_int8": 1.0, "file_mib": 1.7}
    ]
    table = pd.DataFrame(
        [{"mem_mib": 1.2, "mem_share": 0.15, "file_mib": 0.8} | row for row in rows]
    )
    return table.assign(
        over_int8_low=table["over_int8"] * 0.5, over_int8_high=table["over_int8"] * 1.5
    )


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.setattr(published_images, "fid_noise", lambda: 3.1)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (
            -0.1,
            0.2,
            "Each of the poster's 2 FID differences lies outside our 95 % interval (same noise).",
        ),
        (
            -0.1,
            0.5,
            "1 of the poster's 2 FID differences lie outside our 95 % intervals (same noise; "
            "inside: global tau=1).",
        ),
        (-4, 4, "0 of the poster's 2 FID differences lie outside"),
    ],
)
def test_which_published_differences_lie_inside(low, high, said):
    assert sentences.published_inside(published(0.05, low, high)).startswith(said)


def test_each_training_run_has_its_best_ratio():
    rows = [(0, "baseline", "none", 0.5), (0, "ratio", "0.30", 3.0), (0, "ratio", "0.48", 2.0)]
    rows += [(2, "ratio", "0.30", 1.0), (2, "ratio", "0.48", 5.0)]
    runs = pd.DataFrame(rows, columns=["seed", "method", "threshold", "fid_mnist"])
    assert sentences.best_ratios(runs) == "0.48, 0.30"


def test_findings_follow_from_the_tables(noise):
    found = sentences.findings(published(0.05, -0.1, 0.2), budget(), coded(), "In images, more.")
    assert len(found) == 4
    assert found[0].startswith(
        "**Uniform FP16 and INT8 change FID by less than 0.2.** FP16: +0.05 [-0.10, +0.20];"
    )
    assert "Inception features, N = 100, 1,000 steps, width 64" in found[0]
    assert "The largest change in the poster's table is -3.09 (rule ratio)." in found[0]
    assert (
        "(authors' FP32 model; Inception features, N = 100) has standard deviation 4.4." in found[1]
    )
    assert found[1].startswith(
        "**2 of the poster's 2 FID differences are smaller than the effect of new noise.**"
    )
    assert found[2].startswith(
        "**Of 6 threshold rules, global does the least damage.** All (the poster's 4, magnitude, "
        "random)"
    )
    assert "share one rounding and average 4 bits per weight." in found[2]
    assert "Group does 5.0 [2.5, 7.5] times global's damage, ratio 15 [7.5, 22] times." in found[2]
    assert found[2].endswith("In images, more.")
    assert found[3].startswith(
        "**lafq's compressed file (10.0% of FP32's bytes) does 0.22 [0.11, 0.33] times the damage "
        "of uniform INT8 (nearest code).**"
    )
    assert "LZMA packs both: 0.80 MiB (in memory 1.20) and 1.70 MiB." in found[3]
    # log(4e-5 / 1e-5) of log(4e-5 / 2.2e-6) is 48 % of the way from 2 to 3 bits.
    assert summaries.coded_equal(coded()).startswith("At 2.5 bits per weight (interpolated)")


def test_the_smallest_file_with_hardly_a_rise_of_fid():
    """3 % of an FID of 80 are 2.4: the file of 2 bits rises by up to 3.0, the others by less."""
    ends = {
        "fid_mnist_delta": [1.0, 1.0, 1.0, math.nan],
        "fid_mnist_delta_high": [3.0, 2.0, 1.0, math.nan],
    }
    table = coded().assign(n_images=1000.0, file_mib=[0.6, 0.7, 0.8, 1.7], **ends)
    evidence = pd.DataFrame({"method": ["baseline"], "fid_mnist": [80.0]})
    said = summaries.coded_with_fid(table, evidence)
    assert (
        "if the 95 % interval of its FID rise ends below 2.40, which is 3 % of FP32's FID (N = "
        "1,000)." in said
    )
    assert said.endswith("The smallest file that passes has 0.70 MiB (8.8% of FP32's bytes).")
    assert (
        summaries.coded_with_fid(table, None)
        == summaries.coded_with_fid(table, evidence.assign(fid_mnist=20.0))
        == ""
    )


@pytest.mark.parametrize(
    ("damage", "said"), [(1e-6, "does less damage"), (1e-3, "does no less damage")]
)
def test_entropy_coded_plans_are_compared_in_memory_too(damage, said):
    """The coded row of 3 bits takes the memory nearest to the allocator's."""
    rows = [
        {"method": "allocator, all weights", "budget_bits": 3.0, "mem_mib": 0.9, "damage": damage},
        {
            "method": f"uniform, {FEEDBACK}",
            "budget_bits": 8.0,
            "over_int8": 0.3,
            "over_int8_low": 0.2,
            "over_int8_high": 0.4,
        },
    ]
    table = pd.concat(
        [coded().assign(mem_mib=[0.8, 0.88, 1.2, 2.2]), pd.DataFrame(rows)], ignore_index=True
    )
    found = summaries.coded_beside(table)
    assert found.startswith(
        "Uniform INT8 with error feedback does 0.30 [0.20, 0.40] times the damage of nearest code."
    )
    assert said in found
    assert "against 2.2e-06 (0.88 MiB)." in found
    assert f"{damage:.1e} (0.90 MiB) against" in found
    assert summaries.coded_beside(coded()) == ""


def test_equal_damage_outside_the_rows_is_not_said():
    assert summaries.coded_equal(coded(damages=(4e-6, 2e-6, 1e-6))) == ""
    assert summaries.coded_equal(coded(damages=(4e-3, 2e-4, 1e-4))) == ""


@pytest.mark.parametrize(
    ("least", "said"), [(0.97, "ranks weight tensors"), (0.5, "does not rank weight tensors")]
)
def test_what_predicts_damage(least, said):
    ranks = pd.DataFrame(
        {
            "prediction": PROXIES,
            "all formats": 1.0,
            "int4": 0.99,
            "int8": [1.0, least, 0.1, 0.8, -0.5, 0.0],
        }
    )
    damages = {
        f"by {name}": d
        for name, d in zip(
            (*PROXIES, "measured"), (1.0, 2.2, 9.0, 4.0, 60.0, 7.0, 2.0), strict=True
        )
    }
    rows = pd.DataFrame({"method": damages.keys(), "damage": damages.values(), "budget_bits": 4.0})
    found = summaries.best_predictors(ranks, rows)
    assert found.startswith(
        f"**Fisher information times squared rounding error {said} by their damage.**"
    )
    assert (
        f"is {least:.2f} to 0.99 within a format. Fisher information alone has 0.80 to 0.99, "
        f"magnitude -0.50 to 0.99." in found
    )
    assert (
        "Formats by Fisher information times error do 1.1 times the damage of formats by measured "
        "damage; by magnitude, 30 times." in found
    )


def test_how_far_fresh_digits_are_from_the_first():
    """The uniform row is the reference; of the others one ratio halves and one rises by a tenth."""
    before = pd.DataFrame(
        {
            "method": ["uniform", "allocator", "allocator"],
            "granularity": "mixed",
            "budget_bits": [8.0, 3.0, 4.0],
        }
    )
    fresh = before.assign(over_int8=[1.0, 0.5, 0.22])
    found = summaries.change_on_fresh_digits(before.assign(over_int8=[1.0, 1.0, 0.2]), fresh)
    assert found == "Fresh digits multiply these quotients by 0.50 to 1.10 (2 rows)."


def test_what_an_untrained_network_keeps():
    choices = pd.DataFrame(
        {"choice": [audit_tables.UNTRAINED], "rank_correlation": [0.231], "kept_in_common": [0.579]}
    )
    said = audit_tables.fisher_of_r2(choices, "0.35")
    assert "Such values have a rank correlation of 0.23 with ours (mean over layers)." in said
    assert (
        "With both sets of values, ratio 0.35 keeps 58% of the same weights (by chance: 35%)."
        in said
    )


@pytest.mark.parametrize(
    ("group", "said"),
    [(5.0, "(all intervals above 2.5)"), (1.5, "Damage of the rules at equal size")],
)
def test_the_figure_of_rules_names_the_least_interval(group, said):
    ax = Figure().subplots()
    budget_plots.rules(ax, budget(group), budget(7.0))
    assert ax.get_title().endswith(said)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "group",
        "ratio",
        "mean_std",
        "magnitude",
        "random",
    ]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "4 bits",
        "4 bits, width 64",
    ]


def test_the_poster_is_drawn_over_the_noise():
    ax, rows = Figure().subplots(), [poster.Published("baseline", "none", 59.0, None, None)]
    rows += [
        poster.Published("global", "tau", 59.5, None, None),
        poster.Published("ratio", "0.35", 55.0, None, None),
    ]
    rows += [poster.Published("ratio", "0.42", 70.0, None, None, source="poster's plot")]
    plots.poster_and_noise(ax, rows, 3.7)
    assert ax.get_title().startswith(
        "1 of the poster's 2 FID differences are smaller than the effect of new noise"
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["global", "ratio 0.35"]


def test_c3_is_drawn_by_training_run():
    runs = pd.DataFrame(
        {
            "claim": ["C3", "C4", "C3"],
            "seed": [0, 0, 1],
            "steps": 5000,
            "measured": 0.1,
            "low": -0.2,
            "high": 0.3,
        }
    )
    ax = Figure().subplots()
    claim_plots.claim_by_run(ax, runs, runs.iloc[:1].assign(verdict="inconclusive"))
    assert (
        ax.get_title()
        == "C3 in 2 training runs of 5,000 steps:\nmean +0.10 [-0.20, +0.30], inconclusive"
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["seed 0", "seed 1", "mean"]


def test_a_rule_that_may_be_as_good_is_counted(noise):
    said = sentences.findings(published(0.05, -0.1, 0.2), budget(group=1.5), coded(), "")[2]
    assert "does less damage than 4 of the 5 others.**" in said


@pytest.mark.parametrize(
    ("least", "said"),
    [
        (0.2, "The tests found no difference for 2 sets (global, ratio 0.25;"),
        (0.01, "The ratio 0.25 set differs"),
    ],
)
def test_which_published_sets_can_be_told_apart(least, said):
    rows = [
        ("FP32, one half against the other", math.nan, math.nan),
        ("global", 0.5, 0.6),
        ("ratio 0.25", least, 0.9),
    ]
    table = pd.DataFrame(rows, columns=["set", "kid_p_holm", "classes_p_holm"]).assign(
        digit=0, share=0.1, share_fp32=0.12
    )
    assert said in audit_tables.published_sets(table)


def test_what_drives_the_fisher_claims():
    layers = {"Layer1": 8.0, "Layer2": 3.0, "Layer6": 1.0}
    rows = [
        {
            "layer": layer,
            "t_low": t,
            "t_high": t + 49,
            "weights": 10,
            "fisher": f * (4 if t == 0 else 1),
        }
        for layer, f in layers.items()
        for t in (0, 50)
    ]
    assert sentences.drivers_of_fisher(pd.DataFrame(rows)) == (
        "80% of all Fisher information lies at t <= 49. Fisher information per weight: Layer1 has "
        "8.0 and "
        "Layer2 3.0 times Layer6's."
    )


@pytest.mark.parametrize(
    ("metric", "n", "said"),
    [
        ("fid_inception", 100, "other noise moves it by ±2.9, 1 sd"),
        ("fid_mnist", 100, "other noise moves it by ±18.5, 1 sd"),
        ("fid_mnist", 77, "other noise was not measured at this N"),
    ],
)
def test_a_caption_has_the_noise_of_its_own_features_and_n(metric, n, said):
    noise = pd.DataFrame(
        [
            ("Inception", "generated", "fid", 100, 2.93),
            ("MNIST", "generated", "fid", 100, 18.54),
            ("MNIST", "real", "fid", 77, 1.0),
        ],
        columns=["features", "images", "metric", "n", "sd"],
    )
    assert sentences.noise_caption(pd.DataFrame({"n_images": [n]}), noise, metric) == said


def test_ratios_with_many_images():
    fids = {"0.35": 1.0, "0.40": 2.0, "0.42": 0.5, "0.48": 4.5}
    rows = [("ratio", ratio, "int8", "weight", fid, 1000) for ratio, fid in fids.items()]
    rows += [
        ("ratio", "0.30", "fp16", "weight", -9.0, 1000),
        ("uniform", "all", "int8", "tensor", -9.0, 1000),
    ]
    table = pd.DataFrame(
        rows, columns=["method", "threshold", "format", "granularity", "fid_mnist", "n_images"]
    )
    assert sentences.ratios_with_many_images(table) == (
        "At N = 1,000 the mean FID (MNIST features) of the ratios in 0.35-0.40 minus that of the "
        "others is -1.00. "
        "The verdict on C3 tests only this mean. "
        "The best single ratio (0.42) is not in 0.35-0.40."
    )


def test_what_the_choice_of_fisher_values_does_to_the_loss():
    rows = pd.DataFrame({"delta_loss_low": [-1.0, 0.5], "delta_loss_high": [1.0, 2.0]})
    choices = pd.DataFrame({"choice": ["this project", "R2"], "delta_loss_int4": [2e-4, 1e-4]})
    said = audit_tables.choices_said(rows, choices)
    assert "`delta_loss` contains 0 in 1 of 2 rows" in said
    assert "smallest with the Fisher values of R2 (+1.00e-04" in said


def test_images_of_two_machines_are_compared_by_weights():
    table = pd.DataFrame(
        {
            "sample": ["a", "a", "b", "c"],
            "n_images": [50, 50, 100, 100],
            "machine": "some GPU, torch 2",
            "same_weights": [True, True, True, False],
            "equal_pixels": [1.0, 0.9, 0.99, 0.5],
            "largest_difference": [0, 1, 1, 2],
        }
    )
    said = sentences.machines_compared(table)
    assert "one some GPU GPU. We had drawn 300 of these images, from 3 rows" in said
    assert (
        "the 2 rows with the same weights, 97.000% of the pixels are equal, and the largest "
        "difference is 1 of" in said
    )
    assert (
        "In the other 1 rows the Fisher information came from another CPU" in said
        and "50.000%" in said
    )


def test_rows_at_the_bytes_of_int4_are_said_with_their_intervals():
    names = [
        ("uniform", "int8"),
        ("uniform", "int4"),
        ("allocator", "bits"),
        ("global, error feedback", "bits"),
    ]
    rows = [
        (*name, 0.13, i, i - 1, i + 2, 30.0 + i)
        for i, name in enumerate([*names, ("ratio, error feedback", "bits")])
    ]
    ends = [f"delta_fid_mnist{end}" for end in ("", "_low", "_high")]
    table = pd.DataFrame(rows, columns=["method", "format", "mem_share", *ends, "psnr"]).assign(
        mem_mib=17.9, n_images=1000
    )
    said = summaries.at_int4_bytes(table, 64)
    assert "17.90 MiB (13.0% of FP32), N = 1,000" in said
    assert (
        "+2.00 [+1.00, +4.00] with the allocator, +3.00" in said
        and "+1.00 [+0.00, +3.00] with uniform INT4" in said
    )
    claims = pd.DataFrame(
        {
            "quantity": ["FID of ratio (one threshold per layer) minus"],
            "measured": [2.27],
            "low": [0.86],
            "high": [3.72],
        }
    )
    assert (
        "ratio's FID is 2.3 [0.9, 3.7] above global's (MNIST features, N = 1,000)."
        in summaries.on_images(claims, 64, 1000)
    )


def test_methods_are_ordered_by_fid():
    rows = pd.DataFrame(
        {"method": ["baseline", f"group, {FEEDBACK}", "allocator"], "fid_mnist": [1.0, 9.0, 3.0]}
    )
    assert summaries.order_by_fid(rows).startswith(
        "By FID (MNIST features), best first: allocator; group."
    )


def test_what_the_released_sampling_does_is_read_from_the_last_features():
    rows = [
        ("MNIST", "x (R1)", -0.1, 0.0),
        ("Inception", "x (R6)", 60.0, 70.0),
        ("Inception", "x (R1)", 0.44, 0.0),
    ]
    table = pd.DataFrame(rows, columns=["features", "choice", "here", "released"]).assign(
        change_low=-0.92, change_high=0.04
    )
    said = audit_tables.images_of_r1(table, 100)
    assert said.endswith(
        "by 0.00. By our protocol INT8 changes FID by +0.44 [-0.04, +0.92] (Inception features, N "
        "= 100)."
    )
