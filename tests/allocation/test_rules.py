import math

import pytest
import torch

from lafq.allocation import rules as th

SCORES = {
    "Layer1.a": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "Layer1.b": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
    "Layer4.a": torch.tensor([10.0, 20.0]),
    "Layer6.a": torch.tensor([100.0, 0.0]),
}
GROUPS = {
    "Layer1.a": "first",
    "Layer1.b": "first",
    "Layer2.a": "first",
    "Layer4.a": "middle",
    "Layer6.a": "last",
}


def kept(keep):
    return {n: m.reshape(-1).int().tolist() for n, m in keep.items()}


def test_by_granularity():
    assert {n: s.item() for n, s in th.by_granularity(SCORES, "tensor").items()} == {
        "Layer1.a": 2.5,
        "Layer1.b": 6.5,
        "Layer4.a": 15.0,
        "Layer6.a": 50.0,
    }
    assert th.by_granularity(SCORES, "weight") == SCORES
    by_channel = th.by_granularity(
        {"a": SCORES["Layer1.b"], "b": SCORES["Layer1.b"]}, "channel", {"b": 1}
    )
    assert {n: s.tolist() for n, s in by_channel.items()} == {"a": [5.5, 7.5], "b": [6.0, 7.0]}
    with pytest.raises(
        ValueError, match="unknown granularity 'row': choose one of tensor, channel, weight"
    ):
        th.by_granularity(SCORES, "row")


def test_global():
    keep = th.keep_above(SCORES, 7.0)
    assert kept(keep) == {
        "Layer1.a": [0] * 4,
        "Layer1.b": [0, 0, 1, 1],
        "Layer4.a": [1, 1],
        "Layer6.a": [1, 0],
    }
    assert keep["Layer1.b"].shape == (2, 2)


def scored(rule, scores):
    return th.RULES[rule](scores, th.layer_of, GROUPS.__getitem__)


def test_groups():
    keep = th.keep_above(scored("group", SCORES), 1.1)
    assert kept(keep) == {
        **{n: (SCORES[n].flatten() >= 1.1 * 4.5).int().tolist() for n in ("Layer1.a", "Layer1.b")},
        **{"Layer4.a": [0, 1], "Layer6.a": [1, 0]},
    }


def test_ratio_keeps_the_top_of_every_layer():
    assert kept(th.keep_above(scored("ratio", SCORES), 0.5)) == {
        "Layer1.a": [0] * 4,
        "Layer1.b": [1] * 4,
        "Layer4.a": [0, 1],
        "Layer6.a": [1, 0],
    }


@pytest.mark.parametrize(
    ("ratio", "count"), [(0, 0), (0.29, 29), (0.35, 35), (0.999, 99), (1, 100)]
)
def test_ratio_is_a_floor(ratio, count):
    keep = th.keep_above(scored("ratio", {"Layer1.a": torch.rand(100)}), 1 - ratio)
    assert keep["Layer1.a"].sum() == count


@pytest.mark.parametrize(("ratio", "first"), [(0.40, 2), (0.38, 1)])
def test_ratio_of_tensors_and_ties(ratio, first):
    scores = {f"Layer1.{i}": torch.tensor(1.0) for i in range(5)}
    masks = th.keep_above(scored("ratio", scores), 1 - ratio).values()
    assert [bool(m) for m in masks] == [i < first for i in range(5)]


def test_mean_std():
    values = torch.cat((SCORES["Layer1.a"], SCORES["Layer1.b"].flatten()))
    tau = values.mean() + 0.5 * values.std(correction=0)
    scores = scored("mean_std", SCORES)
    keep = th.keep_above(scores, 0.5)
    assert kept(keep)["Layer1.b"] == (SCORES["Layer1.b"].flatten() >= tau).int().tolist()
    assert kept(th.keep_above(scores, -10))["Layer6.a"] == [1, 1]
    equal = scored("mean_std", {"Layer1.a": torch.ones(3)})
    assert kept(th.keep_above(equal, 0.1))["Layer1.a"] == [0, 0, 0]


def test_thresholds_run_from_nothing_to_everything():
    few = th.threshold_grid(SCORES, 100)
    assert few[0] == math.inf
    assert few[1:] == sorted(
        {v for s in SCORES.values() for v in s.flatten().tolist()}, reverse=True
    )
    many = th.threshold_grid({"Layer1.a": torch.rand(1000)}, 10)
    assert len(many) == 11
    assert sum(m.sum() for m in th.keep_above(SCORES, few[0]).values()) == 0
    assert all(m.all() for m in th.keep_above(SCORES, few[-1]).values())


def plain_ratio(scores, ratio):
    """Per layer, the floor(ratio * n) units that a stable sort puts first."""
    keep = {}
    for layer in {th.layer_of(name) for name in scores}:
        names = [name for name in scores if th.layer_of(name) == layer]
        units = sorted(
            [(-v, n, i) for n in names for i, v in enumerate(scores[n].flatten().tolist())],
            key=lambda unit: unit[0],
        )
        kept_units = {(n, i) for _, n, i in units[: math.floor(ratio * len(units) + 1e-9)]}
        for n in names:
            mask = torch.tensor([(n, i) in kept_units for i in range(scores[n].numel())])
            keep[n] = mask.view(scores[n].shape)
    return keep


def plain_group(scores, c):
    mean = {}
    for group in set(GROUPS.values()):
        members = [s.flatten() for n, s in scores.items() if GROUPS[n] == group]
        mean[group] = torch.cat(members).mean().item() if members else 1.0
    return {n: s / mean[GROUPS[n]] >= c for n, s in scores.items()}


@pytest.mark.parametrize("levels", [4, 10**6])  # with four levels most units are ties
@pytest.mark.parametrize("count", [1, 7, 60, 100, 129])
def test_masks_are_thresholds_of_the_scores(levels, count):
    torch.manual_seed(count)
    names = ("Layer2.a", "Layer1.a", "Layer1.b", "Layer4.a", "Layer6.a")
    scores = {n: torch.randint(levels, (count, 3)).float() for n in names}
    ratio = scored("ratio", scores)
    group = scored("group", scores)
    mean_std = scored("mean_std", scores)
    assert list(ratio) == list(group) == list(mean_std) == list(scores)
    for step in range(101):
        kept_units, wanted = th.keep_above(ratio, 1 - step / 100), plain_ratio(scores, step / 100)
        assert all(torch.equal(kept_units[n], wanted[n]) for n in names)
        kept_units, wanted = th.keep_above(group, step / 50), plain_group(scores, step / 50)
        assert all(torch.equal(kept_units[n], wanted[n]) for n in names)
    for k in (-1, 0, 0.5, 2):
        kept_units = th.keep_above(mean_std, k)
        values = torch.cat([scores["Layer1.a"], scores["Layer1.b"]]).double()
        wanted = (scores["Layer1.b"] - values.mean()) / values.std(correction=0) >= k
        assert torch.equal(kept_units["Layer1.b"], wanted)
