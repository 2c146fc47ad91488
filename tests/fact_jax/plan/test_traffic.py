"""Memory traffic of short programs by hand."""
# ruff: noqa: E501  (the compiler's lines are long)

import pytest

from fact_jax.plan.hbm_traffic import hbm_bytes

ENTRY = """%fused.1 (param.2: f32[8,128], param.3: f32[8,128]) -> f32[8,128] {
  %param.2 = f32[8,128]{1,0} parameter(0)
  %param.3 = f32[8,128]{1,0} parameter(1)
  %twice.4 = f32[8,128]{1,0} add(%param.2, %param.2)
  ROOT %add.5 = f32[8,128]{1,0} add(%twice.4, %param.3)
}

ENTRY %main.6 (p.7: f32[8,128], q.8: f32[8,128]) -> f32[8,128] {
  %p.7 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q.8 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %bitcast.9 = f32[1024]{0} bitcast(%p.7)
  %fusion.10 = f32[8,128]{1,0:T(8,128)} fusion(%p.7, %q.8), kind=kLoop, calls=%fused.1
  ROOT %multiply.11 = f32[8,128]{1,0:T(8,128)} multiply(%fusion.10, %q.8)
}
"""

LOOP = """%slice_one.1 (param.2: f32[6,4], param.3: s32[]) -> f32[4] {
  %param.2 = f32[6,4]{1,0} parameter(0)
  %param.3 = s32[] parameter(1)
  %zero.4 = s32[] constant(0)
  %slice.5 = f32[1,4]{1,0} dynamic-slice(%param.2, %param.3, %zero.4), dynamic_slice_sizes={1,4}
  ROOT %row.6 = f32[4]{0} bitcast(%slice.5)
}

%write_one.7 (param.8: f32[6,4], param.9: f32[4], param.10: s32[]) -> f32[6,4] {
  %param.8 = f32[6,4]{1,0} parameter(0)
  %param.9 = f32[4]{0} parameter(1)
  %row.11 = f32[1,4]{1,0} bitcast(%param.9)
  %param.10 = s32[] parameter(2)
  %zero.12 = s32[] constant(0)
  ROOT %update.13 = f32[6,4]{1,0} dynamic-update-slice(%param.8, %row.11, %param.10, %zero.12)
}

%cond.14 (t.15: (s32[], f32[6,4], f32[6,4])) -> pred[] {
  %t.15 = (s32[], f32[6,4]{1,0}, f32[6,4]{1,0}) parameter(0)
  %i.16 = s32[] get-tuple-element(%t.15), index=0
  %six.17 = s32[] constant(6)
  ROOT %less.18 = pred[]{:S(6)} compare(%i.16, %six.17), direction=LT
}

%body.19 (t.20: (s32[], f32[6,4], f32[6,4])) -> (s32[], f32[6,4], f32[6,4]) {
  %t.20 = (s32[], f32[6,4]{1,0}, f32[6,4]{1,0}) parameter(0)
  %i.21 = s32[]{:S(6)} get-tuple-element(%t.20), index=0
  %all.22 = f32[6,4]{1,0} get-tuple-element(%t.20), index=1
  %out.23 = f32[6,4]{1,0} get-tuple-element(%t.20), index=2
  %row.24 = f32[4]{0:S(1)} fusion(%all.22, %i.21), kind=kLoop, calls=%slice_one.1
  %new.25 = f32[6,4]{1,0} fusion(%out.23, %row.24, %i.21), kind=kLoop, calls=%write_one.7
  ROOT %tuple.26 = (s32[], f32[6,4]{1,0}, f32[6,4]{1,0}) tuple(%i.21, %all.22, %new.25)
}

ENTRY %main.27 (p.28: f32[6,4]) -> (s32[], f32[6,4], f32[6,4]) {
  %p.28 = f32[6,4]{1,0} parameter(0)
  ROOT %while.29 = (s32[], f32[6,4]{1,0}, f32[6,4]{1,0}) while(%init.30), condition=%cond.14, body=%body.19
}
"""


def test_a_fusion_is_one_instruction():
    """Two operands in and a result out, twice; 4,096 B each. Nothing inside of a fusion counts."""
    assert hbm_bytes(ENTRY) == 6 * 4096


