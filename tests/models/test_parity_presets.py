"""Presets against the public `config.json` of the checkpoints that they are named after.

As transformers 4 wrote the files and as transformers 5 writes them again; the number of parameters
as transformers counts them on a device without memory, and as the model cards round it.
"""

import dataclasses
import math

import jax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from intellect3.models import presets, transformer  # noqa: E402
from intellect3.models.config import ModelConfig  # noqa: E402

GLM = {
  "architectures": ["Glm4MoeForCausalLM"],
  "attention_bias": True,
  "attention_dropout": 0.0,
  "eos_token_id": [151329, 151336, 151338],
  "first_k_dense_replace": 1,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "initializer_range": 0.02,
  "intermediate_size": 10944,
  "max_position_embeddings": 131072,
  "model_type": "glm4_moe",
  "moe_intermediate_size": 1408,
  "n_group": 1,
  "n_routed_experts": 128,
  "n_shared_experts": 1,
  "norm_topk_prob": True,
  "num_attention_heads": 96,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 46,
  "num_key_value_heads": 8,
  "num_nextn_predict_layers": 1,
  "pad_token_id": 151329,
  "partial_rotary_factor": 0.5,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "routed_scaling_factor": 1.0,
  "tie_word_embeddings": False,
  "topk_group": 1,
  "torch_dtype": "bfloat16",
  "use_cache": True,
  "use_qk_norm": False,
  "vocab_size": 151552,
}
QWEN = {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "head_dim": 128,
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "max_position_embeddings": 40960,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": None,
  "torch_dtype": "bfloat16",
  "use_cache": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}


def dense(hidden, mlp, layers, heads, tied):
  return QWEN | {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": hidden,
    "intermediate_size": mlp,
    "max_window_layers": layers,
    "model_type": "qwen3",
    "num_attention_heads": heads,
    "num_hidden_layers": layers,
    "num_key_value_heads": 8,
    "tie_word_embeddings": tied,
  }


QWEN_MOE = QWEN | {
  "architectures": ["Qwen3MoeForCausalLM"],
  "decoder_sparse_step": 1,
  "hidden_size": 2048,
  "intermediate_size": 6144,
  "max_window_layers": 48,
  "mlp_only_layers": [],
  "model_type": "qwen3_moe",
  "moe_intermediate_size": 768,
  "norm_topk_prob": True,
  "num_attention_heads": 32,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 48,
  "num_key_value_heads": 4,
  "output_router_logits": False,
  "router_aux_loss_coef": 0.001,
  "tie_word_embeddings": False,
}
# preset -> its file, and its parameters in billions.
PUBLISHED = {
  "glm_4_5_air": (GLM, 106.9),
  "intellect_3": (GLM, 106.9),
  "qwen3_0_6b": (dense(1024, 3072, 28, 16, True), 0.596),
  "qwen3_1_7b": (dense(2048, 6144, 28, 16, True), 1.72),
  "qwen3_4b": (dense(2560, 9728, 36, 32, True), 4.02),
  "qwen3_8b": (dense(4096, 12288, 36, 32, False), 8.19),
  "qwen3_30b_a3b": (QWEN_MOE, 30.5),
}
RUN_OPTIONS = (
  *("dtype", "param_dtype", "remat_policy", "attention", "grouped_matmul", "expert_block_size"),
)


def architecture(config):
  """The config's fields but for those that say how to run it."""
  values = dataclasses.asdict(config)
  return {name: value for name, value in values.items() if name not in RUN_OPTIONS}


@pytest.fixture(params=PUBLISHED)
def preset(request):
  published, billions = PUBLISHED[request.param]
  return getattr(presets, request.param)(), published, billions


def test_a_preset_is_its_public_config(preset):
  ours, published, _ = preset
  assert architecture(ModelConfig.from_hf(published)) == architecture(ours)
  assert ModelConfig.from_hf(published).param_dtype == "bfloat16"


def test_transformers_5_writes_the_same_model(preset):
  ours, published, _ = preset
  theirs = transformers.AutoConfig.for_model(**published).to_dict()
  assert "rope_theta" not in theirs and theirs["rope_parameters"]["rope_theta"] == 1e6
  assert architecture(ModelConfig.from_hf(theirs)) == architecture(ours)


def test_what_we_write_is_read_as_the_same_by_transformers(preset):
  ours, published, _ = preset
  written = transformers.AutoConfig.for_model(**ours.to_hf()).to_dict()
  public = transformers.AutoConfig.for_model(**published).to_dict()
  ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "num_nextn_predict_layers"}
  ignored |= {"max_window_layers", "scoring_func", "topk_method", "quantization_config"}
  ignored |= {"router_aux_loss_coef", "output_router_logits"}
  differing = {
    key
    for key in written.keys() | public.keys()
    if key not in ignored and written.get(key) != public.get(key)
  }
  assert not differing, {key: (written.get(key), public.get(key)) for key in differing}


