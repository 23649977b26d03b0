"""The evidence card: one small picture of a verdict, true to size, that says what was found and why.

Colour has one meaning on it: how few objects of real images fit their words as badly. Dark is alarming, also
in grey, and the number stands beside. All text is data and is shown as it stands.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from itemkit import calibrate, plots, schema
from itemkit.errors import InputError
from itemkit.images import content_id, load_image, read_bytes
from itemkit.text import plain, probability

if TYPE_CHECKING:
    from PIL.Image import Image

    from itemkit.workflow import Verdict

WIDTH = plots.COLUMN * 72  # of the card; this and all lengths below in points, 1/72 inch
EDGE, GAP = 5, 7
SIDE = 118  # of the square that holds a picture; one that is wider than WIDE times its height gets a row
WIDE = 1.7
LABEL = 78  # room for the names of objects
SMALL, TEXT = 6, 7  # sizes of type
ROWS = 8  # objects that are shown, those that add most; the others are counted
GROUND = {"fake": plots.VERMILION, "real": plots.BLUE}  # of the verdict; any other is black
SHADES = mpl.colormaps["YlOrRd_r"]

Word = tuple[str, str | None]  # and the colour of its ground, if it has one
Line = list[tuple[str, str | None, float]]  # with how wide each is


def render(verdict: Verdict, ending: str = "png") -> bytes:
    """A verdict's card as a PNG or PDF file; the user's own style of figures stays as it is."""
    drawn = io.BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script without a font is drawn as boxes
        plots.style()
        about = {"CreationDate": None, "Subject": alt(verdict)}
        about = about if ending == "pdf" else {"Description": alt(verdict)}
        draw(verdict).savefig(drawn, format=ending, metadata=about)
    return drawn.getvalue()


def alt(verdict: Verdict) -> str:
    """What is to be seen on a card, in a sentence, for readers who do not see it."""
    things = [f"{thing['phrase']} ({_share(thing['real_below'])})" for thing in verdict.objects]
    named = f"; objects and the share of real ones that fit worse: {', '.join(things)}" if things else ""
    return plain(
        f"Verdict {verdict.verdict}, p(fake) {probability(verdict.p_fake)}; caption: {verdict.caption}{named}"
    )


def draw(verdict: Verdict) -> Figure:
    """Draw the card of a verdict, as high as what it has to say."""
    image = np.asarray(_pixels(verdict))
    height, width = image.shape[:2]
    wide = width > WIDE * height
    across = WIDTH - 2 * EDGE
    scale = across / width if wide else SIDE / max(height, width)
    size = max(1.0, scale * width), max(1.0, scale * height)
    things = sorted(verdict.objects, key=lambda thing: -abs(thing["adds"] or 0))
    shown = [thing for thing in verdict.objects if thing in things[:ROWS]]  # the worst fit first

    beside = across if wide else across - SIDE - GAP
    head = _wrap(_plainly(verdict.because), beside, most=7)
    said = [_wrap(_plainly(text), beside - 5, most=6) for text in _remarks(verdict)]
    caption = _wrap(_caption(verdict, shown), across, TEXT, most=6)
    made = f"itemkit {verdict.itemkit}, preset {verdict.preset}, models {verdict.models or 'unknown'}"
    small = _wrap(_plainly(made), across)
    rows = 1 + len(shown) + (len(things) > len(shown))
    text_high = 22 + 7.5 * (len(head) + sum(map(len, said))) + 4 * len(said)
    picture_high = size[1] + GAP + text_high if wide else max(size[1], text_high)
    parts = [picture_high, 12 * len(caption) + 10, 56 + 20, 9.5 * rows + 29, 7.5 * len(small)]
    total = sum(parts) + GAP * (len(parts) - 1) + 2 * EDGE
    tops = EDGE + np.cumsum([0, *parts[:-1]]) + GAP * np.arange(len(parts))

    fig = Figure((WIDTH / 72, total / 72), facecolor="white")
    fig.set_layout_engine("none")  # everything has its place
    page = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(total, 0))
    page.axis("off")

    def place(left: float, top: float, wide: float, high: float) -> Axes:
        return fig.add_axes((left / WIDTH, 1 - (top + high) / total, wide / WIDTH, high / total))

    # the picture with its objects; beside it the answer
    _picture(place(EDGE, tops[0], *size), image, verdict, shown)
    left, top = (EDGE, tops[0] + size[1] + GAP) if wide else (EDGE + SIDE + GAP, tops[0])
    ground = {"facecolor": GROUND.get(verdict.verdict, plots.BLACK), "edgecolor": "none", "pad": 2.5}
    big: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": "white", "bbox": ground}
    page.text(left + 3, top + 3, verdict.verdict, va="top", **big)
    number = f"p(fake) {probability(verdict.p_fake)}"
    page.text(left + beside, top + 4.5, number, va="top", ha="right", fontsize=TEXT)
    top = _write(page, head, left, top + 21)
    for lines in said:
        high = 7.5 * len(lines)
        page.add_patch(Rectangle((left, top + 3), 1.5, high, color=plots.ORANGE, lw=0))
        top = _write(page, lines, left + 5, top + 4)
    # the caption, with the scale of its colours below
    top = _write(page, caption, EDGE, tops[1], TEXT, 12, across)
    if shown:
        _scale(page, EDGE, top + 2)
    # the score between those of known images; what made it
    _scores(place(EDGE, tops[2], across, 56), verdict)
    axes = place(EDGE + LABEL, tops[3] + 9, across - LABEL - 16, 9.5 * rows)
    _adds(axes, verdict, shown, len(things) - len(shown))
    _write(page, small, EDGE, tops[4], colour=plots.GREY)
    return fig


# ------------------------------------------------------------------------------------------- what is said


def _pixels(verdict: Verdict) -> Image:
    if verdict.pixels is not None:
        return verdict.pixels
    data = read_bytes(verdict.path)
    if content_id(data) != verdict.image_id:
        raise InputError(f"{plain(verdict.path)} has changed since it was judged: judge it again")
    return load_image(data, verdict.path)


def _remarks(verdict: Verdict) -> list[str]:
    """What must not be overlooked, most important first."""
    seen = {"train": "trained", "val": "calibrated"}.get(verdict.seen)
    remarks = [verdict.novelty, f"the detector was {seen} with this very image" * bool(seen), verdict.note]
    return [*filter(None, remarks), *(f"{name}: {text}"[:120] for name, text in verdict.marks.items())][:5]


def _caption(verdict: Verdict, shown: list[dict[str, Any]]) -> list[Word]:
    """Words of the caption; all those of an object that is shown as one, with its number and share."""
    text, spans = verdict.caption, list[tuple[int, int, Word]]()
    for i, thing in enumerate(shown, 1):
        words = r"\W+".join(map(re.escape, thing["phrase"].split()))
        for hit in re.finditer(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE):
            if all(hit.end() <= start or hit.start() >= end for start, end, _ in spans):
                name = hit[0] if len(hit[0]) < 40 else f"{hit[0][:38]}…"
                said = f"{i} {name} {_share(thing['real_below'])}"
                spans.append((*hit.span(), (said, _shade(thing["real_below"]))))
                break
    found, at = list[Word](), 0
    for start, end, word in sorted(spans):
        found += [*_plainly(text[at:start]), word]
        at = end
    return found + _plainly(text[at:])


def _share(below: float | None) -> str:
    return "?" if below is None else f"{100 * below:.0f} %"


def _shade(below: float | None) -> str:
    return plots.GREY if below is None else mpl.colors.to_hex(SHADES(0.08 + 0.84 * below))


def _ink(ground: str) -> str:
    red, green, blue = mpl.colors.to_rgb(ground)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"


# ------------------------------------------------------------------------------------------- text in lines


def _plainly(text: str) -> list[Word]:
    return [(word, None) for word in text.split()]


def _wide(text: str, size: float) -> float:
    return float(text_to_path.get_text_width_height_descent(plain(text), FontProperties(size=size), False)[0])


def _wrap(words: list[Word], across: float, size: float = SMALL, most: int = 99) -> list[Line]:
    """Break words into lines; what is beyond the last of them is told by an ellipsis."""
    lines: list[Line] = [[]]
    for word, ground in words[:400]:
        pad, rest = (4.0 if ground else 0.0), word
        while rest:  # a script without spaces, or a file name, is broken where the line ends
            part = rest
            while len(part) > 1 and _wide(part, size) + pad > across:
                part = part[: max(1, int(len(part) * min(0.95, across / (_wide(part, size) + pad))))]
            long = _wide(part, size) + pad + 0.35 * size
            if lines[-1] and sum(wide for *_, wide in lines[-1]) + long > across:
                lines.append([])
            lines[-1].append((part, ground, long))
            rest = rest[len(part) :]
    if len(lines) > most:
        *kept, _ = lines[most - 1] if len(lines[most - 1]) > 1 else [*lines[most - 1], None]
        lines = [*lines[: most - 1], [*kept, ("…", None, size)]]
    return lines


def _write(
    page: Axes, lines: list[Line], left: float, top: float, size: float = SMALL, step: float = 7.5,
    across: float = 0, colour: str = plots.BLACK,
) -> float:  # fmt: skip
    """Write lines from their upper left corner, of a right-to-left text from the right; returns the end."""
    letters = "".join(word for line in lines for word, *_ in line)
    first = next((kind for c in letters if (kind := unicodedata.bidirectional(c)) in ("L", "R", "AL")), "L")
    for i, line in enumerate(lines):
        at = 0.0
        for word, ground, wide in line:
            x = left + at if first == "L" or not across else left + across - at - wide
            box = {"facecolor": ground, "edgecolor": "none", "pad": 1.2} if ground else None
            look: dict[str, Any] = {
                "fontsize": size,
                "color": _ink(ground) if ground else colour,
                "bbox": box,
            }
            page.text(x + (2 if ground else 0), top + (i + 0.75) * step, plain(word), **look)
            at += wide
    return top + len(lines) * step


# ------------------------------------------------------------------------------------------------ the parts


def _picture(ax: Axes, image: np.ndarray, verdict: Verdict, shown: list[dict[str, Any]]) -> None:
    plots.show_image(ax, image)
    height, width = image.shape[:2]
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="auto")
    for i, thing in reversed([*enumerate(shown, 1)]):  # the worst on top
        if None in thing["box"]:
            continue
        x0, y0, x1, y1 = thing["box"]
        shade = _shade(thing["real_below"])
        for colour, lw in (("black", 2.6), ("white", 2.0), (shade, 1.4)):
            style = "-" if thing["found"] else ":"
            frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=colour, lw=lw, ls=style)
            ax.add_patch(frame)
        ground = {"facecolor": shade, "edgecolor": "black", "linewidth": 0.4, "pad": 1.0}
        look: dict[str, Any] = {"fontsize": SMALL, "color": _ink(shade), "bbox": ground, "clip_on": True}
        inside = (x0 - 0.5, y0 - 0.5), (2, -2), "data", "offset points"
        ax.annotate(str(i), *inside, va="top", **look)


def _scale(page: Axes, left: float, top: float) -> None:
    """What colour and number mean: the share of validation reals' objects that fit worse."""
    text = "objects of real images that fit their words worse:"
    page.text(left, top + 5.5, text, fontsize=SMALL, color=plots.GREY)
    left += _wide(text, SMALL) + 6
    for below in (0, 0.25, 0.5, 0.75, 1):
        shade = _shade(below)
        page.add_patch(Rectangle((left, top - 0.5), 8, 7.5, color=shade, lw=0))
        left += 8
    page.text(left + 3, top + 5.5, "0 to 100 %", fontsize=SMALL, color=plots.GREY)


