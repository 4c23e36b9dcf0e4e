"""The token embedding's values survive."""

from tieaudit.merges import Merge

keep_embedding = Merge(
    name="keep:embedding",
    summary="the token embedding's values survive in both roles",
    source="what transformers 4.57 does when a flag says tied and the file holds two tensors (_tie_or_clone_weights)",
    keeps="token_embedding",
)
