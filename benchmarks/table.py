"""Print the tables of all results, and put them into docs/performance.md between its markers."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workloads

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/performance.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
OURS, MACHINE = "laplax_kfac", "machine"

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The results file of one question."""

    environment: dict[str, Any]
    versions: dict[str, str]
    records: list[Record]


def read(path: Path) -> Results:
    head, *records = (json.loads(line) for line in path.read_text().splitlines())
    return Results(head["environment"], head["versions"], records)


# -- numbers -----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, without exponents."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    digits = 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.01 else 5
    return f"{value:.{digits}f}"


def whole(record: Record, clock: str) -> float:
    """Seconds of the whole question, where a run did a part of it."""
    return float(record[clock] / record["fraction"])


def seconds(record: Record) -> str:
    """Processor time and wall time."""
    mark = "" if record["fraction"] == 1 else "≈ "
    return f"{mark}{number(whole(record, 'cpu'))} / {number(whole(record, 'wall'))}"


def compared(record: Record, ours: Record | None) -> str:
    """Seconds, and how many times ours in processor time."""
    text = seconds(record)
    if ours is None or "error" in ours or record is ours:
        return text
    return f"{text} ({number(whole(record, 'cpu') / whole(ours, 'cpu'))}x)"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


class Notes:
    """Footnotes for what a contender cannot do."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def __str__(self) -> str:
        return "\n".join(f"[{i}] `{text}`  " for i, text in enumerate(self.texts, 1))


def title(description: dict[str, Any]) -> str:
    """What a workload is, with its sizes."""
    workload = workloads.from_description(description)
    names = {"mlp": "MLP", "lenet": "LeNet", "conv8": "Eight convolutions"}
    name = names.get(workload.name, "Transformer encoder")
    if workload.name == "mlp":
        sizes = [workload.layers[0].inputs, *(layer.outputs for layer in workload.layers)]
        name += " " + "-".join(map(str, sizes))
    return (
        f"{name}: {workload.num_params:,} parameters, {workload.num_examples:,} examples, "
        f"batches of {workload.batch_size}"
        + (f"; a run has {workload.run_examples}" if workload.fraction < 1 else "")
    )


def distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def floor(record: Record, fisher_type: str, parts: Iterable[str] = ()) -> Record:
    """The time of the naive products at the rate that `machine` had in the same rounds."""
    workload = workloads.from_description(record["workload"])
    counts = workloads.operations(workload, workloads.columns(workload, fisher_type))
    total: float = sum(counts[part] for part in list(parts) or list(counts))
    repeats = total / workloads.RATE_OPERATIONS
    return {"cpu": repeats * record["cpu"], "wall": repeats * record["wall"], "fraction": 1.0}


# -- questions ---------------------------------------------------------------------------------


def by_variant(results: Results) -> str:
    """A table a workload: contenders by Fisher type, with the floor."""
    parts = []
    for workload in distinct(r["workload"] for r in results.records):
        records = [r for r in results.records if r["workload"] == workload]
        variants = distinct(r["variant"] for r in records)
        found = {(r["contender"], r["variant"]): r for r in records}
        notes, rows = Notes(), []
        for contender in distinct(r["contender"] for r in records):
            if contender == MACHINE:
                continue
            mine = [found[contender, v] for v in variants]
            good = [r for r in mine if "error" not in r]
            cells = [
                notes.mark(r["error"])
                if "error" in r
                else compared(r, found.get((OURS, r["variant"])))
                for r in mine
            ]
            first = [number(r["first_wall"]) for r in good if r["variant"] == variants[-1]]
            peak = [f"{max(r['peak_mb'] for r in good):,.0f} MB"] if good else []
            rows.append([contender, *cells, *(first or ["-"]), *(peak or ["-"])])
        if (MACHINE, variants[0]) in found:
            floors = [seconds(floor(found[MACHINE, v], v)) for v in variants]
            rows.append(["*naive floor*", *(f"*{f}*" for f in floors), "", ""])
        head = ["", *variants, f"first `{variants[-1]}`", "peak"]
        parts += [f"#### {title(workload)}", table(head, rows), str(notes)]
    return "\n\n".join(p for p in parts if p)


def by_workload(results: Results) -> str:
    """One table: contenders by workload."""
    names = distinct(r["workload"]["name"] for r in results.records)
    contenders = distinct(r["contender"] for r in results.records)
    notes, rows = Notes(), []
    for contender in contenders:
        row = [contender]
        for name in names:
            here = [r for r in results.records if r["workload"]["name"] == name]
            ours = next((r for r in here if r["contender"] == OURS), None)
            mine = [r for r in here if r["contender"] == contender]
            cells = [
                notes.mark(r["error"]) if "error" in r else compared(r, ours) + few(r) for r in mine
            ]
            good = [r for r in mine if "error" not in r]
            peak = f"{good[-1]['peak_mb']:,.0f} MB" if good else "-"
            row += ["<br>".join(cells) or "-", peak]
        rows.append(row)
    head = ["", *(h for name in names for h in (name, "peak"))]
    titles = distinct(title(r["workload"]) for r in results.records)
    about = "\n".join(f"- `{n}`: {t}" for n, t in zip(names, titles, strict=True))
    return "\n\n".join(p for p in (about, table(head, rows), str(notes)) if p)


def few(record: Record) -> str:
    if record["fraction"] == 1:
        return ""
    return f", from {record['few']} inputs"


def cold_and_warm(results: Results) -> str:
    """Contenders by workload: a first fit in a process, and a second one; wall time."""
    parts = []
    for workload in distinct(r["workload"] for r in results.records):
        notes, rows = Notes(), []
        for r in (r for r in results.records if r["workload"] == workload):
            if "error" in r:
                rows.append([r["contender"], notes.mark(r["error"]), "-", "-", "-"])
                continue
            first = f"{number(r['first_cpu'])} / {number(r['first_wall'])}"
            more = number(max(0.0, r["first_wall"] - r["wall"]))
            rows.append([r["contender"], first, seconds(r), more, f"{r['peak_mb']:,.0f} MB"])
        head = ["", "first fit", "second fit", "first only (wall)", "peak"]
        parts += [f"#### {title(workload)}", table(head, rows), str(notes)]
    return "\n\n".join(p for p in parts if p)


SIZE_OF: dict[str, Callable[[dict[str, Any]], int]] = {
    "examples": lambda w: int(w["examples"]),
    "width": lambda w: int(w["sizes"][1]),
    "depth": lambda w: len(w["sizes"]) - 1,
    "classes": lambda w: int(w["sizes"][-1]),
    "tokens": lambda w: int(w["tokens"]),
}


def growth(results: Results) -> str:
    """A table a sweep: sizes by Fisher type."""
    parts = []
    for sweep in distinct(r["sweep"] for r in results.records):
        records = [r for r in results.records if r["sweep"] == sweep]
        sizes = distinct(SIZE_OF[sweep](r["workload"]) for r in records)
        rows = []
        for variant in distinct(r["variant"] for r in records):
            found = {SIZE_OF[sweep](r["workload"]): r for r in records if r["variant"] == variant}
            time = [number(found[s]["cpu"]) if s in found else "-" for s in sizes]
            peak = [
                f"{found[s]['peak_mb'] - found[s]['prepared_mb']:,.0f}" if s in found else "-"
                for s in sizes
            ]
            rows += [[f"`{variant}`, s", *time], [f"`{variant}`, MB more", *peak]]
        parts.append(table([sweep, *map(str, sizes)], rows))
    return "\n\n".join(parts)


COUNTED = {
    "forward": ("forward",),
    "pullbacks": ("forward", "pullbacks"),
    "factors": ("forward", "pullbacks", "factors"),
    "eigendecompositions": (),
}
"""Parts of a pass, and what the floor of each counts."""


def breakdown(results: Results) -> str:
    """A table a workload: parts of a pass, each with its floor."""
    parts = []
    for workload in distinct(r["workload"] for r in results.records):
        here = [r for r in results.records if r["workload"] == workload and "error" not in r]
        machines = {r["variant"]: r for r in here if r["contender"] == MACHINE}
        rows = []
        for record in (r for r in here if r["contender"] == OURS):
            part, _, fisher_type = record["variant"].partition(" ")
            row = [part + (f", `{fisher_type}`" if fisher_type else ""), seconds(record), "", ""]
            if COUNTED[part]:
                least = floor(machines[record["variant"]], fisher_type, COUNTED[part])
                row[2:] = seconds(least), number(record["cpu"] / record["fraction"] / least["cpu"])
            rows.append(row)
        parts += [f"#### {title(workload)}", table(["", "time", "*floor*", "time / floor"], rows)]
    return "\n\n".join(parts)


SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "factors": ("The factor pass", by_variant),
    "ekfac": ("EKFAC", by_variant),
    "eigen": ("Eigendecompositions", by_workload),
    "evidence": ("Evidence and its gradient", by_workload),
    "predictive": ("Linearised predictive of 512 inputs", by_workload),
    "samples": ("30 weight samples", by_workload),
    "cold": ("A whole fit", cold_and_warm),
    "growth": ("Growth", growth),
    "breakdown": ("Where the time goes", breakdown),
}


def machine(results: Results) -> str:
    """What it was measured on."""
    e = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        f"{e['processor']}, {e['cores']} cores, {e['memory_gb']} GB, {e['system']}, "
        f"Python {e['python']}, {e['date']}; {versions}."
    )


def rate(results: Results) -> str:
    """Rate of matrix products over all rounds."""
    found = [r for r in results.records if r["contender"] == MACHINE and "error" not in r]
    if not found:
        return ""
    cpu, wall = (
        workloads.RATE_OPERATIONS / sorted(r[c] for r in found)[len(found) // 2] / 1e9
        for c in ("cpu", "wall")
    )
    return (
        f"Rate of float32 matrix products: {cpu:.0f} Gflop per processor-second, {wall:.0f} Gflop "
        "per second."
    )


def tables(folder: Path = HERE / "results") -> str:
    """All tables, as markdown: those of the CPU, then those of a GPU if there are any."""
    parts = []
    for suffix, where in (("", ""), ("-gpu", " (GPU)")):
        seen: list[str] = []
        for question, (heading, make) in SECTIONS.items():
            path = folder / f"{question}{suffix}.jsonl"
            if not path.exists():
                continue
            results = read(path)
            parts.append(f"### {heading}{where}")
            about = [text for text in (machine(results), rate(results)) if text]
            parts += [text for text in about if text not in seen]
            seen += about
            parts.append(make(results))
    return "\n\n".join(parts)


def page_with(text: str, page: str) -> str:
    """The page with other tables between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    made = tables()
    print(made)
    PAGE.write_text(page_with(made, PAGE.read_text()))
