import pandas as pd

from plots.style import DASHES, PAPER_COLORS, styles


def networks(*rows):
    return pd.DataFrame(rows, columns=["network", "kind", "depth"]).convert_dtypes()


def test_the_papers_five_networks_look_as_in_the_paper():
    look = styles(
        networks(
            ("plain-20", "plain", 20), ("plain-56", "plain", 56),
            ("resnet-20", "residual", 20), ("resnet-56", "residual", 56), ("resnet-110", "residual", 110),
        )
    )  # fmt: skip
    assert {name: style["label"] for name, style in look.items()} == {
        "plain-20": "plain-20", "plain-56": "plain-56",
        "resnet-20": "ResNet-20", "resnet-56": "ResNet-56", "resnet-110": "ResNet-110",
    }  # fmt: skip
    yellow, red, black = (0.75, 0.75, 0), (1, 0, 0), (0, 0, 0)
    assert [style["color"] for style in look.values()] == [yellow, red, yellow, red, black]
    assert [style.get("dashes") for style in look.values()] == [DASHES["plain"]] * 2 + [None] * 3


def test_other_networks_get_colours_of_their_own():
    for count in (1, 6, 20):
        look = styles(networks(*[(f"resnet-{6 * n + 26}", "residual", 6 * n + 26) for n in range(count)]))
        used = [tuple(style["color"]) for network, style in look.items()]
        assert len(set(used)) == count
        own = [c for network, c in zip(look, used, strict=True) if network not in ("resnet-56", "resnet-110")]
        assert not set(own) & set(PAPER_COLORS.values())


def test_two_networks_of_one_depth_and_kind_differ():
    look = styles(networks(("a", "residual", 56), ("b", "residual", 56), ("c", "plain", 56), ("d", "other", pd.NA)))
    assert look["a"]["color"] == PAPER_COLORS[56] == look["c"]["color"]
    assert len({tuple(look[name]["color"]) for name in "abd"}) == 3
    assert [look[name]["label"] for name in "abcd"] == list("abcd")
