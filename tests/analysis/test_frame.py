import pandas as pd

from analysis.frame import COLUMNS, make_frame


def test_columns_order_types_and_values():
    frame = make_frame([{"std": 0.5, "layer": 2, "name": "conv1"}], network="resnet-8", depth=8, source="batchnorm")
    expected = pd.DataFrame(
        {
            "network": ["resnet-8"], "kind": [None], "depth": [8], "layer": [2], "name": ["conv1"], "norm": [None],
            "stage": [None], "channels": [None], "height": [None], "width": [None], "images": [None], "count": [None],
            "mean": [None], "std": [0.5], "within": [None], "between": [None], "source": ["batchnorm"],
        }
    ).astype(frame.dtypes)  # fmt: skip
    pd.testing.assert_frame_equal(frame, expected)
    integers = ["depth", "layer", "stage", "channels", "height", "width", "images", "count"]
    assert [column for column in COLUMNS if frame[column].dtype == "Int64"] == integers


def test_empty_numbers_are_empty_in_a_csv():
    line = make_frame([{"std": 0.5, "layer": 2}], network="a").to_csv(index=False).splitlines()[1]
    assert line == "a,,,2,,,,,,,,,,0.5,,,"
