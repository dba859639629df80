"""Writes the demo model's card from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from examples.train_demo_model.chat_format import prompt
from examples.train_demo_model.evaluation import Evaluation

DEMO_PROMPTS = (
    "Question: What is expert parallelism? Answer:",
    "Question: What happens when a worker dies? Answer:",
    "Once upon a time, a brave robot named Leo",
    "Question: What is 27 + 45? Answer:",
    prompt("What does an expert worker keep?"),
)
"""The first one is the prompt of the demo."""

HOW_MANY = {
    "addition": "sums of pairs of numbers below 100 that training never shows",
    "subtraction": "differences of pairs that training never shows",
    "comparison": "the larger of pairs that training never shows",
    "capitals": "known facts, asked in a way that training never shows for them",
    "colours": "the same",
    "opposites": "the same",
    "sounds": "the same",
    "serving": "the same; facts about mixtures of experts and expertmesh",
}


CARD = """\
# The demo model

A DeepSeek-V3 model small enough to live in a repository. It speaks only the language of its training text:
short stories, sums, a table of facts, and what expertmesh is. It is here so that a demonstration prints
sense, and so that quantization, failover and the levels of expert parallelism can be judged by answers that
are right or wrong. It knows nothing about the world, and what it says beside these subjects means nothing.

| | |
|---|---|
| parameters | {millions:.2f} million, {active_millions:.2f} million of them active for a token |
| layers | {num_hidden_layers}, the first one dense; hidden_size {hidden_size} |
| routed experts | {n_routed_experts} per layer, in {n_group} groups |
| chosen experts | {num_experts_per_tok} out of {topk_group} groups, and a shared one |
| attention | MLA, {num_attention_heads} heads, q_lora_rank {q_lora_rank}, kv_lora_rank {kv_lora_rank} |
| tokenizer | byte-level BPE, {num_tokens} tokens, digits one by one, DeepSeek's special tokens |
| weights | bfloat16, `e_score_correction_bias` float32, in the published layout |
| length | training documents have up to 256 tokens, max_position_embeddings is {max_position_embeddings} |

## Answers

Greedy answers, computed in float32 from the bfloat16 weights. In bfloat16 a near tie may fall the other way.
The first prompt is the one for demonstrations.

{demos}

Ask in one of the two forms that it knows, `Question: ... Answer:` or DeepSeek's chat template, or begin a
story. In a story it keeps to its plot, but it may forget who is a fox and who is a boy. Anything else, a
greeting too, is answered with a sum, a fact or silence.

## Measured

All of it in float32 from the published bfloat16 weights, on text that training never shows.

* Perplexity of a token of a held-out story: {perplexity:.3f}.
* Rows of the busiest expert as a multiple of the mean: {balance}.

An answer is right if the greedy answer to the question in chat format equals the expected one to the last
character, its end included.

| task | right | questions | which |
|---|---|---|---|
{accuracy}

`evaluation.json` holds the same numbers.

## In W8A8

`examples/demo_model_w8a8` is the same model with int8 weights, 7 MB instead of 12, made by the project's own
quantizer. Its perplexity is within 1 % of this one's, and it answers as well: the tests measure both.

## Text and licence

Every word comes from the seeded generator in `examples/train_demo_model`: a grammar of stories, arithmetic,
and a table of facts written for it. No other text was used. Weights, tokenizer and text are under the
project's own licence, Apache-2.0.

## Training

The text is drawn in three stages: sums, and after them comparisons, get more of it later on.
Next-token loss on what the model is to say (stories, answers and their ends; not the questions), AdamW, and
DeepSeek-V3's balancing without an auxiliary loss: after each step the bias of a busy expert falls and that
of an idle one rises. {num_steps} steps of 4,096 tokens took {minutes:.0f} minutes on
{machine}. The mean loss of the last 100 steps was {last_loss:.3f}.

![Training loss](loss_curve.svg)

```
python -m examples.train_demo_model --steps {num_steps}
```

trains such a model from nothing: the same text in the same order from the same seed. Not the same bits on
another machine, since sums are rounded in another order there.

```
rm -r examples/demo_model_w8a8
python -m common.quantize examples/demo_model examples/demo_model_w8a8
rm examples/demo_model_w8a8/evaluation.json
```

makes the W8A8 version of it. The quantizer copies the files beside the weights, and evaluation.json is about
these weights, not about those.
"""


class Run(NamedTuple):
    """How the model was trained."""

    num_steps: int
    seconds: float
    machine: str
    last_loss: float


class Demo(NamedTuple):
    """A prompt and the greedy answer to it."""

    prompt: str
    answer: str


def active_parameters(config: Mapping[str, Any], num_parameters: int) -> int:
    """Return how many parameters a token uses: all but the routed experts that it does not choose."""
    num_moe_layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    per_expert = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    num_idle = config["n_routed_experts"] - config["num_experts_per_tok"]
    return num_parameters - num_moe_layers * num_idle * per_expert


def accuracy_rows(evaluation: Evaluation) -> str:
    """Return one line of the table per task."""
    return "\n".join(
        f"| {task} | {share:.1%} | {evaluation.num_questions[task]} | {HOW_MANY[task]} |"
        for task, share in evaluation.accuracy.items()
    )


def demo_blocks(demos: Sequence[Demo]) -> str:
    """Return prompts and answers."""
    return "\n\n".join(
        f"Prompt:\n\n```text\n{demo.prompt}\n```\n\nAnswer:\n\n```text\n{demo.answer.strip()}\n```"
        for demo in demos
    )


def write_card(
    config: Mapping[str, Any],
    num_parameters: int,
    num_tokens: int,
    run: Run,
    evaluation: Evaluation,
    demos: Sequence[Demo],
) -> str:
    """Return MODEL_CARD.md."""
    num_active = active_parameters(config, num_parameters)
    balance = ", ".join(f"layer {layer} {ratio:.2f}" for layer, ratio in evaluation.imbalance.items())
    return CARD.format(
        **config,
        millions=num_parameters / 1e6,
        active_millions=num_active / 1e6,
        num_tokens=num_tokens,
        demos=demo_blocks(demos),
        perplexity=evaluation.story_perplexity,
        balance=balance,
        accuracy=accuracy_rows(evaluation),
        num_steps=run.num_steps,
        minutes=run.seconds / 60,
        machine=run.machine,
        last_loss=run.last_loss,
    )
