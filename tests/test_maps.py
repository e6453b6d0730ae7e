"""Maps as conditions: pictures, depth, layouts, and pictures to be varied."""

import pytest
import torch
from torch.nn import functional as F

from tests.test_encoders import assert_learned
from tests.test_nets import randomised, relative
from undiffuse import InputError
from undiffuse.cond import Depth, Encoders, Layout, Picture, Variation
from undiffuse.cond.maps import resized

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
        (lambda: Layout(3).read(torch.full((1, 2, 2), 3)), r"class 3 in a mask: there are 0 ... 2, or 255"),
        (lambda: Layout(3).read(torch.zeros(1, 2, 2)), "whole numbers"),
        (lambda: Layout(300), "without the unknown one"),
        (lambda: Picture(0), "channels >= 1"),
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
