import math
from functools import reduce
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from analysis.measuring.moments import BLOCK, GROUPS, Moments, blocks, jackknife


def two_pass(x):
    """Count, mean and M2 of every channel, and the std of all values: slow, obvious, float64."""
    channels = x.double().transpose(0, 1).flatten(1)  # (N, C, H, W) -> (C, N * H * W)
    mean = channels.mean(1)
    m2 = ((channels - mean[:, None]) ** 2).sum(1)
    values = x.double().flatten()
    std = ((values - values.mean()) ** 2).mean().sqrt().item()
    return channels.shape[1], mean, m2, std


def check(moments, x, rel):
    count, mean, m2, std = two_pass(x)
    assert moments.count == count
    assert moments.std == pytest.approx(std, rel=rel, abs=0)
    torch.testing.assert_close(moments.m2, m2, rtol=2 * rel, atol=0)
    scale = (m2 / count).sqrt()
    assert ((moments.mean - mean).abs() <= rel * (scale + mean.abs())).all()


def responses(shape=(64, 5, 9, 7), offset=2.0, dtype=torch.float32):
    """Responses whose channels differ in mean and spread."""
    channel = (1, shape[1], 1, 1)
    return torch.randn(shape, dtype=dtype) * torch.rand(
        channel, dtype=dtype
    ) + offset * torch.randn(channel, dtype=dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_one_batch_is_the_two_pass_reference(dtype, rel, layout):
    x = responses(dtype=dtype).to(memory_format=layout)
    check(Moments.of(x), x, rel)


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e5, 1e6])
def test_means_far_from_zero(offset):
    x = responses(offset=offset)
    check(Moments.of(x), x, 1e-6)


def test_dead_channels_beside_live_ones():
    x = responses()
    x[:, 1] = 3.0
    x[:, 3] = 0.0
    moments = Moments.of(x)
    assert moments.m2[1] == moments.m2[3] == 0
    check(moments, x, 1e-6)


@pytest.mark.parametrize("shape", [(4096, 16, 32, 32), (512, 64, 56, 56)])
def test_large_batches_in_channels_last(shape):
    x = torch.randn(shape).mul_(1.5).add_(4).contiguous(memory_format=torch.channels_last)
    expected = x.double().std(correction=0).item()
    assert Moments.of(x).std == pytest.approx(
        expected, rel=2e-7
    )  # runs of any length: 1e-6 and more


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(56, 56), (512, 512), (512, 2000)])
def test_large_maps_of_which_a_part_is_flat(size, layout):
    """One value that is added up many times in float32 is rounded the same way every time."""
    x = torch.randn(1, 3, *size).add_(0.7)
    x[:, :, : size[0] * 4 // 5] = torch.tensor([0.3, 1.1, 2.7]).view(3, 1, 1)
    x = x.contiguous(memory_format=layout)
    expected = x.double().std(correction=0).item()
    assert Moments.of(x).std == pytest.approx(expected, rel=3e-6)


def test_other_defaults_of_torch_change_nothing():
    x = responses().to(torch.bfloat16, memory_format=torch.channels_last)
    expected = Moments.of(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = Moments.of(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.m2, expected.m2)


def test_nothing_merges_with_anything():
    some, none = Moments.of(responses()), Moments.empty(5)
    for merged in (some.merge(none), none.merge(some)):
        assert torch.equal(merged.means, some.means)
        assert torch.equal(merged.m2s, some.m2s)
        assert merged.count == some.count
    assert none.merge(none).count == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype, layout):
    x = responses().to(dtype, memory_format=layout)
    check(Moments.of(x), x, 1e-6)


@pytest.mark.parametrize("size", [1, 3, 16, 63, 64])
def test_any_batch_size_gives_the_same(size):
    x = responses()
    first, *rest = [Moments.of(part) for part in x.split(size)]
    for part in rest:
        first = first.merge(part)
    check(first, x, 1e-6)
    assert first.std == pytest.approx(Moments.of(x).std, rel=1e-7)


def test_any_order_and_tree_of_merges_gives_the_same():
    parts = [Moments.of(part) for part in responses(dtype=torch.float64).split([10, 1, 30, 23])]
    a, b, c, d = parts
    chain = a.merge(b).merge(c).merge(d)
    tree = d.merge(b).merge(c.merge(a))
    assert tree.count == chain.count
    torch.testing.assert_close(tree.mean, chain.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(tree.m2, chain.m2, rtol=1e-13, atol=0)


@settings(deadline=None)
@example(
    parts=[3, 1, 4],
    channels=3,
    size=(4, 4),
    magnitude=6,
    layout=torch.contiguous_format,
    random=Random(0),
)
@example(
    parts=[1],
    channels=1,
    size=(1, 1),
    magnitude=6,
    layout=torch.contiguous_format,
    random=Random(0),
)
@given(
    parts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    channels=st.integers(1, 5),
    size=st.sampled_from([(1, 1), (1, 3), (4, 4)]),
    magnitude=st.floats(-6, 6),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    random=st.randoms(use_true_random=False),
)
def test_any_split_order_and_merge_is_the_two_pass(
    parts, channels, size, magnitude, layout, random
):
    """To 1e-12 of the std, times how many stds the mean is away: up to 10^6 and more."""
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    normal = torch.randn(sum(parts), channels, *size, generator=generator, dtype=torch.float64)
    x = (normal + 10**magnitude).contiguous(memory_format=layout)
    pile = [Moments.of(part) for part in x.split(parts)]
    while len(pile) > 1:
        random.shuffle(pile)
        pile.append(pile.pop().merge(pile.pop()))
    [moments] = pile
    count, mean, m2, std = two_pass(x)
    largest = x.abs().max().item()
    assert moments.count == count
    assert ((moments.mean - mean).abs() <= 1e-12 * largest).all()
    for ours, theirs in zip(
        [moments.std, *(moments.m2 / count).sqrt()], [std, *(m2 / count).sqrt()], strict=True
    ):
        assert abs(ours - theirs) <= 1e-12 * max(
            theirs, largest
        )  # that is, std * max(1, |mean| / std)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e30, 1e-40])
def test_a_single_value_has_no_spread(value):
    moments = Moments.of(torch.full((1, 1, 1, 1), value))
    assert (moments.count, moments.std) == (1, 0)
    assert moments.mean.item() == pytest.approx(value, rel=1e-6, abs=1e-44)


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormal_values(dtype, layout):
    smallest = torch.finfo(dtype).smallest_normal
    x = responses(dtype=dtype).mul(smallest / 8).contiguous(memory_format=layout)
    assert 0 < x.abs().max() < smallest
    moments = Moments.of(x)
    assert moments.std == pytest.approx(two_pass(x)[3], abs=1e-6 * smallest)
    assert ((moments.mean - two_pass(x)[1]).abs() <= 1e-6 * smallest).all()


@LAYOUTS
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-22, 1e-18, 1e18, 1e25, 1e37])
def test_values_whose_squares_float32_does_not_hold(scale, layout):
    """With means of zero too: what vanishes below float32's smallest number cannot be seen in the
    sums.
    """
    half = torch.randn(16, 3, 8, 8)
    x = torch.cat([half, -half]).mul(scale).contiguous(memory_format=layout)
    x[:, 2] = x[:, 2].abs()
    check(Moments.of(x), x, 1e-6)


