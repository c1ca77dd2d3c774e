import json
import shutil

import numpy as np
import pandas as pd
import pytest

from lafq.study import results, workspace
from lafq.study import rows as study_rows
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.unet import quantizable
from lafq.study.images import evaluate as evaluation
from lafq.study.images import sampling
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import BASELINE, recipe
from lafq.study.workspace import Workspace, kind_of_machine

SMOKE = Workspace("smoke")
KEEPING = Workspace("smoke", keep=True)
DRAW = Sampling(images=5, steps=2, seed=0, batch=2)
FISHER = {"samples": 2000, "bins": 20, "seed": 0}
KEYS = ["b1626986", "3b891e63", "3bff8c81", "50591c71", "3b891e63", "3fe5562a", "a462c10e"]


@pytest.fixture
def rows(tiny, sandbox, monkeypatch):
    fisher = {n: w.square() for n, w in quantizable(tiny).items()}
    subject.save_fisher(SMOKE, fisher, 4, **FISHER)
    sizes = study_rows.size_sweep(tiny, fisher, "int8", "weight", 20)
    swept = study_rows.threshold_rows("global", fisher, study_rows.nearest_size(sizes, 0.5))
    return [
        *study_rows.uniform_rows(tiny),
        *swept,
        *study_rows.ratio_rows(fisher, [0.35], [("int8", "tensor")]),
        *study_rows.ratio_rows(fisher, [0.0, 0.35, 1.0]),
    ]


def evaluate(tiny, rows):
    return evaluation.evaluate(KEEPING, tiny, rows, DRAW)


def files():
    return sorted(ImageStore(SMOKE).folder.iterdir())


def test_keys_are_what_they_were(tiny, rows):
    """Images of the paper profile are found by these keys: a change loses hours of sampling."""
    provenances = [recipe(row, "0" * 64, FISHER, quantizable(tiny)) for row in rows]
    assert provenances[2] == {
        "weights": "0" * 64,
        "rule": "global",
        "threshold": "nearest to 0.5000 of FP32 of 21 cuts",
        "format": "int8",
        "granularity": "weight",
        "rounding": "nearest code, scale of the largest weight",
        "kept": "fp32",
        "fisher": {"kind": "empirical", "samples": 2000, "bins": 20, "seed": 0},
    }
    draw = Sampling(100, steps=100, seed=0, batch=25)
    keys = [sampling.row_key(provenance, draw) for provenance in provenances]
    assert [key[:8] for key in keys] == KEYS
    other = [Sampling(100, *draw) for draw in ((1000, 0, 25), (100, 1, 25), (100, 0, 50))]
    assert len({sampling.row_key(provenances[0], draw) for draw in other} | {keys[0]}) == 4


def test_a_plan_that_treats_all_weights_alike_is_the_uniform_row_or_the_baseline(tiny, rows):
    uniform, *ratios = (recipe(row, "w", FISHER, quantizable(tiny)) for row in (rows[1], *rows[3:]))
    ratio = {row.setting: words for row, words in zip(rows[3:], ratios, strict=True)}
    assert ratio["0.00"] == uniform
    assert ratio["1.00"]["rule"] == "baseline"
    assert ratio["0.35"]["rule"] == "ratio"


def test_images_are_kept_in_batches_and_found_again(tiny, rows, monkeypatch):
    table, images = evaluate(tiny, rows[1:3])
    batches = ("_00000-00001.npz", "_00002-00003.npz", "_00004-00004.npz")
    assert all(path.name[16:] in batches for path in files())
    key = table["sample"][0]
    assert np.array_equal(images[key], ImageStore(SMOKE).images(key, 5))
    by_weights, same = evaluation.evaluate(SMOKE, tiny, rows[1:3], DRAW)
    pd.testing.assert_frame_equal(table.drop(columns="sample"), by_weights.drop(columns="sample"))
    for a, b in zip(table["sample"], by_weights["sample"], strict=True):
        assert np.array_equal(images[a], same[b])
    monkeypatch.setattr(sampling, "sample", None)
    pd.testing.assert_frame_equal(table, evaluate(tiny, rows[1:3])[0])
    with pytest.raises(FileNotFoundError, match=r"6 images of row .* are needed, .* has 5: `make"):
        ImageStore(SMOKE).images(key, 6)


def drawn(tiny, recipe, **changes):
    """A table of one row, and its images, as `evaluate` gives them."""
    draw = DRAW._replace(**changes)
    row = ImageStore(KEEPING if recipe else SMOKE).draw(tiny, draw, recipe=recipe)
    table = pd.DataFrame([{"sample": row.key, "n_images": draw.images, "steps": draw.steps}])
    return table, {row.key: row.images[:, 0].numpy()}


def test_where_images_go_is_for_the_profile_to_say(tiny, sandbox):
    """KEEP=False beside a folder of kept images: the images go to the npz file, and come from
    there.
    """
    for work, words in ((KEEPING, {"rule": "x"}), (SMOKE, None), (KEEPING, {"rule": "x"})):
        table, images = drawn(tiny, words)
        results.save_rows(work, "x", table, images)
        assert (SMOKE.results / "x.npz").is_file() == (not work.keep)
        again, found = results.load_rows(work, "x")
        pd.testing.assert_frame_equal(again, table)
        assert all(np.array_equal(images[key], found[key]) for key in images)


def test_a_baseline_of_other_sampling_is_refused(tiny, sandbox):
    for name, steps in (("01_baseline", 2), ("same", 2), ("other", 3)):
        results.save_rows(SMOKE, name, *drawn(tiny, None, steps=steps))
    assert len(results.load_rows(SMOKE, "same", with_baseline=True)[0]) == 2
    with pytest.raises(ValueError, match="01_baseline has steps 2, other has 3: run 01_train"):
        results.load_rows(SMOKE, "other", with_baseline=True)


