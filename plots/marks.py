"""Which network a drawn artist shows, and which layer each of its points is: what a page needs to
react to it.

    [line] = panel.plot(layers["layer"], layers["std"])
    mark(line, "resnet-56", layers["layer"])
    mark_legend(panel.legend(handles=[line]), [line])

The image itself is not changed by it. `plots.page` reads the marks with `marked`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.legend import Legend

ATTRIBUTE = "layer_responses_mark"  # on the artist: it lives, is copied and is pickled with it


@dataclass(frozen=True)
class Mark:
    """An artist's network, as the frame calls it, and for a line with points to look at the layer
    of each of them.

    iterations: likewise, or nothing where a point is not of one iteration.
    """

    network: str
    layers: tuple[int, ...] = ()
    iterations: tuple[int, ...] = ()

    @property
    def points(self) -> list[tuple[int, ...]]:
        """(layer,) or (layer, iteration) of each."""
        columns = (self.layers, self.iterations) if self.iterations else (self.layers,)
        return list(zip(*columns, strict=True))


def mark(
    artist: Artist, network: str, layers: Iterable[int] = (), iterations: Iterable[int] = ()
) -> None:
    """Say that an artist (a line, a band, a whole panel) shows a network: a page switches it on and
    off with it.

    layers: of a Line2D, which may be invisible: one layer a point, in the order of its points; a
    page shows these layers' rows of its table when one looks at a point. iterations: likewise,
    where the table has rows for several.
    """
    setattr(artist, ATTRIBUTE, Mark(network, tuple(map(int, layers)), tuple(map(int, iterations))))


def mark_legend(legend: Legend, handles: Iterable[Artist]) -> None:
    """Give a legend's lines and texts the networks of the artists (its `handles`, in this order)
    they stand for.
    """
    for handle, line, text in zip(handles, legend.legend_handles, legend.get_texts(), strict=True):
        shown = getattr(handle, ATTRIBUTE, None)
        if shown is not None and line is not None:
            mark(line, shown.network)
            mark(text, shown.network)


def marked(figure: Figure) -> list[tuple[Artist, Mark]]:
    """The marked artists of a figure, panel by panel, in the order in which they were drawn."""
    return [
        (artist, getattr(artist, ATTRIBUTE))
        for artist in figure.findobj(lambda item: hasattr(item, ATTRIBUTE))
    ]
