"""Rewrite numeric bounds and multiples of JSON schemas so that llguidance follows them exactly.

Validators parse an answer's digits as a float, so 0.5000000000000000001 equals 0.5 and is not
greater.
"""

import decimal
import math
from fractions import Fraction
from typing import Any, TypeGuard, cast

from mistral_chat.chat.pattern_reader import NotHeldError
from mistral_chat.errors import shown

__all__ = ["check_multiples", "rewrite_numbers"]

# llguidance reads decimals exactly up to these limits.
_MOST_DIGITS = 15
_MOST_PLACES = 22
_WIDEST = 2**63 - 1024  # fits 64 bits and is exact as a float
_MOST_FACTOR = 2**32 - 1  # llguidance computes least common multiples in 32 bits


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rewrite_numbers(found: dict[str, Any]) -> None:
    """Rewrite a schema's numeric keywords in place.

    Raises:
        NotHeldError: a bound or a multiple is not supported.
    """
    _rewrite_bound(found, "minimum", "exclusiveMinimum", math.inf)
    _rewrite_bound(found, "maximum", "exclusiveMaximum", -math.inf)
    _rewrite_multiple(found)


def _rewrite_bound(found: dict[str, Any], name: str, exclusive: str, inwards: float) -> None:
    """Make an exclusive bound the next number, as digits beyond would be rounded to the bound."""
    bound, edge = found.get(name), found.pop(exclusive, None)
    if edge is True:  # draft 4
        edge = bound
    bounds: list[int | float] = [bound] if _is_number(bound) else []
    if _is_number(edge):
        if abs(edge) < 2**53:
            bounds.append(math.nextafter(edge, inwards) if edge else 0.0)
        else:
            bounds.append(edge + (1 if inwards > 0 else -1))
    if not bounds:
        return
    best = max(bounds) if inwards > 0 else min(bounds)
    if best == 0 and edge == 0:
        found[name] = math.copysign(10.0**-_MOST_PLACES, inwards)
    elif abs(best) < 2**53:
        found[name] = _rounded(best, inwards)
    elif best > 0 > inwards or best < 0 < inwards:
        found[name] = _WIDEST if best > 0 else -_WIDEST
    else:
        label = exclusive if bound is None else name
        raise NotHeldError(f"{label}: a number of 2^53 or more, which would be rounded")


def _rounded(bound: int | float, inwards: float) -> int | float:
    """Round a bound to digits that llguidance reads exactly, if need be to a narrower bound."""
    if isinstance(bound, int) or bound.is_integer():
        return int(bound)
    rounding = decimal.ROUND_CEILING if inwards > 0 else decimal.ROUND_FLOOR
    digits = decimal.Context(prec=_MOST_DIGITS, rounding=rounding).create_decimal(repr(bound))
    if -cast(int, digits.as_tuple().exponent) > _MOST_PLACES:
        digits = digits.quantize(decimal.Decimal(1).scaleb(-_MOST_PLACES), rounding)
    return float(digits)


def _rewrite_multiple(found: dict[str, Any]) -> None:
    value = found.get("multipleOf")
    if not _is_number(value):
        return
    whole, parts = value.as_integer_ratio()
    if parts == 1:
        found["multipleOf"] = whole
    elif value != 0.5:
        # Floats make 0.3 / 0.1 no whole number, so validators reject multiples. For multiples of
        # 0.25 llguidance expects 0.50, but it writes a bound as 0.5.
        raise NotHeldError(
            f"multipleOf: {shown(value)}, whose multiples are rounded: expected a whole number "
            f"or 0.5"
        )
    # llguidance compares 0.500 correctly with 0.501, but not 0.5, and writes multiples without
    # trailing zeros; so make the bounds multiples.
    for name, rounded in (("minimum", math.ceil), ("maximum", math.floor)):
        if _is_number(found.get(name)):
            nearest = rounded(Fraction(found[name]) / Fraction(value)) * Fraction(value)
            found[name] = int(nearest) if nearest.denominator == 1 else float(nearest)


def check_multiples(values: list[Any]) -> None:
    """Refuse multiples whose product overflows llguidance's 32 bits."""
    ratios = {value.as_integer_ratio() for value in values if _is_number(value)}
    if len(ratios) > 1:
        most_parts = max(parts for _, parts in ratios)
        scale = 10 if most_parts > 1 else 1
        scaled = {whole * scale // parts for whole, parts in ratios}
        if math.lcm(*scaled) * max(scaled) > _MOST_FACTOR:
            raise NotHeldError(f"multipleOf: {len(ratios)} different ones, too large to merge")
