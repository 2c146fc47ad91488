"""Splitting and merging nested dicts, and the proof that nothing is left out."""

import pytest

from fact_train.engine.partition import assert_covers, merge, paths, split_by_paths

TREE = {"a": {0: {"face": {"alpha": 1}}, 1: {"kernel": 2}}, "face_out": 3, "b": {"face": {"k": 4}}}


def test_split_and_merge_are_inverse():
    chosen, rest = split_by_paths(TREE, [r"/face/"])
    assert chosen == {"a": {0: {"face": {"alpha": 1}}}, "b": {"face": {"k": 4}}}
    assert rest == {"a": {1: {"kernel": 2}}, "face_out": 3}
    assert merge(rest, chosen) == TREE
    assert dict(paths(chosen)) == {"a/0/face/alpha": 1, "b/face/k": 4}


def test_a_pattern_without_a_leaf_is_an_error():
    with pytest.raises(ValueError, match="no parameter matches '/fase/'"):
        split_by_paths(TREE, ["/face/", "/fase/"])


def test_merging_what_overlaps_is_an_error():
    with pytest.raises(ValueError, match="b/face/k is in both"):
        merge(TREE, {"b": {"face": {"k": 5}}})


def test_cover_lists_every_difference():
    assert_covers(["a", "b", "c"], ["a"], ["b", "c"])
    with pytest.raises(ValueError) as caught:
        assert_covers(["a", "b", "c", "d"], ["a", "b", "x"], ["b", "y"])
    message = str(caught.value)
    assert "on neither side: c, d" in message
    assert "on both sides: b" in message
    assert "trainable but not in the model: x" in message
    assert "frozen but not in the model: y" in message
