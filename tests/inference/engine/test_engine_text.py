"""Texts of ids, whole and growing, beside the tokenizers library's own."""

import pytest
import tokenizers
from engine_http import MODEL_A
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from intellect3.inference.engine import text
from intellect3.inference.engine.text import Text, Unfolding

WITNESS = tokenizers.Tokenizer.from_file(str(MODEL_A / "tokenizer.json"))
TEXT = text.load(MODEL_A, 512)
IDS = st.lists(st.integers(0, 511), max_size=30)
USER = WITNESS.token_to_id("<|user|>")


@settings(max_examples=500, deadline=None)
@given(IDS, st.booleans())
def test_texts_are_those_of_the_library(ids, skip):
  assert TEXT.decode(ids, skip) == WITNESS.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=30))
def test_ids_are_those_of_the_library(string):
  assert TEXT.encode(string, special=False) == WITNESS.encode(string, add_special_tokens=False).ids


def test_one_token_has_a_name_and_bytes():
  assert TEXT.name(USER) == "<|user|>" and TEXT.bytes_of(USER) == b"<|user|>"
  assert TEXT.name(129) == "\ufffd" and len(TEXT.bytes_of(129)) == 1


@settings(max_examples=300, deadline=None)
@given(st.lists(IDS, max_size=6), st.booleans())
def test_a_growing_text_is_never_taken_back(pieces, skip):
  unfolding = Unfolding(TEXT, skip_special_tokens=skip, stop_strings=("ab", "hello"))
  told, ids = "", []
  for piece in pieces:
    ids += piece
    told += unfolding.feed(piece)
    assert TEXT.decode(ids, skip).startswith(told)


def test_what_waits_is_half_a_character_or_half_a_stop_string():
  euro = TEXT.encode("\N{EURO SIGN}", special=False)
  assert len(euro) == 3
  unfolding = Unfolding(TEXT, skip_special_tokens=True, stop_strings=("ho!",))
  ids = [*TEXT.encode("x", special=False), *euro, *TEXT.encode("h", special=False)]
  assert [unfolding.feed([index]) for index in ids] == ["x", "", "", "\N{EURO SIGN}", ""]
  assert unfolding.feed(TEXT.encode("o", special=False)) == ""
  assert unfolding.feed(TEXT.encode("p", special=False)) == "hop"


def first_match(ids, stops):
  """By the text of every prefix: the length at which a stop string is there, and which."""
  for length in range(1, len(ids) + 1):
    whole = b"".join(TEXT.bytes_of(index) for index in ids[:length])
    for stop in stops:
      if stop.encode() in whole:
        return length, stop
  return None


@settings(max_examples=300, deadline=None)
@given(
  st.lists(st.sampled_from([*range(64, 80), 129, 300, 310, USER]), min_size=1, max_size=25),
  st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=3),
)
def test_stop_strings_end_where_they_first_stand(ids, slices):
  said = TEXT.decode(ids, False).replace("\ufffd", "?")
  stops = [said[start : start + length] or "?" for start, length in slices]
  found = None
  for length in range(1, len(ids) + 1):
    matched = TEXT.match_stop(ids[:length], tuple(stops))
    if matched is not None:
      found = length, matched
      break
  assert found == first_match(ids, stops)


def test_a_special_token_can_be_a_stop_string():
  assert TEXT.match_stop([70, USER], ("nothing", "<|user|>")) == "<|user|>"


@pytest.mark.parametrize(("keep", "expected"), [(False, "one "), (True, "one two")])
def test_a_stop_string_is_cut_off_with_all_that_follows(keep, expected):
  assert text.trim("one two three two", "two", keep=keep) == expected
  assert text.trim("one", "two", keep=keep) == "one"


def test_other_vocabularies_are_refused(tmp_path):
  words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
  with pytest.raises(ValueError, match="ByteLevel"):
    Text(words, 512)
  words.decoder = decoders.ByteLevel()
  assert Text(words, 2).decode([0, 1], True) == "a"
  with pytest.raises(ValueError, match="expected ids below"):
    Text(WITNESS, 100)
  assert text.load(tmp_path, 512) is None
