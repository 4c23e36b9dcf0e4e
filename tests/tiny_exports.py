"""Tiny models of real architectures, exported by torch.onnx.export and optimised offline by ONNX Runtime.

Built once per test run; needs torch, transformers, onnxscript and onnxruntime.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

ARCHITECTURES = ("gpt2", "llama", "t5", "bart", "marian", "bert")
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 48, "max_position_embeddings": 32, "tie_word_embeddings": True},
    "t5": {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 48},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
    "marian": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
               "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
               "max_position_embeddings": 32, "decoder_vocab_size": 300},
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
             "max_position_embeddings": 32},
}  # fmt: skip
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration",
           "bart": "BartForConditionalGeneration", "marian": "MarianMTModel", "bert": "BertForMaskedLM"}  # fmt: skip


def live(arch: str) -> Any:
    """A tied model in eval mode, no two parameters equal by chance."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    ids = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = CONFIG_MAPPING[arch](**{**ids, **SIZES[arch]})
    config._attn_implementation = "eager"
    config.use_cache = False
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[arch])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.tie_weights()
    return model


def inputs(arch: str) -> dict[str, Any]:
    """Sample inputs by name."""
    import torch

    ids = torch.randint(3, 300, (2, 7))
    if arch in ("t5", "bart", "marian"):
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": torch.randint(3, 300, (2, 5)),
        }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(arch: str, path: Path, *, dynamo: bool = True) -> Path:
    """The model as an ONNX file, with symbolic batch and sequence lengths."""
    import torch

    model, sample = live(arch), inputs(arch)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            return self.model(**dict(zip(sample, args, strict=True))).logits

    axes = {name: {0: "batch", 1: "decoder_sequence" if "decoder" in name else "sequence"} for name in sample}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if dynamo:
            dims = torch.export.Dim.DYNAMIC
            program = torch.onnx.export(
                Logits(), tuple(sample.values()), None, dynamo=True, input_names=list(sample), output_names=["logits"],
                dynamic_shapes=(tuple({0: dims, 1: dims} for _ in sample),), external_data=False, verbose=False,
            )  # fmt: skip
            program.save(str(path), external_data=False)
        else:
            torch.onnx.export(
                Logits(), tuple(sample.values()), str(path), dynamo=False, input_names=list(sample),
                output_names=["logits"], dynamic_axes=axes, opset_version=17,
            )  # fmt: skip
    return path


def optimised(path: Path, to: Path) -> Path:
    """What ONNX Runtime writes when it optimises offline at BASIC: constant folding un-ties the head."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(to)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return to
