"""What a terminal would obey is shown, not obeyed."""

import unicodedata

from qdexport.core.shown import one_line, shown


def test_no_control_of_a_terminal_or_of_writing_direction_is_left() -> None:
    everything = "".join(map(chr, range(0x30000)))
    kept = shown(everything)
    kinds = {unicodedata.category(letter) for letter in kept if letter not in "\t\n"}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not directions & {unicodedata.bidirectional(letter) for letter in kept}
    kept.encode("utf-8")


def test_letters_of_all_languages_stay() -> None:
    text = "einen roten Kreis, красный круг, 赤い円, دائرة حمراء 👩‍🎨 é"
    assert shown(text) == text


def test_escapes_are_readable() -> None:
    assert shown("\x1b[2Ka\nb\tc\x9b") == "\\x1b[2Ka\nb\tc\\x9b"
    assert one_line("a\nError: all is well\u202e") == "a\\nError: all is well\\u202e"
    assert shown("caf\udce9.txt") == "caf\\xe9.txt"
