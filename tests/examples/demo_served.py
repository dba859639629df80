"""A checkpoint of the demo model as the product computes it, and how good its answers are."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from examples.train_demo_model.chat_format import BOS, EOS, prompt
from examples.train_demo_model.story_grammar import draw_story
from examples.train_demo_model.tasks import Question, held_out_questions
from router.plan import Chunk
from router.tokenizer import Tokenizer
from tests.router.driver import Driver
from tests.source import ROOT

BFLOAT16 = ROOT / "examples" / "demo_model"
W8A8 = ROOT / "examples" / "demo_model_w8a8"
SAMPLE = 40
"""Questions per task at most."""
MARGIN = 0.1
"""A sample of 40 may be that much worse than all questions together."""
MAX_TOKENS = 48
TASKS = sorted({question.task for question in held_out_questions()})


class Served:
    """The checkpoint as the product loads it, with the product's tokenizer."""

    def __init__(self, directory: Path, dtype: str) -> None:
        self.driver = Driver(directory, dtype, num_blocks=4096)
        self.tokenizer = Tokenizer.from_directory(directory, self.driver.config.vocab_size)
        (self.eos,) = self.driver.config.eos_token_ids(directory)

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Answer all prompts together; each answer ends with the end-of-sequence token, if it comes."""
        sequences = [self.driver.sequence(ids, room=num_tokens) for ids in prompts]
        answers: list[list[int]] = []
        for tokens in self.driver.greedy(sequences, num_tokens):
            end = tokens.index(self.eos) + 1 if self.eos in tokens else len(tokens)
            answers.append(tokens[:end])
        return answers

    def text(self, prompts: list[str], num_tokens: int) -> list[str]:
        """Answer texts with texts."""
        ids = [self.tokenizer.encode(text) for text in prompts]
        return [self.tokenizer.decode(tokens) for tokens in self.greedy(ids, num_tokens)]

    def logits(self, ids: list[int]) -> torch.Tensor:  # -> [T, V] float32
        """Compute the logits after every token, decoded token by token."""
        sequence = self.driver.sequence(ids)
        steps = (self.driver.step(Chunk(sequence, position, 1, True)) for position in range(len(ids)))
        return torch.cat([*steps])

    def accuracy(self, task: str) -> float:
        """The share of the task's sample that is answered right to the last character."""
        questions = sample(task)
        answers = self.text([prompt(question.text) for question in questions], MAX_TOKENS)
        right = [answer == question.answer for answer, question in zip(answers, questions, strict=True)]
        return sum(right) / len(right)

    def perplexity(self, texts: list[str]) -> float:
        """Of a token of the texts after its first one, decoded token by token, all texts together."""
        sequences = [self.driver.sequence(self.tokenizer.encode(text)) for text in texts]
        logprobs: list[float] = []
        for position in range(max(len(sequence.tokens) for sequence in sequences) - 1):
            going = [sequence for sequence in sequences if len(sequence.tokens) > position + 1]
            logits = self.driver.step(*(Chunk(sequence, position, 1, True) for sequence in going))
            following = torch.tensor([sequence.tokens[position + 1] for sequence in going])
            logprobs += logits.log_softmax(-1).gather(1, following[:, None])[:, 0].tolist()
        return float(torch.tensor(logprobs).mean().neg().exp())


def sample(task: str) -> list[Question]:
    """Take questions of a task that are spread evenly over all of them."""
    questions = [question for question in held_out_questions() if question.task == task]
    stride = max(1, len(questions) // SAMPLE)
    return questions[::stride][:SAMPLE]


def held_out_stories(count: int) -> list[str]:
    """Stories of the seed that the card's perplexity is measured on, which training never uses."""
    draw = random.Random("held out stories")
    return [BOS + draw_story(draw).text + EOS for _ in range(count)]
