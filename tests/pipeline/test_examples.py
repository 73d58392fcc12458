"""Examples are a function of their number, and only the assistant's tokens are trained on."""

import json

import numpy as np
import pytest

from intellect3.environments.reverse_text import ReverseText
from intellect3.pipeline import examples
from intellect3.rendering.bytes import ByteRenderer


def test_demonstrations_train_on_the_answer_alone():
  renderer = ByteRenderer()
  example = examples.from_environments([ReverseText()], renderer, seed=3)
  seen = set()
  for number in range(20):
    tokens, mask = example(number)
    again, _ = example(number)
    assert np.array_equal(tokens, again)
    prompt, answer = tokens[~mask], tokens[mask]
    assert mask[: len(prompt)].sum() == 0  # one prompt, then one answer
    word = renderer.decode(prompt).removeprefix("<|user|>").removesuffix("<|assistant|>")
    assert renderer.parse(answer).content == word[::-1]
    assert answer[-1] in renderer.stop_token_ids
    seen.add(word)
  assert len(seen) > 10
  other = examples.from_environments([ReverseText()], renderer, seed=4)
  assert not all(np.array_equal(example(n)[0], other(n)[0]) for n in range(5))


def test_accuracy_of_the_demonstrations_reaches_the_stream():
  renderer = ByteRenderer()
  environment = ReverseText(demonstration_accuracy=0.4)
  example = examples.from_environments([environment], renderer)
  right = 0
  for number in range(300):
    tokens, mask = example(number)
    text = renderer.decode(tokens[~mask]).removeprefix("<|user|>").removesuffix("<|assistant|>")
    right += renderer.parse(tokens[mask]).content == text[::-1] != text
  assert 0.3 < right / 300 < 0.5


def test_environments_without_demonstrations_are_refused():
  class Silent:
    name = "silent"

  with pytest.raises(ValueError, match="silent"):
    examples.from_environments([Silent()], ByteRenderer())
  with pytest.raises(ValueError, match="at least one"):
    examples.from_environments([], ByteRenderer())


def test_conversations_from_a_file(tmp_path):
  renderer = ByteRenderer()
  path = tmp_path / "chat.jsonl"
  first = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "!"},
  ]
  lines = [{"messages": first}, *({"messages": first[:2]} for _ in range(4))]
  path.write_text("\n".join(json.dumps(line) for line in lines))
  example = examples.from_messages(path, renderer)
  long = max((example(number) for number in range(5)), key=lambda pair: len(pair[0]))
  tokens, mask = long
  assert renderer.decode(tokens[mask]) == "yo<|endoftext|>!<|endoftext|>"
  assert list(tokens) == [*renderer.render(first[:3]), *renderer.completion("!")]
  # Every pass holds every line once.
  for epoch in (0, 1, 2):
    sizes = sorted(len(example(5 * epoch + n)[0]) for n in range(5))
    assert sizes[-1] > sizes[-2] == sizes[0]


@pytest.mark.parametrize(
  "line",
  [
    "",
    "{}",
    "no json",
    '{"messages": [{"role": "user", "content": "x"}]}',
    '{"messages": [{"role": "assistant", "content": "x"}]}',
  ],
)
def test_broken_files_are_refused(tmp_path, line):
  path = tmp_path / "chat.jsonl"
  path.write_text(line)
  with pytest.raises(ValueError, match=r"chat\.jsonl"):
    examples.from_messages(path, ByteRenderer())
