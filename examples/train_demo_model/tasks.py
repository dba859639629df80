"""Questions whose answers can be counted: sums, comparisons and the facts of the table.

Which questions are kept back for the evaluation follows from the question alone: no seed mixes them up.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from examples.train_demo_model.fact_table import CAPITALS, COLOURS, OPPOSITES, SERVING, SOUNDS

HELD_OUT_PERCENT = 8


class Question(NamedTuple):
    """A question and the one answer that counts as right."""

    task: str
    text: str
    answer: str


def addition(left: int, right: int, way: int = 0) -> Question:
    """Ask for a sum."""
    ways = (f"What is {left} + {right}?", f"{left} + {right} = ?", f"How much is {left} + {right}?")
    return Question("addition", ways[way], f"{left} + {right} = {left + right}.")


def subtraction(left: int, right: int, way: int = 0) -> Question:
    """Ask for a difference that is not negative."""
    left, right = max(left, right), min(left, right)
    ways = (f"What is {left} - {right}?", f"{left} - {right} = ?", f"How much is {left} - {right}?")
    return Question("subtraction", ways[way], f"{left} - {right} = {left - right}.")


def comparison(left: int, right: int, way: int = 0) -> Question:
    """Ask for the larger of two numbers."""
    ways = (
        f"Which is larger, {left} or {right}?",
        f"Which number is larger, {left} or {right}?",
        f"What is larger, {left} or {right}?",
    )
    return Question("comparison", ways[way], f"{max(left, right)} is larger.")


NUMERIC: dict[str, Callable[[int, int, int], Question]] = {
    "addition": addition,
    "subtraction": subtraction,
    "comparison": comparison,
}


def capital(country: str, city: str) -> tuple[Question, ...]:
    """Ask for a capital in every way."""
    ways = (
        f"What is the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Tell me the capital of {country}.",
        f"Do you know the capital of {country}?",
    )
    return tuple(Question("capitals", way, f"The capital of {country} is {city}.") for way in ways)


def colour(thing: str, name: str) -> tuple[Question, ...]:
    """Ask for a colour in every way."""
    ways = (
        f"What colour is {thing}?",
        f"Which colour is {thing}?",
        f"Tell me the colour of {thing}.",
        f"What is the colour of {thing}?",
    )
    return tuple(Question("colours", way, f"{thing[0].upper()}{thing[1:]} is {name}.") for way in ways)


def opposite(word: str, other: str) -> tuple[Question, ...]:
    """Ask for an opposite in every way."""
    ways = (
        f"What is the opposite of {word}?",
        f"Which word is the opposite of {word}?",
        f"Tell me the opposite of {word}.",
        f"Do you know the opposite of {word}?",
    )
    return tuple(Question("opposites", way, f"The opposite of {word} is {other}.") for way in ways)


def sound(animal: str, noise: str) -> tuple[Question, ...]:
    """Ask for an animal's sound in every way."""
    article = "An" if animal[0] in "aeiou" else "A"
    ways = (
        f"What does {article.lower()} {animal} say?",
        f"Which sound does {article.lower()} {animal} make?",
        f"Tell me what {article.lower()} {animal} says.",
        f"What sound does {article.lower()} {animal} make?",
    )
    return tuple(Question("sounds", way, f"{article} {animal} says {noise}.") for way in ways)


def fact_questions() -> dict[str, tuple[tuple[Question, ...], ...]]:
    """Every fact of every task, and of every fact all the ways to ask for it."""
    both_ways = OPPOSITES | {other: word for word, other in OPPOSITES.items()}

    def each(
        make: Callable[[str, str], tuple[Question, ...]], table: Mapping[str, str]
    ) -> tuple[tuple[Question, ...], ...]:
        return tuple(make(subject, answer) for subject, answer in table.items())

    return {
        "capitals": each(capital, CAPITALS),
        "colours": each(colour, COLOURS),
        "opposites": each(opposite, both_ways),
        "sounds": each(sound, SOUNDS),
        "serving": tuple(tuple(Question("serving", way, answer) for way in ways) for answer, ways in SERVING),
    }


FACTS = fact_questions()
TASKS = (*NUMERIC, *FACTS)


def is_held_out_pair(task: str, left: int, right: int) -> bool:
    """Whether a pair of numbers is kept back, in both orders and in every way to ask."""
    key = f"{task} {max(left, right)} {min(left, right)}"
    return hashlib.sha256(key.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def held_out_way(fact: tuple[Question, ...]) -> int:
    """Choose which way to ask for a fact is kept back; never the first one, which the demo asks."""
    digest = hashlib.sha256(fact[0].text.encode()).digest()[0]
    return 1 + digest % (len(fact) - 1)


def training_question(draw: random.Random) -> Question:
    """Draw a question that is not kept back."""
    kind = draw.choices((*NUMERIC, *FACTS), weights=(16, 14, 4, 4, 3, 4, 2, 6))[0]
    if kind in NUMERIC:
        while True:
            largest = draw.choice((9, 20, 99, 99, 99, 99))
            left, right = draw.randint(0, largest), draw.randint(0, draw.choice((9, largest)))
            if draw.random() < 0.5:
                left, right = right, left
            is_usable = kind != "comparison" or left != right
            if is_usable and not is_held_out_pair(kind, left, right):
                return NUMERIC[kind](left, right, draw.randrange(3))
    fact = draw.choice(FACTS[kind])
    kept = held_out_way(fact)
    return draw.choice([question for way, question in enumerate(fact) if way != kept])


def training_pair(draw: random.Random, task: str) -> Question:
    """Ask about any two numbers below 100 that are not kept back."""
    while True:
        left, right = draw.randrange(100), draw.randrange(100)
        is_usable = task != "comparison" or left != right
        if is_usable and not is_held_out_pair(task, left, right):
            return NUMERIC[task](left, right, draw.randrange(3) if task == "comparison" else 0)


def held_out_questions() -> Iterator[Question]:
    """Yield every question that training never sees: pairs of numbers, and ways to ask for a known fact."""
    for kind, make in NUMERIC.items():
        for left in range(100):
            for right in range(left if kind == "comparison" else left + 1):
                if is_held_out_pair(kind, left, right):
                    pair = (left, right) if (left * right + left) % 2 else (right, left)
                    yield make(*pair, (left + right) % 3)
    for facts in FACTS.values():
        for fact in facts:
            yield fact[held_out_way(fact)]
