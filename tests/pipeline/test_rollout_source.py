"""Batches of the log: exact under prefetch and resume, checked against the manifest, stoppable."""

import pathlib
import threading
import time

import grain
import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import pytest
from pipeline_records import commit

from intellect3 import rollout_log
from intellect3.pipeline import packing, placement, rollout_source

LENGTHS = [5, 9, 16, 7, 3, 4, 12, 8]


def _batches(log_dir, **changes):
  arguments = {
    "first_step": 1,
    "last_step": None,
    "row_length": 16,
    "micro_rows": 2,
    "stop": threading.Event(),
  }
  return rollout_source.batches(log_dir, **{**arguments, **changes})


def _same(left, right):
  return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def _threads():
  return {thread for thread in threading.enumerate() if "prefetch" in thread.name}


def test_one_element_is_one_step(tmp_path):
  for step in (1, 2, 3):
    commit(tmp_path, step, LENGTHS[step:])
  with _batches(tmp_path, last_step=3) as iterator:
    found = list(iterator)
  assert [int(batch.step) for batch in found] == [1, 2, 3]
  for step, batch in enumerate(found, start=1):
    assert (batch.segment_ids > 0).sum() == sum(LENGTHS[step:])
    assert len(batch.tokens) % 2 == 0
    trained = batch.policy_versions[batch.loss_mask]
    assert (trained == step - 1).all()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_state_is_exact_under_prefetch(tmp_path, prefetch):
  for step in range(1, 7):
    commit(tmp_path, step, LENGTHS[: step + 2])
  with _batches(tmp_path, last_step=6, prefetch=prefetch) as iterator:
    assert iterator.get_state() == {"next_step": 1}
    next(iterator), next(iterator)
    time.sleep(0.05)  # let the thread run ahead
    state = iterator.get_state()
    assert state == {"next_step": 3}
    third = next(iterator)
    next(iterator)
    iterator.set_state(state)
    assert _same(next(iterator), third)
    assert iterator.get_state() == {"next_step": 4}
  assert not _threads()


def test_the_thread_runs_ahead_by_what_was_asked(tmp_path):
  manifests = {step: commit(tmp_path, step, LENGTHS)[0] for step in range(1, 9)}
  asked = []

  def wait(step, stop):
    asked.append(step)
    return manifests[step]

  with _batches(tmp_path, last_step=8, wait=wait, prefetch=2) as iterator:
    next(iterator)
    deadline = time.monotonic() + 5.0
    while len(asked) < 4 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.1)
    # One was taken, two lie ready, one is in the thread's hands.
    assert asked == [1, 2, 3, 4]


