import numpy as np

from plots import draw_neighbours


def test_every_image_stands_above_its_nearest():
    random = np.random.default_rng(0)
    images, nearest = random.integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    figure = draw_neighbours(images, nearest, np.array([12.34, 20.0, 30.06]))
    shown = [panel.images[0].get_array() for panel in figure.axes]
    assert all(
        np.array_equal(picture, image)
        for picture, image in zip(shown, [*images, *nearest], strict=True)
    )
    assert [panel.get_xlabel() for panel in figure.axes[3:]] == ["12.3", "20.0", "30.1"]
    assert [panel.get_ylabel() for panel in figure.axes] == ["probe", "", "", "nearest", "", ""]