def test_a_billion_values_by_merging():
    x = responses((8, 3, 5, 5), dtype=torch.float64)
    moments = Moments.of(x)
    while moments.count < 10**9:
        moments = moments.merge(moments)
    assert moments.std == pytest.approx(two_pass(x)[3], rel=1e-12)


def test_std_splits_into_within_and_between():
    moments = Moments.of(torch.tensor([[[[0.0, 2.0]], [[5.0, 7.0]]]]))
    assert (moments.within, moments.between) == (1.0, 2.5)
    assert moments.std == (1 + 6.25) ** 0.5


def test_merging_leaves_both_as_they_were():
    a, b = Moments.of(responses()), Moments.of(responses())
    before = [part.clone() for part in (a.means, a.m2s, b.means, b.m2s)]
    a.merge(b)
    assert all(map(torch.equal, before, (a.means, a.m2s, b.means, b.m2s)))


def test_a_large_count_and_a_small_one():
    first = torch.zeros(GROUPS, 1, dtype=torch.float64)
    first[0] = 1e12
    many = Moments(first, 0 * first, first)
    one = Moments.of(torch.full((1, 1, 1, 1), 5.0))
    merged = many.merge(one)
    assert merged.count == 10**12 + 1
    assert merged.mean.item() == pytest.approx(5e-12)
    assert merged.std == pytest.approx(1.0)


def test_what_cannot_be_done():
    with pytest.raises(ValueError, match=r"no values in a response of shape \(0, 5, 9, 7\)"):
        Moments.of(responses((0, 5, 9, 7)))
    with pytest.raises(ValueError, match="cannot merge moments of 5 and 4 channels"):
        Moments.of(responses()).merge(Moments.of(responses((2, 4, 3, 3))))


# Groups of images, and the sampling error


def group_of(position):
    return position // BLOCK % GROUPS


def in_batches(x, size, first=0, order=None):
    """The moments of images, measured in batches of one size."""
    starts = list(range(0, len(x), size))
    parts = [Moments.of(x[i : i + size], first + i) for i in order or starts]
    return reduce(Moments.merge, parts)


