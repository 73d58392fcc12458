"""Sampling against NumPy in float64: frequencies, exclusions, penalties, logprobs, and what a
sample may depend on."""

import functools
import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from intellect3.inference.engine import sampling as sampler
from intellect3.inference.engine.steps import MAX_STOP_IDS, NO_ID, empty_sampling

ROWS = 4096
VOCABULARY = 3 * sampler.BLOCK + 7
MANY = np.arange(ROWS, dtype=np.int64)
compiled = jax.jit(sampler.sample)


def sampling_of(rows=ROWS, *, seeds=MANY, positions=3, **fields):
  """Rows that sample at temperature 1; scalars are those of every row."""
  seeds = np.broadcast_to(seeds, rows)
  made = empty_sampling(rows)
  given = {
    "seeds_R2": np.stack([seeds >> 32, seeds & 0xFFFF_FFFF], axis=1),
    "positions_R": positions,
    "temperatures_R": 1.0,
    **fields,
  }
  for name, value in given.items():
    like = getattr(made, name)
    made = made._replace(**{name: np.broadcast_to(value, like.shape).astype(like.dtype)})
  return made


def sample(logits, sampling, counts=None):
  """`sample` on one row of logits for all, or on rows of them: ids, logprobs, all logprobs."""
  rows = len(sampling.positions_R)
  logits_RV = np.broadcast_to(np.float32(logits), (rows, np.shape(logits)[-1]))
  counts_RV = np.zeros(logits_RV.shape, np.int32) if counts is None else counts
  counts_RV = np.broadcast_to(counts_RV, logits_RV.shape).astype(np.int32)
  return jax.device_get(compiled(logits_RV, counts_RV, sampling))


def logits_of(vocabulary, scale=2.0, seed=0):
  return np.random.default_rng(seed).normal(scale=scale, size=vocabulary).astype(np.float32)


def log_softmax(logits):
  logits = np.float64(logits)
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_drawn_from(ids, probabilities):
  """Pearson's chi-square over the likelier ids, all rare ones as one bin; p-value above 1e-5."""
  counts, expected = np.bincount(ids, minlength=len(probabilities)), ids.size * probabilities
  rare = expected < 8
  pools = [(counts[~rare], expected[~rare])]
  if rare.any() and expected[rare].sum() > 0:
    pools.append(([counts[rare].sum()], [expected[rare].sum()]))
  given, wanted = (np.concatenate(side) for side in zip(*pools, strict=True))
  assert counts.sum() == ids.size and not counts[probabilities == 0].any()
  if wanted.size > 1:
    statistic = ((given - wanted) ** 2 / wanted).sum()
    assert stats.chi2.sf(statistic, wanted.size - 1) > 1e-5, (given, wanted)


@pytest.mark.parametrize("vocabulary", [2, 12, sampler.BLOCK, VOCABULARY])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_frequencies_and_logprobs_are_of_the_tempered_softmax(vocabulary, temperature):
  """Over many seeds at one position (both words count), and over many positions of one seed."""
  logits = logits_of(vocabulary)
  expected = log_softmax(logits / np.float64(temperature))
  for seeds, positions in ((MANY + (5 << 32), 3), (MANY << 32, 0), (3, MANY)):
    ids, logprobs, every = sample(
      logits, sampling_of(seeds=seeds, positions=positions, temperatures_R=temperature)
    )
    assert_drawn_from(ids, np.exp(expected))
    np.testing.assert_allclose(logprobs, expected[ids], atol=4e-6)
    np.testing.assert_allclose(every[:5], np.broadcast_to(expected, every[:5].shape), atol=4e-6)


