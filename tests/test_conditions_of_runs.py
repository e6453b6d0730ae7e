"""Conditions of runs: from columns of data and from words, through training, sampling, evaluation and shards."""

import json
import wave as waves
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.signal import resample_poly

from tests import runs
from tests.group import together
from undiffuse import VP, Conditioned, Denoiser, EDMPrecond, Spectrum
from undiffuse.bulk import bulk, plan
from undiffuse.cond import Audio, Bytes, Depth, Encoders, Label, Layout, Picture, in_turn
from undiffuse.conditions import Conditions, unread
from undiffuse.config import Config, parse_overrides
from undiffuse.data import Data, Prepare, Subset, open_source
from undiffuse.evaluation import Choices, evaluate
from undiffuse.fit import fit
from undiffuse.model import Model, assemble
from undiffuse.nets import UNet
from undiffuse.rundata import RunData
from undiffuse.types import InputError

N, SIDE, RATE = 48, 8, 800
SOUND = {"kind": "audio", "rate": RATE, "mels": 8, "window": 128, "hop": 64, "width": 16, "depth": 1, "column": "audio"}
COND = {
    "text": {"kind": "bytes", "width": 16, "depth": 1},
    "depth": "depth",
    "mask": {"kind": "layout", "column": "segmentation"},
    "sound": SOUND,
    "style": {"kind": "variation", "size": 4, "patch": 2, "width": 16, "depth": 1},
    "low": {"kind": "picture", "column": "x"},
    "label": "label",
}


