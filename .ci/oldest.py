"""Print the oldest versions that pyproject.toml allows, as requirements for pip.

    python .ci/oldest.py test examples

These are the lower bounds of the dependencies, and of the extras that are named.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]


def bounds(requirements: list[str]) -> list[str]:
    """The lower bounds of requirements; of one that names extras of this project, theirs."""
    found = []
    for requirement in requirements:
        own = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
        if own:
            for extra in own[1].split(","):
                found += bounds(project["optional-dependencies"][extra])
        else:
            name, at_least, version = requirement.partition(">=")
            assert at_least, f"{requirement} has no lower bound"
            found.append(f"{name}=={version}")
    return found


own = f"{project['name']}[{','.join(sys.argv[1:])}]"
print("\n".join(sorted({*bounds([*project["dependencies"], own])})))
