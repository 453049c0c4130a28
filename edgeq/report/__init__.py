"""A comparison as one HTML page that needs nothing else: no network, no fonts, no other files.

The page is drawn here, tables and plots; its script (page.js) only moves the choice between rows.
All texts of the comparison are untrusted: the template escapes them, the data for the script is
JSON in which no tag can begin, and the page's own policy allows no script but ours.
"""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgeq.gguf.names import split
from edgeq.report.plots import Plot, Point, front, scatter

__all__ = ["html"]

Table = dict[str, Any]
_DARKEST = 0.75  # share of the heat colour in the cell with the largest error
_SPAN = 100  # between the largest error and the one that is drawn palest


def html(document: Table) -> str:
    """The page of a comparison, as `edgeq.compare.compare` returns it."""
    import jinja2

    folder = Path(__file__).parent
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script, style = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("js", "css"))
    return environment.get_template("page.html").render(
        document=document,
        title=Path(document["source"]).name or document["source"],
        style=style,
        script=script,
        script_hash=_hash(script),
        **_contents(document),
    )


def _hash(script: str) -> str:
    """As a Content-Security-Policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _contents(document: Table) -> Table:
    rows = document["rows"]
    heat = _Heat(rows)
    shown = [{**_figures(row), "tensors": heat.cells(row)} for row in rows]
    for row, figures in zip(rows, shown):
        figures["formats"] = _formats(row["tensors"])
    base = next(row for row in rows if row["name"] == document["reference"])
    chosen = _first_choice(rows, document["reference"])
    return {
        "rows": shown,
        "best": _best(rows, document["reference"]),
        "base": base,
        "base_size": _fixed(_size(base), 1),
        "base_speed": _rate(base["speed"]["decode"]) if base["speed"] else "",
        "chosen": chosen,
        "heat": heat,
        "quality": _plot(rows, document["reference"], _size, "file size, MiB", False),
        "speed": _plot(rows, document["reference"], _decode, "generation, tokens per second", True),
        "questions": _questions(rows, base),
        "data": _script_data(rows, shown, chosen, heat.names),
    }


def _first_choice(rows: Sequence[Table], reference: str) -> int:
    """The row that the page opens with: near 5 bits, where most people settle."""
    others = [i for i, row in enumerate(rows) if row["name"] != reference] or [0]
    return min(others, key=lambda i: abs(rows[i]["bits_per_weight"] - 5))


# -- figures ---------------------------------------------------------------------------------------
def _figures(row: Table) -> Table:
    """Texts of the table's cells, and ± of those that have one."""
    d, speed = row["evaluation"]["divergence"], row["speed"]
    answers, rmse = row["questions"], row["relative_rmse"]
    return {
        "name": row["name"],
        "size": _fixed(row["size"] / 2**20, 1),
        "bits": _fixed(row["bits_per_weight"], 2),
        "ram": _fixed(speed["peak_ram"] / 2**20, 0) if speed else "",
        "prefill": _rate(speed["prefill"]) if speed else "",
        "decode": _rate(speed["decode"]) if speed else "",
        "ratio": _fixed(d["ratio"]["value"], 4),
        "ratio_error": _fixed(d["ratio"]["error"], 4),
        "kld": _digits(d["kld"]["value"]),
        "kld_error": _digits(d["kld"]["error"], 2),
        "top": _fixed(d["same_top"]["value"], 2),
        "top_error": _fixed(d["same_top"]["error"], 2),
        "right": _fixed(100 * answers["total"]["accuracy"], 1) if answers else "",
        "interval": _interval(answers["total"]) if answers else "",
        "error": _fixed(100 * rmse, 2) if rmse is not None else "",
    }


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _rate(estimate: Table) -> str:
    return _fixed(estimate["value"], 1 if estimate["value"] < 1000 else 0)


