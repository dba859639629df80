"""The text the demo model learns from: stories and conversations, drawn without end from a seed.

Shapes: B rows of S tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.train_demo_model.chat_format import BOS, EOS, EOS_ID, Segment, chat, plain
from examples.train_demo_model.story_grammar import Cast, a, draw_story, questions_about
from examples.train_demo_model.tasks import training_pair, training_question

SYSTEM_PROMPTS = ("", "", "", "You are a helpful assistant.", "Answer in short sentences.")
FIRST_KINDS = {
    "story": 2,
    "told story": 3,
    "reading": 2,
    "chat": 16,
    "plain questions": 4,
    "statements": 2,
}
"""How often each kind of document is drawn at first."""
LATER_KINDS = FIRST_KINDS | {"told story": 2, "reading": 1, "chat": 12, "plain questions": 3, "drill": 9}
"""How often later on: stories and facts are learned in a few hundred steps, sums take thousands."""
LAST_KINDS = LATER_KINDS | {"drill": 5, "drill of comparisons": 4}
"""How often in the end: comparing numbers comes last."""
FILL = 0.97
"""Share of a batch's tokens that documents are drawn for; the rest is left over by packing."""


class TokenBatch(NamedTuple):
    """Rows of documents, one after the other.

    `learned` marks the positions whose next token counts; `document_ids` keeps documents apart.
    """

    input_ids: Tensor  # [B, S]
    next_ids: Tensor  # [B, S]
    learned: Tensor  # [B, S] bool
    document_ids: Tensor  # [B, S]


def story_request(draw: random.Random, cast: Cast) -> str:
    """Ask for a story with this cast."""
    return draw.choice(
        (
            "Tell me a story.",
            f"Tell me a story about {a(cast.kind)}.",
            f"Tell me a story about {a(f'{cast.mood} {cast.kind}')} named {cast.hero}.",
            f"Write a short story about {a(cast.kind)} named {cast.hero}.",
            f"Can you tell me a story about {cast.hero} and {cast.friend}?",
            f"Write a story about {a(f'{cast.mood} {cast.kind}')}.",
        )
    )


def draw_drill(draw: random.Random) -> list[Segment]:
    """Draw a document of sums and differences; the model learns to say their results."""
    segments: list[Segment] = [(BOS, False)]
    for _ in range(draw.randint(10, 20)):
        question = training_pair(draw, draw.choice(("addition", "subtraction")))
        task, result = question.answer.split(" =")
        segments += [(f"{' ' if len(segments) > 1 else ''}{task} =", False), (result, True)]
    return [*segments, (EOS, True)]


def draw_comparisons(draw: random.Random) -> list[Segment]:
    """Draw a long conversation about which number is larger."""
    questions = [training_pair(draw, "comparison") for _ in range(draw.randint(6, 10))]
    return chat([(question.text, question.answer) for question in questions])


def draw_document(draw: random.Random, kinds: Mapping[str, float] = FIRST_KINDS) -> list[Segment]:
    """Draw one document."""
    kind = draw.choices(list(kinds), weights=list(kinds.values()))[0]
    if kind == "drill":
        return draw_drill(draw)
    if kind == "drill of comparisons":
        return draw_comparisons(draw)
    if kind == "story":
        return [(BOS, False), (f"{draw_story(draw).text}{EOS}", True)]
    if kind == "told story":
        story = draw_story(draw)
        return chat([(story_request(draw, story.cast), story.text)], draw.choice(SYSTEM_PROMPTS))
    if kind == "reading":
        story = draw_story(draw)
        asked = draw.sample(questions_about(story), draw.randint(1, 3))
        first = (f"{story.text} {asked[0][0]}", asked[0][1])
        return chat([first, *asked[1:]], draw.choice(SYSTEM_PROMPTS))
    questions = [training_question(draw) for _ in range(draw.choice((1, 1, 2, 4, 6)))]
    if kind == "statements":
        return [(BOS, False), (" ".join(question.answer for question in questions) + EOS, True)]
    turns = [(question.text, question.answer) for question in questions]
    return chat(turns, draw.choice(SYSTEM_PROMPTS)) if kind == "chat" else plain(turns)


def draw_texts(seed: str, count: int, kinds: Mapping[str, float] = FIRST_KINDS) -> Iterator[str]:
    """Yield documents as plain text, for the tokenizer to learn from."""
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(text for text, _ in draw_document(draw, kinds))


def encode(tokenizer: Tokenizer, document: list[Segment]) -> tuple[list[int], list[bool]]:
    """Return the ids of a document, and of each whether the model learns to say it."""
    ids: list[int] = []
    said: list[bool] = []
    for text, is_said in document:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        said += [is_said] * len(piece)
    return ids, said


def draw_batch(
    tokenizer: Tokenizer, seed: str, num_rows: int, length: int, kinds: Mapping[str, float] = FIRST_KINDS
) -> TokenBatch:
    """Draw the batch that belongs to `seed`: the same one in every run.

    Documents are packed from long to short, each into the first row with room; what fits nowhere is left out.
    """
    draw = random.Random(seed)
    documents = []
    num_tokens = 0
    while num_tokens < FILL * num_rows * length:
        document = encode(tokenizer, draw_document(draw, kinds))
        documents.append(document)
        num_tokens += len(document[0])
    ids = torch.full((num_rows, length + 1), EOS_ID)
    said = torch.zeros(num_rows, length + 1, dtype=torch.bool)
    document_ids = torch.full((num_rows, length + 1), -1)
    filled = [0] * num_rows
    for number, (tokens, is_said) in enumerate(sorted(documents, key=lambda one: -len(one[0]))):
        row = next((row for row in range(num_rows) if filled[row] + len(tokens) <= length), None)
        if row is None:
            continue
        place = slice(filled[row], filled[row] + len(tokens))
        ids[row, place] = torch.tensor(tokens)
        said[row, place] = torch.tensor(is_said)
        document_ids[row, place] = number
        filled[row] += len(tokens)
    # The first token of a document is its beginning of sentence, which nothing before it learns to say.
    return TokenBatch(ids[:, :-1], ids[:, 1:], said[:, 1:], document_ids[:, :-1])