def _scores(ax: Axes, verdict: Verdict) -> None:
    """The log-odds between those of the calibration images, with what is called real, unsure and fake."""
    judge, score = verdict.detector, float(verdict.log_odds or 0)
    assert judge is not None
    known = {"real": (judge.real_scores_, plots.BLUE), "fake": (judge.fake_scores_, plots.VERMILION)}
    every = np.concatenate([judge.real_scores_, judge.fake_scores_])
    every = every if len(every) else np.array([score])
    pad = 0.08 * float(np.ptp(every)) + 0.5
    low, high = float(every.min()) - pad, float(every.max()) + pad
    x = np.linspace(low, high, 300)
    curves = {n: plots.smooth(y, x) for n, (y, _) in known.items() if len(y) > 4 and np.ptp(y)}
    most = max((y.max() for y in curves.values()), default=1)
    for i, (name, (scores, colour)) in enumerate(known.items()):
        if name in curves:
            ax.fill_between(x, curves[name] / most, color=colour, alpha=0.35, lw=0)
            ax.plot(x, curves[name] / most, color=colour, lw=1)
        else:  # too few for a curve
            ax.plot(scores, np.full(len(scores), 0.1 + 0.2 * i), "|", color=colour, ms=6)
    cuts, top = _cuts(verdict), 2.2
    for cut in cuts:
        ax.plot([cut, cut], [0, 1.3], color=plots.BLACK, lw=0.8, ls=":")
    if len(cuts) == 2 and verdict.verdict != "withheld":
        ax.axvspan(cuts[0], cuts[1], 0, 1.3 / top, color=plots.GREY, alpha=0.3, lw=0)
        middle = sum(cuts) / 2
        for name, at in (("real", (low + cuts[0]) / 2), ("unsure", middle), ("fake", (high + cuts[1]) / 2)):
            if name == "unsure" or abs(at - middle) > 0.1 * (high - low):
                look: dict[str, Any] = {"color": GROUND.get(name, plots.BLACK), "fontsize": SMALL}
                ax.text(at, 1.08, name, ha="center", **look)
    ax.set(xlim=(low, high), ylim=(0, top), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.tick_params(labelsize=SMALL, pad=1.5)
    for (name, (scores, colour)), side in zip(known.items(), ("left", "right"), strict=True):
        text = f"{len(scores):,} {name} validation images"
        ax.text(
            side == "right", 1, text, transform=ax.transAxes, ha=side, va="top", fontsize=SMALL, color=colour
        )
    at = min(max(score, low), high)  # one far beyond all others stands at the edge, with its number
    near = (at - low) / (high - low)
    look = {"ha": "left" if near < 0.15 else "right" if near > 0.85 else "center", "fontweight": "bold"}
    ax.plot([at, at], [0, 1.45], color=plots.BLACK, lw=1.8)
    ax.text(at, 1.52, f"this image{'' if at == score else f', at {score:.3g}'}", fontsize=SMALL, **look)
    ax.set_xlabel(_axis(verdict, cuts), fontsize=SMALL, labelpad=1.5)


def _cuts(verdict: Verdict) -> list[float]:
    """Log-odds between which a verdict is "unsure", those that enough calibration images promise."""
    judge, (fpr, fnr), cuts = verdict.detector, verdict.rates, []
    assert judge is not None
    for scores, rate, label in ((judge.real_scores_, fpr, 0), (-judge.fake_scores_, fnr, 1)):
        if calibrate.lacking(rate, len(scores), label) is None:
            cut = calibrate.threshold_at_fpr(scores, rate).value
            cuts.append(cut if label == schema.REAL else -cut)
    return sorted(cuts)


def _axis(verdict: Verdict, cuts: list[float]) -> str:
    fpr, fnr = verdict.rates
    if len(cuts) < 2 or verdict.verdict == "withheld":
        return "log-odds of fake; too few validation images for a promise"
    return f"log-odds of fake; dotted: {100 * fpr:.3g} % of reals above, {100 * fnr:.3g} % of fakes below"


def _adds(ax: Axes, verdict: Verdict, shown: list[dict[str, Any]], others: int) -> None:
    """What the whole image says alone, and by how much the log-odds fall without each object."""
    rows = [("whole image alone", verdict.global_adds or 0.0, plots.BLACK)]
    for i, thing in enumerate(shown, 1):
        name = thing["phrase"] if thing["found"] else f"{thing['phrase']} (no box)"
        rows.append((f"{i} {name}", thing["adds"] or 0.0, _shade(thing["real_below"])))
    said = "what the whole image says alone, and what is lost when an object is left out"
    said = said if verdict.objects else "the caption names no object: all is said by the whole image"
    head: dict[str, Any] = {"textcoords": "offset points", "fontsize": SMALL, "color": plots.GREY}
    ax.annotate(said, (0, 1), (-LABEL, 2), "axes fraction", **head)
    for y, (name, value, colour) in enumerate(rows):
        ax.barh(y, value, 0.72, color=colour, ec="black", lw=0.4)
        aside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SMALL}
        side = "left" if value >= 0 else "right"
        ax.annotate(
            f"{value:+.1f}".replace("-", "−"), (value, y), (3 if value >= 0 else -3, 0), ha=side, **aside
        )
        while len(name) > 4 and _wide(name, SMALL) > LABEL - 4:
            name = f"{name[:-2].rstrip()}…"
        look: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": SMALL}
        ax.annotate(plain(name), (0, y), (-4, 0), ("axes fraction", "data"), "offset points", **look)
    if others:
        more = (f"and {others} more", (0, len(rows)), (-4, 0), ("axes fraction", "data"), "offset points")
        ax.annotate(*more, ha="right", va="center", fontsize=SMALL)
    values = [0.0, *(value for _, value, _ in rows)]
    pad = 0.16 * max(np.ptp(values), 0.5)
    ax.set(xlim=(min(values) - pad * (min(values) < 0), max(values) + pad * (max(values) > 0)))
    ax.set(ylim=(len(rows) + bool(others) - 0.4, -0.6), yticks=[])
    ax.axvline(0, color=plots.BLACK, lw=0.7)
    ax.spines["left"].set_visible(False)
    ax.tick_params(labelsize=SMALL, pad=1.5)
    ax.set_xlabel("log-odds of fake", fontsize=SMALL, labelpad=1.5)
