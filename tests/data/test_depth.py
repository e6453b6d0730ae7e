"""Scenes of solids: depths, normals and silhouettes in closed form; and the depth that is read back from a picture."""

import pickle

import numpy as np
import pytest

from undiffuse import InputError
from undiffuse.data import Prepare, open_source
from undiffuse.data.depth import (
    ALBEDOS,
    FAR,
    HAZE,
    NEAR,
    SOLIDS,
    Solid,
    _cast,
    _normals,
    depth_fit,
    distance,
    read_depth,
    render,
    silhouette,
    solid_scenes,
    solids,
)

UPRIGHT = np.eye(3)


def solid(kind, radius=0.5, centre=(0.1, -0.2, 0.3), turn=UPRIGHT, albedo="red"):
    return Solid(kind, albedo, radius, centre, turn)


def as_depth(z):
    return NEAR + (FAR - NEAR) * (z + 1) / 2


def pairs(n, seed=7):
    drawn = [render(solids(seed, i), 32) for i in range(n)]
    return [(picture / np.float32(127.5) - 1, depth) for picture, depth, _ in drawn]


def turned(seed):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return q * np.linalg.det(q)


def test_a_sphere_is_its_radius_nearer_at_its_centre_and_round_elsewhere():
    _, depth, mask = render((solid("sphere", 0.5, (1 / 33, -3 / 33 + 1 / 33, 0.3)),), 33)
    at = (2 * np.arange(33) + 1) / 33 - 1
    row, col = (int(abs(at - c).argmin()) for c in (-2 / 33, 1 / 33))
    across = np.hypot(at[None] - 1 / 33, at[:, None] + 2 / 33)
    assert across[row, col] < 2 / 33
    z = 0.3 - np.sqrt((0.25 - across**2).clip(0))
    assert depth[0, row, col] == pytest.approx(as_depth(z[row, col]), abs=1e-4)
    inside = across < 0.495
    assert np.allclose(depth[0][inside], as_depth(z[inside]), atol=1e-3)
    assert (depth[0][across > 0.5] == 1).all()
    assert np.array_equal(mask > 0, depth[0] < 1)


@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (0.13, -0.2, 0.4)])
def test_the_silhouette_of_a_sphere_is_a_disc_of_its_radius(centre):
    _, _, mask = render((solid("sphere", 0.45, centre),), 128)
    assert (mask > 0).mean() * 4 == pytest.approx(np.pi * 0.45**2, rel=0.01)


def test_silhouettes_of_upright_solids_have_their_areas():
    areas = {"box": 4 / 3, "torus": np.pi * (1 - 0.16), "capsule": np.pi * 0.45**2}
    for kind, area in areas.items():
        _, _, mask = render((solid(kind, 0.6, (0.01, 0.02, 0.0)),), 256)
        assert (mask > 0).mean() * 4 == pytest.approx(area * 0.36, rel=0.015), kind
    sideways = np.array([[0, 0, 1.0], [0, 1, 0], [-1, 0, 0]])
    _, _, mask = render((solid("capsule", 0.6, (0.01, 0.02, 0.0), sideways),), 256)
    assert (mask > 0).mean() * 4 == pytest.approx((np.pi * 0.45**2 + 1.1 * 0.9) * 0.36, rel=0.02)


def test_the_front_of_an_upright_box_is_flat_and_a_torus_has_a_hole():
    _, depth, mask = render((solid("box", 0.6, (0, 0, 0.1)),), 64)
    assert np.allclose(depth[0][mask > 0], as_depth(0.1 - 0.6 / np.sqrt(3)), atol=1e-3)
    _, depth, _ = render((solid("torus", 0.8, (0, 0, 0)),), 65)
    assert depth[0, 32, 32] == 1
    assert depth.min() == pytest.approx(as_depth(-0.3 * 0.8), abs=2e-3)  # the tube's top


@pytest.mark.parametrize("kind", SOLIDS)
def test_rays_end_on_the_surface_of_a_turned_solid_and_solids_keep_within_their_radius(kind):
    body = solid(kind, 0.4, (0.1, 0.2, -0.1), turned(3))
    xy = np.random.default_rng(0).uniform((-0.3, -0.2), (0.5, 0.6), (400, 2))
    z = _cast(body, xy)
    hit = np.isfinite(z)
    assert 20 < hit.sum() < 400
    p = (np.column_stack([xy, z])[hit] - body.centre) @ body.turn / body.radius
    assert abs(distance(kind, p)).max() < 1e-3
    assert np.linalg.norm(p, axis=1).max() < 1.001
    before = np.column_stack([xy[hit], z[hit] - 0.01]) - body.centre  # nothing in front of what is seen
    assert (distance(kind, before @ body.turn / body.radius) > -1e-6).all()


@pytest.mark.parametrize("kind", SOLIDS)
def test_no_ray_that_meets_a_solid_misses_it(kind):
    body, rng = solid(kind, 0.4, (0.1, 0.2, -0.1), turned(3)), np.random.default_rng(0)
    p = rng.uniform(-0.4, 0.4, (2000, 3))
    inside = p[distance(kind, p @ body.turn / 0.4) < -0.02]
    found = _cast(body, (inside + body.centre)[:, :2])
    assert len(inside) > 20
    assert (found < inside[:, 2] + body.centre[2]).all()


