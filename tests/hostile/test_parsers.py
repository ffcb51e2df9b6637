"""Whatever is read from outside is good, or gives a `LatentcError` that names it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from latentc.runtimes.errors import BundleError, InputError, SourceError
from latentc.runtimes.storage.parsing import PARSERS, parser, reason
from tests.fuzz.targets import is_parser, names

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("runtimes", "exporter", "benchmarks/bench", "latentc")
# Calls that turn bytes from outside into something, by the end of their dotted name.
DECODERS = frozenset(
    {
        *("json.load", "json.loads", "json.decode", "msgpack.decode", "tomllib.load"),
        *("tomllib.loads", "np.load", "numpy.load", "Image.open", "zipfile.ZipFile", "safe_open"),
        *(
            "load_file",
            "Tokenizer.from_file",
            "Tokenizer.from_buffer",
            "pickle.load",
            "pickle.loads",
            "torch.load",
        ),
        *("onnx.load", "ElementTree.parse", "ET.parse", "yaml.safe_load", "csv.reader"),
    }
)
# "file:function": why no rule is needed there.
OURS = {
    "runtimes/strict.py:readable": "decodes what it has just encoded",
    "exporter/source/vocabulary.py:_check_words": "decodes what a library has just encoded",
    "runtimes/commands/generate.py:inspect": "decodes what it has just encoded",
    "runtimes/storage/npz.py:write_arrays": "writes",
    "exporter/schedulers/plans.py:plain_config": "decodes what it has just encoded",
    "exporter/lowering/overflow.py:probe_samples": "reads what this export has just written",
    "exporter/targets/coreml/lowering.py:_forget_empty_folders": "reads what was just written",
    "benchmarks/bench/pages/html.py:page": "decodes what it has just encoded",
    "benchmarks/bench/worker.py:": "reads what its parent has just written",
    "benchmarks/bench/roofline.py:": "reads what its parent has just written",
    "runtimes/backends/torch_archive.py:opened": "is a generator, inside of which the rule holds",
    "runtimes/backends/torch_archive.py:_document": "the rule holds inside of it",
    "runtimes/backends/torch_program.py:_keywords": "is called by a parser",
    "runtimes/sampling/plan_archive.py:write_archive": "writes",
    "runtimes/sampling/plan_document.py:decode": "is called by a parser",
    "runtimes/bundle/manifest.py:version_of": "the rule holds inside of it",
    "runtimes/texts/tokenizer_rules.py:checked": "is called by a parser",
    "runtimes/texts/tokenizer_rules.py:_check_model": "is called by a parser",
}

DEEP = b"[" * 200_000
DAMAGED = {
    "empty": b"",
    "no text": bytes(range(256)),
    "utf-16": '{"format": 1}'.encode("utf-16"),
    "deep list": DEEP,
    "deep objects": b'{"a":' * 200_000,
    "nan": b"NaN",
    "huge number": b"9" * 5000,
    "huge exponent": b'{"format": 1e999}',
    "surrogate": b'{"\\ud800": "\\udfff"}',
    "null": b"null",
    "list": b"[1]",
    "text": b'"text"',
    "number": b"1",
    "deep table": b"a = " + b"[" * 100_000,
    "deep keys": b"a" + b".a" * 5_000 + b" = 1",
    "zip": b"PK\x03\x04" + b"\0" * 40,
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "deep header": len(DEEP).to_bytes(8, "little") + DEEP,
    "image": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
}


@pytest.mark.fault("3.4", "a parser lets an exception of a library through")
@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", names())
def test_damaged_input_gives_one_error_that_names_it(
    name: str, damage: str, tmp_path: Path
) -> None:
    module, _, path = name.partition(":")
    owner = import_module(module)
    for part in path.split("."):
        owner = getattr(owner, part)
    known = PARSERS[name]
    arguments = _arguments(known.source, DAMAGED[damage], tmp_path)
    fitting = {
        "latentc.runtimes.bundle.manifest:Manifest.decode": (DAMAGED[damage], "here.json"),
        "latentc.runtimes.texts.tokenizer:TextTokenizer.load": (*arguments, 4),
        "latentc.runtimes.bundle.recipe:parse_range": ("--images", *arguments),
        "latentc.runtimes.sampling.plan_archive:_from_archive": (*arguments, (1,), 1),
    }.get(name, arguments)
    with suppress(known.error):  # some damage is none for some of them
        owner(*fitting)


def _arguments(source: str, data: bytes, folder: Path) -> tuple[Any, ...]:
    """Return the arguments for a parser whose parameter is called `source`."""
    if source == "text":
        text = data[:2000].decode("latin-1")
        return (text,)
    path = folder / "file"
    if source == "folder":
        for each in ("model_index.json", "latentc.json"):
            (folder / each).write_bytes(data)
        return (folder,)
    path.write_bytes(data)
    return (path,)


def test_parsers_are_listed() -> None:
    listed = names()
    assert len(listed) >= 20
    for name in listed:
        import_module(name.partition(":")[0])
    assert {name for name in PARSERS if not name.startswith("tests.")} == set(listed)
    assert PARSERS["latentc.exporter.source.resolving:_read_index"].error is SourceError


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "more than the memory holds"),
        (SyntaxError("broken PNG file"), "SyntaxError: broken PNG file"),
        (OverflowError("too large"), "OverflowError: too large"),
        (FileNotFoundError(2, "No such file or directory"), "no such file"),
        (ValueError("first\nsecond"), "first"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_the_reason_is_a_few_words(cause: Exception, said: str) -> None:
    @parser(BundleError, "path", "a thing")
    def read(other: int, path: str = "here") -> None:
        raise cause

    with pytest.raises(BundleError) as error:
        read(1)
    assert str(error.value).startswith("here: not a thing: ")
    assert said in str(error.value)
    with pytest.raises(BundleError, match=r"^there: "):
        read(1, "there")


def test_a_panic_counts_and_an_interruption_does_not() -> None:
    panic = type("PanicException", (BaseException,), {})

    @parser(BundleError, "path", "a thing")
    def read(path: str, cause: BaseException) -> None:
        raise cause

    with pytest.raises(BundleError):
        read("here", panic("index out of bounds"))
    with pytest.raises(KeyboardInterrupt):
        read("here", KeyboardInterrupt())
    with pytest.raises(InputError, match=r"^own words$"):
        read("here", InputError("own words"))
    assert reason(OSError("no number")) == "no number"


def test_a_generator_is_no_parser() -> None:
    def lines(path: str) -> Iterator[str]:
        yield path

    with pytest.raises(TypeError, match="generator"):
        parser(BundleError, "path", "a thing")(lines)


@pytest.mark.fault("3.4", "a file is decoded outside of the one rule")
def test_nothing_is_decoded_outside_of_a_parser() -> None:
    found = {
        place
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for place in _unguarded(ast.parse(path.read_text("utf-8")), str(path.relative_to(ROOT)))
    }
    assert found == set(OURS), "mark the function @parser, or say in OURS why it needs none"


def _unguarded(tree: ast.Module, path: str) -> Iterator[str]:
    """Where a decoder is called and no function around it is a parser."""

    def visit(node: ast.AST, function: str, guarded: bool) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            guarded = guarded or is_parser(node)
            function = node.name
        if isinstance(node, ast.Call) and not guarded:
            name = ast.unparse(node.func)
            if any(name == each or name.endswith(f".{each}") for each in DECODERS):
                yield f"{path}:{function}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, guarded)

    return visit(tree, "", False)
