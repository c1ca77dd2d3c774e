import math
import os
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from scipy import stats

from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.model import dequantize_, nbytes, quantize, weights_sha256
from lafq.rng import generator
from lafq.study import budget_rows, long_runs, poster, workspace
from lafq.study import claims as study_claims
from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.images import sampling
from lafq.study.long_runs import Experiment
from lafq.study.workspace import Workspace, profile_parameters

SMOKE = Workspace("smoke")


def claims(name, values):
    return pd.DataFrame({"claim": name, "measured": values, "margin": math.nan})


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


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Weights and Fisher values of the profile, and the images that the steps draw."""
    torch.manual_seed(0)
    model, folder = UNet(4).eval(), tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RESULTS", "FIGURES", "BUILD"):
            patch.setattr(workspace, name, folder / name.lower())
        subject.save_weights(SMOKE, dict(model.named_parameters()), width=4)
        weights = quantizable(model)
        values = {n: torch.rand(w.shape, generator=generator(0)) for n, w in weights.items()}
        subject.save_fisher(SMOKE, values, 4)
        yield model


@pytest.mark.slow
def test_rows_have_blocks_and_claims(smoke):
    tables = long_runs.many_images(Experiment("smoke"), images=20)
    rows = tables["evidence_rows"]
    assert rows["rule"].tolist() == ["baseline", "uniform", "group", "ratio", "ratio"]
    assert (rows["blocks"] == 10).all()
    assert rows["block_delta_fid_mnist"][0] == 0
    assert (rows["block_fid_mnist_sd"] > rows["block_delta_fid_mnist_sd"]).all()
    assert tables["evidence_rows_claims"]["claim"].tolist() == ["C3", "C4 images"]


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
    parameters["TRAINING"] |= {"steps": 3, "decay": 2}
    monkeypatch.setattr(long_runs, "profile_parameters", lambda profile: parameters)
    monkeypatch.setattr(long_runs, "one_process_per_core", lambda: ThreadPoolExecutor(1))
    once = long_runs.training_runs(Experiment("smoke"), seeds=(1, 2))
    assert torch.get_num_threads() == 1
    rows, of_runs = once["evidence_runs"], once["evidence_runs_claims"]
    assert [rows.columns[:2].tolist(), of_runs.columns[:2].tolist()] == [["seed", "steps"]] * 2
    assert rows.groupby("seed").size().to_dict() == {1: 5, 2: 5}
    assert not set(rows[rows["seed"] == 1]["sample"]) & set(rows[rows["seed"] == 2]["sample"])
    assert of_runs["claim"].tolist() == ["C1", "C2", "C2 share", "C3", "C4 images"] * 2
    assert len(once["evidence_runs_over"]) == 5
    monkeypatch.setattr(sampling, "sample", None)
    again = long_runs.training_runs(Experiment("smoke"), seeds=(1, 2))
    for name, table in once.items():
        pd.testing.assert_frame_equal(again[name], table)


def evidence(*arguments):
    """`make evidence` on the profile smoke, or the one that is named last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evidence", "--profile", "smoke", *arguments])
        return long_runs.main()


def test_steps_that_are_there_are_left_alone(sandbox, monkeypatch, capsys):
    tables = {"second": pd.DataFrame({"x": [1]}), "second_more": pd.DataFrame({"x": [2]})}
    monkeypatch.setattr(long_runs, "STEPS", {"first": None, "second": lambda run: tables})
    workspace.save_table(SMOKE, "first", pd.DataFrame({"x": [0]}))
    assert evidence() == 0
    assert "first: there already" in capsys.readouterr().out
    assert workspace.load_table(SMOKE, "second_more")["x"].tolist() == [2]


def test_missing_fisher_information_is_one_sentence(sandbox, capsys, tiny):
    subject.save_weights(SMOKE, dict(tiny.named_parameters()), width=4)
    assert evidence("--only", "evidence_rows") == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "fisher.safetensors" in line and "02_fisher with COMPUTE=True" in line


@pytest.mark.slow
def test_rows_at_the_bytes_of_int4_and_their_claim(smoke):
    tables = long_runs.at_int4_bytes(Experiment("smoke"), images=20)
    table = tables["evidence_int4"].set_index("rule")
    assert " ".join(table.index) == "baseline uniform uniform uniform allocate global group ratio"
    int4 = table[table["format"] == "int4"]["mem_mib"].max()
    assert (table[table["granularity"].isin(["mixed", "weight"])]["mem_mib"] <= int4 + 1e-6).all()
    claims = tables["evidence_int4_claims"]
    assert claims["rule"].tolist() == ["ratio", "group"]
    assert (claims["budget_bits"] == float(table.loc["ratio", "setting"])).all()


