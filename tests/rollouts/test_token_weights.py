"""Per-token weights: the built-in functions, and their way through a worker into the log."""

import asyncio
import functools

import msgspec
import numpy as np
import pytest

from intellect3 import rollout_log, types
from intellect3.rollouts import token_weights
from tests.rollouts.helpers import all_records
from tests.rollouts.world import World


def record(versions, *, reward=1.0, stale=()):
  versions = np.array(versions, np.int32)
  mask = versions != types.NOT_SAMPLED
  mask[list(stale)] = False
  return types.TrajectoryRecord(
    step=1,
    rollout_id=0,
    group_id=0,
    branch=0,
    task_id="words/train/0",
    environment="words",
    reward=reward,
    advantage=0.5,
    trajectory=types.Trajectory(
      tokens=np.arange(len(versions), dtype=np.int32),
      loss_mask=mask,
      inference_logprobs=np.zeros(len(versions), np.float32),
      policy_versions=versions,
      temperature=1.0,
    ),
  )


def test_echo_teaches_what_the_environment_answered_and_never_the_prompt():
  two_turns = record([-1, -1, 3, 3, -1, -1, -1, 4, -1], stale=[2])
  (key, weights), *others = token_weights.echo(two_turns).items()
  assert (key, others, weights.dtype) == ("ce", [], np.float32)
  tenth = np.float32(0.1)
  assert weights.tolist() == [0, 0, 0, 0, tenth, tenth, tenth, 0, tenth]
  assert token_weights.echo(two_turns, weight=0.5)["ce"][4] == 0.5
  for nothing_observed in ([-1, -1, 0, 0], [-1, -1]):
    assert not token_weights.echo(record(nothing_observed))["ce"].any()


@pytest.mark.parametrize(
  ("reward", "rl_weight", "ce", "rl"),
  [
    (1.0, 0.0, [0, 2, 0, 2, 0], [0, 0, 0, 0, 0]),
    (1.0, 1.0, [0, 2, 0, 2, 0], [0, 1, 0, 1, 0]),
    (0.9, 0.0, [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]),
  ],
)
def test_imitate_takes_good_rollouts_out_of_the_policy_gradient(reward, rl_weight, ce, rl):
  given = token_weights.imitate(
    record([-1, 5, -1, 6, 4], reward=reward, stale=[4]), weight=2.0, rl_weight=rl_weight
  )
  assert {key: value.tolist() for key, value in given.items()} == {"ce": ce, "rl": rl}
  assert all(value.dtype == np.float32 for value in given.values())


@pytest.mark.parametrize(
  "call",
  [
    lambda r: token_weights.echo(r, weight=float("nan")),
    lambda r: token_weights.imitate(r, weight=float("inf")),
    lambda r: token_weights.imitate(r, rl_weight=float("nan")),
  ],
)
def test_weights_that_are_no_numbers_are_named(call):
  with pytest.raises(ValueError, match="weight: expected a finite number, got"):
    call(record([-1, 0]))


def test_built_in_functions_pass_the_check_before_a_run():
  for function in (
    token_weights.echo,
    token_weights.imitate,
    functools.partial(token_weights.imitate, rl_weight=1.0),
  ):
    token_weights.check(function, "words")


ONES = np.ones(6, np.float32)


@pytest.mark.parametrize(
  ("function", "reason"),
  [
    (3, "'int' object is not callable"),
    (lambda r: ONES, "expected weights by component, got array"),
    (lambda r: {}, r"names the components \[\] and then \[\]"),
    (lambda r: {"kl": ONES}, "expected components of .* got 'kl'"),
    (lambda r: {"ce": ONES[:5]}, r"\['ce'\]: expected float32\[6\], got float32\[5\]"),
    (lambda r: {"ce": ONES * np.nan}, r"\['ce'\]: expected finite values"),
    (lambda r: {"ce" if r.reward else "rl": ONES}, r"the components \['rl'\] and then \['ce'\]"),
    (lambda r: {"ce": r.novelty}, "has no attribute 'novelty'"),
  ],
)
def test_functions_that_do_not_fit_are_named_before_a_run(function, reason):
  with pytest.raises(ValueError, match=f"token_weights: expected a function .* got .*{reason}"):
    token_weights.check(function, "words")


def test_weights_travel_with_the_records_into_manifest_and_log(tmp_path):
  world = World(
    tmp_path, steps=2, token_weights=functools.partial(token_weights.imitate, reward_threshold=0.5)
  )
  asyncio.run(world.run())
  for step in (1, 2):
    manifest = rollout_log.read_manifest(world.log_dir, step)
    records = all_records(world.log_dir, manifest)
    counts = {"ce": [], "rl": []}
    for entry in manifest.shards:
      for key in counts:
        counts[key].extend(entry.component_tokens[key])
    assert counts["ce"] == [4 if r.reward == 1.0 else 0 for r in records]
    assert counts["rl"] == [0 if r.reward == 1.0 else 4 for r in records]
    for each in records:
      sampled = each.trajectory.loss_mask
      np.testing.assert_array_equal(each.token_weights["ce"], sampled * (each.reward == 1.0))


def test_a_run_without_weights_logs_none(tmp_path):
  world = World(tmp_path, steps=1)
  asyncio.run(world.run())
  manifest = rollout_log.read_manifest(world.log_dir, 1)
  assert [dict(entry.component_tokens) for entry in manifest.shards] == [{}]
  assert all(dict(each.token_weights) == {} for each in all_records(world.log_dir, manifest))


@pytest.mark.parametrize(
  ("function", "reason"),
  [
    (lambda r: {"ce": np.ones(1, np.float32)}, r"token_weights\['ce'\]: expected float32\[6\]"),
    (
      lambda r: {"ce" if r.step == 1 else "rl": np.ones(6, np.float32)},
      r"expected the same components all run, got \[\['ce'\], \['rl'\]\]",
    ),
    (
      lambda r: {"ce" if r.reward else "rl": np.ones(6, np.float32)},
      "expected the same components all run",
    ),
  ],
)
def test_weights_that_do_not_fit_end_the_run_by_name(tmp_path, function, reason):
  world = World(tmp_path, token_weights=function)
  with pytest.raises(Exception, match=reason):
    asyncio.run(world.run())


def test_a_records_check_wants_arrays_alone():
  with pytest.raises(ValueError, match=r"token_weights\['ce'\]: expected a NumPy array"):
    msgspec.structs.replace(record([-1, 0]), token_weights={"ce": [0.0, 1.0]}).check()
