"""Numbers with units: read from text, and compared."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from prism_ray.verify.units import unit_of

RELATIVE_ERROR = 1e-6
"""Numbers closer than this, relative to the right one, are equal (PRISM's published rule)."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = rf"[-+]? ?(?:{_DIGITS})"
_READ = re.compile(
    r"(?P<sign>[-+]?) ?(?P<currency>US\$|\$|€|£|¥|₹)? ?(?:"
    rf"(?P<whole>[-+]?[0-9]{{1,15}})(?: (?P<n>[0-9]{{1,15}})/(?P<d>[0-9]{{1,15}})"
    r"| ?\\frac ?\{ ?(?P<ln>[0-9]{1,15}) ?\}\{ ?(?P<ld>[0-9]{1,15}) ?\})"
    rf"|\\frac ?\{{ ?(?P<above>{_NUMBER}) ?\}} ?\{{ ?(?P<below>{_NUMBER}) ?\}}"
    r"|\\frac ?(?P<short>[0-9] ?[0-9])"
    rf"|(?P<over>{_NUMBER}) ?/ ?(?P<under>{_NUMBER})"
    rf"|(?P<mantissa>{_NUMBER})(?:[eE](?P<e>[-+]?[0-9]{{1,4}})(?![0-9])"
    r"| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?(?P<braced>[-+]?[0-9]{1,4}) ?\}|(?P<power>[-+]?[0-9]{1,4})))?"
    r")"
)
_ABOUT = re.compile(r"^(?:about|approximately|approx\.?|roughly|around|nearly|\\approx|≈|=) ?(?=[-+0-9.$\\])", re.I)
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "dozen": 12.0}
_NOUNS = re.compile(r"[A-Za-z]{3,20}(?:[ -][A-Za-z]{2,20}){0,2}")
_NO_NOUN = re.compile(
    r"\b(?:and|but|not|nor|or|to|than|over|plus|minus|times|divided|maybe|perhaps|sin|cos|tan|cot|sec|csc|log|exp|sqrt|lim"
    r"|mod|pairs?|factorial|squared|cubed|point|half|thirds?|quarters?)\b"
)
_MEASURED = re.compile(r" (?:long|wide|high|tall|deep|thick|old|away|apart|each|total|altogether|left|in total)$", re.I)


@dataclass(frozen=True)
class Quantity:
    """A number and its unit: the name `units.unit_of` gives, the noun that is counted, or `""`."""

    value: float
    unit: str = ""


def quantity(text: str) -> Quantity | None:
    """The quantity that a cleaned text is; None if it is anything else, or too large for a float.

    Integers, decimals, thousands commas, exponents (`2e3`, `2 \\times 10^{3}`), fractions and mixed numbers; a currency
    before or a unit after it; scale words (`5 million`); any noun counts as a unit (`12 apples`).
    """
    text = _ABOUT.sub("", text)
    match = _READ.match(text)
    if match is None:
        return None
    value = _value(match)
    rest = text[match.end() :].strip()
    scale, _, after = rest.partition(" ")
    if scale.lower() in _SCALES:
        value, rest = value * _SCALES[scale.lower()], after.strip()
    unit = unit_after(rest)
    if unit is None or not math.isfinite(value) or (unit and match["currency"]):
        return None
    return Quantity(value, unit or (unit_of(match["currency"] or "") or ""))


def unit_after(rest: str) -> str | None:
    """The unit that follows a number, a known one or a noun; None if it is neither, so that it was no quantity."""
    rest = _MEASURED.sub("", rest)
    if (unit := unit_of(rest)) is not None:
        return unit
    if not _NOUNS.fullmatch(rest):
        return None
    nouns = rest.casefold()
    return None if _NO_NOUN.search(nouns) else re.split("[ -]", nouns)[-1].removesuffix("s")


def same_quantity(given: Quantity, wanted: Quantity) -> bool:
    """Whether two quantities are the same: close values, and the same unit where both have one.

    Units are not converted. A share may stand as `50%`, `50` or `0.5`.
    """
    if given.unit and wanted.unit and given.unit != wanted.unit:
        return False
    if close(given.value, wanted.value):
        return True
    if {given.unit, wanted.unit} != {"", "%"}:
        return False
    return close(*(q.value / 100 if q.unit == "%" else q.value for q in (given, wanted)))


def close(given: float, wanted: float) -> bool:
    """Whether a number equals the right one but for `RELATIVE_ERROR`; only 0 is close to 0."""
    return given == wanted or abs(given - wanted) < RELATIVE_ERROR * abs(wanted)


def _value(match: re.Match[str]) -> float:
    sign = -1.0 if match["sign"] == "-" else 1.0
    if match["whole"]:
        above, below = float(match["n"] or match["ln"]), float(match["d"] or match["ld"])
        whole = float(match["whole"])
        return sign * math.copysign(abs(whole) + above / below, whole) if below else math.nan
    if match["short"]:
        return sign * _ratio(match["short"][0], match["short"][-1])
    if match["above"]:
        return sign * _ratio(match["above"], match["below"])
    if match["over"]:
        return sign * _ratio(match["over"], match["under"])
    exponent = match["e"] or match["braced"] or match["power"] or "0"
    return sign * _float(f"{match['mantissa']}e{exponent}")


def _ratio(above: str, below: str) -> float:
    return _float(above) / _float(below) if _float(below) else math.nan


def _float(text: str) -> float:
    return float(text.replace(",", "").replace(" ", ""))
