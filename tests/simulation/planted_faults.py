"""Faults put into the production code by hand, which the fault lab has to find.

Each is what somebody might write, and what a test of one part might not see.
"""

import msgspec
import numpy as np

from intellect3.inference import continuation, control, protocol, weight_sync
from intellect3.rl import outside
from intellect3.rollouts import accounting, scheduler, worker


def stale_is_kept(monkeypatch):
  """The scheduler batches what is too old."""
  monkeypatch.setattr(scheduler.Scheduler, "_drop_stale", lambda self, oldest: None)


def a_failure_is_a_zero(monkeypatch):
  """A worker tells of an attempt that failed as of one that was worth nothing."""
  summarize = worker._summarize

  def told(*arguments):
    summary = summarize(*arguments)
    if summary.error is None:
      return summary
    return msgspec.structs.replace(summary, error=None, reward=0.0)

  monkeypatch.setattr(worker, "_summarize", told)


def no_canary(monkeypatch):
  """A sync does not look at what the server scores."""
  sync = weight_sync.sync_server

  async def unchecked(*arguments, **options):
    return await sync(*arguments, **{**options, "bound": 1e9})

  monkeypatch.setattr(weight_sync, "sync_server", unchecked)


def a_segment_has_one_version(monkeypatch):
  """All tokens of a reply are stamped with the version of its last one."""
  expand = protocol.expand_versions

  def last_one(spans, length):
    versions = expand(spans, length)
    return np.full_like(versions, versions[-1]) if length else versions

  monkeypatch.setattr(protocol, "expand_versions", last_one)


def a_continuation_forgets(monkeypatch):
  """What goes on elsewhere begins at the prompt again."""
  ask = continuation.Progress.next_request

  def from_the_prompt(self, prompt, **options):
    return ask(self, prompt[: len(prompt) - len(self.tokens)], **options)

  monkeypatch.setattr(continuation.Progress, "next_request", from_the_prompt)


def dispatches_are_not_kept(monkeypatch):
  """The count of dispatches is lost with the orchestrator."""
  monkeypatch.setattr(outside.LogOnDisk, "dispatched", lambda self, total: None)


def a_resume_counts_what_ran(monkeypatch):
  """What was in flight when the orchestrator died stays in flight."""
  monkeypatch.setattr(accounting.Accounting, "cancel_lost", lambda self, dispatched: None)


def a_broken_sync_leaves_a_pause(monkeypatch):
  """A server is not told to go on where its weights could not be loaded."""
  resume = control.ServerControl.resume

  async def sometimes(self, *, urls=None):
    if any(url in self._paused for url in urls or ()):
      self._tries = getattr(self, "_tries", 0) + 1
      if self._tries % 3 == 0:
        return {url: control.Outcome(None, None, 0.0) for url in urls}
    return await resume(self, urls=urls)

  monkeypatch.setattr(control.ServerControl, "resume", sometimes)


PLANTED = (
  (stale_is_kept, "contract 2", 51),
  (a_failure_is_a_zero, "contract 4", 1),
  (no_canary, "contract 2", 37),
  (a_segment_has_one_version, "contract 2", 1),
  (a_continuation_forgets, "contract 2", 0),
  (dispatches_are_not_kept, "contract 3", 1),
  (a_resume_counts_what_ran, "contract 3", 1),
  (a_broken_sync_leaves_a_pause, "", 34),
)
"""The fault, what the lab says, and a seed that shows it."""
