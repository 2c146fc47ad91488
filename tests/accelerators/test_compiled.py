"""What compiled TPU and GPU programs hold: kernels, sums across devices, precision."""

import re
import subprocess
import sys

import pytest

from fact_jax.plan.hlo import read_collectives, read_kernels
from fact_jax.plan.targets import gpu_target, tpu_target
from tests.accelerators.programs import LEVELS, as_argument

TARGETS = {"tpu": tpu_target("v5e:2x2"), "cuda": gpu_target("h100", 4)}
FUSED = {
    "tpu": ["splash_mha_dkv_no_residuals", "splash_mha_fwd_residuals"],
    "cuda": ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"],
}
ATTENTIONS = [f"attention-{level}-{keys}" for level in LEVELS for keys in ("faces", "text")]
ATTENTIONS += ["attention-large-masked", "attention-middle-masked"]
STEPS = ["step-bfloat16", "step-float32", "step-tf32"]


@pytest.fixture(scope="module", params=list(TARGETS))
def programs(request, tmp_path_factory):
    """The platform, and the text of each program compiled for it."""
    target, folder = TARGETS[request.param], tmp_path_factory.mktemp(request.param)
    names = [f"{name}-bfloat16" for name in ATTENTIONS] + ["attention-large-faces-float32", *STEPS]
    command = [sys.executable, "-m", "tests.accelerators.programs", as_argument(target)]
    subprocess.run([*command, str(folder), *names], env=target.environment(), check=True)
    return request.param, {name: (folder / name).read_text() for name in names}


def test_attention_is_fused_forwards_and_backwards(programs):
    """Also under regions, at key counts that fill no tile, and without gathering the batch."""
    platform, texts = programs
    for name in ATTENTIONS:
        text = texts[f"{name}-bfloat16"]
        level, keys = name.split("-")[1:]
        n, width = LEVELS[level]
        kernels = read_kernels(text)
        if (platform == "cuda" and width > 128) or (keys == "text" and n < 4096):
            # What is compiled without the GPU is for heads that any GPU takes; small matrices
            # are kept for the backward pass.
            assert not set(kernels) & set(FUSED[platform])
            continue
        assert [kernels.get(kernel) for kernel in FUSED[platform]] == [1, 1], name
        assert read_collectives(text) == []


def test_float32_has_no_kernel_of_16_bits(programs):
    platform, texts = programs
    kernels = read_kernels(texts["attention-large-faces-float32"])
    assert not set(kernels) & set(FUSED[platform])


def test_gradients_cross_devices_once_in_float32(programs):
    """Two microbatches, one sum; no other array than the gradient's and scalars is summed."""
    _, texts = programs
    text = texts["step-bfloat16"]
    kinds = r"(?:all-reduce|reduce-scatter)"
    summed = re.findall(rf"= \(?(\w+)\[[\d,]+\].* {kinds}(?:-start)?\(", text)
    assert set(summed) - {"pred"} == {"f32"}  # pred: whether all is finite
    sums = [one for one in read_collectives(text) if one.kind in ("all-reduce", "reduce-scatter")]
    assert {one.times for one in sums} == {1}


def test_sums_over_tokens_are_in_float32(programs):
    """Statistics, softmax, loss and the gradients of gates, biases and norms."""
    _, texts = programs
    text = texts["step-bfloat16"]
    # The sum may be rounded: what is asked is in which numbers it is added up.
    added_in = dict(re.findall(r"^(%[\w.-]+) \(.*-> (\w+)\[\]\S* \{$", text, re.MULTILINE))
    sums = re.findall(r"\w+\[(\d*)\]\S* reduce\(.*to_apply=(%[\w.-]+).*reduce_sum", text)
    assert {added_in[region] for _, region in sums} == {"f32"}
    roots = re.findall(r"(\w+)\[[\d,]*\]\S* (?:rsqrt|sqrt)\(", texts["step-bfloat16"])
    assert set(roots) == {"f32"}


def test_the_step_is_fused_too(programs):
    platform, texts = programs
    kernels = read_kernels(texts["step-bfloat16"])
    assert all(kernels.get(kernel, 0) >= 14 for kernel in FUSED[platform])  # 2 a block


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_of_float32_are_what_they_are_called(programs, precision):
    platform, texts = programs
    wanted = {"float32": "highest", "tf32": "high"}[precision]
    # Masks are resized in float32 whatever is asked.
    lines = texts[f"step-{precision}"].splitlines()
    text = "\n".join(line for line in lines if "ph,...hw,qw->...pq" not in line)
    if platform == "tpu":
        found = re.findall(r"f32\S* (?:dot|convolution)\(.*", text)
        assert found
        wrong = [line for line in found if f"operand_precision={{{wanted},{wanted}}}" not in line]
    else:
        found = re.findall(r"f32\S*.*custom-call\(.*__cublas\$lt\$matmul.*", text)
        assert found
        precise = rf'"operand_precision":\["{wanted.upper()}","{wanted.upper()}"\]'
        wrong = [line for line in found if not re.search(precise, line)]
    assert wrong == []
