"""What a model is asked when it drafts complements, checks them, or sorts prompts: fourteen categories with their seeds.

The released seeds of PAS have 13 categories of 4 to 6 Chinese examples; these are our own, in English. A category's
complements are worded so that they suit its other prompts too: without a drafting model they are the drafts themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RULES = (
    "Only supplement the prompt; never answer it, and give away no part of the answer.",
    "Stay within what the prompt means: do not widen it, narrow it or contradict it.",
    "Say how such a prompt is answered well (what to cover, in which order), not what the answer says.",
    "Ask for the style that suits this kind of prompt, and for nothing that the prompt already settles.",
    "Use about 30 words, fewer where the prompt is simple.",
    "Write in the language of the prompt, as one paragraph of plain text.",
)

CRITERIA = (
    "it conflicts with the prompt or drifts from what the user means",
    "it adds too much to a prompt that already says what is wanted",
    "it answers the prompt, wholly or in part, where it should only supplement it",
    "it demands more than such a prompt calls for",
    "it is in another language than the prompt",
)


@dataclass(frozen=True)
class Category:
    """what: completes "The prompt is ...". cue: a pattern that finds it without a model. text: the seeds, a prompt and
    its complement on alternate lines."""

    what: str
    cue: str
    text: str

    @property
    def seeds(self) -> list[tuple[str, str]]:
        lines = [line.strip() for line in self.text.strip().splitlines()]
        return list(zip(lines[::2], lines[1::2], strict=True))


CATEGORIES: dict[str, Category] = {
    "code": Category(
        "a request about a program",
        r"\b(?:code|python|java|javascript|sql|function|regex|bug|compile|script|program)\b",
        """
        Write a function that reverses a list.
        Name the inputs and outputs, handle empty input, and show one short example of use.
        Why does my loop never end?
        Explain the likely cause step by step, then show the corrected lines and how to check them.
        Parse a date in Python.
        Prefer the standard library, say which formats are accepted, and what happens on bad input.
        Speed up this SQL query.
        Say how to measure first, list changes by expected gain, and mention what each one costs.
        """,
    ),
    "translation": Category(
        "a text to be translated",
        r"\btranslat\w*|\bhow do you say\b|\binto (?:english|french|german|spanish|chinese)\b",
        """
        Translate this letter into French.
        Keep the meaning, tone and names of the original, and use natural word order.
        How do you say good night in German?
        Give the usual form first, and say when another form is polite.
        Put this notice into Spanish.
        Keep the layout and the level of formality, and leave proper names as they are.
        Translate: time flies.
        Translate the sense of idioms, not word by word, and note it where you do.
        """,
    ),
    "maths": Category(
        "a sum or a problem to be worked out",
        r"\d\s*[-+*/x=]\s*\d|\b(?:calculate|compute|solve|equation|probability|percent|how much is)\b",
        """
        What is 17 * 23?
        Work it out step by step, check each step, and state the result last.
        A train covers 120 km in 90 minutes. How fast is it?
        Write down what is given, choose a formula, keep the units, and check whether the result is plausible.
        Solve x^2 - 5x + 6 = 0.
        Show the method and each transformation, and test every solution in the equation.
        What are the odds of two sixes?
        State the assumptions, define the events, and reason from them one step at a time.
        """,
    ),
    "summary": Category(
        "a text to be summarised",
        r"\bsummar\w*|\btl;?dr\b|\bin short\b|\bkey points\b",
        """
        Summarise this article.
        Give the main point first, then what supports it, in the order of the text; add nothing of your own.
        What are the key points of these minutes?
        Separate decisions from open questions, and name who does what by when.
        Sum up the news below.
        Group related items, keep names and figures exact, and leave out detail that changes nothing.
        TL;DR of this thread?
        Say what the question was, what was agreed and what is still disputed, in plain words.
        """,
    ),
    "rewriting": Category(
        "a text to be rewritten or polished",
        r"\b(?:rewrite|rephrase|polish|paraphrase|proofread|edit|improve) (?:this|the|my|these)\b",
        """
        Polish this paragraph.
        Keep every fact and the writer's voice; improve word choice, rhythm and the links between sentences.
        Rewrite the email more politely.
        Keep the request and its order, soften the wording, and keep about the same length.
        Proofread my essay.
        Correct grammar and spelling only, and list the changes that alter the sense.
        Rephrase this for children.
        Use short sentences and everyday words, and keep the order of events.
        """,
    ),
    "writing": Category(
        "a text to be written",
        r"\b(?:write|draft|compose)\b",
        """
        Write a poem about rain.
        Choose one mood and a few concrete images, keep the rhythm even, and let the last line turn.
        Draft a letter of thanks.
        Be sincere and specific about what was done, and close warmly; suit the tone to the reader.
        Write a review of the film.
        Say what stood out, how it felt and for whom it is, in a kind and balanced tone.
        Compose a notice about the lift.
        State what happens, when and whom to ask, in short formal sentences.
        """,
    ),
    "ideas": Category(
        "a request for several ideas or things",
        r"\b(?:list|name|suggest|brainstorm|ideas?|examples?|recommend\w*)\b"
        r"|\b(?:give|tell) me (?:some|two|three|four|five|\d+)\b",
        """
        Suggest names for a cafe.
        Offer different kinds of names, short and easy to say, each with a few words on why it fits.
        Name some good walks.
        List distinct choices in a clear order, and say for whom each is suited.
        Give me three gifts for a teacher.
        Give exactly as many as asked, all different and of the right kind.
        Ideas for a class about rivers?
        Vary the activities, keep them practical, and note what each one needs.
        """,
    ),
    "how-to": Category(
        "a question about how something is done",
        r"\bhow (?:do|can|should|to|would)\b|\bhelp me\b|\bsteps?\b|\bi want to\b",
        """
        How do I repot a plant?
        Give the steps in the order they are done, say what is needed, and warn of the usual mistake.
        How can I sleep better?
        Begin with what is easiest to change, explain why it works, and say when to ask a doctor.
        Help me to plan a move.
        Order the tasks by time, mark what cannot wait, and keep the list short and friendly.
        How to reply when my boss praises me?
        Show thanks and modesty, and give wording for different situations.
        """,
    ),
    "why": Category(
        "a question about reasons",
        r"\bwhy\b|\bwhat (?:causes|caused)\b|\bexplain\b|\bhow come\b",
        """
        Why is the sky blue?
        Name the cause first, explain how it works in simple words, and add an everyday comparison.
        Why did the empire fall?
        Look at several causes, support each with evidence, and weigh them at the end.
        What causes inflation?
        Separate the main causes, explain how each one acts, and illustrate it briefly.
        Why do people like sad songs?
        Consider feelings, habit and company, with an example for each, in a clear order.
        """,
    ),
    "feelings": Category(
        "from somebody who tells how they feel",
        r"\bi(?: am|'m| feel| felt)(?: so| very)? (?:sad|tired|afraid|lonely|angry|worried|lost|hurt)\b|\bi feel\b",
        """
        I feel so alone.
        Answer gently: first show that you understand, then offer comfort and one small step.
        I failed again.
        Take the feeling seriously, do not judge, and encourage with something that can be done next.
        I am worried about my mother.
        Be warm and calm, ask nothing of the writer, and say where help can be found.
        My friend moved away and I am sad.
        Be kind and patient, name the feeling, and end on a hopeful note.
        """,
    ),
    "opinion": Category(
        "a question for a judgement",
        r"\bwhat do you think\b|\bdo you (?:like|think|prefer)\b|\bdid you like\b|\bhow was\b|\bbest\b"
        r"|\bversus\b|\bbetter\b|\bopinion\b",
        """
        What do you think of remote work?
        Look at it from several sides, give a reason for each view, and close with a balanced judgement.
        Cats or dogs?
        Compare on a few points that matter in daily life, and keep the tone light and fair.
        How was the concert?
        Say what was good and what was not, fairly and in a friendly tone.
        Which phone is better?
        Name the criteria first, compare by each of them, and say for whom which is better.
        """,
    ),
    "yes-no": Category(
        "a question of whether",
        r"^(?:is|are|was|were|do|does|did|can|could|should|would|will|may|has|have)\b",
        """
        Is tea healthier than coffee?
        Take a clear position first, then give the evidence on both sides and its limits.
        Can I claim this cost?
        Say what it depends on, go through the cases in order, and name what to check.
        Should cheats be expelled?
        Argue both sides with reasons, then weigh them openly.
        Does the museum open on Monday?
        Give the fact plainly, and say how sure it is and where to check it.
        """,
    ),
    "facts": Category(
        "a question of fact",
        r"\b(?:who|when|where|which|what|whose)\b",
        """
        When was the bridge built?
        State the fact first, say how sure you are, and add one sentence of background.
        Who wrote the anthem?
        Name the person plainly, with the year and what else they are known for, if it is certain.
        What is osmosis?
        Define it in one sentence, explain how it works, and give one example.
        Where does the river begin?
        Give the place first, then how to find it; say what you do not know.
        """,
    ),
    "other": Category(
        "none of the usual kinds",
        r"",
        """
        Tell me something about lighthouses.
        Pick what most readers would want to know, begin with it, and keep a clear order.
        Good morning!
        Reply in a friendly way, and ask what is wanted.
        My sock is older than my car.
        This may be a joke: answer in the same light tone.
        Parking rules for visitors.
        Say what applies to whom and when, in plain words, most important first.
        """,
    ),
}


def category_of(words: str) -> str:
    """The first category whose cue is found in the user's words; "other" has an empty cue, so there always is one."""
    return next(name for name, category in CATEGORIES.items() if re.search(category.cue, words.casefold()))


