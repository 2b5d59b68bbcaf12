"""The words of the made-up posts: clauses of two slots, so that combinations can be held out.

Every cue of the rule (see ``synthetic.py``) has a table ``first slot x second slot``. All words
occur in the training splits; some combinations occur in the test split only. Nothing here is a real
person's text.
"""

from __future__ import annotations

from dataclasses import dataclass

PEOPLE = (
    "sister",
    "brother",
    "aunt",
    "uncle",
    "friend",
    "neighbor",
    "teacher",
    "cousin",
    "mother",
    "doctor",
)
WAYS = (
    "helps me every day",
    "sits with me",
    "calls me each night",
    "shares the work",
    "drives me around",
    "listens to me",
    "stands by me",
    "lends me a hand",
)
NOBODY = ("nobody", "no one", "no friend", "not one person", "none of them")
GONE = (
    "promised help but never came",
    "moved away last week",
    "has no time for me now",
    "stopped calling me",
    "turned me away",
)

SUBJECTS = ("it", "all of this", "the whole thing", "this")
THREAT = (
    "could cost me my home",
    "puts my future at risk",
    "may ruin everything i built",
    "could end my plans",
    "can take what i love",
    "leaves me in danger",
)
NO_THREAT = (
    "is a small thing",
    "will pass soon",
    "changes very little",
    "is no great matter",
    "can wait a while",
    "is easy to mend",
)

WHEN = ("most nights i", "at work i", "these days i", "at home i")
DISTRESS = (
    "cannot sleep",
    "shake and cry",
    "lie awake in fear",
    "feel my heart race",
    "cannot eat",
    "break down",
)
CALM = ("sleep well", "stay calm", "eat and rest", "laugh about it", "breathe easy", "keep my pace")

# (cue, its value) -> the two slots of its clause
CLAUSES: dict[tuple[str, bool], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("threat", True): (SUBJECTS, THREAT),
    ("threat", False): (SUBJECTS, NO_THREAT),
    ("help", True): (PEOPLE, WAYS),
    ("help", False): (NOBODY, WAYS),
    ("distress", True): (WHEN, DISTRESS),
    ("distress", False): (WHEN, CALM),
}
# Both values of a cue in one clause: only the wording says which one holds.
CONFLICTS = ("at first {other} but now {true}", "{true} even if they say {other}")

DAYS = ("today", "yesterday", "last week", "this month", "again")

# What the written reasoning says of each cue; several wordings leave a policy room to explore.
SAY_STIMULUS = ("the post tells of {gist}", "it began with {gist}", "{gist} came up")
SAY_THREAT = ("much is at stake", "a real threat to plans")
SAY_NO_THREAT = ("little is at stake", "a small and passing matter")
SAY_HELP = ("the {who} gives support", "the {who} is a resource")
SAY_NO_HELP = ("no support is named", "no resource to lean on")
SAY_DISTRESS = ("strong distress and unrest", "fear takes over")
SAY_CALM = ("calm and steady", "little distress")
SAY_STATE = ("{count} of three signs so {label}",)
COUNTS = ("none", "one", "two", "three")


@dataclass(frozen=True)
class Task:
    """One data set: its instruction, its events (text, gist), and the label of 0, 1, 2, 3 signs."""

    instruction: str
    events: tuple[tuple[str, str], ...]
    labels: tuple[str, str, str, str]


def _question(what: str, options: str) -> str:
    return f"Rate {what} .\n- Answer {options} .\nStatement:"


_YES_NO = ("No", "No", "Yes", "Yes")
TASKS: dict[str, Task] = {
    "Dreaddit": Task(
        _question("the stress", "Yes or No"),
        (
            ("the rent went up", "rent"),
            ("my exam went badly", "the exam"),
            ("the boss cut my hours", "fewer hours"),
            ("a large bill arrived", "a bill"),
            ("the deadline moved closer", "the deadline"),
            ("my car broke on the road", "the car"),
        ),
        _YES_NO,
    ),
    "DATD": Task(
        _question("the anxiety or depression risk", "Yes or No"),
        (
            ("the news spoke of layoffs", "layoffs"),
            ("my phone was stolen", "the phone"),
            ("the interview went badly", "the interview"),
            ("my visa was refused", "the visa"),
            ("the course was closed", "the course"),
            ("my team lost its place", "the team"),
        ),
        _YES_NO,
    ),
    "SDCNL": Task(
        _question("the suicide risk", "Yes or No"),
        (
            ("my partner walked out", "a separation"),
            ("the court ruled against me", "the court"),
            ("i lost my job", "the job"),
            ("my old illness came back", "the illness"),
            ("the bank closed my account", "the bank"),
            ("i failed my last year", "the year"),
        ),
        _YES_NO,
    ),
    "FIG": Task(
        _question("the loneliness", "Yes or No"),
        (
            ("my roommate left the city", "the roommate"),
            ("the club closed its doors", "the club"),
            ("i ate lunch alone", "lunch"),
            ("the party went on without me", "the party"),
            ("i moved to a new town", "the move"),
            ("my chat group went silent", "the chat"),
        ),
        _YES_NO,
    ),
    "DepSeverity": Task(
        _question("the depression risk", "Minimum or Mild or Moderate or Severe"),
        (
            ("my project was dropped", "the project"),
            ("the winter came early", "winter"),
            ("i quit the choir", "the choir"),
            ("my savings are gone", "savings"),
            ("the house stands empty", "the house"),
            ("my garden died", "the garden"),
        ),
        ("Minimum", "Mild", "Moderate", "Severe"),
    ),
    "LT-EDI": Task(
        _question("the depression", "Not depressed or Moderately depressed or Severely depressed"),
        (
            ("the results came in", "the results"),
            ("my band broke apart", "the band"),
            ("i missed the wedding", "the wedding"),
            ("the shop let me go", "the shop"),
            ("my knee gave out", "the knee"),
            ("the train left early", "the train"),
        ),
        ("Not depressed", "Not depressed", "Moderately depressed", "Severely depressed"),
    ),
    "RSD": Task(
        _question("the level of suicide content", "Indicator or Ideation or Behavior or Attempt"),
        (
            ("the letter said no", "the letter"),
            ("my plan fell through", "the plan"),
            ("the clinic sent me home", "the clinic"),
            ("we argued all evening", "a quarrel"),
            ("my leave was refused", "the leave"),
            ("the school called me in", "the school"),
        ),
        ("Indicator", "Ideation", "Behavior", "Attempt"),
    ),
    "LID": Task(
        _question("the loneliness from 1 to 5", "[1-2] or [2-3] or [3-4] or [4-5]"),
        (
            ("the holidays began", "the holidays"),
            ("my dog ran off", "the dog"),
            ("the office went remote", "the office"),
            ("my birthday came", "the birthday"),
            ("the street grew quiet", "the street"),
            ("i took the night shift", "the shift"),
        ),
        ("[1-2]", "[2-3]", "[3-4]", "[4-5]"),
    ),
}
