"""Quantize the diffusion model with one other library, as its documentation shows; `peers.py` runs
python benchmarks/peer.py LIBRARY WIDTH BITS SAMPLES FILE beside that library.

The safetensors file has, for each weight tensor that the library quantized, the values that it
computes with, and what must be stored for them. All see the same noised digits.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lafq.quantization.checks import channel_view
from lafq.quantization.model import nbytes
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.subject import load_model, mnist
from lafq.study.workspace import Workspace, compute_on
from lafq.tensors import save_tensors

PROFILES = {16: "small", 64: "paper"}
SEED, GROUP = 0, 32
ADAROUND_ITERATIONS = 1000  # per layer; AIMET's default of 15,000 would take hours here
Batches = list[tuple[Tensor, Tensor]]


class Stored(NamedTuple):
    """A weight tensor as a library computes with it, and what must be stored of it."""

    values: Tensor
    bits: float
    scales: int
    zero_points: int = 0


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a weight of two dimensions or more, by the name of that weight."""
    weights = ((n, m, getattr(m, "weight", None)) for n, m in model.named_modules())
    return {f"{n}.weight": m for n, m, w in weights if isinstance(w, Tensor) and w.ndim > 1}


def quanto(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """optimum-quanto: weights of a type, frozen."""
    from optimum import quanto as library

    library.quantize(model, weights=getattr(library, f"qint{bits}"))
    library.freeze(model)
    none = torch.empty(0)
    return {
        n: Stored(w.dequantize(), bits, w._scale.numel(), getattr(w, "_shift", none).numel())
        for n, m in layers(model).items()
        if isinstance(w := m.weight, library.QTensor)
    }


def noise_loss(output: Tensor, _: object = None) -> Tensor:
    """Its gradient is noise of variance 1, as lafq's."""
    return (output - output.detach() - torch.randn_like(output)).square().sum() / 2


def torchao(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """torchao's IntxWeightOnly in groups of GROUP weights, or all inputs where fewer."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

    config = partial(IntxWeightOnlyConfig, getattr(torch, f"int{bits}"))
    groups, channels = config(granularity=PerGroup(GROUP)), config(granularity=PerAxis(0))
    known = ((n, m) for n, m in layers(model).items() if isinstance(m, nn.Linear | nn.Conv2d))
    inputs = {name: layer.weight.shape[1] for name, layer in known}
    quantize_(model, groups, lambda _, name: inputs.get(f"{name}.weight", 1) % GROUP == 0)
    # It fails for a single input channel.
    quantize_(model, channels, lambda _, name: 1 < inputs.get(f"{name}.weight", 1) < GROUP)
    return {
        n: Stored(w.dequantize(), bits, w.scale.numel(), int(w.zero_point.count_nonzero()))
        for n, m in layers(model).items()
        if isinstance(w := m.weight, IntxUnpackedToInt8Tensor)
    }


def torchao_hqq(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """torchao's HQQ scales, which it has for matrices alone: each layer as one."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm as Rule

    found = {}
    for name, layer in layers(model).items():
        view = channel_view(model, name)
        matrix = nn.Sequential(nn.Linear(*reversed(view.size), bias=False))
        matrix[0].weight = nn.Parameter(view.of(layer.weight.detach()))
        shared = PerAxis(0) if view.size[1] % GROUP else PerGroup(GROUP)
        rule = {"granularity": shared, "intx_choose_qparams_algorithm": Rule.HQQ_SCALE_ONLY}
        quantize_(matrix, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), **rule))
        w = matrix[0].weight
        found[name] = Stored(view.back(w.dequantize()), bits, w.scale.numel())
    return found