@LAYOUTS
@pytest.mark.parametrize("size", [1, 7, 32, 100, 1500])
@pytest.mark.parametrize("first", [0, 17, 640])
def test_each_group_has_the_moments_of_its_images(size, first, layout):
    x = responses((1500 if size > 1 else 50, 3, 4, 4)).contiguous(memory_format=layout)
    moments = in_batches(x, size, first)
    groups = group_of(torch.arange(first, first + len(x)))
    for group in range(GROUPS):
        values = x[groups == group].double().transpose(0, 1).flatten(1)
        assert moments.counts[group].tolist() == [values.shape[1]] * 3
        if values.numel():
            mean, m2 = values.mean(1), values.var(1, correction=0) * values.shape[1]
            torch.testing.assert_close(moments.means[group], mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(moments.m2s[group], m2, rtol=2e-6, atol=0)


def test_blocks_begin_at_multiples_of_32():
    assert blocks(30, 40) == [(0, 0, 2), (1, 2, 34), (2, 34, 40)]
    assert blocks(0, 32) == [(0, 0, 32)]
    assert blocks(32 * 19 + 31, 2) == [(19, 0, 1), (0, 1, 2)]
    assert blocks(None, 70) == [(0, 0, 70)]


@pytest.mark.parametrize("parts", [[800, 400], [399, 801], [1, 33, 1166]])
def test_processes_that_share_the_images_change_nothing(parts):
    x = responses((1200, 3, 2, 2))
    starts = [sum(parts[:i]) for i in range(len(parts))]
    shares = [
        in_batches(part, 100, start) for start, part in zip(starts, x.split(parts), strict=True)
    ]
    merged, whole = reduce(Moments.merge, shares), Moments.of(x)
    assert torch.equal(merged.counts, whole.counts)
    assert merged.std_error == pytest.approx(whole.std_error, rel=1e-5)
    assert merged.std_without_groups().tolist() == pytest.approx(
        whole.std_without_groups().tolist(), rel=1e-6
    )


def test_std_without_groups_is_that_of_the_other_images():
    x = responses((900, 3, 2, 2), dtype=torch.float64)
    groups = group_of(torch.arange(900))
    found = Moments.of(x).std_without_groups().tolist()
    expected = [x[groups != group].std(correction=0).item() for group in range(GROUPS)]
    assert found == pytest.approx(expected, rel=1e-12)
    mean = sum(expected) / GROUPS
    error = (sum((std - mean) ** 2 for std in expected) * (GROUPS - 1) / GROUPS) ** 0.5
    assert Moments.of(x).std_error == pytest.approx(error, rel=1e-9)


def test_the_jackknife_gives_the_error_of_normal_responses():
    """The std of n normal values has an error of 1 / sqrt(2 n)."""
    torch.manual_seed(0)
    errors, stds = [], []
    for _ in range(200):
        moments = Moments.of(torch.randn(1280, 1, 1, 4, dtype=torch.float64))
        errors.append(moments.std_error)
        stds.append(moments.std)
    expected = (2 * 1280 * 4) ** -0.5
    assert sum(errors) / 200 == pytest.approx(expected, rel=0.05)
    assert torch.tensor(stds).std().item() == pytest.approx(
        expected, rel=0.15
    )  # 1 / sqrt(400): 5 %


def test_images_of_different_spread_have_a_larger_error():
    torch.manual_seed(1)
    spread = torch.rand(1280, 1, 1, 1).mul(2).exp()
    x = torch.randn(1280, 2, 8, 8) * spread
    naive = Moments.of(x).std * (2 * x.numel()) ** -0.5
    assert Moments.of(x).std_error > 5 * naive


def test_a_single_outlier_is_flagged():
    x = torch.randn(1280, 2, 4, 4)
    assert Moments.of(x).dominated is False
    x[700] *= 100
    assert Moments.of(x).dominated is True
    x = torch.randn(1280, 2, 4, 4)
    x[700] += 100  # a mean that is far from the others counts as well
    assert Moments.of(x).dominated is True


@pytest.mark.parametrize("images", [1, 32, 608, 639])
def test_too_few_images_have_no_error(images):
    moments = Moments.of(torch.randn(images, 2, 2, 2))
    assert math.isnan(moments.std_error) or images == 639  # 31 images in the last group
    assert (moments.dominated is None) == math.isnan(moments.std_error)
    assert Moments.of(torch.randn(640, 2, 2, 2)).std_error > 0
    assert math.isnan(Moments.of(torch.randn(640, 2, 2, 2), None).std_error)


def test_the_jackknife_of_a_mean_is_the_textbook_error():
    values = torch.randn(GROUPS, dtype=torch.float64)
    without = (values.sum() - values) / (GROUPS - 1)
    expected = values.std() / GROUPS**0.5
    assert jackknife(without).item() == pytest.approx(expected.item(), rel=1e-12)
