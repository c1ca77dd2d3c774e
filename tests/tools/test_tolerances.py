import pandas as pd
import pytest
import yaml

from lafq.study import workspace
from lafq.study.workspace import Workspace
from tools import verify

SMOKE = Workspace("smoke")
ROWS = pd.DataFrame({"method": ["a", "b"], "fid_mnist": [90.0, 91.0], "sample": ["x", "y"]})
CLAIMS = pd.DataFrame({"claim": ["C1"], "measured": [134.0], "verdict": ["supported"]})


@pytest.fixture
def kept(sandbox):
    workspace.save_table(SMOKE, "03_global", ROWS)
    workspace.save_table(SMOKE, "claims", CLAIMS)
    verify.keep_aside(SMOKE)


def test_equal_tables(kept, capsys):
    workspace.save_table(SMOKE, "06_new", ROWS)
    assert verify.report(SMOKE)
    assert capsys.readouterr().out == (
        "rows within the declared tolerance: 3 of 3\nequal verdicts: 1 of 1\n"
    )


def test_what_another_machine_changes_is_within_the_tolerance(kept):
    other = ROWS.assign(fid_mnist=[90.015, 91.0], sample=["other", "names"])
    workspace.save_table(SMOKE, "03_global", other)
    assert verify.report(SMOKE)


@pytest.mark.parametrize(
    ("name", "table", "line"),
    [
        (
            "03_global",
            ROWS.assign(fid_mnist=[90.0, 91.2]),
            "03_global, row 2, fid_mnist: 91.2 (before: 91)",
        ),
        ("03_global", ROWS.assign(method=["a", "c"]), "03_global, row 2, method: c (before: b)"),
        ("03_global", ROWS[:1], "rows within the declared tolerance: 2 of 3"),
        ("03_global", pd.DataFrame({"method": []}), "rows within the declared tolerance: 1 of 3"),
        ("claims", CLAIMS.assign(verdict="inconclusive"), "equal verdicts: 0 of 1"),
    ],
    ids=["number", "word", "row gone", "table gone", "verdict"],
)
def test_what_is_out_is_named(kept, name, table, line, capsys):
    workspace.save_table(SMOKE, name, table)
    assert not verify.report(SMOKE)
    assert line in capsys.readouterr().out


def test_nothing_is_said_of_a_first_run(sandbox, capsys):
    verify.keep_aside(SMOKE)
    assert verify.report(SMOKE)
    assert not capsys.readouterr().out


def test_every_tolerance_has_its_reason():
    for rule in yaml.safe_load(verify.TOLERANCES.read_text()):
        assert rule["reason"]
        assert rule.get("absolute", 0) + rule.get("relative", 0) > 0
