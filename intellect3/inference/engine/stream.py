"""The events of a `/generate` stream: all so far, or `--incremental-streaming-output` what is new.

An event tells of what came since the one before, often several tokens.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from intellect3.inference.engine import asgi
from intellect3.inference.engine.loop import Event
from intellect3.inference.engine.parse import Call
from intellect3.inference.engine.reply import Wording
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.sequence import Sequence as Generation
from intellect3.inference.engine.text import Unfolding


class Teller:
  """The text of one growing generation, and how much of it was told."""

  def __init__(self, wording: Wording, generation: Generation):
    request = generation.request
    self.told = 0
    self.text = ""
    self._wording, self._generation = wording, generation
    self._unfolding = None
    if wording.text is not None:
      self._unfolding = Unfolding(
        wording.text,
        skip_special_tokens=request.skip_special_tokens,
        stop_strings=request.stop_strings,
      )

  def advance(self, event: Event) -> str:
    """Goes on to an event's length; returns the further text."""
    if event.finished:
      text = self._wording.final_text(self._generation)
      further = text[len(self.text) :]
    elif self._unfolding is not None:
      further = self._unfolding.feed(self._generation.output_ids[self.told : event.length])
    else:
      further = ""
    self.text += further
    self.told = event.length
    return further


class GenerateStream:
  """Makes the events of one call."""

  def __init__(
    self, wording: Wording, call: Call, *, incremental: bool, version: Callable[[], str]
  ):
    """Makes one that has told nothing.

    Args:
      wording: of the served model.
      call: what was asked.
      incremental: whether an event tells only what is new.
      version: gives that of the weights that are served now.
    """
    self._wording, self._call, self._incremental = wording, call, incremental
    self._version = version
    self._namer = wording.namer(call.token_names)
    self._tellers: dict[int, Teller] = {}
    self._first_sent: dict[int, float] = {}

  def event(self, index: int, event: Event) -> bytes:
    """A generation's progress as a server-sent event; empty where it is too early for one."""
    generation = event.sequence
    teller = self._tellers.setdefault(index, Teller(self._wording, generation))
    if teller.told and not event.finished and event.length - teller.told < self._call.interval:
      return b""
    since = teller.told if self._incremental else 0
    further = teller.advance(event)
    meta = self._wording.meta_info(
      generation,
      finished=event.finished,
      version=self._version(),
      length=event.length,
      since=since,
      namer=self._namer,
    )
    first = index not in self._first_sent
    if first:
      self._first_sent[index] = time.time()
    if first or event.finished:
      meta["response_sent_to_client_ts"] = self._first_sent[index]
    told: dict[str, Any] = {
      "text": further if self._incremental else teller.text,
      "output_ids": generation.output_ids[since : event.length],
      "meta_info": meta,
    }
    if self._call.prompt_ids:
      told["prompt_token_ids"] = generation.request.input_ids
    if self._call.listed:
      told["index"] = index
    return asgi.event(told)

  def end(self, generations: Sequence[Generation]) -> bytes:
    """What comes before the end of the stream: nothing."""
    return b""


def refusal(error: RequestError) -> bytes:
  """A refused stream, as SGLang tells it: a status 200, one event, the end."""
  told = {"message": str(error), "type": "invalid_request_error", "code": error.status}
  return asgi.event({"error": told | {"retryable": False}}) + asgi.DONE
