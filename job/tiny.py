"""The built-in model of the quickstart and the tests: a tiny Llama with random weights, as an ordinary folder.

It knows nothing and learns little; it is real in every other way: safetensors, a byte-level tokenizer, a chat template
with generation markers. Made from fixed seeds with numpy alone, so that every machine writes the same bytes.
`python -m job.tiny FOLDER` writes it, for loading a quickstart's adapter on top of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN: Final = 64
LAYERS: Final = 2
HEADS: Final = 4
FEED_FORWARD: Final = 128
CONTEXT: Final = 4096
SEED: Final = 20230523  # the day QLoRA appeared
SPREAD: Final = HIDDEN**-0.5  # keeps the variance through a layer, so that a frozen random base can still be adapted

SPECIAL_TOKENS: Final = ("<|pad|>", "<|im_start|>", "<|im_end|>")

# ChatML; the markers say which tokens the assistant says: its text and the end of its turn.
CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{{- '\\n' -}}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def write_tiny_model(folder: Path) -> None:
    """Write the model into a folder that may exist; the same bytes every time. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    # What the libraries make is written by ourselves: they have errors of their own for a full disk.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    vocabulary = tokenizer.get_vocab_size()
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "config.json", _config(vocabulary))
    (folder / "model.safetensors").write_bytes(save(_weights(vocabulary), metadata={"format": "pt"}))


def _tokenizer() -> Tokenizer:
    # One token a byte: no training, so no corpus and no ties to break.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "pad_token": "<|pad|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _config(vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 3,
        "dtype": "float32",
    }


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "lm_head.weight": (vocabulary, HIDDEN)}
    kv = HIDDEN // 2
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{at}.mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
        }
    generator = np.random.default_rng(SEED)
    weights = {name: (generator.standard_normal(shapes[name]) * SPREAD).astype(np.float32) for name in sorted(shapes)}
    norms = [
        f"model.layers.{i}.{n}.weight" for i in range(LAYERS) for n in ("input_layernorm", "post_attention_layernorm")
    ]
    return weights | {name: np.ones(HIDDEN, np.float32) for name in [*norms, "model.norm.weight"]}


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_tiny_model(Path(sys.argv[1]))
