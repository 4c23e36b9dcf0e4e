"""The setting that ties is neither true nor false, so that loaders refuse it or each take it as they like."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tieaudit.printable import printable
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject

_N_MOST_SHOWN = 40


def _examples() -> Examples:
    from tieaudit.toy import ramp, toy

    embed = "model.embed_tokens.weight"
    w = ramp(64, 8)

    return Examples(
        bad=[
            toy({embed: w}, flags={"tie_word_embeddings": "true"}),
            toy({embed: w}, flags={"tie_word_embeddings": True, "text_config.tie_word_embeddings": 0}),
        ],
        good=[
            toy({embed: w}, flags={"tie_word_embeddings": False}),
            toy({embed: w}, flags={"tie_word_embeddings": None}),
            toy({embed: w}, flags={"tie_word_embeddings": False, "text_config.tie_word_embeddings": True}),
        ],
    )


@rule(
    "TIE111",
    "flag-is-no-boolean",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """The setting that ties is neither true nor false, so that loaders refuse it or each take it as they like.

    What it does:
        Reports a tie_word_embeddings in config.json, at whatever level, that is a text, a number, a list or an object.

    Why it matters:
        Most classes of transformers 5 refuse the whole configuration; T5 ties whatever it says. transformers 4.57 asks
        only whether the value is empty, so that the text "false" ties.

    How it is decided:
        By the type of the value as it stands in config.json. The weights are not needed, so this is said of a folder
        that holds pointers only, too. `null` is none of these: several classes take it as *not set*.

    Example:
        A script wrote "tie_word_embeddings": "true".

    Fix:
        By hand: write true or false, without quotes. Which one, the weights tell: without the setting in the way,
        tieaudit compares them.

    Cannot tell when:
        Never: the type of the value decides.

    Sources:
        transformers 5.23 on "true", "false", "", 1, 0, 0.0 and []: each is a StrictDataclassFieldValidationError
        (reproduced with Llama, and inside the text_config of a Llava; T5 takes 1 and makes it true). gemma3, gemma3n,
        perception_lm and t5gemma2 declare the field as bool or None. modeling_utils.tie_weights of 4.57 reads the
        value with getattr in an if (read, not run).
    """
    for key, value in subject.model.flags.items():
        if value is None or isinstance(value, bool):
            continue
        shown = _shown(value)
        message = (
            f"config.json:{printable(key)} is {shown}, neither true nor false: most classes of "
            "transformers 5 refuse the configuration, transformers 4.57 ties by whatever is not empty"
        )
        fix = Fix("manual", f"write true or false, without quotes, as {printable(key)} in config.json")
        yield Finding((), message, fix, {"file": "config.json", "key": key, "value": shown})


def _shown(value: object) -> str:
    """The value as it stands in the file, cut; of a list or an object only that it is one, since it may be huge."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return printable(text if len(text) <= _N_MOST_SHOWN else text[:_N_MOST_SHOWN] + "…")
