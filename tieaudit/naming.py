"""Roles told by names and shapes, for files without a graph: words that module paths are made of, and what is beside.

A name says *query* or *norm* plainly; where it only says *dense* or *c_proj*,
the modules around it and its neighbour's shape decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from tieaudit.model import Model, Role, Weight
from tieaudit.scoring import Vocabularies, table_beside_a_head
from tieaudit.standing import called_feed, doubles, feed_kinds, numbered_feed
from tieaudit.words import (
    FEED,
    HEAD,
    NORM_BIASES,
    NORM_SCALES,
    PERHAPS_HEAD,
    PERHAPS_TOKEN,
    PLAIN,
    TOKEN,
    Path,
    attention_word,
    path_of,
    table_word,
)

_ATTENTION = re.compile(r"attn|attention|(^|[._])(att|mha|sa|ca)([._]|$)|encdecattention")
_MIXER = re.compile(
    r"mixer|mamba|ssm|delta|linear_attn|recurrent|temporal_block|rwkv|short_?conv|(^|\.)conv(\.|$)|mlstm"
)
_NORM = re.compile(r"norm|(^|_)(ln|bn|gn|rms)(_|\d|$)|layer_?norm|^ln|^bn\d|layrnorm")
_BUFFERS = re.compile(r"running_(mean|var)$|num_batches_tracked$|inv_freq$|position_ids$|(^|\.)attn\.(masked_)?bias$")
_VOCABULARIES = re.compile(
    r"(^|\.)((src|tgt|source|target|encoder|decoder|text|padded)_)?(vocab_size|n_vocab|vocabulary_size)$"
)
_LAYERS = re.compile(r"(^h|layers?|blocks?|blk|stages?|cells?|encoders|decoders)$")
_WITH_BIAS = ("attention_", "ffn_", "output_head", "recurrent_")
_ASKS = ("attention_query", "attention_qkv")
_ANYTHING = re.compile("")
_LEARNED = ("query", "queries", "key", "value", "q", "k", "v")
_OUTPUTS = frozenset("out_proj o wo c_proj dense proj output out linear_out to_out fc proj_out".split())
_NUMBERED = frozenset("w1 w2 w3 wi wo fc1 fc2 fc11 fc12 linear1 linear2 linear_1 linear_2".split())
_LAYER_SCALE = re.compile(r"(^|_)ls_?\d*$|layer_?scale")
_WIDEST_KERNEL = 16
_STACKED = re.compile(r"expert|moe|switch|sparse")
_CLASSES = re.compile(r"class|label|time(step)?|speaker|lang|style|emotion|prompt|codebook|quantiz|spatial")


class Names:
    """All names of a model together: what is beside a weight, and which numbers in the paths vary."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.paths = {weight.id: path_of(weight.name) for weight in model.weights}
        self.beside: dict[tuple[str, ...], dict[str, Weight]] = {}
        for weight in model.weights:
            path = self.paths[weight.id]
            if path.modules and (path.end == "weight" or len(weight.shape) > 1):
                self.beside.setdefault(path.modules[:-1], {}).setdefault(path.modules[-1], weight)
        self.holders = {path.modules[:n] for path in self.paths.values() for n in range(len(path.modules))}
        """Modules that hold others."""
        self.vectors = {
            (self.paths[weight.id].modules, self.paths[weight.id].end): weight.shape[0]
            for weight in model.weights
            if len(weight.shape) == 1
        }
        """(module, name of its tensor) → size, of what has one axis."""
        self.counted = {path.modules for path in self.paths.values() if path.end == "running_var"}
        """Modules that hold a running variance: norms over batches, whatever they are called."""
        self.has_sides = all(
            any(self._numbered(path.modules, side) for path in self.paths.values()) for side in ("encoder", "decoder")
        )
        self.vocabularies = {size for key, size in model.dimensions.items() if _VOCABULARIES.search(key)}

    @staticmethod
    def _numbered(modules: Sequence[str], side: str) -> bool:
        return side in modules and any(part.isdigit() for part in modules[modules.index(side) :])

    def roles(self) -> dict[str, Role]:
        """A role for every weight, *other* where name and shape tell no more. Cost: linear in the weights."""
        found: dict[str, Role] = {}
        for weight in self.model.weights:
            path = self.paths[weight.id]
            kind = self._kind(weight, path)
            because = f"by its name {weight.name}" if kind is not None else "no evidence for a more specific role"
            found[weight.id] = self.placed(weight, kind or "other", because)
        return found

    def placed(self, weight: Weight, kind: str, because: str) -> Role:
        """A role with the layer, side and expert that stand in the path."""
        modules = self.paths[weight.id].modules
        side = next((part for part in modules if part in ("encoder", "decoder")), None) if self.has_sides else None
        expert = None
        for before, part in pairwise(modules):
            if part.isdigit() and "expert" in before:
                expert = int(part)
        return Role(kind, because, self._layer(modules), side, expert)  # type: ignore[arg-type]

    def _layer(self, modules: Sequence[str]) -> int | None:
        for index, part in enumerate(modules):
            if part.isdigit() and (index == 0 or _LAYERS.search(modules[index - 1]) or self._varies(modules, index)):
                return int(part) if index else None
            if match := re.fullmatch(r"(?:\w*(?:layers?|blocks?)|h)_?(\d+)", part):
                return int(match[1])
        return None

    def _varies(self, modules: Sequence[str], index: int) -> bool:
        """Whether the same path with another number there exists."""
        return (*modules[:index], *modules[index + 1 :]) in self._twice

    @cached_property
    def _twice(self) -> set[tuple[str, ...]]:
        seen: set[tuple[str, ...]] = set()
        twice: set[tuple[str, ...]] = set()
        for modules in {path.modules for path in self.paths.values()}:
            for index, part in enumerate(modules):
                if part.isdigit():
                    key = (*modules[:index], *modules[index + 1 :])
                    (twice if key in seen else seen).add(key)
        return twice

    def _kind(self, weight: Weight, path: Path) -> str | None:
        if _BUFFERS.search(weight.name.lower()) and not (path.end == "bias" and self._owner(path) is not None):
            return "buffer"
        if len(weight.name) == 1:
            return None  # too little to go by
        if path.end == "bias" or path.end.startswith(("bias_ih", "bias_hh")):
            return self._bias(weight, path)
        return self._matrix(weight, path)

    def _bias(self, weight: Weight, path: Path) -> str | None:
        if self._is_norm(path) or path.modules in self.counted:
            return "norm_bias"
        if path.end.startswith(("bias_ih", "bias_hh")):
            return "recurrent_hidden_bias" if path.end.startswith("bias_hh") else "recurrent_input_bias"
        owner = self.beside.get(path.modules[:-1], {}).get(path.modules[-1]) if path.modules else None
        kind = None
        if owner is not None and owner.id != weight.id:
            kind = self._matrix(owner, self.paths[owner.id])
        elif path.leaf in PLAIN:
            kind = PLAIN[path.leaf]
        elif self._is_of_scores(weight, path):
            kind = "output_head"
        return f"{kind}_bias" if kind is not None and kind.startswith(_WITH_BIAS) else "bias"

    def _is_of_scores(self, weight: Weight, path: Path) -> bool:
        """Whether a bias without a matrix beside it has a number for each row of the vocabulary."""
        if "predictions" in (*path.modules, path.leaf):
            return bool(weight.shape) and weight.shape[-1] in (self.vocabularies or self.tables.rows)
        known = self.vocabularies | ({n for n in self.tables.rows if n not in self.tables.widths})
        return len(weight.shape) == 1 and weight.shape[0] in known and path.leaf in HEAD | {"cls", "unembed"}

    def _owner(self, path: Path) -> Weight | None:
        """The matrix of a module."""
        owner = self.beside.get(path.modules[:-1], {}).get(path.modules[-1]) if path.modules else None
        return owner if owner is not None and len(owner.shape) > 1 and self.paths[owner.id].end == "weight" else None

    def _is_norm(self, path: Path) -> bool:
        """Called a norm and no matrix, or a vector with a bias of its size in one module."""
        if path.end in ("weight", "bias") and self._owner(path) is not None:
            return False
        if _NORM.search(path.leaf):
            return True
        pairs = (("weight", "bias"), ("gamma", "beta"), ("scale", "bias"))
        sizes = next((pair for pair in pairs if path.end in pair), None)
        if sizes is None or path.leaf in PLAIN:
            return False
        if path.end in ("gamma", "beta") and path.modules not in self.holders and not _LAYER_SCALE.search(path.leaf):
            return True
        scale, bias = (self.vectors.get((path.modules, end)) for end in sizes)
        return scale is not None and scale == bias and scale > 1

    def _matrix(self, weight: Weight, path: Path) -> str | None:
        rank, leaf = len(weight.shape), path.leaf
        if path.end.startswith(("weight_ih", "weight_hh")):
            return "recurrent_input" if path.end.startswith("weight_ih") else "recurrent_hidden"
        if self._is_norm(path) and (path.end in NORM_SCALES or path.end in NORM_BIASES) and rank <= 2:
            return "norm_bias" if path.end in NORM_BIASES else "norm_scale"
        if path.end != "weight":
            return self._loose(weight, path)
        if rank > 1 and not path.turned and not weight.name.lower().endswith("weight") and leaf in _LEARNED:
            if rank > 2 or not any(PLAIN.get(name) == "attention_key" for name in self._names_beside(path)):
                return None  # learned queries, not a projection
        if rank >= 3 and self._convolves(weight, path):
            return "convolution"
        if rank < 2 and (leaf not in PLAIN or path.modules in self.counted):
            return "norm_scale" if rank == 1 and (_NORM.search(leaf) or path.modules in self.counted) else None
        kind = self._table(weight, path) or self._plain(weight, path) or self._by_context(weight, path)
        kind = kind or self._word_of_table(weight, path)
        if kind is None and rank >= 3:
            return None if path.turned else "convolution"
        return kind or ("projection" if rank == 2 else None)

    def _convolves(self, weight: Weight, path: Path) -> bool:
        """Whether a tensor of three axes or more slides along some: not experts in a stack, and no heads apart."""
        if len(weight.shape) > 3 or path.turned:
            return len(weight.shape) > 3 or "conv" in path.leaf
        if FEED.search(f"{path.around}.{path.leaf}"):
            return weight.shape[-1] < _WIDEST_KERNEL and not _STACKED.search(path.around)
        return path.leaf not in PLAIN or weight.name.lower().endswith(".weight")

    def _word_of_table(self, weight: Weight, path: Path) -> str | None:
        """A table by words that its name puts together; of tokens only outside of layers and longer than wide."""
        kind = table_word(path.modules) if len(weight.shape) == 2 else None
        many = kind is not None and weight.shape[0] > weight.shape[1]
        if kind == "token_embedding" and not (many and self._layer(path.modules) is None):
            return None
        return kind

    def _loose(self, weight: Weight, path: Path) -> str | None:
        """A tensor that a module holds under a name of its own."""
        if path.end == "apart":
            return None
        if weight.id in self.tables.heads:
            return "output_head"
        if len(weight.shape) in (2, 3) and (kind := table_word((*path.modules, path.end))) == "position_embedding":
            return kind
        if re.search(r"pos(ition(al)?)?_?emb", path.end):
            return "position_embedding"
        if re.search(r"bias(_[a-z])?$|^b\d?$", path.end) and len([size for size in weight.shape if size > 1]) <= 2:
            return "output_head_bias" if self._ends_scores(weight, path) else "bias"
        if re.search(r"(_|^)(proj|projection|kernel)(_weight)?$", path.end) and len(weight.shape) >= 2:
            return "projection"
        return None

    def _ends_scores(self, weight: Weight, path: Path) -> bool:
        return "predictions" in path.modules and weight.shape[-1:] in {(n,) for n in self.tables.rows}

    @cached_property
    def tables(self) -> Vocabularies:
        """The token tables that names tell, and the heads that score them."""
        weights = {weight.id: weight for weight in self.model.weights}
        plain = {
            id: weight
            for id, weight in weights.items()
            if self.paths[id].end == "weight" and self._is_token(weight, self.paths[id])
        }
        found = Vocabularies(plain or table_beside_a_head(weights, self.paths, self._is_open))
        if "output_head" not in self.model.hints.values():  # the class knows its head: none is looked for by shape
            found.find_heads(weights, self.paths, self._is_open)
        return found

    def _is_open(self, weight: Weight) -> bool:
        path = self.paths[weight.id]
        if weight.parameter is False or self._layer(path.modules) is not None or _ATTENTION.search(path.around):
            return False
        return path.end == "weight" or path.end not in ("apart", "bias", *NORM_BIASES)

    @cached_property
    def _of_two_sides(self) -> bool:
        return any(not {"encoder", "decoder"}.isdisjoint(path.modules) for path in self.paths.values())

    def _is_token(self, weight: Weight, path: Path) -> bool:
        if len(weight.shape) != 2 or (path.modules, "bias") in self.vectors:  # what adds a bias multiplies before
            return False
        n_rows, n_columns = weight.shape
        if path.leaf == "shared":  # by an encoder and a decoder; the trunk of several tasks is called so as well
            return self._of_two_sides and self._layer(path.modules) is None
        if path.leaf in TOKEN:
            return True
        if path.leaf not in PERHAPS_TOKEN and table_word(path.modules) is None:
            return False
        if self._layer(path.modules) is not None or _CLASSES.search(weight.name.lower()):
            return False
        if path.leaf in PERHAPS_TOKEN and table_word(path.modules) in (None, "token_embedding"):
            known = n_rows in self.vocabularies if self.vocabularies else n_rows > 2 * n_columns
            if known and not (path.leaf == "encoder" and len(path.modules) > 1):
                return True
        return self._word_of_table(weight, path) == "token_embedding"

    def _table(self, weight: Weight, path: Path) -> str | None:
        leaf = path.leaf
        if len(weight.shape) != 2:
            return None
        if weight.id in self.tables.tables or self._is_token(weight, path):
            return "token_embedding"
        if leaf in HEAD or weight.id in self.tables.heads:
            return "output_head"
        if self._layer(path.modules) is not None or _ATTENTION.search(path.around) or "emb" in leaf:
            return None
        if self.vocabularies & {weight.shape[0]}:
            named = leaf in PERHAPS_HEAD or not self._has_head
            return "output_head" if named else "token_embedding"
        if leaf == "decoder" and "predictions" in path.modules:
            return "output_head"
        return None

    @cached_property
    def _has_head(self) -> bool:
        return any(path.leaf in HEAD and path.end == "weight" for path in self.paths.values())

    @cached_property
    def _asks(self) -> bool:
        """Whether anything is called a query or a key: without one a value is no attention's."""
        asked = ("attention_query", "attention_key", "attention_qkv", "attention_kv")
        return any(PLAIN.get(path.leaf, "").startswith(asked) for path in self.paths.values())

    @cached_property
    def feeds(self) -> Mapping[str, str]:
        """What the shapes of matrices that stand together tell of feed-forwards."""
        if self.model.has_graph:  # which had its chance; its products take matrices either way round
            return {}
        biases = {modules: size for (modules, end), size in self.vectors.items() if end == "bias"}
        return feed_kinds(self.model.weights, self.paths, self.tables.widths, biases)

    def _plain(self, weight: Weight, path: Path) -> str | None:
        kind, leaf = PLAIN.get(path.leaf), path.leaf
        if leaf == "receptance":
            kind = "projection"
        if kind is None or "indexer" in path.around:
            return None
        if kind == "attention_value" and (not weight.shape or not self._asks):
            return None  # a critic's value, or a quantiser's
        if (
            kind == "ffn_up"
            and leaf in ("up_proj", "c_fc", "fc_in", "lin1")
            and doubles(weight, path, self.beside.get(path.modules[:-1], {}))
        ):
            return "ffn_gate_up"
        if leaf in ("key", "value", "query", "k", "q", "v", "receptance") and re.search(
            r"feed_forward|ffn|channel_mix", path.around
        ):
            return {"key": "ffn_up", "k": "ffn_up", "value": "ffn_down", "v": "ffn_down"}.get(leaf, "ffn_gate")
        if leaf == "c_attn" and "crossattention" in path.around.replace("_", ""):
            return "attention_kv"
        if kind == "ffn_gate" and _ATTENTION.search(path.around) and not FEED.search(path.around):
            return "projection"
        return kind

    def _by_context(self, weight: Weight, path: Path) -> str | None:
        """Names that mean something only beside their module's."""
        leaf, around = path.leaf, path.around
        beside = self.beside.get(path.modules[:-1], {})
        if "adapter" in around and leaf in ("dense1", "dense2", "down", "up", "fc1", "fc2", "linear1", "linear2"):
            return "adapter_a" if leaf in ("dense1", "down", "fc1", "linear1") else "adapter_b"
        if "bottleneck" in around:
            return None
        last = re.split(r"\.\d+", around)[-1]  # of the layer, not of what holds the layers
        near = last or around
        attention, mixer, feed = (pattern.search(near) for pattern in (_ATTENTION, _MIXER, FEED))
        if attention is None and any(PLAIN.get(name) in _ASKS for name in self._names_beside(path)):
            attention = _ANYTHING.search(near)  # by what is beside, whatever the module is called
        if leaf in ("gate", "wg", "classifier", "layer") and re.search(
            r"moe|mixer|ffn|expert|mlp|router|gat(e|ing)|feed_forward", near
        ):
            if leaf != "gate" or weight.shape[0] <= weight.shape[-1]:
                return "router"
        if mixer and not attention and leaf in ("in_proj", "out_proj", "x_proj", "dt_proj", "output", "o", "wo"):
            return "projection"
        whole = f"{around}.{leaf}"
        inner = max((match.start() for match in FEED.finditer(whole)), default=-1)
        if weight.id in self.feeds and inner > max((match.start() for match in _ATTENTION.finditer(whole)), default=-1):
            return self.feeds[weight.id]
        if leaf in _NUMBERED and not attention:
            known = bool(feed) or self._layer(path.modules) is not None
            return numbered_feed(weight, path, beside, bool(feed)) if known else None
        if attention and not (feed and near.rfind(feed[0]) > near.rfind(attention[0])):
            if mixer and leaf.startswith("in_proj"):
                return "projection"
            if leaf == "in_proj":
                return "attention_qkv"
            if leaf in _OUTPUTS:
                return "projection" if "linear_attn" in near else "attention_output"
            if "indexer" in around:
                return None
            return self._numbered_attention(weight, path) if path.ends_in_number else attention_word(leaf)
        if leaf in ("attention", "selfattention"):
            return None
        if leaf == "dense" and re.search(r"(^|[._])intermediate(_\w+)?$", near):
            return "ffn_up"
        if leaf == "dense" and re.search(r"(^|[._])(output|ffnoutput)(_\w+)?$", near) and last:
            return "ffn_down"
        if leaf in ("ffn", "ffn_output") and not path.ends_in_number and self._layer(path.modules) is not None:
            return "ffn_up" if leaf == "ffn" else "ffn_down"
        if feed or leaf in ("mlp", "ffn", "ff", "feed_forward"):
            return called_feed(weight, path, beside)
        packed = leaf == "out_proj" and "in_proj_weight" in self._names_beside(path)
        return "attention_output" if packed and self._layer(path.modules) is not None else None

    def _numbered_attention(self, weight: Weight, path: Path) -> str | None:
        """Four matrices of one shape in a list are query, key, value and output, as in the annotated Transformer."""
        listed = self.beside.get(path.modules[:-1], {})
        alike = sorted((name for name, one in listed.items() if one.shape == weight.shape and name.isdigit()), key=int)
        if len(alike) != 4 or path.leaf not in ("linears", "linear", "projections", "layers"):
            return attention_word(path.leaf)
        return f"attention_{('query', 'key', 'value', 'output')[alike.index(path.modules[-1])]}"

    def _names_beside(self, path: Path) -> Iterable[str]:
        return self.beside.get(path.modules[:-1], {})


def roles_by_name(model: Model) -> dict[str, Role]:
    """What names and shapes tell about the weights of a model."""
    return Names(model).roles()
