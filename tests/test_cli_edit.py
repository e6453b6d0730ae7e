"""`undiffuse edit` end to end: every method on the models that come along, and every mistake."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from tests.test_cli import train_tiny
from undiffuse import InputError
from undiffuse.data import load_data
from undiffuse.edit import (
    EDITS,
    Deblur,
    ImageToImage,
    Inpaint,
    Invert,
    PromptToPrompt,
    RandomMask,
    SuperResolution,
    edit,
    psnr,
    read_mask,
    read_pictures,
)
from undiffuse.restore import RESTORERS

DIGITS, DOCS = load_data("digits"), Path(__file__).parents[1] / "docs" / "editing.md"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """What is written without --out is written here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model():
    return undiffuse.load("digits")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with an eight as a file of a picture, three digits as an array, and a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    eight = DIGITS.x[8]
    Image.fromarray(((eight[0] + 1) * 127.5).round().byte().numpy()).save(folder / "eight.png")
    np.save(folder / "three.npy", DIGITS.x[:3].numpy())
    white = np.zeros((16, 16), np.uint8)
    white[:8] = 255
    Image.fromarray(white).save(folder / "mask.png")
    return folder


def edited(run, pictures, *words, name="x.npy", of="eight.png"):
    """The facts and results of a command that works."""
    out = pictures / name
    code, text, err = run("edit", "digits", pictures / of, "--json", "--out", out, "sample.steps=5", *words)
    assert code == 0, err
    return json.loads(text), torch.from_numpy(np.load(out)) if out.suffix == ".npy" else Image.open(out)


WORDS = {
    "img2img": ["--strength", "0.5"],
    "inpaint": ["--mask", "0,0,8,4"],
    "invert": ["--class", "3"],
    "prompt": ["--class", "3"],
    "flowedit": ["--class", "3", "--from-class", "8"],
    "super-resolution": ["--factor", "2", "--measure"],
    "deblur": ["--blur", "0.7", "--measure", "--noise", "0.05"],
    "random-mask": ["--measure"],
}


def test_there_are_words_for_every_method():
    assert WORDS.keys() | {"colour"} == EDITS.keys()


@pytest.mark.parametrize("method", WORDS)
def test_every_method_works_and_says_what_it_cost(method, run, pictures):
    facts, x = edited(run, pictures, "--method", method, "-n", "2", *WORDS[method], of="three.npy")
    assert x.shape == (6, 1, 8, 8)
    assert (facts["method"], facts["pictures"], facts["results"]) == (method, 3, 6)
    assert facts["evaluations"] >= 2
    assert bool(x.isfinite().all())
    _, y = edited(run, pictures, "--method", method, "-n", "2", *WORDS[method], of="three.npy")
    assert torch.equal(x, y)
    stochastic = method in ("img2img", "inpaint", "flowedit", "super-resolution", "deblur", "random-mask")
    assert torch.equal(x[0], x[1]) != stochastic
    assert ("dB" in facts) == ("--measure" in WORDS[method])


def test_a_picture_shows_before_and_after_in_columns(run, pictures):
    words = ["--method", "inpaint", "--mask", pictures / "mask.png", "-n", "2"]
    _, image = edited(run, pictures, *words, name="x.png", of="three.npy")
    assert image.size == (4 * (112 + 4) + 4, 20 + 3 * (112 + 4) + 4)
    code, out, _ = run(
        "edit", "digits", pictures / "eight.png", "--strength", "0.3", "--strength", "0.9", "sample.steps=3"
    )
    assert code == 0
    assert "2 results" in out


def test_where_results_go_unless_it_is_said(run, pictures, tmp_path):
    for words in ([], ["--strength", "0.3"], ["sample.seed=1"]):
        assert run("edit", "digits", pictures / "eight.png", "sample.steps=2", *words)[0] == 0
    assert len(list((tmp_path / "edits" / "digits").glob("eight-img2img-*.png"))) == 3


@pytest.mark.parametrize("by", ["replacement", "repaint", *RESTORERS])
def test_known_pixels_are_unchanged_whatever_fills_in(by, run, pictures):
    _, x = edited(run, pictures, "--method", "inpaint", "--by", by, "--mask", pictures / "mask.png", name="known.npy")
    eight = read_pictures(undiffuse.load("digits"), [pictures / "eight.png"])
    assert torch.equal(x[0, :, 4:], eight[0, :, 4:])
    assert not torch.equal(x[0, :, :4], eight[0, :, :4])
    shown = ((x[0] + 1) * 127.5).round()
    assert torch.equal(shown[:, 4:], ((eight[0] + 1) * 127.5).round()[:, 4:])


