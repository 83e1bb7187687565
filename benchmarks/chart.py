"""Draw the headline of docs/performance.md: processor time of every contender over ours."""

from pathlib import Path

import matplotlib as mpl
from table import HERE, OURS, PAGE, Record, distinct, number, read, whole

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

PICTURE = PAGE.parent / "assets/performance.png"
PANELS = {
    "factors": ("Factor pass, exact GGN", "type2"),
    "ekfac": ("EKFAC", "type2"),
    "predictive": ("Linearised predictive", None),
}
"""Question -> its title, and the variant that is drawn."""


def multiples(records: list[Record], variant: str | None) -> dict[str, dict[str, float]]:
    """Workload -> contender -> its processor time over ours; those that failed are left out."""
    found: dict[str, dict[str, float]] = {}
    for name in distinct(r["workload"]["name"] for r in records):
        here = [
            r
            for r in records
            if r["workload"]["name"] == name
            and variant in (None, r["variant"])
            and "error" not in r
            and r["contender"] != "machine"
        ]
        ours = next((whole(r, "cpu") for r in here if r["contender"] == OURS), None)
        if ours is not None:
            found[name] = {r["contender"]: whole(r, "cpu") / ours for r in here}
    return found


def draw(path: Path = PICTURE) -> None:
    """Draw a panel a question: a group of bars a network, a bar a contender."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.5), constrained_layout=True)
    found = {
        question: multiples(read(HERE / f"results/{question}.jsonl").records, variant)
        for question, (_, variant) in PANELS.items()
    }
    contenders = distinct(c for panel in found.values() for times in panel.values() for c in times)
    others = [c for c in contenders if c != OURS]
    colors = {OURS: "black"} | {c: f"C{k % 10}" for k, c in enumerate(others)}
    labelled = set()
    for ax, (question, (title, _)) in zip(axes, PANELS.items(), strict=True):
        places, names, at = [], [], 0.0
        for name, times in found[question].items():
            start = at
            for contender, multiple in sorted(times.items(), key=lambda pair: pair[1]):
                label = None if contender in labelled else contender
                labelled.add(contender)
                # On a logarithmic axis a bar's length says something only from 1 on.
                ax.barh(at, multiple - 1, left=1, color=colors[contender], label=label)
                ax.text(multiple, at, f" {number(multiple)}", va="center", fontsize=7)
                at += 1
            places.append((start + at - 1) / 2)
            names.append(name)
            at += 1
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(title=title, xscale="log", xlabel="processor time over laplax_kfac's")
        ax.set_yticks(places, names)
        most = max(max(times.values()) for times in found[question].values())
        ax.set_xlim(0.9, 1.4 * most**1.1)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 else (1,)))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw()
