"""Preparation: colours, sizes, crops and flips; what they depend on; statistics."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse import InputError
from undiffuse.data import Prepare, Raw, Statistics, Unreadable, from_data, measure, settle
from undiffuse.data.data import Data
from undiffuse.data.picture import decode, with_channels
from undiffuse.data.source import Arrays, Cached
from undiffuse.data.statistics import LIMIT

from .helpers import coded, pixels


def one(raw, **options):
    return Prepare(**options)(raw, 0, 0)


def coordinates(height, width):
    """A picture whose red is its column and whose green its row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], 2).astype(np.uint8)


# ---------------------------------------------------------------- ranges and colours


def test_whole_numbers_map_to_the_unit_range_and_floats_stay():
    eight, sixteen = np.arange(256, dtype=np.uint8), np.arange(0, 65536, 255, dtype=np.uint16)
    assert torch.equal(one(Raw(eight[None, None])).x[0, 0], torch.arange(256).float() / 127.5 - 1)
    assert torch.allclose(one(Raw(sixteen[None, None])).x[0, 0], torch.linspace(-1, 1, 258), atol=1e-6)
    floats = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float64)
    assert np.array_equal(one(Raw(floats)).x.numpy(), floats.astype(np.float32))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(decode(coded(pixels(), format, **options), "x"), pixels().transpose(2, 0, 1))


def test_gray_pictures_of_every_kind():
    gray = pixels(channels=1)
    assert np.array_equal(decode(coded(gray), "x"), gray[None])
    assert decode(coded(Image.fromarray(gray > 127)), "x").tolist() == ((gray > 127) * 255)[None].tolist()
    deep = (pixels(1, channels=1).astype(np.uint16) << 8) + 7
    for format in ("PNG", "TIFF"):
        found = decode(coded(deep, format), "x")
        assert found.dtype == np.uint16
        assert np.array_equal(found[0], deep)
    floats = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    assert np.array_equal(decode(coded(floats, "TIFF"), "x")[0], floats)
    with pytest.raises(Unreadable, match="32-bit whole-number"):
        decode(coded(np.full((4, 4), 70000, np.int32), "TIFF"), "x")


