"""The orchestrator's hand on the servers: which there are, and how published weights reach them."""

import asyncio
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence

from intellect3.inference import control, fleet, tensor_sync, transport, weight_sync
from intellect3.rl import checks, outside
from intellect3.rl.roles import NotStarted, Shared
from intellect3.rl.servers import ServerList
from intellect3.rollouts.ports import RunFailed
from intellect3.weights import tensors

logger = logging.getLogger(__name__)

TRANSPORTS = ("disk", "tensor")
START_PROBE_SECONDS = 0.2
LEAST_BOUND = 1e-4
"""Of a canary bound that is calibrated: what float32 servers keep anyway."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How weights are synced; the orchestrator's parameters of these names.

  Attributes:
    sync_mode: `in_place` or `retract`.
    transport: `disk` or `tensor`.
    bucket_bytes: size of what `tensor` sends at a time.
    canary_bound: largest difference of a canary logprob; None calibrates it at the first sync.
    verify_fingerprints: whether to check the published files before a server gets them.
    start_seconds: how long the first servers may take to answer.
    timeout_seconds: of one control call.
    fleet: how patient to be with servers.
  """

  sync_mode: str
  transport: str
  bucket_bytes: int
  canary_bound: float | None
  verify_fingerprints: bool
  start_seconds: float
  timeout_seconds: float
  fleet: fleet.Settings

  def __post_init__(self) -> None:
    for field, value, known in (
      ("sync_mode", self.sync_mode, weight_sync.MODES),
      ("transport", self.transport, TRANSPORTS),
    ):
      if value not in known:
        raise NotStarted(f"{field}: expected one of {list(known)}, got {value!r}")
    if self.canary_bound is not None:
      checks.number("canary_bound", self.canary_bound, 0, above=True)
    checks.integer("bucket_bytes", self.bucket_bytes, 1)
    checks.number("server_start_seconds", self.start_seconds, 0, above=True)
    checks.number("sync_timeout_seconds", self.timeout_seconds, 0, above=True)


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """A published version, ready to be brought to any server."""

  load: weight_sync.Load
  canary: weight_sync.Canary
  gigabytes: float


