"""Scenes: areas in closed form, captions that say what is drawn, what is held out, and the reader that scores them."""

import pickle

import numpy as np
import pytest

from undiffuse import InputError
from undiffuse.data import Prepare, open_source
from undiffuse.data.picture import to_float
from undiffuse.data.scenes import (
    COLOURS,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    adherence,
    coverage,
    layout,
    parse,
    read,
    render,
    scene,
    segment,
    segmentation_iou,
)
from undiffuse.data.scenes import (
    scenes as source_of,
)

AREAS = {"circle": np.pi, "square": 4 * 0.88**2, "triangle": 1.3**2 * 3 * np.sqrt(3) / 4, "cross": 0.72 * (4.8 - 0.72)}


def scenes(n, **options):
    return [scene(5, i, **options) for i in range(n)]


def judged(drawn, side=32, sigma=0.0, captions=None):
    rng = np.random.default_rng(1)
    out = []
    for k, s in enumerate(drawn):
        x = to_float(render(s, side)[0])
        x = x + np.float32(sigma) * rng.normal(size=x.shape).astype(np.float32)
        out.append(adherence(x, captions[k] if captions else s.caption))
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_their_area_wherever_they_lie_and_stay_within_their_radius(shape):
    for size, (x, y) in ((2.7, (16.0, 16.0)), (4.5, (15.3, 16.8)), (9.0, (16.5, 15.1))):
        share = coverage(shape, x, y, size, 32)
        assert share.sum() == pytest.approx(AREAS[shape] * size**2, rel=0.04)  # samples are 1/8 pixel apart
        away = np.hypot(*np.meshgrid(np.arange(32) + 0.5 - x, np.arange(32) + 0.5 - y))
        assert away[share > 0].max() <= SHAPES[shape] * size + np.sqrt(0.5)
        assert ((share > 0) & (share < 1)).any()  # antialiased


@pytest.mark.parametrize("shape", SHAPES)
def test_the_centre_of_a_shape_is_its_centre_of_mass(shape):
    share = coverage(shape, 15.3, 16.8, 6.0, 32)
    at = np.arange(32) + 0.5
    assert (share.sum(0) @ at / share.sum(), share.sum(1) @ at / share.sum()) == pytest.approx((15.3, 16.8), abs=1 / 16)


def test_a_shape_keeps_its_share_of_the_picture_at_any_side():
    s = Scene((Thing("red", "triangle", "large", 0.3, 0.6),))
    means = [to_float(render(s, side)[0]).mean((1, 2)) for side in (32, 64, 128)]
    assert np.allclose(means[0], means[2], atol=2e-3)
    assert np.allclose(means[1], means[2], atol=1e-3)


def test_scenes_depend_on_seed_and_index_alone_and_differ():
    drawn = scenes(200)
    assert drawn[7] == scene(5, 7) != scene(6, 7)
    assert len(set(drawn)) == 200
    assert {len(s.things) for s in drawn} == {1, 2, 3}
    assert {t.colour for s in drawn for t in s.things} == set(COLOURS)
    assert {t.shape for s in drawn for t in s.things} == set(SHAPES)
    assert {t.size for s in drawn for t in s.things} == set(SIZES)
    assert {r for s in drawn for r in s.relations} == set(RELATIONS)
    assert {s.place for s in drawn} == {None, *PLACES}


def test_captions_say_what_is_drawn():
    for s in scenes(500):
        said = parse(s.caption)
        assert (said.relations, said.place, len(said.things)) == (s.relations, s.place, len(s.things))
        for a, b in zip(said.things, s.things, strict=True):
            assert (a.colour, a.shape) == (b.colour, b.shape)
            assert a.size in (None, b.size)
        for k, relation in enumerate(s.relations):
            dx, dy = RELATIONS[relation]
            a, b = s.things[k], s.things[k + 1]
            along, across = (a.x - b.x) * dx + (a.y - b.y) * dy, abs((a.x - b.x) * dy + (a.y - b.y) * dx)
            assert along > 1.5 * across


