"""LaTeX to MathML Core, and where formulas stand in Markdown.

`$a$` and `$$b$$` are mdit-py-plugins' dollarmath; the other way models write them, `\\(a\\)` and `\\[b\\]`, is here.
A formula that is not closed yet, as while an answer streams, is no formula: it stays the text it is.
"""

from __future__ import annotations

import html
import re
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from math_core import LatexError, LatexToMathML
from mdit_py_plugins.dollarmath import dollarmath_plugin

# The converter descends by recursion in native code, where too deep a formula would end the process: 150 levels of its
# hungriest commands fit the smallest stack that a thread has anywhere (512 KiB, macOS).
MAX_CHARACTERS = 4000
MAX_DEPTH = 50
MAX_COMMANDS = 250
KEPT = 1024

# The page's policy allows no style attribute: the few that the converter writes become classes.
STYLES = (
    ("text-align: right", "right"),
    ("text-align: left", "left"),
    ("padding-left:1em", "gap"),
    ("width: 50%", "margin"),
    ("width: 100%", "numbered"),
)
STYLE = re.compile(r'(<m\w+[^<>]*?) style="([^"]*)"')


def formula_plugin(markdown: MarkdownIt) -> None:
    """Teach `markdown` both ways to write a formula; a price such as $5 is none."""
    dollarmath_plugin(
        markdown,
        allow_labels=False,
        allow_space=False,
        allow_digits=False,
        allow_blank_lines=False,
        double_inline=True,
    )
    markdown.inline.ruler.before("escape", "bracket_formula", _inline_rule)
    may_interrupt = ["paragraph", "reference", "blockquote", "list"]
    markdown.block.ruler.before("fence", "bracket_formula_block", _block_rule, {"alt": may_interrupt})
    for name in ("math_inline", "math_inline_double", "math_block"):
        markdown.add_render_rule(name, _render)


@lru_cache(maxsize=KEPT)
def formula_html(latex: str, display: bool) -> str:
    """MathML of one formula, or its source in <code> where it can't be read. Never raises."""
    latex = latex.strip()
    try:
        if not latex or _too_deep(latex):
            raise LatexError
        converter = LatexToMathML(max_expansions=0, fancy_error=False)
        mathml = STYLE.sub(_style_to_class, converter.convert_with_local_state(latex, displaystyle=display))
    except LatexError:
        mathml = f'<code class="unreadable">{html.escape(latex)}</code>'
    return f'<span class="formula">{mathml}</span>' if display else mathml


def _too_deep(latex: str) -> bool:
    depth = deepest = 0
    for mark in re.findall(r"\\(?:left|begin|right|end)\b|\\.|[{}]", latex):
        depth += (mark in ("{", "\\left", "\\begin")) - (mark in ("}", "\\right", "\\end"))
        deepest = max(deepest, depth)
    return len(latex) > MAX_CHARACTERS or deepest > MAX_DEPTH or latex.count("\\") > MAX_COMMANDS


def _style_to_class(match: re.Match[str]) -> str:
    names = [name for style, name in STYLES if style in match[2]]
    return f'{match[1]} class="{" ".join(names)}"' if names else match[1]


def _render(renderer, tokens, index, options, env) -> str:
    token = tokens[index]
    return formula_html(token.content, token.type != "math_inline")


def _closing(state: StateInline | StateBlock, closing: str, start: int) -> int:
    """Where `closing` next stands, or -1. Looked for once where there is none: a page of openings stays linear."""
    missing = state.env.setdefault("unclosed", set())
    if (closing, state.src) in missing:
        return -1
    end = state.src.find(closing, start)
    if end < 0:
        missing.add((closing, state.src))
    return end


def _inline_rule(state: StateInline, silent: bool) -> bool:
    opening = state.src[state.pos : state.pos + 2]
    if opening not in ("\\(", "\\["):
        return False
    closing = "\\)" if opening == "\\(" else "\\]"
    end = _closing(state, closing, state.pos + 2)
    if end < 0 or end > state.posMax:
        return False
    if not silent:
        token = state.push("math_inline" if opening == "\\(" else "math_inline_double", "math", 0)
        token.content, token.markup = state.src[state.pos + 2 : end], opening
    state.pos = end + 2
    return True


def _block_rule(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    begin = state.bMarks[start_line] + state.tShift[start_line]
    if state.is_code_block(start_line) or not state.src.startswith("\\[", begin):
        return False
    end = _closing(state, "\\]", begin + 2)
    line = start_line
    while line < end_line and state.eMarks[line] < end:
        line += 1
        if line < end_line and state.isEmpty(line):
            return False
    if end < 0 or line >= end_line or state.src[end + 2 : state.eMarks[line]].strip(" .,;"):
        return False
    if not silent:
        token = state.push("math_block", "math", 0)
        first = state.src[begin + 2 : min(end, state.eMarks[start_line])]
        rest = state.getLines(start_line + 1, line + 1, state.blkIndent, False) if line > start_line else ""
        token.content = first + "\n" + rest.rpartition("\\]")[0] if rest else first
        token.block, token.markup, token.map = True, "\\[", [start_line, line + 1]
    state.line = line + 1
    return True
