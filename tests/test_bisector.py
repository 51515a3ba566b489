"""Bisection: the sites whose codes make a check fail are found, whichever they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fewbit_fx
from fewbit_fx.__main__ import main
from fewbit_fx.dynamo import bisector


class Stub:
    """Stands for a backend that coded all sites but those that it was told to skip."""

    def __init__(self, sites: list[str], skip: list[str]) -> None:
        self.coded = [s for s in sites if s not in skip]

    def all_sites(self) -> list[object]:
        return [type("Site", (), {"name": name, "is_exact": False})() for name in self.coded]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_set_of_culprits_is_found(data: st.DataObject) -> None:
    names = [f"layer.{i}.gelu" for i in range(data.draw(st.integers(1, 40)))]
    bad = set(data.draw(st.lists(st.sampled_from(names), unique=True, max_size=4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bisector, "backend", lambda mode, options: Stub(names, options["skip"]))
        found = bisector.bisect(lambda stub: not bad & set(stub.coded))  # type: ignore[attr-defined]
    assert set(found.culprits) == bad
    assert len(found.culprits) == len(bad)
    assert found.checks <= 2 + len(bad) * (2 + len(names).bit_length())


def test_a_check_that_fails_without_codes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bisector, "backend", lambda mode, options: Stub(["a"], options["skip"]))
    with pytest.raises(ValueError, match="fails with all 1 sites left exact too"):
        bisector.bisect(lambda stub: False)


def model() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(32, 64)]
    for _ in range(4):
        layers += [nn.GELU(), nn.Linear(64, 64)]
    torch.manual_seed(0)
    return nn.Sequential(*layers).requires_grad_(False)


def third_activation_is_exact(backend: Callable[..., object]) -> bool:
    """A check of a real model: the gradient of a part of it must be exact."""
    net, x = model(), torch.randn(128, 32, requires_grad=True)
    torch.compile(net, backend=backend)(x).sum().backward()
    report = backend.last_report()  # type: ignore[attr-defined]
    return all(site.module != "5" or site.is_exact for site in report.sites)


@pytest.mark.slow
def test_a_real_model() -> None:
    lines: list[str] = []
    found = fewbit_fx.bisect(third_activation_is_exact, min_numel=0, bits=1, progress=lines.append)
    assert found.culprits == ("5.gelu",)
    assert found.sites == ("7.gelu", "5.gelu", "3.gelu", "1.gelu")
    assert len(lines) == found.checks
    assert "skip=['5.gelu']" in str(found)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_check.py").write_text("def good(backend):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["bisect", "my_check:good"])
    assert "It passes with all codes." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no attribute 'bad'"):
        main(["bisect", "my_check:bad"])
