"""What the results say, as tables: they stand between markers on the page docs/study.md."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from study import classification, continual, regression, selection
from study.approximations import APPROXIMATIONS
from study.results import HERE, Record, Results

PAGE = HERE.parents[1] / "docs/study.md"

Values = NDArray[np.floating]


class Summary:
    """Results by task and method, over the seeds."""

    def __init__(self, results: Iterable[Record]) -> None:
        self.cells: dict[tuple[str, str], dict[int, Record]] = {}
        for record in results:
            key = record["task"], record["method"]
            self.cells.setdefault(key, {})[record["seed"]] = record
        self.seeds = max(map(len, self.cells.values()), default=0)

    def has(self, task: str, *methods: str) -> bool:
        """Whether these were run with all seeds."""
        return all(len(self.cells.get((task, method), ())) == self.seeds for method in methods)

    def values(self, task: str, method: str, *path: str) -> Values:
        """A number of every seed, in the order of seeds."""
        found = []
        for _, record in sorted(self.cells[task, method].items()):
            value: Any = record
            for key in path:
                value = value[key]
            found.append(value)
        return np.asarray(found, "float64")

    def seconds(self, task: str, method: str, kinds: Sequence[str]) -> float:
        """The median of a sum: what is compiled for the first seed serves the others."""
        cells = self.cells[task, method].values()
        return float(np.median([sum(cell.get(kind, 0.0) for kind in kinds) for cell in cells]))


def error(values: Values) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def shown(values: Values, digits: int = 3) -> str:
    """Mean and standard error."""
    return f"{np.mean(values):.{digits}f} ± {error(values):.{digits}f}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def brief(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


# -- tables of a kind of task ------------------------------------------------------------------

SCORES = {
    "accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE",
    "auroc": "OOD AUROC", "fpr95": "OOD FPR95",
}  # fmt: skip
SECONDS = {
    "train": ("train_seconds",), "fit": ("fit_seconds",), "tune": ("tune_seconds",),
    "predict": ("predict_seconds",),
}  # fmt: skip


def classification_tables(summary: Summary) -> str:
    """A table a task."""
    parts = []
    for task in classification.TASKS:
        rows = [
            [title, *(shown(summary.values(task.name, name, key)) for key in SCORES)]
            for name, title in classification.methods_of(task)
            if summary.has(task.name, name)
        ]
        if rows:
            parts.append(f"**{task.title}**\n\n{markdown(['method', *SCORES.values()], rows)}")
    return "\n\n".join(parts)


def cost_table(summary: Summary) -> str:
    """Seconds of the methods on the perceptron and the convolutional network."""
    tasks = [task for task in classification.TASKS if summary.has(task.name, "map")]
    rows = []
    for name, title in classification.methods_of(classification.TASKS[0]):
        cells = []
        for task in tasks:
            if not summary.has(task.name, name):
                cells.append("")
                continue
            parts = (summary.seconds(task.name, name, kinds) for kinds in SECONDS.values())
            cells.append(" + ".join(brief(part) for part in parts if part) or "0")
        rows.append([title, *cells])
    return markdown(["method", *(task.title for task in tasks)], rows)


def strange_table(summary: Summary) -> str:
    """AUROC of every kind of strange input."""
    chosen = {
        "map": "MAP", "ensemble": "ensemble of five", "last_full/evidence": "last layer; evidence",
        "last_full/validation": "last layer; validation", "kfac/evidence": "KFAC; evidence",
        "kfac/validation": "KFAC; validation",
    }  # fmt: skip
    kinds = ["rotated", "inverted", "noise", "other digits", "patches"]
    rows = [
        [
            task.title,
            title,
            *(shown(summary.values(task.name, m, "ood", k, "auroc")) for k in kinds),
        ]
        for task in classification.TASKS
        for m, title in chosen.items()
        if summary.has(task.name, m)
    ]
    return markdown(["task", "method", *kinds], rows)


def link_table(summary: Summary) -> str:
    """How far a link is from samples of the same Gaussian, and the NLL under it."""
    rows = []
    for task in classification.TASKS:
        for method in ("last_full/evidence", "kfac/evidence"):
            if summary.has(task.name, method):
                title = APPROXIMATIONS[method.split("/")[0]].title
                for key in ("distance", "nll"):
                    rows.append(
                        [f"{task.title}, {title}", SCORES.get(key, key)]
                        + [shown(summary.values(task.name, method, "links", link, key))
                           for link in classification.LINKS]
                    )  # fmt: skip
    head = ["task and curvature", "", *(f"`{link}`" for link in classification.LINKS)]
    return markdown(head, rows)


def regression_table(summary: Summary) -> str:
    """NLL of every task, and the share of targets within the 95 % interval."""
    tasks = regression.TASKS
    rows = []
    for name, title in regression.methods_of(tasks[0]):
        if all(summary.has(task.name, name) for task in tasks):
            nll = [shown(summary.values(task.name, name, "nll")) for task in tasks]
            inside = [
                f"{100 * np.mean(summary.values(task.name, name, 'inside')):.0f} %"
                for task in tasks
            ]
            rows.append([title, *nll, *inside])
    titles = [task.title for task in tasks]
    return markdown(["method", *(f"{t}: NLL" for t in titles), *titles], rows)


def continual_table(summary: Summary) -> str:
    keys = {"accuracy": "mean of all tasks", "first": "first task", "last": "last task"}
    rows = [
        [title, *(shown(100 * summary.values("continual", m, key), 1) for key in keys)]
        for m, title in continual.METHODS.items()
        if summary.has("continual", m)
    ]
    return markdown(["curvature of the penalty", *keys.values()], rows)


JUDGES = {
    "evidence, KFAC": lambda r: r["kfac"]["evidence"],
    "evidence, KFAC, with symmetries": lambda r: r["kfac"]["evidence"] + r["symmetries"],
    "evidence, full GGN": lambda r: r["full"]["evidence"],
    "evidence, full GGN, with symmetries": lambda r: r["full"]["evidence"] + r["symmetries"],
    "number of parameters": lambda r: r["num_params"],
}


def ranked(
    summary: Summary, task: str, judge: Callable[[Record], float], truth: str = "full"
) -> tuple[Values, Values]:
    """Of every seed: rank correlation with held-out likelihood, and what the choice loses of it."""
    names = [selection.architecture(hidden) for hidden in selection.HIDDEN]
    cells = [summary.cells[task, name] for name in names]
    correlations, regrets = [], []
    for seed in sorted(cells[0]):
        scores = np.asarray([judge(cell[seed]) for cell in cells], "float64")
        likelihood = np.asarray([-cell[seed][truth]["nll"] for cell in cells])
        correlations.append(spearmanr(scores, likelihood).statistic)
        regrets.append(likelihood.max() - likelihood[scores.argmax()])
    return np.asarray(correlations), np.asarray(regrets)


def selection_table(summary: Summary) -> str:
    names = [selection.architecture(hidden) for hidden in selection.HIDDEN]
    tasks = [task for task in selection.TASKS if summary.has(task.name, *names)]
    rows = []
    for title, judge in JUDGES.items():
        found = [ranked(summary, task.name, judge) for task in tasks]
        rows.append([title, *(f"{shown(c, 2)}; {shown(r, 3)}" for c, r in found)])
    return markdown(["score", *(task.title for task in tasks)], rows)


def architecture_table(summary: Summary) -> str:
    """Evidence and held-out likelihood of every architecture."""
    names = [selection.architecture(hidden) for hidden in selection.HIDDEN]
    tasks = [task for task in selection.TASKS if summary.has(task.name, *names)]
    rows = []
    for task in tasks:
        for title, path, sign in (
            ("evidence, KFAC", ("kfac", "evidence"), 1),
            ("evidence, full GGN", ("full", "evidence"), 1),
            ("held-out log-likelihood, 100 targets", ("full", "nll"), -100),
        ):
            means = [sign * np.mean(summary.values(task.name, n, *path)) for n in names]
            rows.append([task.title, title, *(f"{mean:.1f}" for mean in means)])
    return markdown(["data", "", *names], rows)


def coverage(summary: Summary) -> str:
    """What has not been run yet."""
    names = [selection.architecture(hidden) for hidden in selection.HIDDEN]
    methods = {
        **{t.name: [n for n, _ in classification.methods_of(t)] for t in classification.TASKS},
        **{t.name: [n for n, _ in regression.methods_of(t)] for t in regression.TASKS},
        **{t.name: names for t in selection.TASKS},
        **{t.name: list(continual.METHODS) for t in continual.TASKS},
    }
    missing = {
        f"`{task}`": sum(not summary.has(task, name) for name in chosen)
        for task, chosen in methods.items()
    }
    parts = [f"{title}: {count}" for title, count in missing.items() if count]
    if not parts:
        return "All of the study's cells are among the committed results."
    return (
        "Not all of it has been run. Methods (or architectures) that are missing in the committed "
        f"results, which `make study` goes on with, by task: {'; '.join(parts)}."
    )


# -- the page ----------------------------------------------------------------------------------


def sections() -> dict[str, Callable[[Summary], str]]:
    from study import claims  # which is made of what stands above

    return {
        "coverage": coverage,
        "claims": claims.claims_table,
        "recommended": claims.recommended_table,
        "classification": classification_tables,
        "strange": strange_table,
        "links": link_table,
        "regression": regression_table,
        "selection": selection_table,
        "architectures": architecture_table,
        "continual": continual_table,
        "cost": cost_table,
    }


def page_with(summary: Summary, page: str) -> str:
    """The page with its tables brought up to date."""
    for name, section in sections().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        parts = pattern.split(page)
        if len(parts) != 2:
            msg = f"{PAGE.name} must have the markers of {name!r} once, not {len(parts) - 1} times."
            raise ValueError(msg)
        page = f"{begin}\n\n{section(summary)}\n\n{end}".join(parts)
    return page


def write(results: Results, page: Path = PAGE) -> None:
    page.write_text(page_with(Summary(results), page.read_text()))
