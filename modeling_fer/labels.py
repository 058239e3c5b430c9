"""The eight expression classes, and every source's native order or spelling translated to them.

The order is that of the Aff-Wild2 EXPR challenge and never changes: ids 0 to 7 as in `CLASSES`. Labels are
perceived expression, as annotators saw it, not felt emotion.
"""

CLASSES = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
NUM_CLASSES = len(CLASSES)
IGNORE = -1  # the id of a row without a label: unlabelled stills and frames that annotators left out

CONTEMPT_RULES = ("drop", "other")  # contempt has no class of ours: leave such rows out, or call them Other

# Lower-case spellings met in data sets and models. `class_id` resolves "contempt" by the contempt rule.
SYNONYMS = {
    "neutral": 0, "neutrality": 0, "calm": 0,
    "anger": 1, "angry": 1,
    "disgust": 2, "disgusted": 2,
    "fear": 3, "fearful": 3, "afraid": 3, "scared": 3,
    "happiness": 4, "happy": 4, "joy": 4, "smile": 4,
    "sadness": 5, "sad": 5,
    "surprise": 6, "surprised": 6,
    "other": 7, "others": 7,
}  # fmt: skip

# Integer-coded sources: position = the source's own id, value = the class name there.
FER2013_ORDER = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
FERPLUS_ORDER = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")


def class_id(name: str, contempt: str = "drop") -> int | None:
    """Return our id of a class by name (any case, usual synonyms), or None for contempt under `drop`.

    Raises:
        ValueError: the name is none of the known spellings, or `contempt` is not a known rule.
    """
    if contempt not in CONTEMPT_RULES:
        raise ValueError(f"contempt rule must be one of {', '.join(CONTEMPT_RULES)}, got {contempt!r}")
    key = name.strip().lower()
    if key == "contempt":
        return CLASSES.index("Other") if contempt == "other" else None
    if key not in SYNONYMS:
        known = ", ".join(sorted({*SYNONYMS, "contempt"}))
        raise ValueError(f"unknown expression {name!r}; known spellings: {known}")
    return SYNONYMS[key]
