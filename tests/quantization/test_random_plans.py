"""Plans of every kind for networks of every kind: what is counted is what is stored, and nothing is
lost on the way.
"""

from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lafq import load_quantized, quantize, save_quantized
from lafq.quantization.channels import WeightSpec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import FORMATS, get_format
from lafq.quantization.model import dequantize_, nbytes, resident_bytes

sizes = st.integers(1, 5)


@st.composite
def layers(draw):
    a, b, groups, kernel = draw(st.tuples(sizes, sizes, st.integers(1, 2), st.integers(1, 3)))
    kind = draw(st.sampled_from(["linear", "conv", "transposed", "conv1d"]))
    bias = draw(st.booleans())
    if kind == "linear":
        return nn.Linear(a, b, bias)
    if kind == "conv1d":
        return nn.Conv1d(a, b, kernel, bias=bias)
    module = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
    return module(groups * a, groups * b, kernel, groups=groups, bias=bias)


@st.composite
def entries(draw, shape, channels, length):
    formats = st.sampled_from(
        [f for f in FORMATS if f != "int16"] if len(shape) > 1 else ["fp16", "fp32"]
    )
    format = draw(st.one_of(formats, st.tuples(*[formats] * channels)))
    divisors = [size for size in range(1, length + 1) if length % size == 0]
    group = draw(st.sampled_from([0, *divisors]))
    if draw(st.booleans()):
        return format if isinstance(format, str) and not group else WeightSpec(format, group=group)
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    return WeightSpec(format, mask, draw(st.sampled_from(["fp16", "fp32"])), group=group)


@st.composite
def models_with_plans(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    model = nn.ModuleList(draw(st.lists(layers(), min_size=1, max_size=3)))
    names = draw(st.sets(st.sampled_from([n for n, _ in model.named_parameters()])))
    plan = {
        n: draw(entries(tuple(model.get_parameter(n).shape), *channel_view(model, n).size))
        for n in sorted(names)
    }
    return model, plan


@settings(max_examples=60, deadline=None, derandomize=True)
@given(models_with_plans())
def test_bytes_reloading_and_errors_of_any_plan(found):
    model, plan = found
    small = quantize(model, plan)
    assert resident_bytes(small) == nbytes(model, plan)
    with TemporaryDirectory() as folder:
        path = f"{folder}/a.safetensors"
        save_quantized(path, small, source=model)
        again = dequantize_(load_quantized(path, model))
    whole = dequantize_(small)
    for name, before in model.named_parameters():
        after = whole.get_parameter(name)
        assert torch.equal(after, again.get_parameter(name))
        if name not in plan:
            assert torch.equal(after, before)
            continue
        view, entry = channel_view(model, name), plan[name]
        spec = entry if isinstance(entry, WeightSpec) else WeightSpec(entry)
        rows, off = view.of(before.detach()), view.of((after - before).detach()).abs()
        kept = view.of(torch.zeros(before.shape) > 0 if spec.keep_mask is None else spec.keep_mask)
        formats = (spec.format,) * view.size[0] if isinstance(spec.format, str) else spec.format
        for r, format in enumerate(map(get_format, formats)):
            rest = rows[r].masked_fill(kept[r], 0)
            # Half a step of the integers, or of FP16's 11 bits; a scale is an FP16 number itself.
            step = (
                rest.abs().max() / format.qmax * (1 + 2**-10)
                if format.is_integer
                else 2**-11 * rest.abs() * (format.bits == 16)
            )
            slack = format.qmax * 2**-11 * step if format.is_integer else 0
            half = 0.5 * step + slack if format.is_integer else step
            assert (
                off[r][~kept[r]] <= (half + 1e-7 if format.is_integer else half[~kept[r]] + 1e-7)
            ).all()
            precise = get_format(spec.keep_format).bits == 32
            assert (
                off[r][kept[r]] <= (0 if precise else 2**-11 * rows[r][kept[r]].abs() + 1e-7)
            ).all()
