"""What is watched: fixed pictures, and numbers that mean what they say."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from fact_jax.portraits import SPLITS
from fact_jax.portraits.metric_networks import IdentityNet, save_network
from fact_jax.sharding import MeshConfig, make_mesh
from fact_jax.utils.errors import UserError
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.validation import (
    PEOPLE,
    IdentityScores,
    ValidationCallback,
    draw_validation,
)
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def task(miniature):
    return AdapterTask(tiny_config(miniature))


@pytest.fixture(scope="module")
def validation(task):
    return draw_validation(task.size, task.encoder.config.img_size)


def test_templates_show_somebody_else_whom_nothing_else_sees(validation):
    from fact_train.data.portraits import draw_portraits

    first = len(SPLITS["test"]) - PEOPLE
    own, other = (draw_portraits("test", PEOPLE, 1, offset=i, size=16, first=first) for i in (0, 1))
    np.testing.assert_array_equal(validation.photos, own.images)
    for i in range(PEOPLE):
        following = (i + 1) % PEOPLE
        np.testing.assert_array_equal(validation.templates[i], other.images[following])
        np.testing.assert_array_equal(validation.points[i], other.portrait.points[following])
        assert validation.captions[i] == other.captions[following]


def test_records_to_watch_that_are_not_there_are_told_when_they_are_opened(task, tmp_path):
    other = copy.copy(task)
    other.options = dataclasses.replace(task.options, validation=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        other.open_samples()


def test_pictures_and_numbers(task, validation):
    trainable, frozen = task.init(jax.random.key(0))
    watch = ValidationCallback(task, validation, make_mesh(MeshConfig()))
    silent = watch(trainable, frozen, jax.random.key(1))
    assert silent["template-base-fact"].shape == silent["reference-base-fact"].shape
    # The adapter adds nothing yet: FACT is the base.
    assert silent["validation/outside_change"] == silent["validation/inside_change"] == 0
    assert silent["validation/similarity"] == silent["validation/similarity_base"]
    loud = jax.tree.map(lambda leaf: leaf + 0.3, trainable)
    heard = watch(loud, frozen, jax.random.key(1))
    assert heard["validation/similarity_base"] == silent["validation/similarity_base"]
    assert heard["validation/similarity"] != silent["validation/similarity"]
    assert heard["validation/outside_change"] > 0
    assert -1 <= heard["validation/similarity"] <= 1


def test_a_judge_sees_whom_pictures_show(validation, tmp_path):
    """Its targets are true photos of the same people: shown themselves, they are as good as can be.
    Templates with the next person's own face are the wrong person's."""
    save_network(IdentityNet(rngs=nnx.Rngs(3)), tmp_path / "recogniser.safetensors")
    given = dataclasses.replace(
        validation,
        points=np.tile(validation.points[:1], (PEOPLE, 1, 1)),
        masks=np.ones_like(validation.masks),
    )
    judge = IdentityScores(tmp_path, given)
    own = np.roll(given.templates, 1, axis=0)
    found = judge(own, given.templates)
    assert found["validation/judge_target"] == pytest.approx(1.0, abs=1e-5)
    assert found["validation/judge_copy_paste"] == pytest.approx(-1.0, abs=1e-3)
    assert found["validation/judge_rank_one"] == 1.0
    assert found["validation/judge_rank_one_base"] == 0.0
    assert found["validation/judge_over_wrong"] == pytest.approx(
        1.0 - found["validation/judge_target_base"], abs=1e-5
    )


def test_the_best_may_be_known_by_the_judge(miniature):
    with pytest.raises(ValueError, match="best_by=judge_target takes a judge"):
        tiny_config(miniature, best_by="judge_target")
    config = tiny_config(miniature, judge="j", best_by="judge_target")
    assert AdapterTask(config).score == "validation/judge_target"


def test_the_reference_itself_is_as_similar_as_can_be(task, validation):
    watch = ValidationCallback(task, validation, make_mesh(MeshConfig()))
    same = (watch._identities(validation.crops) * watch._wanted).sum(-1)
    np.testing.assert_allclose(same, 1.0, rtol=1e-5)
