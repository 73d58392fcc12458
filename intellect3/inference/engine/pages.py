"""The pages of the cache: who holds them, and which hold the beginning of a prompt. No JAX.

Place in the ring: the batcher asks for pages and looks prompts up. Prompts that begin alike share
whole pages: a tree (radix cache) has one node per page, its key the page's tokens, under a root per
cache key. A node that no sequence uses stays until its page is needed, the longest unused first.

A node can be shared before it is computed: all rows of a prefill call write before they read, so
those who share it may compute their own part in the very call that computes it (`ready`).
"""

import collections
import dataclasses
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np


@dataclasses.dataclass(eq=False, slots=True)
class Node:
  """A page of prompt.

  Attributes:
    page: its index in the cache, -1 for a root.
    key: its tokens.
    parent: the page before it; None for a root.
    children: the pages after it.
    users: sequences that hold it (and hence all before it).
    ready: whether a call that computes it has been planned.
    writer: the sequence that will compute it, None once ready or where that one has gone.
    experts: int32 [tokens, MoE layers, A], once computed, where the server returns experts.
    epoch: of the cache, when it was made; a node of an earlier one is found by nobody.
  """

  page: int
  key: bytes
  parent: "Node | None"
  epoch: int
  children: dict[bytes, "Node"] = dataclasses.field(default_factory=dict)
  users: int = 0
  ready: bool = False
  writer: Any = None
  experts: np.ndarray | None = None


class Pages:
  """All pages of the cache: free, held by one sequence, or nodes of the prefix tree."""

  def __init__(self, count: int, page_size: int):
    """Args: count: pages of the cache. page_size: tokens of each."""
    for name, value in (("pages", count), ("page_size", page_size)):
      if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    self.count, self.page_size = count, page_size
    self.epoch = 0
    self._free = list(range(count - 1, -1, -1))
    self._roots: dict[str, Node] = {}
    # Nodes that nobody uses and that have no children: what can be given up, oldest first.
    self._leaves: collections.OrderedDict[int, Node] = collections.OrderedDict()
    self._unused = 0

  @property
  def available(self) -> int:
    """Pages that can be taken: free ones and nodes that nobody uses."""
    return len(self._free) + self._unused

  @property
  def unused(self) -> int:
    """Pages that are held only in case somebody asks for their prompt again."""
    return self._unused

  def find(self, key: str, tokens: Seq[int], count: int) -> list[Node]:
    """The nodes of the first `count` pages of tokens as far as they exist; takes nothing."""
    node, found = self._roots.get(key), []
    for index in range(count):
      node = node.children.get(self._tokens(tokens, index)) if node else None
      if node is None:
        break
      found.append(node)
    return found

  def use(self, nodes: Seq[Node]) -> None:
    """Takes a reference to each node, first page first."""
    for node in nodes:
      if node.users == 0:
        self._unused -= 1
        self._leaves.pop(node.page, None)
      node.users += 1

  def add(self, key: str, tokens: Seq[int], nodes: list[Node], page: int, writer: Any) -> bool:
    """Makes a page, held by one sequence, the node after `nodes` (which it holds).

    Args:
      key: cache key.
      tokens: of the sequence.
      nodes: its nodes from the first page on; the new one is appended.
      page: the page.
      writer: who will compute it; None where it is computed.

    Returns:
      False, and nothing is done, where there is such a node already or the tree is stale.
    """
    if not nodes and key not in self._roots:
      self._roots[key] = Node(-1, _encode(key), None, self.epoch)
    parent = nodes[-1] if nodes else self._roots[key]
    name = self._tokens(tokens, len(nodes))
    if name in parent.children or self._stale(parent):
      return False
    node = Node(page, name, parent, self.epoch, users=1, ready=writer is None, writer=writer)
    parent.children[name] = node
    nodes.append(node)
    return True

  def release(self, nodes: Seq[Node], owner: Any) -> None:
    """Gives the references to nodes back, and with them the duty to compute them."""
    for node in reversed(nodes):
      node.users -= 1
      if node.writer is owner:
        node.writer = None
      if node.users:
        continue
      # Never computed, or by weights that are gone: of no use to anybody.
      if not node.ready or self._stale(node):
        assert not node.children or self._stale(node)
        self._remove(node)
        self._free.append(node.page)
      else:
        self._unused += 1
        if not node.children:
          self._leaves[node.page] = node

  def take(self, count: int) -> list[int] | None:
    """Takes pages, giving up unused nodes where needed; None where there are not enough."""
    if self.available < count:
      return None
    while len(self._free) < count:
      _, node = self._leaves.popitem(last=False)
      self._unused -= 1
      self._remove(node)
      self._free.append(node.page)
    return [self._free.pop() for _ in range(count)]

  def give(self, pages: Seq[int]) -> None:
    """Gives pages back that are no nodes."""
    self._free.extend(reversed(pages))

  def clear(self) -> None:
    """Forgets every prefix, and a new epoch begins: unused nodes are freed, used ones when they are
    released."""
    self.epoch += 1
    self._roots.clear()
    while self._leaves:
      _, node = self._leaves.popitem()
      self._unused -= 1
      self._remove(node)
      self._free.append(node.page)

  def _tokens(self, tokens: Seq[int], index: int) -> bytes:
    start = index * self.page_size
    return np.asarray(tokens[start : start + self.page_size], np.int32).tobytes()

  def _stale(self, node: Node) -> bool:
    return node.epoch != self.epoch

  def _remove(self, node: Node) -> None:
    """Takes a node out of the tree; a parent that nobody uses may become a leaf."""
    parent = node.parent
    assert parent is not None
    parent.children.pop(node.key, None)
    if parent.children or parent.users:
      return
    if parent.parent is not None:
      # The oldest: whatever came after it was used no later.
      self._leaves[parent.page] = parent
      self._leaves.move_to_end(parent.page, last=False)
    elif not self._stale(parent):
      self._roots.pop(parent.key.decode(errors="surrogatepass"), None)


def _encode(key: str) -> bytes:
  # JSON can hold half a surrogate pair, which is no text but a key as good as any.
  return key.encode(errors="surrogatepass")
