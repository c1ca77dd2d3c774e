import math
import os
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from scipy import stats

from lafq.study import claims as study_claims
from lafq.study import long_runs, poster, workspace
from lafq.study import rows as study_rows
from lafq.study.damage import measure_damage, with_fid
from lafq.study.diffusion import subject
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import quantizable
from lafq.study.fisher_by_timestep import fisher_by_timestep
from lafq.study.images import sampling
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import save_tensors

SMOKE = Workspace("smoke")


def claims(name, values):
    return pd.DataFrame({"claim": name, "measured": values})


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("C1", (90, 100, 110), "supported"),
        ("C2", (0.4, 0.5, 0.6), "contradicted"),
        ("C1", (0.2, 1, 5), "inconclusive"),
        ("C3", (-1.1, -1, -0.9), "supported"),
        ("C3", (0.9, 1, 1.1), "contradicted"),
        ("C4 images", (-1, 0.1, 1), "inconclusive"),
    ],
)
def test_verdict_over_training_runs(name, values, expected):
    row = study_claims.over_runs(claims(name, values)).iloc[0]
    assert row["verdict"] == expected
    assert row["low"] < row["measured"] < row["high"]


def test_interval_over_training_runs_is_students():
    values = [1.0, 2.0, 4.0]
    row = study_claims.over_runs(claims("C3", values)).iloc[0]
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    ratio = study_claims.over_runs(claims("C1", [math.exp(v) for v in values])).iloc[0]
    assert (ratio["low"], ratio["high"]) == pytest.approx(
        (math.exp(expected.low), math.exp(expected.high))
    )


def test_one_training_run_has_no_interval():
    with pytest.raises(ValueError, match="needs at least two"):
        study_claims.over_runs(claims("C1", [2.0]))


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(poster, "RATIOS", (0.35, 0.48))


@pytest.fixture
def smoke(sandbox, tiny):
    save_tensors(SMOKE.results / subject.WEIGHTS, dict(tiny.named_parameters()), width=4)
    fisher = fisher_by_timestep(
        tiny, list(quantizable(tiny)), mnist(train=True)[0], samples=20, bins=20, seed=0
    )
    subject.save_fisher(SMOKE, fisher.by_weight, 4)


@pytest.mark.slow
def test_rows_have_blocks_and_claims(smoke):
    found = long_runs.many_images("smoke", images=40)
    rows = found["evidence_rows"]
    assert rows["rule"].value_counts().to_dict() == {
        "baseline": 1,
        "uniform": 1,
        "group": 1,
        "ratio": 2,
    }
    assert (rows["blocks"] == 10).all()
    assert rows["block_delta_fid_mnist"][0] == 0
    assert (rows["block_fid_mnist_sd"] > rows["block_delta_fid_mnist_sd"]).all()
    assert found["evidence_rows_claims"]["claim"].tolist() == ["C3", "C4 images"]


@pytest.fixture
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_runs_have_processes_of_their_own():
    with long_runs.one_process_per_core() as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


@pytest.mark.slow
def test_training_runs_differ_and_are_not_done_twice(sandbox, monkeypatch, threads_restored):
    parameters = profile_parameters("smoke")
    parameters["TRAINING"] |= {"steps": 6, "decay": 2}
    monkeypatch.setattr(long_runs, "profile_parameters", lambda profile: parameters)
    monkeypatch.setattr(long_runs, "one_process_per_core", lambda: ThreadPoolExecutor(1))
    once = long_runs.training_runs("smoke", seeds=(1, 2))
    assert torch.get_num_threads() == 1
    rows = once["evidence_runs"]
    assert rows.groupby("seed").size().to_dict() == {1: 5, 2: 5}
    assert not set(rows[rows["seed"] == 1]["sample"]) & set(rows[rows["seed"] == 2]["sample"])
    assert (
        once["evidence_runs_claims"]["claim"].tolist()
        == ["C1", "C2", "C2 share", "C3", "C4 images"] * 2
    )
    assert len(once["evidence_runs_over"]) == 5
    monkeypatch.setattr(sampling, "sample", None)
    again = long_runs.training_runs("smoke", seeds=(1, 2))
    for name, table in once.items():
        pd.testing.assert_frame_equal(again[name], table)


def test_steps_that_are_there_are_left_alone(sandbox, monkeypatch, capsys):
    made = []

    def step(name):
        return lambda profile: (
            made.append(name)
            or {name: pd.DataFrame({"x": [1]}), f"{name}_more": pd.DataFrame({"x": [2]})}
        )

    monkeypatch.setattr(long_runs, "STEPS", {name: step(name) for name in ("first", "second")})
    workspace.save_table(SMOKE, "first", pd.DataFrame({"x": [0]}))
    monkeypatch.setattr("sys.argv", ["evidence", "--profile", "smoke"])
    assert long_runs.main() == 0
    assert made == ["second"]
    assert "first: there already" in capsys.readouterr().out
    assert workspace.load_table(SMOKE, "second_more")["x"].tolist() == [2]


