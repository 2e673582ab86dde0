import numpy as np
import pandas as pd
import pytest

from analysis.paper import COLUMNS, Subject, against_paper, judge, paper_curves, verdict_of


def frame(**networks):
    """A frame of networks called kind_depth with the given stds."""
    rows = []
    for name, stds in networks.items():
        kind, depth = name.split("_")
        rows += [
            {
                "network": f"{kind}-{depth}",
                "kind": kind,
                "depth": int(depth),
                "layer": layer,
                "std": std,
            }
            for layer, std in enumerate(stds, start=1)
        ]
    return pd.DataFrame(rows)


def test_the_papers_paper_curves():
    paper = paper_curves()
    assert list(paper.columns) == ["network", "kind", "depth", "layer", "std"]
    layers = paper.groupby("network", sort=False)["layer"].agg(["min", "max", "count"])
    assert layers.index.tolist() == ["plain-20", "plain-56", "resnet-20", "resnet-56", "resnet-110"]
    assert layers["min"].tolist() == [1] * 5
    assert layers["max"].tolist() == layers["count"].tolist() == [19, 55, 19, 55, 109]
    assert set(zip(paper["kind"], paper["depth"], strict=True)) == {
        ("plain", 20),
        ("plain", 56),
        ("residual", 20),
        ("residual", 56),
        ("residual", 110),
    }


def test_the_papers_curves_are_those_of_the_shared_file():
    from tests.conftest import SHARED, existing

    shared = pd.read_csv(existing(SHARED / "paper" / "fig7.csv"))
    pd.testing.assert_frame_equal(paper_curves()[["network", "layer", "std"]], shared)


def test_the_paper_against_itself_and_scaled():
    paper = paper_curves()
    assert against_paper(paper)["ratio"].tolist() == [1.0] * 5
    scaled = paper.assign(std=paper["std"] * 0.5)
    result = against_paper(scaled)
    assert result["r"].tolist() == pytest.approx([1] * 5)
    assert result["ratio"].tolist() == [0.5] * 5
    assert result["network"].tolist() == paper["network"].drop_duplicates().tolist()


def test_a_network_that_the_paper_does_not_show():
    result = against_paper(frame(residual_32=[1.0, 2.0], residual_20=[1.0] * 18))
    assert result["network"].tolist() == ["residual-32", "residual-20"]
    assert result[["r", "ratio"]].isna().all(axis=None)


def test_constant_curves_have_a_ratio_and_no_correlation():
    [row] = against_paper(frame(residual_20=[1.0] * 19)).to_dict("records")
    assert pd.isna(row["r"])
    assert row["ratio"] == pytest.approx(1 / 1.622, rel=1e-3)


def subject(label, stds, **facts):
    """A network called kind_depth with these stds."""
    kind, depth = label.split("_")
    facts = {"widths": frozenset({16}), **facts}
    return Subject(label.replace("_", "-"), kind, int(depth), std=np.array(stds, float), **facts)


def subjects(**networks):
    return [subject(label, stds) for label, stds in networks.items()]


def verdicts(claims):
    """Of each claim, in the order of its numbers."""
    return [numbers["verdict"].tolist() for _, numbers in claims.groupby("claim")]


YES, NO, OPEN = ["holds"], ["does not hold"], ["cannot be judged here"]


def test_the_papers_claims_hold_in_the_paper():
    networks = [
        subject(f"{kind}_{depth}", layers["std"])
        for (kind, depth), layers in paper_curves().groupby(["kind", "depth"])
    ]
    assert verdicts(judge(networks)) == [YES * 4, YES * 3, OPEN]


@pytest.mark.parametrize(
    ("networks", "below", "deeper"),
    [
        ({"residual_20": [1], "plain_20": [2]}, YES * 2, OPEN),
        ({"residual_20": [2], "plain_20": [1]}, NO * 2, OPEN),
        ({"residual_20": [2], "plain_20": [2]}, NO * 2, OPEN),
        ({"residual_20": [1, 1, 4], "plain_20": [2, 2, 1]}, NO + YES, OPEN),
        ({"residual_20": [1, 5, 1, 5], "plain_20": [9, 4, 9, 4]}, YES + NO, OPEN),
        ({"residual_20": [2], "plain_56": [3]}, OPEN, OPEN),
        ({"residual_20": [2], "residual_56": [1]}, OPEN, YES),
        ({"residual_20": [2], "residual_56": [1], "residual_110": [1.5]}, OPEN, YES * 2 + NO),
        ({"other_20": [2], "residual_20": [1]}, OPEN, OPEN),
    ],
)
def test_verdicts(networks, below, deeper):
    assert verdicts(judge(subjects(**networks)))[:2] == [below, deeper]


