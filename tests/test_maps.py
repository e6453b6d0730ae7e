"""Maps as conditions: pictures, depth, layouts, and pictures to be varied."""

import pytest
import torch
from torch.nn import functional as F

from tests.test_encoders import assert_learned
from tests.test_nets import randomised, relative
from undiffuse import InputError
from undiffuse.cond import Depth, Encoders, Layout, Masked, Picture, Variation, random_known
from undiffuse.cond.maps import resized
from undiffuse.cond.masks import KINDS

RAMP = torch.arange(32.0).reshape(1, 1, 4, 8)


def test_maps_become_smaller_by_means_and_larger_by_lines():
    assert torch.equal(resized(RAMP, (4, 8)), RAMP)
    expected = RAMP.reshape(1, 1, 2, 2, 4, 2).mean((3, 5))
    assert torch.allclose(resized(RAMP, (2, 4)), expected)
    large = resized(RAMP, (8, 16))
    assert torch.allclose(large[0, 0, 1, 1:-1], torch.arange(14) / 2 + 0.25 + 2)
    for dims in (1, 2, 3):
        flat = torch.full((2, 3, *[6] * dims), 0.7)
        for side in (3, 6, 9):
            assert torch.allclose(resized(flat, (side,) * dims), torch.full((2, 3, *[side] * dims), 0.7))


@pytest.mark.parametrize(("own", "size"), [((4, 8), (8, 8)), ((4, 8), (8, 4)), ((64, 64), (32, 30)), ((4, 4), (4,))])
def test_maps_of_other_proportions_are_refused(own, size):
    with pytest.raises(InputError, match=f"a map of {'x'.join(map(str, own))} for samples of .*crop it first"):
        resized(torch.zeros(1, 1, *own), size)


def test_proportions_are_those_of_whole_pixels():
    assert resized(torch.zeros(1, 1, 64, 48), (32, 24)).shape == (1, 1, 32, 24)
    assert resized(torch.zeros(1, 1, 33, 25), (16, 12)).shape == (1, 1, 16, 12)


