"""The text of a program read into records: by hand-written modules, and one that XLA wrote."""

import jax
import jax.numpy as jnp
import pytest

from intellect3.planning import hlo, memory

MODULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8])->f32[8]}

FileNames
1 "/somewhere/site-packages/flax/scan.py"
2 "/somewhere/intellect3/models/layers.py"

FunctionNames
1 "scan"
2 "layer"

FileLocations
1 {file_name_id=2 function_name_id=2 line=31 end_line=31 column=2 end_column=9}
2 {file_name_id=1 function_name_id=1 line=157 end_line=157 column=2 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%body (arg: (s32[], f32[8], f32[4,8])) -> (s32[], f32[8], f32[4,8]) {
  %arg = (s32[], f32[8]{0}, f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %w = f32[4,8]{1,0} get-tuple-element(%arg), index=2
  %y = f32[8]{0} multiply(%x, %x), metadata={op_name="jit(f)/while/body/mul" stack_frame_id=2}
  ROOT %t = (s32[], f32[8]{0}, f32[4,8]{1,0}) tuple(%i, %y, %w)
}

%condition (arg.1: (s32[], f32[8], f32[4,8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}, f32[4,8]{1,0}) parameter(0)
  ROOT %done = pred[] constant(false)
}

%yes (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} parameter(0)
}

%no (b: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} parameter(0)
}

ENTRY %main (p: f32[4,8]) -> f32[8] {
  %p = f32[4,8]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="p"}
  %zero = s32[] constant(0)
  %x0 = bf16[2,8]{1,0} constant({...})
  %start = (s32[], f32[8]{0}, /*index=2*/f32[4,8]{1,0}) tuple(%zero, %p, %p)
  %loop = (s32[], f32[8]{0}, f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"},"known_init_step":{"init":"0","step":"1"}}
  %again = (s32[], f32[8]{0}, f32[4,8]{1,0}) while(%loop), condition=%condition, body=%body, \
metadata={op_name="jit(f)/again"}
  %flag = pred[] constant(true)
  %picked = f32[8]{0} conditional(%flag, %p, %p), true_computation=%yes, false_computation=%no
  ROOT %out = f32[8]{0} get-tuple-element(%again), index=1
}
"""


def test_instructions_say_what_they_are():
  module = hlo.parse(MODULE)
  assert module.entry == "main" and module.scheduled
  assert set(module.computations) == {"body", "condition", "yes", "no", "main"}
  main = module.computations["main"]
  assert [i.name for i in main.instructions][:3] == ["p", "zero", "x0"]
  assert main.by_name["p"].shapes == (hlo.Shape("f32", (4, 8)),)
  assert main.by_name["p"].literal == "0"
  assert main.by_name["x0"].bytes == 32
  start = main.by_name["start"]
  assert start.operands == ("zero", "p", "p") and start.bytes == 4 + 32 + 128
  assert [shape.dims for shape in start.shapes] == [(), (8,), (4, 8)]
  assert main.root.name == "out" and main.root.opcode == "get-tuple-element"
  assert main.by_name["loop"].called("body") == ("body",)


def test_computations_run_as_often_as_their_loops():
  runs = [(computation.name, times) for computation, times in hlo.parse(MODULE).walk()]
  assert runs == [("main", 1), ("body", 4), ("body", 1), ("yes", 1), ("no", 1)]
  assert hlo.parse(MODULE).unknown_loops() == ("jit(f)/again",)


def test_loops_in_loops_multiply():
  nested = MODULE.replace(
    "  %y = f32[8]{0} multiply",
    "  %inner = (f32[8]{0}) while(%x), condition=%condition, body=%yes, "
    'backend_config={"known_trip_count":{"n":"3"}}\n  %y = f32[8]{0} multiply',
  )
  runs = [(computation.name, times) for computation, times in hlo.parse(nested).walk()]
  assert runs[:3] == [("main", 1), ("body", 4), ("yes", 12)]


COUNTED = """HloModule m, is_scheduled=true

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %x)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(8)
  ROOT %below = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %one = s32[] constant(1)
  %copy = s32[] copy(%one)
  %start = (s32[], f32[8]{0}) tuple(%copy, %p)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
  ("old", "new", "trips"),
  [
    ("", "", 4),  # from 1 by 2 to below 8: 1, 3, 5, 7
    ("constant(8)", "constant(1)", 0),
    ("constant(2)", "constant(1)", 7),
    ("direction=LT", "direction=NE", None),
    ("%next = s32[] add(%i, %two)", "%next = s32[] multiply(%i, %two)", None),
    ("%limit = s32[] constant(8)", "%limit = s32[] get-tuple-element(%arg.1), index=0", None),
  ],
)
def test_a_loop_that_xla_leaves_uncounted_shows_how_often_it_runs(old, new, trips):
  """As on TPUs, whose text has no `known_trip_count`."""
  module = hlo.parse(COUNTED.replace(old, new))
  assert module.computations["main"].by_name["loop"].trip_count == trips
  assert len(module.unknown_loops()) == (trips is None)


def test_an_array_on_the_host_is_known_by_its_layout():
  (here, there, near) = hlo.shapes_of("(f32[4]{0:T(128)}, bf16[6,4]{1,0:S(5)}, f32[4]{0:T(8)S(1)})")
  assert (here.space, there.space, near.space) == (0, hlo.HOST, 1)


def test_the_innermost_frame_of_the_package_is_named():
  module = hlo.parse(MODULE)
  y = module.computations["body"].by_name["y"]
  assert module.source(y, "intellect3/") == "intellect3/models/layers.py:31"
  assert module.source(y, "flax/") == "flax/scan.py:157"
  assert module.source(y, "torch/") == "jit(f)/while/body/mul"


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("f32[2,3]{1,0}", 24),
    ("(bf16[2,3], s32[])", 16),
    ("pred[7]", 7),
    ("s4[3]", 2),
    ("f8e4m3fn[5]", 5),
    ("token[]", 0),
    ("f32[<=8,2]", 64),
  ],
)
def test_bytes_of_types(text, size):
  assert sum(shape.bytes for shape in hlo.shapes_of(text)) == size


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="expected a computation marked ENTRY, got none"):
    hlo.parse("HloModule nothing\n")


def test_what_xla_writes_is_read_whole():
  """A scan of 5 with a product inside: its trip count, and every line an instruction."""

  def f(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, ws)

  text = jax.jit(f).lower(jnp.zeros((4, 8)), jnp.zeros((5, 8, 8))).compile().as_text()
  module = hlo.parse(text)
  written = sum(" = " in line and line.startswith("  ") for line in text.splitlines())
  assert sum(len(c.instructions) for c in module.computations.values()) == written
  times = {times for _, times in module.walk()}
  assert 5 in times and module.unknown_loops() == ()


def test_residuals_of_a_scan_are_what_its_layers_keep():
  """grad of 6 checkpointed layers over f32[4, 32] keeps each one's input: 6 * 4 * 32 * 4 bytes."""

  def loss(ws, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None))
    return jnp.sum(jax.lax.scan(layer, x, ws)[0] ** 2)

  compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((6, 32, 32)), jnp.zeros((4, 32))).compile()
  assert memory.saved_bytes(hlo.parse(compiled.as_text())) == 6 * 4 * 32 * 4
