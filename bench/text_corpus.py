"""The standard library's documentation strings as sequences of words: text that is always at hand.

Docstrings are read from the sources by ``ast``, in the order of the files' names, without running
anything. Every tenth file is test text, less the docstrings that training files have word for word.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
TEST_EVERY = 10
SPECIAL = ("<pad>", "<start>", "<unknown>")
PAD, START, UNKNOWN = range(len(SPECIAL))
Batch = dict[str, Tensor]


def docstrings(file: Path) -> list[str]:
    """Of the module, its classes and functions; none of a file that is not Python of this version.

    In the order of ``ast.walk``: the outer ones first.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def split_docstrings(
    root: Path = STANDARD_LIBRARY, most_files: int | None = None
) -> tuple[list[str], list[str]]:
    """Docstrings of training files and of test files below ``root``."""
    files = sorted(
        file.relative_to(root)
        for file in root.rglob("*.py")
        if not LEFT_OUT & set(file.relative_to(root).parts)
    )
    train: list[str] = []
    test: list[str] = []
    for number, file in enumerate(files[:most_files]):
        part = test if number % TEST_EVERY == TEST_EVERY - 1 else train
        part += docstrings(root / file)
    known = set(train)
    return train, [text for text in dict.fromkeys(test) if text not in known]


def words(text: str) -> list[str]:
    """Runs of letters in lower case, single digits, and every other sign that is not a space."""
    return re.findall(r"[a-z]+|[^\sa-z]", text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """The most frequent words, after the special ones."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """Of ``size`` entries at most; of equally frequent words the first in the alphabet."""
        counts = Counter(word for text in texts for word in words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *ranked[: size - len(SPECIAL)]))

    def sequences(self, texts: Iterable[str], length: int) -> list[list[int]]:
        """Pieces of at most ``length`` numbers that begin with <start>; at least two words each."""
        number = {word: index for index, word in enumerate(self.words)}
        found = []
        for text in texts:
            ids = [number.get(word, UNKNOWN) for word in words(text)]
            pieces = (ids[k : k + length - 1] for k in range(0, len(ids), length - 1))
            found += [[START, *piece] for piece in pieces if len(piece) >= 2]
        return found


def batches(sequences: list[list[int]], size: int) -> list[Batch]:
    """Sequences of like length together, padded on the right to the longest of each batch."""
    ordered = sorted(sequences, key=len)
    found = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        ids = torch.full((len(part), len(part[-1])), PAD)
        for row, sequence in zip(ids, part, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        found.append({"input_ids": ids, "attention_mask": (ids != PAD).long()})
    return found