def test_what_stays_on_the_chip_is_free():
    """The fusion's result, written and read once, in the chip's own memory."""
    near = ENTRY.replace(
        "%fusion.10 = f32[8,128]{1,0:T(8,128)}", "%fusion.10 = f32[8,128]{1,0:S(1)}"
    )
    assert hbm_bytes(near) == 4 * 4096


def test_loop_reads_and_writes_slices():
    """Six rounds: a row of 16 B read, one written into its place, and a counter compared (8 B)."""
    assert hbm_bytes(LOOP) == 6 * (16 + 16) + 6 * 8


def test_fetching_ahead_counts_once():
    text = """ENTRY %main.1 (p.2: f32[64]) -> f32[64] {
  %p.2 = f32[64]{0} parameter(0)
  %copy-start.3 = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%p.2)
  ROOT %copy-done.4 = f32[64]{0:S(1)} copy-done(%copy-start.3)
}
"""
    assert hbm_bytes(text) == 256


def test_fetching_a_slice_ahead_reads_the_slice():
    """The compiler's own lines: 1 of 3 parts of 393,216 bytes is read, and stays on the chip."""
    text = """ENTRY %main.1 (p.2: f32[3,3,256,128]) -> f32[1,3,256,128] {
  %p.2 = f32[3,3,256,128]{3,2,1,0:T(8,128)} parameter(0)
  %slice-start.8 = ((f32[3,3,256,128]{3,2,1,0:T(8,128)}), f32[1,3,256,128]{3,2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p.2), slice={[0:1], [0:3], [0:256], [0:128]}
  ROOT %slice-done.8 = f32[1,3,256,128]{3,2,1,0:T(8,128)S(1)} slice-done(%slice-start.8)
}
"""
    assert hbm_bytes(text) == 393216
    far = text.replace("T(8,128)S(1)", "T(8,128)")
    assert hbm_bytes(far) == 2 * 393216


def test_a_slice_reads_no_more_than_itself():
    """Alone and in a fusion: 2 of 64 rows of 16 B."""
    alone = """ENTRY %main.1 (p.2: f32[64,4]) -> f32[2,4] {
  %p.2 = f32[64,4]{1,0} parameter(0)
  ROOT %slice.3 = f32[2,4]{1,0} slice(%p.2), slice={[0:2], [0:4]}
}
"""
    assert hbm_bytes(alone) == 2 * 32
    fused = """%fused.1 (param.2: f32[64,4]) -> f32[2,4] {
  %param.2 = f32[64,4]{1,0} parameter(0)
  %slice.3 = f32[2,4]{1,0} slice(%param.2), slice={[0:2], [0:4]}
  ROOT %exp.4 = f32[2,4]{1,0} exponential(%slice.3)
}

ENTRY %main.5 (p.6: f32[64,4]) -> f32[2,4] {
  %p.6 = f32[64,4]{1,0} parameter(0)
  ROOT %fusion.7 = f32[2,4]{1,0} fusion(%p.6), kind=kLoop, calls=%fused.1
}
"""
    assert hbm_bytes(fused) == 2 * 32


def test_what_a_collective_starts_with_is_no_result():
    """8 numbers go in, 16 come out."""
    text = """ENTRY %main.1 (p.2: f32[8]) -> f32[16] {
  %p.2 = f32[8]{0} parameter(0)
  %start.3 = (f32[8]{0}, f32[16]{0}) all-gather-start(%p.2), replica_groups={{0,1}}, dimensions={0}
  ROOT %done.4 = f32[16]{0} all-gather-done(%start.3)
}
"""
    assert hbm_bytes(text) == 4 * (8 + 16)


