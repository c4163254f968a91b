"""Whether the bundled tunes come out as their writers wrote them, counted without the product's own readers.

    python benchmarks/bench_abc.py [--folder data_lakh/abc] [--every N]

Reads the ABC of the books and the ABC that the study made of it with the small interpreter below. Prints the
shares of tunes with the onsets and lengths of their source (of those without repeats and chords), with its
first bar and with all its bars, both after the repeats were written out. Without a folder of converted tunes
it extracts and converts them first, and says how long that took.
"""
import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

from results import keep

SIGN = re.compile(r'"[^"]*"|!\S+?!|\{[^}]*\}|%.*|\[(?P<field>[A-Za-z]):(?P<value>[^]]*)\]'
                  r"|(?P<bar>\[?\|[]|:]*|:+\|[]|:]*|(?<!\(\d)::+)\s*(?:\[?(?P<ending>[1-9][\d,-]*))?"
                  r"|\[(?P<volta>[1-9][\d,-]*)|\((?P<p>[2-9])(?::(?P<q>\d?))?(?::(?P<r>\d?))?"
                  r"|(?P<chord>\[)|(?P<end>\])(?P<times>\d*/*\d*)"
                  r"|(?P<note>[_^=]*[A-Ga-gzxZ][,']*)(?P<length>\d*/*\d*)|(?P<tie>-)|(?P<broken>>+|<+)")
FIELD = re.compile(r"([A-Za-z+]):(?![|:])(.*)")


def fraction(text, default=Fraction(1)):
    """'3/2', '/', '//' ... as a number."""
    number, slash, below = text.partition("/")
    below = below.replace("/", "") or 2 ** (text.count("/"))
    return Fraction(int(number or 1), int(below) if slash else 1) if text else default


def metre(text):
    found = re.search(r"(\d+(?: *\+ *\d+)*)\)? */ *(\d+)", text)
    if found:
        return Fraction(sum(map(int, found[1].split("+"))), int(found[2]))
    return Fraction(1) if "C" in text else None


class Tune:
    """`bars`: [notes [(what, length, tied)], metre, the sign before it, number of its ending]."""

    def __init__(self, text):
        self.metre, self.unit, self.bars, self.voices = Fraction(1), None, [], set()
        self.chords = self.parts = False
        self.tuplet, self.scale, self.inside, self.broken, self.sign, self.ending = 0, 1, 0, 1, "[", ""
        self.new = True
        for line in text.splitlines():
            if field := FIELD.match(line):
                self.field(*field.groups())
            elif not line.strip() and self.bars:
                break
            elif not line.startswith("%"):
                for sign in SIGN.finditer(line):
                    self.take(sign)

    def field(self, letter, value):
        if letter == "M":
            self.metre = metre(value)
        elif letter == "L":
            self.unit = fraction(re.sub(r"\s|%.*", "", value))
        elif letter == "V":
            self.voices.add(value.split()[0])
        elif letter == "P":
            self.parts = True

    def take(self, sign):
        if sign["field"]:
            self.field(sign["field"], sign["value"])
        elif sign["bar"]:
            old = self.sign if self.new else "|"
            self.sign = sign["bar"] if old == "|" else old if sign["bar"] == "|" else old + sign["bar"]
            self.ending, self.new = sign["ending"] or "", True
        elif sign["volta"]:
            self.ending, self.new, self.sign = sign["volta"], True, self.sign if self.new else "["
        elif sign["p"]:
            p = int(sign["p"])
            q = int(sign["q"] or {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}.get(p) or (3 if self.compound() else 2))
            self.tuplet, self.scale = int(sign["r"] or p), Fraction(q, p)
        elif sign["chord"]:
            self.inside, self.chords = 1, True
        elif sign["end"] and self.inside:
            self.inside = 0
            self.stretch(fraction(sign["times"]))
        elif sign["note"] and self.inside < 2:
            self.inside *= 2  # of a chord the first note counts
            self.note(sign["note"], fraction(sign["length"]))
        elif sign["tie"] and self.bars and not self.new and self.bars[-1][0]:
            self.bars[-1][0][-1][2] = True
        elif sign["broken"] and self.bars and self.bars[-1][0]:
            less = Fraction(1, 2 ** len(sign["broken"]))
            self.broken = 2 - less if sign["broken"][0] == "<" else less
            self.stretch(2 - self.broken)

    def compound(self):
        return self.metre is not None and self.metre.numerator in (3, 9) and self.metre.denominator > 2

    def stretch(self, times):
        self.bars[-1][0][-1][1] *= times

    def note(self, what, length):
        if self.new:
            self.bars.append([[], self.metre, self.sign, self.ending])
            self.new = False
        unit = self.unit or Fraction(1, 16 if self.metre and self.metre < Fraction(3, 4) else 8)
        if what == "Z":
            unit = self.metre or 1
        scale, self.tuplet = (self.scale, self.tuplet - 1) if self.tuplet > 0 else (1, 0)
        self.bars[-1][0].append([what, length * unit * scale * self.broken, False])
        self.broken = 1


