"""The written tokenizer, read by its own libraries, against ByteRenderer."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from intellect3.rendering.bytes import SPECIAL_TOKENS, ByteRenderer
from intellect3.rendering.tokenizer_files import write_tokenizer

RENDERER = ByteRenderer()
MESSAGES = [
  {"role": "system", "content": "Répondez.\n  Ж 日本 🦊 \x00\x7f"},
  {"role": "user", "content": "abc"},
  {"role": "assistant", "content": "cba"},
  {"role": "tool", "content": "{'a': 1}"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  write_tokenizer(path)
  return path


@pytest.fixture(scope="module")
def tokenizer(directory):
  return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_every_id_is_ours(tokenizer):
  assert tokenizer.get_vocab_size() == RENDERER.vocab_size
  for name, token in zip(SPECIAL_TOKENS, range(256, 264), strict=True):
    assert tokenizer.token_to_id(name) == token
  for byte in range(128):
    assert tokenizer.encode(chr(byte), add_special_tokens=False).ids == [byte]


def test_text_with_special_tokens_has_our_ids(tokenizer):
  tokens = RENDERER.render(MESSAGES)
  assert tokenizer.encode(RENDERER.decode(tokens), add_special_tokens=False).ids == tokens
  assert tokenizer.decode(tokens, skip_special_tokens=False) == RENDERER.decode(tokens)


def test_any_text_has_our_ids(tokenizer):
  @given(st.text().filter(lambda text: not any(name in text for name in SPECIAL_TOKENS)))
  def check(text):
    assert tokenizer.encode(text, add_special_tokens=False).ids == list(text.encode())

  check()


def test_transformers_renders_the_chat_as_we_do(directory):
  transformers = pytest.importorskip("transformers")
  loaded = transformers.AutoTokenizer.from_pretrained(directory)
  rendered = loaded.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
  assert list(rendered) == RENDERER.render(MESSAGES)
  assert loaded.eos_token_id == 256 and loaded.pad_token_id == 261


def test_a_missing_directory_is_refused(tmp_path):
  with pytest.raises(ValueError, match="directory"):
    write_tokenizer(tmp_path / "nowhere")