def test_slices_in_a_fusion_of_a_fusion():
    """As on the TPU, where a product fetches its operand's slice itself."""
    inner = LOOP[: LOOP.index("%write_one.7")]
    outer = """%product.40 (param.41: f32[6,4], param.42: s32[]) -> f32[4] {
  %param.41 = f32[6,4]{1,0} parameter(0)
  %param.42 = s32[]{:S(6)} parameter(1)
  %row.43 = f32[4]{0} fusion(%param.41, %param.42), kind=kLoop, calls=%slice_one.1
  ROOT %exp.44 = f32[4]{0} exponential(%row.43)
}

ENTRY %main.45 (p.46: f32[6,4], i.47: s32[]) -> f32[4] {
  %p.46 = f32[6,4]{1,0} parameter(0)
  %i.47 = s32[]{:S(6)} parameter(1)
  %space.48 = f32[6,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %fusion.49 = f32[4]{0} fusion(%p.46, %i.47), kind=kOutput, calls=%product.40
}
"""
    assert hbm_bytes(inner + outer) == 16 + 16


def test_scratch_space_of_a_library_is_free():
    text = """ENTRY %main.1 (p.2: f32[64]) -> f32[64] {
  %p.2 = f32[64]{0} parameter(0)
  %call.3 = (f32[64]{0}, s8[4096]{0}) custom-call(%p.2), custom_call_target="__cublas$lt$matmul"
  ROOT %out.4 = f32[64]{0} get-tuple-element(%call.3), index=0
}
"""
    assert hbm_bytes(text) == 2 * 64 * 4
    assert hbm_bytes(text.replace("__cublas$lt$matmul", "other")) == 2 * 64 * 4 + 4096


def test_a_called_computation_counts_as_it_stands():
    """A GPU's command buffer; what a reduction applies is part of the reduction."""
    text = """%command_buffer.1 (p.2: f32[64]) -> f32[64] {
  %p.2 = f32[64]{0} parameter(0)
  ROOT %sine.3 = f32[64]{0} sine(%p.2)
}

%add.4 (a.5: f32[], b.6: f32[]) -> f32[] {
  %a.5 = f32[] parameter(0)
  %b.6 = f32[] parameter(1)
  ROOT %sum.7 = f32[] add(%a.5, %b.6)
}

ENTRY %main.8 (q.9: f32[64]) -> f32[] {
  %q.9 = f32[64]{0} parameter(0)
  %zero.10 = f32[] constant(0)
  %called.11 = f32[64]{0} call(%q.9), to_apply=%command_buffer.1
  ROOT %total.12 = f32[] reduce(%called.11, %zero.10), dimensions={0}, to_apply=%add.4
}
"""
    assert hbm_bytes(text) == 2 * 256 + (256 + 4 + 4)


@pytest.mark.parametrize(("keys", "parts"), [(4224, 1), (8448, 2)])
def test_a_kernel_reads_again_what_does_not_fit_on_the_chip(keys, parts):
    """4,224 keys do: read once. Twice as many: forwards they are read for each of four tiles of
    queries, backwards queries and their gradients for both halves of the keys."""
    one, many = "bf16[1,2,48,2048]{3,2,1,0}", f"bf16[1,2,48,{keys}]{{3,2,1,0}}"

    def program(name, operands, shapes):
        return (
            "ENTRY %main.1 (q.2: bf16[1], k.3: bf16[1], v.4: bf16[1]) -> bf16[1] {\n"
            f"  %q.2 = {one} parameter(0)\n  %k.3 = {many} parameter(1)\n"
            f"  %v.4 = {many} parameter(2)\n  %mask.5 = s8[1]{{0}} constant(0)\n"
            f"  ROOT %{name}.6 = {one} custom-call(%mask.5, %mask.5, {operands}), "
            'custom_call_target="tpu_custom_call", '
            f"operand_layout_constraints={{s8[1]{{0}}, s8[1]{{0}}, {shapes}}}, metadata={{}}\n}}\n"
        )

    q, k = 2 * 2048 * 48 * 2, 2 * keys * 48 * 2
    reads = 1 if parts == 1 else 4
    forward = program("splash_mha_fwd", "%q.2, %k.3, %v.4", f"{one}, {many}, {many}")
    assert hbm_bytes(forward) == 2 + q + reads * 2 * k + q
    back = program("splash_mha_dkv", "%q.2, %k.3, %v.4, %q.2", f"{one}, {many}, {many}, {one}")
    assert hbm_bytes(back) == 2 + parts * 2 * q + 2 * k + q
