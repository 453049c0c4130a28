"""The page of a comparison: complete, alone, and safe with whatever names and answers say."""

import copy
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgeq.report import html, plots
from edgeq.report.plots import AREA, Point, linear_ticks, log_ticks, place, scatter

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028"


def estimate(value: float | None) -> dict[str, float | None]:
    return {"value": value, "error": None if value is None else value / 50}


def row(name: str, bits: float, kld: float | None, **more: Any) -> dict[str, Any]:
    def tensor(kind: str) -> dict[str, Any]:
        nbytes = int(256 * 8 * bits / 8)
        return {
            "name": kind,
            "shape": [8, 256],
            "format": f"Q{bits:.0f}_K",
            "nbytes": nbytes,
            "relative_rmse": 2**-bits,
        }

    kinds = ["token_embd.weight", *(f"blk.{i}.{k}.weight" for i in range(3) for k in ("a", "b"))]
    divergence = {"ratio": estimate(1.01), "kld": estimate(kld), "same_top": estimate(95.0)}
    told = [{"question": "2 + 2?", "expected": ["4"], "task": "sums", "text": name, "right": True}]
    count = {"count": 1, "right": 1, "accuracy": 1.0, "low": 0.2, "high": 1.0}
    return {
        "name": name,
        "size": int(bits * 2**20),
        "bits_per_weight": bits,
        "relative_rmse": 2**-bits,
        "warnings": [],
        "evaluation": {"divergence": divergence},
        "speed": {
            "prefill": estimate(100.0),
            "decode": estimate(100 / bits),
            "peak_ram": int(bits * 2**21),
            "prompt": 64,
        },
        "questions": {"total": count, "tasks": {}, "answers": told},
        "tensors": [tensor(kind) for kind in kinds],
        **more,
    }


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    listed = rows or (row("F16", 16, 0.0), row("Q8", 8.5, 0.0002), row("Q4", 4.5, 0.004))
    return {
        "edgeq": "1.0",
        "source": "models/tiny",
        "reference": listed[0]["name"],
        "text": {"ctx": 64, "windows": 3, "tokens": 93},
        "machine": {"cpu": "A CPU", "isa": "portable", "threads": 2},
        "rows": list(listed),
    }


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._open = "", list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_needs_nothing_else() -> None:
    text = html(document())
    page = Page(text)
    assert {"link", "img", "iframe", "object"} & {tag for tag, _ in page.tags} == set()
    loads = [a for _, attrs in page.tags for a in attrs if a in ("src", "href", "data", "action")]
    assert loads == []
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'$", policy)


def test_the_policy_names_the_script_of_the_page() -> None:
    """With another hash a browser would not run it."""
    import base64
    import hashlib

    text = html(document())
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert script == (Path(plots.__file__).with_name("page.js")).read_text("utf-8")


def test_tables_are_there_without_the_script() -> None:
    page = Page(html(document()))
    for shown in ("Decision table", "0.00400", "± 0.00008", "A CPU", "2 + 2?", "Q4_K 7", "4.5"):
        assert shown in page.text, shown
    assert len(page.all("svg")) == 2
    assert all(attrs["role"] == "img" for attrs in page.all("svg"))
    slider = page.all("input")[0]
    assert (slider["type"], slider["max"], slider["value"]) == ("range", "2", "0")  # Q4 is shown
    assert [a for a in page.all("div") if a.get("class") == "slider"] == [
        {"class": "slider", "hidden": None}
    ]
    assert len([a for a in page.all("td") if "data-tensor" in a]) == 7
    data = json.loads(page.scripts[0])
    assert [given["name"] for given in data["rows"]] == ["F16", "Q8", "Q4"]
    assert len(data["rows"][0]["tensors"]) == len(data["names"]) == 7


def test_the_first_row_to_show_is_near_five_bits() -> None:
    page = Page(html(document()))
    assert json.loads(page.scripts[0])["chosen"] == 2
    assert "Q4, 4.50 bits per weight" in page.text


