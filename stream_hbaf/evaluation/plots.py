"""Plots as SVG, for the page of a report or as files of their own, and embeddings to be plotted.

The only file that imports matplotlib, and only its object API: no window, no global state. Colours
are CSS variables of the page (--ink, --paper, --accent, --second), so a picture is light or dark
as the page is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from stream_hbaf.corpora.dataset import Dataset, all_features, on_device_of, pad_dialogues
from stream_hbaf.errors import ModelError
from stream_hbaf.evaluation.metrics import Bin, Spread
from stream_hbaf.networks.network import Network

Float32 = NDArray[np.float32]

FEWEST = 3  # utterances whose embeddings can be compared
TIES = 1e-6  # cosines that differ by less are equal: equal texts have equal embeddings
PERPLEXITY = 30.0  # of t-SNE: about how many neighbours it keeps together
# Placeholders for the page's colours, which _svg replaces by its CSS variables.
INK, PAPER, ACCENT, SECOND = "#010203", "#fafbfc", "#0a141e", "#1e140a"
_VARIABLES = {INK: "--ink", PAPER: "--paper", ACCENT: "--accent", SECOND: "--second"}
_STYLE: Any = {  # its keys are literals to matplotlib's types
    "svg.fonttype": "none",  # letters stay letters: small, found by searching, read aloud
    "svg.hashsalt": "stream-hbaf",  # the same picture is the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names may hold a dollar sign
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
}
_SHADES: Any = mpl.colormaps["tab20"]  # ten pairs of one hue, dark and light
Series = Sequence[tuple[str, Sequence[Spread]]]  # a system's name, and a figure for each interval


@dataclass(frozen=True)
class Panel:
    """One network's embeddings of n utterances, laid out in the plane."""

    title: str
    speech: NDArray[np.float32]  # [n, 2]
    text: NDArray[np.float32]  # [n, 2]
    labels: NDArray[np.int64]  # [n]


def draw_confusion(
    table: NDArray[np.integer | np.floating], *, labels: Sequence[str], name: str = "confusion"
) -> str:
    """A confusion matrix [C, C] (row: gold, column: predicted); each row's shares in per cent."""
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _sheet(4.7, 4.4)
        shares = table / np.maximum(table.sum(1, keepdims=True), 1)
        classes = len(labels)
        for (row, column), share in np.ndenumerate(shares):
            # Not an image: a bitmap couldn't take the page's colours.
            corner = column - 0.48, row - 0.48
            axes.add_patch(Rectangle(corner, 0.96, 0.96, facecolor=ACCENT, alpha=share, lw=0))
            colour = PAPER if share > 0.5 else INK
            axes.text(column, row, f"{100 * share:.0f}", color=colour, ha="center", va="center")
        axes.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5))
        axes.set_xticks(range(classes), labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted", ylabel="gold", aspect="equal")
        return _svg(figure, name=name, title="Confusion matrix, per cent of each gold label")


def draw_reliability(bins: Sequence[Bin], *, name: str = "reliability") -> str:
    """A reliability diagram: accuracy against confidence, and below it each bin's count."""
    with mpl.rc_context(_STYLE):
        figure, (upper, lower) = _sheet(4.6, 4.6, nrows=2, sharex=True, height_ratios=[4, 1])
        middles = [(b.low + b.high) / 2 for b in bins]
        width = 0.9 * (bins[0].high - bins[0].low) if bins else 0.1
        upper.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=(0, (3, 3)), alpha=0.6)
        upper.bar(middles, [b.accuracy for b in bins], width, color=ACCENT, alpha=0.55, lw=0)
        upper.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o", ms=4, color=INK)
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        lower.bar(middles, [b.count for b in bins], width, color=SECOND, alpha=0.55, lw=0)
        lower.set(xlabel="confidence", ylabel="count")
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        for axis in (upper.xaxis, upper.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        return _svg(figure, name=name, title="Accuracy by confidence")


def draw_intervals(names: Sequence[str], series: Series, *, name: str, about: str) -> str:
    """Weighted F1 over intervals of utterances: one line a system, bars of one SD over seeds."""
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _sheet(7.4, 3.4)
        places = range(len(names))
        for (system, figures), colour, marker in zip(series, (ACCENT, SECOND), "os", strict=False):
            means, deviations = zip(*((100 * f.mean, 100 * f.sd) for f in figures), strict=True)
            style = {"color": colour, "marker": marker, "label": system, "lw": 1.4}
            _draw_f1(axes, places, means, deviations, about=about, elinewidth=0.9, **style)
        axes.set_xticks(places, names)
        axes.margins(x=0.05, y=0.15)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 0), min(top, 103))
        if len(series) > 1:
            axes.legend(loc="best")
        return _svg(figure, name=name, title=f"Weighted F1 against {about}")


