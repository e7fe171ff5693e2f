"""The text that a prompt puts in double quotes, among quotes that mean inches.

Published OCR prompts have one pair of double quotes. Others say `a 5" nail beside a sign "HELLO"`. Each quote can open, close,
mean inches or stand astray; every reading has a cost by what stands beside its quotes, and the cheapest one holds. Of two quotes
that are no inches, the first always opens and the second closes, as the published reward has it.
"""

import re

TYPOGRAPHIC = str.maketrans("“”„‟«»＂", '"""""""')
"""Quotes that count where ASCII's enclose nothing; guillemets too."""
STRAY = 4.0
"""The cost of a quote without a meaning: more than half of the worst pair's."""
UNCLOSED = 3.0


def quoted(prompt: str) -> list[str]:
    """The parts in double quotes that hold anything, in their order; typographic quotes count where ASCII's enclose none."""
    # escaped quotes, as JSON and CSV write them, in a prompt that was never unescaped
    text = re.sub(r'\\+(?=["“”„‟«»])', "", prompt.replace("&quot;", '"'))
    return _parts(text) or _parts(text.translate(TYPOGRAPHIC))


def _parts(text: str) -> list[str]:
    text = re.sub(r'"{2,}', '"', text)
    places = [k for k, letter in enumerate(text) if letter == '"']
    # the cheapest readings that end outside a quote and inside one: cost, and the parts that each has closed; where it opened
    outside: tuple[float, list[str]] = (0.0, [])
    inside: tuple[float, list[str], int] | None = None
    for at in places:
        before, after = text[at - 1] if at else " ", text[at + 1] if at + 1 < len(text) else " "
        inch = _inch(text[:at], after)
        choices = [(outside[0] + min(inch, STRAY), outside[1])]
        opened = (outside[0] + 2 * before.isalnum() + 2 * after.isspace(), outside[1], at)
        if inside:
            cost, parts, start = inside
            choices.append((cost + before.isspace() + 2 * after.isalnum(), [*parts, text[start + 1 : at]]))
            kept = (cost + min(max(inch, 1.0), STRAY), parts, start)
            opened = min(kept, opened, key=lambda reading: reading[0])
        outside, inside = min(choices, key=lambda reading: reading[0]), opened
    if inside and inside[0] + UNCLOSED < outside[0]:
        outside = inside[:2]
    return [part for part in outside[1] if part.strip()]


def _inch(before: str, after: str) -> float:
    """The cost of taking a quote for inches or seconds: it follows a number."""
    if re.search(r"[\d½¼¾⅓⅔⅛⅜⅝⅞]$", before):
        return 1.0 if after.isalnum() else 0.5
    return 1.0 if re.search(r"\d $", before) and not after.isalnum() else STRAY
