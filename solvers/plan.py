"""A solver is a plan: one row of coefficients per network evaluation, and one kernel that executes rows.

Let ``x_e`` be the sample handed to evaluation ``e``, ``o_e`` the network's output there, ``z_e`` fresh noise,
and

    m_e = convert_x x_e + convert_o o_e                (the output in the plan's form, x0 or epsilon)

A :class:`Row` says how the sample of the next evaluation is made:

    x_{e+1} = sum_j x[j] x_j + sum_j m[j] m_j + sum_j z[j] z_j + bias,      j <= e

All coefficients are float64 numbers computed on the host before sampling starts, from the noise schedule and
the times alone. They may also be arrays that broadcast over the sample without its batch axis (per
coordinate). A row names what it reads by evaluation; :func:`compile_plan` works out which tensors must
outlive a step.

How the published methods are rows:

- *multistep* (DPM-Solver++, UniPC's predictor, PNDM after warm-up): ``x[e]`` and the newest few ``m``.
- *corrector* (UniPC, v3): predicted and corrected state share their ``x`` part, so the corrected state is
  ``x_e + sum_j (c_j - p_j) m_j`` with the predictor's weights p and the corrector's weights c of the step
  that led here. Insert it for ``x_e`` in the next predictor and collect terms: nothing is kept but ``m``, and
  what a pipeline does to ``x_e`` between steps (inpainting) survives.
- *singlestep and Runge-Kutta stages*: each stage is a row; the step's start ``s`` is read again as ``x[s]``.
- *pseudo Runge-Kutta history* (F-PNDM): later rows don't name the ``m`` of the inner stages.
- *SDE*: ``z[e]``; for one Brownian path over the stages of a step, name an earlier ``z[j]`` again.
- *per-coordinate coefficients* (v3): arrays in ``convert``, ``x``, ``m``; the inhomogeneous term is ``bias``.
- *compensation* (DC-Solver): a compensated output is a fixed combination of outputs; expand it in ``m``.
- *run-time methods* (time shift, thresholding): the scheduler's ``_transform`` hook sees each ``m_e`` and
  ``x_e``; a method may write the times of later evaluations into ``timesteps``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Coefficient = float | NDArray[np.float64]

# Elements per thread that stay in its cache over the passes of a row.
_BLOCK = 1 << 17
# A tensor of so many elements is worked off in blocks on the CPU.
_LARGE = 2 * _BLOCK

# Bound coefficients (numbers or tensors) and what they multiply.
Terms = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Row:
    """One network evaluation and the update that follows it (see the module's formula).

    Attributes:
        time: what the network is given.
        convert: ``(convert_x, convert_o)``.
        x, m, z: evaluation index -> coefficient.
        bias: None, or an array that broadcasts over the sample without its batch axis.
    """

    time: float
    convert: tuple[Coefficient, Coefficient]
    x: Mapping[int, Coefficient]
    m: Mapping[int, Coefficient]
    z: Mapping[int, Coefficient] = field(default_factory=dict)
    bias: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Plan:
    """All rows of a run, in order.

    Raises:
        ValueError: if a row reads an evaluation that comes after it, or holds a number that is not finite.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            for terms in (row.x, row.m, row.z):
                if any(not 0 <= j <= index for j in terms):
                    raise ValueError(f"row {index} reads evaluations {sorted(terms)}, which it cannot know")
                if not all(np.all(np.isfinite(c)) for c in terms.values()):
                    raise ValueError(f"row {index} at t = {row.time} has a coefficient that is not finite")
            if not all(np.all(np.isfinite(c)) for c in row.convert):
                raise ValueError(f"row {index} at t = {row.time} cannot convert the network's output")

    @property
    def times(self) -> NDArray[np.float64]:
        return np.array([row.time for row in self.rows])

    def table(self) -> NDArray[np.float64]:
        """(n, n) scalar weights of ``m``: entry (e, j) is what row e gives to ``m_j``."""
        weights = np.zeros((len(self.rows), len(self.rows)))
        for e, row in enumerate(self.rows):
            for j, c in row.m.items():
                weights[e, j] = c
        return weights


@dataclass(frozen=True)
class Instruction:
    """A row with evaluations replaced by slots of the buffer that :func:`execute` is given.

    Attributes:
        convert: as in the row, or divided by its larger part, which the weights of ``m_e`` then carry.
        output_first: whether that part was the output's.
        direct: weights of ``x_e`` and ``o_e`` when ``m_e`` itself isn't needed, with the conversion folded
            in.
        here: weights of ``x_e``, ``m_e``, ``z_e``.
        past: (slot, weight) of everything read from earlier evaluations.
        keep_x, keep_m, keep_z: slot that keeps the tensor for later rows, or None.
        draws: whether ``z_e`` is drawn.
        arrays: whether a coefficient is one, so that :func:`bind` has something to do.
    """

    convert: tuple[Coefficient | Tensor, Coefficient | Tensor]
    output_first: bool
    direct: tuple[Coefficient | Tensor, Coefficient | Tensor]
    here: tuple[Coefficient | Tensor, Coefficient | Tensor, Coefficient | Tensor]
    past: tuple[tuple[int, Coefficient | Tensor], ...]
    keep_x: int | None
    keep_m: int | None
    keep_z: int | None
    draws: bool
    bias: NDArray[np.float64] | Tensor | None
    arrays: bool = False


def _scale(convert: tuple[Coefficient, Coefficient]) -> float:
    """The larger of two plain numbers, or 1 for arrays."""
    c_x, c_o = convert
    if not isinstance(c_x, float) or not isinstance(c_o, float):
        return 1.0
    return c_x if abs(c_x) > abs(c_o) else c_o


def _plain(c: Coefficient) -> Coefficient:
    """Python's float, which torch takes fastest, unless it is an array."""
    return c if isinstance(c, np.ndarray) and c.ndim else float(c)


def compile_plan(plan: Plan, *, scaled: bool = True) -> tuple[tuple[Instruction, ...], int]:
    """Instructions of a plan and the number of slots they need, by liveness of x, m and z over the rows.

    With `scaled`, ``m_e`` is kept up to a factor that makes its conversion a single addition.
    """
    scales = [_scale(row.convert) if scaled else 1.0 for row in plan.rows]
    last_use: dict[tuple[str, int], int] = {}
    for e, row in enumerate(plan.rows):
        for family, terms in (("x", row.x), ("m", row.m), ("z", row.z)):
            last_use.update({(family, j): e for j in terms})
    slot_of: dict[tuple[str, int], int] = {}
    instructions: list[Instruction] = []
    size = 0
    for e, row in enumerate(plan.rows):
        # A slot is free once the last row that reads it lies behind.
        slot_of = {key: slot for key, slot in slot_of.items() if last_use[key] >= e}
        keep: dict[str, int | None] = dict.fromkeys("xmz")
        for family in keep:
            if last_use.get((family, e), e) > e:
                taken = set(slot_of.values())
                slot = next(s for s in range(len(taken) + 1) if s not in taken)
                keep[family] = slot_of[family, e] = slot
                size = max(size, slot + 1)
        a_x, a_m = row.x.get(e, 0.0), row.m.get(e, 0.0)
        c_x, c_o = row.convert
        convert = _plain(c_x / scales[e]), _plain(c_o / scales[e])
        here = _plain(a_x), _plain(a_m * scales[e]), _plain(row.z.get(e, 0.0))
        past = tuple(
            (slot_of[family, j], _plain(c * scales[j] if family == "m" else c))
            for family, terms in (("x", row.x), ("m", row.m), ("z", row.z))
            for j, c in sorted(terms.items())
            if j != e
        )
        numbers = (*convert, *here, *(c for _, c in past))
        instructions.append(
            Instruction(
                convert=convert,
                output_first=scaled and scales[e] is c_o,
                direct=(_plain(a_x + a_m * c_x), _plain(a_m * c_o)),
                here=here,
                past=past,
                keep_x=keep["x"],
                keep_m=keep["m"],
                keep_z=keep["z"],
                draws=("z", e) in last_use,
                bias=row.bias,
                arrays=row.bias is not None or any(isinstance(c, np.ndarray) for c in numbers),
            )
        )
    return tuple(instructions), size


def bind(instructions: Sequence[Instruction], like: Tensor) -> tuple[Instruction, ...]:
    """Instructions whose arrays are tensors on the device of `like`, in the arithmetic's precision.

    Done once per run, at its first step; plans of plain numbers pass through untouched.
    """
    dtype = working_dtype(like)

    def tensor(c: Any) -> Any:
        if isinstance(c, np.ndarray) and c.ndim:
            return torch.as_tensor(c, dtype=dtype, device=like.device)
        return c

    return tuple(
        replace(
            i,
            convert=(tensor(i.convert[0]), tensor(i.convert[1])),
            direct=(tensor(i.direct[0]), tensor(i.direct[1])),
            here=(tensor(i.here[0]), tensor(i.here[1]), tensor(i.here[2])),
            past=tuple((slot, tensor(c)) for slot, c in i.past),
            bias=tensor(i.bias),
        )
        if i.arrays
        else i
        for i in instructions
    )


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def linear(
    terms: Sequence[tuple[float | Tensor, Tensor]], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """``sum_i c_i t_i`` in `dtype`, zero terms left out, written to `out` where given.

    Differentiable, and then out of place, when a term requires grad.
    """
    used = [(c, t) for c, t in terms if isinstance(c, Tensor) or c != 0.0] or [terms[0]]
    (c, t), *rest = used
    if torch.is_grad_enabled() and any(t.requires_grad for _, t in used):
        total = t.to(dtype) * c
        for c, t in rest:
            total = torch.addcmul(total, t, c) if isinstance(c, Tensor) else torch.add(total, t, alpha=c)
        return total
    if t.dtype != dtype:
        total = (t.to(dtype) if out is None else out.copy_(t)).mul_(c)
    elif rest and isinstance(c, float) and c == 1.0 and isinstance(rest[0][0], float):
        # Plain addition reads both terms at once: one kernel less.
        total = torch.add(t, rest[0][1], alpha=rest[0][0], out=out)
        rest = rest[1:]
        if total.dtype != dtype:
            total = total.to(dtype)
    else:
        total = torch.mul(t, c, out=out)
    for c, t in rest:
        if isinstance(c, Tensor):
            total.addcmul_(t.to(dtype), c)
        else:
            total.add_(t, alpha=c)
    return total


def execute(
    instruction: Instruction,
    output: Tensor,
    sample: Tensor,
    slots: list[Tensor | None],
    noise: Tensor | None = None,
    transform: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The next sample, in the dtype of `sample`; arithmetic in float32, or float64 where a tensor has it.

    Args:
        instruction: one bound instruction (:func:`bind`).
        output: the network's output at `sample`, of its shape.
        sample: ``x_e``.
        slots: the run's buffer, of the size :func:`compile_plan` gave, all None at the start; changed in
            place.
        noise: ``z_e``, needed when ``instruction.draws``.
        transform: ``(m_e, x_e) -> m_e``, applied before ``m_e`` is used or kept; only for instructions
            compiled with ``scaled=False``.
    """
    i = instruction
    dtype = working_dtype(sample, output)
    known: Terms = [(c, slots[slot]) for slot, c in i.past]
    if noise is not None:
        known.append((i.here[2], noise))
    kept = None if i.keep_m is None else slots[i.keep_m]
    if kept is not None and kept.requires_grad:
        kept = None
    if sample.numel() >= _LARGE and transform is None and _fits_blocks(i, sample, output, known):
        result, m = _in_blocks(i, output, sample, known, dtype, kept)
    else:
        result, m = _row(i, output, sample, known, dtype, kept, transform)
    if i.keep_m is not None:
        slots[i.keep_m] = m
    # Copies: a slot is written to later, and the caller's tensors are the caller's.
    if i.keep_x is not None:
        slots[i.keep_x] = sample.clone()
    if i.keep_z is not None and noise is not None:
        slots[i.keep_z] = noise.clone()
    return result if result.dtype == sample.dtype else result.to(sample.dtype)


def _row(
    i: Instruction,
    output: Tensor,
    sample: Tensor,
    known: Terms,
    dtype: torch.dtype,
    kept: Tensor | None,
    transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The next sample in `dtype`, in `out` where given, and ``m_e`` if needed, in `kept` where given.

    `known` are the terms that earlier evaluations and noise contribute.
    """
    if i.keep_m is None and transform is None:
        m = None
        here: Terms = [(i.direct[0], sample), (i.direct[1], output)]
    else:
        pair: Terms = [(i.convert[0], sample), (i.convert[1], output)]
        m = linear(pair[::-1] if i.output_first else pair, dtype, kept)
        if transform is not None:
            m = transform(m, sample)
        here = [(i.here[0], sample), (i.here[1], m)]
    result = linear(here + known, dtype, out)
    if i.bias is not None:
        result = result + i.bias  # type: ignore[assignment]
    return result, m


def _fits_blocks(i: Instruction, sample: Tensor, output: Tensor, known: Terms) -> bool:
    """Whether a row may be worked off in blocks: plain numbers, and plain tensors on the CPU."""
    return (
        sample.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not i.arrays
        and isinstance(i.direct[0], float)
        and all(t.is_contiguous() for t in (sample, output, *(t for _, t in known)))
    )


def _in_blocks(
    i: Instruction, output: Tensor, sample: Tensor, known: Terms, dtype: torch.dtype, kept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_row`, block by block: each tensor comes from memory once, not once a pass."""

    def blocks(t: Tensor) -> tuple[Tensor, ...]:
        return t.view(-1).split(_BLOCK * torch.get_num_threads())

    result = torch.empty_like(sample)
    m = kept
    if i.keep_m is not None and kept is None:
        m = torch.empty_like(sample, dtype=dtype)
    coefficients = [c for c, _ in known]
    pieces = zip(*(blocks(t) for t in (result, output, sample, *(t for _, t in known))), strict=True)
    parts = itertools.repeat(None) if m is None else blocks(m)
    for part, (r, o, x, *past) in zip(parts, pieces, strict=False):
        terms = list(zip(coefficients, past, strict=True))
        made, _ = _row(i, o, x, terms, dtype, part, out=r if r.dtype == dtype else None)
        if made is not r:
            r.copy_(made)
    return result, m