def test_files_that_begin_with_the_same_image_are_not_read_twice(tiny, sandbox):
    longer = {
        n: ImageStore(KEEPING).draw(tiny, DRAW._replace(images=n), recipe={"rule": "x"})
        for n in (3, 5)
    }
    key = longer[5].key
    assert key == longer[3].key
    names = [path.name[16:] for path in files()]
    assert names == ["_00000-00001.npz", "_00002-00002.npz", "_00002-00003.npz", "_00004-00004.npz"]
    assert np.array_equal(ImageStore(SMOKE).images(key, 5), longer[5].images[:, 0].numpy())


def test_another_batch_size_draws_anew(tiny, sandbox):
    """Without KEEP the key does not name the batch, and the last bits depend on it."""
    for batch in (2, 5):
        assert len(ImageStore(SMOKE).draw(tiny, DRAW._replace(batch=batch)).images) == 5
    assert sorted(path.name for path in (SMOKE.build / "samples").iterdir()) == [
        "batch-2",
        "batch-5",
    ]


def test_an_interrupted_row_goes_on_in_another_clone_with_the_same_bytes(
    tiny, sandbox, monkeypatch
):
    def draw(folder):
        monkeypatch.setattr(workspace, "RESULTS", folder)
        images = ImageStore(KEEPING).draw(tiny, DRAW, recipe={"rule": "x"}).images
        return images, {path.name: path.read_bytes() for path in files()}

    def interrupted(*args, first, **kwargs):
        if first == 4:
            raise KeyboardInterrupt
        return sample(*args, first=first, **kwargs)

    whole, content = draw(sandbox / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sampling, "sample", interrupted)
        draw(sandbox / "first")
    shutil.copytree(sandbox / "first", sandbox / "clone")
    finished = files()
    resumed, again = draw(sandbox / "clone")
    assert len(finished) == 2 and again == content
    assert np.array_equal(whole, resumed)


def rewrite(path, **changes):
    with np.load(path) as file:
        images, record = file["images"], json.loads(str(file["record"]))
    images = changes.pop("images", images)
    np.savez_compressed(path, images=images, record=np.array(json.dumps(record | changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "is damaged"),
        ({"images": np.zeros((2, 1, 32, 32), np.uint8)}, "its images are not those recorded"),
        ({"seed": 1}, "holds the images of another row"),
    ],
    ids=["cut", "other images", "other draw"],
)
def test_a_bad_file_is_one_sentence_and_once_deleted_is_drawn_anew(tiny, sandbox, changes, message):
    def draw():
        return ImageStore(KEEPING).draw(tiny, DRAW, recipe={"rule": "x"}).images

    images = draw()
    before = {path: path.read_bytes() for path in files()}
    bad = files()[0]
    if changes:
        rewrite(bad, **changes)
    else:
        bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{bad.name} .*{message}.* delete it, and the next run"):
        draw()
    bad.unlink()
    assert np.array_equal(draw(), images)
    assert {path: path.read_bytes() for path in files()} == before


@pytest.mark.parametrize("machine", ["another processor", kind_of_machine()])
def test_weights_of_flipped_masks_find_their_images_and_the_row_says_so(tiny, rows, machine):
    table, _ = evaluate(tiny, rows[2:3])
    assert table["same_machine"].all()
    for path in files():
        if path.name.startswith(table["sample"][0]):
            rewrite(path, drawn_from="0" * 64, machine=machine)
    again, _ = evaluate(tiny, rows[2:3])
    assert (again["same_machine"] == (machine == kind_of_machine())).all()
    pd.testing.assert_frame_equal(
        table.drop(columns="same_machine"), again.drop(columns="same_machine")
    )


def test_images_are_counted_once_by_how_they_came(tiny, sandbox):
    store, row = ImageStore(KEEPING), BASELINE
    recipe = evaluation.recipes(KEEPING, tiny, [row])[0]
    assert store.counts() == {"drawn": 0, "taken": 0, "compared": 0}
    for _ in range(2):
        store.draw(tiny, DRAW, recipe=recipe)
    assert store.counts() == {"drawn": DRAW.images, "taken": 0, "compared": 0}
    (KEEPING.build / sampling.COUNTED).unlink()
    store.draw(tiny, DRAW, recipe=recipe)
    table = evaluation.redraw(KEEPING, tiny, [row], DRAW)
    compared = min(DRAW.batch, evaluation.REDRAWN)
    assert store.counts() == {"drawn": 0, "taken": DRAW.images, "compared": compared}
    assert table["grey_levels"].tolist() == [0] and table["within"].all()


def test_a_full_disk_loses_nothing(tiny, rows, monkeypatch):
    write, calls = np.savez_compressed, []

    def full_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(np, "savez_compressed", full_at_the_second)
    with pytest.raises(OSError, match=r"No space left on device.*make room"):
        evaluate(tiny, rows[:1])
    assert len(files()) == 1
    table, _ = evaluate(tiny, rows[:1])
    assert len(calls) == 7  # two rows of three files, one of them twice
    assert len(table) == 1


def test_the_spread_of_fid_takes_the_baselines_kept_images(tiny, sandbox, monkeypatch):
    table, _ = evaluation.evaluate(KEEPING, tiny, [BASELINE], Sampling(8, 2, 0, 2))
    assert len(table) == 1 and len(files()) == 4
    monkeypatch.setattr(sampling, "sample", None)
    assert len(evaluation.quality(KEEPING, tiny, Sampling(8, 2, 0, 2), 4)) == 3
