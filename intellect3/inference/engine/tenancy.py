"""How a sequence comes to its pages, what of them it shares, and how it leaves them. No JAX.

Place in the ring: between the batcher, which decides who comes and goes, and `pages`.
"""

import numpy as np

from intellect3.inference.engine.pages import Pages
from intellect3.inference.engine.sequence import Sequence


def move_in(sequence: Sequence, pages: Pages, *, length: int, spare: int) -> bool:
  """Finds what others computed of the prompt and takes pages for the rest.

  Args:
    sequence: holds no pages.
    pages: the cache.
    length: tokens that there is to be room for.
    spare: pages that must stay available to others.

  Returns:
    False, and nothing is changed, where there are too few pages.
  """
  request, size = sequence.request, pages.page_size
  prompt = request.input_ids
  shareable = len(prompt)
  if sequence.wants_scores:
    # What comes before a prompt token to be scored is computed.
    assert sequence.first_scored is not None
    shareable = sequence.first_scored - 1
  nodes = pages.find(request.extra_key, prompt, shareable // size)
  needed = -(-length // size) - len(nodes)
  pages.use(nodes)
  taken = pages.take(needed) if pages.available >= needed + spare else None
  if taken is None:
    pages.release(nodes, sequence)
    return False
  sequence.pages = [*(node.page for node in nodes), *taken]
  sequence.nodes, sequence.found = nodes, len(nodes)
  sequence.reused, sequence.passed, sequence.epoch = 0, 0, pages.epoch
  for page in sequence.pages[len(nodes) : len(prompt) // size]:
    if not pages.add(request.extra_key, prompt, nodes, page, sequence):
      break
  return True


def pass_shared(sequence: Sequence, pages: Pages, *, align: int) -> bool:
  """Goes past the pages that others computed; False where it is to wait for one of them.

  Args:
    sequence: holds pages.
    pages: the cache.
    align: computing begins at a multiple of it; divides the page size.
  """
  while sequence.reused < sequence.found:
    node = sequence.nodes[sequence.reused]
    if node.ready:
      sequence.reused += 1
      # The last token is computed in any case, since what follows it is sampled there.
      last = (sequence.length - 1) // align * align
      sequence.cached = min(sequence.reused * pages.page_size, last)
      sequence.passed = sequence.cached
      continue
    if node.writer is not None:
      return False
    # Whoever was to compute it has gone; it falls to this one, and what follows too.
    for orphan in sequence.nodes[sequence.reused : sequence.found]:
      if not orphan.ready and orphan.writer is None:
        orphan.writer = sequence
    sequence.found = sequence.reused
  return True


def announce(sequence: Sequence, end: int, pages: Pages) -> None:
  """The next prefill call computes the sequence up to `end`: others may rely on whole pages."""
  for node in sequence.nodes[sequence.reused : end // pages.page_size]:
    if node.writer is sequence:
      node.ready, node.writer = True, None


def keep_experts(sequence: Sequence, pages: Pages) -> None:
  """Leaves the experts of whole shared pages with their nodes, for those who reuse them."""
  size = pages.page_size
  missing = [
    index
    for index in range(sequence.reused, min(len(sequence.nodes), sequence.cached // size))
    if sequence.nodes[index].experts is None
  ]
  if sequence.experts:
    for index in missing:
      start = index * size - sequence.passed
      sequence.nodes[index].experts = _computed(sequence, start, start + size)


def _computed(sequence: Sequence, start: int, stop: int) -> np.ndarray:
  """The experts of some of the tokens that the sequence computed, counted from the first of them;
  looks from the end, where a page that was just filled is, and joins nothing else."""
  pieces: list[np.ndarray] = []
  end = sequence.cached - sequence.passed
  for piece in reversed(sequence.experts):
    begin = end - len(piece)
    if begin < stop:
      pieces.append(piece[max(start - begin, 0) : stop - begin])
    if begin <= start:
      break
    end = begin
  return np.concatenate(pieces[::-1])


def move_out(sequence: Sequence, pages: Pages, *, share_sampled: bool) -> None:
  """Gives all pages back. What was computed stays behind as a prefix.

  Args:
    sequence: holds pages; if it is finished, its `experts` become whole.
    pages: the cache.
    share_sampled: whether pages that decoding computed are left to others too.
  """
  nodes, size = sequence.nodes, pages.page_size
  if share_sampled and sequence.epoch == pages.epoch:
    tokens, key = sequence.tokens, sequence.request.extra_key
    for page in sequence.pages[len(nodes) : sequence.cached // size]:
      if not pages.add(key, tokens, nodes, page, None):
        break
  keep_experts(sequence, pages)
  if sequence.finish is not None:
    pieces = [node.experts for node in nodes[: sequence.reused]]
    shared = [piece for piece in pieces if piece is not None]
    if shared:
      sequence.experts.insert(0, np.concatenate(shared)[: sequence.passed])
  private = sequence.pages[len(nodes) :]
  pages.release(nodes, sequence)
  pages.give(private)
  sequence.nodes, sequence.pages = [], []
