import pytest

from baleen.config import UserError
from baleen.cost.quantities import parse_count, parse_dollars, parse_megawatt_hours, parse_seconds


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "14.8T", 14.8e12),
        (parse_count, "300b", 300e9),
        (parse_count, "2,048", 2048),
        (parse_count, "1e12", 1e12),
        (parse_count, ".5M", 5e5),
        (parse_dollars, "$1M", 1e6),
        (parse_dollars, "5.576e6", 5.576e6),
        (parse_dollars, "250k USD", 250e3),
        (parse_seconds, "30d", 30 * 86400),
        (parse_seconds, "90 min", 5400),
        (parse_megawatt_hours, "1.2GWh", 1200),
    ],
)
def test_what_people_write(parse, text, value):
    assert parse(text, "--it") == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text", "cure"),
    [
        (parse_count, "-3T", "above 0"),
        (parse_count, "0", "above 0"),
        (parse_count, "1e999", "finite"),
        (parse_count, "ten", "such as"),
        (parse_count, "", "such as"),
        (parse_count, "14.8TB", "such as"),
        (parse_count, "nan", "such as"),
        (parse_seconds, "30", "unit"),
        (parse_megawatt_hours, "30 kW", "unit"),
        (parse_dollars, "1M€", "such as"),
        (parse_count, "14,8T", "comma"),
        (parse_dollars, "1,5M", "comma"),
    ],
)
def test_what_they_should_not(parse, text, cure):
    with pytest.raises(UserError, match=f"--it.*{cure}"):
        parse(text, "--it")