def window_curve(points: Sequence[tuple[float, float, float]], *, title: str) -> str:
    """An SVG file of weighted F1 × 100 against window length: (utterances, mean, SD over seeds)."""
    lengths, means, deviations = zip(*points, strict=True)
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _sheet(7.4, 3.4)
        about = "window, utterances (the current one included)"
        _draw_f1(axes, lengths, means, deviations, about=about, color=ACCENT, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.minorticks_off()
        axes.set_title(title)
        drawn = _svg(figure, name="window", title=title)
    return _standing_alone(drawn)


def embedding_panels(panels: Sequence[Panel], *, labels: Sequence[str], title: str) -> str:
    """An SVG file of several networks' embeddings side by side: speech dark, text light.

    A colour an emotion; at most ten emotions.
    """
    with mpl.rc_context(_STYLE):
        figure, row = _sheet(3.7 * len(panels), 4.5, ncols=len(panels))
        for axes, panel in zip(row, panels, strict=True):
            for label in np.unique(panel.labels):
                rows, dark, light = panel.labels == label, *_shades(label)
                axes.plot(*panel.text[rows].T, "o", color=light, ms=3, mew=0)
                axes.plot(*panel.speech[rows].T, "o", color=dark, ms=3, mew=0)
            axes.set_title(panel.title, fontsize=10)
            axes.set_aspect("equal", adjustable="datalim")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        dots: list[Any] = [
            tuple(Line2D([], [], color=shade, marker="o", ls="") for shade in _shades(label))
            for label in range(len(labels))
        ]
        figure.legend(
            dots,
            labels,
            handler_map={tuple: HandlerTuple(ndivide=None)},
            loc="outside lower center",
            ncols=min(len(labels), 2 * len(panels)),
            title="speech dark, its text light",
        )
        drawn = _svg(figure, name="e", title=title)  # short: it stands in front of every point
    # Tenths of a point can't be seen, and thousands of points would make a large file.
    tenths = re.sub(r'(?<= [xy]=")-?\d+\.\d+', lambda number: f"{float(number[0]):.1f}", drawn)
    return _standing_alone(tenths)


@dataclass(frozen=True)
class Embeddings:
    """A network's embeddings of the speech and of the text of n utterances, width H."""

    speech: Float32  # [n, H], each of length 1
    text: Float32  # [n, H], each of length 1
    labels: NDArray[np.int64]  # [n]

    def retrieval(self) -> float:
        """The share of utterances whose own text is the nearest of all texts to their speech.

        By cosine; where k texts are equally near, the own one counts 1/k.
        """
        cosines = self.speech @ self.text.T
        nearest = cosines >= cosines.max(axis=1, keepdims=True) - TIES
        return float((np.diagonal(nearest) / nearest.sum(axis=1)).mean())

    def margin(self) -> float:
        """The mean cosine of speech and own text, minus that of speech and all other texts."""
        cosines = self.speech @ self.text.T
        count = len(cosines)
        own = float(np.trace(cosines))
        others = float(cosines.sum()) - own
        return own / count - others / (count * (count - 1))

    def in_plane(self) -> tuple[Float32, Float32]:
        """Speech and text [n, 2], laid out together by t-SNE; the same each time."""
        every = np.concatenate([self.speech, self.text])
        perplexity = min(PERPLEXITY, (len(every) - 1) / 3)
        plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(every)
        return plane[: len(self.speech)], plane[len(self.speech) :]


def embed(network: Network, dataset: Dataset, *, most: int, seed: int = 0) -> Embeddings:
    """Embeddings of ``most`` labelled utterances that have audio and text, drawn evenly.

    The network is used as it is: call ``eval()`` before. Raises ModelError for a network without
    both embeddings, and for fewer than 3 utterances.
    """
    if len(network.config.modalities) < 2:
        raise ModelError("embeddings: the network has one modality; choose one with both")
    speech, text = _embed_all(network, dataset)
    counted = dataset.labelled
    for mask in (dataset.audio_mask, dataset.text_mask):
        counted = counted if mask is None else counted & mask
    rows = np.flatnonzero(counted)
    if len(rows) < FEWEST:
        raise ModelError(f"embeddings: {len(rows)} utterances have audio, text and a label")
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return Embeddings(speech[rows], text[rows], dataset.labels[rows])


def _embed_all(network: Network, dataset: Dataset) -> tuple[Float32, Float32]:
    """[N, H] of speech and of text; a dialogue at a time, since tokens take much memory."""
    parts: list[list[Float32]] = []
    for rows in dataset.dialogues:
        features = all_features(dataset, pad_dialogues([rows]), version="")
        with torch.inference_mode():
            output = network(on_device_of(network, features))
        if output.h_a is None or output.h_l is None:
            raise ModelError(
                f"embeddings: {network.config.kind} doesn't embed speech and text; "
                "choose a network that does, such as hbaf"
            )
        pair = output.h_a[0], output.h_l[0]
        parts.append([F.normalize(h.float(), dim=-1).cpu().numpy() for h in pair])
    back = np.argsort(np.concatenate(dataset.dialogues))
    speech, text = (np.concatenate(part)[back] for part in zip(*parts, strict=True))
    return speech, text


def _shades(label: int) -> tuple[Any, Any]:
    """A label's dark and light shade."""
    return _SHADES(2 * label), _SHADES(2 * label + 1)


def _standing_alone(drawn: str) -> str:
    """An <svg> element as a file, with the colours that a page would have given it."""
    page = "svg { --ink: #222; --accent: #26a; background: #fff; font-family: sans-serif }"
    return drawn.replace(">", f">\n <style>{page}</style>", 1) + "\n"


def _sheet(width: float, height: float, **grid: Any) -> tuple[Figure, Sequence[Axes]]:
    """A figure, width and height in inches, and its plots row by row; ``grid`` as of subplots."""
    figure = Figure(figsize=(width, height), layout="constrained")
    plots = figure.subplots(squeeze=False, **grid).ravel().tolist()
    for part in (figure, *plots):
        part.patch.set_alpha(0)
    return figure, plots


def _draw_f1(
    axes: Axes, places: Any, means: Any, deviations: Any, *, about: str, **style: Any
) -> None:
    """Weighted F1 × 100 at each place, with bars of one standard deviation if there are any."""
    bars = deviations if any(deviations) else None
    axes.errorbar(places, means, yerr=bars, ms=4.5, capsize=2, **style)
    axes.set(xlabel=about, ylabel="weighted F1 × 100")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)


def _svg(figure: Figure, *, name: str, title: str) -> str:
    """The figure as an <svg> element whose ids no other picture of the page has."""
    out = StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)  # the page's own font
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
