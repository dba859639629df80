"""Short stories in simple English, drawn from a grammar: a hero, a friend, a place, a thing, a plot.

What happens in a story stays true in it: names, kinds, places and things are used as they were introduced.
"""

from __future__ import annotations

import random
from typing import NamedTuple

HEROES = {
    "she": ("Lily", "Mia", "Anna", "Ella", "Nora", "Ruby", "Zoe", "Clara", "Ida", "Rosa"),
    "he": ("Tom", "Ben", "Max", "Sam", "Leo", "Finn", "Otto", "Jack", "Hugo", "Paul"),
}
KINDS = (
    *("fox", "bear", "rabbit", "mouse", "owl", "cat", "dog", "duck", "frog", "goat", "hen", "pony", "robot"),
    *("girl or boy", "girl or boy", "girl or boy", "wizard", "baker", "farmer"),
)
MOODS = ("little", "brave", "clever", "kind", "curious", "shy", "funny", "quiet", "proud", "lazy")
PLACES = (
    *("in the forest", "by the sea", "on a hill", "near the river", "in a small village", "on a farm"),
    *("in a big city", "at the edge of a lake", "in a green valley", "in an old castle"),
)
THINGS = {
    "kite": ("red", "blue", "yellow"),
    "ball": ("red", "green", "white"),
    "hat": ("black", "green", "brown"),
    "boat": ("white", "blue", "small"),
    "lamp": ("golden", "old", "small"),
    "key": ("golden", "silver", "old"),
    "book": ("blue", "old", "thick"),
    "drum": ("red", "big", "loud"),
    "basket": ("brown", "big", "small"),
    "bell": ("silver", "golden", "small"),
    "scarf": ("warm", "red", "long"),
    "stone": ("shiny", "white", "round"),
}
FOODS = ("apples", "bread", "soup", "honey", "cake", "berries", "cheese", "nuts", "pancakes", "carrots")
WEATHERS = ("sunny", "rainy", "windy", "cold", "warm", "foggy", "snowy")
HIDING_PLACES = (
    *(
        "under a tree",
        "behind a rock",
        "in the tall grass",
        "under the bed",
        "inside a box",
        "behind the door",
    ),
    *("near the old well", "under a bridge"),
)
LESSONS = {
    "sharing": (
        "sharing makes everything better",
        "a thing is worth more when it is shared",
    ),
    "courage": (
        "being brave means trying even when you are afraid",
        "a small step can take a lot of courage",
    ),
    "patience": ("good things need time", "it is worth waiting for good things"),
    "friendship": ("a good friend is the best thing of all", "two friends can do more than one alone"),
    "honesty": ("it is always better to tell the truth", "the truth makes a heart light"),
    "work": ("many hands make light work", "a big task is easy when everybody does a part"),
}


class Cast(NamedTuple):
    """Who and what a story is about."""

    hero: str
    she: str
    her: str
    hers: str
    kind: str
    mood: str
    friend: str
    friend_kind: str
    place: str
    thing: str
    colour: str


class Story(NamedTuple):
    """A story, and what can be asked about it."""

    cast: Cast
    text: str


def draw_cast(draw: random.Random) -> Cast:
    """Draw two different characters, a place and a thing."""
    she = draw.choice(("she", "he"))
    her, hers = ("her", "her") if she == "she" else ("him", "his")
    hero = draw.choice(HEROES[she])
    friend_is = draw.choice(("she", "he"))
    friend = draw.choice([name for name in HEROES[friend_is] if name != hero])
    kind, friend_kind = draw.choice(KINDS), draw.choice(KINDS)
    people = {"she": "girl", "he": "boy"}
    kind = people[she] if kind == "girl or boy" else kind
    friend_kind = people[friend_is] if friend_kind == "girl or boy" else friend_kind
    thing = draw.choice(list(THINGS))
    return Cast(
        hero,
        she,
        her,
        hers,
        kind,
        draw.choice(MOODS),
        friend,
        friend_kind,
        draw.choice(PLACES),
        thing,
        draw.choice(THINGS[thing]),
    )


