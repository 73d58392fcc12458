"""A schedule run in thought: kernels one after the other, collectives beside them; by hand."""

import dataclasses

import pytest

from intellect3.planning import hardware, hlo, plan, schedule

# One byte, one operation a second: times are counts. No kernel has a launch, no collective a start.
UNIT = hardware.Hardware(
  memory=10**9,
  node=8,
  matrix_rate={"f32": 1.0, "bf16": 2.0},
  memory_rate=1.0,
  inner=1.0,
  outer=1.0,
  host=1.0,
  host_memory=1.0,
  latency=1e-12,
  launch=1e-12,
  matrix_share=1.0,
  kernel_share=1.0,
  memory_share=1.0,
  link_share=1.0,
)
AXES, NODES = {"fsdp": 2}, [0, 0]

HEAD = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[4], b: f32[8,4], c: f32[4,2]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %c = f32[4,2]{1,0} parameter(2)
"""
START = (
  "  %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}\n"
)
DONE = "  %gd = f32[8]{0} all-gather-done(%g)\n"
COPY = "  %copy.N = f32[4]{0} copy(%a)\n"  # reads 16, writes 16: 32 s
DOT = "  %dot = f32[8,2]{1,0} dot(%b, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
END = "  ROOT %out = f32[4]{0} copy(%a)\n}\n"


def run(*lines, device=UNIT):
  text = HEAD + "".join(line.replace(".N", f".{n}") for n, line in enumerate(lines)) + END
  return schedule.timeline(hlo.parse(text), device, AXES, NODES)


def test_a_collective_alone_is_waited_for():
  """16 of the 32 bytes come from the other device; the closing copy takes 32."""
  line = run(START, DONE)
  (event,) = line.events
  assert (event.seconds, event.exposed_seconds) == (pytest.approx(16), pytest.approx(16))
  assert line.seconds == pytest.approx(16 + 32)
  assert line.exposed_seconds == pytest.approx(16)


def test_compute_between_start_and_done_hides_it():
  line = run(START, COPY, DONE)
  assert line.events[0].exposed_seconds == 0.0
  assert line.seconds == pytest.approx(32 + 32)


def test_what_compute_does_not_cover_is_exposed():
  slow = dataclasses.replace(UNIT, inner=0.25)  # 64 s of sending behind 32 s of copying
  line = run(START, COPY, DONE, device=slow)
  assert line.events[0].exposed_seconds == pytest.approx(32)
  assert line.seconds == pytest.approx(64 + 32)


def test_a_synchronous_collective_hides_behind_nothing():
  """XLA marks what it runs on the compute stream, and writes others in one instruction."""
  marked = START.replace("\n", ', backend_config={"collective_backend_config":{"is_sync":true}}\n')
  whole = "  %r = f32[4]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add\n"
  assert run(marked, COPY, DONE).events[0].exposed_seconds == pytest.approx(16)
  assert run(COPY, whole).events[0].exposed_seconds == pytest.approx(16)


def test_collectives_share_the_link():
  """The second begins when the first is over: 16 + 16 behind 32 s of copying."""
  other = START.replace("%g ", "%h ")
  line = run(START, other, COPY, DONE, DONE.replace("%gd", "%hd").replace("%g)", "%h)"))
  assert [event.exposed_seconds for event in line.events] == pytest.approx([0, 0], abs=1e-6)
  line = run(START, other, DONE, DONE.replace("%gd", "%hd").replace("%g)", "%h)"))
  assert [event.exposed_seconds for event in line.events] == pytest.approx([16, 16])


def test_a_product_is_bound_by_arithmetic_or_by_memory():
  """[8, 4] @ [4, 2]: 2 * 8 * 2 * 4 operations on (32 + 8 + 16) * 4 bytes."""
  line = run(DOT)
  assert line.matrix_flops == 128
  assert line.memory_bytes == 224 + 32
  assert line.memory_seconds == pytest.approx(224 + 32) and line.matrix_seconds == 0.0
  slow = dataclasses.replace(UNIT, matrix_rate={"f32": 0.1})
  assert run(DOT, device=slow).matrix_seconds == pytest.approx(1280)


FUSIONS = """HloModule m, is_scheduled=true

%sliced (p: f32[48,4], i: s32[]) -> f32[1,4] {
  %p = f32[48,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,4]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,4}
  ROOT %n = f32[1,4]{1,0} negate(%s)
}

%updated (p.1: f32[48,4], u: f32[1,4], i.1: s32[]) -> f32[48,4] {
  %p.1 = f32[48,4]{1,0} parameter(0)
  %u = f32[1,4]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %d = f32[48,4]{1,0} dynamic-update-slice(%p.1, %u, %i.1, %i.1)
}

