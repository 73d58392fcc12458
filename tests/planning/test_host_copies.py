"""Copies between a device and its host: forms that XLA writes, by hand, and their time."""

import pytest

from intellect3.planning import hardware, hlo, host_copies, memory, schedule, table

MODULE = """HloModule m, is_scheduled=true

%put (a: bf16[6,4], b: bf16[1,4], i: s32[]) -> bf16[6,4] {
  %a = bf16[6,4]{1,0:S(5)} parameter(0)
  %b = bf16[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = bf16[6,4]{1,0:S(5)} dynamic-update-slice(%a, %b, %i, %i)
}

%take (c: bf16[6,4], j: s32[]) -> bf16[1,4] {
  %c = bf16[6,4]{1,0:S(5)} parameter(0)
  %j = s32[] parameter(1)
  ROOT %s = bf16[1,4]{1,0} dynamic-slice(%c, %j, %j), dynamic_slice_sizes={1,4}
}

ENTRY %main (x: bf16[1,4], n: s32[], w: f32[100]) -> bf16[1,4] {
  %x = bf16[1,4]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %w = f32[100]{0} parameter(2)
  %kept = bf16[6,4]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %away = ((bf16[6,4]{1,0:S(5)}, bf16[1,4]{1,0}, s32[]), bf16[6,4]{1,0:S(5)}, u32[]) \
fusion-start(%kept, %x, %n), kind=kCustom, calls=%put
  %work = f32[100]{0} copy(%w)
  %gone = bf16[6,4]{1,0:S(5)} fusion-done(%away)
  %back = ((bf16[6,4]{1,0:S(5)}, s32[]), bf16[1,4]{1,0}, u32[]) \
fusion-start(%gone, %n), kind=kLoop, calls=%take
  %here = bf16[1,4]{1,0} fusion-done(%back)
  %whole = (bf16[1,4]{1,0:S(5)}, bf16[1,4]{1,0}, u32[]) copy-start(%here)
  %moved = bf16[1,4]{1,0:S(5)} copy-done(%whole)
  %now = bf16[1,4]{1,0} copy(%moved)
  ROOT %out = bf16[1,4]{1,0} add(%now, %here)
}
"""


@pytest.fixture(scope="module")
def module():
  return hlo.parse(MODULE)


def test_what_crosses_the_bus_is_found(module):
  """Of a stack on the host only the slice travels; what stays on one side is none."""
  main = module.computations["main"]
  found = [host_copies.find(i, main, module) for i in main.instructions]
  assert [tuple(one) for one in found if one is not None] == [
    ("away", "d2h", 8, True),
    ("back", "h2d", 8, True),
    ("whole", "d2h", 8, True),
    ("now", "h2d", 8, False),
  ]


def test_a_copy_runs_beside_kernels_and_is_waited_for(module):
  """8 bytes at 1 byte/s each; the 800 bytes of `work` hide the first one whole."""
  fast = {"memory_rate": 100.0, "matrix_share": 1.0, "kernel_share": 1.0}
  device = hardware.Hardware(
    memory=10**9,
    node=8,
    matrix_rate={"f32": 1.0},
    inner=1.0,
    outer=1.0,
    host=1.0,
    host_memory=1.0,
    latency=1e-12,
    launch=1e-12,
    memory_share=1.0,
    link_share=1.0,
    **fast,
  )
  line = schedule.timeline(module, device, {"fsdp": 1}, [0])
  assert [round(one.exposed_seconds, 3) for one in line.copies] == [0.0, 8.0, 8.0, 8.0]
  assert line.host_seconds == pytest.approx(24.0)
  assert line.seconds == pytest.approx(8 + 24 + 24 / 100)  # the closing sum moves 24 bytes
  assert line.exposed_seconds == 0.0


def test_what_lies_on_the_host_is_no_buffer_of_the_device(module):
  assert all(buffer.array != "bf16[6,4]" for buffer in memory.biggest(module))


def test_copies_stand_in_the_table():
  row = {"kind": "d2h", "count": 6, "bytes": 2e9, "seconds": 0.5, "exposed_seconds": 0.125}
  lines = table.host_lines([row])
  assert lines[1].split() == ["d2h", "6", "2.000", "0.5000", "0.3750", "0.1250"]
