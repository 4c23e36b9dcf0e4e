"""Tables that are looked up: by ids that a caller gives (tokens, types), or by what is counted (positions)."""

from __future__ import annotations

from dataclasses import dataclass

from tieaudit.flow import Flow, Nature
from tieaudit.recognisers import Reading, Recogniser

_ADDED = frozenset("view multiply divide add".split())
_BEFORE_IDS = frozenset("view add subtract multiply choose adjust join compare positions reduce lookup".split())
_N_MOST_TYPES = 16
"""Rows up to which a second table is one of segments or types (2 in BERT, 4 in XLNet, 16 in ERNIE's tasks)."""

_N_MOST_TABLES = 500
"""Tables that one is compared with."""


@dataclass
class _Table:
    id: str
    index: int
    n_rows: int
    added: frozenset[int]
    """Sums that its rows go into."""
    from_ids: bool
    one_each: bool
    """Looked up once for a whole example: ids without an axis along a sequence."""


def _recognise(reading: Reading) -> None:
    tables = [table for table in map(lambda i: _table(reading, i), range(len(reading.flow.operations))) if table]
    by_ids = [table for table in tables if table.from_ids]
    counted = [table for table in tables if not table.from_ids]
    for table in counted:
        beside = [one.n_rows for one in counted[:_N_MOST_TABLES] if one.added & table.added]
        if table.n_rows <= _N_MOST_TYPES and max(beside, default=0) > 4 * table.n_rows:
            why = f"{table.n_rows} rows, beside one for each of {max(beside)} positions"
            reading.tell([table.id], "type_embedding", f"{why} ({reading.at(table.index)})")
        else:
            reading.tell([table.id], "position_embedding", f"looked up by positions ({reading.at(table.index)})")
    most = max((table.n_rows for table in by_ids), default=0)
    has_data = any(
        flow_input.op == "input" and not flow_input.attributes.get("integer") for flow_input in reading.flow.operations
    )
    for table in by_ids:
        kind, why = _kind(table, by_ids, most, has_data)
        reading.tell([table.id], kind, f"{why} ({reading.at(table.index)})")


def _kind(table: _Table, tables: list[_Table], most: int, has_data: bool) -> tuple[str, str]:
    looked_up = "looked up by integer inputs of the graph"
    few = tables[:_N_MOST_TABLES]
    partners = [one for one in few if one.id != table.id and one.added & table.added]
    larger = max((one.n_rows for one in partners), default=0)
    if table.n_rows <= _N_MOST_TYPES and 4 * table.n_rows < most:
        return "type_embedding", f"{looked_up}: {table.n_rows} rows, beside a table of {most}"
    if larger > 4 * table.n_rows:
        beside = f"{table.n_rows} rows, added to those of a table of {larger}"
        return "position_embedding", f"{looked_up}: {beside}, too many for types"
    if table.one_each and has_data and len(tables) == 1:
        return "type_embedding", f"{looked_up}, once for an example: a table of classes"
    return "token_embedding", looked_up


def _table(reading: Reading, index: int) -> _Table | None:
    flow = reading.flow
    operation, meaning = flow.operations[index], flow.meanings[index]
    if meaning.does == "product":
        return _by_ones(reading, index)
    if meaning.does != "lookup" or len(operation.inputs) <= max(meaning.table, meaning.indices):
        return None
    table, indices = operation.inputs[meaning.table], operation.inputs[meaning.indices]
    ids = flow.learned(table)
    if len(ids) != 1 or flow.nature(table) is not Nature.FIXED or not operation.outputs:
        return None
    shape, nature = flow.shape_at(index, ids[0]), flow.nature(indices)
    blocks = operation.op.endswith("GatherBlockQuantized")  # a row may be cut into its blocks
    if len(shape) not in ((2, 3) if blocks else (2,)) or max(shape[1:]) < 2 or shape[0] < 1:
        return None
    if nature not in (Nature.IDS, Nature.COUNTED) or flow.nature(operation.outputs[0]) is not Nature.DATA:
        return None
    added = frozenset(i for i, _ in reading.ahead(operation.outputs[0], _ADDED) if flow.does(i) == "add")
    from_ids, rank = _from_ids(flow, indices)
    axis = operation.attributes.get("axis", 0)
    n_rows = shape[axis] if isinstance(axis, int) and -len(shape) <= axis < len(shape) else shape[0]
    return _Table(ids[0], index, n_rows, added, nature is Nature.IDS and from_ids, rank == 1)


def _by_ones(reading: Reading, index: int) -> _Table | None:
    """A table that is multiplied by rows of one 1 among zeros: ids compared with a range, then cast, then a product."""
    flow = reading.flow
    data = flow.data_inputs(index)
    tables, others = [v for v in data if flow.learned(v)], [v for v in data if flow.nature(v) is Nature.COUNTED]
    if len(tables) != 1 or len(others) != 1 or len(data) != 2 or len(flow.learned(tables[0])) != 1:
        return None
    maker = flow.maker.get(others[0])
    while maker is not None and flow.does(maker) == "view":
        maker = flow.maker.get(flow.operations[maker].inputs[0])
    if maker is None or flow.does(maker) != "compare":
        return None
    compared = flow.operations[maker].inputs
    if sorted(map(flow.nature, compared)) != [Nature.FIXED, Nature.IDS]:
        return None
    id = flow.learned(tables[0])[0]
    shape = flow.shape_at(index, id)
    outputs = flow.operations[index].outputs
    if len(shape) != 2 or min(shape) < 2:
        return None
    added = frozenset(i for i, _ in reading.ahead(outputs[0], _ADDED) if flow.does(i) == "add")
    ids = next(value for value in compared if flow.nature(value) is Nature.IDS)
    from_ids, rank = _from_ids(flow, ids)
    return _Table(id, index, shape[0], added, from_ids, rank == 1)


def _from_ids(flow: Flow, indices: str) -> tuple[bool, int | None]:
    """Whether indices are ids and not counted from them, and the rank of the input they come from."""
    rank: int | None = None
    found = False
    pending, seen = [indices], {indices}
    while pending and len(seen) < 200:
        index = flow.maker.get(pending.pop())
        if index is None:
            continue
        if flow.does(index) == "input":
            found = True
            given = flow.operations[index].attributes.get("rank")
            rank = given if isinstance(given, int) else rank
        if flow.does(index) == "positions":
            return False, None
        if flow.does(index) in ("compare", "shape"):
            continue
        for value in flow.data_inputs(index):
            if value not in seen and flow.nature(value) in (Nature.IDS, Nature.COUNTED):
                seen.add(value)
                pending.append(value)
    return found, rank


embedding = Recogniser(
    name="embedding",
    rank=20,
    summary="tables that are looked up by ids or by positions",
    recognise=_recognise,
)
