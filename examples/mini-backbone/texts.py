"""What the voices read: everyday words, alone and in short sentences written for this recipe, and rows of common words.

A small vocabulary is used again and again in new orders, because the joint between ear and language model learns best
the words that it hears often; the rows of common words carry it beyond.
"""

from __future__ import annotations

import random
import zlib


def _words(text: str, between: str | None = None) -> list[str]:
    return text.split(between)


DIGITS = _words("zero one two three four five six seven eight nine ten")
COLOURS = _words("red green blue yellow black white brown orange purple grey")
ANIMALS = _words("cat dog bird horse cow sheep fish mouse lion bear duck frog pig rabbit elephant monkey snake")
THINGS = _words(
    "apple bread book table chair door window car train boat house tree flower river mountain cup knife spoon bottle "
    "phone letter key clock lamp bed shoe hat coat ball box bag ring stone bridge garden kitchen school street city"
)
PEOPLE = _words("man woman boy girl child doctor teacher friend mother father brother sister farmer king queen")
SIZES = _words("big small old new long short heavy fast slow happy sad quiet hot cold")
VERBS = _words("sees likes wants finds buys sells takes brings opens closes makes holds")
ACTIONS = _words("runs sleeps sings walks swims jumps waits laughs works reads")
PLACES = _words("in under behind near on over")
TIMES = _words("today tomorrow yesterday tonight now soon monday tuesday friday sunday morning evening winter summer")
COMMANDS = _words(
    "stop|go|yes|no|hello|goodbye|thank you|please wait|come here|turn left|turn right|turn on the light|"
    "turn off the light|open the door|close the window|play some music|call me later|good morning|good night|"
    "what time is it|how are you|where are you|i am here|i do not know|see you soon|that is right|that is wrong|"
    "help me please|listen to me|speak slowly|start again|try again|one more time|very good|not yet|of course",
    "|",
)
WORDS = tuple(dict.fromkeys(DIGITS + COLOURS + ANIMALS + THINGS + PEOPLE + SIZES + TIMES + VERBS + ACTIONS))
"""What a voice may say alone; `which word` asks for one of these."""


def sentence(draw: random.Random) -> str:
    """A short sentence, in lower case and without a full stop."""
    kind = draw.randrange(9)
    pick = draw.choice
    if kind == 0:
        return " ".join(pick(DIGITS) for _ in range(draw.randint(2, 4)))
    if kind == 1:
        return f"the {pick(COLOURS)} {pick(THINGS)}"
    if kind == 2:
        return f"the {pick(SIZES)} {pick(ANIMALS)} {pick(ACTIONS)}"
    if kind == 3:
        return f"the {pick(PEOPLE)} {pick(VERBS)} a {pick(COLOURS)} {pick(THINGS)}"
    if kind == 4:
        return f"{pick(DIGITS)} {pick(SIZES)} {pick(ANIMALS)}s".replace("mouses", "mice").replace("fishs", "fish")
    if kind == 5:
        return f"the {pick(ANIMALS)} is {pick(PLACES)} the {pick(THINGS)}"
    if kind == 6:
        return f"my {pick(PEOPLE)} {pick(ACTIONS)} {pick(TIMES)}"
    if kind == 7:
        return f"the {pick(THINGS)} is {pick(SIZES)} and {pick(COLOURS)}"
    return pick(COMMANDS)


LEFT_OUT = ("fuc", "shit", "porn", "sex", "nazi", "rape", "bitch", "dick", "nude", "murder", "suicide")


def common_words(count: int) -> list[str]:
    """The most common English words by the wheel `wordfreq`, without abbreviations and what nobody needs to hear."""
    import wordfreq

    found = wordfreq.top_n_list("en", 2 * count)
    proper = [w for w in found if w.isascii() and w.isalpha() and (len(w) > 2 or w in SHORT)]
    return [w for w in proper if not w.startswith(LEFT_OUT)][:count]


SHORT = _words("a i am an as at be by do go he if in is it me my no of oh on or so to up us we")


def word_row(draw: random.Random, words: list[str]) -> str:
    """Two to four common words without a sense."""
    return " ".join(draw.choice(words) for _ in range(draw.randint(2, 4)))


def heldout(text: str) -> bool:
    """Whether a sentence is kept for the test: one in eight, by its own letters, whoever speaks it."""
    return " " in text and text not in COMMANDS and zlib.crc32(text.encode()) % 8 == 0
