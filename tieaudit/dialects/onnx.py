"""ONNX: the standard operators, and the contributed ones of ONNX Runtime that optimisers write."""

from __future__ import annotations

from tieaudit.dialects import Dialect, Meaning, in_domain, same

_FIRST = (0,)
_VIEW = Meaning("view", _FIRST)
_SCALE = "norm_scale"
_BIAS = "norm_bias"

_STANDARD = {
    "input": Meaning("input"),
    "output": Meaning("output"),
    "pass": _VIEW,
    **same(
        "Identity Cast CastLike Reshape Squeeze Unsqueeze Flatten Transpose Expand Slice Tile Split Pad Dropout "
        "DequantizeLinear QuantizeLinear DynamicQuantizeLinear DepthToSpace SpaceToDepth Trilu GatherElements "
        "CenterCropPad ReverseSequence Compress SplitToSequence SequenceAt ConcatFromSequence",
        _VIEW,
    ),
    **same("Shape Size ConstantOfShape EyeLike", Meaning("shape")),
    **same("Range CumSum NonZero", Meaning("positions")),
    **same("Gather GatherND", Meaning("lookup", _FIRST)),
    "MatMul": Meaning("product", (0, 1)),
    "MatMulInteger": Meaning("product", (0, 1)),
    "QLinearMatMul": Meaning("product", (0, 3)),
    "Gemm": Meaning("product", (0, 1), bias=2),
    "Einsum": Meaning("product"),
    **same("Conv ConvTranspose", Meaning("convolve", _FIRST, {1: "convolution", 2: "bias"})),
    "DeformConv": Meaning("convolve", _FIRST, {1: "convolution", 3: "bias"}),
    "ConvInteger": Meaning("convolve", _FIRST, {1: "convolution"}),
    "QLinearConv": Meaning("convolve", _FIRST, {3: "convolution", 8: "bias"}),
    **same(
        "LSTM GRU RNN", Meaning("recur", _FIRST, {1: "recurrent_input", 2: "recurrent_hidden", 3: "recurrent_bias"})
    ),
    **same(
        "LayerNormalization GroupNormalization InstanceNormalization BatchNormalization SpatialBN",
        Meaning("normalise", _FIRST, {1: _SCALE, 2: _BIAS}),
    ),
    **same("RMSNormalization SimplifiedLayerNormalization", Meaning("normalise", _FIRST, {1: _SCALE})),
    **same("MeanVarianceNormalization LpNormalization", Meaning("normalise", _FIRST)),
    "Attention": Meaning("attend", (0, 1, 2), queries=(0, 1, 2)),
    "RotaryEmbedding": _VIEW,
    **same("Softmax", Meaning("softmax", _FIRST)),
    **same("LogSoftmax Hardmax", Meaning("softmax", _FIRST)),
    **same("TopK ArgMax ArgMin", Meaning("pick", _FIRST)),
    **same("Add Sum Mean", Meaning("add")),
    "Sub": Meaning("subtract"),
    "Mul": Meaning("multiply"),
    "Div": Meaning("divide"),
    "Where": Meaning("choose", (1, 2)),
    **same("Max Min", Meaning("choose")),
    **same("Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf", Meaning("compare")),
    **same(
        "Sigmoid Tanh Relu LeakyRelu Elu Selu Gelu Softplus Softsign Erf HardSigmoid HardSwish Celu Mish PRelu "
        "ThresholdedRelu Swish Clip Exp Sign",
        Meaning("activate", _FIRST),
    ),
    **same("Neg Abs Log Sin Cos Floor Ceil Round Pow Mod BitShift", Meaning("adjust", _FIRST)),
    **same("Sqrt Reciprocal", Meaning("root", _FIRST)),
    **same(
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum "
        "ReduceLogSumExp GlobalAveragePool GlobalMaxPool AveragePool MaxPool LpPool Resize Upsample",
        Meaning("reduce", _FIRST),
    ),
    "Concat": Meaning("join"),
    **same("ScatterND ScatterElements Scatter", Meaning("scatter", (0, 2))),
}

