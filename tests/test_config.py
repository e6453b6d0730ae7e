"""Configuration: completeness, errors that name the key and the nearest valid one."""

import tomllib

import pytest

from undiffuse import DDIM, Adams, EDMPrecond, InputError, Karras
from undiffuse.config import DEFAULTS, KINDS, Config, DataConfig, fields, parse_overrides


def resolve(*words):
    return Config.resolve(parse_overrides(words))


def test_toml_rebuilds_the_configuration():
    config = resolve("solver=adams", "solver.order=3", "net.mults=[1, 2]", "seed=7", "head.sigma_data=0.7")
    again = Config.resolve(tomllib.loads(config.toml()))
    assert again.values == config.values
    assert Config.resolve(tomllib.loads(again.toml())).values == config.values


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_every_family_builds_from_its_defaults(family):
    for name, kind in KINDS[family].items():
        given = {key: _example(key) for key, (_, default) in fields(kind).items() if default is ...}
        config = Config.resolve({family: {"kind": name, **given}})
        extra = {"channels": 1, "vector": 3} if family == "net" else {}
        assert config.build(family, **extra) is not None


def _example(key):
    return {"lams": [-1.0, 0.0, 2.0]}[key]


def test_a_word_is_short_for_a_kind_and_changing_the_kind_forgets_its_settings():
    config = resolve("solver=adams", "solver.order=4", "solver.corrector=true")
    assert config.build("solver") == Adams(4, corrector=True)
    assert Config.resolve(config.values, parse_overrides(["solver=ddim"])).build("solver") == DDIM()
    assert Config.resolve(config.values, parse_overrides(["solver.order=2"])).build("solver") == Adams(
        2, corrector=True
    )
    assert resolve("grid=karras", "grid.rho=5").build("grid") == Karras(rho=5.0)


def test_the_name_of_the_data_is_short_for_its_settings_in_any_order():
    for words in (["data=x.npy", "data.size=32"], ["data.size=32", "data=x.npy"], ["data.name=x.npy", "data.size=32"]):
        assert resolve(*words).section("data") == DataConfig("x.npy", size=32)
    assert Config.resolve({"data": "x.npy"}, {"data": {"size": 32}}).section("data") == DataConfig("x.npy", size=32)
    assert resolve("data.size=64", "data.buckets=[0.75, 1, 1.33]").section("data").buckets == (0.75, 1.0, 1.33)


def test_the_batch_is_a_number_or_auto():
    assert resolve("train.batch=auto").section("train").batch == "auto"
    assert resolve("train.batch=auto").measured(0.7, 100, 128).section("train").batch == 128
    for wrong in ("many", "1.5", "0"):
        with pytest.raises(InputError, match=r"train\.batch"):
            resolve(f"train.batch={wrong}")


def test_the_heads_sigma_data_is_measured_unless_stated():
    assert resolve().measured(0.7, 100, 64).build("head") == EDMPrecond(0.7)
    assert resolve("head.sigma_data=0.3").measured(0.7, 100, 64).build("head") == EDMPrecond(0.3)
    assert "sigma_data" not in resolve("head=v").measured(0.7, 100, 64).values["head"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sovler=ddim"], "unknown key 'sovler': did you mean 'solver'"),
        (["solver=dmpp-2m"], "unknown solver 'dmpp-2m': did you mean 'dpmpp-2m'"),
        (["solver=ddim", "solver.etta=1"], "unknown key solver.etta: did you mean 'eta'"),
        (["solver.order=3"], "unknown key solver.order"),
        (["net.widht=3"], "did you mean 'width'"),
        (["data.sise=3"], "unknown key data.sise: did you mean 'size'"),
        (["data.buckets=[1.0]"], "data.buckets.*data.size besides"),
        (["data.channels=2"], "data.channels"),
        (["data="], "data.name"),
        (["engine.device=tpu"], "engine.device"),
        (["engine.sharding=zero"], "engine.sharding"),
        (["engine.micro=-1"], "engine.micro"),
        (["train.precision=int4"], "train.precision"),
        (["train.lr=inf"], "train.lr.*above 0"),
        (["train.steps=0"], "train.steps = 0 is out of range: at least 1"),
        (["track=tensorbord"], "track='tensorbord' is not known: did you mean 'tensorboard'"),
        (["seed=99999999999999999999"], "seed must be a 64-bit number"),
        (["eval.n=1"], "eval.n must be >= 2"),
        (["eval.every=-1"], "eval.every"),
        (["net.channels=3"], "net.channels follows from the data"),
        (["net.width=wide"], "net.width: .*integer.*got 'wide'"),
        (["net.mults=[1, x]"], "net.mults"),
        (["train.steps=0"], "train.steps = 0 is out of range"),
        (["train.lr=-1"], "train.lr"),
        (["train.lr=1e300"], "train.lr = 1e.300 is out of range: above 0 and at most 1e30"),
        (["train.steps=10", "train.snapshots=11"], "train.snapshots = 11 is out of range: from 0 to train.steps"),
        (["net.mults=0"], "net.mults is a list, such as .1, 2.; got 0"),
        (["optimiser.betas=[0.9]"], "optimiser.betas is a list, such as .0.9, 0.999.; got .0.9."),
        (["ema=classic", "ema.length=0.1"], "key ema.length: it belongs to ema=power, and ema=classic takes decay"),
        (["train=5"], "train needs settings"),
        (["sample.steps=0"], "sample.steps must be >= 1"),
        (["seed=x"], "seed must be a whole number, got 'x'"),
        (["guidance.w=nan"], "finite number"),
        (["schedule=vp", "schedule.beta_min=30"], "beta_min < beta_max"),
        (["held_out=1"], "held_out must be >= 2 samples, got 1"),
        (["net"], "'net' is not an override"),
        (["=3"], "not an override"),
        (["solver=ddim", "solver.eta.x=1"], "solver.eta"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(InputError, match=message):
        resolve(*words)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Config.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(InputError, match="not valid TOML"):
        Config.read(tmp_path / "bad.toml")


def test_defaults_are_not_changed_by_use():
    before = repr(DEFAULTS)
    resolve("net.width=96", "solver=adams")
    assert repr(DEFAULTS) == before


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in KINDS for kind in KINDS[family]])
def test_every_kind_can_be_configured_by_name(family, kind):
    """Its settings are found, complete and rebuilt, whatever module they are inherited from."""
    given = {"kind": kind, **({"lams": [-1.0, 1.0]} if kind == "explicit" else {})}
    values = Config.resolve({family: given}).values[family]
    assert values["kind"] == kind
    assert Config.resolve({family: values}).values[family] == values
