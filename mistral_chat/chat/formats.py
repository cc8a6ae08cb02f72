"""JSON schema's `format`s as regular expressions, as strict as the strictest validator.

Where validators differ a pattern is narrower than the standard, never wider: a date-time needs an
offset, an email's domain needs a dot. Knows nothing of llguidance.
"""

from typing import NamedTuple

__all__ = ["FORMATS", "NOT_HELD", "Format"]


class Format(NamedTuple):
    """A pattern for the whole text, which must be ASCII, and its maximum length."""

    pattern: str
    most: int | None = None


def _ipv6() -> str:
    group = "[0-9a-fA-F]{1,4}"
    forms = [f"(?:{group}:){{7}}{group}"]
    for before in range(7):
        left = f"(?:{group}:){{{before - 1}}}{group}" if before else ""
        most = 6 - before  # `::` stands for at least two groups
        right = f"(?:{group}(?::{group}){{0,{most - 1}}})?" if most else ""
        forms.append(f"{left}::{right}")
    return "|".join(forms)


# Python and RFC 3339 disagree on year 0000 and second 60.
_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"
_FOURTH = r"(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|(?:\d\d{_FOURTH}|{_FOURTH}00)-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_CLOCK = r"(?:\d{1,9}H(?:\d{1,9}M(?:\d{1,9}S)?)?|\d{1,9}M(?:\d{1,9}S)?|\d{1,9}S)"
_DAYS = r"(?:\d{1,9}Y(?:\d{1,9}M(?:\d{1,9}D)?)?|\d{1,9}M(?:\d{1,9}D)?|\d{1,9}D)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
# At most 63 characters, and no `--`, which is reserved for internationalized names.
_LABEL = "[a-zA-Z0-9](?:-?[a-zA-Z0-9]){0,31}"
_TOP = "[a-zA-Z](?:-?[a-zA-Z0-9]){0,31}"
_HOST = rf"(?:{_LABEL}\.)*{_TOP}"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"
# RFC 5321: at most 64 characters before the @ and 254 in total.
_LOCAL = rf"{_ATOM}{{1,32}}(?:\.{_ATOM}{{1,15}}){{0,2}}"
_EMAIL = rf"{_LOCAL}@(?:[a-zA-Z0-9](?:-?[a-zA-Z0-9]){{0,21}}\.){{1,3}}[a-zA-Z]{{2,32}}"
_PCHAR = "(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_USER = "(?:(?:[a-zA-Z0-9._~!$&'()*+,;=:-]|%[0-9a-fA-F]{2})*@)?"
_AUTHORITY = rf"//{_USER}(?:{_HOST}|{_IPV4}|\[(?:{_ipv6()})\])(?::\d{{1,4}})?(?:/{_PCHAR}*)*"
_PATH = f"(?:/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?|{_PCHAR}+(?:/{_PCHAR}*)*)"
_URI = f"[a-zA-Z][a-zA-Z0-9+.-]*:(?:{_AUTHORITY}|{_PATH}){_TAIL}"
# The first segment of a relative path must not contain a colon.
_SEGMENT = "(?:[a-zA-Z0-9._~!$&'()*+,;=@-]|%[0-9a-fA-F]{2})+"
_RELATIVE = f"(?:{_AUTHORITY}|(?:/{_PCHAR}+|{_SEGMENT})(?:/{_PCHAR}*)*|/)?{_TAIL}"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_VARIABLES = r"\{[+#./;?&]?[a-zA-Z_]\w*(?:,[a-zA-Z_]\w*)*\}"
_HEX = "[0-9a-fA-F]"

FORMATS = {
    "date": Format(_DATE),
    "date-time": Format(f"{_DATE}T{_TIME}"),
    "duration": Format(rf"P(?:{_DAYS}(?:T{_CLOCK})?|T{_CLOCK}|\d{{1,9}}W)"),
    "email": Format(_EMAIL),
    "idn-email": Format(_EMAIL),
    "hostname": Format(_HOST, 253),
    "idn-hostname": Format(_HOST, 253),
    "ipv4": Format(_IPV4),
    "ipv6": Format(_ipv6()),
    "uuid": Format(f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}"),
    "uri": Format(_URI),
    "iri": Format(_URI),
    "uri-reference": Format(f"(?:{_URI}|{_RELATIVE})"),
    "iri-reference": Format(f"(?:{_URI}|{_RELATIVE})"),
    "uri-template": Format(f"(?:{_PCHAR}|[/?#]|{_VARIABLES})*"),
    "json-pointer": Format(_POINTER),
    "relative-json-pointer": Format(rf"(?:0|[1-9]\d{{0,8}})(?:#|{_POINTER})"),
}
NOT_HELD = {
    "regex": "whether a text is a regular expression",
    "time": "RFC 3339 wants an offset from UTC, jsonschema's FormatChecker forbids one; a pattern "
    "says which is meant",
}
