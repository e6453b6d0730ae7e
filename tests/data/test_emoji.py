"""The built-in set of emoji: what is drawn, what is left out, their names, and what a missing package says."""

import importlib.machinery
import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import PIL.features
import pytest

from undiffuse import InputError
from undiffuse.data import open_source
from undiffuse.data.emoji import HELD_OUT, LACKING, NOTO, drawn, glyph

HOW = "apt-get install fonts-noto-color-emoji, pip install emoji; or give the file NotoColorEmoji.ttf as path"


@pytest.fixture
def named(monkeypatch):
    """Puts another list of emoji in the place of the package's."""

    def put(table):
        module = types.ModuleType("emoji")
        module.__spec__ = importlib.machinery.ModuleSpec("emoji", None)
        module.EMOJI_DATA = {code: {"en": en, "status": status} for code, (en, status) in table.items()}
        module.STATUS = {"component": 1, "fully_qualified": 2, "minimally_qualified": 3, "unqualified": 4}
        monkeypatch.setitem(sys.modules, "emoji", module)

    return put


@pytest.fixture
def font():
    """A font that draws some symbols, and a box for what it lacks."""
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


@pytest.fixture(scope="module")
def emoji():
    pytest.importorskip("emoji", reason="needs PyPI's emoji")
    if not NOTO.is_file():
        pytest.skip("needs Debian's fonts-noto-color-emoji")
    return open_source("emoji")


def test_captions_are_the_english_names_in_the_order_of_the_code_points(named, font):
    named({"♥": (":heart_suit:", 2), "☀": (":sun:", 2), "☺": (":smiling_face_(plain):", 2)})
    source = open_source("emoji", path=font)
    assert [source.read(i).columns["text"] for i in range(3)] == ["sun", "smiling face (plain)", "heart suit"]
    assert (source.x.shape, source.x.dtype, source.labels, source.classes) == ((3, 3, 64, 64), np.uint8, None, ())
    assert len({x.tobytes() for x in source.x}) == 3
    assert (source.x[:, :, 0, 0] == 255).all()  # on white
    assert (source.x.min((1, 2, 3)) < 40).all()  # and something on it


def test_names_that_are_held_out_are_the_test(named, font):
    named({"♥": (":blue_heart:", 2), "☀": (":sun:", 2), "☺": (":tiger_face:", 2)})
    source, every = open_source("emoji", path=font), drawn(64, Path(font))
    assert every.extra["text"].tolist() == ["sun", "tiger face", "blue heart"]
    assert source.extra["text"].tolist() == ["sun"]
    assert source.test.extra["text"].tolist() == ["tiger face", "blue heart"]
    assert np.array_equal(source.x, every.x[:1])
    assert np.array_equal(source.test.x, every.x[1:])
    assert np.array_equal(source.test.extra["segmentation"], every.extra["segmentation"][1:])
    named({"☀": (":sun:", 2)})
    assert open_source("emoji", path=font).test is None


def test_small_ones_are_the_same_at_half_the_size(named, font):
    named({"♥": (":blue_heart:", 2), "☀": (":sun:", 2), "☺": (":smiling_face:", 2)})
    large, small = open_source("emoji", path=font), open_source("emoji-32", path=font)
    assert (small.name, small.x.shape, small.test.x.shape) == ("emoji-32", (2, 3, 32, 32), (1, 3, 32, 32))
    assert small.extra["segmentation"].shape == (2, 32, 32)
    assert small.extra["text"].tolist() == large.extra["text"].tolist()
    halved = large.x.reshape(2, 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(small.x - halved).mean() < 6  # of 255
    assert np.abs(small.x[::-1] - halved).mean() > 20


def test_masks_are_where_something_is_drawn(named, font):
    named({"♥": (":heart_suit:", 2), "☀": (":sun:", 2)})
    source = open_source("emoji", path=font)
    assert source.columns == ("text", "segmentation")
    mask = source.extra["segmentation"]
    assert (mask.shape, mask.dtype, set(np.unique(mask))) == ((2, 64, 64), np.uint8, {0, 1})
    dark = source.x.mean(1) < 127.5  # black on white: half black is half covered
    assert (mask == dark).mean() > 0.995
    assert 0.02 < mask.mean() < 0.9


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("☝\U0001f3fd", 2),  # a skin tone
        ("☝", 1),  # a component
        ("☝", 4),  # unqualified
        ("☺☺", 2),  # drawn as two glyphs
        ("\U0001f996", 2),  # the font has none: a box
        ("\u2003", 2),  # drawn as nothing
    ],
)
def test_what_is_not_one_glyph_of_its_own_is_left_out(named, font, code, status):
    named({"☀": (":sun:", 2), code: (":other:", status)})
    assert open_source("emoji", path=font).extra["text"].tolist() == ["sun"]
    named({code: (":other:", status)})
    with pytest.raises(InputError, match=f"emoji: {font} draws none of the emoji: {HOW}"):
        open_source("emoji", path=font)