_CONTRIBUTED = in_domain(
    "com.microsoft",
    {
        **same("FusedMatMul TransposeMatMul FusedMatMulActivation MatMulInteger16", Meaning("product", (0, 1))),
        "MatMulIntegerToFloat": Meaning("product", (0, 1), bias=6),
        "DynamicQuantizeMatMul": Meaning("product", (0, 1), bias=4),
        **same("FusedGemm Gemm GemmFloat8 GemmFastGelu", Meaning("product", (0, 1), bias=2)),
        "QGemm": Meaning("product", (0, 3), bias=6),
        "MatMulNBits": Meaning("product", (0, 1), bias=5),
        **same("MatMulBnb4 MatMulFpQ4 SparseToDenseMatMul", Meaning("product", (0, 1))),
        **same("DequantizeLinear QuantizeLinear Trilu ExpandDims UnfoldTensor", _VIEW),
        "RotaryEmbedding": _VIEW,
        **same("GatherBlockQuantized GatherND", Meaning("lookup", _FIRST)),
        "EmbedLayerNormalization": Meaning(
            "embed",
            (),
            {2: "token_embedding", 3: "position_embedding", 4: "type_embedding", 5: _SCALE, 6: _BIAS},
        ),
        **same("FusedConv NhwcConv NhwcFusedConv", Meaning("convolve", _FIRST, {1: "convolution", 2: "bias"})),
        "QLinearConv": Meaning("convolve", _FIRST, {3: "convolution", 8: "bias"}),
        **same(
            "DynamicQuantizeLSTM AttnLSTM",
            Meaning("recur", _FIRST, {1: "recurrent_input", 2: "recurrent_hidden", 3: "recurrent_bias"}),
        ),
        **same("LayerNormalization GroupNorm", Meaning("normalise", _FIRST, {1: _SCALE, 2: _BIAS})),
        **same("RMSNormalization SimplifiedLayerNormalization", Meaning("normalise", _FIRST, {1: _SCALE})),
        "SkipLayerNormalization": Meaning("normalise", (0, 1), {2: _SCALE, 3: _BIAS}, bias=4),
        "SkipSimplifiedLayerNormalization": Meaning("normalise", (0, 1), {2: _SCALE}, bias=3),
        "SkipGroupNorm": Meaning("normalise", (0, 3), {1: _SCALE, 2: _BIAS}, bias=4),
        **same(
            "Attention QAttention PackedAttention DecoderMaskedSelfAttention",
            Meaning("attend", _FIRST, {1: "attention_qkv", 2: "attention_qkv_bias"}),
        ),
        "MultiHeadAttention": Meaning("attend", (0, 1, 2), {3: "attention_qkv_bias"}, queries=(0, 1, 2)),
        "PackedMultiHeadAttention": Meaning("attend", (0, 1, 2), {3: "attention_qkv_bias"}, queries=(0, 1, 2)),
        "DecoderMaskedMultiHeadAttention": Meaning("attend", (0, 1, 2), {10: "attention_qkv_bias"}, queries=(0, 1, 2)),
        **same("GroupQueryAttention SparseAttention PagedAttention", Meaning("attend", (0, 1, 2), queries=(0, 1, 2))),
        "LongformerAttention": Meaning(
            "attend",
            _FIRST,
            {
                1: "attention_qkv",
                2: "attention_qkv_bias",
                4: "attention_qkv",
                5: "attention_qkv_bias",
            },
        ),
        "DecoderAttention": Meaning(
            "attend", (0, 1), {2: "attention_query", 3: "attention_kv", 4: "attention_qkv_bias"}
        ),
        **same("RelativePositionBias", Meaning("other", (), {0: "position_embedding"})),
        "MoE": Meaning(
            "experts",
            (0,),
            {
                2: "ffn_up",
                3: "ffn_up_bias",
                4: "ffn_down",
                5: "ffn_down_bias",
                6: "ffn_gate",
                7: "ffn_gate_bias",
            },
        ),
        "QMoE": Meaning(
            "experts",
            (0,),
            {
                2: "ffn_up",
                4: "ffn_up_bias",
                5: "ffn_down",
                7: "ffn_down_bias",
                8: "ffn_gate",
                10: "ffn_gate_bias",
            },
        ),
        "Recv": Meaning("input"),
        **same("BiasGelu FastGelu", Meaning("activate", _FIRST, bias=1)),
        "BiasSplitGelu": Meaning("activate", _FIRST, bias=1),
        **same("QuickGelu Gelu QLinearSigmoid QLinearLeakyRelu", Meaning("activate", _FIRST)),
        **same("BiasAdd BiasDropout", Meaning("add", (0, 2), bias=1)),
        "BiasSoftmax": Meaning("softmax", _FIRST),
        "QLinearAdd": Meaning("add", (0, 3)),
        "QLinearMul": Meaning("multiply", (0, 3)),
        "QLinearConcat": Meaning("join"),
    },
)

onnx = Dialect(
    "onnx",
    "onnx.ai/onnx/operators, opset 1–24; ONNX Runtime 1.32, docs/ContribOperators.md",
    {
        **_STANDARD,
        **_CONTRIBUTED,
        **in_domain("ai.onnx.ml", same("LabelEncoder CategoryMapper", _VIEW)),
        **in_domain("com.microsoft.nchwc", {"Conv": _STANDARD["Conv"]}),
        **in_domain("com.ms.internal.nhwc", {"Conv": _STANDARD["Conv"]}),
    },
)