def turns(ending):
    found = {int(number) for number in re.findall(r"\d+", ending)}
    return set(range(min(found), max(found) + 1)) if "-" in ending else found


def unfold(bars, last_sign):
    """The bars in the order in which they are played. Without a |: a repeat begins at the start of the tune,
    or behind the last repeat or double bar."""
    order, start, turn, i, jumped = [], 0, 1, 0, set()
    while i < len(bars) or (last_sign.startswith(":") and i not in jumped):
        sign, ending = (bars[i][2], bars[i][3]) if i < len(bars) else (last_sign, "")
        if sign.startswith(":") and i and i not in jumped:  # the jump back
            jumped.add(i)
            i, turn = start, turn + 1
        elif sign != "|" and not ending:
            start, turn = i, 1
        elif ending and turn not in turns(ending):
            other = next((j for j in range(i + 1, len(bars)) if turn in turns(bars[j][3])), None)
            if other is None:
                turn = 1
            else:
                i = other
        if i < len(bars):
            order.append(bars[i])
        i += 1
    return order


def onsets(bars):
    """[(onset, length)] of the notes, tied ones joined."""
    found, now, tied = [], Fraction(0), None
    for what, length, tie in (note for bar in bars for note in bar[0]):
        if what[0] not in "zxZ":
            if tied and what in (tied, tied.strip("_^=")):
                found[-1][1] += length
            else:
                found.append([now, length])
            tied = what if tie else None
        now += length
    return [tuple(note) for note in found]


def lengths(bars):
    """The lengths of the bars; a short one before a repeat sign and the pick-up behind it are one bar."""
    found = []
    for notes, whole, sign, ending in bars:
        length = sum(note[1] for note in notes)
        if found and (ending or sign != "|") and whole and found[-1] < whole == found[-1] + length:
            found[-1] = whole
        else:
            found.append(length)
    return found


def compare(source, ours):
    """(notes alike, None if the tune has repeats or chords; first bar alike; all bars alike) of two Tunes.

    What MIDI has no place for does not count: a rest behind the last note. A rest before the pick-up is ours.
    """
    played, written = unfold(source.bars, source.sign), ours.bars
    while played and all(note[0][0] in "zxZ" for note in played[-1][0]):
        played.pop()
    theirs, mine = onsets(played), onsets(written)
    if not theirs or not mine:
        return None, False, False
    signs = "".join(sign + ending for _, _, sign, ending in source.bars) + source.sign
    plain = not source.chords and not re.search(r"[:\d]", signs)
    rest = mine[0][0] - theirs[0][0]
    alike = theirs == [(onset - rest, length) for onset, length in mine]
    a, b = lengths(played), lengths(written)
    b[0] -= rest
    b[-1] = min(a[-1], b[-1])
    return alike if plain else None, a[0] == b[0], a == b


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", help="of converted tunes")
    parser.add_argument("--every", type=int, default=1, help="convert every n-th tune only")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import LakhMIDI as study
    tunes, counts = dict(study.folk_tunes()), Counter()
    with tempfile.TemporaryDirectory() as made:
        if not args.folder:
            began = time.perf_counter()
            cfg = study.Cfg(DATA_ROOT=made, MAX_MIDI_FILES=len(tunes) // args.every)
            study.extract(cfg)
            study.convert(cfg)
            print(f"extract and convert: {time.perf_counter() - began:.0f} s")
        for name, tune in tunes.items():
            path = Path(args.folder or Path(made, "abc"), f"{name}.abc")
            source = Tune(tune.decode("latin-1"))
            if not path.exists() or len(source.voices) > 1 or source.parts:
                counts["voices or parts" if path.exists() else "not converted"] += 1
                continue
            notes, first, bars = compare(source, Tune(path.read_text("utf-8")))
            counts.update(tunes=1, first_bar=first, all_bars=bars)
            counts.update(plain=notes is not None, notes=bool(notes))
    row = {**counts, "share_notes": counts["notes"] / counts["plain"],
           "share_first_bar": counts["first_bar"] / counts["tunes"],
           "share_all_bars": counts["all_bars"] / counts["tunes"]}
    print(row)
    keep("abc", **row)


if __name__ == "__main__":
    main()
