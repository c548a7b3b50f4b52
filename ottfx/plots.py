"""Pictures of an evaluation, drawn from its results alone: what each variant costs, and why keeping tokens aside helps.

matplotlib is an optional dependency: `pip install 'ottfx[plots]'`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ottfx.cache_fidelity import PARTS
from ottfx.errors import ConfigError
from ottfx.metrics import ROUNDING
from ottfx.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by the colour-blind, too (Okabe and Ito); repeated with other markers and dashes."""
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
KEPT_COLOR = "#D7191C"
ROUNDING_DB = 80.0
"""SQNR from which on the difference is that of the order of float32 sums, not of a scheme; not drawn."""
COLUMNS = 256
"""Columns of the heat map at most: a longer text has the smallest norm of several neighbours in one."""


def check_plots() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("ottfx: pictures need matplotlib, which is not installed. Run pip install 'ottfx[plots]'.")


def draw_plots(results: Sequence[Result], path: str | Path) -> list[Path]:
    """Draw what the results hold data for, as PNG files.

    Args:
        results: of one model and text.
        path: as for `ottfx.results.write_results`; `results/quality` gives `results/quality-pareto.png` and so on.

    Returns:
        The files written. A picture that needs the fidelity, or a variant that keeps tokens aside, is left out
        without it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_plots()
    path = Path(path).with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PICTURES.items():
        figure = draw(results)
        if figure is not None:
            written.append(path.with_name(f"{path.name}-{name}.png"))
            figure.savefig(written[-1], dpi=150)
    return written


def pareto(results: Sequence[Result]) -> Figure | None:
    """KL against bits at 8k tokens; the line joins the variants that no other beats in both. None: nothing lossy."""
    lossy = [r for r in results if r.mean_kl > ROUNDING]
    if not lossy:
        return None
    figure, axes = _figure(8, 5.5)
    (ax,) = axes
    styles = _styles(results)
    for r in lossy:
        below, above = (max(0.0, sign * (bound - r.mean_kl)) for sign, bound in ((-1, r.kl_low), (1, r.kl_high)))
        color, marker, _ = styles[r.label]
        ax.errorbar(
            r.bits_8k, r.mean_kl, [[min(below, 0.99 * r.mean_kl)], [above]], fmt=marker, color=color, ms=8, capsize=3
        )
        ax.annotate(r.label, (r.bits_8k, r.mean_kl), (8, 6), textcoords="offset points", color=color, fontsize=9)
    best = [r for r in lossy if not any(o.bits_8k <= r.bits_8k and o.mean_kl < r.mean_kl for o in lossy)]
    best.sort(key=lambda r: r.bits_8k)
    ax.plot([r.bits_8k for r in best], [r.mean_kl for r in best], color="0.6", lw=1, ls="--", zorder=0)
    ax.set_yscale("log")
    ax.margins(x=0.15, y=0.15)
    ax.set_xlabel("bits an element at 8,192 tokens, everything counted (full precision: 16)")
    ax.set_ylabel("mean KL from full precision, nat")
    ax.grid(True, which="both", alpha=0.25)
    return _titled(figure, "What a smaller cache costs: lower left is better", results)


def key_norms(results: Sequence[Result]) -> Figure | None:
    """Key norms by token and head, and which tokens were kept aside. None: no variant kept any."""
    result = _with_kept_tokens(results)
    if result is None or result.fidelity is None:
        return None
    norms, kept = result.fidelity.key_norms.float(), result.fidelity.kept_exact
    layers, heads, tokens = norms.shape
    figure, (map_ax, head_ax) = _figure(11, 9, rows=2, height_ratios=(3, 1))
    width = -(-tokens // COLUMNS)
    padded = torch.nn.functional.pad(norms.flatten(0, 1), (0, -tokens % width), value=torch.inf)
    pooled = padded.nan_to_num(nan=torch.inf).unflatten(1, (-1, width)).amin(-1)
    pooled = torch.where(pooled.isinf(), torch.nan, pooled).log2()
    limits = (0, layers * heads)
    image = map_ax.imshow(
        pooled.numpy(), aspect="auto", interpolation="nearest", cmap="gray", vmin=-2, vmax=0.5,
        extent=(-0.5, tokens - 0.5, limits[1], limits[0]),
    )  # fmt: skip
    row, token = kept.flatten(0, 1).nonzero(as_tuple=True)
    map_ax.scatter(
        token.numpy(),
        row.numpy() + 0.5,
        s=26,
        facecolors="none",
        edgecolors=KEPT_COLOR,
        linewidths=1,
        label="kept exact",
    )
    step = max(1, layers // 15)
    map_ax.set_yticks([(layer + 0.5) * heads for layer in range(0, layers, step)], map(str, range(0, layers, step)))
    map_ax.set_ylabel(f"layer ({heads} KV head{'s' if heads > 1 else ''} each)")
    map_ax.legend(loc="upper right")
    figure.colorbar(image, ax=map_ax, label="log2(norm / median of the head)", pad=0.01)

    layer, head = _deepest_head(norms, kept)
    profile, marked = norms[layer, head].numpy(), kept[layer, head].nonzero()[:, 0].numpy()
    head_ax.plot(profile, color="0.55", lw=0.6)
    head_ax.plot(marked, profile[marked], "o", color=KEPT_COLOR, ms=6, mfc="none", label="kept exact")
    head_ax.set_ylim(0, float(norms[layer, head].nan_to_num().max()) * 1.05)
    head_ax.set_title(f"One head: layer {layer}, head {head}", fontsize=10, loc="left")
    head_ax.set_xlabel("token")
    head_ax.set_ylabel("L1 norm / median")
    for ax in (map_ax, head_ax):
        ax.set_xlim(-tokens / 100, tokens)
    return _titled(figure, f"Few tokens have small keys; circled: those that {result.label} keeps exact", [result])


def attention_share(results: Sequence[Result]) -> Figure | None:
    """Attention that the kept tokens get, beside their number. None: no variant kept any."""
    result = _with_kept_tokens(results)
    if result is None or result.fidelity is None:
        return None
    shares = result.fidelity.kept_attention * 100
    figure, (ax,) = _figure(9, 5)
    _dots_by_layer(ax, shares, KEPT_COLOR, "attention that they get (one dot a head)")
    counts = result.fidelity.kept_exact.float().mean((1, 2)).numpy() * 100
    ax.bar(range(len(counts)), counts, width=0.8, color="0.55", label="their share of all tokens (bar)")
    ax.set_ylim(0, None)
    ax.set_xlabel("layer")
    ax.set_ylabel("share of the kept tokens, %")
    ax.grid(True, axis="y", alpha=0.25)
    ax.legend()
    return _titled(
        figure, f"How much of the attention goes to the few tokens that {result.label} keeps exact", [result]
    )


def channel_ranges(results: Sequence[Result]) -> Figure | None:
    """Ranges of key channels of all tokens, and of those that were not kept aside. None: no variant kept any."""
    result = _with_kept_tokens(results)
    if result is None or result.fidelity is None:
        return None
    everything, rest = result.fidelity.ranges
    left = rest / everything.clamp(min=1e-30)
    narrowest = left.nan_to_num(torch.inf).amin(-1)
    figure, (head_ax, layer_ax) = _figure(11, 5, columns=2)
    layer, head = divmod(int(narrowest.argmin()), narrowest.shape[1])
    order = everything[layer, head].argsort(descending=True)
    channels = range(len(order))
    head_ax.bar(channels, everything[layer, head, order].numpy(), width=1, color=KEPT_COLOR, label="all tokens")
    head_ax.bar(channels, rest[layer, head, order].numpy(), width=1, color="0.75", label="without those kept exact")
    head_ax.set_title(f"Layer {layer}, head {head}, which has the channel that narrows most", fontsize=10, loc="left")
    head_ax.set_xlabel("channel of the key, widest first")
    head_ax.set_ylabel("range that the levels must cover")
    head_ax.legend()
    used = result.fidelity.kept_exact.any(-1)
    _dots_by_layer(layer_ax, torch.where(used, left.nanmean(-1), torch.nan) * 100, "0.45", "mean of its channels")
    _dots_by_layer(layer_ax, torch.where(used, narrowest, torch.nan) * 100, KEPT_COLOR, "its narrowest channel")
    layer_ax.set_ylim(0, 105)
    layer_ax.set_title("Every head that kept tokens", fontsize=10, loc="left")
    layer_ax.set_xlabel("layer")
    layer_ax.set_ylabel("range that is left without them, %")
    layer_ax.legend(loc="lower left")
    return _titled(
        figure, f"Key channels in groups of tokens, with and without those that {result.label} keeps", [result]
    )


def sqnr_by_layer(results: Sequence[Result]) -> Figure | None:
    """SQNR of keys, values and attention output by layer. None: no lossy variant has its fidelity."""
    shown = [r for r in results if r.fidelity is not None and r.mean_kl > ROUNDING]
    if not shown:
        return None
    figure, axes = _figure(12, 5, columns=3)
    styles = _styles(results)
    for ax, part in zip(axes, PARTS, strict=True):
        for r in shown:
            assert r.fidelity is not None
            for decoded, look in ((False, styles[r.label][2]), (True, ":")):
                means = torch.tensor(r.fidelity.layer_means(part, decoded=decoded))
                where = (means < ROUNDING_DB).nonzero()[:, 0]
                label = r.label if not decoded else None
                ax.plot(
                    where.numpy(), means[where].numpy(), look, marker=".", color=styles[r.label][0], lw=1.8, label=label
                )
        ax.set_title({"key": "Keys", "value": "Values", "output": "Attention output"}[part], fontsize=11)
        ax.set_xlabel("layer")
        ax.locator_params(axis="x", integer=True)
        ax.grid(True, alpha=0.25)
    axes[0].set_ylabel("SQNR, dB (10 dB: a tenth of the power is noise)")
    axes[0].plot([], [], ":", color="0.3", label="dotted: after decoding")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(shown) + 1))
    return _titled(figure, "What each layer gets back: higher is better", shown)


def kl_by_position(results: Sequence[Result]) -> Figure | None:
    """KL over the position in the text, smoothed. None: nothing lossy."""
    lossy = [r for r in results if r.mean_kl > ROUNDING]
    if not lossy:
        return None
    figure, (ax,) = _figure(9, 5)
    styles = _styles(results)
    width = max(1, len(lossy[0].metrics) // 16)
    for r in sorted(lossy, key=lambda r: -r.mean_kl):  # the legend's order is that of the lines
        smooth = r.metrics.kl.double().clamp(min=0).unfold(0, width, 1).mean(-1)
        position = r.conditions.start + torch.arange(len(smooth)) + width / 2
        visible = smooth > ROUNDING
        ax.plot(
            position[visible].numpy(),
            smooth[visible].numpy(),
            styles[r.label][2],
            color=styles[r.label][0],
            label=r.label,
        )
    ax.set_yscale("log")
    ax.set_xlabel(f"position in the text (mean of {width} neighbours)")
    ax.set_ylabel("KL from full precision, nat")
    ax.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper")
    return _titled(figure, "Error over a long decode: a level line does not pile up", lossy)


PICTURES: Mapping[str, Callable[[Sequence[Result]], Figure | None]] = {
    "pareto": pareto,
    "key-norms": key_norms,
    "attention-share": attention_share,
    "channel-ranges": channel_ranges,
    "sqnr-by-layer": sqnr_by_layer,
    "kl-by-position": kl_by_position,
}
"""End of a file's name -> what draws it; None if the results lack what it shows."""