@pytest.mark.slow
def test_damages_go_on_from_the_sensitivity_that_was_kept(smoke, monkeypatch):
    monkeypatch.setattr(long_runs, "AT_SIZE", (4.0,))
    monkeypatch.setattr(long_runs, "CODED_FILES", (3.0,))
    table = long_runs.damages(Experiment("smoke"))["evidence_damages"]
    chosen = table["rule"].isin(["uniform", "allocate"])
    assert set(table[~chosen]["rule"]) == set(budget_rows.RULES_AT_BITS)
    assert set(table[table["rule"] == "allocate"]["format"]) == {"any", "coded"}
    assert (table["damage_low"] <= table["damage"]).all()
    with_file = chosen & (table["budget_bits"] < long_runs.FILES_BELOW)
    assert (table["file_mib"].notna() == with_file).all()
    monkeypatch.setattr(budget_rows, "measured_sensitivity", None)
    kept, weights = Experiment("smoke").kept_sensitivity(1), dict(smoke.named_parameters())
    assert all(f.shape == weights[n].shape for n, f in kept.fisher.items())
    assert set(quantizable(smoke)) < set(kept.fisher)
    assert set(kept.curvature) == set(kept.fisher)


@pytest.mark.slow
def test_the_packed_file_is_the_row_that_was_measured(smoke, monkeypatch):
    parameters = profile_parameters("smoke") | {"KEEP": True, "IMAGES": 20, "SAMPLING_BATCH": 10}
    monkeypatch.setattr(long_runs, "profile_parameters", lambda profile: parameters)
    path = SMOKE.results / subject.PACKED
    monkeypatch.setattr(long_runs, "SHIPPED_MIB", 0.01)
    with pytest.raises(ValueError, match="the smallest"):
        long_runs.packed(Experiment("smoke"))
    assert not path.exists()
    monkeypatch.setattr(long_runs, "SHIPPED_MIB", (most := 0.3 * nbytes(smoke, {})) / 2**20)
    table = long_runs.packed(Experiment("smoke"))["packed"]
    assert path.stat().st_size <= most
    assert table["damage"].tolist()[0] == 0 < table["damage"].iloc[1]
    small = dequantize_(load_quantized(path, UNet(4)))
    samples = SMOKE.results / "samples"
    [first, _] = sorted(samples.glob(f"{table['sample'].iloc[1]}_*.npz"))
    images, record = sampling.read(first)
    how = budget_rows.made(parameters["TRUE_FISHER_SAMPLES"], 0)
    assert how.items() <= record["recipe"].items()
    assert record["drawn_from"] == weights_sha256(small)
    steps = parameters["SAMPLING_STEPS"]
    assert (images == sampling.sample(small, 10, steps, 0, batch_size=10).numpy()).all()


def test_packed_weights_never_stand_in_for_the_trained_ones(sandbox, tiny):
    save_quantized(SMOKE.results / subject.PACKED, quantize(tiny, {}), tiny)
    with pytest.raises(FileNotFoundError, match=r"the trained weights .* are missing"):
        subject.load_model(SMOKE, 4)


def test_only_some_steps_are_made_at_the_posters_size(sandbox, monkeypatch):
    made = []
    steps = {name: lambda run, name=name: made.append(name) or {} for name in long_runs.STEPS}
    monkeypatch.setattr(long_runs, "STEPS", steps)
    assert evidence("--profile", "paper") == 0
    assert set(made) == set(long_runs.AT_POSTERS_SIZE)
    made.clear()
    assert evidence() == 0
    assert set(made) == set(long_runs.STEPS) - set(long_runs.AT_POSTERS_SIZE)


def test_without_the_published_images_one_line_says_so(sandbox, monkeypatch, capsys):
    monkeypatch.setattr(long_runs, "STEPS", {})
    assert evidence() == 0
    assert "PUBLISHED=path" in capsys.readouterr().out
    assert evidence("--published", "nowhere") == 1
    assert "nowhere is not there" in capsys.readouterr().err
