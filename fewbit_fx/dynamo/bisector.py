"""Find the sites whose codes make a user's check fail, by halving."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewbit_fx.dynamo.fewbit_backend import FewBitBackend, backend

Check = Callable[[FewBitBackend], bool]


@dataclass(frozen=True)
class Bisection:
    """What a bisection found.

    Attributes:
        culprits: Names of the sites that must be left exact for the check to pass, as the report calls them.
            Empty if the check passes with all codes.
        sites: Names of all sites that were coded at the start, in the order in which the backward meets them.
        checks: How often the check ran.
    """

    culprits: tuple[str, ...]
    sites: tuple[str, ...]
    checks: int

    @property
    def skip(self) -> tuple[str, ...]:
        """The value of the option ``skip`` with which the check passes."""
        return tuple(map(glob.escape, self.culprits))

    def __str__(self) -> str:
        times = "once" if self.checks == 1 else f"{self.checks} times"
        head = f"{len(self.sites)} sites are coded; the check ran {times}"
        if not self.culprits:
            return f"{head}. It passes with all codes."
        found = [f"{head}. It passes with these sites left exact:", *(f"  {name}" for name in self.culprits)]
        return "\n".join([*found, f"options: skip={list(self.skip)}"])


def bisect(
    check: Check,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], object] = lambda line: None,
    **fewbit: Any,
) -> Bisection:
    """Find the sites whose codes make a check fail.

    Sites are left exact in halves until one is found without which the check passes, or passes further; it stays
    exact, and the search goes on until the check passes. That takes about log2(sites) + 1 checks per culprit.

    Args:
        check: Takes a backend, makes a fresh model, compiles it with that backend, runs it, and returns whether
            the result is good. Dynamo is reset before each call. What the check does must be repeatable.
        mode: A mode of torch.compile.
        options: Options of Inductor, and of fewbit.
        progress: Called with a line per check, such as ``print``.
        **fewbit: Options of :class:`fewbit_fx.FewBitConfig`.

    Raises:
        ValueError: The check fails even where every site is left exact: then it is not fewbit's codes.
        TypeError, ValueError: An unknown option, or one with a value that is not allowed.

    Examples:
        >>> import torch, fewbit_fx
        >>> def is_good(backend):
        ...     torch.manual_seed(0)
        ...     layers = torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.Tanh()
        ...     model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 8)).requires_grad_(False)
        ...     x = torch.randn(128, 32, requires_grad=True)
        ...     torch.compile(model, backend=backend)(x).sum().backward()
        ...     (exact,) = torch.autograd.grad(model(x).sum(), x)
        ...     return bool((x.grad - exact).norm() < 0.1 * exact.norm())
        >>> found = fewbit_fx.bisect(is_good, bits=2)
        >>> found.sites, found.culprits
        (('3.tanh', '1.gelu'), ('1.gelu',))
    """
    run = _Runs(check, mode, dict(options or {}), fewbit, progress)
    if run.passes(()):
        return Bisection((), run.sites, run.count)
    sites = run.sites
    if not run.passes(sites):
        raise ValueError(
            f"the check fails with all {len(sites)} sites left exact too, so it is not fewbit's codes that it fails of"
        )
    culprits: list[str] = []
    while True:
        culprits.append(_first_to_fail(run, sites, culprits))
        if run.passes(culprits):
            return Bisection(tuple(culprits), sites, run.count)


def _first_to_fail(run: _Runs, sites: Sequence[str], culprits: Sequence[str]) -> str:
    """The site with which the check begins to fail, if sites are coded one after another."""
    suspects = [site for site in sites if site not in culprits]
    good, bad = 0, len(suspects)  # coding so many of the first passes, and fails
    while bad - good > 1:
        middle = (good + bad) // 2
        if run.passes([*culprits, *suspects[middle:]]):
            good = middle
        else:
            bad = middle
    return suspects[bad - 1]


@dataclass
class _Runs:
    """Runs of the check, with some sites left exact."""

    check: Check
    mode: str | None
    options: dict[str, Any]
    fewbit: dict[str, Any]
    progress: Callable[[str], object]
    sites: tuple[str, ...] = ()
    count: int = 0

    def passes(self, exact: Sequence[str]) -> bool:
        """Whether the check passes with these sites left exact."""
        torch.compiler.reset()
        tried = self._backend(exact)
        passed = bool(self.check(tried))
        self.count += 1
        coded = tuple(dict.fromkeys(_coded(tried)))
        if not exact:
            self.sites = coded
        self.progress(f"check {self.count}: {len(coded)} sites coded, {'passes' if passed else 'fails'}")
        return passed

    def _backend(self, exact: Sequence[str]) -> FewBitBackend:
        options = {**self.options, **self.fewbit}
        skip = options.pop("skip", ())
        patterns = [skip] if isinstance(skip, str) else list(skip)
        return backend(mode=self.mode, options={**options, "skip": [*patterns, *map(glob.escape, exact)]})


def _coded(tried: FewBitBackend) -> Iterator[str]:
    """The names of the sites that a backend coded, of all models that it compiled."""
    return (site.name for site in tried.all_sites() if not site.is_exact)
