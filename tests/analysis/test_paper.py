import pandas as pd
import pytest

from analysis.paper import against_paper, curves, judge


def frame(**networks):
    """A frame of networks called kind_depth with the given stds."""
    rows = []
    for name, stds in networks.items():
        kind, depth = name.split("_")
        rows += [
            {"network": f"{kind}-{depth}", "kind": kind, "depth": int(depth), "layer": layer, "std": std}
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
        ("plain", 20), ("plain", 56), ("residual", 20), ("residual", 56), ("residual", 110)
    }  # fmt: skip


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


def test_the_papers_claims_hold_in_the_paper():
    assert [claim.verdict for claim in judge(curves())] == ["holds", "holds"]


@pytest.mark.parametrize(
    ("networks", "verdicts"),
    [
        ({"residual_20": [1], "plain_20": [2]}, ["holds", "cannot be judged here"]),
        ({"residual_20": [2], "plain_20": [1]}, ["does not hold", "cannot be judged here"]),
        ({"residual_20": [2], "plain_20": [2]}, ["does not hold", "cannot be judged here"]),
        ({"residual_20": [2], "plain_56": [3]}, ["cannot be judged here", "cannot be judged here"]),
        ({"residual_20": [2], "residual_56": [1]}, ["cannot be judged here", "holds"]),
        ({"residual_20": [2], "residual_56": [1], "residual_110": [1.5]}, ["cannot be judged here", "does not hold"]),
        ({"other_20": [2]}, ["cannot be judged here", "cannot be judged here"]),
    ],
)
def test_verdicts(networks, verdicts):
    assert [claim.verdict for claim in judge(frame(**networks))] == verdicts


def test_the_evidence_is_in_means_over_layers():
    below, deeper = judge(frame(residual_56=[1.0, 3.0], plain_56=[1.0, 2.0], residual_20=[4.0, 4.0]))
    assert below.evidence == "residual-56 2.000 >= plain-56 1.500"
    assert deeper.evidence == "residual-56 2.000 < residual-20 4.000"
