"""How the page looks: calm, of the system's own fonts, nothing loaded from elsewhere."""

import html
from typing import Any

import gradio as gr

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: no interface of Gradio's own beside ours, no veil over what is read."""
_SANS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]

THEME = gr.themes.Soft(
    primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=_SANS, font_mono=_MONO
).set(
    body_background_fill="#f6f7fb",
    body_background_fill_dark="#0f1117",
    block_shadow="0 1px 3px rgba(15, 23, 42, .07)",
    button_primary_background_fill="#4338ca",
    button_primary_background_fill_hover="#3730a3",
    block_info_text_color="#475569",
    body_text_color_subdued="#475569",
    block_label_text_color="#334155",
    block_label_background_fill="*block_background_fill",
    block_title_background_fill="transparent",
    block_title_text_color="#1e293b",
    block_title_text_color_dark="#e2e8f0",
    block_title_padding="0",
    checkbox_border_color="*neutral_400",
    input_border_width="1px",
    input_border_color="*neutral_300",
    slider_color="#6366f1",
)

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.7rem; font-weight: 650; letter-spacing: -.01em; margin: .6rem 0 .1rem; }
#title p, .hint p { color: #475569; margin: 0; }
.dark #title p, .dark .hint p { color: #a8b3c7; }
.hint p { font-size: .9rem; }
h2 { font-size: 1.05rem !important; font-weight: 620; margin: .2rem 0 0; }
.state { display: flex; flex-direction: column; gap: .45rem; min-height: 3.2rem; }
.state progress { appearance: none; width: 100%; height: .5rem; border-radius: 1rem; }
.state progress::-webkit-progress-bar { background: #e2e8f0; border-radius: 1rem; }
.state progress::-webkit-progress-value { background: #4338ca; border-radius: 1rem; }
.state progress::-moz-progress-bar { background: #4338ca; border-radius: 1rem; }
.state .wrong { color: #b42318; font-weight: 550; }
.dark .state .wrong { color: #fda29b; }
.state .notes { color: #475569; font-size: .85rem; margin: 0; padding-left: 1.1rem; }
.dark .state .notes { color: #a8b3c7; }
.plain .caption-label { display: none; }
.gradio-container main, main > .wrap, .contain, .tabs, .tabitem { width: 100% !important; }
.shown, .shown .gallery-container { min-height: 0 !important; height: auto !important; }
.shown .grid-wrap { min-height: 0 !important; height: auto !important; max-height: none; }
.shown .grid-container { grid-auto-rows: auto !important; }
.shown .thumbnail-lg { aspect-ratio: auto !important; height: auto !important; width: 100%; }
.shown img { object-fit: contain !important; }
.shown .grid-wrap { padding-top: 2rem; }
.plain .grid-wrap { padding-top: 0; }
.faces img { max-height: 200px; }
.made-up .grid-container { grid-template-columns: repeat(6, 1fr) !important; padding: .3rem; }
#pictures .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)) !important;
}
:focus-visible { outline: 3px solid #6366f1 !important; outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) {
  * { animation: none !important; transition: none !important; }
}
"""


def state(
    text: str,
    done: int = 0,
    total: int = 0,
    *,
    notes: list[str] | None = None,
    wrong: bool = False,
) -> str:
    """One sentence on where things are, with a bar where steps are counted."""
    bar = f'<progress aria-label="steps" max="{total}" value="{done}"></progress>' if total else ""
    role, kind = ("alert", "wrong") if wrong else ("status", "")
    lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes or ())
    listed = f'<ul class="notes">{lines}</ul>' if lines else ""
    said = f'<span class="{kind}">{html.escape(text)}</span>'
    return f'<div class="state" role="{role}">{said}{bar}{listed}</div>'