def _figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, height_ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    # A Figure of its own: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios)
    return figure, list(axes.flat)


def _titled(figure: Figure, title: str, results: Sequence[Result]) -> Figure:
    c = results[0].conditions
    figure.suptitle(f"{title}\n{c.model}, {c.tokens} tokens, {c.dtype}", fontsize=12)
    return figure


def _dots_by_layer(ax: Axes, values: Tensor, color: str, label: str) -> None:
    """One dot for each head, [layers, heads], side by side."""
    layers, heads = values.shape
    x = torch.arange(layers)[:, None] + (torch.arange(heads) - (heads - 1) / 2) * (0.5 / heads)
    ax.plot(x.flatten().numpy(), values.flatten().numpy(), "o", color=color, ms=4.5, alpha=0.85, label=label)


def _styles(results: Sequence[Result]) -> dict[str, tuple[str, str, Any]]:
    """Label -> colour, marker, dashes."""
    styles: dict[str, tuple[str, str, Any]] = {}
    for i, r in enumerate(results):
        again = i // len(COLORS) % len(MARKERS)
        styles[r.label] = (COLORS[i % len(COLORS)], MARKERS[again], DASHES[again])
    return styles


def _with_kept_tokens(results: Sequence[Result]) -> Result | None:
    return next((r for r in results if r.fidelity is not None and r.fidelity.kept_exact.any()), None)


def _deepest_head(norms: Tensor, kept: Tensor) -> tuple[int, int]:
    """The head whose kept tokens lie furthest below its median, of those that kept any."""
    depth = torch.where(kept, norms, torch.nan).nanmean(-1)
    return divmod(int(depth.nan_to_num(torch.inf).argmin()), norms.shape[1])