def test_things_lie_apart_and_inside():
    for s in scenes(300):
        for i, a in enumerate(s.things):
            radius = SHAPES[a.shape] * SIZES[a.size]
            assert radius <= min(a.x, a.y)
            assert max(a.x, a.y) <= 1 - radius
            for b in s.things[:i]:
                gap = np.hypot(a.x - b.x, a.y - b.y) - radius - SHAPES[b.shape] * SIZES[b.size]
                assert gap > 0.05


def test_held_out_combinations_never_occur_in_training_and_always_in_the_test():
    for s in scenes(1000):
        assert not HELD_OUT & {(t.colour, t.shape) for t in s.things}
    seen = [HELD_OUT & {(t.colour, t.shape) for t in s.things} for s in scenes(300, held_out=True)]
    assert all(seen)
    assert set().union(*seen) == HELD_OUT
    trained = {(t.colour, t.shape) for s in scenes(1000) for t in s.things}
    for colour, shape in HELD_OUT:  # each part alone is known
        assert any(c == colour for c, _ in trained)
        assert any(z == shape for _, z in trained)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_the_reader_is_right_on_every_drawn_scene_also_with_noise(side, sigma):
    n = 500 if side == 32 else 100
    drawn = scenes(n // 2) + scenes(n // 2, held_out=True)
    assert [s.caption for s, a in zip(drawn, judged(drawn, side, sigma), strict=True) if not a.all] == []


def test_much_noise_is_misread_now_and_then_and_noise_alone_always():
    drawn = scenes(100)
    found = judged(drawn, sigma=0.55)
    assert 0.2 < np.mean([a.all for a in found]) < 0.97
    assert np.mean([a.shape for a in found]) > np.mean([a.all for a in found])
    noise = np.random.default_rng(0).normal(size=(20, 3, 32, 32)).astype(np.float32)
    assert not any(adherence(x, s.caption).all for x, s in zip(noise, drawn, strict=False))


def test_the_wrong_captions_are_not_followed():
    drawn = scenes(200)
    shuffled = judged(drawn, captions=[s.caption for s in drawn[1:] + drawn[:1]])
    assert np.mean([a.all for a in shuffled]) < 0.02
    assert np.mean([a.colour for a in shuffled]) < 0.45


def test_the_reader_finds_positions_within_a_quarter_of_a_pixel():
    for s in scenes(100):
        found = read(to_float(render(s, 32)[0]))
        assert len(found) == len(s.things)
        for t in s.things:
            near = min(found, key=lambda f: np.hypot(f.x - t.x, f.y - t.y))
            assert (near.colour, near.shape, near.size) == (t.colour, t.shape, t.size)
            assert np.hypot(near.x - t.x, near.y - t.y) < 0.25 / 32


A, B = Thing("red", "circle", "small", 0.25, 0.5), Thing("blue", "square", "large", 0.7, 0.5)


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a small red circle left of a blue square", (True, 1, 1, 1, 1)),
        ("a blue square right of a red circle", (True, 1, 1, None, 1)),
        ("a large red circle left of a large blue square", (True, 1, 1, 0.5, 1)),
        ("a red circle right of a blue square", (True, 1, 1, None, 0)),
        ("a red circle above a blue square", (True, 1, 1, None, 0)),
        ("a green circle left of a blue square", (True, 0.5, 1, None, 1)),
        ("a red cross left of a blue square", (True, 1, 0.5, None, 1)),
        ("a red circle on the left", (False, 1, 1, None, 1)),
        ("a red circle at the top", (False, 1, 1, None, 0)),
        ("a red circle left of a blue square, which is above a red cross", (False, 2 / 3, 2 / 3, None, 0.5)),
    ],
)
def test_each_part_of_a_caption_is_judged_by_itself(caption, found):
    a = adherence(to_float(render(Scene((A, B)), 32)[0]), caption)
    assert (a.count, a.colour, a.shape, a.size, a.relation) == pytest.approx(found)
    assert a.all == all(v in (None, 1, True) for v in found)


