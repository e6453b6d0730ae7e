"""From users' data to a trained run: every kind of data, damaged pictures, odd sizes, more processes than one."""

import io
import json
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from tests.group import together
from undiffuse import InputError
from undiffuse.config import Config
from undiffuse.fit import fit
from undiffuse.model import Model
from undiffuse.rundata import RunData
from undiffuse.train import Processes

G = np.random.default_rng(0)
N, KINDS = 24, ("cat", "dog", "owl")


def picture(i, height=12, width=12):
    """A grey ramp of its class with some noise, as PNG bytes."""
    ramp = np.linspace(0, 80, width)[None] + 60 * (i % 3) + G.integers(0, 9, (height, width))
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype("uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def classes_folder(root, sizes=((12, 12),)):
    for i in range(N):
        place = root / "pets" / KINDS[i % 3] / f"{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(i, *sizes[i % len(sizes)]))
    return root / "pets"


def metadata_folder(root):
    folder = root / "listed"
    folder.mkdir()
    rows = []
    for i in range(N):
        (folder / f"{i:02d}.png").write_bytes(picture(i))
        rows.append({"file_name": f"{i:02d}.png", "label": KINDS[i % 3], "text": f"a {KINDS[i % 3]}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arrays(root):
    x = np.stack([np.asarray(Image.open(io.BytesIO(picture(i)))) for i in range(N)])[:, None]
    np.savez(root / "x.npz", x=x, labels=np.arange(N) % 3)
    return root / "x.npz"


def tensors(root):
    with np.load(arrays(root)) as found:
        save_file({"x": found["x"], "labels": found["labels"]}, root / "x.safetensors")
    return root / "x.safetensors"


def tar_shards(root):
    folder = root / "shards"
    folder.mkdir()
    for s in range(4):
        with tarfile.open(folder / f"part-{s}.tar", "w") as tar:
            for i in range(6 * s, 6 * s + 6):
                for suffix, content in {"png": picture(i), "cls": str(i % 3).encode()}.items():
                    about = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
    return folder


def parquet(root):
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": picture(i), "path": None} for i in range(N)]
    table = pyarrow.table({"image": images, "label": [i % 3 for i in range(N)]})
    pyarrow.parquet.write_table(table, root / "x.parquet")
    return root / "x.parquet"


def config(data, out, /, **more):
    base = {
        "data": {"name": str(data), "size": 8}, "out": str(out), "net": {"width": 16, "mults": [1]}, "held_out": 4,
        "train": {"steps": 3, "batch": 4, "warmup": 0, "every": 2}, "track": "none",
        "eval": {"every": 0}, "sample": {"steps": 2},
    }  # fmt: skip
    return Config.resolve(base, more)


@pytest.mark.parametrize("make", [classes_folder, metadata_folder, arrays, tensors, tar_shards, parquet])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_kind_of_data_trains_with_its_classes(tmp_path, make, crop):
    data = make(tmp_path)
    settings = config(data, tmp_path / "run", data={"crop": crop})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*also has text")
        fitted = fit(settings)
    assert fitted.model.classes == 3
    assert fitted.model.shape == (1, 8, 8)
    model = Model.load(tmp_path / "run")
    assert model.sample(2, label=2).shape == (2, 1, 8, 8)
    about = json.loads((tmp_path / "run/data.json").read_text())
    assert about["samples"] == (18 if make is tar_shards else N - len(fitted.held_out))  # of shards, whole ones
    assert sorted(torch.unique(fitted.train.labels).tolist()) == [0, 1, 2]
    if make in (classes_folder, metadata_folder):
        assert model.names == KINDS
        assert torch.equal(model.sample(2, label="owl"), model.sample(2, label=2))
        with pytest.raises(InputError, match=r"no class is named 'cow'.*cat, dog, owl"):
            model.sample(2, label="cow")


def test_columns_that_are_not_trained_on_are_named(tmp_path):
    with pytest.warns(UserWarning, match="the network is not told the text of listed: cond.text=bytes would tell it"):
        fit(config(metadata_folder(tmp_path), tmp_path / "run"))


def test_damaged_pictures_are_listed_and_left_out_wherever_they_lie(tmp_path):
    folder = classes_folder(tmp_path)
    damaged = [folder / "cat/00.png", folder / "owl/05.png"]
    damaged[0].write_bytes(b"no picture")
    damaged[1].write_bytes(damaged[1].read_bytes()[:60])
    before = {p: p.read_bytes() for p in folder.rglob("*.png")}
    more = {"data": {"bad_share": 0.2}, "train": {"steps": 12, "batch": 4, "warmup": 0, "every": 2}}
    with pytest.warns(UserWarning, match=r"could not be read; see .*bad\.jsonl"):
        fit(config(folder, tmp_path / "run", **more))
    lines = [json.loads(line) for line in (tmp_path / "run/bad.jsonl").read_text().splitlines()]
    held_out = RunData.of(config(folder, tmp_path / "run", **more)).held_out
    assert {line["where"] for line in lines} <= {str(p) for p in damaged}
    assert len(lines) + (4 - len(held_out)) == 2
    assert all(line["reason"] for line in lines)
    assert {p: p.read_bytes() for p in folder.rglob("*.png")} == before


def test_too_many_damaged_pictures_stop_the_run(tmp_path):
    folder = classes_folder(tmp_path)
    for i in range(0, N, 2):
        (folder / KINDS[i % 3] / f"{i:02d}.png").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=r"more than data\.bad_share|in a row"):
            fit(config(folder, tmp_path / "run", train={"steps": 40, "batch": 4}))


def test_odd_sizes_train_in_buckets_of_their_aspect(tmp_path):
    folder = classes_folder(tmp_path, ((12, 12), (12, 24), (24, 12)))
    shapes = set()
    settings = config(folder, tmp_path / "run", data={"size": 16, "buckets": [0.5, 1.0, 2.0]}, train={"steps": 12})
    data = RunData.of(settings)
    for rows in data.feed(settings.section("data"), settings.section("engine"), 0, tmp_path / "bad").steps(1, 12, 4):
        shapes.add(tuple(rows.x.shape))
    assert shapes == {(4, 1, 16, 16), (4, 1, 8, 24), (4, 1, 24, 8)}
    fitted = fit(settings)
    assert fitted.model.shape == (1, 16, 16)


def test_odd_sizes_without_a_size_say_what_to_set(tmp_path):
    folder = classes_folder(tmp_path, ((12, 12), (12, 24)))
    with pytest.raises(InputError, match=r"set data\.size"):
        fit(config(folder, tmp_path / "run", data={"size": 0}))
    assert not (tmp_path / "run").exists()


def ids_of(data, out):
    seen = []
    more = {"data": {"lanes": 2, "window": 2, "crop": "random"}}
    fit(config(data, out, **more), lambda state, _: seen.append(state.ids.tolist()), processes=Processes.start("cpu"))
    return seen


def test_shards_are_seen_in_one_order_by_one_process_and_by_two(tmp_path):
    folder = tar_shards(tmp_path)
    alone = ids_of(folder, tmp_path / "alone")
    for found in together(ids_of, folder, tmp_path / "pair"):
        assert found == alone
    assert json.loads((tmp_path / "pair/data.json").read_text())["samples"] == 18  # the last shard is held out


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (G.integers(0, 256, (24, 16, 16)).astype("uint8"), "taken for signals of 16 values with 16 channels"),
        (G.uniform(0, 1, (24, 1, 8, 8)).astype("float32"), r"lie in \[.*\], not in \[-1, 1\]"),
        (G.uniform(0, 255, (24, 1, 8, 8)).astype("float32"), "far from"),
    ],
    ids=["grey", "unit", "bytes"],
)
def test_data_that_are_probably_not_what_was_meant_are_warned_of(tmp_path, x, why):
    np.save(tmp_path / "x.npy", x)
    with pytest.warns(UserWarning, match=why):
        fit(config(tmp_path / "x.npy", tmp_path / "run", data={"size": 0}))


def test_channels_that_come_last_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", G.integers(0, 256, (24, 16, 16, 3)).astype("uint8"))
    with pytest.raises(InputError, match=r"look like channels last: .*x\.transpose\(0, 3, 1, 2\)"):
        fit(config(tmp_path / "x.npy", tmp_path / "run", data={"size": 0}))


def test_channels_can_be_set(tmp_path):
    fitted = fit(config(classes_folder(tmp_path), tmp_path / "run", data={"channels": 3}))
    assert fitted.model.shape == (3, 8, 8)


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    settings = config(arrays(tmp_path), tmp_path / "run", data={"crop": "random", "normalize": "channels"})
    fitted = fit(settings)

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("undiffuse.rundata.settle", never)
    monkeypatch.setattr("undiffuse.fit.Spectrum.measure", never)
    again = fit(settings)
    assert again.model.scale == fitted.model.scale
    assert again.model.spectrum.std == pytest.approx(0.5, abs=0.1)
