"""Retrieval of captions' pictures: certain and hopeless cases, chance, ties, and repeated captions."""

import math

import pytest
import torch

from undiffuse import InputError
from undiffuse.evals import retrieval


def numbers(n, seed=0, width=6):
    """Independent features of n samples, as pictures of one pixel."""
    return torch.randn(n, width, 1, 1, generator=torch.Generator().manual_seed(seed))


def flat(x):
    """The elements as features."""
    return x.flatten(1)


TEXTS = [f"caption {k}" for k in range(40)]


def test_pictures_themselves_are_found_and_far_ones_never():
    x = numbers(40)
    assert retrieval(x, x, TEXTS, flat).value == 1
    assert retrieval(x + 1e-3 * numbers(40, 1), x, TEXTS, flat).value == 1
    line = torch.arange(40.0).reshape(40, 1, 1, 1)
    # each sample lies on another caption's picture, and beyond it are all others
    assert retrieval(line[[39] * 39 + [0]], line, TEXTS, flat, among=40).value == 0


@pytest.mark.parametrize("among", [2, 10])
def test_features_that_say_nothing_have_one_of_so_many(among):
    n = 3000
    x, pictures = numbers(n, 1), numbers(n, 2)
    found, p = retrieval(x, pictures, [str(k) for k in range(n)], flat, among), 1 / among
    assert abs(found.value - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert found.low < p < found.high


def test_the_share_of_a_sample_is_the_chance_of_drawing_only_farther_captions():
    # distances of sample 0 from the pictures are 0 ... 39, and its own is at rank r: none of the r nearer ones is drawn
    line, r, n = torch.arange(40.0).reshape(40, 1, 1, 1), 6, 2000
    texts = [TEXTS[r]] * n + TEXTS
    x = torch.cat([torch.zeros(n, 1, 1, 1), line])
    pictures = torch.cat([line[[r] * n], line])
    hits = retrieval(x, pictures, texts, flat, among=10).value * (n + 40) - 40  # the last 40 are found for certain
    p = math.comb(39 - r, 9) / math.comb(39, 9)
    assert abs(hits / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_equally_near_pictures_share_the_hit():
    same = torch.zeros(40, 1, 1, 1)
    assert retrieval(same, same, TEXTS, flat).value == pytest.approx(0.1, abs=1e-12)


def test_captions_that_occur_several_times_are_one_choice():
    x = numbers(8)
    repeated = [i for i in range(8) for _ in range(3)]
    assert retrieval(x[repeated], x[repeated], [TEXTS[i] for i in repeated], flat, among=8).value == 1
    with pytest.raises(InputError, match="8 different captions for a choice among 9: take from 2 to 8"):
        retrieval(x[repeated], x[repeated], [TEXTS[i] for i in repeated], flat, among=9)


def test_the_choice_is_a_function_of_the_seed():
    x, pictures = numbers(40, 1), numbers(40, 2)
    first, again, other = (retrieval(x, pictures, TEXTS, flat, among=3, seed=s).value for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("texts", "pictures"), [(TEXTS[:39], 40), (TEXTS, 39)])
def test_other_numbers_are_refused(texts, pictures):
    with pytest.raises(InputError, match=f"40 samples, {pictures} pictures and {len(texts)} captions: give one of"):
        retrieval(numbers(40), numbers(pictures), texts, flat)
