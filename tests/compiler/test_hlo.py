"""Collectives read from a program's text: kinds, shapes, groups and how often they run."""

import pytest

from emor3_jax.compiler import hlo

# ruff: noqa: E501 - lines as XLA writes them.

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_cond (p: (s32[], f32[8,4])) -> pred[] {
  %three = s32[]{:T(128)} constant(77)
  %p = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

%inner_body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %kernel = f32[2,4]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="kernel"}
  %part = f32[2,4]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %gathered = f32[8,4]{1,0:T(8,128)S(1)} all-gather(%part), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, metadata={op_name="jit(step)/while/body/layers/gather"}
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%q, %gathered)
}

%outer_cond (p: (s32[], f32[8,4])) -> pred[] {
  %five = s32[] constant(5)
  %ninety = s32[] constant(90)
  %p.1 = (s32[], f32[8,4]) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  %going = pred[] compare(%j, %ninety), direction=GT
  %before = pred[] compare(%j, %five), direction=LT
  ROOT %both = pred[] and(%before, %going)
}

%outer_body (r: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = (s32[], f32[8,4]) parameter(0)
  ROOT %loop.1 = (s32[], f32[8,4]) while(%r), condition=%inner_cond, body=%inner_body, backend_config={"known_trip_count":{"n":"3"},"x":1}
}

