"""Tiny checkpoints that both servers load, with a tokenizer, and the trainer's view of them.

Three of one shape: two random ones, so that an update shows, and one whose every token follows from
the one before it alone, so that a server "says" a script with thoughts and a tool call.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer

from intellect3.models import hf, presets, transformer
from intellect3.rendering import bytes as byte_vocabulary
from intellect3.rendering.tokenizer_files import write_tokenizer

MARKERS = (
  *("<think>", "</think>", "<tool_call>", "</tool_call>"),
  *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
"""GLM-4.5's, in the text of an answer."""

WORDS = ("Let me look.", "get_weather\n", "city", "Paris")
"""Each one token, so that a token tells where in the script it stands."""

SCRIPT = (
  *("<think>", "Let me look.", "</think>", "<tool_call>", "get_weather\n"),
  *("<arg_key>", "city", "</arg_key>", "<arg_value>", "Paris", "</arg_value>", "</tool_call>"),
  "<|observation|>",
)
"""What the scripted checkpoint says after any other token."""

TEMPLATE = """\
{%- if tools -%}<|system|>
{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}<|observation|><tool_response>{{ message.content }}</tool_response>
{%- else -%}<|{{ message.role }}|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() -%}
<arg_key>{{ key }}</arg_key><arg_value>{{ value }}</arg_value>
{%- endfor -%}</tool_call>
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
"""GLM-4.5's layout without its instructions."""

STOPS = (byte_vocabulary.ENDOFTEXT, byte_vocabulary.USER, byte_vocabulary.OBSERVATION)
VOCAB_SIZE = byte_vocabulary.VOCAB_SIZE + len(MARKERS) + len(WORDS)
LENGTH = 512
"""Of the sequences that the trainer's forward is compiled for."""

CONFIG = presets.tiny(vocab_size=VOCAB_SIZE, num_layers=3, max_positions=2048)


def token_of(piece: str) -> int:
  """Id of a special token, marker or word."""
  names = (*byte_vocabulary.SPECIAL_TOKENS, *MARKERS, *WORDS)
  return byte_vocabulary.NUM_BYTES + names.index(piece)


def random_params(seed, config=CONFIG):
  """Parameters whose distributions are peaked and whose biases all matter."""
  generator = np.random.default_rng(seed)

  def leaf(path, shape):
    name = path[-1].key
    values = generator.normal(scale=0.1 if "bias" in name else 0.2, size=shape.shape)
    return (values + (name == "scale")).astype(shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, transformer.abstract(config)[0])


def scripted_params():
  """Parameters under which attention and experts add nothing: a token's successor is a table."""
  shapes = transformer.abstract(CONFIG)[0]
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: np.full(leaf.shape, path[-1].key == "scale", leaf.dtype), shapes
  )
  script = [token_of(piece) for piece in SCRIPT]
  params["embedding"][:, 0] = 1.0
  for direction, (before, after) in enumerate(zip([None, *script], script, strict=False)):
    if before is not None:
      params["embedding"][before] = np.eye(CONFIG.embed_dim)[direction]
    params["head"][direction, after] = 4.0
  return params


def write(directory, params, config=CONFIG):
  """Writes a checkpoint with its tokenizer, chat template and stop tokens."""
  hf.save(directory, config, params)
  write_tokenizer(directory)
  tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
  added = [AddedToken(text, special=False, normalized=False) for text in (*MARKERS, *WORDS)]
  assert tokenizer.add_tokens(added) == len(added)
  tokenizer.save(str(directory / "tokenizer.json"))
  (directory / "chat_template.jinja").write_text(TEMPLATE)
  settings = json.loads((directory / "tokenizer_config.json").read_text())
  settings["chat_template"] = TEMPLATE
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": list(STOPS)}))
  (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": list(STOPS)}))
  return directory


@jax.jit
def _forward(params, tokens_1T):
  positions_1T = jnp.arange(tokens_1T.shape[1])[None]
  output = transformer.Transformer(CONFIG).apply(
    {"params": params}, tokens_1T, positions_1T, jnp.ones_like(tokens_1T)
  )
  logits_TV = output.hidden_BTD[0] @ transformer.head(params, CONFIG)
  return logits_TV.astype(jnp.float32), output.router.experts_LBTA[:, 0]


@jax.jit
def _logprobs(logits_TV, targets_T, temperature):
  scores_TV = jax.nn.log_softmax(logits_TV / temperature)
  return jnp.take_along_axis(scores_TV, targets_T[:, None], axis=1)[:, 0]


def trainer_logits(params, tokens):
  """The trainer's logits after each token, float32 [T, V], by one full forward."""
  padded = np.zeros((1, LENGTH), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(_forward(params, padded)[0])[: len(tokens)]


def trainer_logprobs(params, tokens, *, temperature=1.0):
  """Logprobs of tokens[1:] given what comes before, float32 [T - 1], by the trainer's forward."""
  logits_TV = jnp.asarray(trainer_logits(params, tokens)[:-1])
  return np.asarray(_logprobs(logits_TV, jnp.asarray(tokens[1:]), temperature))


def trainer_experts(params, tokens):
  """Experts that the trainer's router chooses, int32 [T, num_layers, k]; zero in dense layers."""
  padded = np.zeros((1, LENGTH), np.int32)
  padded[0, : len(tokens)] = tokens
  experts_LTA = np.asarray(_forward(params, padded)[1])[:, : len(tokens)]
  dense = np.zeros((CONFIG.num_dense_layers, *experts_LTA.shape[1:]), np.int32)
  return np.concatenate([dense, experts_LTA]).transpose(1, 0, 2)
