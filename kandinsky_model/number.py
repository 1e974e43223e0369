"""Which of the values that users and files give are numbers: real and finite, not true or false."""

import math
from numbers import Real
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, as 4.0 is too."""
    return is_number(value) and value == int(value)
