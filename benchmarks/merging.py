"""Post-hoc tying of two small language models that were trained untied: every policy, measured and predicted.

Writes docs/merging.md. `python benchmarks/merging.py --train TEXT --held-out TEXT`; about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tieaudit.calibration import calibrate
from tieaudit.errors import TieAuditError
from tieaudit.merge import policy_of, sites_of
from tieaudit.merges import Merged, Sites
from tieaudit.model import Member, Weight
from tieaudit.storage import MemoryStorage

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LENGTH, BATCH, MIN_COUNT = 128, 64, 16, 5
POLICIES = (
    "keep:embedding", "keep:head", "mean", "norm-matched", "scaled", "frequency", "linear, all rows alike", "linear",
    "gauss-newton, forward passes alone", "gauss-newton", "low-rank:8", "low-rank:16", "low-rank:32", "low-rank:48",
)  # fmt: skip


class Lstm(torch.nn.Module):  # type: ignore[misc]
    """Two layers between an embedding and a head of its own (Press & Wolf's small model, narrower)."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(n_words, WIDTH)
        self.lstm = torch.nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.drop = torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(WIDTH, n_words, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.drop(self.lstm(self.drop(self.embedding(ids)))[0]))
        return found


class Gpt(torch.nn.Module):  # type: ignore[misc]
    """Two pre-norm blocks of four heads, learned positions, a final norm, an embedding and a head of its own."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(n_words, WIDTH)
        self.positions = torch.nn.Embedding(LENGTH, WIDTH)
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.1, torch.nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.blocks = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, n_words, bias=False)
        torch.nn.init.normal_(self.embedding.weight, std=0.02)
        torch.nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n = ids.shape[1]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(n)
        x = self.embedding(ids) + self.positions(torch.arange(n))
        found: torch.Tensor = self.head(self.blocks(x, mask=mask, is_causal=True))
        return found


@dataclass(frozen=True)
class Text:
    """Ids of the words of both texts; words seen fewer than five times are one unknown word."""

    train: torch.Tensor
    held_out: torch.Tensor
    n_words: int

    @classmethod
    def read(cls, train: Path, held_out: Path) -> Text:
        words = [path.read_text(encoding="utf-8").replace("\n", " <eos> ").split() for path in (train, held_out)]
        known = [word for word, count in Counter(words[0]).most_common() if count >= MIN_COUNT and word != "<unk>"]
        number = {word: index + 1 for index, word in enumerate(known)}
        first, second = (torch.tensor([number.get(word, 0) for word in one]) for one in words)
        return cls(first, second, len(known) + 1)


def batches(ids: torch.Tensor, n_tokens: int | None = None, seed: int | None = None) -> Iterator[torch.Tensor]:
    """[batch, LENGTH + 1] pieces, in order or shuffled."""
    ids = ids[: n_tokens or len(ids)]
    starts = torch.arange(0, len(ids) - LENGTH - 1, LENGTH)
    if seed is not None:
        starts = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))]
    for some in starts.split(BATCH):
        yield torch.stack([ids[at : at + LENGTH + 1] for at in some.tolist()])


def total_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="sum")


def train(model: torch.nn.Module, text: Text, n_epochs: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    n_steps = n_epochs * len(list(batches(text.train)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    model.train()
    for epoch in range(n_epochs):
        began = time.perf_counter()
        for batch in batches(text.train, seed=epoch):
            optimizer.zero_grad()
            loss = total_loss(model(batch[:, :-1]), batch[:, 1:]) / batch[:, 1:].numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(
            f"  epoch {epoch + 1}: loss {float(loss.detach()):.3f}, {time.perf_counter() - began:.0f} s",
            file=sys.stderr,
        )


def nats(model: torch.nn.Module, ids: torch.Tensor, n_tokens: int) -> float:
    """Mean negative log-likelihood of the held-out words."""
    model.eval()
    total, n = 0.0, 0
    with torch.no_grad():
        for batch in batches(ids, n_tokens):
            total += float(total_loss(model(batch[:, :-1]), batch[:, 1:]))
            n += batch[:, 1:].numel()
    return total / n


def sites(model: Any) -> Sites:
    weights = []
    for name in ("embedding.weight", "head.weight"):
        table = model.get_parameter(name).detach().numpy()
        weights.append((Weight(name, name, table.shape, "float32", MemoryStorage(table.tobytes(), name)), Member(name)))
    return sites_of(weights, {"embedding.weight": "token_embedding", "head.weight": "output_head"})


@dataclass(frozen=True)
class Row:
    policy: str
    n_parameters: int
    """Saved, what corrections cost taken away."""
    nats: float
    predicted: float
    changed: tuple[float, ...]


def rows(model: Any, text: Text, n_calibration: int, n_held_out: int) -> tuple[float, list[Row]]:
    """Fitted on the first tokens of the training text, predicted from the next ones, measured on held-out text."""
    half = text.train[:n_calibration], text.train[n_calibration : 2 * n_calibration]
    names = ("embedding.weight", "head.weight")
    targets: dict[int, torch.Tensor] = {}

    def inputs(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        for batch in batches(ids):
            shown = batch[:, :-1]
            targets[id(shown)] = batch[:, 1:]
            yield shown

    def loss(output: Any, shown: torch.Tensor) -> torch.Tensor:
        return total_loss(output, targets[id(shown)])

    measured = [
        calibrate(
            model, inputs(one), names, loss=lambda out, shown: total_loss(out, targets[id(shown)]), heads=names[1:]
        )
        for one in half
    ]
    plain = sites(model)
    first, second = (tuple(one[name] for name in names) for one in measured)
    fitted = replace(plain, statistics=first, held_out=second)
    base = nats(model, text.held_out, n_held_out)
    found = []
    for policy in POLICIES:
        merged = merge(policy, plain, fitted)
        after = nats(with_tables(model, plain, merged), text.held_out, n_held_out) - base
        saved = plain.n_rows * plain.n_columns - merged.n_parameters_added
        predicted = fitted.predicted_nats(merged)
        assert predicted is not None
        found.append(Row(policy, saved, after, predicted, plain.relative_change(merged)))
    return base, found


def merge(policy: str, plain: Sites, fitted: Sites) -> Merged:
    text, comma, how = policy.partition(", ")
    given = fitted
    if how == "all rows alike":
        given = plain
    elif comma:
        without = [None if one is None else replace(one, gradients=None) for one in fitted.statistics]
        given = replace(fitted, statistics=tuple(without))
    chosen, argument = policy_of(text)
    return chosen.merge(given, argument)


def with_tables(model: Any, plain: Sites, merged: Merged) -> Any:
    import copy

    changed = copy.deepcopy(model)
    for index, name in enumerate(plain.ids):
        table = np.concatenate([merged.seen_by(index)(*at) for at in plain.blocks()])
        changed.get_parameter(name).data.copy_(torch.from_numpy(table))
    return changed


def spearman(one: list[float], other: list[float]) -> float:
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration-tokens", type=int, default=25_000)
    parser.add_argument("--held-out-tokens", type=int, default=40_000)
    parser.add_argument("--models", type=Path, help="keep trained models in this folder, and take them from there")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "merging.md")
    given = parser.parse_args(arguments)
    text = Text.read(given.train, given.held_out)
    makers: dict[str, tuple[Callable[[int], torch.nn.Module], float]] = {"LSTM": (Lstm, 3e-3), "GPT": (Gpt, 1e-3)}
    results = {}
    for name, (make, rate) in makers.items():
        torch.manual_seed(given.seed)
        model = make(text.n_words)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
        kept = given.models / f"{name}-{given.seed}-{given.epochs}.pt" if given.models is not None else None
        if kept is not None and kept.exists():
            model.load_state_dict(torch.load(kept, weights_only=True))
        else:
            train(model, text, given.epochs, rate)
            if kept is not None:
                torch.save(model.state_dict(), kept)
        results[name] = rows(model, text, given.calibration_tokens, given.held_out_tokens)
    given.to.write_text(page(results, text, given), encoding="utf-8")
    return 0


def page(results: dict[str, tuple[float, list[Row]]], text: Text, given: argparse.Namespace) -> str:
    """docs/merging.md."""
    lines = [
        "<!-- written by benchmarks/merging.py -->", "", "# Merging: what each policy costs", "",
        "Two small language models were trained with an embedding and a head of their own, then tied afterwards under",
        "every policy, without training further. ΔNLL is the measured rise of the negative log-likelihood on held-out",
        "text, in nats per token; *predicted* is what tieaudit says beforehand, from tokens that the policy was not",
        "fitted to. `--calibrate` does the same with your own data ([calibration.md](calibration.md)).",
        "",
        f"Vocabulary {text.n_words:,} words, width {WIDTH}, {given.epochs} epochs over {len(text.train):,} words,",
        f"seed {given.seed}; fitted on {given.calibration_tokens:,} tokens, predicted from the next",
        f"{given.calibration_tokens:,}, measured on {given.held_out_tokens:,} held-out ones; torch "
        f"{torch.__version__}.",
        "One seed: a direction, not a law.", "",
    ]  # fmt: skip
    for name, (base, found) in results.items():
        agreement = spearman([row.predicted for row in found], [row.nats for row in found])
        lines += [
            f"## {name}", "",
            f"Untied: {base:.3f} nats per token, perplexity {math.exp(base):.1f}. Predicted and measured order agree:",
            f"Spearman {agreement:.2f} over {len(found)} policies.", "",
            "| policy | parameters saved | ΔNLL | perplexity | predicted ΔNLL | embedding changed | head changed |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        for row in sorted(found, key=lambda one: -one.nats):
            lines.append(
                f"| {row.policy} | {row.n_parameters:,} | {row.nats:.3f} | {math.exp(base + row.nats):,.1f} | "
                f"{row.predicted:.3f} | {row.changed[0]:.0%} | {row.changed[1]:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TieAuditError as error:
        sys.exit(f"error: {error}")