def test_pictures_are_in_the_models_range_and_marked():
    encoders = Encoders({"low": Picture(1)})
    given = encoders(low=[torch.tensor([[[0, 255]]], dtype=torch.uint8), None])
    told = encoders.encoded(given, (1, 2)).spatial
    assert told.tolist() == [[[[-1.0, 1.0]], [[1.0, 1.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]]
    grey = encoders.encoded(encoders(low=torch.zeros(1, 1, 2, 2)), (2, 2)).spatial
    assert grey.any()


def test_pictures_are_brought_to_a_low_resolution_first():
    x = torch.randn(2, 3, 8, 12)
    read = Picture(size=4).read(x)
    assert torch.allclose(read["map"], x.reshape(2, 3, 4, 2, 6, 2).mean((3, 5)), atol=1e-6)
    assert torch.equal(Picture(size=4).read(read["map"])["map"], read["map"])
    encoders = Encoders({"low": Picture(size=4)})
    told = encoders.encoded(encoders(low=x), (8, 12)).spatial
    assert torch.equal(told, encoders.encoded(encoders(low=read["map"]), (8, 12)).spatial)
    assert told.shape == (2, 4, 8, 12)


def low(noise, n=3, value=0.0):
    """Conditions of n pictures of one value, that training has noise in up to a level."""
    return Encoders({"low": Picture(1, noise=noise)})(low=torch.full((n, 1, 4, 4), value))


def test_training_has_noise_of_uniform_levels_that_are_told():
    n, most, z = 4000, 0.8, 0.6
    given, index = low(most, n, z), torch.arange(n)
    seen = given.dropped(5, index, 0.0)
    read = seen.reads["low"].tensors
    level, maps = read["level"].double(), read["map"].double().flatten(1)
    # uniform in [0, most]: mean most / 2 and variance most^2 / 12
    assert abs(float(level.mean()) - most / 2) < 4 * most / (12 * n) ** 0.5
    assert abs(float(level.var()) / (most**2 / 12) - 1) < 4 * (0.8 / n) ** 0.5
    assert 0 < float(level.min()) < float(level.max()) < most
    # given its level a map is normal: mean sqrt(1 - level^2) z and standard deviation level
    eps = (maps - (1 - level.square()).sqrt()[:, None] * z) / level[:, None]
    m = eps.numel()
    assert abs(float(eps.mean())) < 4 / m**0.5
    assert abs(float(eps.square().mean()) - 1) < 4 * (2 / m) ** 0.5
    assert abs(float(eps.pow(4).mean()) - 3) < 4 * (96 / m) ** 0.5
    assert abs(float((eps[:, 0] * eps[:, 1]).mean())) < 4 / n**0.5
    assert abs(float((eps[1:, 0] * eps[:-1, 0]).mean())) < 4 / n**0.5
    spatial = Encoders({"low": Picture(1, noise=most)}).encoded(seen, (4, 4)).spatial
    assert torch.equal(spatial[:, 0].flatten(1), read["map"].flatten(1))
    assert spatial[:, 1].unique().tolist() == [1.0]
    assert torch.equal(spatial[:, 2], read["level"][:, None, None].expand(n, 4, 4))


def test_noise_is_a_function_of_seed_and_index_alone():
    given, index = low(0.5, 6), torch.arange(6)
    whole = given.dropped(5, index, 0.5).flat()
    rows = torch.tensor([4, 1])
    assert torch.equal(given[rows].dropped(5, rows, 0.5).flat(), whole[rows])
    other = given.dropped(6, index, 0.5)
    assert not torch.equal(other.flat(), whole)
    assert not torch.equal(given.dropped(5, index + 6, 0.5).flat(), whole)
    # which samples are dropped is as without noise
    assert torch.equal(other.reads["low"].there, low(0.0, 6).dropped(6, index, 0.5).reads["low"].there)


def test_conditions_have_noises_of_their_own():
    encoders = Encoders({"low": Picture(1, noise=1.0), "edit": Picture(1, noise=1.0)}, alone=0.0)
    x = torch.zeros(500, 1, 2, 2)
    seen = encoders(low=x, edit=x).dropped(0, torch.arange(500), 0.0)
    one, two = (seen.reads[name].tensors for name in ("low", "edit"))
    for name in ("map", "level"):
        both = torch.stack([one[name].flatten(), two[name].flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / 500**0.5


def test_sampling_has_no_noise_or_that_of_a_level():
    encoders = Encoders({"low": Picture(1, noise=0.5)})
    given = low(0.5, 2000, 0.6)
    told = encoders.encoded(given, (4, 4)).spatial
    assert torch.equal(told[:, 0], torch.full((2000, 4, 4), 0.6))
    assert not told[:, 2].any()
    noisy = encoders.encoded(given.noised("low", 0.3, seed=1), (4, 4)).spatial.double()
    assert torch.allclose(noisy[:, 2], torch.full((2000, 4, 4), 0.3).double())
    m = noisy[:, 0].numel()
    assert abs(float(noisy[:, 0].mean()) - (1 - 0.3**2) ** 0.5 * 0.6) < 4 * 0.3 / m**0.5
    assert abs(float(noisy[:, 0].var()) / 0.3**2 - 1) < 4 * (2 / m) ** 0.5
    assert torch.equal(given.noised("low", 0.0).flat(), given.flat())
    assert not encoders.encoded(given.noised("low", 0.3).null(), (4, 4)).spatial.any()


def whole_and_masked():
    """A picture without a mask and one of which the left half is known."""
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    half = torch.ones(1, 8, 8)
    half[..., 4:] = 0
    return x, torch.cat([x[1], half])


def test_masked_pictures_are_what_is_known_of_them_and_where():
    encoder, (x, masked) = Masked(1), whole_and_masked()
    encoders = Encoders({"picture": encoder})
    assert encoder.spatial == encoders.widths["spatial"] == 2
    told = encoders.encoded(encoders(picture=[masked, None]), (8, 8)).spatial
    assert torch.equal(told[0, 0], x[1, 0] * masked[1])
    assert torch.equal(told[0, 1], masked[1])
    assert not told[1].any()
    bytes_ = torch.tensor([[[[0, 255]], [[255, 0]]]], dtype=torch.uint8)
    assert encoders.encoded(encoders(picture=bytes_), (1, 2)).spatial.tolist() == [[[[-1.0, 0.0]], [[1.0, 0.0]]]]
    hidden = encoders.encoded(encoders(picture=x), (8, 8)).spatial
    assert torch.equal(hidden[:, 1] == 0, F.pad(torch.ones(2, 4, 4), (2, 2, 2, 2)) == 1)
    assert not hidden[:, 0][hidden[:, 1] == 0].any()
    nothing = encoders.encoded(encoders(picture=torch.cat([x, 0 * x], 1)), (8, 8))
    assert torch.equal(nothing.spatial, encoders.encoded(encoders(picture=x).null(), (8, 8)).spatial)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 1), torch.full((1, 2, 2, 2), 1.5)])
def test_pictures_and_masks_that_do_not_fit_are_refused(x):
    with pytest.raises(InputError, match=r"picture: (expected \(samples, 1 and a mask|a mask is from 0)"):
        Encoders({"picture": Masked(1)})(picture=x)


def test_training_draws_masks_of_what_came_whole_by_seed_and_index():
    encoders, x, index = Encoders({"picture": Masked(1)}), torch.rand(12, 1, 8, 8), torch.arange(12)
    given = encoders(picture=x)
    seen = given.dropped(5, index, 0.0)
    known = seen.reads["picture"].tensors["known"]
    own = encoders.encoded(seen, (8, 8)).spatial
    assert torch.equal(own, torch.cat([x * known, known], 1))
    rows = torch.tensor([7, 2])
    assert torch.equal(given[rows].dropped(5, rows, 0.0).flat(), seen.flat()[rows])
    assert not torch.equal(given.dropped(6, index, 0.0).flat(), seen.flat())
    assert not torch.equal(given.dropped(5, index + 12, 0.0).flat(), seen.flat())
    _, masked = whole_and_masked()
    stays = encoders(picture=masked[None])
    assert torch.equal(stays.dropped(5, index[:1], 0.0).flat(), stays.flat())
    gone = encoders.encoded(given.dropped(5, index, 1.0), (8, 8)).spatial
    assert not gone.any()


@pytest.mark.parametrize("sides", [(32,), (32, 24), (16, 16, 12)])
def test_random_masks_have_the_distribution_that_is_documented(sides):
    n = 2000
    known = random_known(3, torch.arange(n), sides)
    assert known.shape == (n, 1, *sides)
    assert known.unique().tolist() == [0.0, 1.0]
    nothing = 1 - known.flatten(1).amax(1)
    p = KINDS["everything"]
    rounds = 0.03  # boxes that are everything, or nothing, of so few pixels
    assert abs(float(nothing.mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5 + rounds
    hidden = 1 - known.flatten(1).mean(1)
    assert 0.3 < float(hidden.mean()) < 0.8
    # a box hides a product of intervals, and so do no strokes
    boxes = torch.stack([_is_box(k[0] == 0) for k in known])
    outside = torch.stack([_is_box(k[0] == 1) for k in known])
    assert abs(float(outside.float().mean()) - KINDS["outside"]) < 0.06 + 0.3 * (len(sides) == 1)
    if len(sides) > 1:
        assert abs(float(boxes.float().mean()) - KINDS["box"] - p) < 0.06


def _is_box(inside):
    if not inside.any():
        return torch.tensor(False)
    at = inside.nonzero()
    return (at.amax(0) - at.amin(0) + 1).prod() == inside.sum()


def test_filling_in_is_learned():
    x = torch.randn(16, 1, 1, 1).expand(16, 1, 8, 8) + 0.05 * torch.randn(16, 1, 8, 8)
    assert_learned(Encoders({"picture": Masked(1)}), x, {"picture": x})


def test_depth_is_linear_in_depth_or_in_disparity():
    values = torch.tensor([[[1.0, 1.5, 2.0, 4.0, 7.0]]])
    assert torch.allclose(Depth(1.0, 4.0).read(values)["map"].flatten(), torch.tensor([1, 2 / 3, 1 / 3, -1, -1]))
    expected = 2 * (1 / values.clamp(max=4) - 1 / 4) / (3 / 4) - 1
    assert torch.allclose(Depth(1.0, 4.0, inverse=True).read(values)["map"], expected[:, None])
    assert torch.equal(Depth().read(torch.rand(2, 1, 3, 3) * 0)["map"], torch.ones(2, 1, 3, 3))


def test_layouts_are_one_hot_and_shares_of_areas():
    mask = torch.tensor([[[0, 1, 1, 2], [0, 2, 255, 2]]], dtype=torch.uint8)
    encoders = Encoders({"mask": Layout(3)})
    given = encoders(mask=mask)
    whole = encoders.encoded(given, (2, 4)).spatial
    expected = torch.stack([(mask[0] == k).float() for k in range(3)])[None]
    assert torch.equal(whole, expected)
    half = encoders.encoded(given, (1, 2)).spatial
    assert half[0, :, 0].T.tolist() == [[0.5, 0.25, 0.25], [0.0, 0.25, 0.5]]
    assert torch.equal(encoders.encoded(encoders(mask=mask[:, None]), (2, 4)).spatial, expected)


def test_several_maps_and_missing_ones_stand_side_by_side():
    encoders = Encoders({"low": Picture(1), "depth": Depth(), "mask": Layout(3)})
    assert encoders.widths["spatial"] == 7
    depth = torch.rand(2, 6, 6)
    told = encoders.encoded(encoders(depth=depth, mask=torch.ones(2, 12, 12).long()), (6, 6)).spatial
    assert not told[:, :2].any()
    assert torch.allclose(told[:, 2], 1 - 2 * depth)
    assert told.mean((0, 2, 3))[3:].tolist() == [1, 0, 1, 0]


def test_a_picture_to_be_varied_is_tokens_of_its_patches():
    encoders = randomised(Encoders({"like": Variation(2, size=8, patch=4, width=16, depth=0)}))
    x = torch.randn(3, 2, 8, 8)
    told = encoders.encoded(encoders(like=x), (5, 5))
    module = encoders.modules_by_name["like"]
    patches = x.reshape(3, 2, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(3, 4, 32)
    h = patches @ module.patches.weight.flatten(1).T + module.patches.bias + module.positions
    h = F.rms_norm(h, (16,), module.transformer.norm.weight)
    assert torch.allclose(told.tokens, h, atol=1e-5)
    assert torch.allclose(told.vector, h.mean(1), atol=1e-5)
    bigger = encoders.encoded(encoders(like=F.interpolate(x, (16, 16))), (5, 5))
    assert torch.allclose(bigger.tokens, told.tokens, atol=1e-5)
    assert relative(encoders.encoded(encoders(like=x.flip(-1)), (5, 5)).tokens, told.tokens) > 0.1


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Picture(3).read(torch.zeros(2, 1, 4, 4)), r"expected \(samples, 3, sides ...\), got \(2, 1, 4, 4\)"),
        (lambda: Picture(1).read([torch.zeros(1, 4, 4), torch.zeros(1, 5, 5)]), "one shape, got 1x4x4, 1x5x5"),
        (lambda: Picture(1).read(torch.full((1, 1, 2, 2), torch.nan)), "NaN"),
        (lambda: Depth().read(torch.zeros(2, 3, 4, 4)), "expected depth"),
        (lambda: Depth().read(torch.full((1, 2, 2), torch.nan)), "NaN"),
        (lambda: Depth(0.0, 1.0, inverse=True), "0 < near < far"),
        (lambda: Depth(2.0, 1.0), "near < far"),
        (
            lambda: Layout(3).read(torch.full((1, 2, 2), 3)),
            r"class 3 in a mask: classes=3 are 0 ... 2, and 255 is unknown",
        ),
        (lambda: Layout(3).read(torch.zeros(1, 2, 2)), "whole numbers"),
        (lambda: Layout(300), "without the unknown one"),
        (lambda: Picture(0), "channels >= 1"),
        (lambda: Picture(noise=1.5), "noise from 0 to 1"),
        (lambda: Picture(size=-1), "size >= 0"),
        (lambda: low(0.5).noised("low", 0.6), "noise of level 0.6 in low: training has levels from 0 to 0.5"),
        (lambda: low(0.5).noised("high", 0.1), "high takes no noise; of the given conditions there do: low"),
        (lambda: low(0.0).noised("low", 0.1), "low takes no noise; of the given conditions there do: none"),
        (lambda: Variation(1, size=9), "a patch that divides size"),
        (lambda: Variation(1).read(torch.zeros(1, 1, 4)), "2 sides"),
    ],
)
def test_mistakes_are_refused(make, why):
    with pytest.raises(InputError, match=why):
        make()


def shapes(n=16, side=8, seed=0):
    """Bright squares at random places, (n, 1, side, side) in {-1, 1}."""
    g = torch.Generator().manual_seed(seed)
    x = -torch.ones(n, 1, side, side)
    for k in range(n):
        i, j = torch.randint(0, side - 3, (2,), generator=g).tolist()
        x[k, :, i : i + 3, j : j + 3] = 1
    return x


def test_maps_are_learned_each_and_together():
    x = shapes()
    encoders = Encoders({"low": Picture(1), "depth": Depth(), "mask": Layout(2)})
    low, mask = F.avg_pool2d(x, 2), (x[:, 0] > 0).long()
    assert_learned(encoders, x, {"low": low, "depth": 1 - mask.float(), "mask": mask})


def test_variations_are_learned():
    x = torch.tensor([-1.0, 0.0, 1.0])[torch.arange(16) % 3][:, None, None, None].expand(16, 1, 8, 8)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    encoders = Encoders({"like": Variation(1, size=8, width=16, depth=1)})
    assert_learned(encoders, x, {"like": x.flip(-1)}, cross=(0,))
