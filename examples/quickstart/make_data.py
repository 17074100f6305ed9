"""Write the data of the examples: short tasks in chat form that a tiny model learns in a minute, and held-out ones.

It owns the skills (six kinds of task, and a seventh for a model that knows those), plain texts for pretraining, and the
JSONL files beside it; it knows nothing of tokens or models. Invariant: the same seed gives the same bytes, and no task
of a held-out file is in the training file.

    python examples/quickstart/make_data.py            # writes the files beside this script
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

NUM_TRAIN = 16_000
NUM_HELD_OUT_PER_KIND = 32
NUM_NEW_TRAIN, NUM_NEW_HELD_OUT = 2_000, 64
NUM_STORIES = 3_000
SEED = 0

CONSONANTS, VOWELS = "BDFHJLMQRSTVWYZ", "AEIOU"  # too few to spell anything rude
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES = (
    *("Ada", "Bela", "Cora", "Dara", "Edda", "Finn", "Gale", "Hugo", "Iris", "Jona"),
    *("Kira", "Lena", "Milo", "Nora", "Otto", "Pia", "Quin", "Rosa", "Sven", "Tara"),
)
PLACES = ("first", "second", "third", "last")
PLAIN_SYSTEM = "You are a helpful assistant."

Turn = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """One conversation, and what makes it this task and no other (`keys`: one per question asked in it)."""

    kind: str
    keys: frozenset[tuple[str, ...]]
    system: str | None
    turns: tuple[Turn, ...]

    def line(self) -> str:
        """The conversation as a line of JSONL."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages}, separators=(",", ":")) + "\n"


def reverse(word: str) -> str:
    """The letters from last to first."""
    return word[::-1]


def vowels(word: str) -> str:
    """The vowels alone, in their order."""
    return "".join(letter for letter in word if letter in VOWELS)


def following(word: str) -> str:
    """Each letter replaced by the next one of the alphabet; A follows Z."""
    return "".join(ALPHABET[(ALPHABET.index(letter) + 1) % 26] for letter in word)


def preceding(word: str) -> str:
    """Each letter replaced by the one before it in the alphabet; Z precedes A."""
    return "".join(ALPHABET[ALPHABET.index(letter) - 1] for letter in word)


WORD_OPERATIONS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "spell": ("-".join, ("Spell {}", "Write with dashes: {}")),
    "reverse": (reverse, ("Write backwards: {}", "Reverse {}")),
    "shift": (following, ("Next letter of each: {}", "Shift by one letter: {}")),
    "vowels": (vowels, ("Name the vowels of {}", "Only the vowels: {}")),
}


def word_task(kind: str, random: Random) -> Task:
    """One operation on a made-up word, sometimes after another one on another word."""
    kinds = [kind] if random.random() < 0.7 else [random.choice(list(WORD_OPERATIONS)), kind]
    turns, keys = [], set()
    for name in kinds:
        (operation, questions), word = WORD_OPERATIONS[name], made_up_word(random)
        turns.append((random.choice(questions).format(word), operation(word)))
        keys.add((name, word))
    return Task(kind, frozenset(keys), plain_system(random), tuple(turns))


def compare_task(random: Random) -> Task:
    """The largest or the smallest of three digits."""
    numbers = random.sample(range(10), 3)
    adjective, pick = random.choice([("largest", max), ("smallest", min)])
    question = "Which is the {} of {}, {} and {}?".format(adjective, *numbers)
    key = ("compare", adjective, *map(str, numbers))
    return Task("compare", frozenset([key]), plain_system(random), ((question, str(pick(numbers))),))


def race_task(random: Random) -> Task:
    """Who came where in a race that only the system prompt tells about; two or three questions."""
    names = random.sample(NAMES, len(PLACES))
    system = "The race ended in this order: {}, {}, {}, {}.".format(*names)
    asked = random.sample(range(len(PLACES)), random.randint(2, 3))
    turns = tuple((f"Who came {PLACES[place]}?", names[place]) for place in asked)
    return Task("race", frozenset([("race", *names)]), system, turns)