@pytest.mark.parametrize("kind", SOLIDS)
def test_distances_grow_at_rate_one_along_the_normal(kind):
    body = solid(kind, 0.4, (0.1, 0.2, -0.1), turned(5))
    xy = np.random.default_rng(1).uniform((-0.2, -0.1), (0.4, 0.5), (200, 2))
    z = _cast(body, xy)
    p = np.column_stack([xy, z])[np.isfinite(z)]
    normal = _normals(body, p)
    away = [distance(kind, (p + h * normal - body.centre) @ body.turn / 0.4) * 0.4 for h in (0.01, 0.03)]
    assert np.allclose(np.linalg.norm(normal, axis=1), 1)
    assert np.allclose(away[1] - away[0], 0.02, atol=1e-4)


def test_light_and_haze_are_those_of_the_formula():
    picture, _, _ = render((solid("sphere", 0.5, (0, 0, 0), albedo="green"),), 33)
    d, light = as_depth(-0.5), 0.35 + 0.65 * 2 / np.sqrt(6)
    expected = (1 - d) * light * np.array(ALBEDOS["green"]) + d * np.array(HAZE)
    assert np.allclose(picture[:, 16, 16] / 255, expected, atol=2 / 255)
    assert np.allclose(picture[:, 0, 0] / 255, HAZE, atol=1 / 255)
    assert picture[1, 12, 12] > picture[1, 20, 20] + 20  # lit from the upper left


def test_the_nearer_solid_covers_the_farther():
    far, near = solid("sphere", 0.4, (0, 0, 0.5)), solid("sphere", 0.3, (0.1, 0, -0.4), albedo="green")
    for scene, number in (((far, near), 2), ((near, far), 1)):
        _, depth, mask = render(scene, 33)
        assert mask[16, 18] == number
        assert depth[0, 16, 18] < as_depth(-0.6)
        assert set(np.unique(mask)) == {0, 1, 2}


def test_scenes_depend_on_seed_and_index_alone_and_solids_do_not_touch():
    kinds = set()
    for i in range(200):
        scene = solids(7, i)
        kinds |= {(s.kind, s.albedo) for s in scene}
        for k, a in enumerate(scene):
            assert np.allclose(a.turn @ a.turn.T, np.eye(3))
            assert np.linalg.det(a.turn) == pytest.approx(1)
            assert abs(np.array(a.centre)).max() + a.radius <= 1 + 1e-9
            assert all(np.linalg.norm(np.subtract(a.centre, b.centre)) > a.radius + b.radius for b in scene[:k])
    assert len(kinds) == len(SOLIDS) * len(ALBEDOS)
    a, b, c = (render(solids(s, 3), 32)[0] for s in (7, 7, 8))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_depth_is_read_back_from_true_pictures():
    fits = [depth_fit(x, depth) for x, depth in pairs(200)]
    assert min(f.iou for f in fits) > 0.98
    assert min(f.correlation for f in fits) > 0.95
    off = [abs(read_depth(x) - depth[0])[depth[0] < 1] > 0.02 for x, depth in pairs(100)]
    assert np.concatenate(off).mean() < 0.01  # pixels where solids of two colours meet
    assert all(np.array_equal(silhouette(x), depth[0] < 1) for x, depth in pairs(20))


def test_noise_is_felt_but_not_at_once():
    rng = np.random.default_rng(0)
    fits = [depth_fit(x + 0.03 * rng.normal(size=x.shape), depth) for x, depth in pairs(100)]
    assert np.mean([f.iou for f in fits]) > 0.98
    assert np.mean([f.correlation for f in fits]) > 0.9
    noisy = [depth_fit(x + 0.5 * rng.normal(size=x.shape), depth) for x, depth in pairs(100)]
    assert np.mean([f.correlation for f in noisy]) < 0.6


def test_the_wrong_map_is_not_followed():
    found = pairs(100)
    fits = [depth_fit(found[k - 1][0], depth) for k, (_, depth) in enumerate(found)]
    assert abs(np.mean([f.correlation for f in fits])) < 0.2
    assert np.mean([f.iou for f in fits]) < 0.3


def test_correlation_does_not_come_from_the_silhouette():
    x, depth = pairs(1)[0]
    flat = (0.5 * np.array(ALBEDOS["red"]) + 0.5 * np.array(HAZE))[:, None, None]
    cut = np.where(depth < 1, flat, np.array(HAZE)[:, None, None]) * 2 - 1
    fit = depth_fit(cut, depth)
    assert fit.iou == 1
    assert abs(fit.correlation) < 0.1
    empty = depth_fit(np.broadcast_to(2 * np.array(HAZE)[:, None, None] - 1, x.shape), depth)
    assert (empty.iou, empty.correlation) == (0, 0)


@pytest.mark.parametrize(("name", "side"), [("depth", 32), ("depth-64", 64)])
def test_solids_open_by_name_with_maps_and_masks(name, side):
    source = pickle.loads(pickle.dumps(open_source(name)))
    assert (source.name, len(source), source.columns, len(source.test)) == (name, 6000, ("depth", "segmentation"), 1000)
    example = Prepare()(source.read(2), 0, 0)
    depth, mask = example.columns["depth"], example.columns["segmentation"]
    assert (example.x.shape, depth.shape, mask.shape) == ((3, side, side), (1, side, side), (side, side))
    assert depth_fit(example.x.numpy(), depth).correlation > 0.95
    assert np.array_equal(mask > 0, depth[0] < 1)
    assert source.fingerprint() != source.test.fingerprint()
    assert not np.array_equal(source.test.read(2).columns["depth"], depth)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="no solid is named 'cone'; there are sphere, box"):
        distance("cone", np.zeros((1, 3)))
    with pytest.raises(InputError, match="4 pixels; expected a side of at least 8"):
        solid_scenes(4)
