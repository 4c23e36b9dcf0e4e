"""One stored tensor of several names or uses → the edits that give each a copy of its own."""

from __future__ import annotations

from tieaudit.change import Edit, Unshare
from tieaudit.errors import RewriteRefused
from tieaudit.model import Model, Use


def of_names(model: Model, ids: list[str], because: str) -> list[Edit]:
    """Every name but one gets a copy, which the operations of its own module read where a graph reads only that one.

    RewriteRefused where the graph does not say whose its uses are.
    """
    stored = [id for id in ids if not model.by_id[id].absent]
    source = next((id for id in stored if model.uses_of.get(id)), stored[0])
    edits = [Unshare(source, model.by_id[id].name, _own_uses(model, source, id), because) for id in ids if id != source]
    read = {(use.scope, use.node) for use in model.uses_of.get(source, ())}
    alone = not any(model.uses_of.get(id) for id in ids if id != source)
    if alone and len(read) > 1 and not any(edit.uses for edit in edits):
        raise RewriteRefused(f"the graph does not say which of the {len(read)} operations that read {source} are whose")
    return list(edits)


def _own_uses(model: Model, source: str, id: str) -> tuple[tuple[str, str, str, int], ...]:
    """The uses of `source` by the module to which the name `id` belongs."""
    owner = model.by_id[id].name.rpartition(".")[0]
    return tuple(
        (use.part, use.scope, use.node, use.slot)
        for use in model.uses_of.get(source, ())
        if use.call and use.call[-1].rpartition("@")[0] == owner and not model.uses_of.get(id)
    )


def of_uses(model: Model, id: str, because: str) -> list[Edit]:
    """One initializer with several consumers: the first keeps it, every further one gets a copy of its own."""
    taken = {weight.name for weight in model.weights}
    by_consumer: dict[tuple[str, str, str, int], Use] = {}
    for use in model.uses_of.get(id, ()):
        by_consumer.setdefault((use.part, use.scope, use.node, use.slot), use)
    edits: list[Edit] = []
    for consumer in list(by_consumer)[1:]:
        name = f"{model.by_id[id].name}.untied"
        number = 1
        while name in taken:
            number += 1
            name = f"{model.by_id[id].name}.untied_{number}"
        taken.add(name)
        edits.append(Unshare(id, name, (consumer,), because))
    return edits
