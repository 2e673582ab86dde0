import pandas as pd
import pytest

from analysis.measuring.frame import COLUMNS, COLUMNS_0_1, complete, make_frame


def test_columns_order_types_and_values():
    frame = make_frame(
        [{"std": 0.5, "layer": 2, "name": "conv1"}],
        network="resnet-8",
        kind="plain",
        depth=8,
        source="batchnorm",
    )
    expected = pd.DataFrame(
        {
            "network": ["resnet-8"],
            "kind": ["plain"],
            "depth": [8],
            "layer": [2],
            "name": ["conv1"],
            "norm": [None],
            "stage": [None],
            "channels": [None],
            "height": [None],
            "width": [None],
            "images": [None],
            "count": [None],
            "mean": [None],
            "std": [0.5],
            "std_error": [None],
            "within": [None],
            "between": [None],
            "source": ["batchnorm"],
            "dominated": [None],
        }
    ).astype(frame.dtypes)
    pd.testing.assert_frame_equal(frame, expected)
    integers = ["depth", "layer", "stage", "channels", "height", "width", "images", "count"]
    assert [column for column in COLUMNS if frame[column].dtype == "Int64"] == integers


def test_empty_numbers_are_empty_in_a_csv():
    line = make_frame([{"std": 0.5, "layer": 2}], network="a").to_csv(index=False).splitlines()[1]
    assert line == "a,other,,2,,,,,,,,,,0.5,,,,,"


@pytest.mark.parametrize(
    ("network", "layers", "kind", "depth"),
    [
        ("resnet-8", 7, "residual", 8),
        ("plain-14", 13, "plain", 14),
        ("cifar-resnet-50", 49, "residual", 50),
        ("resnet-8", 8, "other", None),  # not as many layers
        ("resnet-34", 33, "other", None),  # of Table 1
        ("resnet-9", 8, "other", None),  # no such network
        ("mine", 7, "other", None),
    ],
)
def test_a_network_of_other_code_may_be_called_as_one_of_the_papers(network, layers, kind, depth):
    rows = [{"layer": layer, "std": 1.0} for layer in range(1, layers + 1)]
    frame = make_frame(rows, network=network)
    assert frame["kind"].tolist() == [kind] * layers
    assert frame["depth"].dropna().unique().tolist() == ([] if depth is None else [depth])
    known = make_frame(rows, network=network, kind="plain", depth=20)
    assert (known["kind"] == "plain").all()
    assert (known["depth"] == 20).all()


def test_files_of_version_0_1_are_completed():
    frame = make_frame([{"std": 0.5, "layer": 2, "std_error": 0.1, "dominated": True}], network="a")
    old = frame[list(COLUMNS_0_1)]
    completed = complete(old)
    assert completed.columns.tolist() == list(COLUMNS)
    assert completed["std_error"].isna().all()
    assert completed["dominated"].dtype == "boolean"
    pd.testing.assert_frame_equal(completed[old.columns], old)
    assert complete(frame)["dominated"].tolist() == [True]
