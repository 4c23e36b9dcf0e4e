"""The residual streams of a graph: where the result of a block is added to what the block was given.

Everything between two such sums is a block; blocks that repeat are layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tieaudit.flow import Flow

_N_MOST_STEPS = 3000
_WORK = frozenset("product convolve recur attend experts".split())
_SCORING = frozenset("view multiply divide choose add activate".split())
_LIGHT = frozenset("normalise add multiply divide subtract view adjust root reduce choose activate join".split())


@dataclass(eq=False)
class Block:
    """What happens between two sums of one stream."""

    sum: int
    """Index of the operation that adds the result to the stream."""
    before: Block | None
    """The block before it in the same stream."""
    stream: int
    number: int
    """Within its stream."""
    residual: str
    """The value of the stream that it was given."""
    inside: Block | None = field(default=None, repr=False)
    """The block of another stream that holds this whole stream."""


class Spine:
    """Streams and blocks of a graph. Cost: linear in the operations, times the size of a block."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.blocks: list[Block] = []
        self.on_stream: dict[str, Block | int] = {}
        """Value on a stream → the block that ends there, or the stream that begins there."""
        self._n_streams = 0
        for index in range(len(flow.operations)):
            self._look(index)
        self._end_normed()
        self._last = self._latest()
        self._nested: set[int] = set()
        self._ended: dict[Block, list[str]] = {}
        self.block_of = self._assign()
        self._nest()
        if self._nested:  # what leads to a stream inside a block belongs to that block
            self.block_of = self._assign()

    @property
    def values(self) -> Mapping[str, Block | int]:
        """All values on streams."""
        return self.on_stream

    def _look(self, index: int) -> None:
        flow, operation = self.flow, self.flow.operations[index]
        fused = flow.does(index) == "normalise" and len(flow.data_inputs(index)) == 2
        if flow.does(index) != "add" and not fused:
            return
        data = [self._unscaled(value) for value in flow.data_inputs(index) if flow.is_data(value)]
        if len(data) != 2 or data[0] == data[1]:
            return
        older, newer = sorted(data, key=lambda value: flow.maker.get(value, -1))
        if self._is_scored(operation.outputs[0]):
            return
        if not self._depends(newer, older):
            for one, other in ((older, newer), (newer, older)):
                ended = self.on_stream.get(one)
                if isinstance(ended, Block) and ended.residual and self._depends(other, ended.residual):
                    self._extend(ended, one, index)
            return
        before = self._stream_at(older)
        block = Block(index, before if isinstance(before, Block) else None, 0, 0, older)
        if isinstance(before, Block):
            block.stream, block.number = before.stream, before.number + 1
        elif isinstance(before, int):
            block.stream = before
        else:
            block.stream = self._n_streams
            self._n_streams += 1
            self.on_stream[older] = block.stream
        self.blocks.append(block)
        for value in operation.outputs:
            if value:
                self.on_stream[value] = block

    def _unscaled(self, value: str) -> str:
        """A residual without the learned scale that some models put on it."""
        flow = self.flow
        index = flow.maker.get(value)
        if index is None or flow.does(index) != "multiply":
            return value
        data = [one for one in flow.data_inputs(index) if flow.is_data(one)]
        fixed = [one for one in flow.operations[index].inputs if flow.learned(one)]
        if len(data) != 1 or len(fixed) != 1:
            return value
        maker = flow.maker.get(data[0])
        begins = maker is not None and flow.does(maker) in ("lookup", "embed", "add", "normalise")
        return data[0] if begins or data[0] in self.on_stream else value

    def _extend(self, block: Block, end: str, index: int) -> None:
        """A second branch that is worked out from the same residual is added to the sum: the block ends here."""
        del self.on_stream[end]
        block.sum = index
        for value in self.flow.operations[index].outputs:
            if value:
                self.on_stream[value] = block

    def _is_scored(self, value: str) -> bool:
        """Whether a sum becomes the weights of a softmax: scores of an attention, with a bias for every position."""
        flow, pending, seen = self.flow, deque([value]), {value}
        while pending and len(seen) < 20:
            for index, _ in flow.readers.get(pending.popleft(), ()):
                if flow.does(index) == "softmax":
                    return True
                if flow.does(index) in _SCORING:
                    for one in flow.operations[index].outputs:
                        if one not in seen:
                            seen.add(one)
                            pending.append(one)
        return False

    def _depends(self, newer: str, older: str) -> bool:
        """Whether `newer` is worked out from `older`, with learned work between."""
        flow, first = self.flow, self.flow.maker.get(older, -1)
        same = {older}
        if first >= 0 and flow.does(first) == "normalise":  # a fused norm gives the sum and what it makes of it
            same.update(flow.operations[first].outputs)
        pending, seen, works, found = deque([newer]), {newer}, False, False
        while pending and len(seen) < _N_MOST_STEPS and not (works and found):
            value = pending.popleft()
            flow.n_left -= 1
            index = flow.maker.get(value)
            if index is None or index <= first or flow.n_left < 0:
                continue
            works = works or flow.does(index) in _WORK
            for one in flow.data_inputs(index):
                found = found or one in same
                if one not in seen and one not in same and flow.is_data(one):
                    seen.add(one)
                    pending.append(one)
        return works and found

    def _stream_at(self, value: str) -> Block | int | None:
        """The stream that a residual belongs to: the value itself, or what it normalises."""
        known = self.on_stream.get(value)
        if known is not None:
            return known
        flow, pending, seen = self.flow, deque([value]), {value}
        while pending and len(seen) < 60:
            current = pending.popleft()
            index = flow.maker.get(current)
            if index is None or flow.does(index) not in _LIGHT:
                continue
            for one in flow.data_inputs(index):
                if isinstance(block := self.on_stream.get(one), Block):
                    self.on_stream[value] = block
                    return block
                if one not in seen and flow.is_data(one):
                    seen.add(one)
                    pending.append(one)
        return None

    def _end_normed(self) -> None:
        """Where a stream goes on behind norms (post-norm), the norm behind its last block belongs to that block too."""
        last: dict[int, Block] = {}
        normed: set[int] = set()
        for block in self.blocks:
            last[block.stream] = block
            if block.before is not None and block.residual not in self.flow.operations[block.before.sum].outputs:
                normed.add(block.stream)
        for stream in normed:
            value = self._behind_norm(last[stream])
            if value is not None:
                self.on_stream[value] = last[stream]

    def _behind_norm(self, block: Block) -> str | None:
        """The last value before the work that follows a block's sum, None if nothing is between."""
        flow, ended = self.flow, None
        first = self.flow.operations[block.sum].outputs[:1]
        pending, seen = deque(first), set(first)
        while pending and len(seen) < 40:
            value = pending.popleft()
            readers = flow.readers.get(value, ())
            if any(flow.does(index) not in _LIGHT for index, _ in readers) or not readers:
                ended = value
                continue
            for index, _ in readers:
                data = [one for one in flow.data_inputs(index) if flow.is_data(one)]
                if not seen.issuperset(data):  # joined by what other work gives, as the scale of codes is
                    continue
                for one in flow.operations[index].outputs[:1]:
                    if one and one not in seen and flow.is_data(one):
                        seen.add(one)
                        pending.append(one)
        return ended if ended in seen and ended not in self.on_stream else None

    def _latest(self) -> dict[str, Block | int]:
        """The last value on a stream from which each value comes."""
        flow, found = self.flow, dict[str, "Block | int"]()
        position: dict[str, int] = {}
        for index, operation in enumerate(flow.operations):
            best: tuple[int, Block | int] | None = None
            for value in operation.inputs:
                if value in found and (best is None or position[value] > best[0]):
                    best = (position[value], found[value])
            for value in operation.outputs:
                own = self.on_stream.get(value)
                if own is not None:
                    found[value], position[value] = own, index
                elif best is not None:
                    position[value], found[value] = best
        for value in self.on_stream:
            if value not in flow.maker:
                found[value] = self.on_stream[value]
        return found

    def latest(self, value: str) -> Block | int | None:
        """The block (or beginning of a stream) that a value was last read from."""
        return self.on_stream.get(value) or self._last.get(value)

    def _assign(self) -> dict[int, Block | None]:
        """Operation → the first block whose sum it reaches, None behind and before all blocks."""
        flow = self.flow
        ends = {block.sum: block for block in self.blocks}
        found: dict[int, Block | None] = {}
        for index in range(len(flow.operations) - 1, -1, -1):
            if index in ends:
                found[index] = ends[index]
                continue
            best: Block | None = None
            for value in flow.operations[index].outputs:
                here = self.on_stream.get(value)
                if here is not None and here not in self._nested:  # a stream begins, or a block's normalised end
                    reached = here if isinstance(here, Block) else None
                    if isinstance(here, Block) and here.sum > index:
                        reached = None
                    best = reached
                    break
                for reader, _ in flow.readers.get(value, ()):
                    block = found.get(reader) if reader > index else None
                    if block is not None and (best is None or block.sum < best.sum):
                        best = block
            found[index] = best
        return found

    def _nest(self) -> None:
        """A stream that begins and ends inside a block of another stream is part of that block."""
        for value, here in self.on_stream.items():
            if isinstance(here, Block):
                self._ended.setdefault(here, []).append(value)
        by_stream: dict[int, list[Block]] = {}
        for block in self.blocks:
            by_stream.setdefault(block.stream, []).append(block)
        beginnings = {here: value for value, here in self.on_stream.items() if isinstance(here, int)}
        for stream, blocks in by_stream.items():
            outer = self._outer(blocks[-1])
            came_from = self._came_from(beginnings.get(stream, ""), stream)
            if outer is None or outer.stream == stream or came_from is None:
                continue
            if outer.before is came_from or came_from == outer.stream:
                self._nested.add(stream)
                for block in blocks:
                    block.inside = outer

    def _outer(self, last: Block) -> Block | None:
        flow, best = self.flow, None
        for value in self._ended.get(last, ()):
            for reader, _ in flow.readers.get(value, ()):
                block = self.block_of.get(reader)
                if block is not None and block.stream != last.stream:
                    if best is None or block.sum < best.sum:
                        best = block
        return best

    def _came_from(self, beginning: str, stream: int) -> Block | int | None:
        index = self.flow.maker.get(beginning)
        if index is None:
            return None
        found = [self.latest(value) for value in self.flow.operations[index].inputs if self.flow.is_data(value)]
        known = [one for one in found if one is not None and one != stream]
        return max(known, key=lambda one: one.sum if isinstance(one, Block) else -1, default=None)
