import pandas as pd
import pytest

from lafq.quantization.model import weights_sha256
from lafq.study import threshold_rows, workspace
from lafq.study.diffusion.unet import quantizable
from lafq.study.images import sampling
from lafq.study.images.sampling import ImageStore
from lafq.study.workspace import Workspace
from lafq.tensors import save_tensors
from tools import cost
from tools.notebooks import notebooks
from tools.run import check

SMOKE = Workspace("smoke")

SAMPLING = ("01_baseline", "03_global", "04_group", "05_ratio_sweep", "07_audit")


def test_a_row_of_the_poster_is_seven_tenths_of_a_petaflop():
    assert 100 * 1000 * cost.forward_flop(64) == pytest.approx(0.7e15, rel=0.05)


def test_rows_counted_are_the_rows_sampled():
    counted = cost.sampled_rows(check("mini", {}, notebooks()))
    seen = set()
    for name, (notebook, rows) in zip(SAMPLING, sorted(counted.items()), strict=True):
        assert name[:2] == notebook[:2]
        found = set(pd.read_csv(workspace.RESULTS / "mini" / f"{name}.csv")["sample"]) - seen
        # 07 also draws uniform INT8 from other noise, which is no row.
        assert len(found) + (name == "07_audit") == rows, name
        seen |= found


def test_the_estimate_names_what_was_selected_and_grows_with_it():
    parameters = check("smoke", {}, notebooks())
    assert (
        "02_fisher" in (said := cost.estimate("smoke", parameters, ["02_fisher"]))
        and "05_ratio_sweep" not in said
    )
    more = (
        cost.work(parameters | {"IMAGES": 400, "TRAIN": True}),
        cost.work(parameters | {"TRAIN": False}),
    )
    assert all(
        more[0][name] > more[1][name] for name in ("01_train", "03_global", "05_ratio_sweep")
    )


def test_published_rows_counted_are_those_made(tiny):
    ratios = check("paper", {}, notebooks())["PUBLISHED"]["ratios"]
    fisher = {n: w.square() for n, w in quantizable(tiny).items()}
    rows = threshold_rows.published_rows(tiny, fisher, ratios, 20)
    assert len(rows) == cost.PUBLISHED_ROWS + len(ratios) == 9
    assert all(row.inception for row in rows)


def test_images_that_are_kept_count_for_the_estimate(tiny, sandbox):
    save_tensors(SMOKE.results / "ema.safetensors", dict(tiny.named_parameters()), width=4)
    provenance = {"weights": weights_sha256(tiny), "rule": "baseline"}
    ImageStore(SMOKE).draw(tiny, sampling.Sampling(3, 2, 0, 2), recipe=provenance)
    ImageStore(SMOKE).draw(
        tiny, sampling.Sampling(3, 2, 0, 2), recipe=provenance | {"weights": "other"}
    )
    assert cost.kept_flop(SMOKE, 4) == 3 * 2 * cost.forward_flop(4)


@pytest.mark.parametrize(
    ("seconds", "said"), [(90, "90 s"), (600, "10 minutes"), (9000, "2 hours"), (400000, "5 days")]
)
def test_durations_are_spoken(seconds, said):
    assert cost.spoken(seconds) == said
