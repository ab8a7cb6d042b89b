"""Pictures of ``longtake bench methods``: quality over bits, quality over time, peak memory over ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from longtake.kernels.errors import ConfigError

_MARKS = {"study": "o", "codecs": "s", "policies": "^"}
_COLOURS = {"study": "tab:blue", "codecs": "tab:green", "policies": "tab:red"}
_PLACES = ((5, -2, "left"), (-5, -2, "right"), (0, 5, "center"), (0, -9, "center"))  # of a name: x, y in points


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write the plots as PNG.

    Args:
        results: of the benchmark's JSON.
        folder: made.

    Returns:
        Their paths.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install matplotlib, or leave out --plots") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [_over_bits(results, folder), _over_time(results, folder), _peak_over_ratio(results, folder)]


def lost_db(row: Mapping[str, Any], dense: Mapping[str, Any], moment: str) -> float:
    """What a method loses of the world behind a true past, against bfloat16: the median over worlds, dB."""
    worlds = [each["past"][moment]["world_psnr_db_by_world"] for each in (dense, row)]
    found: float = median(bf16 - own for bf16, own in zip(*worlds, strict=True))
    return found


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points than which none is both further left and higher, from left to right."""
    best, names = float("-inf"), []
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if y > best:
            best = y
            names.append(name)
    return names


def _scatter(axis: Any, points: Mapping[str, tuple[float, float]], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Points by group."""
    for group, mark in _MARKS.items():
        of_group = [point for name, point in points.items() if rows[name]["group"] == group]
        if of_group:
            axis.scatter(*zip(*of_group, strict=True), marker=mark, color=_COLOURS[group], label=group, s=22, zorder=3)
    axis.grid(alpha=0.3)
    axis.margins(0.08)
    axis.legend(fontsize=8)


def _label(axis: Any, points: Mapping[str, tuple[float, float]], foremost: Sequence[str]) -> None:
    """Names beside points, the foremost first; who finds no room has none. The axis has its final size and limits."""
    from matplotlib.transforms import Bbox

    renderer, frame = axis.figure.canvas.get_renderer(), axis.bbox
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in map(axis.transData.transform, points.values())]
    taken.append(axis.get_legend().get_window_extent(renderer))
    for name in sorted(points, key=lambda name: name not in foremost):
        for x, y, align in _PLACES:
            weight = "bold" if name in foremost else "normal"
            style = {"fontsize": 6, "fontweight": weight, "textcoords": "offset points", "ha": align}
            text = axis.annotate(name, points[name], xytext=(x, y), **style)
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _over_bits(results: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    from matplotlib import pyplot

    dense, rows = results["BF16"], _lossy(results)
    moments = list(next(iter(rows.values()))["past"])
    last = moments[-1]
    panels: list[tuple[str, Callable[[Any], float]]] = [
        (f"film, second {moments[0]}, against BF16", lambda row: row["film"]["at"][moments[0]]["psnr_db"]),
        (f"film, second {last}, against BF16", lambda row: row["film"]["at"][last]["psnr_db"]),
        (f"behind a true past of {last} s, against BF16", lambda row: row["past"][last]["bf16_psnr_db"]),
        (f"behind a true past of {last} s, against the world, of BF16's", lambda row: -lost_db(row, dense, last)),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 11), sharex=True, layout="constrained")
    labels = []
    for axis, (title, value) in zip(axes.flat, panels, strict=True):
        points = {name: (row["bits"], value(row)) for name, row in rows.items()}
        labels.append((axis, points))
        _scatter(axis, points, rows)
        axis.set(title=title, ylabel="PSNR, dB", xscale="log", xlabel="bits an element, everything held counted")
        axis.set_xticks(ticks := [1, 2, 3, 4, 6, 8, 16], [str(tick) for tick in ticks])
        axis.minorticks_off()
    figure.canvas.draw()
    for axis, points in labels:
        _label(axis, points, front(points))
    return _save(figure, folder / "methods_quality_over_bits.png")


def _over_time(results: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    from matplotlib import pyplot

    rows = _lossy(results)
    last = list(next(iter(rows.values()))["past"])[-1]
    shown = front({name: (row["bits"], row["past"][last]["bf16_psnr_db"]) for name, row in rows.items()})
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for axis, (name, unit) in zip(axes, (("psnr_db", "PSNR, dB"), ("ssim", "SSIM")), strict=True):
        for method in shown:
            curve = rows[method]["film"]["by_second"][name]
            axis.plot(
                range(1, len(curve) + 1), curve, label=f"{method} ({rows[method]['bits']:.1f} bits)", linewidth=1.2
            )
        axis.set(xlabel="second of the film", ylabel=f"{unit}, against BF16")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, folder / "methods_quality_over_time.png")


def _peak_over_ratio(rows: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 7), layout="constrained")
    points = {name: (row["ratio"], row["peak_bytes"] / 2**20) for name, row in rows.items()}
    _scatter(axis, points, rows)
    axis.set(xlabel="ratio: bytes of BF16's history over this one's", ylabel="peak memory, MiB")
    figure.canvas.draw()
    _label(axis, points, front({name: (-ratio, -peak) for name, (ratio, peak) in points.items()}))
    return _save(figure, folder / "methods_peak_over_ratio.png")


def _lossy(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: row for name, row in results.items() if name != "BF16"}


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
