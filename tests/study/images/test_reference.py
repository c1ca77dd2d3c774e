import pytest
import torch

from lafq.study import workspace
from lafq.study.images import metrics
from lafq.study.images.metrics import Reference
from lafq.study.images.reference import load_reference, save_reference


def test_statistics_come_back_and_fid_hardly_moves(sandbox):
    g = torch.Generator().manual_seed(0)
    digits = torch.randint(256, (5, 1, 32, 32), generator=g, dtype=torch.uint8)
    mixed = torch.randn(40, 40, generator=g)
    real, ours = (torch.randn(n, 40, generator=g) @ mixed for n in (500, 60))
    assert load_reference(digits, "weights") is None
    save_reference(Reference(real), digits, "weights")
    kept = load_reference(digits, "weights")
    whole, again = (metrics.scores(ours, None, r) for r in (Reference(real), kept))
    assert 0 < abs(again["fid"] - whole["fid"]) < 1e-3 * whole["fid"]
    assert set(whole) - set(again) == {"kid"}
    assert load_reference(digits[1:], "weights") is None
    assert load_reference(digits, "other weights") is None
    assert [path.name for path in workspace.RESULTS.rglob("*")] == ["inception", "reference.npz"]
    path = workspace.RESULTS / "inception" / "reference.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged: `git checkout"):
        load_reference(digits, "weights")
