"""Write the data file that says which settings count key and value heads, out of the transformers that is installed.

    python tools/make_head_settings.py [--only TYPE,TYPE] [--out FILE]

For when no transformers can be asked. Every class of every model type is built on the meta device with its default
configuration, made smaller where it can be, and once more with one head for each setting whose name counts such heads;
what has another shape then is what the setting governs. Takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tieaudit.formats.huggingface.pool import rows_are_heads  # noqa: E402
from tools import make_tie_defaults as ties  # noqa: E402

OUT = ROOT / "tieaudit" / "formats" / "huggingface" / "heads.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="model types, comma separated")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (default: the package's own)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import transformers

    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    signal.signal(signal.SIGALRM, ties._too_long)
    classes = collect(set(filter(None, options.only.split(","))))
    lines = (f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in sorted(classes.items()))
    text = f'{{"transformers":{json.dumps(transformers.__version__)},\n"classes":{{\n' + ",\n".join(lines) + "\n}}\n"
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(classes)} classes, {len(text)} bytes")


def collect(only: set[str]) -> dict[str, Any]:
    """Class → its prefix and settings, for all that could be built."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, Any] = {}
    for model_type in sorted(CONFIG_MAPPING.keys()):
        if only and model_type not in only:
            continue
        try:
            config_class = CONFIG_MAPPING[model_type]
            model_classes = list(ties.classes_of(config_class))
        except Exception:  # composite types without a default
            continue
        for model_class in model_classes:
            if model_class.__name__ in found:
                continue
            signal.alarm(ties.SECONDS_PER_CLASS)
            try:
                found[model_class.__name__] = describe(model_class, config_class)
            except Exception as error:
                print(f"{model_class.__name__}: {ties.one_line(error)}", file=sys.stderr)
            finally:
                signal.alarm(0)
    return found


def describe(model_class: Any, config_class: Any) -> dict[str, Any]:
    """{"prefix": …, "saved": …, "settings": {key: {"rows": patterns, "stuck": the first tensor of another kind}}}.

    Empty where no setting counts heads.
    """
    from tieaudit.formats.huggingface import ask, heads
    from tieaudit.formats.huggingface.naming import saved_names

    config = ties.small_config(model_class, config_class)
    answer = heads.heads_with(model_class, config_class, config, {})
    settings: dict[str, Any] = {}
    governing: set[str] = set()
    for one in answer["settings"]:
        if not one.get("changed"):
            continue
        fits = {name: rows_are_heads(name, full, small, one["value"]) for name, (full, small) in one["changed"].items()}
        governed: dict[str, Any] = {"rows": list(dict.fromkeys(ties.general(name) for name, ok in fits.items() if ok))}
        if wrong := [name for name, ok in fits.items() if not ok]:
            governed["stuck"] = ties.general(wrong[0])
        settings[one["key"]] = governed
        governing.update(one["changed"])
    if not settings:
        return {}
    entry: dict[str, Any] = {"prefix": model_class.base_model_prefix or "", "settings": settings}
    names = saved_names(ask.build(model_class, config_class, config), sorted(governing))
    if saved := {ties.general(a): ties.general(b) for a, b in sorted(names.items())}:
        entry["saved"] = saved
    return entry


if __name__ == "__main__":
    main()
