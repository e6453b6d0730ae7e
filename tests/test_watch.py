"""What a run measures while it trains: on exact denoisers the numbers are known."""

import json
import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from tests import runs
from undiffuse import VP, Dataset, Gaussian, Spectrum
from undiffuse.config import Config
from undiffuse.data import Data
from undiffuse.evals import copy_ratio
from undiffuse.fit import fit
from undiffuse.model import Model
from undiffuse.plot import plot_curves
from undiffuse.train import Preempted, Signals, read_log
from undiffuse.watch import Left, Watch

N = 400


def gaussian_data(n, seed):
    g = torch.Generator().manual_seed(seed)
    return Data(0.5 + torch.randn(n, 1, 2, 2, generator=g) * torch.tensor([0.1, 0.3, 0.5, 0.8]).reshape(2, 2))


def model_of(denoiser, spectrum, **more):
    return Model(denoiser, VP(), 0, spectrum, Config.resolve({"sample": {"steps": 30}}), **more)


def test_an_exact_denoiser_reaches_the_floor_and_the_linear_error():
    train, held_out = gaussian_data(N, 1), gaussian_data(N, 2)
    spectrum = Spectrum(torch.full((4,), 0.5), torch.tensor([0.1, 0.3, 0.5, 0.8]) ** 2, shape=(1, 2, 2))
    row = Watch(model_of(Gaussian(spectrum), spectrum), train, held_out, N).measure()
    assert row["n"] == N
    assert row["frechet"] < 3 * row["frechet_floor"]
    assert abs(row["kernel"]) < 3e-2
    assert 0.9 < row["nearest_ratio"] < 1.1
    for level in row["levels"]:
        assert level["mse"] == pytest.approx(level["linear"], rel=0.15)


def test_a_wrong_denoiser_is_far_from_the_floor_and_worse_than_linear():
    train, held_out = gaussian_data(N, 1), gaussian_data(N, 2)
    spectrum = Spectrum(torch.full((4,), 0.5), torch.tensor([0.1, 0.3, 0.5, 0.8]) ** 2, shape=(1, 2, 2))
    wrong = Gaussian(replace(spectrum, mean=torch.full((4,), -0.5)))
    row = Watch(model_of(wrong, spectrum), train, held_out, N).measure()
    assert row["frechet"] > 20 * row["frechet_floor"]
    assert row["frechet"] == pytest.approx(4.0, rel=0.2)  # the squared distance of the means
    assert row["levels"][0]["mse"] > 2 * row["levels"][0]["linear"]


def test_the_denoiser_of_the_training_set_itself_copies():
    train, held_out = gaussian_data(100, 1), gaussian_data(100, 2)
    spectrum = Spectrum.measure(train.x)
    row = Watch(model_of(Dataset(train.x), spectrum), train, held_out, 100).measure()
    assert row["nearest_ratio"] < 0.2


def test_copies_have_ratio_zero_and_strangers_one():
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 300, 8, generator=g)
    assert copy_ratio(a, a, b) == 0
    assert copy_ratio(c, a, b) == pytest.approx(1, abs=0.05)


def test_samples_that_are_nan_give_nan_not_an_error():
    train, held_out = gaussian_data(10, 1), gaussian_data(10, 2)
    spectrum = Spectrum.measure(train.x)
    bad = Gaussian(replace(spectrum, mean=torch.full((4,), math.nan)))
    row = Watch(model_of(bad, spectrum), train, held_out, 10).measure()
    assert math.isnan(row["frechet"])


def test_a_watch_that_is_asked_to_end_leaves():
    train, held_out = gaussian_data(10, 1), gaussian_data(10, 2)
    spectrum = Spectrum.measure(train.x)
    watch = Watch(model_of(Gaussian(spectrum), spectrum), train, held_out, 10)
    with pytest.raises(Left):
        watch.measure(lambda: 15)


def test_measurements_that_a_signal_cut_short_are_made_when_the_run_goes_on(tmp_path):
    """SIGTERM in the measurements of step 8: the state is saved, the row is missing; after going on it is there."""
    data = runs.write_pictures(tmp_path)
    runs.run(data, tmp_path / "straight")
    out, real = tmp_path / "run", Watch.measure

    def cut(self, asked):
        if len([r for r in read_log(out / "metrics.jsonl") if "eval" in r]) == 1:
            asked._note(15, None)
            raise Left
        return real(self, asked)

    with mock.patch.object(Watch, "measure", cut), pytest.raises(Preempted):
        runs.run(data, out)
    assert [r["step"] for r in read_log(out / "metrics.jsonl") if "eval" in r] == [4]
    runs.run(data, out)
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    for step in (4, 8, 12):
        name = f"samples/step-{step:06d}.png"
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert Signals()() == 0


def test_the_grid_shows_the_classes_in_columns(tmp_path):
    data = runs.write_pictures(tmp_path)
    runs.run(data, tmp_path / "run")
    picture = Image.open(tmp_path / "run/samples/step-000012.png")
    assert 1 < picture.width / picture.height < 1.6  # 3 classes: 9 columns, 7 rows


def test_data_that_are_no_pictures_are_measured_without_one(tmp_path):
    x = np.random.default_rng(0).normal(0, 0.5, (30, 2, 9)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    layer = {"data": str(tmp_path / "x.npy"), "out": str(tmp_path / "run"), "net": {"width": 16}, "track": "none"}
    fit(Config.resolve(layer, {"train": {"steps": 2, "batch": 4}, "sample": {"steps": 2}, "eval": {"n": 4}}))
    assert not (tmp_path / "run/samples").exists()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval" in row] == [2]


def test_normalised_data_are_measured_where_the_network_lives_and_written_in_their_own_range(tmp_path):
    x = np.random.default_rng(0).normal(300, 40, (60, 1, 8, 8)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    layer = {"data": {"name": str(tmp_path / "x.npy"), "normalize": "channels"}, "out": str(tmp_path / "run")}
    small = {"net": {"width": 16, "mults": [1]}, "train": {"steps": 2, "batch": 4}, "track": "none"}
    fitted = fit(Config.resolve(layer, small, {"sample": {"steps": 4}, "eval": {"n": 10}}))
    assert float(fitted.train.x.std()) == pytest.approx(0.5, abs=0.05)
    for model in (fitted.model, Model.load(tmp_path / "run")):
        drawn = model.sample(20)
        assert 200 < float(drawn.mean()) < 400
    (row,) = [r["eval"] for r in read_log(tmp_path / "run/metrics.jsonl") if "eval" in r]
    assert row["frechet"] < 1000  # in the network's range, not in that of the data, where it would be about 1e6


def test_curves_are_drawn_from_any_log(tmp_path):
    for i, rows in enumerate([
        [{"step": 1, "loss": 1.0, "grad_norm": None}],
        [{"step": s, "loss": 2.0 / s, "grad_norm": 0.1 * s} for s in range(1, 30)],
        read_log_of_a_run(tmp_path),
    ]):  # fmt: skip
        plot_curves(rows, tmp_path / f"{i}.png")
        assert Image.open(tmp_path / f"{i}.png").size == (1440, 900 if i == 2 else 480)


def read_log_of_a_run(tmp_path):
    data = runs.write_pictures(tmp_path)
    runs.run(data, tmp_path / "run")
    return read_log(tmp_path / "run/metrics.jsonl")
