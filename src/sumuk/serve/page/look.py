"""How the page looks, and what it runs in the browser: paper and ink, one red. Everything comes from this server."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import gradio as gr
from gradio.themes.utils.colors import Color

from sumuk.serve.page.markup import element, text
from sumuk.serve.page.words import LANGUAGES, Language, Words

SHADES = "faf9f5 f1efe9 e2dfd7 cbc7bd a19d94 7d7a73 5a5751 403e3a 2a2926 1d1c1a 171614"
"""From paper to ink."""
FONTS = (
    "Pretendard",
    "Noto Sans KR",
    "Noto Sans CJK KR",
    "Apple SD Gothic Neo",
    "Malgun Gothic",
    "sans-serif",
)
"""Those of the reader's machine; none is fetched."""
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "D2Coding", "monospace")
STROKE = """<svg class="stroke" viewBox="0 0 1200 16" preserveAspectRatio="none" aria-hidden="true">
<defs><linearGradient id="dry"><stop offset="0" stop-color="currentColor" stop-opacity=".85"/>
<stop offset=".35" stop-color="currentColor" stop-opacity=".5"/>
<stop offset=".72" stop-color="currentColor" stop-opacity=".16"/>
<stop offset="1" stop-color="currentColor" stop-opacity="0"/></linearGradient></defs>
<path fill="url(#dry)" d="M2 8 C 40 3 120 5 260 4 S 560 6 760 6.5 1100 8 1198 8.2 C 1060 8.8 900 9 760 9.4
S 420 11.5 250 11 S 60 13.5 14 11.5 C 6 11 0 9.5 2 8 Z"/></svg>"""
"""One stroke of a brush that runs dry."""
SEAL = """<svg class="seal" viewBox="0 0 24 24" aria-hidden="true"><rect x="1.5" y="1.5" width="21" height="21" rx="2.5"
fill="var(--seal)"/><path d="M12 5.2v13.6M6.2 9.4c2.4.4 3.6 2.6 2 6.6M17.9 8.6c-1.6 1-3 2-4.2 2.6 1 2.2 2.4 3.8 4.4 4.8"
fill="none" stroke="var(--paper)" stroke-width="1.7" stroke-linecap="round"/></svg>"""
"""A seal: the letter 水, water."""


def asset(name: str) -> str:
    """A file of this package that goes to the browser."""
    return (files("sumuk.serve.page") / "assets" / name).read_text("utf-8")


def theme() -> gr.themes.Base:
    """The theme: flat, thin lines, no colour."""
    ink = Color(*(f"#{shade}" for shade in SHADES.split()))
    made = gr.themes.Base(
        primary_hue=ink, secondary_hue=ink, neutral_hue=ink, radius_size="sm", font=FONTS, font_mono=MONO
    )
    both: dict[str, Any] = {
        "body_background_fill": "var(--paper)",
        "body_text_color": "var(--ink)",
        "body_text_color_subdued": "var(--faint)",
        "background_fill_primary": "var(--paper)",
        "background_fill_secondary": "var(--paper)",
        "border_color_primary": "var(--line)",
        "border_color_accent": "var(--ink)",
        "color_accent_soft": "var(--wash)",
        "block_background_fill": "transparent",
        "block_border_width": "0px",
        "block_label_background_fill": "transparent",
        "block_label_text_color": "var(--faint)",
        "block_title_text_color": "var(--faint)",
        "block_info_text_color": "var(--faint)",
        "block_shadow": "none",
        "panel_background_fill": "transparent",
        "input_background_fill": "transparent",
        "input_border_color": "var(--line)",
        "input_border_color_focus": "var(--ink)",
        "input_placeholder_color": "var(--faint)",
        "input_shadow": "none",
        "input_shadow_focus": "none",
        "checkbox_background_color": "transparent",
        "checkbox_background_color_selected": "var(--ink)",
        "checkbox_border_color": "var(--faint)",
        "checkbox_border_color_selected": "var(--ink)",
        "checkbox_label_background_fill": "transparent",
        "checkbox_label_background_fill_hover": "transparent",
        "checkbox_label_background_fill_selected": "transparent",
        "checkbox_label_border_color": "transparent",
        "checkbox_label_text_color": "var(--ink)",
        "slider_color": "var(--ink)",
        "button_primary_background_fill": "var(--ink)",
        "button_primary_background_fill_hover": "var(--seal)",
        "button_primary_border_color": "var(--ink)",
        "button_primary_text_color": "var(--paper)",
        "button_secondary_background_fill": "transparent",
        "button_secondary_background_fill_hover": "var(--wash)",
        "button_secondary_border_color": "var(--line)",
        "button_secondary_text_color": "var(--ink)",
        "table_border_color": "var(--line)",
        "accordion_text_color": "var(--ink)",
    }
    once = {
        "block_padding": "0px",
        "layout_gap": "14px",
        "block_title_text_weight": "400",
        "block_title_text_size": "14px",
    }
    known = gr.themes.Base.set.__code__.co_varnames
    dark = {f"{name}_dark": value for name, value in both.items() if f"{name}_dark" in known}
    return made.set(**both, **once, **dark)


def head(language: Language) -> str:
    """What stands first in the page's head."""
    parts = [
        element("link", rel="icon", href="../page/icon.svg", type="image/svg+xml"),
        element("link", rel="stylesheet", href="../page/look.css"),
        element("script", src="../page/page.js", data_speaks=language),
        element("script", src="../page/picture.js", defer=True),
    ]
    return "".join(parts)


def heading(words: Words) -> gr.HTML:
    """Name, language and light."""
    (other,) = (each for each in LANGUAGES if each != words.language)
    language = element(
        "a",
        text(words("language")),
        href=f"../{other}/",
        lang=other,
        hreflang=other,
        title=words("language-hint"),
        data_language=other,
    )
    light = element(
        "button",
        element("span", class_="sun"),
        type="button",
        data_theme=True,
        title=words("theme"),
        aria_label=words("theme"),
    )
    name = f'<h1 class="name">수묵 <span>SUMUK</span>{SEAL}</h1>'
    tagline = element("p", text(words("tagline")), class_="tagline")
    switches = element("div", language + light, class_="switches")
    return gr.HTML(
        f'<div class="row">{name}{tagline}{switches}</div>{STROKE}',
        elem_id="head",
        js_on_load="sumuk.head(element)",
        apply_default_css=False,
    )


def icon() -> str:
    """The seal as a file."""
    colours = SEAL.replace("var(--seal)", "#a4342b").replace("var(--paper)", "#faf9f5")
    return colours.replace('<svg class="seal"', '<svg xmlns="http://www.w3.org/2000/svg"')
