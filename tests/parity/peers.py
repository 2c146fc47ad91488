"""Models of diffusers and transformers with random weights, and ours through the converter."""

import jax
import numpy as np
import torch

from fact_convert import load_state


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Matrices of unit gain, so that attention is not flat; norms and biases no longer trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3**0.5
            else:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def convert(kind: str, peer: torch.nn.Module, extra: dict[str, np.ndarray] | None = None):
    """Our model with the peer's weights, and perhaps an adapter's beside them."""
    state = {key: tensor.numpy() for key, tensor in peer.state_dict().items()}
    config = peer.config.to_dict() if kind == "clip_text" else dict(peer.config)
    return load_state(kind, state | (extra or {}), config)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """To a tensor; pictures and latents to channels first."""
    tensor = torch.from_numpy(np.array(x))
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def channels_last(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """A peer's output as an array; pictures and latents to channels last."""
    x = np.asarray(x)
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def assert_close(ours: jax.Array, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    """Same shape, a peer's output of order one, and no element further off than the tolerance."""
    print(f"largest difference {np.abs(np.asarray(ours) - theirs).max():.1e}")
    assert 0.1 < theirs.std() < 10
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, strict=True)