def test_less_strength_changes_less(run, pictures):
    facts, x = edited(run, pictures, *(word for s in ("0.05", "0.4", "0.9") for word in ("--strength", s)))
    assert [facts[f"lam at {s}"] for s in ("0.05", "0.4", "0.9")] == pytest.approx([2.9444, 0.4055, -2.1972], abs=1e-4)
    off = (x - DIGITS.x[8]).square().flatten(1).mean(1).tolist()
    assert off == sorted(off)
    assert off[0] < 0.05


def test_conditions_are_given_in_turn_and_change_the_result(run, pictures):
    words = ["--strength", "0.9", "-n", "4", "guidance.w=3"]
    _, both = edited(run, pictures, *words, "--class", "3,0")
    _, one = edited(run, pictures, *words, "--class", "3")
    assert torch.allclose(both[::2], one[::2], atol=1e-4)
    assert not torch.allclose(both[1::2], one[1::2], atol=0.1)


def test_inversion_says_how_exact_it_is(run, pictures):
    facts, _ = edited(run, pictures, "--method", "invert", "--class", "3", "--from-class", "8", "--strength", "0.7")
    assert facts["round trip from 0.7, rms"] < 1e-3


def test_restoration_beats_what_was_measured(model):
    x = DIGITS.x[:8]
    enlarged = lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    some, small = RandomMask(share=0.5, measure=True), SuperResolution(factor=2, measure=True)
    for method, there in ((some, lambda y: y), (small, enlarged)):
        found = edit(model, x, method, steps=20)
        measured = float(psnr(there(found.before["measured"]), x).mean())
        assert found.measured["dB"] > measured + 0.5, method


def test_a_measurement_is_restored_without_the_whole(run, pictures):
    small = DIGITS.x[:2].unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    np.save(pictures / "small.npy", small.numpy())
    _, x = edited(run, pictures, "--method", "super-resolution", "--factor", "2", "sample.steps=20", of="small.npy")
    again = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert x.shape == (2, 1, 8, 8)
    assert float((again - small).square().mean().sqrt()) < 0.15


def test_prompt_keeps_attention_of_the_source_and_nothing_is_left(model):
    x, target, source = DIGITS.x[8:9], model.cond(3, 1), model.cond(8, 1)
    kept, free = (
        edit(model, x, PromptToPrompt(own=own), target=target, source=source, steps=20, guidance=1.0).results["changed"]
        for own in (1.0, 0.0)
    )
    plain = edit(model, x, Invert(), target=target, source=source, steps=20, guidance=1.0).results["changed"]
    assert torch.allclose(free, plain, atol=1e-3)
    assert not torch.allclose(kept, free, atol=1e-2)
    assert not any(module._forward_hooks for module in model.denoiser.modules())
    same = edit(model, x, PromptToPrompt(own=1.0), target=source, source=source, steps=20, guidance=1.0)
    assert float((same.results["changed"] - x).abs().max()) < 1e-3


def test_pictures_of_other_sizes_are_brought_to_the_models(model, tmp_path):
    wide = np.zeros((64, 96, 3), np.uint8)
    wide[:, 4:92] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert float(read_pictures(model, [tmp_path / "wide.png"]).min()) > 0.95


def test_masks_are_boxes_or_pictures(model, pictures):
    known = read_mask(model, "2,1,5,7")
    assert known.shape == (1, 1, 8, 8)
    assert known[0, 0, 1:7, 2:5].sum() == 0
    assert known.sum() == 64 - 18
    half = read_mask(model, str(pictures / "mask.png"))
    assert half[0, 0].tolist() == [[0.0] * 8] * 4 + [[1.0] * 8] * 4


