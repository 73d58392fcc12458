"""Writes the byte vocabulary as Hugging Face tokenizer files.

Place in the ring: beside the published weights, so that transformers and SGLang serve the exported
model with the same ids as ours. The tokenizer is byte-level BPE without merges: every byte is one
token. The one difference from ByteRenderer is that a Hugging Face tokenizer reads the name of a
special token inside a message as that token.
"""

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from intellect3.rendering.bytes import ENDOFTEXT, NUM_BYTES, PAD, SPECIAL_TOKENS

CHAT_TEMPLATE = (
  "{%- for message in messages -%}"
  "{%- if message.role == 'tool' -%}{{- '<|observation|>' -}}"
  "{%- else -%}{{- '<|' + message.role + '|>' -}}{%- endif -%}"
  "{{- message.content -}}"
  "{%- if message.role == 'assistant' -%}{{- '<|endoftext|>' -}}{%- endif -%}"
  "{%- endfor -%}"
  "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""ByteRenderer's format as a Jinja template."""


def write_tokenizer(directory: str | pathlib.Path) -> None:
  """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

  Args:
    directory: an existing directory, usually that of an exported model.

  Raises:
    ValueError: `directory` is not one.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise ValueError(f"directory: expected an existing directory, got {directory}")
  name = SPECIAL_TOKENS[ENDOFTEXT - NUM_BYTES]
  config = {
    "backend": "tokenizers",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": name,
    "pad_token": SPECIAL_TOKENS[PAD - NUM_BYTES],
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
  }
  _tokenizer().save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
  (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _tokenizer() -> Tokenizer:
  vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
  tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
  )
  return tokenizer


def _byte_characters() -> list[str]:
  """The printable character that byte-level BPE writes for each byte, in the order of the bytes.

  Latin-1's printable bytes stand for themselves, the others, in order, for U+0100 and on.
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  spare = iter(range(0x100, 0x200))
  return [chr(byte if byte in printable else next(spare)) for byte in range(NUM_BYTES)]
