import xml.etree.ElementTree as ET

from baleen.cost.gantt import gantt_svg, gantt_text
from baleen.cost.schedule import schedule
from baleen.cost.simulator import Durations, execute


def test_text_shows_what_ran_when():
    timeline = execute(schedule("1f1b", 2, 2), Durations(1.0, 1.0, 0.5))
    assert gantt_text(timeline, width=6) == "rank   0 |FF.B.B|\nrank   1 |.FBFB.|"


def test_text_marks_pairs():
    assert "x" in gantt_text(execute(schedule("dualpipe", 4, 12), Durations(1.0, 2.0, 1.0)))


def test_svg_has_a_box_for_every_action():
    timeline = execute(schedule("zb1p", 4, 8), Durations(1.0, 2.0, 1.0))
    root = ET.fromstring(gantt_svg(timeline))
    assert len(root.findall(".//{*}title")) == sum(len(spans) for spans in timeline.spans)
