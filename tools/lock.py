"""Turns pip's resolution report into a lock: `python tools/lock.py REPORT > requirements.lock`.

`make lock` runs it. Standard library only, since it runs before any environment exists. The lock
holds names and exact versions, never where a package was found, so it serves on any machine; the
local part of a version (`+cpu`) names one machine's build and is left out.
"""

import json
import re
import sys

HEADER = """\
# Exact versions of the default and dev dependencies (Linux, Python {python}).
# Written by `make lock` from pyproject.toml; do not edit. `make .venv` installs it.
"""


def lines(report: dict) -> list[str]:
  """Returns `name==version` of every package of the report but the project itself, sorted."""
  pins = {}
  for item in report["install"]:
    metadata = item["metadata"]
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    if name != "intellect3":
      pins[name] = metadata["version"].partition("+")[0]
  return [f"{name}=={version}" for name, version in sorted(pins.items())]


def main() -> None:
  with open(sys.argv[1], encoding="utf-8") as file:
    report = json.load(file)
  python = report["environment"]["python_version"]
  print(HEADER.format(python=python) + "\n".join(lines(report)))


if __name__ == "__main__":
  main()
