"""What could make two runs of one seed differ: clocks, threads, unseeded chance, orders of sets.

The packages that run under the virtual clock are read, not run. What is found and is no fault is
listed with its reason; an entry that is not found any more is a fault too.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2] / "intellect3"

FILES = (
  "rollouts/*.py",
  "inference/*.py",
  "simulation/**/*.py",
  "rl/serving.py",
  "rl/servers.py",
  "rl/conducting.py",
  "rl/outside.py",
)

CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "time_ns", "monotonic_ns", "sleep")
CHANCE = ("secrets", "uuid", "os.urandom", "random", "numpy.random")
SEEDED = ("random.Random", "numpy.random.default_rng")  # with an argument

ALLOWED = {
  (
    "inference/pickle_subset.py",
    "order id()",
  ): "of identity, not of order: what was written before",
  ("inference/tensor_wire.py", "order id()"): "the same",
  ("rollouts/worker.py", "thread asyncio.to_thread"): (
    "the production shard writer; the virtual loop runs it at once, in the loop's own thread"
  ),
  ("inference/tensor_sync.py", "thread asyncio.to_thread"): "the same, of buckets of tensors",
  ("rl/serving.py", "thread asyncio.to_thread"): "the same, of reading a manifest",
  ("rollouts/journal.py", "thread asyncio.to_thread"): "the same, of the journal; a port",
  ("rollouts/holdings.py", "order of summary.servers"): "a list, of the name of a set beside it",
  ("rl/outside.py", "thread asyncio.to_thread"): "the production disk, a port of the lab's",
  ("rl/outside.py", "chance secrets.token_hex"): (
    "the production nonce of a canary's cache key, a port; the lab's comes from its seed"
  ),
  ("inference/weight_sync.py", "chance secrets.token_hex"): "the same, where no nonce is given",
  ("simulation/attempts.py", "chance random.Random"): "seeded anew for each attempt",
}


def dotted(node):
  """`a.b.c` of an attribute or a name, else the empty string."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute):
    base = dotted(node.value)
    return f"{base}.{node.attr}" if base else ""
  return ""


def is_set(node, known):
  """Whether an expression is a set, as far as its text tells."""
  if isinstance(node, ast.Set | ast.SetComp):
    return True
  if isinstance(node, ast.Call) and dotted(node.func) in ("set", "frozenset"):
    return True
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Sub):
    return is_set(node.left, known) or is_set(node.right, known)
  return dotted(node).rpartition(".")[2] in known


def set_names(tree):
  """Names and attributes that are declared or made as sets, and are not sets of integers.

  The order of a set of small integers does not depend on the process.
  """
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("set["):
      if ast.unparse(node.annotation) != "set[int]":
        names.add(dotted(node.target).rpartition(".")[2])
    elif isinstance(node, ast.Assign) and is_set(node.value, ()):
      names |= {dotted(target).rpartition(".")[2] for target in node.targets}
  return names - {""}


def iterated(node):
  """What a node goes through in order."""
  if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
    return [node.iter]
  if isinstance(node, ast.Starred):
    return [node.value]
  if isinstance(node, ast.Call) and dotted(node.func) in ("list", "tuple", "iter", "enumerate"):
    return node.args[:1]
  return []


def aliases(tree):
  """Local name -> full name of what is imported."""
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.asname or alias.name: alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
  return names


def sources(text):
  """What a module uses that could differ between two runs of one seed."""
  tree = ast.parse(text)
  imported, sets, found = aliases(tree), set_names(tree), set()

  def full(node):
    first, _, rest = dotted(node).partition(".")
    return f"{imported[first]}.{rest}".rstrip(".") if first in imported else ""

  ordered = {
    id(generator)
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and dotted(node.func)
    in ("sorted", "set", "frozenset", "sum", "any", "all", "min", "max", "len")
    for argument in node.args
    if isinstance(argument, ast.GeneratorExp)
    for generator in argument.generators
  }
  ordered |= {
    id(generator)
    for node in ast.walk(tree)
    if isinstance(node, ast.SetComp)
    for generator in node.generators
  }
  for node in ast.walk(tree):
    name = full(node) if isinstance(node, ast.Attribute | ast.Name) else ""
    if name in {f"time.{clock}" for clock in CLOCKS} or name.endswith(("datetime.now", ".utcnow")):
      found.add(f"clock {name}")
    if name.startswith(("threading.", "concurrent.", "multiprocessing.")) or name in (
      "asyncio.to_thread",
      "asyncio.run_coroutine_threadsafe",
    ):
      found.add(f"thread {name}")
    if isinstance(node, ast.Call):
      called = full(node.func)
      by_chance = called.startswith(tuple(f"{module}." for module in CHANCE)) or called in CHANCE
      if by_chance and not (called in SEEDED and (node.args or node.keywords)):
        found.add(f"chance {called}")
      if dotted(node.func).endswith("run_in_executor"):
        found.add("thread run_in_executor")
      if dotted(node.func) in ("hash", "id"):
        found.add(f"order {dotted(node.func)}()")
    for value in iterated(node) if id(node) not in ordered else []:
      if is_set(value, sets):
        found.add(f"order of {ast.unparse(value)}")
  return found


def test_nothing_but_the_seed_decides():
  found = {}
  for pattern in FILES:
    for path in sorted(ROOT.glob(pattern)):
      name = path.relative_to(ROOT).as_posix()
      for what in sources(path.read_text(encoding="utf-8")):
        found[name, what] = path
  unexplained = sorted(found.keys() - ALLOWED.keys())
  assert not unexplained, unexplained
  outdated = sorted(ALLOWED.keys() - found.keys())
  assert not outdated, outdated


@pytest.mark.parametrize(
  ("text", "what"),
  [
    ("import time\nnow = time.monotonic()", "clock time.monotonic"),
    ("from time import perf_counter as clock\nclock()", "clock time.perf_counter"),
    ("import datetime\ndatetime.datetime.now()", "clock datetime.datetime.now"),
    ("import random\nrandom.shuffle(x)", "chance random.shuffle"),
    ("import random\nrng = random.Random()", "chance random.Random"),
    ("import numpy as np\nnp.random.rand(3)", "chance numpy.random.rand"),
    ("import numpy as np\nnp.random.default_rng()", "chance numpy.random.default_rng"),
    ("import asyncio\nasyncio.to_thread(f)", "thread asyncio.to_thread"),
    ("import threading\nthreading.Thread(target=f)", "thread threading.Thread"),
    ("for x in set(names): go(x)", "order of set(names)"),
    ("self._tasks: set[str] = set()\nfor t in self._tasks: t.cancel()", "order of self._tasks"),
    ("gather(*{a, b})", "order of {a, b}"),
    ("x = list({a for a in b} | c)", "order of {a for a in b} | c"),
    ("key = hash(name)", "order hash()"),
  ],
)
def test_what_is_looked_for_is_found(text, what):
  assert what in sources(text)


@pytest.mark.parametrize(
  "text",
  [
    "import random\nrng = random.Random(seed)",
    "import numpy as np\nrng = np.random.default_rng(seed)",
    "import asyncio\nnow = asyncio.get_running_loop().time()",
    "names = sorted(set(names))",
    "count = sum(x > 0 for x in set(values))",
    "open: set[int] = set()\nids = sorted(open)\nfor x in open: go(x)",
  ],
)
def test_what_is_harmless_is_not(text):
  assert sources(text) == set()
