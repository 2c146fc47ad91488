"""LyCORIS' files merged as its formulas, written out here in float64, say."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from fact_convert.lora import merge_lora, read_lora

LINEAR = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
CONV = "mid_block.resnets.0.conv1"
BASE = {LINEAR: (8, 24), CONV: (6, 4, 3, 3)}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / 2


def tucker(core, a, b):
    """out, in, height, width of a core (r, s, h, w) with factors (r, out) and (s, in)."""
    return np.einsum("rshw,ro,si->oihw", core, a, b)


def loha(p):
    return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])


def loha_tucker(p):
    one, other = (tucker(p[f"hada_t{i}"], p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]) for i in (1, 2))
    return one * other


def lokr(p):
    one = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_t2" in p:
        other = tucker(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        other = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    if other.ndim == 2:
        return np.kron(one, other)
    kernel = [[np.kron(one, other[:, :, i, j]) for j in range(3)] for i in range(3)]
    return np.array(kernel).transpose(2, 3, 0, 1)


def locon(p):
    up, down = (p[f"lora_{part}.weight"][..., 0, 0] for part in ("up", "down"))
    return tucker(p["lora_mid.weight"], up.T, down)


def pair(name: str, rows: int, rank: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}


def factors(name: str, rank: int, outer: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Of a Tucker decomposition, with its core."""
    core = name.replace("w", "t")
    return {f"{name}_a": (rank, outer), f"{name}_b": (rank, inner), core: (rank, rank, 3, 3)}


THREE = {
    "lora_up.weight": (6, 3, 1, 1),
    "lora_mid.weight": (3, 2, 3, 3),
    "lora_down.weight": (2, 4, 1, 1),
}
CASES = {
    "LoHa": (LINEAR, loha, 4, pair("hada_w1", 8, 4, 24) | pair("hada_w2", 8, 4, 24)),
    "LoHa, flat": (CONV, loha, 2, pair("hada_w1", 6, 2, 36) | pair("hada_w2", 6, 2, 36)),
    "LoHa, Tucker": (
        *(CONV, loha_tucker, 2),
        factors("hada_w1", 2, 6, 4) | factors("hada_w2", 2, 6, 4),
    ),
    "LoKr": (LINEAR, lokr, 3, {"lokr_w1": (2, 4)} | pair("lokr_w2", 4, 3, 6)),
    "LoKr, both": (LINEAR, lokr, 3, pair("lokr_w1", 2, 3, 4) | pair("lokr_w2", 4, 3, 6)),
    "LoKr, first": (LINEAR, lokr, 3, pair("lokr_w1", 2, 3, 4) | {"lokr_w2": (4, 6)}),
    # Nothing to divide by: LyCORIS' scale of two full matrices is 1.
    "LoKr, full": (LINEAR, lokr, None, {"lokr_w1": (2, 4), "lokr_w2": (4, 6)}),
    "LoKr, kernel": (CONV, lokr, None, {"lokr_w1": (2, 2), "lokr_w2": (3, 2, 3, 3)}),
    "LoKr, flat": (CONV, lokr, 2, {"lokr_w1": (2, 2)} | pair("lokr_w2", 3, 2, 18)),
    "LoKr, Tucker": (CONV, lokr, 2, {"lokr_w1": (2, 2)} | factors("lokr_w2", 2, 3, 2)),
    "LoCon, three parts": (CONV, locon, 2, THREE),
}
MAGNITUDES = {"plain": None, "DoRA": 0, "DoRA of inputs": 1}


@pytest.mark.parametrize("axis", MAGNITUDES.values(), ids=MAGNITUDES)
@pytest.mark.parametrize(("module", "product", "rank", "shapes"), CASES.values(), ids=CASES)
def test_as_its_formulas(module, product, rank, shapes, axis, tmp_path):
    shape = BASE[module]
    state = {part: normal(i, *size) for i, (part, size) in enumerate(shapes.items())}
    exact = {part: array.astype(np.float64) for part, array in state.items()}
    weight = normal(90, *shape)
    alpha, scalar, scale = 3.0, 0.75, 1 if axis is not None else 0.6
    state |= {"alpha": np.array(alpha, np.float32), "scalar": np.array(scalar, np.float32)}
    changed = scale * scalar * (alpha / rank if rank else 1) * product(exact).reshape(shape)
    wanted = weight.astype(np.float64) + changed
    if axis is not None:
        sizes = [n if i == axis else 1 for i, n in enumerate(shape)]
        state["dora_scale"] = 1 + np.abs(normal(91, *sizes))
        wanted *= state["dora_scale"] / np.linalg.norm(
            np.moveaxis(wanted, axis, 0).reshape(shape[axis], -1), axis=1
        ).reshape(sizes)
        assert wanted.shape == shape
    name = f"lora_unet_{module.replace('.', '_')}"
    save_file({f"{name}.{key}": a for key, a in state.items()}, tmp_path / "x.safetensors")
    merged = merge_lora(
        {"unet": {f"{module}.weight": weight}}, read_lora(tmp_path / "x.safetensors"), scale
    )
    found = np.asarray(merged["unet"][f"{module}.weight"])
    assert np.abs(wanted - weight).max() > 0.05
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


def test_without_alpha(tmp_path):
    """Then it is the rank: the factor is 1."""
    name = f"lora_unet_{LINEAR.replace('.', '_')}"
    state = {part: normal(i, *size) for i, (part, size) in enumerate(CASES["LoHa"][3].items())}
    save_file({f"{name}.{key}": a for key, a in state.items()}, tmp_path / "x.safetensors")
    (layer,) = read_lora(tmp_path / "x.safetensors").layers
    np.testing.assert_allclose(layer.delta(), loha(state), atol=1e-6)
    assert (layer.alpha, layer.rank, layer.algorithm) == (4, 4, "LoHa")
