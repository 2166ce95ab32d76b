"""More text to learn from, made of the text there is.

A teacher labels any text, so text for distillation need not make sense; it has to show the student words and forms
that the corpus is poor in. TinyBERT (Jiao et al. 2020, section 3.3) replaces words by what a language model and word
vectors propose. This takes words at random, each as likely as any other, which shows rare words as often as common
ones, and needs no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

# How often each change is made, and how much of a text it changes. Not tuned on any evaluation set.
_SPANS, _SENTENCES = 0.35, 0.15
_REPLACED, _MOST_REPLACED = 0.6, 0.5
_TAGGED = 0.2
_MISTYPED = 0.15
_PUNCTUATED = 0.2
_SEPARATORS = (" ", " ", ", ", ". ", " - ", "; ")
_ENDINGS = ("", "!", "!!!", "?", "??", "...", ".", " :)", " :(")


def augmented(texts: Sequence[str], words: Sequence[str], rows: int, seed: int) -> Iterator[str]:
    """Make `rows` new texts.

    Each is a text, two texts, or spans of two texts; then words are replaced, tagged, joined or mistyped, and it ends
    in another punctuation, each with a probability of its own.

    Args:
        texts: what new texts are made of, at least one, each with at least one word.
        words: what words are replaced by, at least one.
        rows: number of texts to make.
        seed: the same arguments give the same texts.
    """
    random_ = random.Random(f"augmentation:{seed}")
    changes: tuple[tuple[float, Callable[[list[str], Sequence[str], random.Random], None]], ...] = (
        (_REPLACED, _replace),
        (_TAGGED, _tag),
        (_MISTYPED, _mistype),
        (_PUNCTUATED, _end),
    )
    for _ in range(rows):
        made = _base(texts, random_)
        for probability, change in changes:
            if random_.random() < probability:
                change(made, words, random_)
        yield " ".join(made)


def _base(texts: Sequence[str], random_: random.Random) -> list[str]:
    """Words of one text, of two spans, or of two texts."""
    kind = random_.random()
    first = random_.choice(texts)
    if kind >= _SPANS + _SENTENCES:
        return first.split()
    second = random_.choice(texts)
    if kind >= _SPANS:
        return f"{first} {second}".split()
    left, right = _span(first.split(), random_), _span(second.split(), random_)
    return (" ".join(left) + random_.choice(_SEPARATORS) + " ".join(right)).split()


def _span(words: list[str], random_: random.Random) -> list[str]:
    length = random_.randint(1, len(words))
    start = random_.randint(0, len(words) - length)
    return words[start : start + length]


def _replace(made: list[str], words: Sequence[str], random_: random.Random) -> None:
    share = random_.uniform(0, _MOST_REPLACED)
    for place in range(len(made)):
        if random_.random() < share:
            made[place] = random_.choice(words)


def _tag(made: list[str], words: Sequence[str], random_: random.Random) -> None:
    """Hashtags, words run together, and a mention in front."""
    for _ in range(random_.randint(1, 3)):
        place = random_.randrange(len(made))
        if random_.random() < 0.5:
            made[place] += random_.choice(words)
        made[place] = f"#{made[place]}"
    if random_.random() < 0.5:
        made.insert(0, "@user")


def _mistype(made: list[str], words: Sequence[str], random_: random.Random) -> None:
    """In one or two words a letter is lost, doubled, or changes places with the next."""
    for _ in range(random_.randint(1, 2)):
        place = random_.randrange(len(made))
        word = made[place]
        at = random_.randrange(len(word))
        made[place] = random_.choice(
            (
                word[:at] + word[at + 1 :] or word,
                word[:at] + word[at] * random_.randint(2, 4) + word[at + 1 :],
                word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            )
        )


def _end(made: list[str], words: Sequence[str], random_: random.Random) -> None:
    made[-1] = (made[-1].rstrip(".!?") or made[-1]) + random_.choice(_ENDINGS)