def test_without_raqm_sequences_are_left_out(named, font, monkeypatch):
    named({"☀": (":sun:", 2), "☀\ufe0f": (":sun_in_colour:", 2)})
    if PIL.features.check("raqm"):
        assert open_source("emoji", path=font).extra["text"].tolist() == ["sun", "sun in colour"]
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    assert open_source("emoji", path=font).extra["text"].tolist() == ["sun"]


def test_missing_fonts_and_packages_are_named_with_the_commands(named, font, monkeypatch, tmp_path):
    named({"☀": (":sun:", 2)})
    monkeypatch.setattr("undiffuse.data.emoji.NOTO", tmp_path / "usual.ttf")
    for name, path in (("usual.ttf", None), ("mine.ttf", tmp_path / "mine.ttf")):
        with pytest.raises(InputError, match=f"emoji: the font {tmp_path / name} is missing: {HOW}"):
            open_source("emoji", path=path)
    (tmp_path / "mine.ttf").write_bytes(b"no font")
    with pytest.raises(InputError, match=f"mine.ttf has no bitmaps of 109 pixels .*: {HOW}"):
        open_source("emoji", path=tmp_path / "mine.ttf")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "emoji" else find(name))
    with pytest.raises(InputError, match=f"emoji: the Python package emoji is missing: {HOW}"):
        open_source("emoji", path=font)


def test_the_font_draws_nearly_all_emoji(emoji):
    from emoji import EMOJI_DATA

    plain = {e["en"] for code, e in EMOJI_DATA.items() if e["status"] == 2 and "_skin_tone" not in e["en"]}
    texts = emoji.extra["text"].tolist() + emoji.test.extra["text"].tolist()
    assert 0.9 * len(plain) < len(texts) <= len(plain)
    assert len(set(texts)) == len(texts)
    assert {"grinning face", "red heart", "France", "woman astronaut"} <= set(texts)
    assert not [text for text in texts if "skin tone" in text or "_" in text or text != text.strip(": ")]


def test_held_out_pairs_are_new_and_their_words_are_not(emoji):
    def words(texts):
        return {word for text in texts for word in re.findall(r"\w+", text.lower())}

    train = emoji.extra["text"].tolist()
    assert len(HELD_OUT) == len(set(HELD_OUT)) == 40
    assert sorted(emoji.test.extra["text"].tolist()) == sorted(HELD_OUT)
    assert not set(HELD_OUT) & set(train)
    assert words(HELD_OUT) <= words(train)
    for colour in ("red", "orange", "yellow", "green", "blue", "purple", "brown"):
        shapes = [f"{colour} {shape}" for shape in ("heart", "circle", "square")]
        assert len(set(shapes) & set(HELD_OUT)) == 1, colour  # the colour is seen in the two other shapes
        assert len(set(shapes) & set(train)) == 2, colour


def test_both_sizes_have_the_same_names(emoji):
    small = open_source("emoji-32")
    assert small.extra["text"].tolist() == emoji.extra["text"].tolist()
    assert small.test.extra["text"].tolist() == emoji.test.extra["text"].tolist()


def test_the_font_draws_in_colour(emoji):
    place = {text: i for i, text in enumerate(emoji.extra["text"].tolist())}
    for text, bright in (("red heart", 0), ("green circle", 1), ("blue square", 2)):
        middle = emoji.x[place[text], :, 28:36, 28:36].mean((1, 2))
        assert middle[bright] > np.delete(middle, bright).max() + 40, (text, middle)


def test_white_parts_of_an_emoji_belong_to_its_mask(emoji):
    place = {text: i for i, text in enumerate(emoji.extra["text"].tolist())}
    white, mask = place["white circle"], emoji.extra["segmentation"]
    assert mask[white].mean() == pytest.approx(mask[place["red circle"]].mean(), abs=0.02)
    assert mask[white, 32, 32] == 1
    assert mask[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.1  # corners are free


def test_stand_ins_of_the_font_are_left_out(emoji):
    from PIL import ImageFont

    font = ImageFont.truetype(NOTO, 109)
    drawn = [picture for code in LACKING if (picture := glyph(font, code, 64)) is not None]
    assert not any(np.array_equal(x, picture[:3]) for x in emoji.x for picture in drawn)
    assert len({x.tobytes() for x in emoji.x}) > 0.98 * len(emoji)  # some flags are equal


def test_the_set_is_the_same_each_time(emoji):
    assert open_source("emoji").fingerprint() == emoji.fingerprint()