class Serving:
  """Owns the fleet of a run; belongs to one event loop."""

  def __init__(
    self,
    shared: Shared,
    http: transport.Transport,
    settings: Settings,
    watcher: fleet.Watcher,
    *,
    weights: outside.Weights | None = None,
    wanted: Callable[[], Sequence[str]] | None = None,
    nonce: Callable[[], str] = outside.nonce,
  ) -> None:
    """Sends nothing yet.

    Args:
      shared: what the roles share.
      http: carries the calls.
      settings: see there.
      watcher: is told of the servers.
      weights: the published versions; None for those of the run directory.
      wanted: the list of servers as of now; None for the run directory's, which is written.
      nonce: see `outside.Outside`.
    """
    self._shared = shared
    self._weights = weights or outside.WeightsOnDisk(shared.weights_dir)
    self._nonce = nonce
    self._settings = settings
    self._bound = settings.canary_bound
    self._prepared: dict[int, _Prepared] = {}
    self._control = control.ServerControl(
      http,
      shared.server_urls,
      vocab_size=shared.renderer.vocab_size,
      timeout_seconds=settings.timeout_seconds,
      client=nonce(),
    )
    self._fleet = fleet.Fleet(
      self._control,
      bring=self._bring,
      wanted=wanted or ServerList(shared.run_dir, shared.server_urls, shared.orchestrator_url),
      watcher=watcher,
      settings=settings.fleet,
    )
    self._watch: asyncio.Task | None = None

  async def start(self) -> None:
    """Waits until the servers of the start answer, then watches over them and the list.

    Raises:
      TimeoutError: one did not.
    """
    await asyncio.gather(*map(self._until_it_answers, self._shared.server_urls))
    self._watch = asyncio.ensure_future(self._fleet.watch())

  async def _until_it_answers(self, url: str) -> None:
    """Asks for `/model_info` and not `/health`, and puts right what an orchestrator that died while
    it synced weights may have left: half a version, whose generations are ended too, and a pause,
    under which a health probe would break the server."""
    last = "nothing"
    try:
      async with asyncio.timeout(self._settings.start_seconds):
        while True:
          outcome = (await self._control.model_info(urls=[url]))[url]
          if outcome.ok:
            left = (await self._control.on_each(self._control.discard_update, [url]))[url]
            if left.value:
              await self._control.abort_all(urls=[url])
            await self._control.resume(urls=[url])
            return
          last = outcome.error or last
          await asyncio.sleep(START_PROBE_SECONDS)
    except TimeoutError:
      seconds = self._settings.start_seconds
      raise TimeoutError(f"{url}: no server after {seconds:g} s; last answer: {last}") from None

  async def sync(self, version: int) -> weight_sync.SyncReport:
    """Brings a published version to all servers and checks it (contract 8).

    Raises:
      RunFailed: the published files are not what their manifest says, and there was no server left
        that could have been refused them.
    """
    settings = self._settings
    clock = asyncio.get_running_loop().time
    started = clock()
    directory = self._weights.directory(version)
    if settings.verify_fingerprints:
      wrong = await self._weights.verify(version)
      if wrong:
        damage = _damage(directory, wrong)
        servers = self._fleet.refuse(version, damage)
        if not servers:
          raise RunFailed(f"no server is left after the sync of version {version}: {damage}")
        return weight_sync.report(version, settings.sync_mode, 0.0, servers, clock() - started)
    self._prepared = {version: await asyncio.to_thread(self._prepare, version, directory)}
    servers = await self._fleet.sync(version)
    bound = self._bound if self._bound is not None else self._calibrate(version, servers)
    return weight_sync.report(
      version,
      settings.sync_mode,
      bound,
      servers,
      clock() - started,
      gigabytes=self._prepared[version].gigabytes,
    )

  def metrics(self) -> dict[str, float]:
    """What the servers counted since the last call, where they tell it."""
    counted = self._fleet.take_counted()
    row = {"servers": float(sum(s == "serving" for s in self._fleet.states.values()))}
    if "reprefilled_tokens" in counted:
      row["reprefilled_tokens/retracted"] = float(counted["reprefilled_tokens"])
    if counted.get("prompt_tokens"):
      row["prefix_hit_share"] = counted.get("cached_tokens", 0) / counted["prompt_tokens"]
    return row

  async def close(self) -> None:
    """Ends the watch and what is on its way."""
    if self._watch is not None:
      self._watch.cancel()
      await asyncio.gather(self._watch, return_exceptions=True)
    await self._fleet.close()

  def _prepare(self, version: int, directory: pathlib.Path) -> _Prepared:
    manifest = self._weights.read(version)
    if self._settings.transport == "disk":
      load = weight_sync.from_disk(directory, version)
    else:
      places = tensors.index(directory)
      names = tensor_sync.plan_buckets(
        [(name, place.bytes) for name, place in places.items()], self._settings.bucket_bytes
      )
      buckets = tensor_sync.Buckets(names, lambda some: tensors.read(directory, places, some))
      load = tensor_sync.from_tensors(buckets, version)
    return _Prepared(
      load=load,
      canary=weight_sync.Canary(manifest.canary_ids, manifest.canary_logprobs),
      gigabytes=sum(file.bytes for file in manifest.files) / 1e9,
    )

  async def _bring(
    self, url: str, version: int, unusable: Callable[[weight_sync.ServerSync], None]
  ) -> weight_sync.ServerSync:
    prepared = self._prepared[version]
    if self._shared.router is not None:
      info = (await self._control.server_info(urls=[url]))[url]
      if info.value is None or not info.value.enable_return_routed_experts:
        reason = info.error or (
          "server_info.enable_return_routed_experts: expected true, as the run replays routed "
          "experts, got false"
        )
        return weight_sync.ServerSync(url, f"{url}: {reason}", 0.0, {}, answered=info.answered)
    return await weight_sync.sync_server(
      self._control,
      url,
      load=prepared.load,
      version=version,
      mode=self._settings.sync_mode,
      canary=prepared.canary,
      bound=1.0 if self._bound is None else self._bound,
      unusable=unusable,
      nonce=self._nonce(),
    )

  def _calibrate(self, version: int, servers: Sequence[weight_sync.ServerSync]) -> float:
    """Takes three times the difference seen at the first sync for the bound of all that follow."""
    differences = [s.max_difference for s in servers if s.ok and s.max_difference is not None]
    if not differences:
      return 1.0
    self._bound = max(LEAST_BOUND, 3 * max(differences))
    logger.info("canary bound calibrated at version %d: %g", version, self._bound)
    return self._bound


def served_version(newest: int, *, lag: int, steps: int) -> int:
  """The version that servers are to have when `newest` is published.

  Args:
    newest: the newest published version.
    lag: how many versions they are kept behind it.
    steps: last training step; its version is served as it is, since nothing is trained on what it
      makes: it is evaluated.

  Returns:
    The version; 0 until there are more than `lag`.
  """
  return newest if newest >= steps else max(0, newest - lag)


def _damage(directory: pathlib.Path, wrong: Sequence[str]) -> str:
  more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
  return f"fingerprints of {directory.name} differ from its manifest: {', '.join(wrong[:5])}{more}"
