"""The lock holds names and versions, and nothing of the machine that made it."""

from tools import lock


def report(*packages: tuple[str, str]) -> dict:
  return {
    "install": [
      {
        "metadata": {"name": name, "version": version},
        "download_info": {"url": f"file:///somewhere/{name}.whl"},
      }
      for name, version in packages
    ]
  }


def test_lines_are_sorted_normalised_and_without_the_project():
  packages = (("torch", "2.13.0+cpu"), ("Jinja2", "3.1.6"), ("array_record", "0.8.6"))
  assert lock.lines(report(*packages, ("intellect3", "0.1.0"))) == [
    "array-record==0.8.6",
    "jinja2==3.1.6",
    "torch==2.13.0",
  ]
