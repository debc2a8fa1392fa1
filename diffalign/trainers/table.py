"""Errors of the reference, computed once and kept on disk.

``ell_ref`` of an example depends on its images, its noise and its time alone. With a fixed number of draws
per example it becomes a table, ``(examples, draws, images)``, of a few bytes each: no step runs the
reference, and no later run on the same model and data either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from diffalign.data.shards import ShardStore
from diffalign.errors import RunFailed

ROWS = 256  # examples in one file, and what a killed process may lose
COLUMN = "errors"


def reference_table(
    store: ShardStore,
    keys: Sequence[str],
    shape: tuple[int, int],
    errors: Callable[[list[int]], Tensor],
    accelerator: Accelerator,
) -> Tensor:
    """The errors of all rows, from `store` as far as it has them, the rest computed and added to it.

    Args:
        store: of this reference and these draws. The main process's counts; others need not share its disk.
        keys: content of each row; equal ones are computed once.
        shape: of a row of the table, (K draws, images of an example).
        errors: rows -> ``(rows, K, sides)`` float32 on the device; all processes call it together.
        accelerator: of the run.

    Returns:
        ``(len(keys), K, sides)`` float32, on the device of every process.

    Raises:
        RunFailed: an error that is not finite.
    """
    main, device = accelerator.is_main_process, accelerator.device
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    todo = torch.zeros(len(keys), dtype=torch.bool, device=device)
    if main:
        todo[[row for key, row in first.items() if key not in store]] = True
    missing = broadcast(todo).nonzero().flatten().tolist()
    for start in range(0, len(missing), ROWS):
        rows = missing[start : start + ROWS]
        found = errors(rows)
        if not found.isfinite().all():
            raise RunFailed(
                "the reference's error is not finite for some images: use --mixed_precision bf16 or no"
            )
        if main:
            store.add([keys[row] for row in rows], {COLUMN: found})
    table = torch.zeros(len(keys), *shape, device=device)
    if main:
        held = store.rows(keys, memory_limit=2**63)[COLUMN]
        assert isinstance(held, Tensor)  # no limit
        table.copy_(held)
    return broadcast(table)
