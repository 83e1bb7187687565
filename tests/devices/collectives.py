"""Which collectives a pass over one batch makes on eight devices, by what is compiled, as JSON."""

import json
import re
from collections import Counter
from dataclasses import replace

import jax
import layouts  # sets the number of devices

import laplax_kfac as lk
from laplax_kfac import machine
from laplax_kfac.capture.batches import as_batch, to_arrays, weighted_batch
from laplax_kfac.meshes import automatic

COLLECTIVE = re.compile(
    r"= .*?\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(layout: str, size: int, reused_bytes: int) -> dict[str, int]:
    """How many of each there are, for batches of a size, and in loops over parts of a share."""
    machine.MACHINE = replace(machine.MACHINE, reused_bytes=reused_bytes)
    data = [layouts.batch_of(jax.random.key(1), size)]
    _, *arrays = layouts.LAYOUTS[layout](layouts.params_of(jax.random.key(0)), data)
    params, data = jax.tree.map(automatic, arrays)
    accumulator = lk.accumulator(layouts.model, params, loss_fn=layouts.LOSS)
    compiled, arguments = accumulator._pass(*weighted_batch(to_arrays(as_batch(data[0]))), 0)
    text = jax.jit(compiled.statistics).lower(arguments).compile().as_text() or ""
    found: Counter[str] = Counter()
    assert text
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            found[match.group(1) + " in a loop" * ("while/body" in line)] += 1
    return dict(found)


if __name__ == "__main__":
    for layout in ("automatic", "fsdp_first_automatic", "fsdp_last_explicit"):
        for size, reused_bytes in ((16, 1 << 24), (64, 1 << 24), (64, 1 << 14)):
            print(json.dumps([layout, collectives(layout, size, reused_bytes)]), flush=True)
