"""Claims of papers, each as comparisons of two methods on all tasks that have both."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from study import classification, regression, selection
from study.tables import JUDGES, Summary, error, markdown, ranked

CLASSES = tuple(task.name for task in classification.TASKS)
TABLES = tuple(task.name for task in regression.TASKS)
TITLES = {task.name: task.title for task in classification.TASKS}
TITLES |= {task.name: task.title for task in regression.TASKS}
LARGER_IS_BETTER = {"accuracy", "auroc"}
NAMES = {"nll": "NLL", "ece": "ECE", "auroc": "OOD AUROC", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Claim:
    """That one method is better than another, or no worse.

    Attributes:
        text: The claim.
        source: Who says so.
        first: The method that is said to be better.
        second: The other one.
        metric: In what.
        tasks: Where both were tried.
        no_worse: Whether a difference within one standard error is enough.
    """

    text: str
    source: str
    first: str
    second: str
    metric: str
    tasks: tuple[str, ...] = CLASSES
    no_worse: bool = False


REDUX, IMMER = "Daxberger et al.", "Immer et al."
CLAIMS = [
    Claim("Laplace on the last layer predicts better than MAP, its prior chosen by the evidence",
          REDUX, "last_kfac/evidence", "map", "nll"),
    Claim("… its prior chosen on validation data", REDUX, "last_kfac/validation", "map", "nll"),
    Claim("KFAC on all layers predicts better than MAP, its prior chosen by the evidence",
          REDUX, "kfac/evidence", "map", "nll"),
    Claim("… on validation data", REDUX, "kfac/validation", "map", "nll"),
    Claim("… of regressions, by the evidence", REDUX, "kfac/evidence", "map", "nll", TABLES),
    Claim("… and is better calibrated (validation)", REDUX, "kfac/validation", "map", "ece"),
    Claim("Laplace on the last layer detects strange inputs better than MAP (evidence)",
          REDUX, "last_kfac/evidence", "map", "auroc"),
    Claim("KFAC on all layers does (evidence)", REDUX, "kfac/evidence", "map", "auroc"),
    Claim("… and with a validated prior", REDUX, "kfac/validation", "map", "auroc"),
    Claim("KFAC detects strange inputs no worse than an ensemble of five (evidence)",
          REDUX, "kfac/evidence", "ensemble", "auroc", no_worse=True),
    Claim("KFAC predicts no worse than an ensemble of five (validation)",
          REDUX, "kfac/validation", "ensemble", "nll", no_worse=True),
    Claim("KFAC predicts no worse than temperature scaling (validation)",
          "this study", "kfac/validation", "temperature", "nll", no_worse=True),
    Claim("The last layer is as good as all layers (validation, NLL)",
          REDUX, "last_full/validation", "kfac/validation", "nll", no_worse=True),
    Claim("… at strange inputs (evidence)",
          REDUX, "last_full/evidence", "kfac/evidence", "auroc", no_worse=True),
    Claim("KFAC predicts better than a diagonal (evidence)",
          REDUX, "kfac/evidence", "diagonal/evidence", "nll", CLASSES + TABLES),
    Claim("… no worse (validation)",
          REDUX, "kfac/validation", "diagonal/validation", "nll", CLASSES + TABLES, True),
    Claim("KFAC predicts no worse than the full GGN (evidence)",
          REDUX, "kfac/evidence", "full/evidence", "nll", CLASSES + TABLES, True),
    Claim("The evidence chooses a prior that predicts no worse than one chosen on validation data",
          REDUX, "kfac/evidence", "kfac/validation", "nll", CLASSES + TABLES, True),
    Claim("One prior precision a layer predicts better than one for all (evidence)",
          IMMER, "kfac/layers", "kfac/evidence", "nll", CLASSES + TABLES),
    Claim("Training by the evidence predicts better than MAP", IMMER, "marglik", "map", "nll",
          CLASSES + TABLES),
    Claim("… is more accurate, or no less", IMMER, "marglik", "map", "accuracy", no_worse=True),
    Claim("EKFAC predicts better than KFAC (evidence)", "George et al.", "ekfac/evidence",
          "kfac/evidence", "nll", CLASSES + TABLES),
    Claim("`mc` with one sample is no worse than `type2` (evidence)", "this study",
          "kfac_mc/evidence", "kfac/evidence", "nll", CLASSES + TABLES, True),
    Claim("`empirical` is no worse than `type2` (evidence)", "this study",
          "kfac_empirical/evidence", "kfac/evidence", "nll", CLASSES + TABLES, True),
    Claim("`reduce` is no worse than `expand` for convolutions (evidence)", "Eschenhagen et al.",
          "kfac_reduce/evidence", "kfac/evidence", "nll", no_worse=True),
    Claim("… on validation data", "Eschenhagen et al.",
          "kfac_reduce/validation", "kfac/validation", "nll", no_worse=True),
]  # fmt: skip


def gain(summary: Summary, task: str, methods: tuple[str, str], metric: str) -> tuple[float, float]:
    """By how much the first is better, and the standard error: the same seeds for both."""
    first, second = (summary.values(task, method, metric) for method in methods)
    difference = first - second if metric in LARGER_IS_BETTER else second - first
    return float(np.mean(difference)), error(difference)


def verdict(outcomes: Iterable[bool]) -> str:
    outcomes = list(outcomes)
    if all(outcomes):
        return "holds"
    return "depends" if any(outcomes) else "does not"


def claims_table(summary: Summary) -> str:
    """A row a claim: the verdict, and where it held by how much."""
    rows = []
    for claim in CLAIMS:
        outcomes, numbers = [], []
        for task in claim.tasks:
            if not summary.has(task, claim.first, claim.second):
                continue
            mean, deviation = gain(summary, task, (claim.first, claim.second), claim.metric)
            least = -deviation if claim.no_worse else deviation
            outcomes.append(mean > least or (claim.no_worse and mean == least))
            averages = (
                np.mean(summary.values(task, m, claim.metric)) for m in (claim.first, claim.second)
            )
            mark = "" if outcomes[-1] else " ✗"
            numbers.append(f"{TITLES[task]} {' / '.join(f'{a:.3f}' for a in averages)}{mark}")
        if outcomes:
            share = f"{sum(outcomes)} of {len(outcomes)}"
            rows.append([
                claim.text, claim.source, f"**{verdict(outcomes)}** ({share})",
                f"{NAMES[claim.metric]}: " + "; ".join(numbers),
            ])  # fmt: skip
    rows += evidence_rows(summary)
    table = markdown(["claim", "of", "verdict", "numbers: the first / the second"], rows)
    return table.replace("| --- | --: | --: | --: |", "| --- | --- | --- | --- |")


def evidence_rows(summary: Summary) -> list[list[str]]:
    """That the evidence ranks architectures, by rank correlation: at least 0.8."""
    names = [selection.architecture(hidden) for hidden in selection.HIDDEN]
    tasks = [task for task in selection.TASKS if summary.has(task.name, *names)]
    rows = []
    for title in ("evidence, KFAC", "evidence, full GGN"):
        means = [float(np.mean(ranked(summary, task.name, JUDGES[title])[0])) for task in tasks]
        outcomes = [mean >= 0.8 for mean in means]
        if outcomes:
            numbers = "; ".join(
                f"{task.title} {mean:.2f}{'' if good else ' ✗'}"
                for task, mean, good in zip(tasks, means, outcomes, strict=True)
            )
            rows.append([
                f"The {title}, ranks architectures as held-out data do (correlation 0.8)", IMMER,
                f"**{verdict(outcomes)}** ({sum(outcomes)} of {len(outcomes)})", numbers,
            ])  # fmt: skip
    return rows


# -- what the page recommends ------------------------------------------------------------------

RECOMMENDED = {
    "nll": {**dict.fromkeys(CLASSES, "kfac/validation"), **dict.fromkeys(TABLES, "marglik")},
    "auroc": dict.fromkeys(CLASSES, "kfac/evidence"),
}


def one_network(task: str) -> list[str]:
    """Names of the methods of a task that need one network."""
    for kind in (classification, regression):
        for candidate in kind.TASKS:
            if candidate.name == task:
                return [name for name, _ in kind.methods_of(candidate) if name != "ensemble"]
    return []


def recommended_table(summary: Summary) -> str:
    """Whether the recommended method is the best of one network, or within a standard error."""
    rows = []
    for metric, by_task in RECOMMENDED.items():
        for task, method in by_task.items():
            names = [name for name in one_network(task) if summary.has(task, name)]
            if method not in names:
                continue
            sign = 1 if metric in LARGER_IS_BETTER else -1
            means = {name: float(np.mean(summary.values(task, name, metric))) for name in names}
            best = max(names, key=lambda name: sign * means[name])
            lost, deviation = gain(summary, task, (best, method), metric)
            answer = "best" if best == method else "within" if lost <= deviation else "**no**"
            rows.append([
                TITLES[task], NAMES[metric], f"`{method}` {means[method]:.3f}",
                f"`{best}` {means[best]:.3f}", f"{lost:.3f} ± {deviation:.3f}", answer,
            ])  # fmt: skip
    head = ["task", "in", "recommended", "best of one network", "lost", "within one error"]
    return markdown(head, rows)
