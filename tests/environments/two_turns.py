"""An environment of two turns, some of which lie far apart: its first turn goes stale."""

import asyncio
from dataclasses import dataclass

from intellect3.environments import reverse_text
from intellect3.environments.base import Score


@dataclass(frozen=True)
class TwoTurns(reverse_text.ReverseText):
  """Reverses a word twice; every fourth task thinks for a while in between, some fail."""

  num_tasks: int = 400
  pause_seconds: float = 1.5

  async def run(self, task, conversation):
    reply = await conversation.send(task.prompt)
    number = int(task.task_id.rpartition("/")[2])
    if number % 7 == 1 and conversation.random.random() < 0.5:
      raise RuntimeError("the tool broke")
    if number % 4 == 0:
      await conversation.effect("think", lambda: asyncio.sleep(self.pause_seconds))
    await conversation.send(task.prompt)
    return Score(reward=float(reply.content == task.info["answer"]))
