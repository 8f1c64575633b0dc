"""What a model writes becomes HTML that is laid out well and can do nothing."""

import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.serve.formula import MAX_COMMANDS, MAX_DEPTH, formula_html
from baleen.serve.render import MATHML, MAX_CHARACTERS, TAGS, Renderer

RENDERER = Renderer()
ALLOWED_TAGS = {*TAGS, *MATHML}


class Parsed(HTMLParser):
    """All tags and attributes that a browser would see, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_comment(self, data):
        self.tags.append(("!--", {}))

    def handle_decl(self, decl):
        self.tags.append(("!", {}))

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def parsed(markdown: str) -> Parsed:
    return Parsed(RENDERER.html(markdown))


def assert_harmless(html: str) -> None:
    for tag, attributes in Parsed(html).tags:
        assert tag in ALLOWED_TAGS, html
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "id", "name", "srcdoc", "src", "xlink:href"), (
                html
            )
            if name == "href":
                assert tag == "a" and value.split(":")[0].lower() in ("http", "https", "mailto"), html
        if tag == "a":
            assert attributes["target"] == "_blank" and "noopener" in attributes["rel"]


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<style>body{display:none}</style>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<math><maction actiontype='statusline#http://x' xlink:href='javascript:alert(1)'>x</maction></math>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    "[x]( javascript:alert(1))",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]",
    "![x](javascript:alert(1))",
    "![x](https://evil.example/leak.png)",
    '[x](https://a.b "onmouseover=alert(1) \\" onclick=\\"alert(1)")',
    '```"><script>alert(1)</script>\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    "`<img src=x onerror=alert(1)>`",
    "$\\text{<script>alert(1)</script>}$",
    "$\\href{javascript:alert(1)}{x}$",
    "$$\\style{position:fixed}{x} <img src=x onerror=alert(1)>$$",
    "$\\unknown{<svg onload=alert(1)>}$",
    "\\(\\text{</mtext></math><img src=x onerror=alert(1)>}\\)",
    "$\\color{red;background:url(//evil)}x$",
    "| a |\n|:-:|\n| <b onclick=x> |",
    "<!-- x --><!DOCTYPE html><base href=//evil><form action=//evil><input name=cookie>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
]


@pytest.mark.parametrize("markdown", HOSTILE)
def test_hostile_markdown_is_text(markdown):
    html = RENDERER.html(markdown)
    assert_harmless(html)
    assert "evil.example/leak.png" not in html or 'href="https://evil.example/leak.png"' in html


PIECES = st.sampled_from(
    [
        *HOSTILE,
        "<",
        ">",
        '"',
        "'",
        "&",
        "\n",
        "\n\n",
        "    ",
        "`",
        "```",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "\\",
        "{",
    ]
    + ["}", "[", "](", ")", "|", "|-|\n", "> ", "- ", "1. ", "#", "\\frac", "\\text{", "\\left", "^", "_", "x", "\x00"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES | st.text(max_size=8), max_size=24))
def test_nothing_unsafe_survives_any_mixture(pieces):
    assert_harmless(RENDERER.html("".join(pieces)))


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12))
def test_every_beginning_of_an_answer_renders(pieces):
    text = "".join(pieces)
    for end in range(0, len(text), max(1, len(text) // 8)):
        assert_harmless(RENDERER.html(text[:end]))


def test_the_second_wall_holds_without_the_first():
    """Raw HTML handed past the Markdown parser is cleaned all the same."""
    for markdown in HOSTILE:
        assert_harmless(RENDERER._cleaner.clean(markdown))
    cleaned = RENDERER._cleaner.clean('<p id="send" class="composer" onclick="x()">a</p><span class="k panel">b</span>')
    assert cleaned == '<p>a</p><span class="k">b</span>'


def test_markdown_is_laid_out():
    page = parsed(
        "# Title\n\none *two* **three** ~~four~~ `five`\nnext line\n\n1. a\n2. b\n\n> quote\n\n"
        "| l | r |\n|:--|--:|\n| 1 | 2 |\n\n[link](https://a.b) ![whale](https://a.b/w.png)\n\n---\n"
    )
    names = [tag for tag, _ in page.tags]
    for tag in ("em", "strong", "s", "code", "br", "ol", "li", "blockquote", "table", "hr"):
        assert tag in names, tag
    assert "h1" not in names and "h3" in names  # the page has its own first and second level
    assert [a["class"] for a in page.named("td")] == ["left", "right"]
    assert [a["href"] for a in page.named("a")] == ["https://a.b", "https://a.b/w.png"]
    assert "img" not in names and "whale" in page.text


def test_code_is_coloured_by_classes_and_keeps_every_character():
    code = 'def f(x):\n\treturn "<b>"  # é\n\n'
    page = parsed(f"```python\n{code}```")
    assert page.text == code + "\n"
    assert page.named("pre") == [{"data-language": "Python"}]
    assert {"k", "nf"} <= {a.get("class") for a in page.named("span")}
    assert parsed("```nosuchlanguage\nx < y\n```").text == "x < y\n\n"
    assert parsed("```python\nprint(").text.startswith("print(")  # still streaming


@pytest.mark.parametrize(
    "markdown, display",
    [
        ("so $x^2$ is", False),
        ("so \\(x^2\\) is", False),
        ("so $$x^2$$ is", True),
        ("so \\[x^2\\] is", True),
        ("$$\nx^2\n$$", True),
        ("\\[\nx^2\n\\]", True),
        ("so\n\\[\nx^2\n\\]\nis", True),
        ("- so\n  \\[\n  x^2\n  \\]\n- is", True),
        ("> \\[\n> x^2\n> \\]\n", True),
        ("\\[\n- a\n+ x^2\n\\]", True),
    ],
)
def test_a_closed_formula_is_mathml(markdown, display):
    page = parsed(markdown)
    assert [a.get("display") for a in page.named("math")] == ["block" if display else None]
    assert page.named("msup") and "\\" not in page.text and "]" not in page.text


@pytest.mark.parametrize("markdown", ["so $x^2", "so \\(x^2", "$$\nx^2", "\\[\nx^2", "it costs $5 or $6", "a \\$x\\$"])
def test_an_open_formula_or_a_price_is_text(markdown):
    page = parsed(markdown)
    assert not page.named("math")
    assert "x^2" in page.text or "$" in page.text


def test_a_bad_formula_shows_its_source_and_harms_nothing_else():
    page = parsed("a $\\frac{1$ b $x$ c $\\nosuch{<b>}$\n\n**d**")
    assert page.named("code") == [{"class": "unreadable"}] * 2
    assert "\\frac{1" in page.text and "\\nosuch{<b>}" in page.text
    assert len(page.named("math")) == 1 and page.named("strong")


def test_alignment_of_equations_becomes_classes():
    page = Parsed(RENDERER.html(r"$$\begin{aligned}a&=b\\c&=d\end{aligned}$$"))
    assert [a["class"] for a in page.named("mtd")] == ["right", "left"] * 2


def test_macros_and_depth_end_nothing():
    """The worst formulas that are let through, on the smallest stack a thread has anywhere."""
    shapes = ["{", r"\sqrt{", r"\left(", r"\begin{matrix}", "x^{", r"\frac{\left("]
    ends = {"{": "}", r"\sqrt{": "}", r"\left(": r"\right)", r"\begin{matrix}": r"\end{matrix}", "x^{": "}"}
    deep = [shape * MAX_DEPTH + "x" + ends.get(shape, "") * MAX_DEPTH for shape in shapes]
    deep += [command * MAX_COMMANDS + "x" for command in (r"\sqrt ", r"\hat ", r"\frac1", r"\overset1")]
    deep += [r"\frac1" * (MAX_COMMANDS - MAX_DEPTH) + r"\sqrt{" * MAX_DEPTH + "}" * MAX_DEPTH]
    deep += ["{" * 100_000, r"\sqrt " * 100_000, r"\def\a{\a\a}\a"]
    script = (
        "import sys, threading; from baleen.serve.formula import formula_html\n"
        "formulas = eval(sys.stdin.read())\n"
        "threading.stack_size(512 * 1024)\n"
        "thread = threading.Thread(target=lambda: [print(len(formula_html(f, True))) for f in formulas])\n"
        "thread.start(); thread.join()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], input=repr(deep), capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == len(deep)
    assert "unreadable" in formula_html("{" * (MAX_DEPTH + 1) + "x" + "}" * (MAX_DEPTH + 1), True)
    assert "unreadable" in formula_html(r"\newcommand{\a}{x}\a", True)


@pytest.mark.parametrize("piece", ["\\(", "\\[\n", "$", "$$\n", "> ", "[", "`a``", "**_", "|a|b|\n|-|-|\n", "[x]: \n"])
def test_a_flood_is_laid_out_and_more_is_refused(piece):
    flood = piece * (10_000 // len(piece))
    assert_harmless(RENDERER.html(flood))
    with pytest.raises(UserError, match="too many"):
        RENDERER.html("x" * (MAX_CHARACTERS + 1))
