"""What `find_layers` says of memory against what is measured, as a table of Markdown.

The peak of a pass is measured by what XLA says of its compiled program, that of the decompositions
by the resident memory of a process of their own. Run it as ``python benchmarks/memory.py``.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models_jax
import workloads

import laplax_kfac as lk
from laplax_kfac.curvature.passes import Compiled
from laplax_kfac.curvature.work import Work
from laplax_kfac.factors import Statistics

CASES = [
    (name, fisher_type, batch)
    for name, batch in (("mlp", 256), ("lenet", 256), ("conv8", 64), ("transformer", 64))
    for fisher_type in ("type2", "mc")
]
DECOMPOSED = ((784, 1024, 1024, 10), (784, 2048, 10), (64, *[256] * 12, 10))
PROCESS = Path("/proc/self")


def report_of(workload: workloads.Workload, fisher_type: str, batch: int) -> lk.LayerReport:
    """What is said of a workload, from shapes alone."""
    forward = models_jax.forward(workload)
    weights = workloads.weights(workload)
    params = {name: jax.ShapeDtypeStruct(w.shape, jnp.float32) for name, w in weights.items()}
    example = jax.ShapeDtypeStruct(workload.shape, jnp.float32)
    return lk.find_layers(
        lambda input, params: forward(params, input), params, example,
        fisher_type=fisher_type, batch_size=batch,
    )  # fmt: skip


def measured_pass(work: Work | None) -> int:
    """Bytes of the pass, as XLA has laid them out."""
    assert work is not None
    arrays = work.shapes()
    passes = Compiled.of(work.program, work.settings)
    new = jax.tree.leaves(jax.eval_shape(passes.statistics, arrays))
    add: Any = passes.add_in_place  # made by `jax.jit`
    found = add.lower(new, arrays).compile().memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(kept + found.temp_size_in_bytes)


def memory_of_process(name: str) -> int:
    """Bytes that this process has in memory (VmRSS), or has had at most (VmHWM)."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def drawn(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Random numbers in the place of a sum: what is of low rank is decomposed in less memory."""
    if not shape.shape or not jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.ones(shape.shape, shape.dtype)
    return jax.random.normal(jax.random.key(0), shape.shape, shape.dtype)


def measured_finalization(sizes: tuple[int, ...]) -> int:
    """Most bytes of this process from the sums to the blocks, compiled before."""
    workload = workloads.mlp(sizes)
    forward = models_jax.forward(workload)
    params = jax.tree.map(jnp.asarray, workloads.weights(workload))
    acc = lk.accumulator(lambda input, params: forward(params, input), params, loss_fn="mse")
    x, y = jnp.ones((64, *workload.shape)), jnp.ones((64, workload.classes))
    shapes = jax.eval_shape(lambda: acc.update(acc.init(), (x, y)))
    state: Statistics = jax.tree.map(drawn, shapes)
    jax.block_until_ready(lk.factors.finalize(state))  # compiled, and gone
    gc.collect()
    before = memory_of_process("VmRSS") - sum(x.nbytes for x in jax.tree.leaves(state))
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    jax.block_until_ready(lk.factors.finalize(state))
    return memory_of_process("VmHWM") - before


def main() -> None:
    """Print the table."""
    print("| | told | measured | |\n|---|---|---|---|")
    for name, fisher_type, batch in CASES:
        report = report_of(workloads.WORKLOADS[name], fisher_type, batch)
        told, found = report.pass_bytes or 0, measured_pass(report.work)
        text = f"pass, {name}, `{fisher_type}`, batches of {batch}"
        print(f"| {text} | {told / 1e6:.0f} MB | {found / 1e6:.0f} MB | {told / found - 1:+.0%} |")
    for sizes in DECOMPOSED:
        told = report_of(workloads.mlp(sizes), "type2", 64).finalization_bytes
        command = [sys.executable, __file__, json.dumps(sizes)]
        given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # at once, if freed
        done = subprocess.run(command, check=True, capture_output=True, env=given_back)
        found = int(done.stdout.split()[-1])
        text = f"decompositions, MLP of {sizes[0]}, {len(sizes) - 2} x {sizes[1]}, {sizes[-1]}"
        print(f"| {text} | {told / 1e6:.0f} MB | {found / 1e6:.0f} MB | {told / found - 1:+.0%} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measured_finalization(tuple(json.loads(sys.argv[1]))))
    else:
        main()
