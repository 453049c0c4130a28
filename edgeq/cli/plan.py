"""Tell before downloading or converting what fits a machine, how fast it will be, what to take."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._table import show, table
from edgeq.cli._terminal import Status, harmless, human, is_terminal, note

if TYPE_CHECKING:
    from types import ModuleType

    from rich.table import Table

    from edgeq.blueprint import Blueprint
    from edgeq.plan import Efficiency, Row, Speed
    from edgeq.rates import Rates

GIB = 1 << 30


@dataclass(frozen=True)
class _Place:
    """Where the model would run."""

    name: str
    ram: int  # bytes that it may take
    isa: "ModuleType"
    rates: "Rates | None"


@click.command()
@click.argument("model", required=False)
@click.option("--device", metavar="NAME", help="As `edgeq devices` lists them. [this machine]")
@click.option("-c", "--ctx", type=click.IntRange(1), help="Context. [4096, or of training]")
@click.option("--kv", default="f16", metavar="TYPE", help="KV cache, also K,V. [f16]")
@click.option("-d", "--n-depth", "depth", type=click.IntRange(0), default=0, help="Tokens before.")
@click.option("-t", "--threads", type=click.IntRange(1, 256), help="Threads. [what does best]")
@click.option(
    "--efficiency",
    metavar="DECODE[,PREFILL]",
    help="Of another engine: the shares of bandwidth and of dot products that it reaches.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    model: str | None,
    device: str | None,
    ctx: int | None,
    kv: str,
    depth: int,
    threads: int | None,
    efficiency: str | None,
    as_json: bool,
) -> None:
    """Tell for each recipe of MODEL: file, RAM, what fits, tokens per second, expected loss.

    MODEL is a checkpoint folder, a GGUF file or user/repo[:quant], of which only headers are
    fetched. Without MODEL: what could run, by size and recipe. Speeds are of a prompt of 512 tokens
    and of generation.
    """
    from edgeq import cache, hub
    from edgeq.blueprint import read

    options = {
        "ctx": ctx,
        "kv": cache.kv_types(kv.split(",") if "," in kv else kv),
        "depth": depth,
        "efficiency": _shares(efficiency),
    }
    if model is None:
        _sizes(device, threads, options, as_json)
        return
    with hub.headers(model) as path:
        blueprint = read(path)
    with _status() as status:
        place = _place(device, threads, [blueprint], status)
    _show_model(blueprint, place, options, as_json)


def _shares(text: str | None) -> "Efficiency | None":
    """
    >>> _shares("0.88"), _shares("0.88,0.5")
    ((0.88, None), (0.88, 0.5))
    """
    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) not in (1, 2) or not all(0 < share <= 4 for share in shares):
        raise click.BadParameter(f"--efficiency {text}: expected shares such as 0.88 or 0.88,0.5")
    return shares[0], shares[1] if len(shares) == 2 else None


@contextmanager
def _status() -> Iterator[Any]:
    """Callback that says what takes time, on a terminal."""
    status = Status()

    def report(what: str, done: int, total: int) -> None:
        if is_terminal(sys.stderr):
            status(f"measuring this machine, once: {done}/{total} {what}")

    try:
        yield report
    finally:
        status.clear()


def _place(
    device: str | None, threads: int | None, plans: "list[Blueprint]", progress: Any
) -> _Place:
    """The device by its files, or this machine as it is measured."""
    from edgeq import devices, memory, rates
    from edgeq.errors import RequestError
    from edgeq.kernels import isa

    pair = (threads, threads) if threads else None
    if device is not None:
        known = devices.get(device)
        ram = (known.ram[-1] if known.ram else 0) - (known.system_mib << 20)
        if not known.ram:
            raise RequestError(f"device {known.id}: its file has no ram_gib: add it")
        size = f", {known.ram_gib[0]:g} GB"
        found = rates.of_device(known, pair)
        return _Place(f"{known.name}{size}", ram, isa.named(known.isa, device), found)
    formats = {m.format.name for plan in plans for file in plan.files for m in file.matrices} | {
        "F16"
    }
    runs = any(plan.arch for plan in plans)
    here = rates.measured(formats, pair, progress) if runs else None
    return _Place("this machine", memory.available(), isa.choose(), here)


# -- one model -------------------------------------------------------------------------------------
def _show_model(
    blueprint: "Blueprint", place: _Place, options: dict[str, Any], as_json: bool
) -> None:
    from edgeq.plan import recommended, rows

    found = rows(blueprint, place.rates, place.isa, place.ram, **options)
    best = recommended(found)
    if as_json:
        document = _model_record(blueprint) | _place_record(place, options)
        document["rows"] = [_record(row) for row in found]
        document["recommended"] = best and {"recipe": best[0].file.recipe, "reason": best[1]}
        click.echo(json.dumps(document, indent=1))
        return
    if blueprint.problem:
        note(f"the engine cannot run it: {blueprint.problem}")
    if not blueprint.exact:
        note("the size of the vocabulary is guessed: it was not fetched")
    show(_table_of(found, best))
    lines = [
        *_machine_lines(place, options, found),
        *_legend(found, options),
        *_advice(found, best),
    ]
    click.echo(harmless("\n".join(lines)))


def _legend(found: "list[Row]", options: dict[str, Any]) -> list[str]:
    """What columns say, and why one is empty."""
    lines = ["loss: KL divergence that such formats cost the small example model."]
    if found[0].context is None:
        return lines
    before = f" after {options['depth']} others" * bool(options["depth"])
    lines = [
        f"RAM: with a context of {found[0].context} ({_kv(options)}). ctx: the most that fits.",
        f"prompt, gen: tokens per second{before}, limited by (gen) limit.",
        *lines,
    ]
    if not any(row.prefill for row in found):
        lines += [f"prompt: empty, {_why_no_prompt(options)}."]
    return lines


def _why_no_prompt(options: dict[str, Any]) -> str:
    if options["efficiency"] and options["efficiency"][1] is None:
        return "--efficiency has no share of dot products"
    return "nothing is known of the products that it can do: add `dot` to the device's file"


def _kv(options: dict[str, Any]) -> str:
    return "KV " + ",".join(dict.fromkeys(options["kv"]))


def _advice(found: "list[Row]", best: "tuple[Row, str] | None") -> list[str]:
    from edgeq.blueprint import AS_IS
    from edgeq.plan import closest

    if found[0].file.arch is None:
        return ["No advice: the engine cannot run it."]
    if best is None:
        near = closest(found)
        if near is None:
            return ["Nothing fits: it needs a machine with more memory."]
        name = near.file.recipe
        return [
            f"With a context of {near.context} nothing fits: {name} fits with -c {near.largest}."
        ]
    row, reason = best
    what = f"it {AS_IS}" if row.file.recipe == AS_IS else row.file.recipe
    lines = [f"Take {what}: {reason}."]
    if row.decode:
        count = f"{row.threads} thread{'s' * (row.threads != 1)}"
        lines += [
            f"It would generate {_rate(row.decode)} tokens/s with {count}, held up by "
            f"{row.decode.limit}."
        ]
    return lines


def _table_of(found: "list[Row]", best: "tuple[Row, str] | None") -> "Table":
    heads = ("", "recipe", "file", "bits", "RAM", "ctx", "prompt", "gen", "limit", "loss")
    made = table(*heads, right=(*heads[2:8], "loss"), whole=True)
    for row in found:
        file = row.file
        made.add_row(
            "*" if best and row is best[0] else "",
            file.recipe,
            human(file.nbytes),
            f"{file.bits_per_weight:.2f}",
            "" if row.ram is None else human(row.ram),
            _context(row),
            _rate(row.prefill),
            _rate(row.decode),
            row.decode.limit if row.decode else "",
            "" if file.divergence is None else f"{file.divergence:.4f}",
        )
    return made


def _context(row: "Row") -> str:
    """The largest that fits."""
    return "" if row.largest is None else str(row.largest) if row.largest else "no"


def _rate(speed: "Speed | None") -> str:
    if speed is None:
        return ""
    return f"{speed.tokens:.0f}" if speed.tokens >= 100 else f"{speed.tokens:.3g}"


def _machine_lines(place: _Place, options: dict[str, Any], found: "list[Row]") -> list[str]:
    lines = [f"{place.name}: {human(max(place.ram, 0))} of memory for it"]
    if place.rates:
        few, many = place.rates.threads
        other = sorted({row.threads for row in found if row.threads} - {few})
        more = " or ".join(map(str, other))
        counts = f"{few}, or {more} where arithmetic takes longer" if other else f"{few}"
        counts += f"; prompts {many}" if other or few != many else ""
        lines += [f"{place.rates.read:.3g} GB/s {place.rates.source}", f"threads: {counts}"]
    if options["efficiency"]:
        decode, prefill = options["efficiency"]
        prompts = "" if prefill is None else f", {prefill:.3g} of the dot products with prompts"
        lines += [f"an engine that gets {decode:.3g} of the bandwidth{prompts}"]
    return lines


def _model_record(blueprint: "Blueprint") -> dict[str, Any]:
    return {
        "model": blueprint.name,
        "problem": blueprint.problem or None,
        "sizes_exact": blueprint.exact,
        "trained_context": blueprint.arch.context_length if blueprint.arch else None,
    }


def _place_record(place: _Place, options: dict[str, Any]) -> dict[str, Any]:
    rates = place.rates
    return {
        "device": place.name,
        "available": place.ram,
        "threads": rates.threads[0] if rates else None,
        "threads_batch": rates.threads[1] if rates else None,
        "read_gbs": rates.read if rates else None,
        "source": rates.source if rates else None,
        "type_k": options["kv"][0],
        "type_v": options["kv"][1],
        "depth": options["depth"],
        "efficiency": options["efficiency"],
    }


def _record(row: "Row") -> dict[str, Any]:
    return {
        "recipe": row.file.recipe,
        "bytes": row.file.nbytes,
        "bits_per_weight": round(row.file.bits_per_weight, 4),
        "context": row.context,
        "ram": row.ram,
        "fits": row.fits,
        "largest_context": row.largest,
        "prefill": row.prefill and row.prefill.tokens,
        "prefill_limit": row.prefill and row.prefill.limit,
        "decode": row.decode and row.decode.tokens,
        "decode_limit": row.decode and row.decode.limit,
        "threads": row.threads,
        "divergence": row.file.divergence,
    }


# -- all sizes -------------------------------------------------------------------------------------
def _sizes(device: str | None, threads: int | None, options: dict[str, Any], as_json: bool) -> None:
    from edgeq.errors import RequestError
    from edgeq.plan import CONTEXT, rows
    from edgeq.sizes import MIXTURES, blueprints

    plans, wanted = blueprints(), options["ctx"] or CONTEXT
    most = max(plan.arch.context_length for plan in plans if plan.arch)
    if wanted > most:
        raise RequestError(f"context {wanted}: of these sizes none has more than {most} positions")
    with _status() as status:
        place = _place(device, threads, plans, status)
    found = {}
    for plan in plans:
        assert plan.arch is not None
        own = options | {"ctx": min(wanted, plan.arch.context_length)}
        found[plan.name] = rows(plan, place.rates, place.isa, place.ram, **own)
    if as_json:
        records = [{"size": name, **_record(row)} for name, some in found.items() for row in some]
        click.echo(json.dumps(_place_record(place, options) | {"rows": records}))
        return
    made = table("size", *MIXTURES, right=tuple(MIXTURES), whole=True)
    for name, some in found.items():
        made.add_row(name, *(_cell(row) for row in some))
    show(made)
    used = {name: some[0].context for name, some in found.items()}
    less = ", ".join(f"{name}: {context}" for name, context in used.items() if context != wanted)
    context = f"{wanted} ({less})" if less else f"{wanted}"
    before = f" after {options['depth']} others" * bool(options["depth"])
    lines = [
        *_machine_lines(place, options, [row for some in found.values() for row in some]),
        f"GiB of RAM with a context of {context}, {_kv(options)};",
        f"tokens generated per second{before} (-: too large)",
    ]
    click.echo(harmless("\n".join(lines)))


def _cell(row: "Row") -> str:
    assert row.ram is not None
    return f"{row.ram / GIB:.1f} {_rate(row.decode) if row.fits else '-':>5}"
