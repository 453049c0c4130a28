"""`edgeq plan` as a command: tables, advice, JSON, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import edgeq
from edgeq import cli, devices, rates
from edgeq.blueprint import read
from edgeq.kernels import isa as isas

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
F16 = ("f16", "f16")
PI5 = rates.of_device(devices.get("rpi5"))


def planned(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *args])


def test_a_plan_is_shown(tmp_path: Path) -> None:
    shown = planned(str(EXAMPLE), "--device", "rpi5-8gb")
    assert shown.exit_code == 0, shown.stderr
    assert all(len(line) <= 80 for line in shown.stdout.splitlines()), shown.stdout
    assert re.search(r"\* +Q4_K_M +4\.5 MiB +5\.07 ", shown.stdout)
    assert "Take Q4_K_M" in shown.stdout
    found = json.loads(planned(str(EXAMPLE), "--device", "rpi5-8gb", "--json").stdout)
    assert found["recommended"]["recipe"] == "Q4_K_M"
    assert (found["threads"], found["threads_batch"], found["read_gbs"]) == (2, 4, 13.23)
    assert {"recipe", "bytes", "ram", "fits", "largest_context", "decode"} <= set(found["rows"][0])
    assert (found["type_k"], found["depth"], found["rows"][0]["context"]) == ("f16", 0, 256)
    assert "RAM: with a context of 256 (KV f16)" in shown.stdout
    deep = planned(
        str(EXAMPLE), "--device", "rpi5-8gb", "-d", "200", "-c", "224", "--kv", "q8_0,f16"
    )
    assert "RAM: with a context of 224 (KV q8_0,f16)" in deep.stdout
    assert "tokens per second after 200 others" in deep.stdout


def test_numbers_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    for wide in ("", "20"):
        monkeypatch.setenv("COLUMNS", wide)
        monkeypatch.setattr("edgeq.cli.plan.is_terminal", lambda stream: True)
        shown = planned(str(EXAMPLE), "--device", "rpi5-8gb").stdout
        numbers = [line.split()[-3:] for line in shown.splitlines() if "F16" in line]
        assert len(numbers) == 2
        assert all(float(line[0]) > 100 and line[1] == "memory" for line in numbers), shown


def test_another_engine_is_told_by_its_shares() -> None:
    one = planned(str(EXAMPLE), "--device", "rpi5-8gb", "--efficiency", "0.88")
    assert "an engine that gets 0.88 of the bandwidth\n" in one.stdout
    assert "prompt: empty, --efficiency has no share of dot products" in one.stdout
    found = [
        json.loads(planned(str(EXAMPLE), "--device", "rpi5", "--json", "--efficiency", e).stdout)
        for e in ("0.88", "0.88,0.5", "0.44,0.25")
    ]
    assert found[0]["efficiency"] == [0.88, None]
    rows = [document["rows"][0] for document in found]
    assert rows[0]["prefill"] is None
    assert rows[1]["prefill"] == pytest.approx(2 * rows[2]["prefill"])
    assert rows[1]["decode"] == pytest.approx(2 * rows[2]["decode"])


def test_where_nothing_is_known_a_line_says_so(tmp_path: Path) -> None:
    text = (EXAMPLE.parents[1] / "devices/n100.toml").read_text()
    board = tmp_path / "board.toml"
    board.write_text("".join(x for x in text.splitlines(True) if not x.startswith("dot")))
    shown = planned(str(EXAMPLE), "--device", str(board)).stdout
    assert "prompt: empty, nothing is known of the products" in shown
    assert "add `dot` to the device's file" in shown


def test_nothing_fits_but_with_less_context(tmp_path: Path) -> None:
    text = (EXAMPLE.parents[1] / "devices/n100.toml").read_text()
    board = tmp_path / "board.toml"
    board.write_text(re.sub("ram_gib = .*", "ram_gib = [0.03]", text).replace("1500", "1"))
    assert planned(str(EXAMPLE), "--device", str(board)).stdout.splitlines()[-1] == (
        "Nothing fits: it needs a machine with more memory."
    )
    rows = read(EXAMPLE).files
    need = rows[0].ram(64, F16, (4, 4), isas.modules()["avxvnni"]) / (1 << 30) + 1 / 1024
    board.write_text(re.sub("ram_gib = .*", f"ram_gib = [{need}]", text).replace("1500", "1"))
    last = planned(str(EXAMPLE), "--device", str(board)).stdout.splitlines()[-1]
    assert last == "With a context of 256 nothing fits: Q2_K fits with -c 64."


def test_without_a_device_it_is_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measured", lambda formats, *_: PI5 if "Q6_K" in formats else None)
    found = json.loads(planned(str(EXAMPLE), "--json").stdout)
    assert (found["device"], found["read_gbs"]) == ("this machine", 13.23)
    assert found["available"] > 1 << 20
    made = json.loads(planned(str(EXAMPLE), "--json", "-t", "1", "--kv", "q8_0,f16").stdout)
    assert made["rows"][0]["ram"] < found["rows"][0]["ram"]


def test_sizes_that_could_run_are_shown() -> None:
    shown = planned("--device", "rpi5-8gb")
    assert shown.exit_code == 0, shown.stderr
    assert all(len(line) <= 80 for line in shown.stdout.splitlines()), shown.stdout
    rows = json.loads(planned("--device", "rpi5-8gb", "--json").stdout)["rows"]
    fits = {(row["size"], row["recipe"]): row["fits"] for row in rows}
    assert fits["8B", "Q4_K_M"]
    assert not fits["14B", "Q4_K_M"]
    small = json.loads(planned("--device", "rpizero2w", "--json", "-c", "512").stdout)["rows"]
    fit = [row["size"] for row in small if row["fits"] and row["recipe"] == "Q4_K_M"]
    assert fit == ["135M", "360M"]
    # What a model was trained on is not exceeded, and the last line says it.
    wide = planned("--device", "rpi5-8gb", "-c", "9000")
    assert "RAM with a context of 9000 (135M: 8192, 360M: 8192), KV f16" in wide.stdout
    rows = json.loads(planned("--device", "rpi5-8gb", "-c", "9000", "--json").stdout)["rows"]
    assert {row["context"] for row in rows if row["size"] in ("135M", "1B")} == {8192, 9000}


def test_what_cannot_be_planned_is_said_in_one_line(tmp_path: Path) -> None:
    for args, problem in (
        (["--device", "rpi6"], "device 'rpi6' is unknown: did you mean rpi5"),
        ([str(EXAMPLE), "--device", "rpi5", "-c", "257"], "was trained on 256 positions"),
        ([str(EXAMPLE), "--device", "rpi5", "--kv", "q3"], "KV cache type 'q3'"),
        ([str(EXAMPLE), "--device", "generic"], "device generic: "),
        ([str(EXAMPLE), "--device", "rpi5", "--efficiency", "x"], "expected shares such as"),
        ([str(EXAMPLE), "--device", "rpi5", "--efficiency", "0,1"], "expected shares such as"),
        ([str(EXAMPLE), "--device", "rpi5", "--efficiency", "1,1,1"], "expected shares such as"),
        ([str(EXAMPLE), "--device", "rpi5", "--efficiency", "1", "-d", "9"], "depth 9: shares of"),
        ([str(EXAMPLE), "--device", "rpi5", "-d", "256"], "use -d 255 or less, or a larger -c"),
        (["--device", "rpi5", "-d", "99999999"], "135M would have a context of 4096 positions"),
        (["--device", "rpi5", "-c", "9" * 23], "none has more than 131072 positions"),
        (["--device", "rpi5", "-t", "5"], "threads = 5: Raspberry Pi 5 has 4 cores: use -t 4"),
        ([str(tmp_path / "none.gguf")], "no such file"),
    ):
        shown = planned(*args)
        assert shown.exit_code == 2
        assert problem in shown.stderr
        assert len(shown.stderr.splitlines()) == 1


def test_a_model_that_the_engine_cannot_run_still_has_sizes(tmp_path: Path) -> None:
    made = edgeq.convert(EXAMPLE, tmp_path / "m.gguf", "F16", method="rtn")
    raw = made.read_bytes()
    made.write_bytes(raw.replace(b"llama", b"mamba"))
    found = read(made)
    assert found.arch is None
    assert "architecture 'mamba' is not supported" in found.problem
    shown = planned(str(made), "--device", "rpi5")
    assert shown.exit_code == 0
    assert "the engine cannot run it: architecture 'mamba'" in shown.stderr
    assert "4.5 MiB" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "No advice: the engine cannot run it."
    assert "Take" not in shown.stdout
    assert (
        json.loads(planned(str(made), "--device", "rpi5", "--json").stdout)["recommended"] is None
    )