def test_missing_fisher_information_is_one_sentence(sandbox, monkeypatch, capsys, tiny):
    save_tensors(SMOKE.results / subject.WEIGHTS, dict(tiny.named_parameters()), width=4)
    monkeypatch.setattr("sys.argv", ["evidence", "--profile", "smoke", "--only", "evidence_rows"])
    assert long_runs.main() == 1
    said = capsys.readouterr().err.strip()
    assert "fisher.safetensors" in said
    assert "02_fisher with COMPUTE=True" in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_budget_rows_join_those_of_06(smoke, tiny, monkeypatch):
    monkeypatch.setattr(long_runs, "ALLOCATED", (3.5, 4.0))
    monkeypatch.setattr(long_runs, "RULE_BITS", (4.0,))
    found = long_runs.budgets("smoke", images=20)["evidence_budget"]
    assert found["rule"].tolist()[0] == "baseline"
    assert set(zip(found["rule"], found["rounding"], strict=True)) == {
        *(("baseline", "none"), ("uniform", "nearest"), ("allocate_all", "feedback")),
        *(("allocate", rounding) for rounding in ("feedback", "tuned", "nearest")),
        *((rule, "nearest") for rule in long_runs.RULES),
    }
    known = study_rows.measured_sensitivity(tiny, 20, seed=0)
    allocated = study_rows.allocated_at_bits(
        tiny, known, list(long_runs.ALLOCATED), granularities=("mixed",)
    )
    rows = [
        *study_rows.uniform_at_bits(tiny, known),
        *allocated,
        *study_rows.tuned_rows(allocated, [4.0], 2),
    ]
    table = with_fid(measure_damage(tiny, rows, known, seed=0, digits=10), found)
    joined = table[table["n_images"] == 20]
    assert len(joined) == (~found["rule"].isin(["baseline", *long_runs.RULES])).sum()
    assert joined["fid_mnist_delta"].notna().all()


@pytest.mark.slow
def test_fresh_rows_and_their_claims(smoke, tiny):
    found = long_runs.fresh_noise("smoke", images=20)
    assert found["evidence_fresh"][["rule", "rounding"]].to_numpy().tolist() == [
        ["baseline", "none"],
        *(["allocate", rounding] for rounding in ("feedback", "tuned")),
        *([rule, "feedback"] for rule in ("global", "group", "ratio")),
    ]
    assert (found["evidence_fresh"]["n_images"] == 20).all()
    fields = found["evidence_fresh_claims"][["claim", "rule", "budget_bits", "n_images"]]
    assert fields.to_numpy().tolist() == [
        ["rules images", rule, 4.0, 20] for rule in ("ratio", "group")
    ]


@pytest.mark.slow
def test_rows_at_the_bytes_of_int4_and_their_claim(smoke):
    found = long_runs.at_int4_bytes("smoke", images=20)
    table = found["evidence_int4"].set_index("rule")
    assert table.index.tolist() == [
        *("baseline", "uniform", "uniform", "allocate", "global", "ratio")
    ]
    int4 = table[table["format"] == "int4"]["mem_mib"].item()
    assert (table[table["granularity"].isin(["mixed", "weight"])]["mem_mib"] <= int4 + 1e-6).all()
    [claim] = found["evidence_int4_claims"].itertuples()
    assert (claim.rule, claim.budget_bits) == ("ratio", float(table.loc["ratio", "setting"]))


@pytest.mark.slow
def test_damages_go_on_from_the_sensitivity_that_was_kept(smoke, monkeypatch):
    monkeypatch.setattr(long_runs, "AT_SIZE", (4.0,))
    monkeypatch.setattr(long_runs, "CODED_FILES", (3.0,))
    table = long_runs.damages("smoke")["evidence_damages"]
    assert set(table["rule"]) == {"uniform", "allocate", *study_rows.RULES_AT_BITS}
    assert set(table[table["rule"] == "allocate"]["format"]) == {"any", "coded"}
    assert (table["damage_low"] <= table["damage"]).all()
    with_files = table["rule"].isin(["uniform", "allocate"]) & (
        table["budget_bits"] < long_runs.FILES_BELOW
    )
    assert table.loc[with_files, "file_mib"].notna().all()
    assert table.loc[table["rule"].isin(study_rows.RULES_AT_BITS), "file_mib"].isna().all()
    monkeypatch.setattr(long_runs, "measured_sensitivity", None)
    pd.testing.assert_frame_equal(
        long_runs.damages("smoke")["evidence_damages"],
        table,
    )


def test_two_steps_are_made_at_the_posters_size(sandbox, monkeypatch):
    made = []
    names = ("noise_floor", "evidence_int4", "evidence_damages", "evidence_rows")
    monkeypatch.setattr(
        long_runs,
        "STEPS",
        {name: lambda profile, name=name: made.append((profile, name)) or {} for name in names},
    )
    for profile in ("smoke", "paper"):
        monkeypatch.setattr("sys.argv", ["evidence", "--profile", profile])
        assert long_runs.main() == 0
    assert made == [
        ("smoke", "noise_floor"),
        ("smoke", "evidence_rows"),
        ("paper", "evidence_int4"),
        ("paper", "evidence_damages"),
    ]


def test_without_the_published_images_one_line_says_so(sandbox, monkeypatch, capsys):
    monkeypatch.setattr(long_runs, "STEPS", {})
    monkeypatch.setattr("sys.argv", ["evidence", "--profile", "smoke"])
    assert long_runs.main() == 0
    assert "PUBLISHED=path scores them" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["evidence", "--profile", "smoke", "--published", "nowhere"])
    assert long_runs.main() == 1
    assert "nowhere is not there" in capsys.readouterr().err