def write_wav(path, samples, rate):
    with waves.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 pictures, each with all columns; the third sample has neither depth nor sound."""
    root, g = tmp_path_factory.mktemp("all"), np.random.default_rng(0)
    lines = []
    for i in range(N):
        Image.fromarray(g.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(root / f"{i}.png")
        Image.fromarray(g.integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)).save(root / f"depth{i}.png")
        mask = g.integers(0, 4, (SIDE, SIDE)).astype(np.uint8)
        mask[0, 0] = 255
        Image.fromarray(mask).save(root / f"mask{i}.png")
        write_wav(root / f"say{i}.wav", 0.5 * np.sin(np.arange(300 + 10 * i)), RATE if i else 2 * RATE)
        Image.fromarray(g.integers(0, 256, (4, 6), np.uint8)).save(root / f"style{i}.png")
        line = {"file_name": f"{i}.png", "text": f"picture {i}", "label": "ab"[i % 2], "depth": f"depth{i}.png",
                "segmentation": f"mask{i}.png", "audio": f"say{i}.wav", "style_file_name": f"style{i}.png"}  # fmt: skip
        if i == 2:
            del line["depth"], line["audio"]
        lines.append(json.dumps(line))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def config_of(folder, out="runs/all", **more):
    layer = {
        "data": {"name": str(folder)}, "cond": COND, "out": str(out), "held_out": 8, "track": "none",
        "net": {"kind": "unet", "width": 16, "mults": [1], "patch": 2},
        "train": {"steps": 3, "batch": 6, "warmup": 1, "precision": "float32"},
        "eval": {"every": 3, "n": 4}, "sample": {"steps": 2, "rows": 4},
    }  # fmt: skip
    return Config.resolve(layer, more)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "all"
    fit(config_of(folder, out))
    return out


def same(a, b):
    """Whether two batches of conditions are equal."""
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same_read(a, b):
    return all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_columns_are_read_as_their_encoders_read_them_by_hand(folder):
    config = config_of(folder)
    data = RunData.of(config)
    assert data.conditions.encoders.encoders["mask"] == Layout(4)
    assert data.conditions.encoders.encoders["sound"] == Audio(RATE, 8, 128, 64, width=16, depth=1)
    assert data.conditions.encoders.encoders["style"].channels == 1
    assert data.classes == 2
    source = data.source
    for k in range(len(source)):
        raw = source.read(k)
        i = int(raw.columns["text"].split()[1])
        x = torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))).permute(2, 0, 1) / 127.5 - 1
        read = {name: each.tensors for name, each in data.train.cond[k : k + 1].reads.items()}
        there = {name: bool(each.there) for name, each in data.train.cond[k : k + 1].reads.items()}
        assert torch.equal(read["low"]["map"][0], x)
        words = read["text"]["bytes"][0][read["text"]["mask"][0]]
        assert [bytes((word[word > 0] - 1).tolist()).decode() for word in words] == ["picture", str(i)]
        assert read["label"]["vector"].argmax() == i % 2
        mask = torch.from_numpy(np.array(Image.open(folder / f"mask{i}.png"))).long()
        assert torch.equal(read["mask"]["map"][0].sum(0).bool(), mask != 255)
        assert torch.equal(read["mask"]["map"][0].int().argmax(0)[mask != 255], mask[mask != 255])
        assert (there["depth"], there["sound"]) == (i != 2, i != 2)
        if i != 2:
            depth = torch.from_numpy(np.array(Image.open(folder / f"depth{i}.png")).astype(np.float32)) / 65535
            assert torch.allclose(read["depth"]["map"][0, 0], 1 - 2 * depth, atol=1e-6)
            frames = 1 + ((300 + 10 * i) // (1 if i else 2)) // 64  # at half the rate half as many samples
            assert int(read["sound"]["mask"].sum()) == -(-frames // 4)


def test_batches_of_files_have_the_conditions_of_data_in_memory(folder):
    whole = RunData.of(config_of(folder))
    parts = RunData.of(config_of(folder, data={"name": str(folder), "memory_mb": 0}))
    assert whole.complete
    assert not parts.complete
    use, engine = config_of(folder).section("data"), config_of(folder).section("engine")
    ledger = folder.parent / "bad.jsonl"
    rows = [next(iter(d.feed(use, engine, 5, ledger).steps(1, 1, 7))) for d in (whole, parts)]
    assert torch.equal(rows[0].ids, rows[1].ids)
    assert torch.equal(rows[0].x, rows[1].x)
    filled = type(rows[0].cond).cat([rows[0].cond, rows[1].cond])  # sequences to one length
    assert same(filled[:7], filled[7:])


def test_batches_without_a_condition_have_it_as_null_with_the_encoder_at_work(folder):
    data = RunData.of(config_of(folder))
    feed = data.feed(config_of(folder).section("data"), config_of(folder).section("engine"), 0, folder.parent / "bad")
    batch = next(iter(RunData.of(config_of(folder, data={"name": str(folder), "memory_mb": 0})).feed(
        config_of(folder).section("data"), config_of(folder).section("engine"), 0, folder.parent / "bad"
    ).feed.steps(1, 1, 4)))  # fmt: skip
    bare = replace(batch, columns={k: v for k, v in batch.columns.items() if k not in ("text", "audio")}, labels=None)
    bare.columns["label"] = [0, None, 1, None]
    given = data.conditions(bare)
    assert set(given.reads) == set(COND)
    assert given.reads["label"].there.tolist() == [True, False, True, False]
    assert not given.reads["text"].there.any()
    assert not given.reads["sound"].there.any()
    encoders = data.conditions.fresh()
    told, null = (encoders.encoded(g, (SIDE, SIDE)) for g in (given, given.only(())))
    assert not told.tokens_mask[:, : given.reads["text"].tensors["bytes"].shape[1]].any()
    told.tokens.sum().backward()
    assert all(p.grad is not None for n, p in encoders.named_parameters() if "modules_by_name.text" in n)
    assert not null.vector.any()
    assert next(iter(feed.steps(1, 1, 4))).cond.reads.keys() == given.reads.keys()


def test_maps_and_pictures_of_the_samples_size_are_cropped_and_flipped_with_it(folder):
    source = open_source(str(folder))
    raw = source.read(0)
    whole = Prepare()(raw, 0, 0)
    prepare = Prepare(size=6, crop="random", flip=True)
    for index in range(8):
        found = prepare(raw, index, 3)
        assert found.columns["style"].shape == (1, 4, 6)  # of other proportions: as it is
        raw_same = type(raw)(raw.x, raw.label, {**raw.columns, "edges": raw.x}, raw.where)
        along = prepare(raw_same, index, 3)
        assert torch.allclose(torch.from_numpy(along.columns["edges"] / np.float32(127.5) - 1), along.x, atol=1e-6)
    assert whole.columns["edges" if "edges" in whole.columns else "style"].shape == (1, 4, 6)


def test_a_run_learns_and_keeps_its_conditions(trained, folder):
    model = Model.load(trained)
    assert set(model.encoders.encoders) == set(COND)
    assert len(model.shown_with) == 8
    data = RunData.of(config_of(folder, trained))
    assert same(model.shown_with, data.held_out.cond)
    torch.manual_seed(config_of(folder).values["seed"])
    before = dict(assemble(model.config, model.spectrum, 2, data.conditions.fresh()).denoiser.named_parameters())
    moved = {name for name, p in model.denoiser.named_parameters() if not torch.equal(p, before[name])}
    for name in ("text", "sound", "style"):
        assert any(f"modules_by_name.{name}." in parameter for parameter in moved), name
    assert (trained / "samples" / "step-000003.png").is_file()


def test_every_configured_condition_changes_the_output_of_a_trained_network(trained):
    model = Model.load(trained)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.denoiser.parameters():  # after 3 steps, zero-initialised layers say next to nothing
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    a = model.shown_with[:1]
    plain = model.sample(1, given=a, guidance=1.0)
    for name in COND:
        rows = (model.shown_with[k : k + 1] for k in range(1, 8))
        b = next(row for row in rows if not same_read(row.reads[name], a.reads[name]))
        other = type(a)({**a.reads, name: b.reads[name]}, {}, a.alone)
        assert not torch.allclose(model.sample(1, given=other, guidance=1.0), plain, atol=1e-5), name


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(trained, folder, tmp_path):
    class Stop(Exception):
        pass

    def stop(state, steps):
        if state.step == 2:
            raise Stop

    out = tmp_path / "again"
    config = config_of(folder, out, train={"every": 1})
    with pytest.raises(Stop):
        fit(config, stop)
    fit(config)
    one, other = (Model.load(path).denoiser.state_dict() for path in (trained, out))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_two_processes_of_which_one_has_no_text_do_what_one_does(tmp_path):
    (tmp_path / "data").mkdir()
    data = runs.write_told(tmp_path / "data")
    losses = runs.run_told(data, tmp_path / "one")
    assert len(losses) == runs.STEPS
    for found in together(runs.run_told, data, tmp_path / "two"):
        assert found == pytest.approx(losses, rel=1e-4)


def test_words_are_the_values_that_python_gives(trained, folder):
    model = Model.load(trained)
    words = {"text": ["a (red:1.5) car --no wheels"], "depth": [str(folder / "depth1.png")],
             "mask": [str(folder / "mask1.png")], "sound": [str(folder / "say0.wav")], "label": ["b"],
             "style": [str(folder / "style1.png"), str(folder / "style3.png")]}  # fmt: skip
    given = in_turn(model.words(words), range(3))
    depth = np.array(Image.open(folder / "depth1.png")).astype(np.float32) / 65535
    style = [np.array(Image.open(folder / f"style{k}.png"))[None] for k in (1, 3, 1)]
    mask = np.array(Image.open(folder / "mask1.png")).astype(np.int64)
    sound = 0.5 * np.sin(np.arange(300))
    sound = torch.tensor(resample_poly(np.rint(sound * 32767) / 2**15, 1, 2), dtype=torch.float32)
    by_hand = model.given(3, {"text": "a (red:1.5) car --no wheels", "depth": torch.from_numpy(depth),
                              "mask": torch.from_numpy(mask), "sound": sound, "label": "b",
                              "style": [torch.from_numpy(s) for s in style]})  # fmt: skip
    one, other = given.tensors(), by_hand.tensors()
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[k].double(), other[k].double(), atol=1e-4) for k in one)
    assert given.instead.keys() == {"text"}


def test_the_command_line_samples_what_python_samples(trained, run, folder, tmp_path):
    words = ["--text", "a red car", "--depth", str(folder / "depth1.png"), "--label", "b",
             "--given", f"mask={folder / 'mask1.png'}", "--weights", "depth=1.5,text=3"]  # fmt: skip
    assert run("sample", trained, *words, "-n", 4, "--out", tmp_path / "x.npy")[0] == 0
    model = Model.load(trained)
    mask = torch.from_numpy(np.array(Image.open(folder / "mask1.png")).astype(np.int64))
    depth = torch.from_numpy(np.array(Image.open(folder / "depth1.png")).astype(np.float32) / 65535)
    x = model.sample(4, given={"text": "a red car", "depth": depth, "mask": mask, "label": 1},
                     guidance={"depth": 1.5, "text": 3.0})  # fmt: skip
    assert np.allclose(np.load(tmp_path / "x.npy"), x.numpy(), atol=1e-5)


def test_a_text_that_is_a_files_name_stays_a_text(trained, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "red").write_text("not a prompt")
    depth = str(folder / "depth1.png")
    job = plan(Model.load(trained), trained, tmp_path / "out", words={"text": ["red"], "depth": [depth]})
    assert dict(job.words) == {"text": ("red",), "depth": (depth,)}
    assert [file for file, _ in job.files] == [depth]


def test_labels_of_another_name_are_numbers_several_with_a_plus():
    encoders = Encoders({"tags": Label(4)})
    net = Conditioned(UNet(1, width=8, mults=(1,), **encoders.widths), encoders)
    spectrum = Spectrum(torch.zeros(1), torch.ones(1), shape=(1, 1, 1))
    model = Model(Denoiser(net, EDMPrecond()), VP(), 0, spectrum, Config.resolve({}))
    given = in_turn(model.words({"tags": ["0+2", "3"]}), range(3))
    assert given.reads["tags"].tensors["vector"].tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]]
    with pytest.raises(InputError, match="'cat' is no label"):
        model.words({"tags": ["cat"]})


def test_no_more_samples_are_read_than_it_takes_to_know_the_encoders(folder):
    class Counted(Subset):
        read_ = 0

        def read(self, i):
            Counted.read_ += 1
            return super().read(i)

    source = Counted(open_source(str(folder)), range(N))
    Conditions.of(Config.resolve({"cond": {"text": COND["text"], "depth": "depth"}}), source, Prepare(), 2)
    assert Counted.read_ == 1
    Conditions.of(Config.resolve({"cond": {"mask": COND["mask"]}}), source, Prepare(), 2)
    assert Counted.read_ == 1 + N


def test_shards_have_the_samples_of_one_call_whatever_their_size(trained, folder, tmp_path):
    words = {"text": ["one", "two", "three"], "depth": [str(folder / "depth1.png")]}
    model = Model.load(trained)
    x = model.sample(7, given=in_turn(model.words(words), range(7)), guidance=2.0)
    for shard in (2, 5):
        report = bulk(trained, tmp_path / str(shard), 7, words=words, shard=shard)
        assert report.written == -(-7 // shard)
        parts = [load_file(f)["x"] for f in sorted((tmp_path / str(shard)).glob("shard-*.safetensors"))]
        assert torch.equal(torch.cat(parts), x)
    assert bulk(trained, tmp_path / "2", 7, words=words, shard=2).kept == 4
    with pytest.raises(InputError, match="other"):
        bulk(trained, tmp_path / "2", 7, words={**words, "text": ["one"]}, shard=2)


def test_auto_and_evaluation_are_for_held_out_and_training_conditions(trained, folder):
    model, data = Model.load(trained), RunData.of(config_of(folder, trained))
    assert model.auto(2, guidance=2.0, noises=2).plan.nfe <= 2
    more = Data(data.train.x[:20], None, "part", data.train.cond[:20])
    other = Data(data.train.x[20:40], None, "rest", data.train.cond[20:40])
    found = evaluate(model, more, other, Choices(likelihood=2, over_steps=(), over_w=(1.0,), features="pixels"))
    assert found.sampler["conditions"] == ", ".join(COND)
    assert found.curves["w"][0]["w"] == 1.0
    with pytest.raises(InputError, match="read without the conditions text"):
        evaluate(model, Data(more.x), Data(other.x), Choices(likelihood=0, features="pixels"))


def test_what_the_network_is_not_told_is_said(folder):
    source = open_source(str(folder))
    plain = Conditions.of(Config.resolve({}), source, Prepare(), 2)
    (note,) = unread(source, plain)
    assert "cond.text=bytes cond.depth=depth" in note
    assert "cond.label" not in note
    named = Conditions.of(Config.resolve({"cond": {"text": COND["text"]}}), source, Prepare(), 2)
    (note,) = unread(source, named)
    assert "cond.label=label" in note
    assert "cond.text" not in note


BAD = {
    "cond.text=byte": "did you mean 'bytes'",
    "cond.text.width=16": "cond.text has no kind",
    "cond=3": "cond needs settings",
    "cond.text=3": "needs an encoder",
    "cond.text=bytes cond.text.widht=16": "did you mean 'width'",
    "cond.text=bytes cond.text.near=2": "belongs to cond.text=depth",
    "cond.text=bytes cond.text.alone=2": "alone must be from 0 to 1",
    "cond.text=bytes cond.text.width=3": "cond.text: Bytes needs an even width",
    "cond.depth=depth cond.depth.near=3": "cond.depth: Depth needs finite near < far",
    "cond.text=text": "cond.text.name: field required",
    "cond.type=bytes": "which PyTorch's modules use",
    "cond.words=bytes": "no column is called 'words'",
    "cond.txt=bytes": "did you mean 'text'",
    "cond.text=depth": "reads depth, and the column 'text' of all0 has text: take cond.text=bytes",
    "cond.depth=bytes cond.depth.width=16": "reads text, and the column 'depth' of all0 has depth",
    "cond.low=picture cond.low.column=x augment=flip": "moves pictures and not the maps",
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_told_is_refused_with_what_to_do(words, folder, tmp_path):
    layer = parse_overrides(words.split())
    with pytest.raises(InputError, match=BAD[words]):
        fit(Config.resolve({**config_of(folder, tmp_path / "bad").values, "cond": {}}, layer))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a (red car"], "without its"),
        (["--given", "depht=a.png"], "did you mean 'depth'"),
        (["--image", "a.png"], "no condition 'image'"),
        (["--depth", "none.png"], "is no file"),
        (["--given", "mask"], "expected NAME=VALUE"),
        (["--text", "a", "--weights", "text"], "expected NAME=WEIGHT"),
        (["--text", "a", "--weights", "depth=2"], "no condition 'depth' was given"),
        (["--label", "c"], "no class is named 'c'"),
        (["--text", "a", "--given", "text=b"], "give all its values by one of them"),
        (["--label", "b", "--given", "label=a"], "give all its values by one of them"),
        (["--text", "a", "--weights", "text=2", "guidance.w=3"], "leave out guidance, or --weights"),
        (["settings.toml"], "--config"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message, trained, run):
    code, _, err = run("sample", trained, *words)
    assert code == 2
    assert message in " ".join(err.split())


def test_maps_that_do_not_fit_are_refused(trained, run, tmp_path):
    Image.fromarray(np.zeros((8, 4), np.uint8)).save(tmp_path / "narrow.png")
    assert run("sample", trained, "--depth", tmp_path / "narrow.png")[0] == 2
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    code, _, err = run("sample", trained, "--given", f"sound={tmp_path / 'broken.wav'}")
    assert code == 2
    assert "sound" in err


def test_configured_encoders_are_those_of_python():
    config = Config.resolve({"cond": {"text": {"kind": "bytes", "width": 32}, "far": {"kind": "depth", "far": 9.0}}})
    assert Config.resolve(config.values).values == config.values
    found = config.encoders({"far": {"dims": 3}})
    assert found.encoders == Encoders({"text": Bytes(32), "far": Depth(far=9.0, dims=3)}).encoders
    assert config.encoder("far", {"classes": 3}) == Depth(far=9.0)
    assert Config.resolve({}).encoders({}) is None
    assert Config.resolve({"cond": {"p": {"kind": "picture", "channels": 1}}}).encoder("p", {"channels": 3}) == Picture(
        1
    )


def test_maps_of_a_folder_may_be_arrays_of_numpy(tmp_path):
    g = np.random.default_rng(0)
    lines = []
    for i in range(12):
        Image.fromarray(g.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(tmp_path / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", (3 * g.random((SIDE, SIDE))).astype(np.float32))
        lines.append(json.dumps({"file_name": f"{i}.png", "depth": f"{i}.npy"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = RunData.of(plain_config(tmp_path))
    first = int(data.source.read(0).columns["depth"].stem)
    expected = 1 - 2 * torch.from_numpy(np.load(tmp_path / f"{first}.npy")) / 3
    assert torch.allclose(data.train.cond.reads["depth"].tensors["map"][0, 0], expected, atol=1e-6)


def plain_config(folder):
    return Config.resolve(
        {"data": {"name": str(folder)}, "held_out": 4, "cond": {"depth": {"kind": "depth", "far": 3.0}}}
    )


def test_different_requests_have_files_of_different_names(trained, run, tmp_path):
    names = set()
    for words in (["--text", "a"], ["--text", "a", "--text", "b"], ["--text", "a", "--weights", "text=3"]):
        code, out, _ = run("sample", trained, *words, "-n", 2, "--json")
        assert code == 0
        names.add(json.loads(out)["file"])
    assert len(names) == 3