def test_palettes_become_colours_or_stay_indices():
    image = Image.fromarray(pixels(channels=1) % 3, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    for format in ("PNG", "GIF"):
        assert np.array_equal(decode(coded(image, format), "x"), table[pixels(channels=1) % 3].transpose(2, 0, 1))
    assert np.array_equal(decode(coded(image), "x", indices=True)[0], pixels(channels=1) % 3)
    clear = decode(coded(image, "PNG", transparency=1), "x")
    assert clear.shape[0] == 4
    assert np.array_equal(clear[3] == 0, pixels(channels=1) % 3 == 1)


def test_cmyk_becomes_the_colours_that_pillow_shows():
    image = Image.fromarray(np.full((8, 8, 3), (200, 40, 90), np.uint8)).convert("CMYK")
    found = decode(coded(image, "JPEG", quality=100), "x")
    assert found.shape == (3, 8, 8)
    assert np.abs(found[:, 4, 4].astype(int) - (200, 40, 90)).max() <= 8


def test_alpha_is_laid_on_white_or_kept():
    rgba = pixels(channels=4)
    rgba[0, 0], rgba[0, 1], rgba[0, 2] = (9, 8, 7, 0), (9, 8, 7, 255), (0, 100, 200, 51)
    x = decode(coded(rgba), "x")
    assert np.array_equal(x, rgba.transpose(2, 0, 1))
    laid = with_channels(x, 3, "x")
    assert laid[:, 0, :3].T.tolist() == [[255, 255, 255], [9, 8, 7], [204, 224, 244]]
    gray_alpha = decode(coded(Image.fromarray(pixels(channels=1)).convert("LA")), "x")
    assert gray_alpha.shape[0] == 4
    assert np.array_equal(with_channels(gray_alpha, 1, "x")[0], pixels(channels=1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_channels_there_and_back(dtype):
    gray = (pixels(channels=1)[None] / 255 * {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]).astype(dtype)
    for channels in (3, 4):
        wide = with_channels(gray, channels, "x")
        assert (wide.dtype, len(wide)) == (gray.dtype, channels)
        assert np.allclose(with_channels(wide, 1, "x"), gray, atol=1e-6)
    colour = pixels().transpose(2, 0, 1)
    expected = np.asarray(Image.fromarray(pixels()).convert("L")).astype(int)
    assert np.abs(with_channels(colour, 1, "x")[0].astype(int) - expected).max() <= 1
    with pytest.raises(Unreadable, match="2 channels cannot become 3"):
        with_channels(np.zeros((2, 4, 4), np.uint8), 3, "x")


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.fromarray(np.full((6, 6, 3), v, np.uint8)) for v in (10, 200)]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        found = decode(coded(frames[0], format, save_all=True, append_images=frames[1:], **options), "x")
        assert np.abs(found[:3].astype(int) - 10).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    shown = coordinates(6, 10)
    stored = {  # what a camera held that way writes
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.swapaxes(0, 1),
        6: np.rot90(shown, 1),
        7: shown[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = coded(np.ascontiguousarray(stored), "PNG", exif=exif)
    found = decode(data, "x")
    assert found.shape == (3, 6, 10)
    assert np.array_equal(found, shown.transpose(2, 0, 1))
    wide = Prepare(size=8, buckets=(0.5, 2.0), multiple=1)
    assert wide.decode(Raw(data)).target == (6, 11)


# ---------------------------------------------------------------- sizes, crops, flips


@pytest.mark.parametrize(("height", "width"), [(20, 31), (31, 20), (16, 16), (5, 9), (100, 17)])
def test_every_picture_gets_the_size(height, width):
    for x in (pixels(0, height, width), pixels(0, height, width, 1)):
        assert one(Raw(coded(x)), size=16).x.shape[1:] == (16, 16)


def test_pictures_too_long_to_be_resized_are_unreadable():
    with pytest.raises(Unreadable, match="100000 x 3 pixels: more than 32 times"):
        one(Raw(coded(np.zeros((3, 100_000), np.uint8))), size=512)
    assert one(Raw(coded(np.zeros((3, 96), np.uint8))), size=8).x.shape == (1, 8, 8)


def test_the_centre_is_kept():
    x = one(Raw(coded(coordinates(16, 36))), size=16).x
    found = ((x + 1) * 127.5).round()
    assert found[0, 0].tolist() == list(range(10, 26))
    assert found[1, :, 0].tolist() == list(range(16))


def test_shrinking_does_not_alias():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    x = one(Raw(coded(stripes)), size=16).x
    assert float(x[..., 4:-4].abs().max()) < 0.01  # the mean of black and white; sampling points would give -1 or 1


def test_large_jpegs_are_decoded_at_a_fraction_to_nearly_the_same():
    smooth = np.kron(pixels(0, 8, 8), np.ones((64, 64, 1), np.uint8))
    smooth = np.asarray(Image.fromarray(smooth).resize((512, 512), Image.Resampling.BICUBIC))
    fast, exact = one(Raw(coded(smooth, "JPEG", quality=95)), size=32).x, one(Raw(coded(smooth)), size=32).x
    assert float((fast - exact).abs().mean()) < 0.02
    assert decode(coded(smooth[:256, :256], "JPEG"), "x", cover=32).shape == (3, 64, 64)


def test_crops_and_flips_depend_on_seed_and_index_alone():
    raw, prepare = Raw(coded(pixels(0, 24, 40))), Prepare(size=16, crop="random", flip=True)
    first = [prepare(raw, g, 3).x for g in range(30)]
    torch.manual_seed(9)
    assert all(torch.equal(prepare(raw, g, 3).x, first[g]) for g in reversed(range(30)))
    assert not all(torch.equal(prepare(raw, g, 4).x, first[g]) for g in range(30))
    assert len({x.numpy().tobytes() for x in first}) > 12


def test_crops_cover_the_picture_evenly_and_half_are_flipped():
    raw, prepare = Raw(coordinates(16, 20).transpose(2, 0, 1)), Prepare(size=16, crop="random", flip=True)
    corners = [((prepare(raw, g, 0).x[0, 0] + 1) * 127.5).round() for g in range(2000)]
    flips = sum(bool(row[0] > row[-1]) for row in corners)
    places = torch.stack([row.min() for row in corners]).long().bincount()
    assert abs(flips - 1000) < 5 * math.sqrt(500)
    assert len(places) == 5
    assert int((places - 400).abs().max()) < 5 * math.sqrt(320)


def test_picture_mask_and_depth_keep_together():
    marks = coordinates(30, 50)
    columns = {
        "segmentation": coded(marks[..., 0]),
        "depth": coded(marks[..., 1].astype(np.uint16) * 1000),
        "text": "a",
    }
    prepare = Prepare(size=30, crop="random", flip=True)
    starts = set()
    for g in range(40):
        x, _, found = prepare(Raw(coded(marks), 1, columns), g, 5)
        red, green = ((x[:2] + 1) * 127.5).round().numpy()
        assert np.array_equal(found["segmentation"], red)
        assert np.allclose(found["depth"][0] * 65.535, green, atol=1e-3)
        assert (found["segmentation"].dtype, found["depth"].dtype, found["depth"].shape) == (
            np.int64,
            np.float32,
            (1, 30, 30),
        )
        assert found["text"] == "a"
        starts.add((red[0, 0], red[0, -1]))
    assert len(starts) > 20


def test_maps_of_another_size_are_fitted_and_masks_keep_their_classes():
    mask = np.kron(np.array([[0, 7], [7, 200]], np.uint8), np.ones((10, 10), np.uint8))
    depth = np.kron(np.array([[0.0, 1.0], [2.0, 3.0]], np.float32), np.ones((10, 10), np.float32))
    raw = Raw(coded(pixels(0, 40, 40)), None, {"segmentation": coded(mask), "depth": depth})
    for size, side in ((0, 40), (8, 8)):
        found = one(raw, size=size).columns
        assert found["segmentation"].shape == (side, side)
        assert set(np.unique(found["segmentation"])) == {0, 7, 200}
        assert [float(found["depth"][0, y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))] == [0, 1, 2, 3]
    for wrong in (coded(pixels()), np.zeros((10, 20), np.int64), "mask.png", coded(pixels(0, 10, 20, 1))):
        with pytest.raises(Unreadable, match="segmentation"):
            one(Raw(coded(pixels(0, 40, 40)), None, {"segmentation": wrong}))


def test_decoding_first_changes_nothing():
    depth, mask = pixels(1, 20, 30, 1), pixels(2, 20, 30, 1)
    raw = Raw(coded(pixels(0, 20, 30, 4)), 2, {"depth": coded(depth), "segmentation": coded(mask)})
    for prepare in (
        Prepare(),
        Prepare(size=16, crop="random", flip=True, channels=3),
        Prepare(size=16, buckets=(0.7, 1.46, 1.6)),
    ):
        once = prepare.decode(raw)
        assert isinstance(once.x, np.ndarray)
        for g in range(5):
            a, b = prepare(raw, g, 1), prepare(prepare.decode(once), g, 1)
            assert torch.equal(a.x, b.x)
            assert all(np.array_equal(a.columns[k], b.columns[k]) for k in ("depth", "segmentation"))


def test_a_decoded_picture_stays_in_its_bucket_though_rounding_moved_its_aspect():
    prepare, moved = Prepare(size=8, buckets=(1.0, 1.5), multiple=2), 0
    for width in range(40, 80):
        raw = Raw(coded(pixels(0, 45, width, 1)))
        once = prepare.decode(raw)
        moved += prepare.target(*once.x.shape[1:]) != once.target
        assert torch.equal(prepare(once, 0, 0).x, prepare(raw, 0, 0).x)
    assert moved > 0


def test_the_cache_decodes_once_up_to_its_limit():
    source, calls = Arrays(np.zeros((10, 1, 32, 32), np.uint8)), []
    cached = Cached(
        source, lambda raw: (calls.append(raw.where), replace(raw, x=raw.x + 1))[1], limit=5 * (1024 + 32 * 32)
    )
    for _ in range(3):
        for i in range(10):
            cached.read(i)
    assert len(calls) == 5 + 3 * 5
    mapped = Cached(source, lambda raw: raw)
    assert [mapped.read(i).x.base is source.x for i in range(10)] == [True] * 10
    assert mapped.kept == {}


def test_buckets_keep_the_area_and_take_the_nearest_aspect():
    prepare = Prepare(size=64, buckets=(0.5, 1.0, 2.0))
    assert prepare.shapes() == [(88, 48), (64, 64), (48, 88)]
    assert [prepare.bucket(h, w) for h, w in ((200, 100), (100, 100), (100, 139), (100, 142), (10, 300))] == [
        0,
        1,
        1,
        2,
        2,
    ]
    assert prepare(Raw(coded(pixels(0, 30, 90))), 0, 0).x.shape == (3, 48, 88)
    assert prepare.plain()(Raw(coded(pixels(0, 30, 90))), 0, 0).x.shape == (3, 64, 64)
    assert Prepare(size=64, buckets=(0.75,), multiple=16).shapes() == [(80, 48)]


def test_signals_and_volumes_stay_as_they_are():
    for shape in ((2, 50), (1, 4, 5, 6)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        assert np.array_equal(one(Raw(x)).x.numpy(), x)
        for options in ({"size": 4}, {"flip": True}, {"channels": 1}):
            with pytest.raises(InputError, match="are for pictures, not for samples of shape"):
                one(Raw(x), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"size": -1},
        {"crop": "corner"},
        {"channels": 2},
        {"normalize": "none"},
        {"buckets": (1.0,)},
        {"size": 8, "buckets": (0.0,)},
        {"multiple": 0},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(InputError, match=f"data.{next(k for k in options if k != 'size' or len(options) == 1)}"):
        Prepare(**options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_unreadable(value):
    x = np.zeros((1, 4, 4), np.float32)
    x[0, 1, 2] = value
    with pytest.raises(Unreadable, match="NaN or infinite"):
        one(Raw(x))


def test_sound_is_read(tmp_path):
    import wave

    wanted = np.sin(np.arange(800) / 9) * 0.9
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.repeat((wanted * 32767).astype("<i2"), 2).tobytes())
    found = one(Raw(np.zeros((1, 2, 2), np.uint8), None, {"audio": tmp_path / "a.wav"})).columns
    assert (found["rate"], found["audio"].dtype) == (8000, np.float32)
    assert np.abs(found["audio"] - wanted).max() < 1e-4


# ---------------------------------------------------------------- statistics


def test_statistics_are_the_mean_and_the_deviation():
    x = np.random.default_rng(0).normal([[[3.0]], [[-2.0]]], [[[0.5]], [[4.0]]], (300, 2, 6, 5))
    found = measure(Arrays(x), Prepare())
    flat = x.astype(np.float32).transpose(1, 0, 2, 3).reshape(2, -1).astype(np.float64)
    assert np.allclose(found.mean, flat.mean(1), rtol=0, atol=1e-6)
    assert np.allclose(found.std, flat.std(1), rtol=0, atol=1e-6)
    assert (found.shape, found.count) == ((2, 6, 5), 300)
    assert (found.low, found.high) == (flat.min(), flat.max())


def test_normalising_by_channel_gives_a_deviation_of_a_half_and_comes_back():
    x = np.random.default_rng(0).normal([[[300.0]], [[-2.0]]], [[[50.0]], [[0.01]]], (200, 2, 6, 5)).astype(np.float32)
    prepare, _ = settle(Arrays(x), Prepare(normalize="channels"))
    y = torch.stack([prepare(Arrays(x).read(i), 0, 0).x for i in range(200)])
    assert torch.allclose(y.transpose(0, 1).flatten(1).mean(1), torch.zeros(2), atol=1e-3)
    assert torch.allclose(y.transpose(0, 1).flatten(1).std(1), torch.full((2,), 0.5), atol=1e-3)
    assert torch.allclose(prepare.restore(y), torch.from_numpy(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="needs statistics"):
        Prepare(normalize="channels")(Arrays(x).read(0), 0, 0)
    assert torch.equal(Prepare().restore(y), y)


def test_statistics_keep_to_a_fixed_choice_of_samples():
    x = np.random.default_rng(0).normal(size=(500, 1, 1, 2)).astype(np.float32)
    found = measure(Arrays(x), Prepare(), limit=100)
    assert (found.count, measure(Arrays(x), Prepare()).count, LIMIT) == (100, 500, 10_000)
    assert found == measure(Arrays(x), Prepare(flip=True), limit=100)
    assert found != measure(Arrays(x), Prepare(), limit=100, seed=1)


def test_statistics_survive_json():
    found = measure(Arrays(np.random.default_rng(0).normal(size=(9, 2, 3))), Prepare())
    assert Statistics.from_json(found.to_json()) == found
    for text in ("{}", "[1]", "x", '{"mean": 3}'):
        with pytest.raises(InputError, match="not statistics"):
            Statistics.from_json(text)


@pytest.mark.parametrize(
    ("scale", "shape", "why"),
    [
        (100.0, (1, 8, 8), "normalize=channels"),
        (0.001, (1, 8, 8), "normalize=channels"),
        (0.5, (3, 8, 8), None),
        (0.5, (2, 1), None),
    ],
)
def test_suspicious_data_are_pointed_out(scale, shape, why):
    x = np.random.default_rng(0).normal(size=(20, *shape)) * scale
    text = "; ".join(measure(Arrays(x), Prepare()).warnings())
    assert re.search(why, text) if why else text == ""


def test_channels_that_come_last_are_refused():
    x = np.zeros((20, 8, 8, 3), np.float32)
    with pytest.raises(InputError, match=r"transpose\(0, 3, 1, 2\)"):
        measure(Arrays(x), Prepare()).refuse("x")
    measure(Arrays(x.transpose(0, 3, 1, 2)), Prepare()).refuse("x")


def test_settling_reads_fewer_samples_where_nothing_depends_on_them():
    source = Arrays(np.zeros((1500, 1, 2, 2), np.float32))
    assert [settle(source, Prepare(normalize=n))[1].count for n in ("range", "channels")] == [1000, 1500]


def test_channels_settle_on_the_most_frequent_number():
    class Mixed(Arrays):
        def read(self, i):
            return Raw(coded(pixels(i, 8, 8, 3 if i % 4 else 1)))

    prepare, found = settle(Mixed(np.zeros((40, 1, 8, 8), np.uint8)), Prepare(size=8))
    assert (prepare.channels, found.shape) == (3, (3, 8, 8))
    assert settle(from_data(Data(torch.zeros(5, 2, 4, 4))), Prepare())[0].channels == 0


def test_pictures_of_several_shapes_ask_for_a_size():
    class Sizes(Arrays):
        def read(self, i):
            return Raw(coded(pixels(i, 8 + i % 2, 8)))

    with pytest.raises(InputError, match=r"set data.size"):
        settle(Sizes(np.zeros((4, 1, 8, 8), np.uint8)), Prepare())
