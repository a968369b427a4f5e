"""The text of the examples: the reference manual of Python, which ships with Python itself.

It is what `help("for")` shows. `python examples/text_data.py` prints what is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

CHAPTERS = ("specialnames", "compound", "formatstrings")
"""Special methods, compound statements, and format strings."""

PADDING, UNKNOWN = 0, 1
WORD = re.compile(r"[a-z_]+|[^a-z_\s]")


class Paragraphs(NamedTuple):
    """Words as int32 of shape (n, length), and the number of the chapter, int64 of shape (n,)."""

    words: np.ndarray
    chapters: np.ndarray


def paragraphs(chapter: str) -> list[str]:
    """The paragraphs of a chapter that have more than a few words."""
    found = (" ".join(part.split()) for part in topics[chapter].split("\n\n"))
    return [part for part in found if len(part) > 60]


def vocabulary(texts: Sequence[str], size: int) -> dict[str, int]:
    """The most frequent words, and a number for each, after those of padding and the unknown."""
    counted = Counter(word for text in texts for word in WORD.findall(text.lower()))
    words = sorted(counted, key=lambda word: (-counted[word], word))[: size - 2]
    return {word: number for number, word in enumerate(words, start=2)}


def load_paragraphs(length: int = 32, vocabulary_size: int = 1000, seed: int = 0) -> Paragraphs:
    """Which chapter a paragraph is from: shuffled; all chapters together.

    Args:
        length: Words of a paragraph; longer ones are cut, shorter ones padded.
        vocabulary_size: Number of words that are known.
        seed: Decides the order.
    """
    texts = [(text, i) for i, name in enumerate(CHAPTERS) for text in paragraphs(name)]
    known = vocabulary([text for text, _ in texts], vocabulary_size)
    words = np.full((len(texts), length), PADDING, "int32")
    for row, (text, _) in zip(words, texts, strict=True):
        numbers = [known.get(word, UNKNOWN) for word in WORD.findall(text.lower())][:length]
        row[: len(numbers)] = numbers
    order = np.random.default_rng(seed).permutation(len(texts))
    return Paragraphs(words[order], np.array([chapter for _, chapter in texts])[order])


def load_characters(length: int = 48, size: int = 30_000, chapter: str = "compound") -> np.ndarray:
    """A chapter as ASCII codes, int32 of shape (n, length), one piece after the other."""
    text = " ".join(topics[chapter].split()).encode("ascii", "replace")[:size]
    codes = np.frombuffer(text, np.uint8).astype("int32")
    return codes[: len(codes) // length * length].reshape(-1, length)


if __name__ == "__main__":
    data = load_paragraphs()
    for number, name in enumerate(CHAPTERS):
        print(f"{name}: {np.sum(data.chapters == number)} paragraphs, such as:")
        print("   ", paragraphs(name)[3][:200])
    print("characters:", load_characters().shape)
