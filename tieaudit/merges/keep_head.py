"""The output head's values survive."""

from tieaudit.merges import Merge

keep_head = Merge(
    name="keep:head",
    summary="the output head's values survive in both roles",
    source="Press & Wolf 2017, section 4: the tied matrix evolves like the output embedding; "
    "the head is the better survivor after training",
    keeps="output_head",
)
