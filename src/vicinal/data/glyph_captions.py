"""What people call a character: its Unicode name, and the same said in everyday words.

A Unicode name is made of a script, a case, a letter and its marks: LATIN SMALL LETTER E WITH ACUTE. Captions say it as
it stands, turned round ("small Latin letter e with acute"), the case last ("Latin e with acute, lower case") and with
the marks as they look ("small Latin e with an acute accent"). Signs have names of their own: a solidus is a slash.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

__all__ = ["SCRIPTS", "captions_of", "script_of"]

SCRIPTS: Final = ("latin", "greek", "cyrillic", "armenian", "georgian")

_LETTER: Final = re.compile(
    rf"(?P<script>{'|'.join(SCRIPTS)})(?: (?P<case>capital|small))?(?: (?:letter|ligature))? (?P<rest>.+)"
)
_CASES: Final = {"capital": "upper", "small": "lower"}

# What a mark in a Unicode name looks like. Greek names keep Greek words for what other scripts call acute or grave.
_MARKS: Final = {
    "acute": "an acute accent",
    "oxia": "an acute accent",
    "tonos": "an accent",
    "grave": "a grave accent",
    "varia": "a grave accent",
    "double acute": "two acute accents",
    "double grave": "two grave accents",
    "circumflex": "a hat",
    "perispomeni": "a wave above",
    "tilde": "a tilde above",
    "caron": "a little v above",
    "breve": "a little cup above",
    "vrachy": "a little cup above",
    "inverted breve": "a little arch above",
    "macron": "a bar above",
    "diaeresis": "two dots above",
    "dialytika": "two dots above",
    "ring above": "a small ring above",
    "dot above": "a dot above",
    "dot below": "a dot below",
    "diaeresis below": "two dots below",
    "ring below": "a small ring below",
    "line below": "a bar below",
    "macron below": "a bar below",
    "tilde below": "a wave below",
    "circumflex below": "a hat below",
    "breve below": "a little cup below",
    "comma below": "a comma below",
    "cedilla": "a cedilla, a small hook below",
    "ogonek": "a little tail",
    "hook": "a hook",
    "hook above": "a small hook above",
    "horn": "a horn",
    "stroke": "a bar through it",
    "diagonal stroke": "a slanted bar through it",
    "descender": "a descender",
    "psili": "a smooth breathing",
    "dasia": "a rough breathing",
    "ypogegrammeni": "an iota below",
    "prosgegrammeni": "an iota beside it",
}

_SIGNS: Final[dict[str, tuple[str, ...]]] = {
    "!": ("an exclamation point", "a bang"),
    '"': ("straight double quotes", "a double quote"),
    "#": ("a hash", "the hash sign", "a pound key"),
    "%": ("per cent", "the percentage sign"),
    "&": ("the and sign", "an ampersand"),
    "'": ("a straight single quote", "an apostrophe"),
    "(": ("an opening round bracket", "an opening parenthesis"),
    ")": ("a closing round bracket", "a closing parenthesis"),
    "*": ("a star", "an asterisk"),
    "+": ("a plus", "the addition sign"),
    ",": ("a comma",),
    "-": ("a hyphen", "a minus", "a short dash"),
    ".": ("a period", "a dot", "the full stop"),
    "/": ("a slash", "a forward slash"),
    ":": ("a colon", "two dots, one above the other"),
    ";": ("a semicolon",),
    "<": ("less than", "an opening angle bracket"),
    "=": ("equals", "the sign for is equal to"),
    ">": ("greater than", "a closing angle bracket"),
    "?": ("a question mark",),
    "@": ("at", "the at sign", "the sign of an e-mail address"),
    "[": ("an opening square bracket",),
    "]": ("a closing square bracket",),
    "\\": ("a backslash",),
    "^": ("a caret", "a hat"),
    "_": ("an underscore", "an underline"),
    "`": ("a backtick", "a back quote"),
    "{": ("an opening curly bracket", "an opening brace"),
    "}": ("a closing curly bracket", "a closing brace"),
    "|": ("a vertical bar", "a pipe"),
    "~": ("a tilde", "a wavy line"),
    "§": ("the paragraph sign of a law", "a section mark"),
    "¶": ("a paragraph mark",),
    "«": ("opening French quotes",),
    "»": ("closing French quotes",),
    "×": ("times", "a small cross for multiplication"),  # noqa: RUF001
    "÷": ("divided by",),
    "±": ("plus or minus",),
    "©": ("copyright", "a c in a circle"),
    "®": ("registered trademark", "an r in a circle"),
    "™": ("trademark", "a raised TM"),
    "°": ("degrees", "a small raised circle"),
    "€": ("the euro", "the currency sign of the euro"),
    "£": ("the pound", "the currency sign of the British pound"),
    "¥": ("the yen", "the currency sign of the yen"),
    "$": ("the dollar", "the currency sign of the dollar"),
    "…": ("three dots", "an ellipsis"),
    "–": ("a dash", "a dash as wide as an n"),  # noqa: RUF001
    "—": ("a long dash", "a dash as wide as an m"),
    "•": ("a bullet", "a round dot of a list"),
    "√": ("a root", "the square root sign"),
    "∞": ("infinity", "a lying eight"),
    "∑": ("a sum", "the summation sign"),
    "∏": ("a product", "the product sign"),
    "∫": ("an integral", "the integral sign"),
    "∂": ("a partial derivative", "a curly d"),
    "≠": ("not equal", "a struck-out equals sign"),
    "≤": ("less than or equal",),
    "≥": ("greater than or equal",),
    "≈": ("approximately equal", "two wavy lines"),
    "∅": ("the empty set",),
    "∈": ("is an element of",),
    "∀": ("for all", "an A upside down"),
    "∃": ("there exists", "an E turned round"),
}

# Everyday words for those of Unicode names, tried in this order.
_WORDS: Final = (
    (r"\bleftwards\b", "left"),
    (r"\brightwards\b", "right"),
    (r"\bupwards\b", "up"),
    (r"\bdownwards\b", "down"),
    (r"\bblack\b", "solid"),
    (r"\bwhite\b", "hollow"),
    (r"\bsolidus\b", "slash"),
    (r"\bvulgar fraction\b", "fraction"),
    (r"\bfull stop\b", "period"),
    (r"\bless-than\b", "less than"),
    (r"\bgreater-than\b", "greater than"),
    (r"\blow line\b", "underscore"),
    (r"\bmodifier letter\b", "small raised"),
    (r"\bsuperscript\b", "raised"),
    (r"\bsubscript\b", "lowered"),
    (r"\bn-ary\b", "large"),
    (r"\blamda\b", "lambda"),
)


def script_of(character: str) -> str:
    """The script that a character's name tells, "common" where it tells none.

    >>> script_of("я"), script_of("7")
    ('cyrillic', 'common')
    """
    words = unicodedata.name(character).lower().split()
    return next((word for word in words if word in SCRIPTS), "common")


def captions_of(character: str) -> tuple[str, ...]:
    """At least three ways to say which character this is, the Unicode name in lower case first.

    >>> captions_of("α")[:3]
    ('greek small letter alpha', 'small Greek letter alpha', 'Greek alpha, lower case')
    >>> captions_of("É")[-1], captions_of("/")[-2:]
    ('capital Latin E with an acute accent', ('a slash', 'a forward slash'))

    Raises:
        ValueError: a character that Unicode gives no name.
    """
    name = unicodedata.name(character).lower()
    letter = _LETTER.fullmatch(name)
    said = _of_letter(letter) if letter else _of_sign(character, name)
    return tuple(dict.fromkeys((name, *said)))


def _of_letter(letter: re.Match[str]) -> list[str]:
    script, case = letter["script"].title(), letter["case"]
    bare, _, marks = letter["rest"].replace("lamda", "lambda").partition(" with ")
    bare = bare.title() if case == "capital" and " " not in bare else bare
    what = f"{bare} with {marks}" if marks else bare
    if case is None:
        said = [f"{script} letter {what}", f"the letter {what} of the {script} alphabet", f"{script} {what}"]
    else:
        side = _CASES[case]
        said = [
            f"{case} {script} letter {what}",
            f"{script} {what}, {side} case",
            f"{side}case {script} {what}",
            f"the {case} letter {what} of the {script} alphabet",
        ]
    if marks:
        seen = " and ".join(_MARKS.get(mark, mark) for mark in marks.split(" and "))
        said.append(f"{case + ' ' if case else ''}{script} {bare} with {seen}")
    return said


def _of_sign(character: str, name: str) -> list[str]:
    plain = name
    for pattern, word in _WORDS:
        plain = re.sub(pattern, word, plain)
    arrow = re.fullmatch(r"(.* )?(left|right|up|down|north west|north east|south west|south east) (.*arrow)(.*)", plain)
    if arrow:
        before, way, shaft, after = (part or "" for part in arrow.groups())
        return [plain, f"{before}{shaft} pointing {way}{after}", f"the sign {plain}"]
    if name.startswith("digit "):
        word = name.removeprefix("digit ")
        return [f"the digit {character}", f"the number {word}", f"the figure {word}", f"a printed {word}"]
    kind = "" if re.search(r"\b(sign|symbol|mark|letter|operator)\b", name) else "the sign "
    return [plain, f"{kind or 'the '}{plain}", f"a printed {plain}", *_SIGNS.get(character, ())]
