import pytest
import torch

from lafq.quantization import formats
from lafq.quantization.formats import (
    FORMATS,
    absmax_scale,
    bit_bytes,
    encode,
    get_format,
    pack_bits,
    unpack_bits,
    unshrunk_scale,
    weighted_mse_scale,
)

INTEGERS = [f for f in FORMATS.values() if 0 < f.qmax < 128]


def error(rows, scale, qmax, importance=1):
    codes = encode(rows, scale[:, None], qmax).float() - qmax
    return (importance * (rows - codes * scale.float()[:, None]) ** 2).sum(1)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_codes_come_back_from_dense_bytes(bits, count):
    codes = torch.randint(
        2**bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
    )
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == bit_bytes(bits, count)
    assert packed.numel() * 8 <= count * bits + 7 * 2
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_layout_of_the_bytes():
    four, three = (torch.tensor(c, dtype=torch.uint8) for c in ([1, 2, 3, 4], [5, 6]))
    assert pack_bits(four, 4).tolist() == [1 | 3 << 4, 2 | 4 << 4]
    assert pack_bits(three, 3).tolist() == [1 | 2 << 2, 1 << 0 | 1 << 1]


def test_levels():
    assert {f.name: f.qmax for f in INTEGERS} == {
        f"int{b}": 2 ** (b - 1) - 1 for b in range(2, 9)
    } | {"midrise2": 1.5}
    with pytest.raises(
        ValueError,
        match="unknown format 'int9': choose one of fp32, fp16, int8, int6, int4, int3, int2, int7",
    ):
        get_format("int9")


@pytest.mark.parametrize("f", INTEGERS, ids=lambda f: f.name)
def test_rounding_errs_by_half_a_step_and_absmax_clips_nothing(f):
    rows = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    scale = absmax_scale(rows, f.qmax)
    assert scale.dtype == torch.float16
    codes = encode(rows, scale[:, None], f.qmax).float() - f.qmax
    assert codes.abs().max() == f.qmax
    # 5e-4: the scale is rounded to FP16's 11 bits, which the largest code multiplies.
    off = (rows - codes * scale.float()[:, None]).abs() / scale.float()[:, None]
    assert off.max() <= 0.5 + f.qmax * 5e-4


@pytest.mark.parametrize("f", INTEGERS, ids=lambda f: f.name)
def test_least_squares_is_near_the_best_of_a_fine_search(f):
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 300, generator=g)
    importance = torch.rand(6, 300, generator=g) ** 8
    for fisher in (None, importance):
        weight, largest = 1 if fisher is None else fisher, rows.abs().amax(1) / f.qmax
        found = error(rows, weighted_mse_scale(rows, f.qmax, fisher), f.qmax, weight)
        at_absmax = error(rows, absmax_scale(rows, f.qmax), f.qmax, weight)
        shares = torch.linspace(0.05, 1.1, 1000)
        every = [error(rows, largest * share, f.qmax, weight) for share in shares]
        best = torch.stack(every).amin(0)
        assert (found <= at_absmax * 1.001).all()
        assert found.sum() <= best.sum() * 1.15
    assert (
        error(rows, weighted_mse_scale(rows, 1), 1) < 0.7 * error(rows, absmax_scale(rows, 1), 1)
    ).all()


def test_four_levels_err_less_than_three():
    """Gaussian weights: 0.1188 of the variance against 0.1902 (Max 1960, table II, uniform
    quantizers of 4 and 3 levels).
    """
    rows = torch.randn(4, 20000, generator=torch.Generator().manual_seed(0))
    found = {low: FORMATS[low] for low in ("int2", "midrise2")}
    errors = {
        low: (formats.fake_quantize(rows, f, weighted_mse_scale) - rows).square().mean().item()
        for low, f in found.items()
    }
    assert errors["int2"] == pytest.approx(0.1902, rel=0.02)
    assert errors["midrise2"] == pytest.approx(0.1188, rel=0.02)
    levels = (
        formats.fake_quantize(rows, found["midrise2"], absmax_scale)[0]
        / absmax_scale(rows, 1.5).float()[0]
    ).unique()
    assert levels.tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5])


@pytest.mark.parametrize("rule", [absmax_scale, weighted_mse_scale, unshrunk_scale])
def test_rows_of_zeros_stay_as_good_as_zero_without_a_code_for_it(rule):
    rows = torch.zeros(2, 8)
    rows[1] = 1
    assert formats.fake_quantize(rows, FORMATS["midrise2"], rule)[0].abs().max() < 1e-7


def test_the_importance_decides():
    rows, importance = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 0.0]])
    assert weighted_mse_scale(rows, 1, importance).item() == 1
    assert absmax_scale(rows, 1).item() == 10
    assert (
        weighted_mse_scale(rows, 1, torch.zeros(1, 2)).item() == weighted_mse_scale(rows, 1).item()
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unbiased_scales_shrink_rows_less(bits):
    f = FORMATS[f"int{bits}"]
    g = torch.Generator().manual_seed(3)
    rows, importance = torch.randn(20, 500, generator=g), torch.rand(20, 500, generator=g) ** 4

    def shrinking(rule):
        change = formats.fake_quantize(rows, f, rule, importance) - rows
        return -(importance * rows * change).sum(1) / (importance * rows.square()).sum(1)

    assert (shrinking(weighted_mse_scale) > 0).all()
    assert shrinking(unshrunk_scale).abs().mean() < 0.6 * shrinking(weighted_mse_scale).mean()
    assert torch.equal(
        unshrunk_scale(rows, f.qmax, torch.zeros_like(rows)), unshrunk_scale(rows, f.qmax)
    )


@pytest.mark.parametrize("rule", [absmax_scale, weighted_mse_scale, unshrunk_scale])
def test_rows_of_zeros_and_of_tiny_weights(rule):
    rows = torch.zeros(2, 5)
    rows[1] = 1e-9
    scale = rule(rows, 127)
    assert scale[0] == 1
    assert 0 < scale[1] < 1e-6


def test_blocks_do_not_change_the_scales(monkeypatch):
    rows = torch.randn(10, 50, generator=torch.Generator().manual_seed(2))
    whole = weighted_mse_scale(rows, 7)
    monkeypatch.setattr(formats, "BLOCK", 1)
    assert torch.equal(whole, weighted_mse_scale(rows, 7))
