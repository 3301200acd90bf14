"""Fonts for names of classes in any script."""

import contextlib
import logging
import unicodedata
from functools import cache

log = logging.getLogger("addp")

INVISIBLE = {"Cc", "Cf", "Zs"}  # Unicode's categories of control characters, formats and spaces


@cache
def find_font(characters: str) -> str | None:
    """Return the file of an installed font that has these characters: DejaVu Sans, which comes with matplotlib, or
    another one, such as a font of Chinese. None for ASCII alone, which every default font has.

    If no font has all of them, DejaVu Sans is returned, and a line of the log says what it lacks.
    """
    if characters.isascii():
        return None
    from matplotlib import font_manager, ft2font  # slow to import

    default = font_manager.findfont("DejaVu Sans")
    needed = {ord(character) for character in characters if unicodedata.category(character) not in INVISIBLE}
    others = {font.fname for font in font_manager.fontManager.ttflist if "LastResort" not in font.fname}
    for path in [default, *sorted(others)]:
        with contextlib.suppress(OSError, RuntimeError):  # a broken font file
            if needed <= ft2font.FT2Font(path).get_charmap().keys():
                return path
    lacking = "".join(map(chr, sorted(needed - ft2font.FT2Font(default).get_charmap().keys())))
    log.warning("no installed font has all characters of these names; drawn as boxes: %s", lacking[:40])
    return default