def _digits(value: float | None, digits: int = 3) -> str:
    """So many significant digits, never in powers of ten.

    >>> _digits(0.0412345), _digits(0.00012345, 2), _digits(0.0)
    ('0.0412', '0.00012', '0')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def _interval(count: Table) -> str:
    return f"{100 * count['low']:.0f}–{100 * count['high']:.0f}"


# -- plots -----------------------------------------------------------------------------------------
def _size(row: Table) -> float:
    return float(row["size"]) / 2**20


def _decode(row: Table) -> float:
    return float(row["speed"]["decode"]["value"]) if row["speed"] else math.nan


def _kld(row: Table) -> float:
    value = row["evaluation"]["divergence"]["kld"]["value"]
    return math.nan if value is None else float(value)


def _points(rows: Iterable[Table], reference: str, x: Any) -> list[Point]:
    """The reference has no place on a logarithmic axis."""
    return [
        Point(row["name"], x(row), _kld(row), i)
        for i, row in enumerate(rows)
        if row["name"] != reference
    ]


def _plot(rows: Sequence[Table], reference: str, x: Any, title: str, larger: bool) -> Plot | None:
    points = _points(rows, reference, x)
    return scatter(points, title, "KL divergence, nats per token", larger_x_is_better=larger)


def _best(rows: Sequence[Table], reference: str) -> set[str]:
    """Rows than which no smaller file is closer to the reference."""
    points = [p for p in _points(rows, reference, _size) if not math.isnan(p.y)]
    return {point.name for point in front(points, False)}


# -- tensors ---------------------------------------------------------------------------------------
def _formats(tensors: Iterable[Table]) -> str:
    """
    >>> _formats([{"format": "Q4_K"}, {"format": "F32"}, {"format": "Q4_K"}])
    'Q4_K 2, F32 1'
    """
    counts = Counter(tensor["format"] for tensor in tensors)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


class _Heat:
    """Matrices of the model as a grid: kinds of tensors down, layers across."""

    def __init__(self, rows: Sequence[Table]) -> None:
        names = [t["name"] for row in rows for t in row["tensors"] if len(t["shape"]) > 1]
        self.names = list(dict.fromkeys(names))
        places = [split(name) for name in self.names]
        inside = [(layer, kind) for layer, kind in places if layer is not None]
        self.layers = 1 + max((layer for layer, _ in inside), default=-1)
        self.kinds = list(dict.fromkeys(kind for _, kind in inside))
        self.outside = [name for layer, name in places if layer is None]
        # Outside the layers, -1 stands for one.
        self.at = {(k, -1 if layer is None else layer): i for i, (layer, k) in enumerate(places)}
        known: list[float] = [
            t["relative_rmse"] for row in rows for t in row["tensors"] if t["relative_rmse"]
        ]
        self.high = max(known, default=1.0)
        self.low = self.high / _SPAN

    def cells(self, row: Table) -> list[tuple[str, str, float, str]]:
        """Of each matrix: bits, format, heat from 0 to 1, relative error."""
        tensors = {tensor["name"]: tensor for tensor in row["tensors"]}
        return [self._cell(tensors.get(name)) for name in self.names]

    def _cell(self, tensor: Table | None) -> tuple[str, str, float, str]:
        if tensor is None:
            return "", "absent", 0.0, ""
        bits = 8 * tensor["nbytes"] / math.prod(tensor["shape"])
        error = tensor["relative_rmse"]
        told = "" if error is None else f"{100 * error:.2f} %"
        return f"{bits:.2g}", tensor["format"], self._heat(error), told

    def _heat(self, error: float | None) -> float:
        """By the logarithm of the error, so that formats of all sizes differ."""
        if not error:
            return 0.0
        above = 1 + math.log(error / self.high) / math.log(_SPAN)
        return round(_DARKEST * min(max(above, 0.0), 1.0), 3)


# -- answers, data of the script -------------------------------------------------------------------
def _questions(rows: Sequence[Table], base: Table) -> list[Table]:
    """Each question with the reference's answer; `differs` where some row's answer is another."""
    if not base["questions"]:
        return []
    found = []
    for i, asked in enumerate(base["questions"]["answers"]):
        given = [row["questions"]["answers"][i] for row in rows]
        differs = any(answer["text"] != asked["text"] for answer in given)
        found.append({**asked, "given": given, "differs": differs})
    return found


def _script_data(
    rows: Sequence[Table], shown: Sequence[Table], chosen: int, names: Sequence[str]
) -> str:
    """What page.js needs, as JSON in which no tag can begin."""
    answers = [
        [[a["text"], a["right"]] for a in row["questions"]["answers"]] if row["questions"] else []
        for row in rows
    ]
    merged = [{**figures, "answers": given} for figures, given in zip(shown, answers)]
    text = json.dumps({"chosen": chosen, "names": names, "rows": merged}, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
