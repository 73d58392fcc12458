"""What must hold after each event of a history, whatever came before: read from the second book.

Beside what the ledger and the doubles refuse as it passes by: no wake-up is lost, a run that can go
on does, one that cannot ends with its reason.
"""

from tests.simulation.history_tasks import expect
from tests.simulation.history_workers import is_written

PATIENCE = 100.0  # how long a run waits where there is no server, or no worker
START = 50.0  # how long servers may take to answer at the start


def exhausted(world):
  """Whether the run ended because no task is left."""
  no_tasks = "NoTasksLeft" in str(world.task.exception())
  return no_tasks and world.ledger.now.tasks.exhausted()


def _due(world):
  """Why the run must be over now, or None."""
  if world.excuse is not None:
    return world.excuse
  now = world.loop.time()
  late = [what for what, since in world.none_since.items() if since + PATIENCE <= now]
  return f"no {late[0]} is left, for" if late else None


def check(world):
  """Raises Broken where what is now is not as it must be after an event."""
  due, ledger, counts = _due(world), world.ledger, world.counts()
  if world.over:
    _check_end(world, due, world.task.exception())
    return
  expect(due is None, f"the run goes on, due was its end: {due}")
  if counts:
    version = world.machine._scheduler.version
    expect(version == ledger.version, f"the version is {version}, due {ledger.version}")
  _check_servers(world)
  if not counts or world.phase not in ("training", "evaluating", "done"):
    return
  collects = ledger.now.next_step <= world.config.steps
  if collects:
    ledger.check_accounting(counts)
    expect(counts["dispatched"] == world.total, f"{world.total} were noted, {counts} dispatched")
    _check_workers(world)
  if world.phase == "training" and world.links and world.told:
    expect(not ledger.may_dispatch(), "a group may be dispatched, and is not")
  if world.phase == "training" and world.links and not world.syncing and not _writing(world):
    ready = ledger.batchable() if collects else []
    expect(len(ready) < world.config.prompts, f"groups {ready} could be batched, and are not")


def _check_end(world, due, error):
  if error is None:
    steps, exams = world.config.steps, world.ledger.exams
    expect(world.ledger.now.next_step > steps, "the run ends before its last step")
    expect(world.counts()["in_flight"] == 0, f"the run ends with {world.counts()}")
    evaluated = [*exams.due, steps] if world.config.evaluation else []
    expect(exams.told == evaluated, f"{exams.told} are evaluated, due {evaluated}")
    return
  said = str(error)
  late = "no server after" in said and world.loop.time() - world.since > START - 1e-6
  known = (due is not None and due in said) or late or exhausted(world)
  cause = "nothing called for it" if due is None else f"due was {due!r}"
  expect(known, f"the run ends, {cause}: {type(error).__name__}: {said}")


def _writing(world):
  if world.landing is not None:
    return True
  attempt = world.planned[0] if world.planned else None
  for link in world.links.values():
    said = [*link.writes, *filter(is_written, link.unheard)]
    if any(message.attempt == attempt for message in said) or link.failed:
      return True
  return False


def _check_servers(world):
  idle = [double for double in world.doubles.values() if double.up and not double.calls]
  for double in idle:
    # One that could not go on, or was given up while it was to, is brought the weights anew.
    told = double.ended[:1] in ((), ("resume",)) or double.barred == "lost"
    expect(not double.paused or told, f"{double.url} is left paused")
  usable = [d for d in idle if d.listed and not d.barred and d.good is not None]
  newest = max([double.good for double in usable], default=-1)
  told = world.told or {}
  if newest >= max(told.values(), default=-1):
    missed = [d.url for d in usable if d.good == newest and d.url not in told]
    expect(not missed, f"{missed} may be used, and nobody is told")


def _check_workers(world):
  fates = {key: attempt.fate for key, attempt in world.ledger.attempts.items()}
  for name, link in world.links.items():
    held = {key for key in link.held - link.runs if fates[key] != "trained" or not world.landing}
    due = {key for key in held if fates[key] == "finished"}
    expect(held == due, f"{name} holds {held - due}, which nobody needs any more")
    told = world.machine._holdings.load[name]
    runs = len(link.runs)
    expect(told == runs, f"{name} runs {runs}, the orchestrator thinks {told}")
