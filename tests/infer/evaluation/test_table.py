"""The table of an evaluation."""

import math

from fact_infer.evaluation.table import COLUMNS, SECTIONS, cell, plain_table, table
from fact_jax.metrics.intervals import Estimate


def test_table_shows_shares_in_percent_and_leaves_unknown_cells_blank():
    measures = {
        "rank_one/fact": Estimate(0.5, 0.25, 0.75, 4),
        "skin/base": Estimate(0.125, 0.1, 0.15, 4),
    }
    text = plain_table(measures, ["a note"])
    (rank,) = [line for line in text.splitlines() if "rank-1" in line]
    assert rank.split("photos")[1].strip() == "50 % [25, 75]"
    (skin,) = [line for line in text.splitlines() if line.strip().startswith("skin")]
    assert skin.split() == ["skin", "0.125", "[0.100,", "0.150]"]
    assert text.endswith("\n\na note\n")
    assert len({len(line) for line in text.splitlines() if "[" in line}) == 1
    assert len(COLUMNS) == 3
    assert len({row.key for rows in SECTIONS.values() for row in rows}) == sum(
        map(len, SECTIONS.values())
    )


def test_sections_without_measures_are_left_out_and_blocks_get_lines():
    measures = {
        "fair/fact": Estimate(0.2, 0.1, 0.3, 4),
        "fair/down.0.0.0/fact": Estimate(0.5, 0.4, 0.6, 4),
    }
    ((title, lines),) = table(measures)
    assert title.startswith("Leakage")
    assert [label for label, _ in lines] == ["FAIR, mean of all blocks", "FAIR, down.0.0.0"]


def test_a_number_without_an_interval_stands_alone():
    assert cell(Estimate(0.25, math.nan, math.nan, 9), share=False) == "0.250"
