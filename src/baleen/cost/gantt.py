"""Draws a simulated timeline: as text for a terminal, as SVG for a page."""

from __future__ import annotations

from html import escape

from baleen.cost.simulator import Timeline

MARKS = {"F&B": "x"}
COLOURS = {"F": "#f2b84b", "B": "#4b8bd4", "I": "#7fc4d9", "W": "#7bb661", "F&B": "#b08ad6"}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "F&B": "overlapped pair"}


def gantt_text(timeline: Timeline, width: int = 100) -> str:
    """One line a rank, `width` characters the whole step: F, B, I, W, `x` for an overlapped pair, `.` for a bubble."""
    lines = []
    for rank, spans in enumerate(timeline.spans):
        row = ["."] * width
        for span in spans:
            first = round(span.start / timeline.seconds * width)
            for column in range(first, round(span.end / timeline.seconds * width)):
                row[column] = MARKS.get(span.kind, span.kind)
        lines.append(f"rank {rank:3d} |{''.join(row)}|")
    return "\n".join(lines)


def gantt_svg(timeline: Timeline, width: int = 1200, row_height: int = 22) -> str:
    """A stand-alone SVG: a row a rank, a box an operation with its micro-batch number, a legend below."""
    left, gap = 60, 4
    scale = (width - left) / timeline.seconds
    height = len(timeline.spans) * (row_height + gap) + 2 * row_height
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for rank, spans in enumerate(timeline.spans):
        y = rank * (row_height + gap)
        out.append(f'<text x="0" y="{y + row_height * 0.7:.1f}">rank {rank}</text>')
        out.append(f'<rect x="{left}" y="{y}" width="{width - left}" height="{row_height}" fill="#eee"/>')
        for span in spans:
            x, w = left + span.start * scale, (span.end - span.start) * scale
            title = escape(f"{' & '.join(map(str, span.action))}: {span.start:.4g} to {span.end:.4g} s")
            out.append(
                f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{row_height}" fill="{COLOURS[span.kind]}" '
                f'stroke="white" stroke-width="0.5"><title>{title}</title></rect>'
            )
            label = "/".join(str(op.microbatch) for op in span.action)
            if w > 6 * len(label):
                out.append(
                    f'<text x="{x + w / 2:.2f}" y="{y + row_height * 0.7:.1f}" text-anchor="middle">{label}</text>'
                )
    y = height - row_height
    for column, (kind, colour) in enumerate(COLOURS.items()):
        x = left + column * 150
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}"/>')
        out.append(f'<text x="{x + 20}" y="{y + 11}">{escape(kind)} {NAMES[kind]}</text>')
    return "\n".join([*out, "</svg>\n"])
