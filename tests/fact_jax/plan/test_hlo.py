"""Collectives read from short programs in the compiler's own language."""
# ruff: noqa: E501  (its lines are long)

import pytest

from fact_jax.plan.hlo import Collective, array_bytes, read_collectives, read_kernels, summarize

SUMS = """HloModule jit_train_step

%region_1.5 (a.6: f32[], b.7: f32[]) -> f32[] {
  %a.6 = f32[]{:T(128)} parameter(0)
  %b.7 = f32[]{:T(128)} parameter(1)
  ROOT %add.8 = f32[]{:T(128)} add(%a.6, %b.7)
}

ENTRY %main.9 (p0.1: f32[64,128], p1.2: bf16[8]) -> f32[64,128] {
  %p0.1 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = (f32[]{:T(128)}, /*index=1*/f32[64,128]{1,0:T(8,128)S(1)}) all-reduce(%x, %p0.1), channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%region_1.5
  %all-gather.4 = bf16[32]{0} all-gather(%p1.2), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %start.5 = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%p1.2), replica_groups={{0,1},{2,3}}, dimensions={0}
  %done.6 = bf16[16]{0} all-gather-done(%start.5)
  ROOT %scatter.7 = f32[16,128]{1,0} reduce-scatter(%p0.1), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, to_apply=%region_1.5
}
"""

FUSED = """%all-reduce-scatter.1 (param.2: f32[64,128]) -> f32[16,128] {
  %param.2 = f32[64,128]{1,0} parameter(0)
  %all-reduce.3 = f32[64,128]{1,0} all-reduce(%param.2), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %dynamic-slice.4 = f32[16,128]{1,0} dynamic-slice(%all-reduce.3, %i, %z), dynamic_slice_sizes={16,128}
}

ENTRY %main.9 (p0.1: f32[64,128]) -> f32[16,128] {
  %p0.1 = f32[64,128]{1,0} parameter(0)
  ROOT %fusion.5 = f32[16,128]{1,0} fusion(%p0.1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""

LOOP = """%cond.1 (t.2: (s32[], f32[4])) -> pred[] {
  %t.2 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  %constant.4 = s32[]{:T(128)} constant(6)
  ROOT %compare.5 = pred[]{:T(512)} compare(%i.3, %constant.4), direction=LT
}

%body.6 (t.7: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t.7 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %all-reduce.8 = f32[4]{0} all-reduce(%x.9), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %tuple.10 = (s32[]{:T(128)}, f32[4]{0}) tuple(%i.3, %all-reduce.8)
}

ENTRY %main.11 (p.12: f32[4]) -> (s32[], f32[4]) {
  ROOT %while.13 = (s32[]{:T(128)}, f32[4]{0}) while(%init.14), condition=%cond.1, body=%body.6
}
"""


def one(kind, size, arrays, group, times=1):
    return Collective(kind=kind, bytes=size, arrays=arrays, group=group, times=times)


def test_every_kind():
    """A tuple is the sum of its arrays; started ones count once; a scatter by what goes in."""
    assert read_collectives(SUMS) == [
        one("all-reduce", 4 + 4 * 64 * 128, 2, 4),
        one("all-gather", 2 * 32, 1, 4),
        one("all-gather", 2 * 16, 1, 2),
        one("reduce-scatter", 4 * 64 * 128, 1, 4),
    ]


@pytest.mark.parametrize(
    ("groups", "group", "stride"),
    [
        ("[2,4]<=[8]", 4, 1),
        ("[8,2]<=[2,8]T(1,0)", 2, 8),
        ("[4,4]<=[2,4,2]T(1,0,2)", 4, 1),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, 4),
        ("{{0},{1}}", 1, 1),
        ("mesh['data'=2,'fsdp'=4,'tensor'=2] {'data'}", 2, 8),
        ("mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}", 4, 2),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8, 1),
    ],
)
def test_groups_and_their_strides(groups, group, stride):
    text = LOOP.replace("[1,4]<=[4]", groups)
    (found,) = read_collectives(text)
    assert (found.group, found.stride) == (group, stride)


SLICES = """ENTRY %main.1 (p.1: f32[4,128]) -> f32[4,128] {
  %send = (f32[4,128]{1,0:T(4,128)}, u32[], token[]) send(%p.1, %after-all), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2,3,4}x{0:255}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.1 = (f32[2]{0}, u32[], token[]) send(%q.1, %after-all), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{0:1}x{0:7}",_xla_megascale_transfer_type="ALL_GATHER"}
}
"""


def test_between_slices_the_hosts_send():
    common = {"arrays": 1, "times": 1}
    assert read_collectives(SLICES) == [
        Collective(kind="all-reduce", bytes=2048, group=4, stride=256, **common),
        Collective(kind="all-gather", bytes=16, group=2, stride=8, **common),
    ]


def test_a_started_scatter_counts_what_goes_in_once():
    line = "%scatter.7 = f32[16,128]{1,0} reduce-scatter("
    started = "%scatter.7 = ((f32[64,128]{1,0}), f32[16,128]{1,0}) reduce-scatter-start("
    assert line in SUMS
    assert read_collectives(SUMS.replace(line, started)) == read_collectives(SUMS)


def test_scatter_inside_a_fusion():
    assert read_collectives(FUSED) == [one("reduce-scatter", 4 * 64 * 128, 1, 4)]


def test_loop_runs_as_often_as_its_condition_says():
    assert read_collectives(LOOP) == [one("all-reduce", 16, 1, 4, times=6)]
    known = LOOP.replace(
        "body=%body.6", 'body=%body.6, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert read_collectives(known) == [one("all-reduce", 16, 1, 4, times=9)]


def test_like_ones_together_largest_first():
    small, large = one("all-reduce", 4, 1, 8), one("all-gather", 100, 1, 8)
    assert summarize([small, large, small]) == [
        {"kind": "all-gather", "bytes": 100, "arrays": 1, "group": 8, "times": 1, "stride": 1},
        {"kind": "all-reduce", "bytes": 4, "arrays": 1, "group": 8, "times": 2, "stride": 1},
    ]


KERNELS = """%body.1 (t.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %flash.3 = f32[8]{0} custom-call(%x.4), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 8
}}, backend_config={}
}

ENTRY %main.5 (p.6: f32[8]) -> f32[8] {
  %buffer.7 = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %while.8 = (s32[], f32[8]{0}) while(%init.9), condition=%cond.10, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %matmul.11 = (f32[8]{0}, s8[64]{0}) custom-call(%p.6), custom_call_target="__cublas$lt$matmul"
  ROOT %flash.12 = f32[8]{0} custom-call(%p.6), custom_call_target="tpu_custom_call"
}
"""


def test_kernels_by_name():
    """One in a loop of three rounds, whose description goes over several lines, and one outside."""
    assert read_kernels(KERNELS) == {"__cublas$lt$matmul": 1, "flash": 4}


def test_arrays_lie_in_whole_tiles():
    assert array_bytes("bf16", "3,5,40") == 3 * 5 * 40 * 2
    assert array_bytes("bf16", "3,5,40", "{2,1,0:T(8,128)(2,1)}") == 3 * 8 * 128 * 2
    assert array_bytes("f32", "40,3,5", "{0,2,1:T(8,128)}") == 3 * 8 * 128 * 4
    assert array_bytes("f32", "300", "{0:T(256)}") == 512 * 4
