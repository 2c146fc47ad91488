"""docs/weights.md says what the tables say."""

import dataclasses
from pathlib import Path

from fact_convert import docs
from fact_convert.rules.key_tables import TABLES, Ignored, Rule
from fact_convert.rules.layer_transforms import LINEAR


def test_the_page_is_fresh():
    page = Path(__file__).parents[2] / "docs" / "weights.md"
    assert page.read_text(encoding="utf-8") == docs.page(), (
        "run python -m fact_convert.docs > docs/weights.md"
    )


def test_a_new_rule_shows(monkeypatch):
    before = docs.page()
    table = TABLES["vae"]
    rules = (*table.rules, Rule("odd", "quant_conv", LINEAR))
    ignored = (Ignored("fluff", "it is only an example"),)
    changed = dataclasses.replace(table, rules=rules, ignored=ignored)
    monkeypatch.setitem(TABLES, "vae", changed)
    new = set(docs.page().splitlines()) - set(before.splitlines())
    assert "| `odd` | `quant_conv` | linear | another name, read only |" in new
    assert "| `fluff` | it is only an example |" in new