def test_networks_for_other_images_are_not_compared():
    """resnet-34 is for ImageNet, resnet-20 and resnet-56 are for CIFAR-10."""
    large = {"widths": frozenset({64, 128})}
    networks = subjects(residual_20=[1], residual_56=[3], plain_34=[1])
    networks.append(subject("residual_34", [2], **large))
    claims = judge(networks)
    assert verdicts(claims)[0] == OPEN
    assert claims["networks"].tolist()[1:2] == ["residual-56, residual-20"]


def test_networks_trained_for_other_numbers_of_iterations_get_no_verdict():
    networks = [subject("residual_20", [2], iterations=64_000), subject("plain_20", [3])]
    networks.append(subject("residual_56", [1], iterations=4_000))
    [row] = judge(networks)[lambda claims: claims["claim"] == 2].to_dict("records")
    assert row["verdict"] == "cannot be judged here"
    assert row["sentence"].endswith("; after 4,000 and 64,000 iterations")
    assert verdicts(judge(networks))[0] == YES * 2  # plain-20's is not known


@pytest.mark.parametrize(("images", "expected"), [(199, OPEN), (200, YES), (None, YES)])
def test_fewer_than_200_images_get_no_verdict(images, expected):
    networks = [subject("residual_20", [2], images=images), subject("residual_56", [1])]
    [row] = judge(networks)[lambda claims: claims["claim"] == 2].to_dict("records")
    assert [row["verdict"]] == expected
    assert row["sentence"].endswith("; on 199 images, fewer than 200") == (images == 199)


@pytest.mark.parametrize(("spread", "expected"), [(0.005, YES), (0.05, OPEN)])
def test_a_difference_within_twice_its_sampling_error_gets_no_verdict(spread, expected):
    """The groups of images are common to both networks, so what they share does not count."""
    common = np.linspace(-9, 9, 20)[:, None]
    own = spread * np.resize([1, -1], 20)[:, None]
    networks = [
        subject("residual_20", [2.0], images=1000, std_without=2.0 + common),
        subject("residual_56", [1.8], images=1000, std_without=1.8 + common + own),
    ]
    [row] = judge(networks)[lambda claims: claims["claim"] == 2].to_dict("records")
    assert row["error"] == pytest.approx(spread * 19**0.5)
    assert [row["verdict"]] == expected


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        (YES, "holds"),
        (NO * 2, "does not hold"),
        (YES + NO, "holds in part"),
        (OPEN, "cannot be judged here"),
        (YES + OPEN, "holds"),
        (OPEN + NO + YES + OPEN, "holds in part"),
    ],
)
def test_what_cannot_be_judged_does_not_count(verdicts, together):
    assert verdict_of(pd.DataFrame({"verdict": verdicts})) == together


def test_equal_means_are_neither_more_nor_less():
    claims = judge(subjects(residual_20=[1, 3], plain_20=[2, 2]))
    words = "residual-20 has a mean std of 2.000, as much as plain-20 (2.000)"
    assert claims["sentence"][0] == words


def test_the_numbers_of_the_first_two_claims():
    claims = judge(subjects(residual_56=[1, 3], plain_56=[1.5, 2], residual_20=[4, 4]))
    assert list(claims.columns) == list(COLUMNS)
    found = claims[["claim", "networks", "measure", "value", "expected", "sentence"]]
    means, share = "difference of mean std", "share of layers below"
    pair, names = "residual-56, plain-56", "residual-56, residual-20"
    words = [
        "residual-56 has a mean std of 2.000, 14.3 % more than plain-56 (1.750)",
        "residual-56 is below plain-56 in 1 of 2 layers",
        "residual-56 has a mean std of 2.000, 50.0 % less than residual-20 (4.000)",
    ]
    assert found.iloc[:3].to_numpy().tolist() == [
        [1, pair, means, 0.25, "< 0", words[0]],
        [1, pair, share, 0.5, "> 0.5", words[1]],
        [2, names, means, -2.0, "< 0", words[2]],
    ]


def test_the_third_claim_is_about_additions():
    ratios = {"residual_8": [0.2, 0.9, 0.4], "residual_14": [0.1, 0.3, 0.5, 0.3, 0.3, 9.0]}
    networks = [subject(label, [1], ratio=np.array(ratio)) for label, ratio in ratios.items()]
    [row] = judge(networks)[lambda claims: claims["claim"] == 3].to_dict("records")
    assert row["value"] == pytest.approx(-0.1)
    assert (row["verdict"], row["networks"]) == ("holds", "residual-14, residual-8")
    assert row["sentence"] == (
        "a block's branch has 0.300 times the std of its shortcut in residual-14, 0.400 times in "
        "residual-8 (medians over blocks)"
    )
    networks = [subject(label, [1], ratio=1 / np.array(ratio)) for label, ratio in ratios.items()]
    assert verdicts(judge(networks))[2] == NO


def test_what_cannot_be_judged_says_why():
    claims = judge(subjects(residual_20=[1]))
    assert claims["sentence"].tolist() == [
        "no residual and plain network of one depth",
        "no two residual networks of different depth",
        "no two residual networks of different depth whose additions were measured on images",
    ]
    assert claims["value"].isna().all()
