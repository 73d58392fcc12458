"""What each kind of fault does to a simulated world at its moment."""

from typing import TYPE_CHECKING

from intellect3.simulation.faults import schedule

if TYPE_CHECKING:
  from intellect3.simulation.faults.lab import Lab


def strike(lab: "Lab", fault: schedule.Fault) -> bool:
  """Lets a fault happen; returns whether there was anything for it to strike."""
  loop, life = lab.loop, lab.life
  server = list(lab.servers.values())[fault.target % len(lab.servers)]
  match fault.kind:
    case "server_killed" | "server_restarted_stale":
      if not server.alive:
        return False
      server.die(fault.kind)
      stale = fault.kind == "server_restarted_stale"
      label, _, how = (fault.detail if stale else "0").partition(" ")
      weights = int(label) if label.isdigit() else 0
      loop.call_later(0.5 if stale else fault.seconds, server.start, label, weights, how)
    case "server_slow":
      server.set_slow(8.0)
      loop.call_later(fault.seconds, server.set_slow, 1.0)
    case "server_hung":
      server.hang(fault.seconds)
    case "server_garbage":
      server.garbage += [fault.detail] * (1 + int(fault.seconds) % 7)
    case "server_cut_off":
      lab.network.cut.add(server.url)
      loop.call_later(fault.seconds, lab.network.cut.discard, server.url)
    case "server_unlisted":
      lab.unlisted.add(server.url)
      loop.call_later(fault.seconds, lab.unlisted.discard, server.url)
    case "load_fails" | "load_wrong":
      server.held.next_load = fault.kind.removeprefix("load_")
    case "answers_lost":
      lost = lab.network.lost_answers
      lost[server.url] = lost.get(server.url, 0) + int(fault.detail)
    case "worker_killed":
      return life is not None and life.kill_worker(fault.target, fault.seconds)
    case "workers_killed":
      return life is not None and life.kill_workers(fault.seconds)
    case "worker_twice":
      return life is not None and life.say_twice(fault.target, int(fault.detail))
    case "worker_late":
      return life is not None and life.delay_worker(fault.target, fault.seconds)
    case "trainer_stalled":
      lab.trainer.stall(fault.seconds)
    case "trainer_killed":
      return lab.kill_trainer(fault.seconds)
    case "checkpoint_lost":
      return lab.trainer.lose_checkpoint() and lab.kill_trainer(fault.seconds)
    case "orchestrator_killed":
      if life is None or not life.alive:
        return False
      life.arm(fault.detail)
    case "disk_full":
      lab.disk.full = True
      loop.call_later(fault.seconds, setattr, lab.disk, "full", False)
    case "disk_slow":
      lab.disk.slow = 100.0
      loop.call_later(fault.seconds, setattr, lab.disk, "slow", 1.0)
    case "shard_cut":
      lab.disk.cut_next_shard = True
    case "writer_killed":
      lab.disk.kill_writer = fault.detail
    case "weights_cut":
      lab.disk.cut_next_weights = True
    case _:
      raise ValueError(f"kind: expected one of {list(schedule.KINDS)}, got {fault.kind!r}")
  return True
