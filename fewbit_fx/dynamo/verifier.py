"""Measure what codes do to the gradient of a model, before a long run and during it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.partitioned_run import original_of, partitioned, undisturbed
from fewbit_fx.reporting.text_table import text_table

Loss = Callable[..., Tensor]
Gradients = dict[str, Tensor]

# Verdicts, by the error as a share of the noise between batches; without one, by that of the gradient itself.
_SMALL, _LARGE = 0.1, 0.5
_SHOWN = 8  # parameters in a table
_ROUNDING = 1e-6  # a share of the whole gradient below which one parameter's is rounding of float32
_EXACT = FewBitConfig(recipe="exact", recompute=False, masks=False)


@dataclass(frozen=True)
class ParameterError:
    """The error of the gradient of one parameter.

    Attributes:
        name: The parameter's.
        relative_error: Norm of the error over that of the exact gradient; infinite if that is 0 and the error is not.
        cosine: Of the angle between both gradients.
        sqnr: Signal to quantisation noise, in decibels: -20 log10 of the relative error.
        share_of_noise: Norm of the error over the noise between batches; None where that is not known.
    """

    name: str
    relative_error: float
    cosine: float
    sqnr: float
    share_of_noise: float | None


@dataclass(frozen=True)
class Verification:
    """One step with codes against the same step without.

    Attributes:
        parameters: All that have a gradient, the worst first; at the end those whose gradient is mere rounding.
        relative_error: Of all gradients as one vector.
        share_of_noise: Of that vector: 0.1 is a tenth of what another batch of this size changes the gradient by. None
            where no other batch is known.
        noise_unknown: Why no other batch is known; None where one is.
        bytes_before, bytes_after: Saved for the backward by torch.compile and by fewbit.
        loss_identical: Whether both losses are the same, bit for bit.
    """

    parameters: tuple[ParameterError, ...]
    relative_error: float
    share_of_noise: float | None
    noise_unknown: str | None
    bytes_before: int
    bytes_after: int
    loss_identical: bool

    @property
    def verdict(self) -> str:
        """What follows, in words."""
        if self.bytes_after == self.bytes_before:
            return "Nothing is saved: fewbit leaves this step as it is."
        error = f"Codes change the gradient by {self.relative_error:.2%}"
        if self.relative_error == 0:
            return "All that is saved is exact: the gradient is the same, bit for bit."
        if not math.isfinite(self.relative_error):
            return "The gradient is not finite, with codes or without: there is nothing to compare."
        measure, what = self.relative_error, "of itself"
        if self.share_of_noise is not None:
            measure = self.share_of_noise
            what = f"which is {self.share_of_noise:.1%} of what another batch changes it by"
            error += ","
        if measure <= _SMALL:
            return f"{error} {what}. Training will not show it."
        if measure <= _LARGE:
            return f"{error} {what}. Training will hardly show it; compare the losses of a short run."
        return f"{error} {what}. That is too much: use more bits, or skip the modules at the top of the table."

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        head = ("parameter", "rel. error", "cosine", "SQNR, dB", "of noise")
        rows = [
            (p.name, f"{p.relative_error:.2%}", f"{p.cosine:.5f}", f"{p.sqnr:.1f}", _share(p.share_of_noise))
            for p in self.parameters[:_SHOWN]
        ]
        yield from text_table(head, rows, right=head[1:])
        if len(self.parameters) > _SHOWN:
            yield f"  ... and {len(self.parameters) - _SHOWN} more, of less error"
        saving = 1 - self.bytes_after / self.bytes_before if self.bytes_before else 0.0
        yield f"saved for backward: torch.compile {self.bytes_before:,}   fewbit {self.bytes_after:,}   (-{saving:.1%})"
        yield f"loss: {'identical' if self.loss_identical else 'DIFFERS; please report it'}"
        if self.noise_unknown:
            yield f"noise between batches: not known, because {self.noise_unknown}"
        yield self.verdict


def verify(
    model: nn.Module,
    *args: Any,
    loss: Loss | None = None,
    another: Sequence[Any] | Mapping[str, Any] | None = None,
    fewbit_config: FewBitConfig | None = None,
    **kwargs: Any,
) -> Verification:
    """Take the gradient of one step exactly and with codes, and compare.

    No kernels are compiled: both steps run in plain ATen. Gradients, buffers, random state and what is compiled of the
    model stay as they are. It takes the memory and the time of some eager steps.

    Args:
        model: A module, compiled or not, with parameters that require gradients.
        *args: One batch.
        loss: Takes the model and the batch, returns a scalar. Without it, the batch is the model's input, and the
            loss its output or the output's attribute ``loss``.
        another: Another batch, as a sequence or by names, to know how much the gradient differs between batches.
            Without it, the two halves of this batch tell, where it can be halved.
        fewbit_config: Other options than the default.
        **kwargs: The rest of the batch, by names.

    Raises:
        TypeError: The loss is no scalar tensor.
        ValueError: No parameter gets a gradient, or FSDP has sharded the model.

    Examples:
        >>> import torch, fewbit_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
        >>> x, y = torch.randn(128, 32), torch.randn(128, 8)
        >>> loss = lambda model, x, y: (model(x) - y).square().mean()
        >>> found = fewbit_fx.verify(model, x, y, loss=loss)
        >>> found.loss_identical, found.relative_error < 0.02, found.share_of_noise < 0.1
        (True, True, True)
    """
    config = fewbit_config or FewBitConfig()
    step = _Step(model, loss)
    exact, coded = step(_EXACT, args, kwargs), step(config, args, kwargs)
    try:
        noise, unknown = _noise(step, exact.gradients, args, kwargs, another), None
    except _NoHalvesError as none:
        noise, unknown = None, str(none)
    sizes = {name: float(g.float().norm()) for name, g in exact.gradients.items()}
    errors = _distances(coded.gradients, exact.gradients)
    noises = {name: None if noise is None else noise.get(name, 0.0) for name in sizes}
    parameters = [
        _parameter_error(name, gradient, coded.gradients[name], sizes[name], errors[name], noises[name])
        for name, gradient in exact.gradients.items()
    ]
    size, error = math.hypot(*sizes.values()), math.hypot(*errors.values())
    # Parameters whose gradient is 0 but for rounding, as that of a key's bias: softmax does not see it.
    negligible = {name for name, one in sizes.items() if one <= _ROUNDING * size}
    return Verification(
        tuple(sorted(parameters, key=lambda p: (p.name in negligible, -_worse(p)))),
        error / size if size else 0.0,
        _ratio(error, None if noise is None else math.hypot(*noise.values())),
        unknown,
        coded.bytes_before,
        coded.bytes_after,
        torch.equal(exact.loss, coded.loss),
    )


class Watch:
    """Verify every some steps of a training, and warn where the error is too large.

    Codes are chosen once, but tensors change while a model trains; what is harmless at first may not stay so. Call it
    with each batch, before or after the step:

        watch = fewbit_fx.Watch(model, every=500)
        for batch in loader:
            watch(**batch)
            ...

    Args:
        model: The module that trains, compiled or not.
        every: Steps from one measurement to the next; the first step is measured.
        bound: Of the error, as a share of the noise between batches (of the gradient, where that is not known).
        loss: As of :func:`verify`; the batch is what it is called with.
        fewbit_config: Other options than the default.

    Attributes:
        history: The step, counted from 0, and what was found, of each measurement.

    Raises:
        ValueError: ``every`` below 1, or ``bound`` not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 500,
        bound: float = _LARGE,
        loss: Loss | None = None,
        fewbit_config: FewBitConfig | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"Watch: every is {every!r}; allowed is a whole number of steps, 1 or more")
        if not bound > 0:
            raise ValueError(f"Watch: bound is {bound!r}; allowed is a number above 0")
        self.history: list[tuple[int, Verification]] = []
        self._model, self._every, self._bound, self._loss = model, every, bound, loss
        self._config, self._step = fewbit_config, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Verification | None:
        """Count a step, and measure if its turn has come; then what was found is returned."""
        step, self._step = self._step, self._step + 1
        return None if step % self._every else self.measure(step, args, kwargs)

    def measure(self, step: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Verification:
        """Measure now, whatever the count: for a training that counts its steps itself.

        Args:
            step: Its number, for the history and the warning.
            args: The batch.
            kwargs: The rest of the batch, by names.
        """
        found = verify(self._model, *args, loss=self._loss, fewbit_config=self._config, **kwargs)
        self.history.append((step, found))
        error = found.relative_error if found.share_of_noise is None else found.share_of_noise
        if error > self._bound:
            worst = ", ".join(p.name for p in found.parameters[:3])
            warnings.warn(
                f"fewbit-fx at step {step}: {found.verdict} The bound is {self._bound:.0%}; worst are {worst}.",
                stacklevel=3,
            )
        return found


@dataclass(frozen=True)
class _Taken:
    """One step: its loss and gradients, and the bytes saved for its backward without and with codes."""

    loss: Tensor
    gradients: Gradients
    bytes_before: int
    bytes_after: int


class _Step:
    """Steps of one model, which leave no trace."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        original = original_of(model)
        assert isinstance(original, nn.Module), "what torch.compile wraps is a module"
        if _is_sharded(original):
            raise ValueError(
                "verify: FSDP has sharded the model, and gives parameters their gradients by hooks of its own; "
                "verify it before it is sharded"
            )
        self._model, self._loss = original, loss

    def __call__(self, config: FewBitConfig, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Taken:
        listener = Listener()
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("verify: no parameter of the model requires a gradient")
        with undisturbed(self._model), torch.enable_grad():
            run = partitioned(self._with_loss, config, listener)
            loss = run(*args, **kwargs)
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients = {name: _whole(g.detach()) for name, g in zip(trained, found, strict=True) if g is not None}
        if not gradients:
            raise ValueError("verify: no parameter of the model gets a gradient")
        before, after = (sum(getattr(r, n) for r in listener.records) for n in ("plain_bytes", "fewbit_bytes"))
        return _Taken(loss.detach(), gradients, before, after)

    def _with_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._loss:
            loss = self._loss(self._model, *args, **kwargs)
        else:
            output = self._model(*args, **kwargs)
            loss = getattr(output, "loss", output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"verify: the loss is {what}; allowed is a scalar, of the model or of loss=(model, batch)")
        return loss


def _is_sharded(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def _whole(x: Tensor) -> Tensor:
    """All of a tensor of which each rank has a part, as DTensor is: else each rank would measure its own."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


class _NoHalvesError(Exception):
    """The batch has no halves that the model takes. The message says why."""


def _noise(
    step: _Step,
    exact: Gradients,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    another: Sequence[Any] | Mapping[str, Any] | None,
) -> dict[str, float]:
    """For each parameter, the root mean square by which the gradient of a batch of this size differs from the mean.

    Raises:
        _NoHalvesError: No other batch is given, and this one cannot be halved.
    """
    if another is not None:
        other = (step(_EXACT, (), another) if isinstance(another, Mapping) else step(_EXACT, another, {})).gradients
        return {name: distance / math.sqrt(2) for name, distance in _distances(other, exact).items()}
    halves = _halves(args, kwargs)
    try:
        first, second = (step(_EXACT, *half).gradients for half in halves)
    except Exception as raised:  # whatever a model raises that knows the size of its batch
        raise _NoHalvesError(f"half of the batch raises {raised!r}; give another batch, another=(...)") from raised
    # The difference of halves has four times the variance of their mean.
    return {name: distance / 2 for name, distance in _distances(first, second).items()}


def _halves(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[list[Any], dict[str, Any]], tuple[list[Any], dict[str, Any]]]:
    """The inputs of two halves of a batch.

    Raises:
        _NoHalvesError: The inputs' first dimensions are not all one even number.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) != 1 or (size := sizes.pop()) < 2 or size % 2:
        raise _NoHalvesError("the batch has no two halves; give another batch, another=(...)")

    def half(part: int) -> tuple[list[Any], dict[str, Any]]:
        def cut(value: Any) -> Any:
            return value.chunk(2)[part] if isinstance(value, Tensor) else value

        return [cut(a) for a in args], {k: cut(v) for k, v in kwargs.items()}

    return half(0), half(1)


def _distances(gradients: Gradients, others: Gradients) -> dict[str, float]:
    """The norm of the difference of each parameter's two gradients; one that is missing counts as 0."""
    zero = torch.zeros(())

    def distance(name: str) -> float:
        return float((gradients.get(name, zero).float() - others.get(name, zero).float()).norm())

    return {name: distance(name) for name in gradients.keys() | others.keys()}


def _parameter_error(
    name: str, exact: Tensor, coded: Tensor, size: float, error: float, noise: float | None
) -> ParameterError:
    exact, coded = exact.float(), coded.float()
    relative = error / size if size else (math.inf if error else 0.0)
    cosine = float(torch.nn.functional.cosine_similarity(exact.flatten(), coded.flatten(), dim=0)) if size else 0.0
    sqnr = -20 * math.log10(relative) if 0 < relative < math.inf else (math.inf if not relative else -math.inf)
    return ParameterError(name, relative, cosine, sqnr, _ratio(error, noise))


def _ratio(error: float, noise: float | None) -> float | None:
    if noise is None:
        return None
    return error / noise if noise else (math.inf if error else 0.0)


def _worse(parameter: ParameterError) -> float:
    return parameter.relative_error if parameter.share_of_noise is None else parameter.share_of_noise


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
