"""What each input slot of an operation is for: learned, a buffer, or a number that steers the operation.

Source: the operator specifications of ONNX (opset 1–24, onnx.ai/onnx/operators) and ONNX Runtime's
docs/ContribOperators.md (1.32). An operation that is not here is judged by what flows through it (`parameters.py`).
"""

from __future__ import annotations


def _table(text: str) -> dict[str, frozenset[int]]:
    rows = (line.split(":") for line in text.split(";") if line.strip())
    return {name: frozenset(int(slot) for slot in slots.split(",")) for names, slots in rows for name in names.split()}


def _prefixed(table: dict[str, frozenset[int]], domain: str) -> dict[str, frozenset[int]]:
    return {f"{domain}.{name}": slots for name, slots in table.items()}


LEARNED: dict[str, frozenset[int]] = {
    **_table(
        "MatMul:0,1; Gemm:0,1,2; MatMulInteger:0,1; QLinearMatMul:0,3; Einsum:0,1,2,3;"
        "Conv ConvTranspose:0,1,2; ConvInteger:1; QLinearConv:3,8; DeformConv:1,3; CausalConvWithState:1,2;"
        "RNN GRU LSTM:1,2,3,7; PRelu:1; BatchNormalization SpatialBN:1,2; InstanceNormalization:1,2;"
        "LayerNormalization GroupNormalization:1,2; RMSNormalization SimplifiedLayerNormalization:1"
    ),
    **_prefixed(
        _table(
            "FusedMatMul TransposeMatMul FusedMatMulActivation:0,1; FusedGemm:0,1,2; GemmFastGelu:1,2; Gemm:0,1,2;"
            "GemmFloat8:0,1,2; QGemm:0,3,6; MatMulInteger16:0,1; MatMulIntegerToFloat:0,1,6; DynamicQuantizeMatMul:1,4;"
            "MatMulNBits:1,5; MatMulBnb4:1; MatMulFpQ4:1; SparseToDenseMatMul:0,1; DynamicQuantizeLSTM:1,2,3,7;"
            "FusedConv NhwcConv NhwcFusedConv:1,2; QLinearConv:3,8; ConvTransposeWithDynamicPads:1,3;"
            "EmbedLayerNormalization:2,3,4,5,6; QEmbedLayerNormalization:2,3,4,5,6; GatherBlockQuantized:0;"
            "LayerNormalization GroupNorm:1,2; SkipGroupNorm:1,2,4; RMSNormalization SimplifiedLayerNormalization:1;"
            "SkipLayerNormalization:2,3,4; SkipSimplifiedLayerNormalization:2,3; QOrderedLayerNormalization:2,3;"
            "Attention QAttention PackedAttention DecoderMaskedSelfAttention:1,2; MultiHeadAttention:3;"
            "PackedMultiHeadAttention:3; GroupQueryAttention:11; DecoderMaskedMultiHeadAttention:10;"
            "DecoderAttention:2,3,4; LongformerAttention:1,2,4,5; RelativePositionBias:0;"
            "GatedRelativePositionBias:1,3,4,5; BiasGelu FastGelu BiasAdd BiasSplitGelu BiasDropout:1;"
            "MoE:2,3,4,5,6,7; QMoE:2,4,5,7,8,10; AttnLSTM:1,2,3,7; CausalConvWithState:1,2"
        ),
        "com.microsoft",
    ),
    **_prefixed(_table("FusedConv Conv:1,2; BatchNormalization:1,2; ConvTranspose:1,2"), "com.microsoft.nchwc"),
    **_prefixed(_table("Conv:1,2; ConvTranspose:1,2"), "com.ms.internal.nhwc"),
}
"""Operation → slots that hold what was learned, whatever their size."""

BUFFERS: dict[str, frozenset[int]] = {
    **_table(
        "BatchNormalization:3,4; RotaryEmbedding:1,2,3; STFT:2; QuantizeLinear DequantizeLinear:1,2;"
        "QLinearMatMul:1,2,4,5,6,7; QLinearConv:1,2,4,5,6,7; MatMulInteger ConvInteger:2,3"
    ),
    **_prefixed(
        _table(
            "RotaryEmbedding:1,2,3; GroupQueryAttention:5,6,7,8; SparseAttention:5,6,7,8;"
            "QuantizeLinear DequantizeLinear:1,2; QGemm:1,2,4,5,7,8; MatMulIntegerToFloat:2,3,4,5;"
            "DynamicQuantizeMatMul:2,3; MatMulNBits:2,3,4; MatMulBnb4 MatMulFpQ4:2,3; GatherBlockQuantized:2,3;"
            "QAttention:3,4,6,7; DynamicQuantizeLSTM:8,9,10,11; QLinearConv:1,2,4,5,6,7; QMoE:3,6,9,11,12,13;"
            "QLinearAdd QLinearMul:1,2,4,5,6,7; QEmbedLayerNormalization:8,9,10,11,12,13,14,15,16,17"
        ),
        "com.microsoft",
    ),
}
"""Operation → slots of statistics, tables that are computed, quantisation scales and zero points."""

STEERING: dict[str, frozenset[int]] = {
    **_table(
        "Reshape Expand Unsqueeze Squeeze Tile Split SplitToSequence TopK ReduceSum ReduceMean ReduceMax ReduceMin "
        "ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare CumSum Trilu Pow CenterCropPad:1;"
        "Slice:1,2,3,4; Pad:1,2,3; Range:0,1,2; ConstantOfShape:0; Resize:1,2,3; Upsample:1; OneHot:1,2; Clip:1,2;"
        "Gather GatherND GatherElements ArrayFeatureExtractor:1; ScatterND ScatterElements Scatter:1; Dropout:1,2;"
        "NonMaxSuppression:2,3,4; LSTM GRU RNN:4; Loop:0,1; If:0; Where:0; RoiAlign:2; MaxUnpool:1,2; EyeLike:0;"
        "Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not BitShift:0,1; SequenceAt SequenceErase:1;"
        "DFT:1,2; HannWindow HammingWindow BlackmanWindow:0; Col2Im:1,2; Compress:1; IsInf IsNaN:0; RandomUniform:0"
    ),
    **_prefixed(_table("Pad:1,2; Range:0,1,2; Trilu:1; GatherND:1"), "com.microsoft"),
}
"""Operation → slots of shapes, axes, indices, limits and conditions."""

CARRYING: dict[str, frozenset[int]] = {
    **_table(
        "Identity Transpose Cast CastLike Reshape Squeeze Unsqueeze Flatten Expand Slice Tile Pad Split Trilu "
        "QuantizeLinear DequantizeLinear:0"
    ),
    **_prefixed(_table("QuantizeLinear DequantizeLinear:0"), "com.microsoft"),
}
"""Operation → slots whose content comes out again, cut, repeated or converted: judged by what happens next."""
