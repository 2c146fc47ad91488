"""Verdicts on made-up scores whose truth is known: false alarms, power, several claims."""

import numpy as np
import pytest

from fact_train.lab.question import Claim
from fact_train.lab.verdicts import LEVEL, difference, verdicts

PEOPLE, SEEDS = 96, 3


def claims(count, expected="above"):
    return [
        Claim(variant=f"v{i}", measure="another", difference=expected, source="s")
        for i in range(count)
    ]


def experiment(draw, shifts, by_seed, by_person=0.12, rest=0.1):
    """Scores of FACT and of a variant for each shift; the three numbers are of the differences."""
    fact = draw.normal(0.3, 0.2, size=(SEEDS, PEOPLE))
    found = {"fact": {"another": fact}}
    for i, shift in enumerate(shifts):
        apart = by_seed * draw.normal(size=(SEEDS, 1)) + by_person * draw.normal(size=PEOPLE)
        apart = apart + rest * draw.normal(size=(SEEDS, PEOPLE)) + shift
        found[f"v{i}"] = {"another": fact + apart}
    return found


@pytest.mark.parametrize("by_seed", [0.0, 0.01, 0.1])
def test_false_alarms_of_one_claim_are_as_rare_as_is_said(by_seed):
    draw = np.random.default_rng(0)
    words = [verdicts(claims(1), experiment(draw, [0.0], by_seed))[0].word for _ in range(1500)]
    alarms = 1 - words.count("open") / len(words)
    # 0.05 to 0.07, and of 1,500 draws three standard deviations.
    assert 0.02 < alarms < 0.07 + 3 * (0.07 * 0.93 / 1500) ** 0.5


def test_any_false_alarm_among_many_claims_is_rare_too():
    draw = np.random.default_rng(1)
    rounds = 300
    any_alarm = sum(
        any(v.word != "open" for v in verdicts(claims(24), experiment(draw, [0.0] * 24, 0.01)))
        for _ in range(rounds)
    )
    alone = sum(
        any(
            v.difference.low > 0 or v.difference.high < 0
            for v in verdicts(claims(24), experiment(draw, [0.0] * 24, 0.01))
        )
        for _ in range(100)
    )
    assert any_alarm / rounds < LEVEL + 0.04
    assert alone > 50  # without the correction


def test_what_is_there_is_found_with_its_sign():
    draw = np.random.default_rng(2)
    found = {"holds": 0, "refuted": 0, "open": 0}
    for _ in range(100):
        scores = experiment(draw, [0.12, -0.12, *[0.0] * 22], 0.01)
        first, second, *_ = verdicts(claims(24), scores)
        found[first.word] += 1
        assert second.word in ("refuted", "open")
        found[second.word] += second.word == "refuted"
    assert found["holds"] >= 90
    assert found["refuted"] >= 90


def test_a_side_that_was_not_expected_is_a_refutation():
    scores = experiment(np.random.default_rng(3), [0.3], 0.001)
    for expected, word in (("above", "holds"), ("below", "refuted")):
        (found,) = verdicts(claims(1, expected), scores)
        assert found.word == word
        assert found.adjusted < 1e-6
        assert found.difference.low > 0.2


def test_seeds_that_diverged_are_left_out_and_nothing_is_no_verdict():
    scores = experiment(np.random.default_rng(4), [0.3, 0.0], 0.001)
    scores["v0"]["another"][1] = np.nan
    scores["v1"]["another"][:] = np.nan
    assert difference(scores, "v0", "another").shape == (2, PEOPLE)
    first, second = verdicts(claims(2), scores)
    assert (first.word, second.word) == ("holds", "not measured")
    scores["v1"] = {}
    assert verdicts(claims(2), scores)[1].word == "not measured"


def test_equal_pictures_are_no_difference():
    scores = experiment(np.random.default_rng(5), [0.0], 0.0, 0.0, 0.0)
    (found,) = verdicts(claims(1), scores)
    assert (found.word, found.adjusted) == ("open", 1.0)
    assert found.difference[:3] == (0.0, 0.0, 0.0)
