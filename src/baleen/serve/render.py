"""A model's Markdown as HTML that is safe to put into a page, whatever the model wrote.

Three walls, each enough alone: raw HTML in Markdown is text, nh3 lets only the tags and attributes listed here through,
and the page's Content-Security-Policy runs no script and takes no style but its own files'.
"""

from __future__ import annotations

import html
from functools import lru_cache

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

from baleen.config import UserError
from baleen.serve.formula import formula_plugin

MAX_CHARACTERS = 100_000
MAX_HIGHLIGHTED = 20_000  # characters of a block; some lexers are slow on hostile ones
KEPT = 256  # blocks of code remembered while the rest of an answer streams

MATHML = frozenset(
    {"math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom", "mprescripts"}
    | {"mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr"}
    | {"munder", "munderover"}
)
MATHML_ATTRIBUTES = frozenset(
    {"accent", "accentunder", "columnspan", "depth", "display", "displaystyle", "fence", "form", "height", "largeop"}
    | {"linethickness", "lspace", "mathvariant", "maxsize", "minsize", "movablelimits", "notation", "rowspan"}
    | {"rspace", "scriptlevel", "separator", "stretchy", "symmetric", "width"}
)
TAGS = frozenset(
    {"a", "blockquote", "br", "code", "div", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "span"}
    | {"strong", "table", "tbody", "td", "th", "thead", "tr", "ul"}
)
ALIGNED = {"left", "right", "center"}


class Renderer:
    """Markdown to HTML. Thread-safe after construction."""

    def __init__(self):
        options = {"html": False, "breaks": True, "highlight": _code_html}
        self._markdown = MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).use(formula_plugin)
        self._markdown.add_render_rule("image", _image_as_link)
        self._markdown.add_render_rule("code_block", _indented_code)
        self._markdown.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
        self._markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
        self._cleaner = nh3.Cleaner(
            tags={*TAGS, *MATHML},
            clean_content_tags={"script", "style"},
            attributes={
                "a": {"href", "title"},
                "ol": {"start"},
                "pre": {"data-language"},
                **dict.fromkeys(MATHML, set(MATHML_ATTRIBUTES)),
            },
            allowed_classes={
                "code": {"unreadable"},
                "div": {"scroll"},
                "mtable": {"numbered"},
                "mtd": {"left", "right", "gap", "margin"},
                "span": {"formula", *filter(None, STANDARD_TYPES.values())},
                "td": ALIGNED,
                "th": ALIGNED,
            },
            set_tag_attribute_values={"a": {"target": "_blank"}},
            url_schemes={"http", "https", "mailto"},
            url_relative="deny",
            link_rel="noopener noreferrer nofollow",
        )

    def html(self, markdown: str) -> str:
        """Raises UserError over MAX_CHARACTERS; on anything else, however broken, returns HTML."""
        if len(markdown) > MAX_CHARACTERS:
            raise UserError(f"{len(markdown)} characters are too many to lay out: send at most {MAX_CHARACTERS}")
        env: dict = {}
        tokens = self._markdown.parse(markdown, env)
        for token in tokens:
            _fit_into_page(token)
        return self._cleaner.clean(self._markdown.renderer.render(tokens, self._markdown.options, env))


def _fit_into_page(token: Token) -> None:
    """Headings go below the page's own two levels; a column's alignment is a class, since styles are not allowed."""
    if token.type in ("heading_open", "heading_close"):
        token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
    elif token.type in ("th_open", "td_open") and "style" in token.attrs:
        token.attrs = {"class": str(token.attrs["style"]).removeprefix("text-align:")}


def _image_as_link(renderer, tokens, index, options, env) -> str:
    # To load a picture would tell its server what was asked here.
    token = tokens[index]
    label = renderer.renderInlineAsText(token.children, options, env) or "image"
    return f'<a href="{html.escape(str(token.attrs["src"]))}">{html.escape(label)}</a>'


def _indented_code(renderer, tokens, index, options, env) -> str:
    return _code_html(tokens[index].content, "", "")


@lru_cache(maxsize=KEPT)
def _code_html(code: str, language: str, attributes: str) -> str:
    lexer = _lexer(language)
    if lexer is None or len(code) > MAX_HIGHLIGHTED:
        body = html.escape(code)
    else:
        body = highlight(code, lexer, HtmlFormatter(nowrap=True))
    return f'<pre data-language="{html.escape(lexer.name if lexer else language)}"><code>{body}</code></pre>'


def _lexer(language: str) -> Lexer | None:
    try:
        return get_lexer_by_name(language, stripnl=False) if language else None
    except ClassNotFound:
        return None