def sdnq(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """sdnq without the sizes below which it skips layers, and without transposed convolutions, on
    which it fails; its scales and zero points are numbers.
    """
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
    from sdnq import sdnq_post_load_quant

    known = layers(model)
    failing = [n for n, m in known.items() if isinstance(m, nn.ConvTranspose2d)]
    how = {"weights_dtype": f"uint{bits}", "quant_conv": True, "modules_to_not_convert": failing}
    sdnq_post_load_quant(model, minimum_allowed_numel=1, minimum_allowed_channel_size=1, **how)
    found = {n: model.get_submodule(n.removesuffix(".weight")) for n in known if n not in failing}
    scales = {n: m.scale.numel() + m.zero_point.numel() for n, m in found.items()}
    return {n: Stored(m.dequantize().weight, bits, scales[n]) for n, m in found.items()}


def coremltools(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """coremltools' palettes, by k-means weighted with squared gradients; a palette is FP16."""
    from coremltools.optimize.torch.palettization import SKMPalettizer, SKMPalettizerConfig

    config = {"global_config": {"n_bits": bits}, "calibration_nsamples": len(batches)}
    palettizer = SKMPalettizer(model, SKMPalettizerConfig.from_dict(config))
    model = palettizer.compress(batches, lambda m, batch: noise_loss(m(*batch)))
    return {n: Stored(m.weight, bits, 2**bits) for n, m in layers(model).items()}


def nncodec(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """nncodec's DeepCABAC and trellis quantization: the bitstream of the finest step that has at
    most the bytes of uniform integers. It holds all parameters, at equal bits for each.
    """
    from nncodec.nn import decode, encode

    weights = {n: p.detach().contiguous().numpy() for n, p in model.named_parameters()}
    budget, low, high = nbytes(model, dict.fromkeys(layers(model), f"int{bits}")), -60, 0
    with TemporaryDirectory() as results:
        how = {"use_dq": True, "verbose": False, "results": results}
        while high - low > 1:
            qp = (low + high) // 2
            fits = len(encode(weights, how | {"qp": qp})) <= budget
            low, high = (low, qp) if fits else (qp, high)
        stream = encode(weights, how | {"qp": high})
    each = 8 * len(stream) / sum(w.size for w in weights.values())
    return {n: Stored(torch.tensor(w), each, 0) for n, w in decode(stream).items()}


def brevitas(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """Brevitas' GPTQ, one scale of least squared error per output channel."""
    import brevitas.nn as qnn
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE

    settings = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits}
    settings["return_quant_tensor"] = False
    kinds = ("Conv2d", "ConvTranspose2d", "Linear")
    replaced = {getattr(nn, kind): (getattr(qnn, f"Quant{kind}"), settings) for kind in kinds}
    model = layerwise_quantize(model, replaced)
    with torch.no_grad():
        model(*batches[0])  # sets the scales
    with torch.no_grad(), gptq_mode(model, use_quant_activations=False) as gptq:
        for _ in range(gptq.num_layers):
            for batch in batches:
                gptq.model(*batch)
            gptq.update()
    weights = {n: m.quant_weight() for n, m in layers(model).items()}
    return {n: Stored(w.value, w.bit_width.item(), w.scale.numel()) for n, w in weights.items()}


def modelopt(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """nvidia-modelopt's auto_quantize: a format per layer, or none, for so many effective bits."""
    import modelopt.torch.quantization as mtq

    def format(b: int) -> dict:
        weights = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": b, "axis": 0}}
        off = {"quantizer_name": "*", "enable": False}
        return {"quant_cfg": [off, weights], "algorithm": "max"}

    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": float(bits)},
        quantization_formats=[format(b) for b in (2, 3, 4, 6, 8)],
        data_loader=batches,
        forward_step=lambda m, batch: m(*batch),
        loss_func=noise_loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    return {
        n: Stored(q(m.weight), q.num_bits, q.amax.numel())
        for n, m in layers(model).items()
        if (q := getattr(m, "weight_quantizer", None)) is not None and q.is_enabled
    }


def aimet(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """AIMET's AdaRound."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.quantsim import QuantizationSimModel

    how = {"default_num_iterations": ADAROUND_ITERATIONS, "forward_fn": lambda m, x: m(*x)}
    settings = AdaroundParameters(batches, len(batches), **how)
    first, bitwidth = batches[0], {"default_param_bw": bits}
    with TemporaryDirectory() as folder:
        rounded = Adaround.apply_adaround(model, first, settings, folder, "rounded", **bitwidth)
        simulated = QuantizationSimModel(rounded, first, **bitwidth)
        simulated.set_and_freeze_param_encodings(str(Path(folder) / "rounded.encodings"))
    return {
        n: Stored(q(m.weight), bits, q.get_scale().numel())
        for n, m in layers(simulated.model).items()
        if (q := dict(getattr(m, "param_quantizers", {})).get("weight")) is not None
    }


LIBRARIES: dict[str, Callable[[nn.Module, int, Batches], dict[str, Stored]]] = {
    "optimum-quanto": quanto,
    "torchao": torchao,
    "brevitas": brevitas,
    "nvidia-modelopt": modelopt,
    "aimet-torch": aimet,
    "coremltools": coremltools,
    "torchao, HQQ scales": torchao_hqq,
    "nncodec": nncodec,
    "sdnq": sdnq,
}


def main() -> int:
    """Write the file; an error of the library is one line and exit status 1."""
    library, width, bits, samples, path = sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5])
    compute_on(2, "cpu")
    torch.manual_seed(SEED)
    model = load_model(Workspace(PROFILES[width]), width)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    batches = list(noised_batches(mnist(train=True)[0], samples, SEED))
    try:
        quantized = LIBRARIES[library](model, bits, batches)
    except Exception as error:  # whatever a library raises is what the table says of it
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", file=sys.stderr)
        return 1
    kept = {n: s for n, s in quantized.items() if s.values.shape == shapes.get(n)}
    tensors = {n: s.values.detach().float().contiguous().clone() for n, s in kept.items()}
    package = library.partition(",")[0]
    stored = {n: [s.bits, s.scales, s.zero_points] for n, s in kept.items()}
    save_tensors(path, tensors, library=library, version=version(package), stored=stored)
    print("null")  # the last line; libraries print as well
    return 0


if __name__ == "__main__":
    sys.exit(main())
