"""Codebooks as a tool: names, functions, densities, the command line and the plot."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import derivative
from torch import Tensor

import fewbit_fx
from fewbit_fx.__main__ import main
from fewbit_fx.codebooks.activations import ACTIVATIONS, derivative_of
from fewbit_fx.codebooks.density import Normal, Observed, Typical, Uniform, parse_density
from fewbit_fx.codebooks.of_functions import fit


def error_on(function, levels: tuple[float, ...], x: Tensor) -> float:  # type: ignore[no-untyped-def]
    """Mean squared error of the nearest level over a sample, by exhaustive comparison."""
    exact = derivative(function, x)
    return float((exact[:, None] - torch.tensor(levels, dtype=torch.float64)).abs().amin(1).square().mean())


@pytest.mark.parametrize("name", ["gelu", "GELU", "leaky_relu", "LeakyReLU", "gelu_tanh", "quick GELU", "softsign"])
def test_names_in_any_spelling(name: str) -> None:
    book = fewbit_fx.codebook(name, 3)
    assert len(book.boundaries) == len(book.levels) - 1
    assert book.bits <= 3


def test_a_name_and_its_function_have_one_codebook() -> None:
    assert fewbit_fx.codebook("gelu", 3) == fewbit_fx.codebook(F.gelu, 3) == fewbit_fx.codebook(lambda x: F.gelu(x), 3)


def test_the_default_density_is_uniform_where_the_function_varies() -> None:
    book = fewbit_fx.codebook("tanh", 3)
    reach = 2.993  # where tanh' has fallen to 1 %
    assert book == fewbit_fx.codebook("tanh", 3, Uniform())
    expected = fewbit_fx.codebook("tanh", 3, Uniform(-reach, reach))
    assert book.levels == pytest.approx(expected.levels, abs=1e-3)


def test_the_backend_can_use_the_typical_density() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8).requires_grad_(False))
    config = fewbit_fx.FewBitConfig(levels="typical")
    site, *_ = fewbit_fx.explain(model, torch.randn(128, 32), fewbit_config=config).sites
    assert site.levels == pytest.approx(fewbit_fx.codebook("silu", 3, "typical").levels, abs=1e-9)


@pytest.mark.parametrize("density", [Uniform(-2, 5), Normal(1.0, 0.5), Normal(0.0, 20.0)])
def test_a_codebook_is_the_best_for_its_own_density(density: Uniform | Normal) -> None:
    generator = np.random.default_rng(0)
    sample = (
        generator.uniform(density.low, density.high, 100_000)
        if isinstance(density, Uniform)
        else generator.normal(density.mean, density.std, 100_000)
    )
    x = torch.from_numpy(sample)
    own = fewbit_fx.codebook("gelu", 3, density)
    # A sample's own error varies by a few per cent: heavy where few points decide.
    assert error_on(F.gelu, own.levels, x) == pytest.approx(own.mean_squared_error, rel=0.05)
    for other in (Uniform(), Typical(), Uniform(-100, 100)):
        assert error_on(F.gelu, fewbit_fx.codebook("gelu", 3, other).levels, x) > own.mean_squared_error


def test_observed_pre_activations_as_a_tensor() -> None:
    x = torch.randn(50, 400, dtype=torch.bfloat16) * 2 - 1
    book = fewbit_fx.codebook("silu", 3, x)
    assert book == fewbit_fx.codebook("silu", 3, Observed(x))
    assert book.mean_squared_error == pytest.approx(error_on(F.silu, book.levels, x.flatten()), rel=1e-6)
    for other in (Uniform(), Typical(), Normal(-1, 2)):
        assert error_on(F.silu, fewbit_fx.codebook("silu", 3, other).levels, x.flatten()) > book.mean_squared_error


def test_an_unbounded_derivative_where_the_density_says_where_x_lies() -> None:
    with pytest.raises(fewbit_fx.NotCodableError, match="without bound"):
        fewbit_fx.codebook(lambda x: x**3, 3)
    assert fewbit_fx.codebook(lambda x: x**3, 3, Normal()).relative_error < 0.3


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("cap", [0.3, 50.0])
def test_scale(beta: float, cap: float) -> None:
    for bits in (1, 2, 3, 4):
        softplus = fewbit_fx.codebook(lambda x: F.softplus(x, beta=beta), bits).relative_error
        assert softplus == pytest.approx(fewbit_fx.codebook("softplus", bits).relative_error, rel=0.01)
        capped = fewbit_fx.codebook(lambda x: cap * torch.tanh(x / cap), bits).relative_error
        assert capped == pytest.approx(fewbit_fx.codebook("tanh", bits).relative_error, rel=0.01)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("gelo", "did you mean 'gelu'"),
        ("nonsense", "allowed is a function of a tensor, or one of gelu"),
        (lambda x: torch.softmax(x, 0), "not pointwise"),
        (lambda x: x.sum(), "not pointwise"),
        (lambda x: x @ torch.ones(3, 3), "cannot be evaluated"),
        (lambda x: 2 * x, "constant"),
        (lambda x: x.detach(), "constant"),
    ],
)
def test_bad_functions(function, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        fewbit_fx.codebook(function, 3)


@pytest.mark.parametrize("bits", [0, 9, 2.5, "three"])
def test_bad_bits(bits: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"'bits' is .* 1 to 8"):
        fewbit_fx.codebook("gelu", bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(1.0, None),
        lambda: Uniform(2.0, 1.0),
        lambda: Normal(0.0, 0.0),
        lambda: Observed(torch.tensor([1, 2])),
        lambda: Observed(torch.tensor([1.0, float("nan")])),
        lambda: Observed(torch.empty(0)),
        lambda: parse_density("uniform:1"),
        lambda: parse_density("normal:a,b"),
        lambda: parse_density("missing.npy"),
        lambda: parse_density("gauss"),
    ],
)
def test_bad_densities(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"Uniform|Normal|Observed|density is"):
        make()


def test_text_forms_of_densities(tmp_path: Path) -> None:
    assert parse_density("uniform") == Uniform()
    assert parse_density("uniform:-3,3") == Uniform(-3, 3)
    assert parse_density("normal") == Normal()
    assert parse_density("normal:1,0.5") == Normal(1, 0.5)
    assert parse_density("typical") == Typical()
    x = torch.randn(20)
    np.save(tmp_path / "x.npy", x.numpy())
    torch.save(x, tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        density = parse_density(str(tmp_path / name))
        assert isinstance(density, Observed)
        assert torch.equal(density.x, x)


def test_density_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("x")
    (tmp_path / "text.pt").write_text("x")
    torch.save({"x": torch.ones(3)}, tmp_path / "dict.pt")
    np.save(tmp_path / "words.npy", np.array(["a"]))
    for name, said in {"text.npy": "is not", "text.pt": "is not", "dict.pt": "a dict", "words.npy": "ndarray"}.items():
        with pytest.raises(ValueError, match=f"{name}' .*{said}"):
            parse_density(str(tmp_path / name))


def test_fitting_is_fast_and_done_once() -> None:
    """A fraction of a second at 4 bits, for each activation fitted anew; again: at once.

    In this thread's own time, the best of a few tries: 0.04 to 0.11 s on the machines that we have seen, for cores
    that share their parts are slower. Nor does it count how long torch's threads spin while they wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("gelu", "silu", "tanh", "softplus", "elu", "mish", "hardswish", "sigmoid", "softsign"):
        tries = []
        for _ in range(5):
            started = time.thread_time()
            fit(derivative_of(ACTIVATIONS[name]), 4, Uniform())
            tries.append(time.thread_time() - started)
        assert min(tries) < 0.3, name
    torch.set_num_threads(threads)
    fewbit_fx.codebook("gelu", 4)
    assert fewbit_fx.codebook("gelu", 4) is fewbit_fx.codebook("gelu", 4)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["codebook", "gelu", "--bits", "2"])
    text = capsys.readouterr().out
    book = fewbit_fx.codebook("gelu", 2)
    for level, boundary in zip(book.levels[1:], book.boundaries, strict=True):
        assert f"{level:.6f}  {boundary:12.6f}".replace(" ", "") in text.replace(" ", "")
    assert f"{book.relative_error:.2%}" in text
    shares = [float(line.split()[-1].rstrip("%")) for line in text.splitlines() if line.startswith(("    0", "    1"))]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_the_command_draws_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gelu.png"
    main(["codebook", "gelu", "--bits", "3", "--density", "normal:0,2", "--plot", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gelo"], "did you mean 'gelu'"),
        (["gelu", "--bits", "9"], "'bits' is 9"),
        (["gelu", "--density", "cauchy"], "density is 'cauchy'"),
        (["square"], "without bound"),
        (["gelu", "--plot", "no/such/folder.png"], "No such file or directory"),
    ],
)
def test_the_command_explains_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["codebook", *arguments])


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "fewbit_fx", "codebook", "tanh", "--bits", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tanh, 1 bit, density of x: uniform where it varies" in done.stdout


def test_the_named_activations_are_public() -> None:
    assert fewbit_fx.functions.ACTIVATIONS is ACTIVATIONS
    assert fewbit_fx.codebook(fewbit_fx.functions.ACTIVATIONS["gelu"], 3) == fewbit_fx.codebook("gelu", 3)
