"""Runs of the gate, made by hand: what the formats of `tieaudit check` are tested with."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

from tieaudit.audit import rules
from tieaudit.checked import Checked, Judged, Place, Run
from tieaudit.verdict import CannotTell, Crashed, Finding, Fix, Severity, Summary

N_RULES = 3
"""Of a policy that chose some; a new rule changes nothing about these runs."""
E, H = "model.embed_tokens.weight", "lm_head.weight"
SUMMARY = Summary(n_weights=2, n_parameters=1024, n_parameters_named=1024, n_bytes=4096, n_bytes_duplicate=2048)


def judged(
    code: str = "TIE102",
    *,
    path: str = "models/llama/model.safetensors",
    line: int = 0,
    ids: tuple[str, ...] = (E, H),
    message: str = "",
    severity: Severity | None = None,
    fix: Fix | None = None,
    evidence: dict[str, object] | None = None,
    n_bytes: int = 2048,
) -> Judged:
    """A finding of a rule there is, in its own severity, unless something else is said."""
    rule = rules().get(code)
    finding = Finding(
        ids,
        message or f"{' and '.join(ids)} are one by config.json, and stored twice",
        fix,
        evidence or {},
        n_bytes,
        code,
        rule.name if rule else "of-another-version",
        severity or (rule.severity if rule else "warning"),
    )
    return Judged(
        finding, Place(path, line), sha256("\0".join((code, *ids)).encode("utf-8", "surrogatepass")).hexdigest()
    )


def model(path: str = "models/llama", *findings: Judged, **fields: object) -> Checked:
    """What the gate says of one model; a healthy one without further arguments."""
    base = Checked(path, "huggingface", tuple(findings), summary=SUMMARY, n_rules=N_RULES)
    return replace(base, **fields)  # type: ignore[arg-type]


BROKEN = judged(
    "TIE101",
    path="models/opt/config.json",
    line=14,
    message=f"config.json ties {E} and {H}, but the stored {H} (2.0 kB) differs from {E}",
    fix=Fix("safe", "tieaudit apply models/opt --scheme declare --to OUT", "declare"),
    evidence={"claimed_by": "config.json", "groups": [[E], [H]]},
)
TWICE = judged(
    "TIE102", path="models/opt/model.safetensors", fix=Fix("safe", "tieaudit apply models/opt --to OUT", "dedup")
)
BY_HAND = judged(
    "TIE205",
    path="export/decoder.onnx",
    ids=("mask.0", "mask.1"),
    message="mask.0 and mask.1 are equal",
    n_bytes=80_000,
    fix=Fix("manual", "the masks are made by the exporter: export again"),
)
STALE = judged("TIE999", path="tieaudit.toml", line=7, ids=(), message="said by a rule of another version", n_bytes=0)

MIXED = Run(
    models=(
        model("export/decoder.onnx", BY_HAND, format="onnx", n_suppressed=1, used=("TIE201:wte",)),
        model("models/bert"),
        model("models/opt", BROKEN, TWICE, known=(judged("TIE104", path="models/opt/config.json", line=14),)),
        model(
            "models/pointer",
            weights_here=False,
            cannot_tell=(CannotTell("the weights are not here: a git-LFS pointer", (E,), "TIE101"),),
        ),
        model(
            "models/t5", crashed=(Crashed("TIE301", "KeyError: 'wte'", "Traceback …\nKeyError: 'wte'"),), n_silenced=2
        ),
        Checked("tieaudit.toml", "", (STALE,)),
    ),
    errors=(("models/cut.onnx", "models/cut.onnx: expected 4,096 bytes, found 17: the file is truncated"),),
    skipped=(("README.md", "belongs to no model"),),
    policy="tieaudit.toml",
    facts={"fail-on": "warning", "baseline": "tieaudit-baseline.json"},
)
"""One of everything: each severity, each kind of fix, cannot tell, crashed, not read, skipped, suppressed, known."""
CLEAN = Run(models=(model("models/bert"), model("models/llama")))
RUNS = {"mixed": MIXED, "clean": CLEAN, "nothing": Run(models=())}


def many(n_models: int = 2000, n_findings: int = 3) -> Run:
    """A large run: so many models with so many findings each."""
    return Run(
        models=tuple(
            model(
                f"models/{number:05}",
                *(
                    judged(
                        ("TIE101", "TIE102", "TIE201")[index % 3],
                        path=f"models/{number:05}/model.safetensors",
                        ids=(f"layer.{index}.a", f"layer.{index}.b"),
                        fix=Fix("safe", f"tieaudit apply models/{number:05} --to OUT", "dedup"),
                    )
                    for index in range(n_findings)
                ),
            )
            for number in range(n_models)
        )
    )
