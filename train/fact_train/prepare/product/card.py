"""The data set's card: what is in it, from where, under which licences, made by what."""

from typing import Any


def card(summary: dict[str, Any]) -> str:
    """A card in Markdown, whose head Hugging Face reads."""
    licences = list(summary["licences"])
    known = licences[0] if len(licences) == 1 and licences[0] != "not told" else "other"
    lines = [
        "---",
        f"license: {known}",
        "task_categories: [text-to-image]",
        f"size_categories: ['{_size(summary['records'])}']",
        "---",
        "",
        "# Records of faces",
        "",
        f"{summary['records']:,} photos of {summary['people']:,} people, {_shapes(summary)} "
        f"pixels, aligned crops of {summary['crop']} x {summary['crop']}: a "
        "tensorflow_datasets folder of array_record shards "
        '(`tfds.data_source("face_records", data_dir=...)`).',
        "",
        f"Of {summary['in']:,} photos {summary['rejected']:,} were rejected (`rejected.jsonl`).",
        "",
        *_table(
            "Splits", summary["splits"], lambda one: f"{one['records']:,} of {one['people']:,}"
        ),
        *_table("Rejected", summary["reasons"], str),
        *_table("Licences of the photos", summary["licences"], str),
        *_table("Consent of the people shown", summary["consent"], str),
        *_table("Sources", summary["sources"], str),
        *_table("Made by", summary["made_by"], str),
        *_table("Models", summary["models"], _model),
        *_table("Gates", summary["settings"].get("gates", {}), str),
        "## Withdrawn consent",
        "",
        f"{summary.get('removed', 0) + summary['reasons'].get('removed', 0):,} photos were "
        "removed or left out at the request of people shown "
        "(`fact-train data remove OUT --person ID`).",
        "",
    ]
    return "\n".join(lines)


def _shapes(summary: dict[str, Any]) -> str:
    """Height and width, with counts if there are several."""
    shapes = summary["shapes"]
    return ", ".join(
        f"{shape} ({n:,})" if len(shapes) > 1 else shape for shape, n in shapes.items()
    )


def _model(about: dict[str, Any]) -> str:
    licence = about["licence"] or "not told by any file beside it"
    return f"`{about['file']}`, SHA-256 `{about['sha256']}`, licence: {licence}"


def _table(title: str, rows: dict[str, Any], text: Any) -> list[str]:
    if not rows:
        return []
    cells = [f"| {_cell(key)} | {_cell(text(value))} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")[:300]


def _size(count: int) -> str:
    """Hugging Face's classes of sizes."""
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    return names[min(max(len(str(count)) - 3, 0), len(names) - 1)]
