import pandas as pd
import pytest

from analysis.paper import CLAIM_COLUMNS, against_paper, curves, judge, verdict_of


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


def test_the_papers_curves():
    paper = curves()
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
    pd.testing.assert_frame_equal(curves()[["network", "layer", "std"]], shared)


def test_the_paper_against_itself_and_scaled():
    paper = curves()
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


def verdicts(claims):
    """Of each statement, in the order of its numbers."""
    return [numbers["verdict"].tolist() for _, numbers in claims.groupby("claim")]


YES, NO, OPEN = ["holds"], ["does not hold"], ["cannot be judged here"]


def test_the_papers_claims_hold_in_the_paper():
    below, deeper, less = verdicts(judge(curves()))
    assert (below, deeper, less) == (YES * 4, YES * 3, OPEN)


@pytest.mark.parametrize(
    ("networks", "below", "deeper"),
    [
        ({"residual_20": [1], "plain_20": [2]}, YES * 2, OPEN),
        ({"residual_20": [2], "plain_20": [1]}, NO * 2, OPEN),
        ({"residual_20": [2], "plain_20": [2]}, NO * 2, OPEN),
        (
            {"residual_20": [1, 1, 4], "plain_20": [2, 2, 1]},
            NO + YES,
            OPEN,
        ),  # mean above, two of three layers below
        (
            {"residual_20": [1, 5, 1, 5], "plain_20": [9, 4, 9, 4]},
            YES + NO,
            OPEN,
        ),  # half of the layers is not most
        ({"residual_20": [2], "plain_56": [3]}, OPEN, OPEN),
        ({"residual_20": [2], "residual_56": [1]}, OPEN, YES),
        ({"residual_20": [2], "residual_56": [1], "residual_110": [1.5]}, OPEN, YES * 2 + NO),
        ({"other_20": [2], "residual_20": [1]}, OPEN, OPEN),
    ],
)
def test_verdicts(networks, below, deeper):
    assert verdicts(judge(frame(**networks)))[:2] == [below, deeper]


def test_networks_for_other_images_are_not_compared():
    """resnet-34 is for ImageNet, resnet-20 and resnet-56 for CIFAR-10, and there may be a resnet-50
    for either.
    """
    networks = frame(
        residual_20=[1.0] * 3, residual_34=[2.0] * 4, residual_56=[3.0] * 3, plain_34=[1.0] * 3
    )
    cifar = networks["depth"].isin([20, 56]) | (networks["kind"] == "plain")
    widths = networks["layer"].map({1: 16, 2: 32, 3: 64}).where(cifar, 2 ** (networks["layer"] + 5))
    below, deeper, _ = (
        found for _, found in judge(networks.assign(channels=widths)).groupby("claim")
    )
    assert below["verdict"].tolist() == OPEN
    assert deeper["networks"].tolist() == ["residual-56, residual-20"]


def test_networks_of_other_lengths_of_training_are_marked():
    networks = frame(residual_20=[2.0], residual_56=[1.0], plain_20=[3.0])
    lengths = {"residual-20": 64_000, "residual-56": 4_000, "plain-20": 64_000}
    for known, expected in (
        (lengths, [False] * 2 + [True]),
        (lengths | {"residual-56": None}, [False] * 3),
    ):
        claims = judge(networks, iterations=known).dropna(subset="value")
        assert (
            claims["sentence"].str.endswith("; after 4,000 and 64,000 iterations").tolist()
            == expected
        )
        assert (claims["verdict"] == "cannot be judged here").tolist() == expected


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
    claims = judge(frame(residual_20=[1.0, 3.0], plain_20=[2.0, 2.0]))
    assert (
        claims["sentence"][0] == "residual-20 has a mean std of 2.000, as much as plain-20 (2.000)"
    )


def test_the_numbers_of_the_first_two_claims():
    claims = judge(frame(residual_56=[1.0, 3.0], plain_56=[1.5, 2.0], residual_20=[4.0, 4.0]))
    assert list(claims.columns) == list(CLAIM_COLUMNS)
    found = (
        claims[["claim", "networks", "measure", "value", "expected", "sentence"]]
        .iloc[:3]
        .to_numpy()
        .tolist()
    )
    assert found == [
        [
            1,
            "residual-56, plain-56",
            "difference of mean std",
            0.25,
            "< 0",
            "residual-56 has a mean std of 2.000, 14.3 % more than plain-56 (1.750)",
        ],
        [
            1,
            "residual-56, plain-56",
            "share of layers below",
            0.5,
            "> 0.5",
            "residual-56 is below plain-56 in 1 of 2 layers",
        ],
        [
            2,
            "residual-56, residual-20",
            "difference of mean std",
            -2.0,
            "< 0",
            "residual-56 has a mean std of 2.000, 50.0 % less than residual-20 (4.000)",
        ],
    ]


def test_the_third_claim_is_about_blocks():
    networks = frame(residual_8=[1.0], residual_14=[1.0], plain_8=[1.0])
    ratios = {"residual-8": [0.2, 0.9, 0.4], "residual-14": [0.1, 0.3, 0.5, 0.3, 0.3, 9.0]}
    blocks = pd.DataFrame(
        [{"network": name, "ratio": ratio} for name, values in ratios.items() for ratio in values]
    )
    [row] = judge(networks, blocks)[lambda claims: claims["claim"] == 3].to_dict("records")
    assert row["value"] == pytest.approx(-0.1)
    assert (row["verdict"], row["networks"]) == ("holds", "residual-14, residual-8")
    assert row["sentence"] == (
        "a block's branch has 0.300 times the std of its shortcut in residual-14, 0.400 times in residual-8 "
        "(medians over blocks)"
    )
    reverse = blocks.assign(ratio=1 / blocks["ratio"])
    assert verdicts(judge(networks, reverse))[2] == NO
    assert verdicts(judge(networks, blocks.iloc[:0]))[2] == OPEN


def test_what_cannot_be_judged_says_why():
    claims = judge(frame(residual_20=[1.0]))
    assert claims["sentence"].tolist() == [
        "no residual and plain network of one depth",
        "no two residual networks of different depth",
        "no two residual networks of different depth whose blocks ran on images",
    ]
    assert claims["value"].isna().all()
