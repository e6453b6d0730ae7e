"""Counter-based random numbers: a function of (seed, index), uniform, and the same in words as in whole numbers."""

import torch

from undiffuse.seeds import mix, seed_of, uniform


def test_splitmix64_is_the_published_generator():
    """The first outputs of the reference implementation from seed 0 (Vigna, splitmix64.c)."""
    golden = 0x9E3779B97F4A7C15
    assert [mix(i * golden) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_draws_are_the_whole_numbers_top_bits():
    for seed in (0, 5, -1, 2**63 + 11):
        index = torch.tensor([0, 1, 2, 77, 2**40, 2**62])
        expected = [((mix(k ^ mix(seed % 2**64)) >> 12) + 0.5) / 2**52 for k in index.tolist()]
        assert uniform(seed, index).tolist() == expected


def test_draws_are_uniform_and_unrelated_between_indices_and_seeds():
    n = 200_000
    a, b = (uniform(seed, torch.arange(n)) for seed in (1, 2))
    bound = 5 / n**0.5
    counts = torch.histc(a, 100, 0, 1)
    assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 170  # chi-square of 99 degrees: mean 99, std 14
    for other in (b, a.roll(1), a.roll(64)):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < bound
    assert 0 < float(a.min()) < float(a.max()) < 1


def test_seeds_of_other_numbers_are_others():
    seeds = {seed_of(*parts) for parts in [(i, j) for i in range(50) for j in range(50)] + [(1,), (2,)]}
    assert len(seeds) == 2502
    assert all(0 <= s < 2**63 for s in seeds)
