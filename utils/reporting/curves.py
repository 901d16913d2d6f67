"""Training curves as SVG, drawn without a library."""

import math
from collections.abc import Mapping, Sequence

from utils.reporting.markup import Markup, tag

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 24  # margins of the axes' numbers
MAX_POINTS = 300  # of a curve
Points = Sequence[tuple[float, float]]


def chart(curves: Mapping[str, Points], title: str, *, is_logarithmic: bool = False) -> Markup | None:
    """Curves over training steps with a legend; None where no curve has two finite points.

    Args:
        curves: name -> (step, value); values that are not finite, or not positive on a logarithmic axis, are left out.
        title: what the values are.
    """
    shown: dict[str, list[tuple[float, float]]] = {}
    for name, points in curves.items():
        finite = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not is_logarithmic)]
        if len(finite) > 1:
            shown[name] = thinned(finite)
    if not shown:
        return None
    # From data to pixels.
    xs = [x for points in shown.values() for x, _ in points]
    ys = [math.log10(y) if is_logarithmic else y for points in shown.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 4), ticks(min(ys), max(ys), 4, is_inside=is_logarithmic)
    x_low, x_high = min(0.0, *xs), max(xs)
    y_low, y_high = min([*ys, *y_ticks]), max([*ys, *y_ticks])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        (x1, line), (x2, _) = place(x_low, y), place(x_high, y)
        parts.append(tag("line", x1=f"{x1:.1f}", y1=f"{line:.1f}", x2=f"{x2:.1f}", y2=f"{line:.1f}", class_="grid"))
        label = number(10**y if is_logarithmic else y)
        parts.append(tag("text", label, x=f"{x1 - 6:.1f}", y=f"{line + 4:.1f}", text_anchor="end"))
    for x in x_ticks:
        across, bottom = place(x, y_low)
        anchor = "start" if x == x_low else "middle" if x < 0.95 * x_high else "end"
        parts.append(tag("text", number(x), x=f"{across:.1f}", y=f"{bottom + 17:.1f}", text_anchor=anchor))
    for index, points in enumerate(shown.values()):
        pixels = [place(x, math.log10(y) if is_logarithmic else y) for x, y in points]
        words = " ".join(f"{'ML'[at > 0]}{x:.1f} {y:.1f}" for at, (x, y) in enumerate(pixels))
        parts.append(tag("path", d=words, class_=f"curve c{index % 5}"))
        x, y = pixels[-1]
        parts.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, class_=f"dot c{index % 5}"))
    legend = [
        tag("span", tag("i", class_=f"c{index % 5}"), f"{name} ", tag("b", number(points[-1][1])))
        for index, (name, points) in enumerate(shown.items())
    ]
    drawing = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title} over training steps")
    scale = " (logarithmic)" if is_logarithmic else ""
    return tag(
        "figure", tag("figcaption", title + scale), drawing, tag("div", legend, class_="legend"), class_="chart"
    )


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of the points, evenly spaced, the last one included."""
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(at * (len(points) - 1) / (MAX_POINTS - 1))] for at in range(MAX_POINTS)]


def ticks(low: float, high: float, count: int, *, is_inside: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about `count`; `is_inside`: none outside of these."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9) if not is_inside else math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    values = [index * step for index in range(first, last + 1)]
    return [value for value in values if value >= low - 1e-9 * step or not is_inside] or [low, high]


def number(value: float) -> str:
    """A number in at most four digits."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.4g}"