def draft_request(category: str, words: str) -> str:
    """What a model is asked so that it drafts a complement: background, rules, seeds, prompt. Any category will do."""
    kind = CATEGORIES.get(category, CATEGORIES["other"])
    rules = "\n".join(f"{number}. {rule}" for number, rule in enumerate(RULES, start=1))
    seeds = "\n\n".join(f"<user prompt>\n{x}\n<complementary information>\n{c}" for x, c in kind.seeds)
    return (
        "You complete terse prompts: you write what the user left unsaid about style, format and what to cover, so that "
        f"a language model answers better. The prompt is {kind.what}.\n\nRules:\n{rules}\n\n{seeds}\n\n"
        f"<user prompt>\n{words}\n<complementary information>\n"
    )


def sort_request(words: str) -> str:
    """What a model is asked so that it names the category of a prompt."""
    kinds = "\n".join(f"{name}: {category.what}" for name, category in CATEGORIES.items())
    return f"Which kind of prompt is this? Reply with the name alone.\n\n{kinds}\n\n<user prompt>\n{words}\n<kind>\n"


def sorted_into(reply: str) -> str:
    """The category that a reply to `sort_request` names; "other" where it names none."""
    found = re.search("|".join(sorted(map(re.escape, CATEGORIES), key=len, reverse=True)), reply.lower())
    return found.group() if found else "other"


def check_request(words: str, complement: str) -> str:
    """What a model is asked so that it checks a complement; it is to reply with one JSON object."""
    criteria = "\n".join(f"{number}. {rule}" for number, rule in enumerate(CRITERIA, start=1))
    return (
        "A complement is appended to a prompt so that a language model answers better. Judge the complement below. It is "
        f"wrong if any of these holds:\n{criteria}\n\n<user prompt>\n{words}\n<complement>\n{complement}\n\n"
        'Reply with one JSON object: {"reason": why, "is_correct": true or false, "final_complement": the complement, '
        "corrected if it was wrong}\n"
    )
