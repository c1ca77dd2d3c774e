"""What a redesign must leave as it is: keys of kept images, and the weights of the packed file."""

import hashlib

from lafq.quantization.checkpoint import load_quantized
from lafq.quantization.model import dequantize_, weights_sha256
from lafq.study import budget_rows, poster, rows, workspace
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.images.sampling import Sampling, read, row_key
from lafq.study.rows import Row, recipe

PAPER = workspace.RESULTS / "paper"
KEPT_SHA256 = "9416265d4758604b7fa06f772043a4ad4399718e7af2dbfe28dd1cf881fee366"
PACKED_SHA256 = "71ffb12f938a019fb3a9023c9ffb5538e36f8148f604b33b5891bb0411d9f178"


def test_kept_images_have_the_keys_that_they_had():
    names = sorted(path.name for path in (PAPER / "samples").glob("*.npz"))
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == KEPT_SHA256
    for name in names:
        _, record = read(PAPER / "samples" / name)
        sampling = Sampling(1, record["steps"], record["seed"], record["batch"])
        assert name.startswith(row_key(record["recipe"], sampling))


def test_the_packed_file_holds_the_weights_that_it_held():
    model = dequantize_(load_quantized(PAPER / "packed.safetensors", UNet(64)))
    assert weights_sha256(model) == PACKED_SHA256


def test_rows_have_the_keys_of_all_kept_images(tiny):
    """Width 4 has as many cuts as width 64, and recipes do not name the thresholds themselves."""
    files = sorted((PAPER / "samples").glob("*.npz"))
    weights, fisher = read(files[0])[1]["recipe"]["weights"], {"samples": 2000, "bins": 20}
    values = {n: w.square() for n, w in quantizable(tiny).items()}
    strided = [rows.BASELINE, *rows.uniform_rows(tiny, ("fp16", "int8", "int4"))]
    kinds = [["fp16", "tensor"], ["fp16", "weight"], ["int8", "weight"]]
    for rule, share in poster.TARGET_SHARE.items():
        sizes = rows.size_table(tiny, rule, values, kinds, 200)
        int8 = sizes[sizes["format"] == "int8"]
        cuts = [rows.nearest_size(sizes, share), rows.nearest_size(int8, 0.35)]
        strided += [row for cut in cuts for row in rows.threshold_rows(rule, values, cut)]
    every = [(low, granularity) for low in ("fp16", "int8") for granularity in ("tensor", "weight")]
    strided += rows.ratio_rows(values, (*poster.RATIOS, 0.0, 0.7, 1.0), every)
    made = budget_rows.made(600, 0)
    strided.append(Row("allocate", "13 MiB", "coded", "channel", "feedback", {}, made=made))
    rules = ((r, "int3", "weight") for r in ("global", "group", "ratio"))
    for key in (("allocate", "any", "mixed"), ("uniform", "int4", "tensor"), *rules):
        strided.append(budget_rows.at_bits(*key, "feedback", 4.005, {})._replace(made=made))
    published = rows.published_rows(tiny, values, poster.RATIOS, 200)
    keys = {
        row_key(recipe(row, weights, fisher | {"seed": 0}, names), Sampling(1, steps, 0, 25))
        for steps, of_steps in ((100, strided), (1000, published))
        for row in of_steps
        for names in ((), list(quantizable(tiny)) if row.plan else ())
    }
    assert {path.name[:16] for path in files} <= keys