%fused (s: bf16[16]) -> bf16[4] {
  %s = bf16[16]{0} parameter(0)
  ROOT %scattered = bf16[4]{0} reduce-scatter(%s), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

%all-reduce-scatter.1.clone (t: f32[12]) -> f32[4] {
  %t = f32[12]{0} parameter(0)
  %padded = f32[16]{0} pad(%t, %t), padding=0_4
  %summed = f32[16]{0} all-reduce(%padded), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = f32[4]{0} dynamic-slice(%summed, %zero), dynamic_slice_sizes={4}
}

%called (u: f32[8]) -> f32[8] {
  %u = f32[8]{0} parameter(0)
  ROOT %exchanged = f32[8]{0} all-to-all(%u), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}, execution_thread="sparsecore"

%async (v: f32[8]) -> f32[8] {
  %v = f32[8]{0} parameter(0)
  ROOT %offloaded = f32[8]{0} custom-call(%v), custom_call_target="TODO", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (a: (s32[], f32[8,4]), b: bf16[16], c: f32[10]) -> f32[10] {
  %a = (s32[], f32[8,4]) parameter(0)
  %b = bf16[16]{0} parameter(1)
  %c = f32[10]{0} parameter(2)
  %loop.2 = (s32[], f32[8,4]) while(%a), condition=%outer_cond, body=%outer_body
  %f = bf16[4]{0} fusion(%b), kind=kCustom, calls=%fused
  %g = f32[4]{0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %start = (f32[10]{0}, f32[40]{0}, u32[]) all-gather-start(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[40]{0} all-gather-done(%start)
  %apart = ((), (), s32[]) async-start(), async_execution_thread="sparsecore", calls=%async
  %more = ((f32[8]{0}), f32[8]{0}, s32[]) async-update(%apart, %c)
  %end = f32[8]{0} async-done(%more)
  %sent = pred[10]{0} collective-permute(%c), source_target_pairs={{0,1},{1,0}}
  ROOT %all = f32[10]{0} all-reduce(%c), to_apply=%add
}
"""


def test_collectives_are_found_wherever_they_are_called() -> None:
    everything = hlo.collectives(TEXT, devices=8)
    found = {c.kind + "-" * c.depth: c for c in everything}
    assert found.keys() == {
        "all-gather--",
        "reduce-scatter",
        "all-gather",
        "collective-permute",
        "all-reduce",
        "all-to-all",
    }
    inner = found["all-gather--"]
    assert inner.shapes == (("f32", (8, 4)),)
    assert inner.source == "jit(step)/while/body/layers/gather"
    # A loop of 5 around a loop of 3; groups along the axis of size 4.
    assert (inner.times, inner.group, inner.size) == (15, 4, 128)
    assert inner.moved == 15 * 128 * 3 // 4
    # What stays, 8 bytes, comes from three others; so do 16 bytes of a sum that is then sliced.
    scattered = [c for c in everything if c.kind == "reduce-scatter"]
    assert [(c.group, c.moved) for c in scattered] == [(4, 24), (4, 48)]
    assert found["all-gather"].shapes == (("f32", (40,)),)
    assert found["all-gather"].moved == 120
    assert found["collective-permute"].moved == 10
    # Once, though three instructions are about it: half of 32 bytes.
    assert found["all-to-all"].moved == 16
    # Without groups all 8 take part.
    assert found["all-reduce"].moved == 2 * 40 * 7 // 8
    assert hlo.moved_bytes(everything) == {
        "all-gather": 1440 + 120,
        "all-reduce": 70,
        "reduce-scatter": 24 + 48,
        "all-to-all": 16,
        "collective-permute": 10,
    }


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [("bf16", (2, 3), 12), ("f32", (), 4), ("pred", (7,), 7), ("u8", (5,), 5), ("s64", (2,), 16)],
)
def test_sizes(kind: str, shape: tuple[int, ...], size: int) -> None:
    assert hlo.bytes_of(kind, shape) == size


def test_gathers_of_weights_are_told_from_others() -> None:
    gathers = [c for c in hlo.collectives(TEXT, 8) if c.kind == "all-gather"]
    assert hlo.weight_gathers(gathers, [(8, 4), (3, 9)]) == gathers[:1]
    # A layer of a stack of 7, and the whole of it.
    assert hlo.weight_gathers(gathers, [(7, 8, 4)]) == gathers[:1]
    assert hlo.weight_gathers(gathers, [(8, 1, 4)]) == gathers[:1]
    assert hlo.weight_gathers(gathers, [(4, 8)]) == []


WINDOWED = """\
%cond (p: (f32[4,6], u32[], s32[])) -> pred[] {{
  %bound = u32[]{{:T(128)}} constant({bound})
  %p = (f32[4,6]{{1,0}}, u32[]{{:T(128)}}, s32[]) parameter(0)
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=1
  ROOT %less = pred[]{{:T(512)}} compare(%i, %bound), direction=LT
}}

%body (q: (f32[4,6], u32[], s32[])) -> (f32[4,6], u32[], s32[]) {{
  %q = (f32[4,6]{{1,0}}, u32[]{{:T(128)}}, s32[]) parameter(0)
  %seven = u32[]{{:T(128)}} constant(7)
  %more = u32[]{{:T(128)}} constant({step})
  %part = f32[4,6]{{1,0}} get-tuple-element(%q), index=0
  %i.1 = u32[]{{:T(128)}} get-tuple-element(%q), index=1
  %shift = u32[]{{:T(128)}} add(%i.1, %seven)
  %passed = f32[4,6]{{1,0}} collective-permute(%part), source_target_pairs={{{{0,1}},{{1,0}}}}
  %i.2 = u32[]{{:T(128)}} add(%i.1, %more), metadata={{op_name="step"}}
  %k = s32[] get-tuple-element(%q), index=2
  ROOT %next = (f32[4,6]{{1,0}}, u32[]{{:T(128)}}, /*index=2*/s32[]) tuple(%passed, %i.2, /*index=2*/%k)
}}

ENTRY %main (a: (f32[4,6], u32[], s32[])) -> (f32[4,6], u32[], s32[]) {{
  %a = (f32[4,6], u32[], s32[]) parameter(0)
  ROOT %loop = (f32[4,6], u32[], s32[]) while(%a), condition=%cond, body=%body
}}
"""
"""A product that waits for parts of a matrix and passes them on, as the TPU's compiler writes it."""


@pytest.mark.parametrize(
    ("bound", "step", "times"), ((4, 1, 4), (4, 2, 2), (8, 2, 4), (7, 2, 4), (1, 2, 1))
)
def test_a_loop_whose_counter_is_unsigned_or_goes_by_twos(
    bound: int, step: int, times: int
) -> None:
    (passed,) = hlo.collectives(WINDOWED.format(bound=bound, step=step), devices=2)
    assert passed.kind == "collective-permute" and passed.times == times
    assert passed.moved == times * 4 * 6 * 4
