import math

import pytest
import torch

from lafq.allocation import rules

SCORES = {
    "Layer1.a": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "Layer1.b": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
    "Layer4.a": torch.tensor([10.0, 20.0]),
    "Layer6.a": torch.tensor([100.0, 0.0]),
}
GROUPS = {f"Layer{i}": "first" if i < 3 else f"group {i}" for i in range(1, 7)}


def layer_of(name):
    return name.split(".")[0]


def scored(rule, scores):
    return rules.RULES[rule](scores, layer_of, lambda name: GROUPS[layer_of(name)])


def kept(keep):
    return {n: m.flatten().int().tolist() for n, m in keep.items()}


def test_by_granularity():
    assert {n: s.item() for n, s in rules.by_granularity(SCORES, "tensor").items()} == {
        "Layer1.a": 2.5,
        "Layer1.b": 6.5,
        "Layer4.a": 15.0,
        "Layer6.a": 50.0,
    }
    assert rules.by_granularity(SCORES, "weight") == SCORES
    by_channel = rules.by_granularity(
        {"a": SCORES["Layer1.b"], "b": SCORES["Layer1.b"]}, "channel", {"b": 1}
    )
    assert {n: s.tolist() for n, s in by_channel.items()} == {"a": [5.5, 7.5], "b": [6.0, 7.0]}
    with pytest.raises(
        ValueError, match="unknown granularity 'row': choose one of tensor, channel, weight"
    ):
        rules.by_granularity(SCORES, "row")


def test_global():
    keep = rules.keep_above(SCORES, 7.0)
    assert kept(keep) == {
        "Layer1.a": [0] * 4,
        "Layer1.b": [0, 0, 1, 1],
        "Layer4.a": [1, 1],
        "Layer6.a": [1, 0],
    }
    assert keep["Layer1.b"].shape == (2, 2)


@pytest.mark.parametrize(
    ("ratio", "count"), [(0, 0), (0.29, 29), (0.35, 35), (0.999, 99), (1, 100)]
)
def test_ratio_is_a_floor(ratio, count):
    keep = rules.keep_above(scored("ratio", {"Layer1.a": torch.rand(100)}), 1 - ratio)
    assert keep["Layer1.a"].sum() == count


@pytest.mark.parametrize(("ratio", "first"), [(0.40, 2), (0.38, 1)])
def test_ratio_of_tensors_and_ties(ratio, first):
    scores = {f"Layer1.{i}": torch.tensor(1.0) for i in range(5)}
    masks = rules.keep_above(scored("ratio", scores), 1 - ratio).values()
    assert [bool(m) for m in masks] == [i < first for i in range(5)]


def test_mean_std():
    values = torch.cat((SCORES["Layer1.a"], SCORES["Layer1.b"].flatten()))
    tau = values.mean() + 0.5 * values.std(correction=0)
    scores = scored("mean_std", SCORES)
    keep = rules.keep_above(scores, 0.5)
    assert kept(keep)["Layer1.b"] == (SCORES["Layer1.b"].flatten() >= tau).int().tolist()
    assert kept(rules.keep_above(scores, -10))["Layer6.a"] == [1, 1]
    equal = scored("mean_std", {"Layer1.a": torch.ones(3)})
    assert kept(rules.keep_above(equal, 0.1))["Layer1.a"] == [0, 0, 0]


def test_thresholds_run_from_nothing_to_everything():
    few = rules.threshold_grid(SCORES, 100)
    assert few[0] == math.inf
    assert few[1:] == sorted(
        {v for s in SCORES.values() for v in s.flatten().tolist()}, reverse=True
    )
    many = rules.threshold_grid({"Layer1.a": torch.rand(1000)}, 10)
    assert len(many) == 11
    assert sum(m.sum() for m in rules.keep_above(SCORES, few[0]).values()) == 0
    assert all(m.all() for m in rules.keep_above(SCORES, few[-1]).values())


def plain_ratio(scores, ratio):
    """Per layer, the floor(ratio * n) units that a stable sort puts first."""
    keep = {n: torch.zeros(s.numel(), dtype=torch.bool) for n, s in scores.items()}
    for layer in {layer_of(name) for name in scores}:
        names = [name for name in scores if layer_of(name) == layer]
        units = [(-v, n, i) for n in names for i, v in enumerate(scores[n].flatten().tolist())]
        units.sort(key=lambda unit: unit[0])
        for _, n, i in units[: math.floor(ratio * len(units) + 1e-9)]:
            keep[n][i] = True
    return {n: mask.view(scores[n].shape) for n, mask in keep.items()}


def plain_group(scores, c):
    parts = {}
    for n, s in scores.items():
        parts.setdefault(GROUPS[layer_of(n)], []).append(s.flatten())
    mean = {group: torch.cat(values).mean().item() for group, values in parts.items()}
    return {n: s / mean[GROUPS[layer_of(n)]] >= c for n, s in scores.items()}


@pytest.mark.parametrize("levels", [4, 10**6])  # with four levels most units are ties
@pytest.mark.parametrize("count", [1, 7, 60, 100, 129])
def test_masks_are_thresholds_of_the_scores(levels, count):
    torch.manual_seed(count)
    names = ("Layer2.a", "Layer1.a", "Layer1.b", "Layer4.a", "Layer6.a")
    fisher = {n: torch.randint(levels, (count, 3)).float() for n in names}
    scores = {rule: scored(rule, fisher) for rule in rules.RULES}
    assert all(list(by_name) == list(names) for by_name in scores.values())
    for step in range(101):
        for rule, amount, threshold, plain in (
            ("ratio", step / 100, 1 - step / 100, plain_ratio),
            ("group", step / 50, step / 50, plain_group),
        ):
            masks, expected = rules.keep_above(scores[rule], threshold), plain(fisher, amount)
            assert all(torch.equal(masks[n], expected[n]) for n in names)
    layer = torch.cat([fisher["Layer1.a"], fisher["Layer1.b"]]).double()
    for k in (-1, 0, 0.5, 2):
        masks = rules.keep_above(scores["mean_std"], k)
        expected = (fisher["Layer1.b"] - layer.mean()) / layer.std(correction=0) >= k
        assert torch.equal(masks["Layer1.b"], expected)
