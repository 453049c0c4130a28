"""Rules about the source itself: layers, homes of dependencies, names, sizes, the public API."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import edgeq

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "edgeq"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Imports go down or stay level: README, "How it is built". A new module must be given a layer here.
LAYERS = [
    {
        "checks",
        "closing",
        "cpus",
        "data",
        "devices",
        "errors",
        "estimate",
        "machine",
        "memory",
        "sensors",
        "sysfs",
        "text",
        "version",
        "vocab",
    },
    {"blockformat", "blocks", "gguf", "checkpoint", "grid", "hessian", "imatrix"},
    {"kernels"},
    {
        "models",
        "tokenizer",
        "sampler",
        "cache",
        "quantizers",
        "recipe",
        "sandbox",
        "tuning",
        "products",
    },
    {
        "answer",
        "blueprint",
        "calibration",
        "draft",
        "engine",
        "passes",
        "chat",
        "choosing",
        "encoding",
        "folding",
        "mixture",
        "statistics",
        "pipeline",
        "profile",
        "importance",
        "native",
        "resume",
        "sources",
        "stream",
        "evaluate",
        "divergence",
        "questions",
        "compare",
        "deploy",
        "report",
        "bench",
        "doctor",
        "hub",
        "limits",
        "loss",
        "plan",
        "rates",
        "sizes",
        "wheel",
    },
    {"cli", "__init__", "__main__"},
]

HOMES = {
    "numba": ["kernels", "quantizers"],
    "llvmlite": ["kernels", "quantizers"],
    "jinja2": ["sandbox", "chat", "report"],
    "tokenizers": ["tokenizer"],
    "sentencepiece": ["tokenizer"],
    "gguf": ["checkpoint", "gguf"],
    "threadpoolctl": ["quantizers"],
    "huggingface_hub": ["hub"],
    "click": ["cli"],
    "rich": ["cli"],
    "prompt_toolkit": ["cli"],
}

PUBLIC = [
    "Model",
    "convert",
    "dequantize",
    "errors",
    "load",
    "open_gguf",
    "perplexity",
    "quantize",
]


def module(path: Path) -> str:
    """edgeq/cli/run.py -> edgeq.cli.run"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(name: str) -> str:
    """edgeq.cli.run -> cli; the package itself is __init__."""
    return [*name.split("."), "__init__"][1]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, at_top: bool = False) -> set[str]:
    """Full names that a file imports; at_top: only those that run when it is imported itself."""
    found: set[str] = set()
    for node in statements(tree(path), at_top):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in edgeq/a/b.py is about edgeq.a, which is the folder of the file.
            above = [*path.parent.relative_to(ROOT).parts][: 1 - node.level or None]
            origin = ".".join([*above * bool(node.level), *[node.module] * bool(node.module)])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def statements(node: ast.AST, at_top: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        if not (at_top and later):
            yield child
            yield from statements(child, at_top)


def ours(path: Path, at_top: bool = False) -> set[str]:
    """Modules of edgeq that a file imports."""
    known = {module(source) for source in SOURCES}
    names = {name for name in imports(path, at_top) if name.split(".")[0] == "edgeq"}
    return {name if name in known else name.rpartition(".")[0] for name in names}


def layer(name: str) -> int:
    return next(i for i, units in enumerate(LAYERS) if unit(name) in units)


def test_every_module_has_a_layer() -> None:
    assert {unit(module(path)) for path in SOURCES} <= set().union(*LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = module(path)
    assert {name for name in ours(path) if layer(name) > layer(own)} == set()


def test_no_import_cycles() -> None:
    graph = {module(path): ours(path, at_top=True) - {module(path)} for path in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(SOURCES)


@pytest.mark.parametrize("dependency", HOMES)
def test_a_dependency_has_one_home(dependency: str) -> None:
    users = {
        unit(module(path))
        for path in SOURCES
        for name in imports(path)
        if name.split(".")[0] == dependency
    }
    assert users <= set(HOMES[dependency])


def test_files_are_short() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_functions_are_short() -> None:
    """Half of them fit in ten lines; docstrings and decorators do not count."""
    lengths = sorted(
        node.end_lineno - (node.body[1] if ast.get_docstring(node) else node.body[0]).lineno + 1
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and not _is_stub(node)
    )
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[len(lengths) * 9 // 10] <= 35


def _is_stub(node: ast.FunctionDef) -> bool:
    """Nothing but a docstring: the method of a protocol."""
    return len(node.body) == 1 and isinstance(node.body[0], ast.Expr)


def architectures() -> list[str]:
    files = (PACKAGE / "models").glob("*.py")
    return sorted(path.stem for path in files if "\nHF_ARCHITECTURES" in path.read_text())


def words(path: Path) -> Iterator[str]:
    """Identifiers and strings of the code, without docstrings and comments."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value
        yield from (
            getattr(node, key) for key in ("id", "attr", "name", "arg") if _is_text(node, key)
        )


def _is_text(node: ast.AST, key: str) -> bool:
    return isinstance(getattr(node, key, None), str)


# Kinds of vocabulary and pre-tokenizers carry names of models, and so does the tool llama.cpp.
VOCABULARY = {"tokenizer", "vocab", "checkpoint"}


def test_architecture_names_stay_in_their_files() -> None:
    assert len(architectures()) >= 3
    name = re.compile(rf"(?<![a-z0-9])({'|'.join(architectures())})(?![a-z0-9.-])", re.IGNORECASE)
    found = {
        f"{path.relative_to(ROOT)}: {word[:60]}"
        for path in SOURCES
        if unit(module(path)) not in VOCABULARY
        for word in words(path)
        if name.search(word) and not (path.parent.name == "models" and path.stem in architectures())
    }
    assert found == set()


def test_device_names_stay_in_devices() -> None:
    named = [path.stem for path in (ROOT / "devices").glob("*.toml") if path.stem != "generic"]
    found = {f"{path.name}: {word}" for path in SOURCES for word in words(path) if word in named}
    assert found == set()


def test_public_api_is_the_documented_list() -> None:
    assert sorted(edgeq.__all__) == PUBLIC
    for name in PUBLIC:
        assert inspect.getdoc(getattr(edgeq, name)), name


def test_import_is_light() -> None:
    """Neither `import edgeq` nor `edgeq --help` may load what only some commands need."""
    code = (
        "import sys, edgeq.cli;"
        f"print([name for name in {[*HOMES, 'numpy', 'psutil']!r} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout == "['click']\n", shown.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_all_lists_what_exists(path: Path) -> None:
    if path.name == "__main__.py":
        return
    loaded = importlib.import_module(module(path))
    for name in getattr(loaded, "__all__", []):
        assert hasattr(loaded, name)


# Written in parts, so that this file passes its own test.
FORBIDDEN = re.compile(
    "|".join(
        [
            "/" + "work/",
            r"\.\./" + "shared",
            "/ro" + "ot/",
            "/ho" + "me/[a-z]",
            r"\bissue" + r" #?\d",
        ]
    )
)
TEXTS = {".py", ".toml", ".md", ".txt", ".yml", ".sh", ""}


def repository_files() -> list[Path]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, cwd=ROOT).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_texts_do_not_mention_one_machine() -> None:
    files = repository_files() or SOURCES
    found = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path.suffix in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    }
    assert found == set()
