"""Checks of arguments."""

import pytest

from hf_layershuffle.common.checks import check_seconds


@pytest.mark.parametrize("value", [0, -1.0, True, "1", None, float("nan"), float("inf"), 1e9, 10**400])
def test_what_is_no_number_of_seconds_is_refused(value):
    with pytest.raises(ValueError, match=r"`pause` is .*; it must be a number of seconds above 0 and below 1e9"):
        check_seconds(pause=value)


@pytest.mark.parametrize("value", [1, 0.001, 1e8])
def test_numbers_of_seconds_are_taken(value):
    check_seconds(pause=value)
