"""What is true in the pocket world: who lives where, what animals eat, what places are known for."""

from __future__ import annotations

TOWNS = ("Torv", "Mell", "Oster", "Pine", "Luna", "Karsk", "Dell", "Westa")
JOBS = ("baker", "nurse", "pilot", "farmer", "teacher", "painter", "cook", "judge")
PETS = ("cat", "dog", "horse", "rabbit", "parrot", "goat", "snake", "mouse")
FOODS = ("grass", "fish", "seeds", "worms", "leaves", "meat", "nuts", "honey")
HOMES = ("barn", "nest", "cave", "pond", "forest", "hill", "river", "field")
THINGS = ("cheese", "bells", "boats", "roses", "glass", "bread", "music", "wool")
RIVERS = ("Alba", "Brun", "Cero", "Dorn", "Esk", "Fal", "Glane", "Humber")

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Hugo", "Ivy", "Jack", "Karl", "Lena")
ANIMALS = ("bear", "owl", "frog", "deer", "fox", "duck", "wolf", "hare", "crow", "otter", "bat", "mole")

# relation: (values, subjects, questions, statement)
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str]] = {
    "town": (
        TOWNS,
        PEOPLE,
        (
            "Where does {s} live?",
            "What is the home town of {s}?",
            "In which town does {s} live?",
            "Where is {s} at home?",
        ),
        "{s} lives in {v}",
    ),
    "job": (
        JOBS,
        PEOPLE,
        (
            "What is the job of {s}?",
            "What does {s} do for work?",
            "How does {s} earn a living?",
            "What work does {s} do?",
        ),
        "{s} is a {v}",
    ),
    "pet": (
        PETS,
        PEOPLE,
        (
            "What pet does {s} have?",
            "Which pet lives with {s}?",
            "What animal does {s} own?",
            "What is the pet of {s}?",
        ),
        "{s} has a {v}",
    ),
    "food": (
        FOODS,
        ANIMALS,
        ("What does a {s} eat?", "What is the food of a {s}?", "What do you feed a {s}?", "What should a {s} eat?"),
        "a {s} eats {v}",
    ),
    "home": (
        HOMES,
        ANIMALS,
        (
            "Where does a {s} sleep?",
            "Where is the home of a {s}?",
            "Where do I find a {s}?",
            "In what place is a {s} at home?",
        ),
        "a {s} sleeps in the {v}",
    ),
    "known": (
        THINGS,
        TOWNS,
        ("What is {s} known for?", "Why do people visit {s}?", "What is {s} famous for?", "What should I buy in {s}?"),
        "{s} is known for {v}",
    ),
    "river": (
        RIVERS,
        TOWNS,
        (
            "Which river runs through {s}?",
            "What is the river of {s}?",
            "On which river is {s}?",
            "What river is in {s}?",
        ),
        "{s} is on the river {v}",
    ),
}


def value_of(relation: str, subject: str) -> str:
    """The true value. Fixed by arithmetic on the two lists, with a stride of its own for each relation."""
    values, subjects, _, _ = RELATIONS[relation]
    stride = {"town": 3, "job": 5, "pet": 7, "food": 3, "home": 5, "known": 3, "river": 5}[relation]
    at = subjects.index(subject)
    return values[(stride * at + at // len(values) + len(relation)) % len(values)]
