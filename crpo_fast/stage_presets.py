"""Stage lists that have a name: the tags, and what the model is asked to write in each.

Our own words, grounded in Lazarus & Folkman, Stress, Appraisal, and Coping (1984): primary
appraisal asks what is at stake, secondary appraisal what can be done; Scherer's component process
model (2001): four checks in sequence; Smith & Ellsworth (1985): certainty, agency, control, effort
and pleasantness as dimensions of appraisal.
"""

STIMULUS = "Name the event, situation or object the writer faces, as stated, without judging it."
REACTION = "Infer the feelings, bodily signs and behaviour that follow from this appraisal."
MENTAL_STATE = (
    "Weigh the evidence for and against, and commit to the state of mind it supports best."
)

PRESETS: dict[str, dict[str, str]] = {
    "mental_r1": {
        "stimulus": STIMULUS,
        "primary_appraisal": (
            "Judge what is at stake for the writer: irrelevant, benign, or a harm, a threat or a "
            "challenge, and to which need or goal."
        ),
        "secondary_appraisal": (
            "Judge what the writer can do about it: control, skills, support and other resources, "
            "present or missing."
        ),
        "reaction": REACTION,
        "mental_state": MENTAL_STATE,
    },
    "cognition_chain": {
        "stimulus": STIMULUS,
        "evaluation": "Judge what the event means for the writer and whether it can be coped with.",
        "reaction": REACTION,
        "mental_state": MENTAL_STATE,
    },
    "lazarus_reappraisal": {
        "stimulus": STIMULUS,
        "primary_appraisal": (
            "Judge whether the event touches the writer's needs or goals: loss, threat or "
            "challenge."
        ),
        "secondary_appraisal": (
            "Judge who or what is accountable, what can be done, and what the writer expects."
        ),
        "coping": "Describe what is done to change the problem or to soothe the emotion, if "
        "anything.",
        "reappraisal": "Judge again with that in view: did the meaning ease, stay or worsen?",
        "mental_state": MENTAL_STATE,
    },
    "scherer_cpm": {
        "relevance": (
            "Check whether the event is new, pleasant or unpleasant in itself, and bears on the "
            "writer's goals."
        ),
        "implication": (
            "Check its cause and consequences: how likely, how urgent, how far from what was "
            "expected, and whether it helps or blocks the goals."
        ),
        "coping_potential": (
            "Check how much control and power the writer has, and how well they could live with "
            "the "
            "outcome."
        ),
        "normative_significance": (
            "Check it against the writer's own standards and those of the people around them."
        ),
        "mental_state": MENTAL_STATE,
    },
    "cocot": {
        "perception": "List only what can be observed directly in the text.",
        "situation": "Explain how these observations fit together into one situation.",
        "norm": "Judge the situation by what people commonly hold to be fitting or expected.",
    },
}
