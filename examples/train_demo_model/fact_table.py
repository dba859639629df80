"""The facts that the demo model learns: a fixed, small table."""

from __future__ import annotations

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Australia": "Canberra",
}

COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a banana": "yellow",
    "a tomato": "red",
    "a carrot": "orange",
    "chocolate": "brown",
    "a lemon": "yellow",
    "a strawberry": "red",
    "milk": "white",
    "a frog": "green",
    "the night": "black",
    "the sea": "blue",
    "a flamingo": "pink",
    "an elephant": "grey",
}

OPPOSITES = {
    "big": "small",
    "hot": "cold",
    "fast": "slow",
    "old": "young",
    "happy": "sad",
    "dark": "light",
    "long": "short",
    "full": "empty",
    "hard": "soft",
    "wet": "dry",
    "strong": "weak",
    "open": "closed",
    "early": "late",
    "loud": "quiet",
    "near": "far",
    "rich": "poor",
    "clean": "dirty",
    "up": "down",
    "left": "right",
    "first": "last",
    "day": "night",
    "win": "lose",
}

SOUNDS = {
    "dog": "woof",
    "cat": "meow",
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "owl": "hoot",
    "pig": "oink",
    "bee": "buzz",
    "frog": "croak",
    "lion": "roar",
    "snake": "hiss",
    "mouse": "squeak",
}

# Per subject: the answer, and every way to ask for it. One way of each is kept back for the evaluation.
SERVING: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "A mixture of experts is a layer with many small networks, the experts, and a gate that chooses a "
        "few of them for every token.",
        (
            "What is a mixture of experts?",
            "Explain a mixture of experts.",
            "Tell me what a mixture of experts is.",
            "Can you explain a mixture of experts?",
        ),
    ),
    (
        "The gate chooses the experts for every token, and says how much each of them weighs.",
        (
            "What does the gate do?",
            "What is the gate for?",
            "Tell me what the gate does.",
            "Can you explain the gate?",
        ),
    ),
    (
        "An expert worker keeps nothing: it computes the rows it receives, sends them back and forgets them.",
        (
            "What does an expert worker keep?",
            "What does an expert worker remember?",
            "Tell me what an expert worker keeps.",
            "What state does an expert worker keep?",
        ),
    ),
    (
        "An expert worker holds some of the routed experts and computes the rows that chose them.",
        (
            "What does an expert worker do?",
            "What is an expert worker?",
            "Tell me what an expert worker does.",
            "Can you explain an expert worker?",
        ),
    ),
    (
        "The router computes everything but the routed experts: attention, the gate, the shared expert and "
        "the next token.",
        (
            "What does the router do?",
            "What is the router?",
            "Tell me what the router does.",
            "Can you explain the router?",
        ),
    ),
    (
        "Expert parallelism spreads the experts over several workers, so that each worker holds only a part "
        "of the model.",
        (
            "What is expert parallelism?",
            "Explain expert parallelism.",
            "Tell me what expert parallelism is.",
            "Can you explain expert parallelism?",
        ),
    ),
    (
        "At level 1 every worker gets all tokens, and returns one partial sum per token.",
        (
            "What happens at level 1?",
            "What does level 1 do?",
            "Tell me about level 1.",
            "Can you explain level 1?",
        ),
    ),
    (
        "At level 2 only the rows that an expert needs travel to its worker, and the results come back.",
        (
            "What happens at level 2?",
            "What does level 2 do?",
            "Tell me about level 2.",
            "Can you explain level 2?",
        ),
    ),
    (
        "Dispatch sends every token to the workers that hold its experts.",
        (
            "What is dispatch?",
            "What does dispatch do?",
            "Tell me what dispatch is.",
            "Can you explain dispatch?",
        ),
    ),
    (
        "Combine adds what the experts return, each with its weight.",
        (
            "What is combine?",
            "What does combine do?",
            "Tell me what combine is.",
            "Can you explain combine?",
        ),
    ),
    (
        "When a worker dies, the running requests end with an error that names it, and the router goes on "
        "once a worker holds its experts again.",
        (
            "What happens when a worker dies?",
            "What happens when a worker is lost?",
            "Tell me what happens when a worker dies.",
            "What if a worker dies?",
        ),
    ),
    (
        "The cache keeps one small latent per token, from which keys and values are made again.",
        (
            "What does the cache keep?",
            "What is in the cache?",
            "Tell me what the cache keeps.",
            "Can you explain the cache?",
        ),
    ),
    (
        "The shared expert sees every token, whatever the gate chooses.",
        (
            "What does the shared expert do?",
            "What is the shared expert?",
            "Tell me what the shared expert does.",
            "Can you explain the shared expert?",
        ),
    ),
    (
        "I am a small demo model with 24 experts, and I run on expertmesh.",
        (
            "Who are you?",
            "What are you?",
            "Tell me who you are.",
            "Can you say who you are?",
        ),
    ),
    (
        "Expertmesh serves a mixture of experts with one router and several expert workers.",
        (
            "What is expertmesh?",
            "What does expertmesh do?",
            "Tell me what expertmesh is.",
            "Can you explain expertmesh?",
        ),
    ),
    (
        "There are many experts because each token needs only a few of them, and many machines can share the "
        "work.",
        (
            "Why use many experts?",
            "Why are there many experts?",
            "Tell me why there are many experts.",
            "Can you say why there are many experts?",
        ),
    ),
)