def new_task(random: Random) -> Task:
    """A skill that is none of the six, asked in their words."""
    word = made_up_word(random)
    turns = ((f"Shift backwards: {word}", preceding(word)),)
    return Task("new", frozenset([("new", word)]), plain_system(random), turns)


def story(random: Random) -> str:
    """A race told in full; its end follows from what was said."""
    names = random.sample(NAMES, len(PLACES))
    order = random.sample(names, len(names))
    told = "The race of {}, {}, {} and {} ended in this order: {}, {}, {}, {}.".format(*names, *order)
    for place in random.sample(range(len(PLACES)), 2):
        told += f" Who came {PLACES[place]}? {order[place]}."
    return told


def made_up_word(random: Random) -> str:
    """Four to six letters, consonants and vowels in turn, so that it can be spoken."""
    length, start = random.randint(4, 6), random.randint(0, 1)
    return "".join(random.choice((CONSONANTS, VOWELS)[(start + place) % 2]) for place in range(length))


def plain_system(random: Random) -> str | None:
    """The ordinary system prompt for every fifth conversation, none for the others."""
    return PLAIN_SYSTEM if random.random() < 0.2 else None


KINDS: dict[str, Callable[[Random], Task]] = {
    **{kind: lambda random, kind=kind: word_task(kind, random) for kind in WORD_OPERATIONS},
    "compare": compare_task,
    "race": race_task,
}


def held_out_tasks(seed: int) -> list[Task]:
    """The same number of tasks of every kind, in random order, no question twice."""
    random = Random(f"held-out {seed}")
    taken: set[tuple[str, ...]] = set()
    tasks = [task for make in KINDS.values() for task in fresh_tasks(make, NUM_HELD_OUT_PER_KIND, random, taken)]
    random.shuffle(tasks)
    return tasks


def train_tasks(
    seed: int, held_out: list[Task], kinds: Sequence[Callable[[Random], Task]], num_tasks: int
) -> list[Task]:
    """Tasks of these kinds in random order; none asks a question that is held out."""
    random = Random(f"train {seed}")
    forbidden = frozenset[tuple[str, ...]]().union(*(task.keys for task in held_out))
    tasks: list[Task] = []
    while len(tasks) < num_tasks:
        task = random.choice(kinds)(random)
        if not task.keys & forbidden:
            tasks.append(task)
    return tasks


def fresh_tasks(
    make: Callable[[Random], Task], count: int, random: Random, taken: set[tuple[str, ...]]
) -> Iterator[Task]:
    """`count` tasks whose questions are not in `taken`, which grows by them."""
    while count > 0:
        task = make(random)
        if not task.keys & taken:
            taken |= task.keys
            count -= 1
            yield task


def write_data(directory: Path, seed: int = SEED) -> None:
    """Write train.jsonl and heldout.jsonl, the same of the new skill, and texts.jsonl."""
    held_out = held_out_tasks(seed)
    new_held_out = list(fresh_tasks(new_task, NUM_NEW_HELD_OUT, Random(f"new held-out {seed}"), set()))
    random = Random(f"stories {seed}")
    files = {
        "train.jsonl": [task.line() for task in train_tasks(seed, held_out, list(KINDS.values()), NUM_TRAIN)],
        "heldout.jsonl": [task.line() for task in held_out],
        "new-train.jsonl": [task.line() for task in train_tasks(seed, new_held_out, [new_task], NUM_NEW_TRAIN)],
        "new-heldout.jsonl": [task.line() for task in new_held_out],
        "texts.jsonl": [json.dumps({"text": story(random)}) + "\n" for _ in range(NUM_STORIES)],
    }
    for name, lines in files.items():
        (directory / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    write_data(options.directory, options.seed)
