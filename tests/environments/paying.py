"""An environment that pays between its turns, and keeps receipts: nothing may be paid twice."""

import asyncio
import os
from dataclasses import dataclass

from intellect3.environments import reverse_text
from intellect3.environments.base import Score


@dataclass(frozen=True)
class Paying(reverse_text.ReverseText):
  """Reverses a word, pays, waits, and reverses it again. `receipts` is a file."""

  num_tasks: int = 400
  pause_seconds: float = 1.0
  receipts: str = ""

  async def run(self, task, conversation):
    name = f"{task.task_id} {conversation.random.getrandbits(48)}"
    await conversation.send(task.prompt)
    await conversation.effect("pay", lambda: self._pay(name))
    await asyncio.sleep(self.pause_seconds)
    reply = await conversation.send(task.prompt)
    return Score(reward=float(reply.content == task.info["answer"]))

  async def _pay(self, name):
    file = os.open(self.receipts, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{name}\n".encode())
    os.close(file)
