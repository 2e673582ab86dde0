"""Two curves in numbers, and the test of two groups of seeds against cases with known answers."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from analysis.statistics import COLUMNS, compare_frames, permutation_test, summarise_pair


def frame(name, stds, channels=16, source="hooks"):
    rows = range(1, len(stds) + 1)
    return pd.DataFrame(
        {
            "network": name,
            "layer": rows,
            "name": [f"conv{i}" for i in rows],
            "stage": 1,
            "channels": channels,
        }
        | {"std": np.asarray(stds, float), "source": source}
    )


def test_networks_of_one_layout_are_aligned_by_layer():
    found = compare_frames(frame("a", [1, 2, 4]), frame("b", [2, 2, 1]))
    assert list(found.columns) == list(COLUMNS)
    assert found["layer"].tolist() == [1, 2, 3]
    assert found["difference"].tolist() == [1, 0, -3]
    assert found["position"].tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert set(zip(found["first"], found["second"], strict=True)) == {("a", "b")}


def test_others_are_aligned_by_relative_depth():
    """Four layers are at 1/8, 3/8, 5/8 and 7/8; two at 1/4 and 3/4: half-way between them."""
    deep, shallow = frame("deep", [1, 3, 5, 9]), frame("shallow", [2, 2])
    found = compare_frames(deep, shallow)
    assert found["position"].tolist() == [0.25, 0.75]
    assert found["std_first"].tolist() == pytest.approx([2, 7])
    assert found["difference"].tolist() == pytest.approx([0, -5])
    assert compare_frames(shallow, deep)["difference"].tolist() == pytest.approx([0, 5])


def test_rows_in_another_order_are_the_same_network():
    one = frame("a", [1, 2, 4])
    assert compare_frames(one, one.iloc[::-1])["difference"].tolist() == [0, 0, 0]


def test_a_pair_in_numbers():
    found = summarise_pair(frame("a", [1, 2, 3, 6]), frame("b", [1, 4, 6, 5]))
    assert found["ratio"] == pytest.approx(16 / 12)
    assert (found["largest"], found["layer"], found["name"]) == (3, 3, "conv3")
    assert found["r"] == pytest.approx(np.corrcoef([1, 2, 3, 6], [1, 4, 6, 5])[0, 1])
    assert found["rho"] == pytest.approx(0.8)  # ranks 1 2 3 4 and 1 2 4 3
    assert found["area"] == pytest.approx((0 + 2 + 2 + 0) / 4)  # 6 3 2 1 and 6 5 4 1
    assert found["identical"] is False


def test_the_same_numbers():
    found = summarise_pair(frame("a", [1, 2, 3]), frame("b", [1, 2, 3]))
    assert found["identical"] is True
    assert (found["ratio"], found["largest"], found["area"]) == (1, 0, 0)
    assert (
        summarise_pair(frame("a", [1, 2, 3]), frame("b", [1, 2, 3], channels=8))["identical"]
        is False
    )


@pytest.mark.parametrize("stds", [[1.0], [1.0, 2.0], [2.0, 2.0, 2.0]])
def test_no_correlation_where_there_is_none(stds):
    found = summarise_pair(frame("a", stds), frame("b", stds))
    assert math.isnan(found["r"])
    assert math.isnan(found["rho"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda f: f.iloc[:0],
            "a frame of one network is needed, and this one has: none",
        ),
        (lambda f: pd.concat([f, f.assign(network="b")]), "and this one has: a, b"),
        (
            lambda f: pd.concat([f, f.assign(source="batchnorm")]),
            "and this one has: hooks, batchnorm",
        ),
        (lambda f: f.assign(std=np.nan), "a: NaN or infinity among the stds"),
    ],
)
def test_bad_frames(other, message):
    good = frame("a", [1, 2])
    with pytest.raises(ValueError, match=message):
        compare_frames(good, other(good))


# The test of two groups


def test_a_case_by_hand():
    """{1, 2} and {3, 5}: of the six relabelings two have means at least 2.5 apart: itself and its
    mirror image.
    """
    found = permutation_test([1, 2], [3, 5])
    assert found.difference == 2.5
    assert found.p == pytest.approx(2 / 6)
    assert found.smallest == pytest.approx(2 / 6)
    assert found.interval is None


def test_equal_groups():
    assert permutation_test([1, 2, 3], [1, 2, 3]).p == 1
    assert permutation_test([2, 2], [2, 2, 2]).p == 1


@pytest.mark.parametrize(
    ("sizes", "smallest", "enough"),
    [
        ((1, 1), 1, False),
        ((3, 3), 2 / 20, False),
        ((2, 4), 1 / 15, False),
        ((2, 5), 1 / 21, True),
        ((1, 18), 1 / 19, False),
        ((1, 19), 1 / 20, True),
        ((3, 4), 1 / 35, True),
        ((4, 4), 2 / 70, True),
    ],
)
def test_the_smallest_p_is_reached_by_groups_far_apart(sizes, smallest, enough):
    first, second = np.arange(sizes[0]), 100 + np.arange(sizes[1])
    found = permutation_test(first, second)
    assert found.smallest == pytest.approx(smallest)
    assert (found.interval is not None) == enough
    if sizes != (1, 1):
        assert found.p == pytest.approx(smallest)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 3), (3, 4)])
def test_no_difference_is_rarely_found(n, m):
    """All relabelings of any values are alike likely where there is no difference: P(p <= a) <= a,
    exactly.
    """
    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=n + m).round(1)  # rounded: with ties
        ps = []
        for chosen in itertools.combinations(range(n + m), n):
            rest = [i for i in range(n + m) if i not in chosen]
            ps.append(permutation_test(values[list(chosen)], values[rest]).p)
        for a in np.unique(ps):
            assert np.mean(np.asarray(ps) <= a) <= a + 1e-12


def test_a_planted_shift_is_found():
    rng = np.random.default_rng(1)
    first = rng.normal(1.0, 0.01, 5)
    found = permutation_test(first, first[::-1] + 0.1)
    assert found.p == pytest.approx(2 / 252)
    low, high = found.interval
    assert low < 0.1 < high
    assert high - low < 0.05


def test_the_interval_covers_the_shift():
    """In 95 % of cases at least; 200 cases with 4 and 5 seeds, and a binomial margin of three
    standard errors.
    """
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = permutation_test(rng.normal(0, 1, 4), rng.normal(3, 1, 5)).interval
        hits += low <= 3 <= high
    assert hits / 200 >= 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5


def test_the_interval_is_what_the_test_accepts():
    a, b = np.array([1.0, 1.2, 1.5, 1.1]), np.array([2.0, 2.6, 2.2, 2.4])
    low, high = permutation_test(a, b).interval
    for shift, accepted in (
        (low - 1e-6, False),
        (low + 1e-6, True),
        (high - 1e-6, True),
        (high + 1e-6, False),
    ):
        assert (permutation_test(a + shift, b).p > 0.05) == accepted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none(value):
    with pytest.raises(ValueError, match="NaN or infinity among the values of two groups"):
        permutation_test([value, 1, 2, 3], [1, 2, 3, 4])


def test_a_group_without_networks():
    with pytest.raises(ValueError, match="a group without a network"):
        permutation_test([], [1.0])
    with pytest.raises(ValueError, match="12 and 12 networks have 2,704,156 relabelings"):
        permutation_test(range(12), range(12))