def test_rows_with_one_possible_id_and_with_almost_impossible_ones():
  for only in (0, sampler.BLOCK - 1, sampler.BLOCK, VOCABULARY - 1):
    logits = np.full(VOCABULARY, np.finfo(np.float32).min)
    logits[only] = 3.0
    ids, logprobs, _ = sample(logits, sampling_of())
    assert set(ids.tolist()) == {only} and not logprobs.any()
  logits = np.full(VOCABULARY, -80.0)
  logits[[7, sampler.BLOCK + 1]] = 0.0
  ids, _, _ = sample(logits, sampling_of())
  assert set(ids.tolist()) == {7, sampler.BLOCK + 1}
  assert_drawn_from(ids, np.exp(log_softmax(logits)))


def test_a_large_vocabulary_of_equals_is_drawn_from_evenly():
  vocabulary = 40 * sampler.BLOCK + 13
  rows = ROWS // 2
  ids, logprobs, _ = sample(np.zeros(vocabulary), sampling_of(rows, seeds=MANY[:rows]))
  np.testing.assert_allclose(logprobs, -np.log(vocabulary), atol=1e-5)
  blocks, places = np.bincount(ids // sampler.BLOCK), np.bincount(ids % sampler.BLOCK)
  share = np.append(np.full(40, sampler.BLOCK), 13) / vocabulary
  assert stats.chisquare(blocks, rows * share).pvalue > 1e-5
  share = (40 + (np.arange(sampler.BLOCK) < 13)) / vocabulary
  assert stats.chisquare(places, rows * share).pvalue > 1e-5


def test_what_has_no_weight_is_never_drawn_however_the_sums_round():
  """Targets right at the running sums, where partial sums of a long row can grow without weight."""
  rng = np.random.default_rng(0)
  for length in (sampler.BLOCK, 2400):
    weights = np.exp(rng.normal(scale=3, size=(64, length))).astype(np.float32)
    weights[rng.random(weights.shape) < 0.7] = 0
    sums = np.asarray(jax.jit(functools.partial(jax.numpy.cumsum, axis=1))(weights))
    for column in rng.integers(0, length, 40):
      uniform = np.minimum(sums[:, column] / sums[:, -1], np.float32(1 - 2**-24))
      ids = np.asarray(jax.jit(sampler._invert)(weights, uniform))
      assert (np.take_along_axis(weights, ids[:, None], axis=1) > 0).all()


def test_temperature_zero_takes_the_first_largest_with_its_unscaled_logprob():
  logits = logits_of(VOCABULARY)
  logits[[17, 60, 198]] = logits.max() + 1
  ids, logprobs, every = sample(logits, sampling_of(positions=MANY, temperatures_R=0.0))
  assert set(ids.tolist()) == {17}
  np.testing.assert_allclose(logprobs, log_softmax(logits)[17], atol=2e-6)
  np.testing.assert_allclose(every[0], log_softmax(logits), atol=4e-6)


def allowed_by(probabilities, top_k, top_p, min_p):
  """SGLang's rule, in float64: each filter looks at the full distribution."""
  order = np.argsort(-probabilities, kind="stable")
  kept, before = set(), 0.0
  for rank, index in enumerate(order):
    inside = (not top_k or rank < top_k) and before <= top_p
    if rank == 0 or (inside and probabilities[index] >= min_p * probabilities[order[0]]):
      kept.add(int(index))
    before += probabilities[index]
  return kept


@pytest.mark.parametrize(
  ("top_k", "top_p", "min_p"),
  [
    (1, 1.0, 0.0),
    (4, 1.0, 0.0),
    (0, 0.6, 0.0),
    (0, 1e-9, 0.0),
    (0, 1.0, 0.2),
    (0, 1.0, 1.0),
    (5, 0.8, 0.02),
    (3, 0.95, 0.3),
  ],
)
def test_filters_exclude_as_sglang_does_and_leave_logprobs_alone(top_k, top_p, min_p):
  for temperature, vocabulary in ((1.0, 12), (2.0, VOCABULARY)):
    logits = logits_of(vocabulary, seed=top_k)
    probabilities = np.exp(log_softmax(logits / temperature))
    kept = allowed_by(probabilities, top_k, top_p, min_p)
    ids, logprobs, _ = sample(
      logits,
      sampling_of(
        temperatures_R=temperature, top_k_R=top_k, top_p_R=top_p, min_p_R=min_p, filters=True
      ),
    )
    inside = np.isin(np.arange(vocabulary), list(kept))
    filtered = np.where(inside, probabilities, 0)
    assert_drawn_from(ids, filtered / filtered.sum())
    np.testing.assert_allclose(logprobs, np.log(probabilities)[ids], atol=4e-6)


def test_equally_likely_ids_are_excluded_from_the_last_on():
  ids, _, _ = sample(np.zeros(12), sampling_of(top_k_R=3, filters=True))
  assert set(ids.tolist()) == {0, 1, 2}


def test_a_neighbours_filters_exclude_nothing():
  """Not even what is lost in the rounding of sums."""
  rng = np.random.default_rng(0)
  logits = rng.normal(scale=rng.choice([1, 3, 8], (64, 1)), size=(64, 1000))
  weights = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
  kept = np.asarray(jax.jit(sampler._filter)(weights, sampling_of(64, seeds=1, filters=True)))
  np.testing.assert_array_equal(kept, weights)


def penalized(logits, counts, frequency, presence, repetition):
  """SGLang's penalties, in its order, id by id."""
  out = np.float64(logits).copy()
  for index in np.flatnonzero(counts):
    out[index] -= counts[index] * frequency + presence
    out[index] = out[index] / repetition if out[index] > 0 else out[index] * repetition
  return out


@pytest.mark.parametrize(
  ("frequency", "presence", "repetition"),
  [(0.7, 0.0, 1.0), (0.0, 1.1, 1.0), (0.0, 0.0, 1.6), (-0.4, 0.5, 0.7)],
)
def test_penalties_change_what_is_drawn_and_its_logprobs(frequency, presence, repetition):
  vocabulary, temperature = 12, 1.5
  logits = logits_of(vocabulary)
  counts = np.random.default_rng(1).integers(0, 4, vocabulary)
  sampling = sampling_of(
    temperatures_R=temperature,
    frequency_R=frequency,
    presence_R=presence,
    repetition_R=repetition,
    penalizes=True,
  )
  ids, logprobs, every = sample(logits, sampling, counts)
  changed = penalized(logits, counts, frequency, presence, repetition)
  expected = log_softmax(changed / temperature)
  np.testing.assert_allclose(every[0], expected, atol=4e-6)
  np.testing.assert_allclose(logprobs, expected[ids], atol=4e-6)
  assert_drawn_from(ids, np.exp(expected))
  greedy, logprobs, _ = sample(
    logits, sampling._replace(temperatures_R=np.zeros(ROWS, "f")), counts
  )
  assert set(greedy.tolist()) == {int(changed.argmax())}
  np.testing.assert_allclose(logprobs, log_softmax(changed).max(), atol=4e-6)


def test_a_neighbours_penalties_change_nothing():
  rng, vocabulary = np.random.default_rng(2), 100
  logits = rng.normal(size=(64, vocabulary))
  counts = rng.integers(0, 3, logits.shape)  # left behind by earlier tenants
  alone = sample(logits, sampling_of(64, seeds=np.arange(64)), counts)
  own = np.arange(64) % 2 == 0
  crowded = sampling_of(
    64,
    seeds=np.arange(64),
    frequency_R=np.where(own, 0, 1.5),
    presence_R=np.where(own, 0, 1.5),
    repetition_R=np.where(own, 1, 1.5),
    penalizes=True,
  )
  for before, after in zip(alone, sample(logits, crowded, counts), strict=True):
    np.testing.assert_array_equal(after[own], before[own])
    assert np.any(after[~own] != before[~own])


def test_before_the_minimum_no_stop_id_can_be_sampled_and_the_others_share_its_weight():
  vocabulary, stops = 12, [2, 5, 11]
  logits = logits_of(vocabulary)
  logits[stops] += 4
  stops_RJ = np.full(MAX_STOP_IDS, NO_ID)
  stops_RJ[:3] = stops
  for temperature in (0.0, 0.5, 2.0):
    positions = np.arange(ROWS) % 4
    ids, logprobs, _ = sample(
      logits,
      sampling_of(positions=positions, stops_RJ=stops_RJ, min_new_R=2, temperatures_R=temperature),
    )
    early = positions < 2
    scaled = logits / (temperature or 1)
    without = log_softmax(np.where(np.isin(np.arange(vocabulary), stops), -1e30, scaled))
    assert not np.isin(ids[early], stops).any() and np.isin(ids[~early], stops).any()
    np.testing.assert_allclose(logprobs[early], without[ids[early]], atol=4e-6)
    np.testing.assert_allclose(logprobs[~early], log_softmax(scaled)[ids[~early]], atol=4e-6)


def test_a_sample_depends_on_seed_and_position_and_not_on_row_or_neighbours():
  rng, vocabulary = np.random.default_rng(1), VOCABULARY
  logits = rng.normal(scale=2, size=(ROWS, vocabulary)).astype(np.float32)
  seeds, positions = rng.integers(0, 1 << 62, ROWS), rng.integers(0, 1000, ROWS)
  temperatures = rng.choice([0.0, 0.7, 1.0], ROWS)
  first = sample(logits, sampling_of(seeds=seeds, positions=positions, temperatures_R=temperatures))
  order = rng.permutation(ROWS)
  others = {
    "top_k_R": rng.choice([0, 3], ROWS),
    "top_p_R": rng.choice([1.0, 0.5], ROWS),
    "min_new_R": rng.choice([0, 2000], ROWS),
    "stops_RJ": rng.integers(0, vocabulary, (ROWS, MAX_STOP_IDS)),
    "filters": True,
    "penalizes": True,
  }
  second = sample(
    logits[order],
    sampling_of(
      seeds=seeds[order],
      positions=positions[order],
      temperatures_R=temperatures[order],
      **others,
    ),
  )
  plain = (others["top_k_R"] == 0) & (others["top_p_R"] == 1) & (others["min_new_R"] == 0)
  assert plain.sum() > 300
  for before, after in zip(first, second, strict=True):
    np.testing.assert_array_equal(after[plain], before[order][plain])
  warm = temperatures > 0
  for changed in (
    {"seeds": seeds ^ (1 << 40), "positions": positions},
    {"seeds": seeds ^ 1, "positions": positions},
    {"seeds": seeds, "positions": positions + 1},
  ):
    ids = sample(logits, sampling_of(**changed, temperatures_R=temperatures))[0]
    assert (ids != first[0])[warm].mean() > 0.3 and (ids == first[0])[~warm].all()


def test_the_two_draws_of_a_row_are_independent():
  """A block of one id and a block of two: the second number says nothing about the first."""
  logits = np.full(VOCABULARY, -100.0)
  logits[[0, 1, sampler.BLOCK, sampler.BLOCK + 1]] = 0
  ids, _, _ = sample(logits, sampling_of())
  table = np.bincount(ids // sampler.BLOCK * 2 + ids % sampler.BLOCK, minlength=4).reshape(2, 2)
  assert stats.chi2_contingency(table).pvalue > 1e-4 and table.min() > ROWS / 5


def test_the_likeliest_come_first_and_only_where_they_are_wanted():
  every = log_softmax(np.random.default_rng(0).normal(size=(3, 50))).astype(np.float32)
  every[1, [4, 9]] = 0.5
  top = jax.device_get(jax.jit(sampler.top, static_argnums=1)(every, 4, True))
  for row, logprobs, ids in zip(every, *top, strict=True):
    expected = sorted(range(50), key=lambda index: (-row[index], index))[:4]
    assert ids.tolist() == expected and logprobs.tolist() == row[expected].tolist()
    assert all(a >= b for a, b in itertools.pairwise(logprobs))
  nothing = jax.device_get(jax.jit(sampler.top, static_argnums=1)(every, 4, False))
  assert not nothing.ids.any() and not nothing.logprobs.any()
