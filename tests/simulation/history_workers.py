"""Workers that do what they are told, and say what they are told to say: none runs anything."""

from intellect3.rollouts import messages
from tests.simulation.history_tasks import expect


def is_written(message):
  return isinstance(message, messages.BatchWritten)


class WorkerDouble:
  """A connected worker: what it runs, holds, has yet to write and has said but was not heard."""

  def __init__(self, name, world):
    self.name = name
    self._world = world
    self.running, self.held, self.exams = set(), set(), set()
    self.writes, self.unheard, self._cancelled = [], [], set()

  @property
  def failed(self):
    """Whether it could not write."""
    return any(isinstance(message, messages.WorkerFailed) for message in self.unheard)

  @property
  def runs(self):
    """What the orchestrator must believe that it runs."""
    unheard = [message for message in self.unheard if isinstance(message, messages.RolloutSummary)]
    attempts = self._world.ledger.attempts
    train = {message.rollout_id for message in unheard if message.purpose == "train"}
    exams = {message.rollout_id for message in unheard if message.purpose == "eval"}
    said = {key for key in train - self._cancelled if attempts[key].fate == "running"}
    return self.running | self.exams | said | exams

  def post(self, message):
    match message:
      case messages.Dispatch(rollout_id=key):
        self._world.tell_of(f" group {message.group_id}: ", f"{key} on {self.name}")
        load = {name: len(link.runs) for name, link in self._world.links.items()}
        expect(
          load[self.name] == min(load.values()), f"{self.name} gets {key}, but loads are {load}"
        )
        if message.purpose == "eval":
          self.exams.add(key)
          self._world.ledger.exams.started(message, self.name)
        else:
          self.running.add(key)
          self._world.ledger.started(message, self.name)
      case messages.Cancel(rollout_ids=keys):
        self.running -= set(keys)
        self.held -= set(keys)
        self._cancelled |= set(keys)
        self._world.tell(f" {self.name} is to cancel {list(keys)}")
      case messages.Forget(rollout_ids=keys):
        self._world.tell(f" {self.name} is to forget {list(keys)}")
        expect(self.held >= set(keys), f"{self.name} holds {self.held}, is to forget {keys}")
        self.held -= set(keys)
        self._world.ledger.forgotten(keys)
      case messages.WriteBatch():
        keys = [item.rollout_id for item in message.items]
        self._world.tell(f" {self.name} is to write {keys} of batch {message.step}")
        expect(self.held >= set(keys), f"{self.name} holds {self.held}, is to write {keys}")
        expect(not self._world.syncing, "a batch is planned while weights are synced")
        self.writes.append(message)
        self._world.asked(self.name, message)
      case messages.Servers(versions=versions):
        due = self._world.told
        expect(dict(versions) == due, f"{self.name} is told of {versions}, due {due}")