MISTAKES = {
    "no picture": (["sample.steps=5"], "no picture was given"),
    "missing file": (["nothing.png"], "'nothing.png' is no file; expected a picture"),
    "unknown method": (["EIGHT", "--method", "inpant"], "no method is called 'inpant': did you mean 'inpaint'?"),
    "another's option": (["EIGHT", "--factor", "4"], "--factor is for super-resolution; --method img2img takes"),
    "no mask": (["EIGHT", "--method", "inpaint"], "inpaint needs --mask"),
    "bad box": (["EIGHT", "--method", "inpaint", "--mask", "4,4,20,20"], "must lie in 0,0,8,8"),
    "empty box": (["EIGHT", "--method", "inpaint", "--mask", "4,4,4,8"], "not be empty"),
    "no such mask": (["EIGHT", "--method", "inpaint", "--mask", "m.png"], "is no file and no box"),
    "unknown way": (["EIGHT", "--method", "inpaint", "--mask", "0,0,4,4", "--by", "repant"], "did you mean 'repaint'?"),
    "no such restorer": (["EIGHT", "--method", "deblur", "--by", "net"], "there are mmps"),
    "noise in what is replaced": (
        ["EIGHT", "--method", "inpaint", "--mask", "0,0,4,4", "--by", "repaint", "--noise", "0.1"], "without noise"),
    "not trained to fill in": (
        ["EIGHT", "--method", "inpaint", "--mask", "0,0,4,4", "--by", "net"], "trained to fill in"),
    "strength": (["EIGHT", "--strength", "1.2"], "strength must be above 0"),
    "no target": (["EIGHT", "--method", "invert"], "needs a target condition"),
    "source of no use": (["EIGHT", "--from-class", "3"], "are for invert, prompt, flowedit"),
    "unknown class": (["EIGHT", "--class", "ten"], "no class is named 'ten'"),
    "no such condition": (["EIGHT", "--text", "a three"], "this model knows classes only"),
    "not small": (["EIGHT", "--method", "super-resolution", "--factor", "2"], "8x8 in 1 channels; expected 4x4"),
    "no divisor": (["EIGHT", "--method", "super-resolution", "--factor", "3", "--measure"], "factor 3 must"),
    "grey": (["EIGHT", "--method", "colour"], "colour needs a model of 3 channels"),
    "blur": (["EIGHT", "--method", "deblur", "--blur", "0"], "Blur: std must be > 0"),
    "share": (["EIGHT", "--method", "prompt", "--class", "3", "--own", "2"], "own must be a share"),
    "number": (["EIGHT", "-n", "0"], "must be"),
    "kind of file": (["EIGHT", "--out", "x.gif"], "results are written as .png"),
    "setting": (["EIGHT", "solvr=ddim"], "did you mean"),
    "array": (["FLAT"], "has an array (5,)"),
    "nan": (["NAN"], "NaN or infinite"),
    "no picture at all": (["TEXT"], "not a picture of a known format"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, run, pictures):
    words, message = MISTAKES[mistake]
    np.save(pictures / "flat.npy", np.zeros(5, np.float32))
    np.save(pictures / "nan.npy", np.full((1, 8, 8), np.nan, np.float32))
    (pictures / "text.png").write_text("no picture")
    files = {"EIGHT": "eight.png", "FLAT": "flat.npy", "NAN": "nan.npy", "TEXT": "text.png"}
    code, out, err = run("edit", "digits", *(pictures / files[w] if w in files else w for w in words))
    assert code == 2, (out, err)
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_what_a_function_refuses(model):
    x = DIGITS.x[:2]
    for call, message in (
        (lambda: edit(model, x, ImageToImage(), target=model.cond(3, 1)), "1 rows, 2 were expected"),
        (lambda: edit(model, torch.zeros(2, 3, 8, 8), ImageToImage()), "pictures of shape"),
        (lambda: edit(model, x, Deblur(by="nothing")), "there are mmps"),
        (lambda: Inpaint(torch.ones(1, 1, 8, 8), by="nothing"), "there are replacement"),
    ):
        with pytest.raises(InputError, match=message):
            call()


COMMANDS = re.findall(r"^undiffuse edit fashion (.*)$", DOCS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_pages_commands_are_understood(words, run, pictures, monkeypatch):
    np.save(pictures / "clothes.npy", np.zeros((1, 1, 28, 28), np.float32))
    np.save(pictures / "shoes.npy", np.zeros((1, 1, 28, 28), np.float32))
    monkeypatch.chdir(pictures)
    code, out, err = run("edit", "fashion", *shlex.split(words, comments=True), "--dry-run")
    assert code == 0, err
    assert "[sample]" in out


def test_the_page_has_every_method_and_way():
    assert len(COMMANDS) >= len(EDITS)
    assert all(f"`{name}`" in DOCS.read_text() for name in (*EDITS, *RESTORERS))


def test_dry_run_prints_the_configuration(run, pictures):
    code, out, _ = run("edit", "digits", pictures / "eight.png", "--dry-run", "sample.steps=7", "--json")
    assert code == 0
    assert json.loads(out)["sample"]["steps"] == 7


def test_a_network_that_was_trained_to_fill_in(run, tmp_path, pictures):
    """`cond.x=masked` on the samples themselves, then `--by net`, besides another condition."""
    out = train_tiny(tmp_path / "masked", "cond.x=masked", "cond.label=label")
    model = undiffuse.load(out)
    assert model.encoders.widths["spatial"] == 2
    words = ["--method", "inpaint", "--by", "net", "--mask", "2,2,6,6", "--class", "3", "-n", "2", "--json"]
    code, text, err = run("edit", out, pictures / "eight.png", *words, "--out", tmp_path / "x.npy", "sample.steps=3")
    assert code == 0, err
    assert json.loads(text.splitlines()[-1])["evaluations"] == 3
    x, eight = torch.from_numpy(np.load(tmp_path / "x.npy")), read_pictures(model, [pictures / "eight.png"])
    known = read_mask(model, "2,2,6,6").expand(2, 1, 8, 8) == 1
    assert torch.equal(x[known], eight.expand(2, 1, 8, 8)[known])
    assert not torch.equal(x[0], x[1])


def test_prompts_that_differ_by_a_word(run, tmp_path):
    """`--method prompt` with text, whose tokens must be as many, and `--text` for image to image."""
    words = np.array([f"a {'dark' if k % 2 else 'light'} number {k}" for k in DIGITS.labels.tolist()])
    np.savez(tmp_path / "told.npz", x=DIGITS.x.numpy(), text=words)
    out = train_tiny(tmp_path / "told", f"data={tmp_path / 'told.npz'}", "cond.text=bytes", "held_out=64")
    np.save(tmp_path / "x.npy", DIGITS.x[:2].numpy())
    how = ["edit", out, tmp_path / "x.npy", "--method", "prompt", "--out", tmp_path / "y.npy", "sample.steps=5"]
    how += ["--text", "a dark number 3", "guidance.w=3"]
    code, _, err = run(*how, "--from-text", "a light number 8")
    assert code == 0, err
    same, _, _ = run(*how, "--from-text", "a dark number 3", "guidance.w=1", "sample.steps=20")
    assert same == 0
    assert float(np.abs(np.load(tmp_path / "y.npy") - DIGITS.x[:2].numpy()).max()) < 1e-2
    code, _, err = run(*how, "--from-text", "a number 8")
    assert code == 2
    assert "prompts of the same number of tokens, got 3 and 4" in err
    code, _, err = run("edit", out, tmp_path / "x.npy", "--text", "a dark number 3", "--out", tmp_path / "y.png")
    assert code == 0, err


def test_guidance_without_a_condition_and_the_edited_file_are_refused(run, tmp_path):
    x = undiffuse.load("digits").sample(2, label=[3, 8], steps=3).numpy()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "none.npy", x[:0])
    np.save(tmp_path / "words.npy", np.array(["abc"]))
    few = ["sample.steps=2"]
    for words, said in (
        (["x.npy", "guidance.w=3", *few], "needs a condition"),
        (["x.npy", "guidance=apg", *few], "needs a condition"),
        (["x.npy", "guidance=classifier", *few], "guidance.run"),
        (["x.npy", "--out", "x.npy", *few], "is the picture that is edited"),
        (["none.npy", *few], "expected numbers"),
        (["words.npy", *few], "expected numbers"),
        (["x.npy", "--method", "inpaint", "--mask", "0,0,4,4", "--times", "3", *few], "--by repaint"),
        (["x.npy", "--method", "super-resolution", "--factor", "2", *few], "--measure"),
    ):
        place = [str(tmp_path / word) if word.endswith(".npy") else word for word in words]
        code, _, err = run("edit", "digits", *place)
        assert (code, said in err) == (2, True), (words, err)
    assert np.array_equal(np.load(tmp_path / "x.npy"), x)


def test_too_many_results_are_told(run, tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", undiffuse.load("digits").sample(1, label=3, steps=2).numpy())

    def full(*given, **settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("undiffuse.cli.edit_pictures", full)
    code, _, err = run("edit", "digits", tmp_path / "x.npy")
    assert (code, "do not fit in memory" in err) == (2, True), err
