"""The routes that steer a server: abort, pause, continue, flush, memory, health."""

import asyncio

from intellect3.inference.engine import asgi
from intellect3.inference.engine.asgi import Answer, Wire
from intellect3.inference.engine.generate import House
from intellect3.inference.engine.parse import Call, parse_body, typed
from intellect3.inference.engine.request import Request, RequestError

HEALTH_TIMEOUT_SECONDS = 20.0
HEALTH_STALL_SECONDS = 300.0
"""Of work without the end of a step; none takes near that long, for everything is compiled."""

HEALTH_RID = "HEALTH_CHECK"
MEMORY_TAGS = ("kv_cache", "weights")

_FLUSHED = (
  "Cache flushed.\nPlease check backend logs for more details. "
  "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class ControlRoutes:
  """The handlers; one instance per server."""

  def __init__(self, house: House):
    self._house = house
    self._probes = 0

  async def abort_request(self, body: bytes, wire: Wire) -> Answer:
    """Ends what a name stands for: one generation, all `n` of a prompt, a whole batch."""
    fields = parse_body(body)
    engine, rid = self._house.engine, fields.get("rid")
    if fields.get("abort_all") is True:
      await engine.abort(None)
    elif isinstance(rid, str):
      await asyncio.gather(*(engine.abort(name) for name in self._house.desk.rids(rid)))
    else:
      raise RequestError(f"rid: expected a string, or abort_all true, got {rid!r}")
    return asgi.text_answer("")

  async def pause_generation(self, body: bytes, wire: Wire) -> Answer:
    mode = parse_body(body).get("mode", "abort")
    try:
      await self._house.engine.pause(mode)
    except ValueError as error:
      return asgi.bad_request(str(error))
    return asgi.json_answer({"message": "Generation paused successfully.", "status": "ok"})

  async def continue_generation(self, body: bytes, wire: Wire) -> Answer:
    parse_body(body)
    await self._house.engine.resume()
    return asgi.json_answer({"message": "Generation continued successfully.", "status": "ok"})

  async def flush_cache(self, body: bytes, wire: Wire) -> Answer:
    if await self._house.engine.flush_cache():
      return asgi.text_answer(_FLUSHED)
    return asgi.text_answer("Flush cache failed.\n", 400)

  async def release_memory_occupation(self, body: bytes, wire: Wire) -> Answer:
    tags = _tags(body)
    try:
      await self._house.engine.release_memory(tags)
    except ValueError as error:
      return asgi.bad_request(str(error))
    return asgi.json_answer(None)

  async def resume_memory_occupation(self, body: bytes, wire: Wire) -> Answer:
    tags = _tags(body)
    try:
      await self._house.engine.resume_memory(tags)
    except ValueError as error:
      return asgi.bad_request(str(error))
    return asgi.json_answer(None)

  async def health(self, body: bytes, wire: Wire) -> Answer:
    engine = self._house.engine
    healthy = engine.alive and not engine.stalled(HEALTH_STALL_SECONDS)
    return asgi.text_answer("", 200 if healthy else 503)

  async def health_generate(self, body: bytes, wire: Wire) -> Answer:
    """Generates one token; as `health` while paused or memory is released."""
    house = self._house
    if house.engine.halted or not house.engine.alive:
      return await self.health(body, wire)
    self._probes += 1
    rid = f"{HEALTH_RID}_{self._probes}"
    probe = Request(rid=rid, input_ids=[0], max_new_tokens=1, temperature=0.0)
    try:
      await asyncio.wait_for(house.desk.run(house.engine, Call([probe])), HEALTH_TIMEOUT_SECONDS)
    except TimeoutError:
      house.engine.abort(rid)
      return asgi.text_answer("", 503)
    return asgi.text_answer("")


def _tags(body: bytes) -> list[str]:
  tags = typed("tags", parse_body(body).get("tags"), list[str] | None)
  unknown = set(tags or ()) - set(MEMORY_TAGS)
  if unknown:
    raise RequestError(f"tags: expected some of {', '.join(MEMORY_TAGS)}, got {sorted(unknown)}.")
  return list(MEMORY_TAGS) if tags is None else tags
