"""Against what the released FACT code computed, from the golden files."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fact_convert import load_state
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.diffusion.samplers import SAMPLERS
from fact_jax.fact import Guidance, encode_face, guided_model, null_face
from tests.parity.peers import assert_close, channels_last

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def transface(golden):
    state, metadata = golden("transface", "state.")
    return load_state("transface", state, json.loads(metadata["config"]))


@pytest.fixture(scope="module")
def resampler(golden):
    state, metadata = golden("resampler", "state.")
    return load_state("resampler", state, json.loads(metadata["config"]))


def inputs(golden, name: str) -> types.SimpleNamespace:
    tensors = golden(name, "in.")[0]
    return types.SimpleNamespace(**{k: jnp.asarray(channels_last(v)) for k, v in tensors.items()})


def outputs(golden, name: str) -> dict[str, np.ndarray]:
    return {key: channels_last(array) for key, array in golden(name, "out.")[0].items()}


def test_transface(golden, transface):
    graph, state = nnx.split(transface)
    image = inputs(golden, "transface").image
    tokens, embedding = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, image)
    expected = outputs(golden, "transface")
    assert_close(tokens, expected["local"])
    assert_close(embedding, expected["global"])


def test_resampler(golden, resampler):
    graph, state = nnx.split(resampler)
    tokens = inputs(golden, "resampler").tokens
    run = jax.jit(lambda s, x: nnx.merge(graph, s)(x))
    expected = outputs(golden, "resampler")
    assert_close(run(state, tokens), expected["face_tokens"])
    assert_close(run(state, 0 * tokens), expected["null_face_tokens"])


def test_null_face(golden, resampler):
    """'No face' of 3 photos is that of one photo three times."""
    expected = outputs(golden, "resampler")["null_face_tokens"][:1]
    graph, state = nnx.split(resampler)
    count = inputs(golden, "resampler").tokens.shape[1]
    ours = jax.jit(lambda s: null_face(nnx.merge(graph, s), count, photos=3))(state)
    assert_close(ours, np.tile(expected, (1, 3, 1)))


def test_encode_face(golden, transface, resampler):
    """Crops to face tokens, photo after photo: two people of three photos each."""
    image = np.asarray(inputs(golden, "transface").image)
    crops = np.stack([image, image[::-1], -image], axis=1)
    modules = nnx.split((transface, resampler))

    @jax.jit
    def run(state, crops):
        return encode_face(*nnx.merge(modules[0], state), crops)

    tokens = run(modules[1], crops)
    assert tokens.shape == (2, 48, 24)
    np.testing.assert_allclose(tokens[0, :16], tokens[1, 16:32], rtol=0, atol=1e-5)
    np.testing.assert_allclose(tokens[0, 16:32], tokens[1, :16], rtol=0, atol=1e-5)
    assert np.abs(tokens[0, :16] - tokens[1, :16]).max() > 0.1


@pytest.fixture(scope="module")
def unet(golden):
    base, metadata = golden("unet_adapter", "unet.")
    adapters, _ = golden("unet_adapter", "adapter.")
    assert sum(key.endswith("alpha_attn") and value != 0 for key, value in adapters.items()) == 16
    return nnx.split(load_state("unet", base | adapters, json.loads(metadata["unet_config"])))


def test_noise_prediction(golden, unet):
    """With the face, and with scale 0, which the released code found equal to the base."""
    graph, state = unet
    given, expected = inputs(golden, "unet_adapter"), outputs(golden, "unet_adapter")

    @jax.jit
    def run(state, scale):
        unet = nnx.merge(graph, state)
        return unet(given.latents, given.timesteps, given.text, given.face, face_scale=scale)

    assert_close(run(state, 1.0), expected["noise_pred"])
    silent = run(state, 0.0)
    assert_close(silent, expected["base_noise_pred"])
    base = jax.jit(lambda s: nnx.merge(graph, s)(given.latents, given.timesteps, given.text))
    np.testing.assert_array_equal(silent, base(state))


def test_final_latents(golden, unet):
    """A whole generation under guidance; the adapter's keys are computed once."""
    graph, state = unet
    given, settings = inputs(golden, "unet_adapter"), golden("unet_adapter", "out.")[1]
    assert settings["cfg_face"] == "True", "the negative branch has its own face"
    steps = int(settings["steps"])
    guidance = Guidance(text=float(settings["guidance"]), face_scale=float(settings["scale"]))

    @jax.jit
    def run(state):
        model = guided_model(
            nnx.merge(graph, state),
            text=given.text,
            negative_text=given.negative_text,
            face=given.face,
            no_face=given.negative_face,
            guidance=guidance,
            steps=steps,
        )
        sample = SAMPLERS[settings["scheduler"]]
        return sample(model, given.latents, NoiseSchedule.sd15(), steps=steps)

    assert_close(run(state), outputs(golden, "unet_adapter")["final_latents"])