%product (x: bf16[8,4], y: bf16[4,2]) -> f32[8,2] {
  %x = bf16[8,4]{1,0} parameter(0)
  %y = bf16[4,2]{1,0} parameter(1)
  ROOT %m = f32[8,2]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (w: f32[48,4], i: s32[], x: bf16[8,4], y: bf16[4,2]) -> f32[48,4] {
  %w = f32[48,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,4]{1,0} parameter(2)
  %y = bf16[4,2]{1,0} parameter(3)
  %row = f32[1,4]{1,0} fusion(%w, %i), kind=kLoop, calls=%sliced
  %m = f32[8,2]{1,0} fusion(%x, %y), kind=kCustom, calls=%product
  ROOT %back = f32[48,4]{1,0} fusion(%w, %row, %i), kind=kLoop, calls=%updated
}
"""


def test_fusions_read_slices_and_write_updates():
  module = hlo.parse(FUSIONS)
  main = module.computations["main"]
  moved = {
    name: schedule.memory_bytes(main.by_name[name], main, module) for name in ("row", "m", "back")
  }
  # A slice of 16 bytes, an index, the result; both factors and the product; an update in and out.
  assert moved == {"row": 16 + 4 + 16, "m": 64 + 16 + 64, "back": 16 + 4 + 16}
  assert schedule.matrix_flops(main.by_name["m"], main, module) == (128.0, "bf16")


LOOP = """HloModule m, is_scheduled=true

%body (t: (f32[4])) -> (f32[4]) {
  %t = (f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=0
  %r = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %u = (f32[4]{0}) tuple(%r)
}

ENTRY %main (t: (f32[4])) -> (f32[4]) {
  %t = (f32[4]{0}) parameter(0)
  %known = (f32[4]{0}) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  ROOT %unknown = (f32[4]{0}) while(%known), condition=%c, body=%body
}
"""


def test_loops_multiply_and_unknown_ones_are_marked():
  line = schedule.timeline(hlo.parse(LOOP), UNIT, AXES, NODES)
  assert [(event.times, event.in_unknown_loop) for event in line.events] == [(7, False), (1, True)]
  assert line.seconds == pytest.approx(8 * 16)
  assert line.exposed_seconds == pytest.approx(8 * 16)


LOOPED = """HloModule m, is_scheduled=true

%body (p: (f32[4])) -> (f32[4]) {
  %p = (f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %sent = f32[4]{0} all-to-all(%x), replica_groups={{0,1}}
  ROOT %t = (f32[4]{0}) tuple(%sent)
}

%condition (q: (f32[4])) -> pred[] {
  %q = (f32[4]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %start = (f32[4]{0}) tuple(%a)
  %loop = (f32[4]{0}) while(%start), condition=%condition, body=%body, \
metadata={op_name="jit(f)/moe/experts/nominal_rounds_3/while"}
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=0
}
"""


def test_a_loop_over_rounds_counts_as_often_as_it_is_told():
  """16 bytes of which a half is sent: 8 s a round; unknown it counts once, and says so."""
  module = hlo.parse(LOOPED)
  (event,) = schedule.timeline(module, UNIT, AXES, NODES).events
  assert (event.times, event.in_unknown_loop) == (1, True)
  told = hlo.with_nominal(module, plan.exchange_rounds)
  line = schedule.timeline(told, UNIT, AXES, NODES)
  assert (line.events[0].times, line.events[0].in_unknown_loop) == (3, False)
  assert line.seconds == pytest.approx(3 * 8)
  assert told.unknown_loops() == () and module.unknown_loops() != ()


@pytest.mark.parametrize(
  ("name", "rounds"),
  [
    ("jit(f)/moe/experts/nominal_rounds_8/while", 8),
    ("jit(f)/transpose(jvp(nominal_rounds_16))/while", 16),
    ("jit(f)/nominal_rounds_8/while/body/while", None),  # one inside a round
    ("jit(f)/while", None),
  ],
)
def test_rounds_stand_in_the_name_of_their_loop(name, rounds):
  text = LOOPED.replace("jit(f)/moe/experts/nominal_rounds_3/while", name)
  loop = hlo.parse(text).computations["main"].by_name["loop"]
  assert plan.exchange_rounds(loop) == rounds


KERNEL = (
  '  %k.N = f32[4]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2", '
  'metadata={op_name="jit(f)/moe/experts/run"}\n'
)


def test_custom_kernels_take_the_time_they_are_told_and_hide_collectives():
  """Two kernels of 32 bytes share 100 s; a gather of 16 s starts before the first of them."""
  text = HEAD + START + KERNEL.replace(".N", ".1") + DONE + KERNEL.replace(".N", ".2") + END
  module = hlo.parse(text)
  plain = schedule.timeline(module, UNIT, AXES, NODES)
  assert plain.custom_bytes == {"experts": 64.0} and plain.kernel_seconds == 0.0
  line = schedule.timeline(module, UNIT, AXES, NODES, kernel_seconds={"experts": 100.0})
  assert line.seconds == pytest.approx(100 + 32)
  assert line.kernel_seconds == pytest.approx(100 - 64)  # beyond their memory traffic
  assert line.events[0].exposed_seconds == 0.0
