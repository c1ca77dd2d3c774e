"""Quantize the diffusion model with one other library, as its documentation shows; `peers.py` runs
this beside that library.

python benchmarks/peer.py LIBRARY WIDTH BITS SAMPLES FILE writes a safetensors file. For each weight
tensor that the library quantized it has the values that the library computes with, and what must be
stored for them. All see the same noised digits.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import UNet
from lafq.study.workspace import Workspace, compute_on
from lafq.tensors import save_tensors

PROFILES = {16: "mini", 64: "paper"}
SEED, GROUP = 0, 32
ADAROUND_ITERATIONS = 1000  # per layer; AIMET's default of 15,000 would take hours here
Batches = list[tuple[Tensor, Tensor]]


class Stored(NamedTuple):
    """A weight tensor as a library computes with it, and what that takes: bits per code, scales,
    zero points.
    """

    values: Tensor
    bits: float
    scales: int
    zero_points: int = 0


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a weight of two dimensions or more, by the name of that weight."""
    found = {f"{name}.weight": module for name, module in model.named_modules()}
    return {
        n: m
        for n, m in found.items()
        if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim > 1
    }


def quanto(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """optimum-quanto: weights of a type, frozen."""
    from optimum import quanto as library

    library.quantize(model, weights=getattr(library, f"qint{bits}"))
    library.freeze(model)
    found = {n: m.weight for n, m in layers(model).items() if isinstance(m.weight, library.QTensor)}
    return {
        n: Stored(
            w.dequantize(), bits, w._scale.numel(), getattr(w, "_shift", torch.empty(0)).numel()
        )
        for n, w in found.items()
    }


def torchao(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """torchao's IntxWeightOnly in groups of GROUP weights, or of all input channels where these are
    fewer.
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

    kind = getattr(torch, f"int{bits}")
    groups, channels = (
        IntxWeightOnlyConfig(kind, granularity=g) for g in (PerGroup(GROUP), PerAxis(0))
    )
    inputs = {
        n: m.weight.shape[1]
        for n, m in layers(model).items()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    quantize_(model, groups, lambda _, name: inputs.get(f"{name}.weight", 1) % GROUP == 0)
    # It fails for a single input channel.
    quantize_(model, channels, lambda _, name: 1 < inputs.get(f"{name}.weight", 1) < GROUP)
    found = {
        n: m.weight
        for n, m in layers(model).items()
        if isinstance(m.weight, IntxUnpackedToInt8Tensor)
    }
    return {
        n: Stored(w.dequantize(), bits, w.scale.numel(), int(w.zero_point.count_nonzero()))
        for n, w in found.items()
    }


def brevitas(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """Brevitas' GPTQ, one scale of least squared error per output channel."""
    import brevitas.nn as qnn
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE

    settings = {
        "weight_quant": Int8WeightPerChannelFloatMSE,
        "weight_bit_width": bits,
        "return_quant_tensor": False,
    }
    kinds = {
        nn.Conv2d: qnn.QuantConv2d,
        nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
        nn.Linear: qnn.QuantLinear,
    }
    model = layerwise_quantize(model, {kind: (ours, settings) for kind, ours in kinds.items()})
    with torch.no_grad():
        model(*batches[0])  # sets the scales
    with torch.no_grad(), gptq_mode(model, use_quant_activations=False) as gptq:
        for _ in range(gptq.num_layers):
            for batch in batches:
                gptq.model(*batch)
            gptq.update()
    found = {n: m.quant_weight() for n, m in layers(model).items()}
    return {
        n: Stored(w.value.detach(), w.bit_width.item(), w.scale.numel()) for n, w in found.items()
    }


def modelopt(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """nvidia-modelopt's auto_quantize: a format per layer, of 2, 3, 4, 6, 8 bits or none, for so
    many effective bits.
    """
    import modelopt.torch.quantization as mtq

    def format(b: int) -> dict:
        off = {"quantizer_name": "*", "enable": False}
        return {
            "quant_cfg": [
                off,
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": b, "axis": 0}},
            ],
            "algorithm": "max",
        }

    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": float(bits)},
        quantization_formats=[format(b) for b in (2, 3, 4, 6, 8)],
        data_loader=batches,
        forward_step=lambda m, batch: m(*batch),
        # The gradient of this loss is noise of variance 1, as lafq's.
        loss_func=lambda output, _: (
            (output - output.detach() - torch.randn_like(output)).square().sum() / 2
        ),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    found = {}
    for name, module in layers(model).items():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            found[name] = Stored(
                quantizer(module.weight).detach(), quantizer.num_bits, quantizer.amax.numel()
            )
    return found


def aimet(model: nn.Module, bits: int, batches: Batches) -> dict[str, Stored]:
    """AIMET's AdaRound."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.quantsim import QuantizationSimModel

    settings = AdaroundParameters(
        batches,
        len(batches),
        default_num_iterations=ADAROUND_ITERATIONS,
        forward_fn=lambda m, batch: m(*batch),
    )
    with TemporaryDirectory() as folder:
        rounded = Adaround.apply_adaround(
            model, batches[0], settings, folder, "found", default_param_bw=bits
        )
        simulated = QuantizationSimModel(rounded, batches[0], default_param_bw=bits)
        simulated.set_and_freeze_param_encodings(str(Path(folder) / "found.encodings"))
    found = {}
    for name, module in layers(simulated.model).items():
        quantizers = getattr(module, "param_quantizers", None) or {}
        if "weight" in quantizers and quantizers["weight"] is not None:
            quantizer = quantizers["weight"]
            found[name] = Stored(
                quantizer(module.weight).detach(), bits, quantizer.get_scale().numel()
            )
    return found


LIBRARIES: dict[str, Callable[[nn.Module, int, Batches], dict[str, Stored]]] = {
    "optimum-quanto": quanto,
    "torchao": torchao,
    "brevitas": brevitas,
    "nvidia-modelopt": modelopt,
    "aimet-torch": aimet,
}


def main() -> int:
    """Write the file; an error of the library is one line and exit status 1."""
    library, width, bits, samples, path = sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5])
    compute_on(2, "cpu")
    torch.manual_seed(SEED)
    model: UNet = load_model(Workspace(PROFILES[width]), width)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    try:
        found = LIBRARIES[library](
            model, bits, list(noised_batches(mnist(train=True)[0], samples, SEED))
        )
    except Exception as error:  # whatever a library raises is what the table says of it
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", file=sys.stderr)
        return 1
    found = {n: s for n, s in found.items() if s.values.shape == shapes.get(n)}
    tensors = {n: s.values.detach().float().contiguous().clone() for n, s in found.items()}
    stored = {n: [s.bits, s.scales, s.zero_points] for n, s in found.items()}
    save_tensors(path, tensors, library=library, version=version(library), stored=stored)
    return 0


if __name__ == "__main__":
    sys.exit(main())