def poisoned() -> dict[str, Any]:
    """Every text that comes from outside is an attack."""
    bad = copy.deepcopy(document())
    bad["source"] = EVIL
    bad["machine"]["cpu"] = EVIL
    bad["reference"] = bad["rows"][0]["name"] = f"F16 {EVIL}"
    for i, one in enumerate(bad["rows"]):
        one["name"] = one["name"] if i == 0 else f"{i} {EVIL}"
        for tensor in one["tensors"]:
            tensor["name"] += EVIL
            tensor["format"] += EVIL
        for answer in one["questions"]["answers"]:
            answer |= {"question": EVIL, "expected": [EVIL], "text": EVIL, "task": EVIL}
    return bad


def test_texts_from_outside_stay_texts() -> None:
    good, bad = Page(html(document())), Page(html(poisoned()))
    assert [tag for tag, _ in bad.tags] == [tag for tag, _ in good.tags]
    handlers = {name for _, attrs in bad.tags for name in attrs if name.startswith("on")}
    assert handlers == set()
    assert len(bad.scripts) == 2
    assert json.loads(bad.scripts[0])["rows"][1]["answers"] == [[EVIL, True]]
    assert "<" not in bad.scripts[0]
    assert EVIL in bad.text
    assert "innerHTML" not in bad.scripts[1]


def test_what_was_not_measured_is_left_out() -> None:
    rows = [
        row(name, bits, kld, speed=None, questions=None, relative_rmse=None)
        for name, bits, kld in (("F16", 16, 0.0), ("Q8", 8.5, None))
    ]
    for one in rows:
        for tensor in one["tensors"]:
            tensor["relative_rmse"] = None
    bare = document(*rows) | {"machine": None}
    page = Page(html(bare))
    assert page.all("svg") == []
    for word in ("Peak RAM", "tok/s", "Answers"):
        assert word not in page.text
    assert "–" in page.text


def test_labels_cover_no_dot_and_no_other_label() -> None:
    rng = random.Random(5)
    for _ in range(40):
        n = rng.randint(2, 9)
        texts = [rng.choice(["Q2_K", "Q4_K_M rtn", "IQ4_XS gptq"]) for _ in range(n)]
        places = [
            (rng.uniform(AREA.left, AREA.right), rng.uniform(AREA.top, AREA.bottom))
            for _ in range(n)
        ]
        boxes = [label.box for label in place(texts, places, AREA)]
        for i, box in enumerate(boxes):
            assert AREA.left <= box.left < box.right <= AREA.right + 1e-9
            assert AREA.top <= box.top < box.bottom <= AREA.bottom + 1e-9
            assert sum(box.overlap(other) for other in boxes[:i]) == 0
            for x, y in places:
                dot = plots.Box(x - 4, y - 4, x + 4, y + 4)
                assert box.overlap(dot) == 0


def test_a_crowd_of_labels_is_still_drawn() -> None:
    labels = place(["a long label"] * 60, [(200.0, 150.0)] * 60, AREA)
    assert len(labels) == 60


@pytest.mark.parametrize(
    ("values", "count"), [([3.2, 7.9], 6), ([5.0], 3), ([0.001, 0.0011], 3), ([1, 1e6], 4)]
)
def test_ticks_enclose_the_values(values: list[float], count: int) -> None:
    for ticks in (linear_ticks(values), log_ticks(values)):
        assert ticks == sorted(set(ticks))
        assert ticks[0] <= min(values) <= max(values) <= ticks[-1]
        assert 2 <= len(ticks) <= 12
    assert len(linear_ticks(values)) >= min(count, 2)


def test_points_lie_where_their_values_are() -> None:
    points = [Point("a", 1, 0.1, 0), Point("b", 3, 0.001, 1), Point("zero", 2, 0, 2)]
    plot = scatter(points, "x", "y", larger_x_is_better=False)
    assert plot is not None
    assert [p.name for _, _, p, _ in plot.dots] == ["a", "b"]
    ticks = {text: at for at, text in plot.x_ticks} | {text: at for at, text in plot.y_ticks}
    (ax, ay, *_), (bx, by, *_) = plot.dots
    assert (ax, ay, bx, by) == (ticks["1"], ticks["0.1"], ticks["3"], ticks["0.001"])