def test_an_empty_picture_shows_nothing_of_a_caption():
    a = adherence(np.zeros((3, 32, 32), np.float32), "a red circle left of a small blue square")
    assert (a.count, a.colour, a.shape, a.size, a.relation, a.all) == (False, 0, 0, 0, 0, False)


@pytest.mark.parametrize("caption", ["", "a dog", "a red circle left of", "a pink circle", "red circle in the middle"])
def test_captions_of_another_kind_are_refused_with_an_example(caption):
    with pytest.raises(InputError, match="is no caption of a scene; expected such as 'a small red circle left of"):
        parse(caption)


def test_masks_are_the_drawn_colours():
    for s in scenes(60):
        picture, mask = render(s, 32)
        assert np.array_equal(segment(to_float(picture)), mask)
        numbers = {1 + list(COLOURS).index(t.colour) for t in s.things}
        assert set(np.unique(mask)) == {0, *numbers}
        for t in s.things:  # none of the shapes has a hole
            assert mask[int(t.y * 32), int(t.x * 32)] == 1 + list(COLOURS).index(t.colour)
        assert segmentation_iou(to_float(picture), mask) == 1


def test_one_hot_layouts_say_what_the_mask_says():
    _, mask = render(scene(5, 0), 32)
    hot = layout(mask)
    assert (hot.shape, hot.dtype) == ((7, 32, 32), np.float32)
    assert np.array_equal(hot.argmax(0), mask)
    assert (hot.sum(0) == 1).all()
    assert layout(np.stack([mask, mask])).shape == (2, 7, 32, 32)


def test_intersection_over_union_counts_pixels():
    mask = np.zeros((32, 32), np.uint8)
    mask[:10, :10] = 1
    x = np.zeros((3, 32, 32), np.float32)
    x[:, :10, 5:15] = np.array([1, -1, -1])[:, None, None]  # red, half of it in its place
    assert segmentation_iou(x, mask) == pytest.approx(50 / 150)
    assert segmentation_iou(x[[1, 0, 2]], mask) == 0  # green
    assert segmentation_iou(0 * x, 0 * mask) == 1


@pytest.mark.parametrize(("name", "side"), [("scenes", 32), ("scenes-64", 64)])
def test_scenes_open_by_name_with_texts_and_masks(name, side):
    source = open_source(name)
    assert (len(source), source.columns, source.classes) == (20000, ("text", "segmentation"), ())
    example = Prepare()(source.read(11), 0, 0)
    assert (example.x.shape, example.label) == ((3, side, side), None)
    assert example.columns["text"] == scene(0, 11).caption
    assert adherence(example.x.numpy(), example.columns["text"]).all
    assert segmentation_iou(example.x.numpy(), example.columns["segmentation"]) == 1
    held = scene(0, 4, held_out=True)
    assert HELD_OUT & {(t.colour, t.shape) for t in held.things}
    assert source.test.read(4).columns["text"] == held.caption


def test_fingerprints_change_with_every_setting():
    changed = [{}, {"side": 64}, {"n": 19}, {"seed": 1}, {"held_out": True}]
    prints = [source_of(**{"side": 32, "n": 20, **c}).fingerprint() for c in changed]
    assert len(set(prints)) == 5
    assert prints[0] == source_of(side=32, n=20).fingerprint()


def test_workers_read_the_same_samples():
    source = pickle.loads(pickle.dumps(open_source("scenes")))
    a, b = source.read(5), open_source("scenes").read(5)
    assert np.array_equal(a.x, b.x)
    assert a.columns["text"] == b.columns["text"]


@pytest.mark.parametrize(("options", "why"), [({"side": 16}, "16 pixels; .* at least 24"), ({"n": 0}, "at least 1")])
def test_scenes_that_cannot_be_drawn_are_refused(options, why):
    with pytest.raises(InputError, match=why):
        source_of(**options)
