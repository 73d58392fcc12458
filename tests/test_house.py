"""The rules of the house that a machine can check: imports, file lengths, no machine paths."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The levels of docs/design/0001-the-ring.md. A package imports itself and lower levels; only the
# composition roots (the last level) also import each other.
LEVELS = (
  ("types", "losses", "sharding", "kernels", "telemetry", "compilation_cache", "distributed"),
  ("models", "rendering", "environments", "rollout_log"),
  ("inference", "rollouts", "pipeline", "training", "weights"),
  (
    "rl",
    "sft",
    "lab",
    "evaluate",
    "planning",
    "simulation",
    "supervisor",
    "leash",
    "console",
    "summary",
  ),
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}

# What the roles without jax load, package by package; what is named must exist.
JAX_FREE = (
  "intellect3.types",
  "intellect3.telemetry",
  "intellect3.rollout_log",
  "intellect3.losses.advantages",
  "intellect3.rendering",
  "intellect3.environments",
  "intellect3.inference",
  "intellect3.rollouts",
  "intellect3.weights.manifest",
  "intellect3.distributed.cluster",
  "intellect3.rl",
  "intellect3.rl.orchestrator",
  "intellect3.rl.worker",
  "intellect3.supervisor",
  "intellect3.leash",
  "intellect3.console",
  "intellect3.summary",
  "experiments.rl_run",
)
WHOLE_PACKAGES = ("rendering", "environments", "inference", "rollouts")
WITH_JAX = "intellect3.inference.engine"

MAX_LINES = 400
MACHINE_PATH = re.compile(r"(?<![\w.:/*-])/(?:work|root|home|opt|tmp)\b")


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(package: str) -> list[str]:
  """The package's modules by full name; one that is a single file has one."""
  base = ROOT / "intellect3" / package
  files = [base.with_suffix(".py"), *sorted(base.rglob("*.py"))]
  return [module_name(path) for path in files if path.is_file() and path.name != "__main__.py"]


def house_files() -> list[pathlib.Path]:
  """Every file that is tracked, or would be if it were added."""
  command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
  return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def run_python(code: str, *arguments: str) -> str:
  result = subprocess.run(
    [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


def imported_modules(path: pathlib.Path) -> list[str]:
  """Absolute names that a file imports anywhere, at the top or inside functions."""
  package = module_name(path).split(".")
  if path.name != "__init__.py":
    package = package[:-1]
  names = []
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else []
      base = ".".join([*above, *([node.module] if node.module else [])])
      names += [f"{base}.{alias.name}" for alias in node.names]
  return names


def import_fault(importer: str, imported: str) -> str | None:
  """Why module `importer` may not import `imported`, or None where it may."""
  if imported.split(".")[0] == "gin":
    return "the library never imports gin"
  if imported.split(".")[0] in ("experiments", "tests", "tools"):
    return "the library never imports its users"
  if not imported.startswith("intellect3."):
    return None
  own, other = importer.split(".")[1], imported.split(".")[1]
  if own == other or other.startswith("__"):
    return None
  for package in (own, other):
    if package not in LEVEL_OF:
      return f"{package} has no level in tests/test_house.py"
  last = len(LEVELS) - 1
  if LEVEL_OF[other] < LEVEL_OF[own] or LEVEL_OF[own] == last:
    return None
  return f"level {LEVEL_OF[own]} must not import level {LEVEL_OF[other]}"


@pytest.mark.parametrize("package", LEVELS[0])
def test_importable_alone(package):
  own = f"intellect3.{package}"
  modules = modules_of(package)
  assert modules, f"{own} does not exist"
  code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
  ours = {name for name in run_python(code).split() if name.split(".")[0] == "intellect3"}
  assert ours == {"intellect3", *modules}


def test_types_advantages_and_telemetry_do_not_load_jax():
  names = "intellect3.types, intellect3.losses.advantages, intellect3.telemetry"
  code = f"import sys, {names}; print(*sys.modules)"
  assert "jax" not in run_python(code).split()


def test_roles_without_jax_import_without_it():
  names = list(JAX_FREE)
  for package in WHOLE_PACKAGES:
    names += [name for name in modules_of(package) if not f"{name}.".startswith(f"{WITH_JAX}.")]
  code = """
import importlib, sys, traceback
for blocked in ("jax", "jaxlib", "flax", "optax", "orbax", "grain"):
  sys.modules[blocked] = None
for name in sys.argv[1:]:
  try:
    importlib.import_module(name)
  except Exception as error:
    where = traceback.extract_tb(error.__traceback__)[-1]
    print(f"{name}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")
"""
  faults = run_python(code, *names)
  assert not faults, faults


def test_imports_follow_the_levels():
  faults = []
  for path in sorted((ROOT / "intellect3").rglob("*.py")):
    importer = module_name(path)
    if importer == "intellect3":
      importer = "intellect3.__init__"
    for imported in imported_modules(path):
      fault = import_fault(importer, imported)
      if fault:
        faults.append(f"{path.relative_to(ROOT)} imports {imported}: {fault}")
  assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
  ("importer", "imported", "allowed"),
  [
    ("intellect3.rollouts.worker", "intellect3.types.Task", True),
    ("intellect3.rollouts.worker", "intellect3.rollouts.messages", True),
    ("intellect3.rollouts.worker", "intellect3.inference.client", False),
    ("intellect3.rendering.bytes", "intellect3.environments.base", False),
    ("intellect3.losses.kl", "intellect3.types", False),
    ("intellect3.models.moe", "intellect3.training.state", False),
    ("intellect3.rl.trainer", "intellect3.training.step", True),
    ("intellect3.rl.trainer", "intellect3.sft", True),
    ("intellect3.rl.trainer", "gin", False),
    ("intellect3.novelty", "intellect3.types", False),
  ],
)
def test_the_import_rule_itself(importer, imported, allowed):
  assert (import_fault(importer, imported) is None) == allowed


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
  path = tmp_path / "intellect3" / "rollouts" / "worker.py"
  path.parent.mkdir(parents=True)
  path.write_text("from ..inference import client\nfrom .messages import Dispatch\nimport gin\n")
  assert imported_modules(path) == [
    "intellect3.inference.client",
    "intellect3.rollouts.messages.Dispatch",
    "gin",
  ]


def test_files_stay_short():
  lengths = {
    str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
    for path in house_files()
    if path.suffix == ".py"
  }
  assert lengths
  assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_no_machine_paths():
  assert MACHINE_PATH.search("open('" + "/".join(("", "work", "x")) + "')")
  assert not MACHINE_PATH.search("see https://example.org/home/page and ../shared/work/x")
  faults = []
  for path in house_files():
    data = path.read_bytes()
    if b"\0" in data:
      continue
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
      if MACHINE_PATH.search(line):
        faults.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
  assert not faults, "\n".join(faults)
