"""The study: does it help, and which recipe? ``python -m study`` runs what is not done yet.

A cell is one method on one task with one seed; its numbers are one line of ``results.jsonl``, from
which ``tables.py`` writes the page docs/study.md and its figure.

- ``data.py``: data that packages ship, split anew for every seed, and what is not of them (OOD);
- ``networks.py``, ``training.py``: networks, and training all of a task in one compiled program;
- ``approximations.py``: a curvature and how its prior is chosen, as one record a method;
- ``metrics.py``: scores of predictions;
- ``classification.py``, ``regression.py``, ``selection.py``, ``continual.py``: the cells of a kind;
- ``results.py``, ``tables.py``: what is kept, and what is shown.
"""
