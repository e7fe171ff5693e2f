"""Counts what a piece of code does to tensors: floating-point operations, and bytes that live at once.

It works on any device. On the meta device nothing is computed, so that a model of any size is counted in
seconds. Attention, whose kernel torch chooses by device, is counted as the fused one that saves no matrix of
probabilities: torch itself would take the plain one on meta tensors.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from flowtilt.plan.shapes import outcome, tensors

aten: Any = torch.ops.aten
_FUSED = aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
_CONVOLUTIONS = (aten.convolution, aten._convolution, aten.convolution_backward)


@dataclass(frozen=True, eq=False)
class Work:
    """What was done.

    Args:
        flops: floating-point operations of products and convolutions, a multiplication and an addition being two, by precision:
            "half" (bf16, fp16), "tf32" (fp32 convolutions, which cuDNN rounds to it) and "single" (other fp32).
        alive: bytes that lived at once, after each tensor that was made.
        saved: bytes that live between the forward and the backward pass; weights and inputs are from before, and not among them.
    """

    flops: Mapping[str, float]
    alive: np.ndarray
    saved: float

    @property
    def peak(self) -> float:
        """Bytes that lived at once, at most."""
        return float(self.alive.max(initial=0))


def scaled(flops: Mapping[str, float], factor: float) -> dict[str, float]:
    """Operations times a number."""
    return {precision: factor * count for precision, count in flops.items()}


def added(*parts: Mapping[str, float]) -> dict[str, float]:
    """Operations of several."""
    precisions = dict.fromkeys(precision for part in parts for precision in part)
    return {precision: sum(part.get(precision, 0) for part in parts) for precision in precisions}


@dataclass(frozen=True, eq=False)
class Line:
    """Work that grows by the same amount with every row: `fixed` for none, `each` more for a row.

    It is so at every instant of the work, so that its peak is known even where it comes from another instant for
    many rows than for few.
    """

    fixed: Work
    each: Work

    def at(self, rows: int) -> Work:
        """Work of `rows` rows."""
        a, b = self.fixed, self.each
        return Work(added(a.flops, scaled(b.flops, rows)), a.alive + rows * b.alive, a.saved + rows * b.saved)


ROWS = 1_000_003
"""A prime: bytes and operations that are a multiple of it are the rows', and those of nothing else are."""


def measure(forward: Callable[[], object]) -> Work:
    """What `forward` does and, where it returns a scalar with a gradient, its backward pass; tensors from before are not counted."""
    return _measured(forward, 0).fixed


def measure_rows(work: Callable[[int], Callable[[], object]]) -> Line:
    """The same by rows, of work on `ROWS` rows; on the meta device, where it takes no longer than one row would."""
    return _measured(work(ROWS), ROWS)


def measure_few(work: Callable[[int], Callable[[], object]]) -> Line:
    """The same of work on 2 and on 4 rows, for code that goes over rows one by one; of bytes the peak alone is known."""
    few, more = (measure(work(rows)) for rows in (2, 4))
    each = Work(scaled(added(more.flops, scaled(few.flops, -1)), 0.5), np.array([(more.peak - few.peak) / 2]), (more.saved - few.saved) / 2)
    fixed = Work(added(few.flops, scaled(each.flops, -2)), np.array([few.peak - 2 * each.alive[0]]), few.saved - 2 * each.saved)
    return Line(fixed, each)


def _measured(forward: Callable[[], object], rows: int) -> Line:
    meter = _Meter(rows)
    saved = 0j
    with meter, _fused_attention():
        loss = forward()
        if isinstance(loss, Tensor) and loss.requires_grad:
            saved = meter.bytes - meter.split(loss.nbytes)
            loss.backward()
    alive = np.array(meter.history, dtype=np.complex128)
    fixed = Work({precision: int(count.real) for precision, count in meter.flops.items()}, alive.real, saved.real)
    return Line(fixed, Work({precision: count.imag for precision, count in meter.flops.items()}, alive.imag, saved.imag))


class _Meter(TorchDispatchMode):
    """Counts in complex numbers: what is there for no row, and as the imaginary part what each row adds."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.flops: defaultdict[str, complex] = defaultdict(complex)
        self.alive: dict[int, tuple[Any, complex]] = {}
        """Storages that were made here, by address."""
        self.bytes = 0j
        self.history: list[complex] = []

    def split(self, number: int) -> complex:
        """Of `number`, the rows' part is all or nothing."""
        return complex(0, number // self.rows) if self.rows and number % self.rows == 0 else complex(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = tensors((*args, *kwargs.values()))
        out = outcome(func, args, kwargs, given)
        operation = func._overloadpacket
        if operation in flop_registry or operation in (_FUSED, _FUSED_BACKWARD):
            self.flops[_precision(operation, given[0].dtype)] += self.split(_flops(operation, args, kwargs, out))
        before = {x.untyped_storage()._cdata for x in given}
        for x in tensors((out,)):
            if x.untyped_storage()._cdata not in before:
                self._born(x)
        return out

    def _born(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return

        def died(_: Any) -> None:
            self.bytes -= self.alive.pop(key)[1]

        size = self.split(storage.nbytes())
        self.alive[key] = (weakref.ref(storage, died), size)
        self.bytes += size
        self.history.append(self.bytes)


def _flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    if operation is _FUSED:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if operation is _FUSED_BACKWARD:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    return flop_registry[operation](*args, **kwargs, out_val=out)


def _precision(operation: Any, dtype: torch.dtype) -> str:
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    return "tf32" if operation in _CONVOLUTIONS else "single"


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On meta tensors, and on no others, attention is the fused kernel.

    No mode of torch does it: in a backward pass, which may compute attention anew, modes for functions are off.
    """
    own = F.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_fused if query.is_meta else own)(query, *args, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to("meta")
    return _FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
