"""Numbers as they are read."""

import pytest

from iresnet_fast.report import numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.6, "1,000"),
        (2634.0, "2,634"),
    ],
)
def test_number(value, shown):
    assert numbers.number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (2.5, "2.5 s"),
        (0.9996, "1 s"),
        (0.5, "500 ms"),
        (0.00099996, "1 ms"),
        (2e-5, "20 µs"),
        (7200, "7,200 s"),
    ],
)
def test_seconds(value, shown):
    assert numbers.seconds(value) == shown


def test_promises_have_units():
    promise = {"quantity": "value", "of": "wall", "must": 15e-3, "aim": 6e-3, "achieved": None}
    assert numbers.promised(promise) == ("15 ms", "6 ms", "–")
    assert numbers.promised({**promise, "of": "error"}) == ("1.5e-02", "6.0e-03", "–")
    assert numbers.promised({**promise, "quantity": "share"}) == ("1.5 %", "0.6 %", "–")
