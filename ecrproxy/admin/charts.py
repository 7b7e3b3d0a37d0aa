"""
Charts of recent traffic: self-contained SVG, with a text for screen readers. Pure.

Charts have steps, not curves: a point is the sum of some seconds, and nothing is known about the time between points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from twisted.web.template import Tag

from ecrproxy.admin.history import Point, Scale, merged
from ecrproxy.admin.units import hit_ratio, rate

WIDTH: Final = 720
HEIGHT: Final = 120
LEAST: Final = 2**10
"""Minimum height of the traffic chart, in bytes per second."""

Height = Callable[[Point], float | None]
"""Returns a point's height from 0 to 1; None if there is nothing to show."""


def hit_chart(points: Sequence[Point], scale: Scale) -> Tag:
    """
    Draw the hit ratio.
    """

    def height(point: Point) -> float | None:
        return point.hits / point.asked if point.asked else None

    told = [point for point in points if point.asked]
    words = "no requests"
    if told:
        worst = min(told, key=lambda point: point.hits / point.asked)
        words = f"{hit_ratio(merged(points))} over all, {hit_ratio(worst)} at the lowest, {hit_ratio(told[-1])} at last"
    return _chart(f"Hit ratio in the last {scale.words}: {words}.", [("hits", height)], points, scale.seconds)


def traffic_chart(points: Sequence[Point], scale: Scale) -> Tag:
    """
    Draw the bytes to clients and from upstream.
    """
    top = ceiling(points)

    def sent(point: Point) -> float:
        return _a_second(point.sent, point) / top

    def received(point: Point) -> float:
        return _a_second(point.received, point) / top

    words = "nothing"
    if any(point.sent or point.received for point in points):
        most = max(points, key=lambda point: _a_second(point.sent, point))
        from_upstream = max(points, key=lambda point: _a_second(point.received, point))
        words = (
            f"to clients {rate(most.sent, most.seconds)} at the highest, "
            f"from upstream {rate(from_upstream.received, from_upstream.seconds)}"
        )
    return _chart(
        f"Traffic in the last {scale.words}: {words}.",
        [("sent", sent), ("received", received)],
        points,
        scale.seconds,
    )


def ceiling(points: Sequence[Point]) -> int:
    """
    Return the height of the traffic chart in bytes per second: a power of two.
    """
    most = max((_a_second(max(point.sent, point.received), point) for point in points), default=0)
    return max(LEAST, 1 << max(0, int(most) - 1).bit_length())


def _a_second(count: int, point: Point) -> float:
    return count / point.seconds if point.seconds else 0


def _chart(words: str, lines: Sequence[tuple[str, Height]], points: Sequence[Point], seconds: int) -> Tag:
    grid = "".join(f"M0 {HEIGHT * quarter / 4:g}H{WIDTH}" for quarter in range(5))
    grid += "".join(f"M{WIDTH * quarter / 4:g} 0V{HEIGHT}" for quarter in range(5))
    drawn = [Tag("path")(class_="grid", d=grid)]
    for name, height in lines:
        runs = list(_runs(points, height, seconds))
        drawn.append(Tag("path")(class_=f"area {name}", d="".join(map(_area, runs))))
        drawn.append(Tag("path")(class_=f"line {name}", d="".join(map(_line, runs))))
    svg = Tag("svg")(class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", preserveAspectRatio="none", role="img")
    svg.attributes["aria-label"] = words
    return svg(*drawn)


Run = list[tuple[float, float, float]]
"""Adjacent steps: left edge, right edge and height, in the chart's units."""


def _runs(points: Sequence[Point], height: Height, seconds: int) -> Iterator[Run]:
    """
    Place the points, the last at the right edge; a gap ends a run.

    @param seconds: the chart's time range.
    """
    start, run = WIDTH - sum(point.seconds for point in points) * WIDTH / seconds, Run()
    for point in points:
        stop, reached = start + point.seconds * WIDTH / seconds, height(point)
        if reached is not None:
            run.append((start, stop, HEIGHT * (1 - min(1.0, reached))))
        elif run:
            yield run
            run = []
        start = stop
    if run:
        yield run


def _line(run: Run) -> str:
    first = f"M{run[0][0]:.1f} {run[0][2]:.1f}"
    return first + "".join(f"V{y:.1f}H{stop:.1f}" for _, stop, y in run)


def _area(run: Run) -> str:
    return f"M{run[0][0]:.1f} {HEIGHT}" + "".join(f"V{y:.1f}H{stop:.1f}" for _, stop, y in run) + f"V{HEIGHT}Z"