def test_the_number_of_parameters_is_transformers_and_the_cards(preset):
  ours, published, billions = preset
  config = transformers.AutoConfig.for_model(**published)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
  theirs = sum(tensor.numel() for tensor in model.parameters())
  theirs += sum(
    b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
  )
  shapes, _ = transformer.abstract(ours)
  given = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert given == theirs
  assert given / 1e9 == pytest.approx(billions, rel=2e-3)


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
  ("published", "changes", "named"),
  [
    (GLM, {"model_type": "deepseek_v3"}, "model_type.*'deepseek_v3'"),
    (GLM, {"model_type": None}, "model_type.*None"),
    (QWEN_MOE, {"rope_scaling": SCALED}, r"rope_scaling.rope_type.*'yarn'"),
    (QWEN_MOE, {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling.*'linear'"),
    (GLM, {"rope_parameters": {**SCALED, "rope_theta": 1e6}}, r"rope_parameters.rope_type.*'yarn'"),
    (GLM, {"rope_parameters": {"rope_theta": 1e6, "mscale": 0.7}}, "rope_parameters.*mscale"),
    (GLM, {"hidden_act": "gelu"}, "hidden_act.*'gelu'"),
    (GLM, {"scoring_func": "softmax"}, "scoring_func.*'softmax'"),
    (GLM, {"topk_method": "greedy"}, "topk_method.*'greedy'"),
    (GLM, {"attention_dropout": 0.1}, "attention_dropout.*0.1"),
    (GLM, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
    (QWEN_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step.*2"),
    (QWEN_MOE, {"mlp_only_layers": [3]}, r"mlp_only_layers.*\[3\]"),
    (QWEN_MOE, {"attention_bias": True}, "attention_bias.*True"),
    (QWEN_MOE, {"use_sliding_window": True}, "use_sliding_window.*True"),
    (QWEN_MOE, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding"),
    (QWEN_MOE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor.*0.5"),
    (QWEN_MOE, {"num_experts": None}, "num_experts"),
    (GLM, {"hidden_size": None}, "hidden_size"),
    (GLM, {"rope_theta": None}, "rope_theta"),
    (GLM, {"n_group": 3}, "num_expert_groups.*3"),
    (GLM, {"topk_group": 2}, "num_groups_per_token.*2"),
    (GLM, {"num_experts_per_tok": 129}, "num_experts_per_token.*129"),
    (GLM, {"num_key_value_heads": 7}, r"num_heads.*7"),
    (GLM, {"compression_config": {"quant_method": "x"}}, "compression_config: expected None"),
    (GLM, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected None, got 50.0"),
    (GLM, {"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false"),
    (GLM, {"num_hidden_layers": "46"}, "num_hidden_layers: expected an integer >= 0, got '46'"),
    (GLM, {"rope_theta": "1e6"}, "rope_theta: expected a number, got '1e6'"),
    (GLM, {"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters.rope_theta: expected 1000000"),
    (GLM, {"first_k_dense_replace": 47}, "first_k_dense_replace: expected at most num_hidden_l"),
    (GLM, {"mlp_layer_types": ["dense"] * 46}, "mlp_layer_types: expected 46 entries"),
    (GLM, {"layer_types": 5}, "layer_types: expected 46 entries"),
    (QWEN_MOE, {"layer_types": ["full_attention"] * 3}, "layer_types: expected 48 entries"),
    (QWEN_MOE, {"mlp_only_layers": [0, 0]}, "mlp_only_layers: expected the first layers, each"),
    (QWEN_MOE, {"num_local_experts": 64}, "num_local_experts: expected 128 as num_experts, got 64"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_implemented_raises_and_names_the_field(published, changes, named):
  with pytest.raises(ValueError, match=named):
    ModelConfig.from_hf({**published, **changes})


def test_a_missing_head_dim_means_what_the_family_means():
  dense_file = dense(1024, 3072, 28, 16, True)
  for published, expected in ((dense_file, 128), (QWEN_MOE, 2048 // 32)):
    file = {key: value for key, value in published.items() if key != "head_dim"}
    assert ModelConfig.from_hf(file).head_dim == expected
  with pytest.raises(ValueError, match="head_dim"):
    ModelConfig.from_hf({**dense_file, "head_dim": None})
