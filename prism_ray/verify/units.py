"""Units of measurement by one name each, so that `5 metres`, `5 m` and `5\\,\\text{m}` say the same."""

from __future__ import annotations

import re

_NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre 厘米",
    "dm": "decimeter decimetre",
    "m": "meter metre 米",
    "km": "kilometer kilometre 千米",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram milligramme",
    "g": "gram gramme 克",
    "kg": "kilogram kilogramme kilo 千克",
    "lb": "lbs pound",
    "oz": "ounce",
    "tonne": "ton",
    "ms": "millisecond",
    "s": "sec secs second 秒",
    "min": "mins minute 分钟",
    "h": "hr hrs hour 小时",
    "day": "天",
    "week": "周",
    "month": "月",
    "year": "yr yrs 年",
    "ml": "mL milliliter millilitre",
    "cl": "cL centiliter centilitre",
    "l": "L liter litre",
    "°": "deg degree 度",
    "°C": "℃ celsius",
    "°F": "fahrenheit",
    "K": "kelvin",
    "rad": "radian",
    "%": "percent pct percentage",
    "N": "newton",
    "J": "joule",
    "kJ": "kilojoule",
    "cal": "calorie",
    "kcal": "kilocalorie",
    "W": "watt",
    "kW": "kilowatt",
    "kWh": "",
    "Pa": "pascal",
    "kPa": "kilopascal",
    "V": "volt",
    "mV": "millivolt",
    "A": "amp ampere",
    "mA": "milliampere",
    "Ω": "ohm",
    "Hz": "hertz",
    "kHz": "",
    "MHz": "",
    "C": "coulomb",
    "T": "tesla",
    "mol": "mole",
    "$": "usd dollar US$ buck 美元",
    "€": "eur euro",
    "£": "gbp",
    "¥": "yuan rmb cny yen 元",
    "₹": "rupee Rs Rs.",
    "cent": "¢",
    "unit": "units",
    "person": "people persons 人",
    "piece": "pieces 个 块 条 张",
    "time": "times 次",
}
_CANON = {alias: name for name, aliases in _NAMES.items() for alias in (name, *aliases.split())}
_CANON |= {f"{alias}s": name for alias, name in _CANON.items() if len(alias) > 2 and alias.isascii()}
_WORDS = {alias: name for alias, name in _CANON.items() if len(alias) > 2 and alias.isascii()}

_WHOLE = {
    **dict.fromkeys(("degrees celsius", "degree celsius", "degrees c", "° c", "°c"), "°C"),
    **dict.fromkeys(("degrees fahrenheit", "degree fahrenheit", "degrees f", "° f", "°f"), "°F"),
    **dict.fromkeys(("kph", "kmh", "kmph"), "km/h"),
    "mph": "mi/h",
    "mps": "m/s",
}
_POWER = re.compile(r"(.*?)\^?(?:\{(-?[0-9])\}|(-[0-9]|[23]))")
_SQUARE = re.compile(r"(square|sq\.?|cubic|cu\.?) (.*)", re.IGNORECASE)
_OF = {"s": "2", "c": "3"}
_SUFFIX = re.compile(r"(?:\\Omega|[A-Za-zΩ°%$€£¥₹¢\u4e00-\u9fff])[A-Za-zΩ°%./^{}0-9\u4e00-\u9fff -]{0,40}$")
_MEASURABLE = tuple("0123456789)}")
_MAX = 41


def unit_of(text: str) -> str | None:
    """The one name of the unit that a text is (`""` for an empty text); None if it is none that we know."""
    if len(text) > _MAX:
        return None
    text = text.replace(r"\Omega", "Ω").strip().rstrip(".")
    if not text:
        return ""
    text = _WHOLE.get(text.casefold(), text).replace(" squared", "^2").replace(" cubed", "^3")
    text = text.replace(" per ", "/").replace(r"\cdot", "*")
    above, *below = text.split("/")
    factors = [_factors(above, ""), *(_factors(part, "-") for part in below)]
    if any(not part for part in factors):
        return None
    return "*".join(sorted(name for part in factors for name in part or ()))


def split_unit(text: str) -> tuple[str, str]:
    """A cleaned value as what is measured and the unit at its end, in its one name (`""` if there is none)."""
    found = _SUFFIX.search(text)
    start = found.start() if found else len(text)
    for index in range(max(1, start), len(text)):
        before, after = text[:index].rstrip(), text[index:]
        if after[0] in " 0123456789{}^-" or not (before.endswith(_MEASURABLE) or before[-3:] == r"\pi"):
            continue
        if unit := unit_of(after):
            return before, unit
    return text, ""


def _factors(text: str, sign: str) -> list[str] | None:
    """The named powers that a product of units consists of; None if one of them is no unit."""
    text = text.strip()
    if (match := _SQUARE.fullmatch(text)) is not None:
        inner = _factors(match[2], sign)
        return None if inner is None or len(inner) != 1 else [inner[0] + "^" + _OF[match[1][0].lower()]]
    if (name := _name(text)) is not None:
        return [sign + name]
    names = [_power(part, sign) for part in text.replace("*", " ").split()]
    return [name for name in names if name] if names and all(names) else None


def _power(text: str, sign: str) -> str | None:
    if (name := _name(text)) is not None:
        return sign + name
    match = _POWER.fullmatch(text)
    if match is None or (name := _name(match[1])) is None:
        return None
    exponent = match[2] or match[3]
    if exponent.startswith("-"):
        sign, exponent = ("" if sign else "-"), exponent[1:]
    return sign + name + ("" if exponent == "1" else f"^{exponent}")


def _name(text: str) -> str | None:
    return _CANON.get(text) or _WORDS.get(text.casefold())
