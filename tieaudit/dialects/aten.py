"""ATen: the operators of a graph of torch.export, by their names without overload."""

from __future__ import annotations

from tieaudit.dialects import Dialect, Meaning, same

_FIRST = (0,)
_VIEW = Meaning("view", _FIRST)
_SCALE = "norm_scale"
_BIAS = "norm_bias"

aten = Dialect(
    "aten",
    "native_functions.yaml of PyTorch 2.13",
    {
        "input": Meaning("input"),
        "output": Meaning("output"),
        "pass": _VIEW,
        **same(
            "view _unsafe_view reshape permute transpose t numpy_T mT unsqueeze squeeze expand expand_as slice select "
            "clone contiguous alias detach to _to_copy type_as dropout native_dropout split split_with_sizes chunk "
            "unbind getitem repeat repeat_interleave flatten unflatten pad constant_pad_nd roll narrow unfold movedim "
            "lift_fresh_copy dequantize_per_tensor dequantize_per_channel quantize_per_tensor float type tril triu "
            "masked_select gather diagonal flip squeeze_dims alias_copy",
            _VIEW,
        ),
        **same("sym_size zeros ones full zeros_like ones_like full_like new_zeros new_ones empty", Meaning("shape")),
        **same("arange cumsum nonzero range", Meaning("positions")),
        "embedding": Meaning("lookup", _FIRST),
        **same("index index_select take", Meaning("lookup", _FIRST)),
        **same("mm matmul bmm mv dot", Meaning("product", (0, 1))),
        "linear": Meaning("product", (0, 1), bias=2),
        "addmm": Meaning("product", (1, 2), bias=0),
        "baddbmm": Meaning("product", (1, 2), bias=0),
        **same("einsum", Meaning("product")),
        **same(
            "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d _convolution",
            Meaning("convolve", _FIRST, {1: "convolution", 2: "bias"}),
        ),
        **same(
            "layer_norm native_layer_norm",
            Meaning("normalise", _FIRST, {2: _SCALE, 3: _BIAS}),
        ),
        **same("rms_norm", Meaning("normalise", _FIRST, {2: _SCALE})),
        **same("group_norm native_group_norm", Meaning("normalise", _FIRST, {2: _SCALE, 3: _BIAS})),
        **same(
            "batch_norm instance_norm native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit "
            "cudnn_batch_norm",
            Meaning("normalise", _FIRST, {1: _SCALE, 2: _BIAS}),
        ),
        **same(
            "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention",
            Meaning("attend", (0, 1, 2), queries=(0, 1, 2)),
        ),
        **same("softmax _softmax log_softmax _log_softmax _safe_softmax", Meaning("softmax", _FIRST)),
        **same("topk argmax sort max", Meaning("pick", _FIRST)),
        **same("add add_ sum_of", Meaning("add")),
        **same("sub rsub", Meaning("subtract")),
        **same("mul mul_", Meaning("multiply")),
        **same("div true_divide floor_divide", Meaning("divide")),
        **same("where", Meaning("choose", (1, 2))),
        **same("masked_fill maximum minimum", Meaning("choose", _FIRST)),
        **same(
            "eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not __and__ __or__ "
            "isnan isinf",
            Meaning("compare"),
        ),
        **same(
            "sigmoid tanh relu leaky_relu elu selu gelu silu softplus softsign erf hardsigmoid hardswish mish prelu "
            "clamp exp celu hardtanh relu6 sign relu_ silu_ glu",
            Meaning("activate", _FIRST),
        ),
        **same("neg abs log sin cos floor ceil round pow remainder exponential", Meaning("adjust", _FIRST)),
        **same("sqrt rsqrt reciprocal", Meaning("root", _FIRST)),
        **same(
            "mean sum amax amin prod norm linalg_vector_norm var var_mean std avg_pool2d adaptive_avg_pool2d "
            "_adaptive_avg_pool2d max_pool2d max_pool2d_with_indices upsample_nearest2d upsample_bilinear2d",
            Meaning("reduce", _FIRST),
        ),
        **same("cat stack hstack concat", Meaning("join")),
        **same("index_put scatter scatter_add index_add index_copy", Meaning("scatter", (0,))),
    },
)
