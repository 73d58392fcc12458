"""Chat templates, beside transformers' own rendering of them."""

import json
import pathlib

import pytest

from intellect3.rendering import chat_template
from intellect3.rendering.chat_template import ChatTemplate
from intellect3.rendering.tokenizer_files import write_tokenizer

MODEL = pathlib.Path(__file__).resolve().parents[1] / "data" / "sglang" / "model_a"
TOOLS = [{"type": "function", "function": {"name": "f<>", "parameters": {"é": [1, None]}}}]
MESSAGES = [
  {"role": "system", "content": "Be brief & true."},
  {"role": "user", "content": "weather in <Paris>?"},
  {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f<>", "arguments": {"a": "x", "b": [1, "é"]}}}],
  },
  {"role": "tool", "content": "sunny"},
]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(tools, variables):
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
  expected = tokenizer.apply_chat_template(
    MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True, **variables
  )
  assert chat_template.load(MODEL).render(MESSAGES, tools=tools, **variables) == expected


def test_blocks_leave_no_space_behind():
  """As transformers sets Jinja up: the line of a block is nothing."""
  source = "a\n  {% if true %}\nb\n  {% endif %}\nc"
  assert ChatTemplate(source).render([]) == "a\nb\nc"


@pytest.mark.parametrize(
  ("source", "takes"),
  [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
    ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", True),
    ("{% for p in messages[0]['content'] %}{{ p }}{% endfor %}", True),
    ("{% macro text(content) %}{% for i in content %}{{ i }}{% endfor %}{% endmacro %}", True),
  ],
)
def test_templates_that_take_parts_are_known(source, takes):
  assert ChatTemplate(source).takes_parts is takes


def test_the_template_is_found_where_models_keep_it(tmp_path):
  assert chat_template.load(tmp_path) is None
  write_tokenizer(tmp_path)
  messages = [{"role": "user", "content": "hi"}]
  expected = chat_template.load(tmp_path).render(messages)
  assert "hi" in expected
  (tmp_path / "chat_template.jinja").unlink()
  assert chat_template.load(tmp_path).render(messages) == expected
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  named = [{"name": "default", "template": "{{ eos_token }}"}, {"name": "x", "template": "y"}]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
  assert chat_template.load(tmp_path).render(messages) == config["eos_token"]
  other = tmp_path / "other.jinja"
  other.write_text("{{ messages | length }}")
  assert chat_template.load(tmp_path, other).render(messages) == "1"
  with pytest.raises(ValueError, match="nowhere"):
    chat_template.load(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize(
  "source",
  [
    "{{ raise_exception('no system') }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ missing.attribute }}",
  ],
)
def test_what_a_template_may_not_do_is_a_value_error(source):
  with pytest.raises(ValueError, match="chat template"):
    ChatTemplate(source).render([])


def test_a_broken_template_is_told_at_once():
  with pytest.raises(ValueError, match="chat template"):
    ChatTemplate("{% if %}")