def a(noun_phrase: str) -> str:
    """Put the indefinite article before a phrase."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def capital(text: str) -> str:
    """Begin a sentence."""
    return text[0].upper() + text[1:]


class Teller:
    """Says one thing in one of several ways."""

    def __init__(self, draw: random.Random, cast: Cast) -> None:
        self.cast = cast
        self.one_of = draw.choice
        self.chance = draw.random

    def opening(self) -> str:
        """Introduce the hero."""
        c = self.cast
        who = a(f"{c.mood} {c.kind}")
        return self.one_of(
            (
                f"Once upon a time, there was {who} named {c.hero}. {c.hero} lived {c.place}.",
                f"Once upon a time, {who} named {c.hero} lived {c.place}.",
                f"There once was {who} called {c.hero}, who lived {c.place}.",
                f"{c.hero} was {who}. {capital(c.she)} lived {c.place}.",
            )
        )

    def morning(self) -> str:
        """Say when it happens."""
        weather = self.one_of(WEATHERS)
        return self.one_of(
            (
                f"One {weather} day,",
                f"One {weather} morning,",
                f"It was a {weather} day, and",
                "One day,",
                f"On {a(f'{weather} afternoon')},",
            )
        )

    def meeting(self) -> str:
        """Let the friend come."""
        c = self.cast
        who = f"{c.friend} the {c.friend_kind}"
        return self.one_of(
            (
                f"Just then {who} came along.",
                f"On the way {c.she} met {who}.",
                f"Then {who} walked by.",
                f"{capital(c.hers)} friend {who} heard it and came at once.",
            )
        )

    def lesson(self, about: str) -> str:
        """Say what the hero learned."""
        text = self.one_of(LESSONS[about])
        c = self.cast
        return self.one_of(
            (
                f"That day {c.hero} learned that {text}.",
                f"And {c.hero} knew that {text}.",
                f"From then on {c.hero} always remembered that {text}.",
                f'"Now I know," said {c.hero}, "that {text}."',
            )
        )

    def ending(self) -> str:
        """End the story."""
        c = self.cast
        return self.one_of(
            (
                f"{c.hero} and {c.friend} were friends ever after.",
                f"In the evening {c.hero} went home and slept well.",
                "They laughed and went home together.",
                f"It was the best day of {c.hers} life.",
                f"{c.hero} smiled all the way home.",
                "The end.",
            )
        )


def lost_and_found(t: Teller) -> str:
    """A thing is lost and found again."""
    c, where = t.cast, t.one_of(HIDING_PLACES)
    lost = t.one_of(
        (
            f"{t.morning()} {c.hero} could not find {c.hers} {c.colour} {c.thing}.",
            f"{t.morning()} {c.hero} lost {c.hers} {c.colour} {c.thing}.",
        )
    )
    search = t.one_of(
        (
            f"{capital(c.she)} looked everywhere, but the {c.thing} was gone.",
            f"{c.hero} was sad, because {c.she} loved the {c.thing} very much.",
            f'"Where is my {c.thing}?" cried {c.hero}.',
        )
    )
    found = t.one_of(
        (
            f"They looked {where}, and there was the {c.thing}!",
            f"Together they searched until {c.friend} found the {c.thing} {where}.",
            f'"Look, it is {where}!" said {c.friend}, and there it was.',
        )
    )
    return f"{lost} {search} {t.meeting()} {found} {t.lesson('friendship')}"


def sharing(t: Teller) -> str:
    """Food is shared with somebody hungry."""
    c, food = t.cast, t.one_of(FOODS)
    have = t.one_of(
        (
            f"{t.morning()} {c.hero} had a basket full of {food}.",
            f"{t.morning()} {c.hero} carried home some {food}.",
        )
    )
    hungry = t.one_of(
        (
            f'"I am so hungry," said {c.friend}.',
            f"{c.friend} had nothing to eat.",
            f"{c.friend} looked at the {food} and was very hungry.",
        )
    )
    share = t.one_of(
        (
            f'"Take half of my {food}," said {c.hero}.',
            f"{c.hero} thought for a while and gave {c.friend} half of the {food}.",
            f'"Let us eat the {food} together," said {c.hero}.',
        )
    )
    return f"{have} {t.meeting()} {hungry} {share} They ate together and were happy. {t.lesson('sharing')}"


def courage(t: Teller) -> str:
    """Somebody afraid does it all the same."""
    c = t.cast
    fear, deed = t.one_of(
        (
            ("the dark", "walked into the dark cave"),
            ("deep water", "swam to the other side"),
            ("the storm", "went out into the storm"),
            ("high trees", "climbed the highest tree"),
            ("the big dragon", "said hello to the big dragon"),
        )
    )
    call = t.one_of((f'"Help!" cried {c.friend}.', f"{capital(c.she)} heard {c.friend} call for help."))
    afraid = t.one_of((f"{c.hero} was afraid of {fear}.", f"But {c.hero} had always been afraid of {fear}."))
    act = t.one_of(
        (
            f"Still {c.she} took a deep breath and {deed} to help {c.friend}.",
            f"{capital(c.she)} thought of {c.friend}, took a deep breath and {deed}.",
        )
    )
    thanks = t.one_of(
        (f'"Thank you, {c.hero}, you are so brave!" said {c.friend}.', f"{c.friend} was safe again.")
    )
    return f"{t.morning()} {c.hero} went for a walk. {call} {afraid} {act} {thanks} {t.lesson('courage')}"


def patience(t: Teller) -> str:
    """A seed needs time."""
    c = t.cast
    plant = t.one_of(("an apple tree", "a sunflower", "a big pumpkin", "a rose"))
    wait = t.one_of(
        (
            f"Every day {c.she} gave it water, but nothing happened.",
            f"{capital(c.she)} waited and waited, but the ground stayed empty.",
        )
    )
    advice = t.one_of(
        (
            f'"Do not worry, it needs time," said {c.friend} the {c.friend_kind}.',
            f'"Wait a little longer," said {c.friend} the {c.friend_kind}.',
        )
    )
    grown = t.one_of(
        (
            f"Many weeks later the seed became {plant}.",
            f"One morning a green leaf came up, and in the summer it was {plant}.",
        )
    )
    return f"{t.morning()} {c.hero} planted a seed. {wait} {advice} {grown} {t.lesson('patience')}"


def honesty(t: Teller) -> str:
    """A broken thing is owned up to."""
    c = t.cast
    broke = t.one_of(
        (
            f"{t.morning()} {c.hero} played with the {c.thing} of {c.friend} the {c.friend_kind} "
            f"and broke it.",
            f"{t.morning()} {c.hero} borrowed the {c.colour} {c.thing} of {c.friend} the {c.friend_kind}. "
            f"It fell down and broke.",
        )
    )
    hide = t.one_of(
        (f"First {c.she} wanted to hide the {c.thing}.", f"{c.hero} was afraid to tell {c.friend}.")
    )
    tell = t.one_of(
        (
            f'But then {c.she} said, "I am sorry, I broke your {c.thing}."',
            f"But in the end {c.hero} told {c.friend} what had happened.",
        )
    )
    forgive = t.one_of(
        (
            f'"Thank you for telling me," said {c.friend}, and they mended the {c.thing} together.',
            f"{c.friend} was not angry, and together they made a new {c.thing}.",
        )
    )
    return f"{broke} {hide} {tell} {forgive} {t.lesson('honesty')}"


def work(t: Teller) -> str:
    """A big task is shared."""
    c = t.cast
    task = t.one_of(
        ("build a house", "clean the barn", "pick all the apples", "paint the fence", "move the hay")
    )
    alone = t.one_of(
        (
            f"{capital(c.she)} worked all morning, but there was still so much to do.",
            f"It was too much work for one {c.kind} alone.",
        )
    )
    offer = t.one_of((f'"I will help you," said {c.friend}.', f'"Let us do it together," said {c.friend}.'))
    done = t.one_of(
        (
            "Everybody did a small part, and soon the work was done.",
            f"{c.hero} did one half and {c.friend} did the other half, and soon it was done.",
        )
    )
    return f"{t.morning()} {c.hero} had to {task}. {alone} {t.meeting()} {offer} {done} {t.lesson('work')}"


def gift(t: Teller) -> str:
    """A thing is given away."""
    c = t.cast
    find = t.one_of(
        (
            f"{t.morning()} {c.hero} found {a(f'{c.colour} {c.thing}')} {t.one_of(HIDING_PLACES)}.",
            f"{t.morning()} {c.hero} bought {a(f'{c.colour} {c.thing}')} at the market.",
        )
    )
    wish = t.one_of(
        (
            f'"What a beautiful {c.thing}!" said {c.friend}. "I always wanted one."',
            f"{c.friend} looked sad, because {c.friend} never had a {c.thing}.",
        )
    )
    give = t.one_of(
        (
            f'"It is for you," said {c.hero}, and gave {c.friend} the {c.thing}.',
            f"So {c.hero} gave the {c.colour} {c.thing} to {c.friend}.",
        )
    )
    return f"{find} {t.meeting()} {wish} {give} {t.lesson('sharing')}"


PLOTS = (lost_and_found, sharing, courage, patience, honesty, work, gift)


def draw_story(draw: random.Random) -> Story:
    """Draw a cast and a plot, and tell it."""
    cast = draw_cast(draw)
    teller = Teller(draw, cast)
    plot = draw.choice(PLOTS)
    return Story(cast, f"{teller.opening()} {plot(teller)} {teller.ending()}")


def questions_about(story: Story) -> tuple[tuple[str, str], ...]:
    """Return questions that the story answers, each with its answer."""
    c = story.cast
    return (
        ("Who is the story about?", f"The story is about {c.hero} the {c.kind}."),
        (f"Where did {c.hero} live?", f"{c.hero} lived {c.place}."),
        (f"Who was {c.friend}?", f"{c.friend} was {a(c.friend_kind)}."),
    )
