"""Bad input gets an error that names the setting, the value and what is allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.__main__ import main
from fewbit_fx._version import require_torch


def test_defaults() -> None:
    config = FewBitConfig()
    assert config.bits == 3
    assert all(f.metadata["doc"] for f in dataclasses.fields(config))


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FewBitConfig().bits = 2  # type: ignore[misc]


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_from_1_to_8_are_allowed(bits: int) -> None:
    assert FewBitConfig(bits=bits).bits == bits


@pytest.mark.parametrize(
    ("bits", "error"), [(0, ValueError), (9, ValueError), (2.5, TypeError), ("three", TypeError), (True, TypeError)]
)
def test_other_bits_are_refused(bits: object, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        fewbit_fx.backend(bits=bits)
    for part in ("'bits'", repr(bits), "a whole number from 1 to 8"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "error", "allowed"),
    [
        ("min_numel", -1, ValueError, "0 or more"),
        ("min_numel", 1.5, TypeError, "0 or more"),
        ("max_relative_error", 0, ValueError, "above 0"),
        ("max_relative_error", "small", TypeError, "above 0"),
        ("strict", 1, TypeError, "True or False"),
        ("masks", "yes", TypeError, "True or False"),
        ("derivatives", None, TypeError, "True or False"),
    ],
)
def test_other_options_are_checked(name: str, value: object, error: type[Exception], allowed: str) -> None:
    with pytest.raises(error) as raised:
        FewBitConfig(**{name: value})  # type: ignore[arg-type]
    assert repr(name) in str(raised.value)
    assert repr(value) in str(raised.value)
    assert allowed in str(raised.value)


def test_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown option 'bit' with value 3 \(did you mean 'bits'.*allowed are the fewbit options recipe, bits",
    ):
        fewbit_fx.backend(bit=3)


def test_unknown_option_given_to_torch_compile() -> None:
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="fewbit", options={"bitz": 3})
    with pytest.raises(Exception, match="unknown option 'bitz' with value 3"):
        compiled(torch.randn(2, 2))


def test_bad_bits_given_to_torch_compile() -> None:
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="fewbit", options={"bits": 9})
    with pytest.raises(Exception, match=r"'bits' is 9 .* allowed is a whole number from 1 to 8"):
        compiled(torch.randn(2, 2))


def test_a_partitioner_of_the_users_is_refused() -> None:
    for name in ("custom_partitioner_fn", "custom-partitioner-fn"):
        with pytest.raises(ValueError, match=rf"{name}.* not allowed"):
            fewbit_fx.backend(options={name: object()})


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1"])
def test_old_torch_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"torch {version.replace('+', '.')}; allowed is torch >= 2.11"):
        require_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.16.0a0+git1234", "3.0"])
def test_new_torch_is_accepted(version: str) -> None:
    require_torch(version)


def test_the_readme_has_the_options_as_they_are() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert "\n".join(FewBitConfig.table()) in readme


def test_env_prints_versions_and_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    printed = capsys.readouterr().out
    for expected in (fewbit_fx.__version__, torch.__version__, "CPU", *FewBitConfig.option_names()):
        assert expected in printed
    assert str(Path.home()) not in printed
