"""Pictures of ``longtake bench methods``: quality over bits, quality over time, peak memory over ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longtake.kernels.errors import ConfigError

_MARKS = {"study": "o", "codecs": "s", "policies": "^"}
_COLOURS = {"study": "tab:blue", "codecs": "tab:green", "policies": "tab:red"}
_MOST_CURVES = 10
_LABEL = (90, 9)  # width and height of a name, in pixels of the canvas


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
    lossy = {name: row for name, row in results.items() if name != "BF16"}
    return [_over_bits(lossy, folder), _over_time(lossy, folder), _peak_over_ratio(results, folder)]


def _scatter(axis: Any, points: Mapping[str, tuple[float, float]], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Points by group."""
    for group, mark in _MARKS.items():
        of_group = [point for name, point in points.items() if rows[name]["group"] == group]
        if of_group:
            axis.scatter(*zip(*of_group, strict=True), marker=mark, color=_COLOURS[group], label=group, s=22, zorder=3)
    axis.grid(alpha=0.3)
    axis.margins(0.08)
    axis.legend(fontsize=8)


def _label(axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside points, pushed up where they would lie on one another; the axis has its final size and limits."""
    taken: list[tuple[float, float]] = []
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = at = axis.transData.transform(point)
        while any(abs(x - other_x) < _LABEL[0] and abs(y - other_y) < _LABEL[1] for other_x, other_y in taken):
            y += 1
        taken.append((x, y))
        axis.annotate(name, point, fontsize=5.5, xytext=(5, y - at[1] + 2), textcoords="offset pixels")


def _over_bits(rows: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    from matplotlib import pyplot

    moments = list(next(iter(rows.values()))["past"])
    last = moments[-1]
    panels: list[tuple[str, Callable[[Any], float]]] = [
        (f"film, second {moments[0]}, against BF16", lambda row: row["film"]["at"][moments[0]]["psnr_db"]),
        (f"film, second {last}, against BF16", lambda row: row["film"]["at"][last]["psnr_db"]),
        (f"behind a true past of {last} s, against BF16", lambda row: row["past"][last]["bf16_psnr_db"]),
        (f"behind a true past of {last} s, against the world", lambda row: row["past"][last]["world_psnr_db"]),
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
        _label(axis, points)
    return _save(figure, folder / "methods_quality_over_bits.png")


def _over_time(rows: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    from matplotlib import pyplot

    order = sorted(rows, key=lambda name: -rows[name]["film"]["by_second"]["psnr_db"][-1])
    step = max(1, -(-len(order) // _MOST_CURVES))
    shown = order[::step]
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
    _label(axis, points)
    return _save(figure, folder / "methods_peak_over_ratio.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
