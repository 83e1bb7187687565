"""The figure that says it all: NLL against OOD AUROC, one point a method."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from study import classification
from study.results import HERE
from study.tables import Summary, error

PATH = HERE.parents[1] / "docs/assets/study.png"
COLOURS = {"evidence": "C3", "layers": "C1", "validation": "C0"}
MARKERS = {
    "last_full": "s", "last_kfac": "D", "diagonal": "x", "kfac": "o", "kfac_mc": "1",
    "kfac_empirical": "2", "kfac_reduce": "v", "ekfac": "^", "kfoc": "P", "full": "*",
}  # fmt: skip


def draw(summary: Summary, path: Path = PATH) -> None:
    """A panel a task: to the upper left is better."""
    tasks = [task for task in classification.TASKS if summary.has(task.name, "map")]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4 * len(tasks), 4.4), layout="constrained", squeeze=False
    )
    handles = {}
    for axis, task in zip(axes.flat, tasks, strict=True):
        for name, title in classification.methods_of(task):
            if not summary.has(task.name, name):
                continue
            nll, auroc = (summary.values(task.name, name, key) for key in ("nll", "auroc"))
            curvature, _, prior = name.partition("/")
            colour = COLOURS.get(prior, "black")
            marker = MARKERS.get(curvature, {"map": "o", "temperature": "d"}.get(name, "P"))
            if name == "marglik":
                colour, marker = "C2", "o"
            handles[title] = axis.errorbar(
                np.mean(nll), np.mean(auroc), error(auroc), error(nll),
                color=colour, marker=marker, linestyle="", markersize=7, elinewidth=0.7,
            )  # fmt: skip
        axis.set(title=task.title, xlabel="NLL of held-out digits", xscale="log")
        axis.xaxis.set_minor_formatter("{x:.2f}")
        axis.tick_params(axis="x", which="both", labelrotation=45, labelsize=7)
    axes[0, 0].set_ylabel("AUROC of strange inputs")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
