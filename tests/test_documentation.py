"""What the texts say runs: snippets of README, CONTRIBUTING and docs/ and commands, and the examples of docstrings.

Models are compiled up to and with the partition, and run in plain ATen: what a snippet shows does not hang on kernels.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import autograd_nodes
from plain_aten import no_kernels
from torch import nn

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.representations import Decision
from fewbit_fx.passes.sites import Site

ROOT = Path(__file__).parent.parent
TEXTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


@pytest.fixture(autouse=True)
def _no_kernels() -> Iterator[None]:
    """Plain ATen in place of generated kernels."""
    with no_kernels():
        yield


def code_blocks(*languages: str) -> list[Any]:
    """The blocks of some languages, in the texts' order. Those in "py" are of other libraries (test_trainers.py)."""
    found = []
    for text in TEXTS:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / text).read_text(), re.S | re.M)
        chosen = [block for language, block in blocks if language in languages]
        found += [pytest.param(block, id=f"{text} {number}") for number, block in enumerate(chosen, 1)]
    return found


def inline_code() -> list[str]:
    """What stands between backticks, but for blocks; one line each."""
    texts = [re.sub(r"```.*?```", "", (ROOT / text).read_text(), flags=re.S) for text in TEXTS]
    return [" ".join(code.split()) for text in texts for code in re.findall(r"`([^`]+)`", text)]


def propose_nothing(site: Site, config: FewBitConfig) -> Decision | None:
    """In place of a reader's own representation."""
    return None


def namespace() -> dict[str, Any]:
    """What the snippets take for granted."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    return {
        "torch": torch,
        "fewbit_fx": fewbit_fx,
        "model": model,
        "inputs": torch.randn(128, 32),
        "targets": torch.randint(8, (128,)),
        "loss_function": nn.functional.cross_entropy,
        "x": torch.randn(128, 32, requires_grad=True),
        "my_function": torch.atan,
        "pre_activations": torch.randn(1000),
        "check": lambda backend: backend is not None,
        "mine": propose_nothing,
        "propose_mine": propose_nothing,
    }


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that a snippet compiles."""
    made: list[nn.Module] = []
    original = torch.compile

    def compile_and_note(model: Any, **kwargs: Any) -> Any:
        result = original(model, **kwargs)
        if isinstance(model, nn.Module):
            made.append(result)
        return result

    monkeypatch.setattr(torch, "compile", compile_and_note)
    return made


@pytest.mark.parametrize("block", code_blocks("python"))
def test_snippets_run_and_their_models_save_codes(
    block: str, compiled: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a snippet may write
    names = namespace()
    expected = names["model"](names["inputs"])
    exec(block, names)
    for model in [*compiled, *([names["model"]] if "fewbit_fx.convert(" in block else [])]:
        torch.compiler.reset()
        y = model(names["inputs"])
        torch.testing.assert_close(y, expected)
        saved = [t.dtype for node in autograd_nodes(y) for t in getattr(node, "saved_tensors", ()) if t is not None]
        assert {torch.int32, torch.int8} & set(saved), "bit planes, or codes of values"
        y.sum().backward()


def test_all_snippets_are_found() -> None:
    assert {"README.md 1", "README.md 2", "README.md 3", "README.md 4"} <= {p.id for p in code_blocks("python")}


def test_calls_within_the_text_are_calls_that_exist() -> None:
    calls = [code for code in inline_code() if re.fullmatch(r"fewbit_fx\.[\w.]+\(.+\)", code)]
    assert "fewbit_fx.backend(proposals=[mine])" in calls
    for call in calls:
        assert eval(call, namespace()) is not None, call


OTHERS = {"retain_graph", "fullgraph", "torch_compile", "every"}  # torch's options, transformers' and the callbacks'


def test_options_within_the_text_are_options() -> None:
    found = [code for code in inline_code() if re.fullmatch(r"options=\{.*\}|[a-z]\w+=(True|False|\d+)", code)]
    assert 'options={"skip": ["blocks.0.*", "head"]}' in found
    assert "strict=True" in found
    for code in found:
        if code.split("=")[0] not in OTHERS and code != 'options={"skip": [...]}':
            assert isinstance(eval(f"fewbit_fx.backend({code})", namespace()), fewbit_fx.FewBitBackend), code


class ParsedError(Exception):
    """The flags of a command were understood."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end once they have parsed their flags, as on a machine with a GPU."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args: Any) -> None:
        parse(parser, *args)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)


def commands() -> list[str]:
    """Every command that the texts name, once."""
    blocks = [re.sub(r"\s*#.*", "", line) for p in code_blocks("", "bash") for line in p.values[0].splitlines()]
    found = [code for code in [*inline_code(), *blocks] if re.match(r"(\w+=\S+ )*(python|make) ", code)]
    return sorted(set(found))


def test_commands_are_found() -> None:
    """In text, in tables and in blocks."""
    assert {"python -m fewbit_fx env", "python -m bench.block", "make demo", "make lint"} <= set(commands())
    assert "python -m bench.step --model roberta --device cuda" in commands(), "across lines"


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("command", commands())
def test_commands_exist_and_take_their_flags(command: str) -> None:
    program, *words = [word for word in shlex.split(command) if not re.match(r"[A-Z]+=\S*$", word) or " " in word]
    if program == "make":
        target, *variables = words
        rules = re.findall(r"^([\w/ -]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
        assert target in " ".join(rules).split()
        flags = [word for variable in variables for word in variable.removeprefix("FLAGS=").split()]
        if target == "demo":
            check_flags("bench.demo", flags)
        return
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        return
    if words[1:3] == ["bench", "evidence"]:
        words[1:3] = ["bench.evidence.command"]
    check_flags(words[1], words[2:])


def check_flags(module: str, flags: list[str]) -> None:
    """A command parses its flags."""
    name = f"{module}.__main__" if module == "fewbit_fx" else module
    with pytest.raises(ParsedError):
        importlib.import_module(name).main(flags)


def test_a_flag_that_does_not_exist_is_seen(parse_only: None) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("bench.block").main(["--batch-of", "3"])


def examples() -> dict[str, doctest.DocTest]:
    """The docstrings with examples, by name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name in [m.name for m in pkgutil.walk_packages(fewbit_fx.__path__, "fewbit_fx.")]:
        if not name.endswith(".plot") and ".integrations." not in name:  # they need other libraries
            found |= {test.name: test for test in finder.find(importlib.import_module(name), globs={}) if test.examples}
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings(name: str) -> None:
    messages: list[str] = []
    doctest.DocTestRunner(verbose=False).run(EXAMPLES[name], out=messages.append)
    assert not messages, "".join(messages)


@pytest.mark.parametrize("name", ["backend", "bisect", "codebook", "convert", "explain", "last_report", "FewBitConfig"])
def test_what_users_call_has_an_example(name: str) -> None:
    assert any(example.endswith(f".{name}") for example in EXAMPLES)


def test_the_reference_has_all_that_is_public() -> None:
    """Names that do not exist fail `make docs`."""
    named = re.findall(r"^::: fewbit_fx\.(\w+)", (ROOT / "docs/api.md").read_text(), re.M)
    assert set(fewbit_fx.__all__) - {"__version__"} <= set(named)