def test_state_travels_through_orbax(tmp_path):
  for step in range(1, 6):
    commit(tmp_path / "log", step, LENGTHS[:step])
  manager = ocp.CheckpointManager(tmp_path / "ck")
  with _batches(tmp_path / "log", last_step=5, prefetch=2) as iterator:
    next(iterator), next(iterator)
    manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    manager.wait_until_finished()
    third = next(iterator)
  with _batches(tmp_path / "log", last_step=5, prefetch=2) as fresh:
    manager.restore(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert fresh.get_state() == {"next_step": 3}
    assert _same(next(fresh), third)
  manager.close()
  assert not _threads()


def test_it_waits_for_a_manifest_that_comes_later(tmp_path):
  notify = threading.Event()
  with _batches(tmp_path, notify=notify) as iterator:
    threading.Timer(0.2, lambda: (commit(tmp_path, 1, LENGTHS), notify.set())).start()
    assert int(next(iterator).step) == 1


@pytest.mark.parametrize("prefetch", [0, 1])
def test_stop_ends_a_wait_promptly_and_leaves_no_thread(tmp_path, prefetch):
  stop = threading.Event()
  iterator = _batches(tmp_path, stop=stop, prefetch=prefetch)
  threading.Timer(0.2, stop.set).start()
  begin = time.monotonic()
  assert list(iterator) == []
  iterator.close()
  assert 0.1 < time.monotonic() - begin < 1.5
  assert not _threads()


def test_close_alone_ends_a_wait_of_the_prefetch(tmp_path):
  commit(tmp_path, 1, LENGTHS)
  iterator = _batches(tmp_path)
  next(iterator)
  begin = time.monotonic()
  iterator.close()
  assert time.monotonic() - begin < 1.0 and not _threads()
  with pytest.raises(ValueError, match="closed"):
    next(iterator)


def test_an_injected_wait_is_used(tmp_path):
  manifest, _ = commit(tmp_path, 1, LENGTHS)
  asked = []

  def wait(step, stop):
    asked.append(step)
    return manifest if step == 1 else None

  with _batches(tmp_path, wait=wait) as iterator:
    assert len(list(iterator)) == 1
  assert asked[:2] == [1, 2]
  with pytest.raises(ValueError, match="notify"):
    _batches(tmp_path, wait=wait, notify=threading.Event())


def test_processes_open_the_records_of_their_own_rows_alone(tmp_path, monkeypatch):
  manifest, records = commit(tmp_path, 1, LENGTHS, shards=4)
  load = {"row_length": 16, "micro_rows": 4}
  whole = rollout_source.load_batch(tmp_path, manifest, **load)
  read, opened = rollout_log._read, []

  def counting(path, entry, offsets):
    opened.extend((path.name, offset) for offset in offsets)
    return read(path, entry, offsets)

  monkeypatch.setattr(rollout_log, "_read", counting)
  lengths = {
    (entry.file, offset): length
    for entry in manifest.shards
    for offset, length in enumerate(entry.lengths)
  }
  # Of four blocks one process holds the first and the last, another the two between.
  for process, blocks in enumerate([(0, 3), (1, 2)]):
    opened.clear()
    share = packing.Share(blocks, 4)
    part = rollout_source.load_batch(
      tmp_path, manifest, **load, share=share, process_index=process, process_count=2
    )
    size = len(whole.tokens) // 4
    own = [row for block in blocks for row in range(block * size, (block + 1) * size)]
    for name in ("tokens", "segment_ids", "advantages"):
      assert np.array_equal(getattr(part, name), getattr(whole, name)[own])
    assert part.loss_tokens == whole.loss_tokens
    assert sum(lengths[each] for each in opened) == int((whole.segment_ids[own] > 0).sum())
    assert 0 < len(opened) == len(set(opened)) < len(records)


def test_rows_that_do_not_divide_into_the_blocks_are_refused(tmp_path):
  manifest, _ = commit(tmp_path, 1, LENGTHS)
  with pytest.raises(ValueError, match="row_counts: expected multiples of 3 blocks, got 4"):
    rollout_source.load_batch(
      tmp_path, manifest, row_length=16, micro_rows=4, share=packing.Share((0,), 3)
    )


def _edit(manifest, log_dir, **changes):
  """Rewrites the manifest with another first shard entry."""
  entry = msgspec.structs.replace(manifest.shards[0], **changes)
  manifest = msgspec.structs.replace(manifest, shards=[entry, *manifest.shards[1:]])
  path = pathlib.Path(log_dir) / "step_000001" / "manifest.json"
  path.write_bytes(msgspec.json.encode(manifest))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda e: {"crc32": e.crc32 ^ 1}, "crc32"),
    (lambda e: {"bytes": e.bytes + 1}, "bytes"),
    (lambda e: {"lengths": [*e.lengths, 4], "loss_tokens": [*e.loss_tokens, 0]}, "records"),
    (lambda e: {"lengths": [e.lengths[0] + 1, *e.lengths[1:]]}, "length"),
    (lambda e: {"loss_tokens": [e.loss_tokens[0] + 1, *e.loss_tokens[1:]]}, "loss_tokens"),
    (lambda e: {"file": "../step_000002/worker_0.arrayrecord"}, "bare name"),
    (lambda e: {"file": "missing.arrayrecord"}, "bytes"),
  ],
)
def test_a_manifest_that_disagrees_with_its_shards_is_refused(tmp_path, change, message):
  manifest, _ = commit(tmp_path, 1, LENGTHS)
  _edit(manifest, tmp_path, **change(manifest.shards[0]))
  with _batches(tmp_path) as iterator, pytest.raises(ValueError, match=message):
    next(iterator)


def test_a_cut_off_shard_is_refused(tmp_path):
  manifest, _ = commit(tmp_path, 1, LENGTHS)
  path = tmp_path / "step_000001" / manifest.shards[1].file
  path.write_bytes(path.read_bytes()[:-10])
  with _batches(tmp_path) as iterator, pytest.raises(ValueError, match="worker_1"):
    next(iterator)


def test_a_manifest_of_another_step_or_half_written_is_refused(tmp_path):
  manifest, _ = commit(tmp_path, 1, LENGTHS)
  path = tmp_path / "step_000001" / "manifest.json"
  path.write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, step=2)))
  with pytest.raises(ValueError, match="step: expected 1, got 2"):
    rollout_log.read_manifest(tmp_path, 1)
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(ValueError, match=r"manifest\.json"):
    rollout_log.read_manifest(tmp_path, 1)


def test_placement_puts_rows_over_the_mesh(tmp_path):
  manifest, _ = commit(tmp_path, 1, LENGTHS)
  batch = rollout_source.load_batch(tmp_path, manifest, row_length=16, micro_rows=2)
  mesh = jax.make_mesh(
    (1,) * 5,
    ("data", "fsdp", "expert", "context", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 5,
  )
  placed = placement.place(batch, mesh)
  assert _same(batch, placed)
  assert placed.tokens.sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp", "expert"))
