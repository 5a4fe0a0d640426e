"""Families of models: their chat templates, and small tokenizers with their real control tokens. No weights.

TRL carries the original texts of most templates; they are read where it is installed. Mistral's and Phi-4's are written
here from their documentation.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE: Final = Path(__file__).parent


def trl_template(name: str) -> str:
    """The text of a template that TRL carries."""
    spec = importlib.util.find_spec("trl")  # does not import it, nor torch
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def own_template(name: str) -> str:
    return (HERE / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


@dataclass(frozen=True)
class Family:
    """A template, a tokenizer, and what is documented of them."""

    name: str
    template: str
    control: tuple[str, ...]
    """The control tokens, the first of them numbered behind the 256 bytes."""
    eos: str
    answer: Callable[[str, bool], str]
    """(content, whether it is the last turn) -> what the model has to say, by the family's documentation."""
    bos: str | None = None
    stops: tuple[str, ...] = ()
    """Of generation_config.json, where it names others than eos."""
    system: bool = True
    spaces: str | None = None
    """Where blanks become "▁" (SentencePiece): "first" with one put before the text, "never" without; None: bytes."""
    greedy: bool = False
    """Whether control tokens take the blanks behind them ("rstrip")."""

    def write(self, folder: Path) -> Path:
        """The folder of a base model, without its weights."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = _bytes() if self.spaces is None else _sentencepiece(self.spaces == "first")
        tokens = [AddedToken(text, special=True, normalized=False, rstrip=self.greedy) for text in self.control]
        tokenizer.add_tokens(tokens)
        if self.bos is not None:
            # Many put it before whatever is tokenised; templates write it themselves.
            begin = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.token_to_id(self.bos))]
            )
            trim = processors.ByteLevel(trim_offsets=True)  # the blank before a word is in its token, not in its place
            tokenizer.post_processor = begin if self.spaces else processors.Sequence([trim, begin])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, "chat_template": self.template}
        if self.bos is not None:
            config["bos_token"] = self.bos
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        stops = [tokenizer.token_to_id(stop) for stop in self.stops or (self.eos,)]
        named = stops if len(stops) > 1 else stops[0]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return folder


_MERGES: Final = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("a", "s"), ("o", "u"), ("u", "s")]
"""So that tokens are longer than characters."""


def _bytes() -> Tokenizer:
    """Byte-level BPE: as Llama 3, Qwen, Phi-4. Two newlines are one token, a blank belongs to the word behind it."""
    merges = [*_MERGES, ("Ċ", "Ċ"), ("Ġ", "hello"), ("Ġ", "as"), ("Ġ", "Ġ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: at for at, symbol in enumerate([*alphabet, *(one + after for one, after in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(prefix: bool) -> Tokenizer:
    """BPE over characters with bytes to fall back on: as Mistral, Gemma, Phi-3."""
    merges = [*_MERGES, ("▁", "hello"), ("▁", "▁")]
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/<>|_.,!\n▁"})
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    vocabulary = {symbol: at for at, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _chatml(content: str, last: bool) -> str:
    return content + "<|im_end|>"


def _llama(content: str, last: bool) -> str:
    return content.strip() + "<|eot_id|>"


def _qwen3(content: str, last: bool) -> str:
    # An answer without reasoning gets an empty think block, but only where nobody asked anything after it.
    return ("<think>\n\n</think>\n\n" + content.lstrip("\n") if last else content) + "<|im_end|>"


def _qwen3_5_think(content: str, last: bool) -> str:
    # "<think>\n" is the prompt's.
    return ("\n</think>\n\n" if last else "") + content.strip() + "<|im_end|>"


def _qwen3_5_nothink(content: str, last: bool) -> str:
    # "<think>\n\n</think>\n\n" is the prompt's.
    return content.strip() + "<|im_end|>"


def _gemma(content: str, last: bool) -> str:
    return content.strip() + "<end_of_turn>"


def _phi3(content: str, last: bool) -> str:
    # Its control tokens take the blanks behind them, also those at the beginning of an answer.
    return content.lstrip() + "<|end|>\n"


_LLAMA: Final = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_QWEN: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK: Final = (*_QWEN, "<think>", "</think>")
_GEMMA: Final = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI3: Final = ("<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_LLAMA_STOPS: Final = ("<|end_of_text|>", "<|eot_id|>")
_QWEN_STOPS: Final = ("<|im_end|>", "<|endoftext|>")


def _of_llama(name: str, template: str) -> Family:
    control = (*_LLAMA, "<|eom_id|>", "<|python_tag|>")
    return Family(
        name, trl_template(template), control, "<|eot_id|>", _llama, bos="<|begin_of_text|>", stops=_LLAMA_STOPS
    )


def _of_qwen(name: str, template: str, answer: Callable[[str, bool], str]) -> Family:
    control = _QWEN if answer is _chatml else _THINK
    return Family(name, trl_template(template), control, "<|im_end|>", answer, stops=_QWEN_STOPS)


def _of_gemma(name: str, template: str, *, system: bool) -> Family:
    return Family(
        name,
        trl_template(template),
        _GEMMA,
        "<eos>",
        _gemma,
        bos="<bos>",
        stops=("<eos>", "<end_of_turn>"),
        system=system,
        spaces="never",
    )


def _of_phi3(name: str, template: str) -> Family:
    stops = ("<|endoftext|>", "<|end|>")
    return Family(name, trl_template(template), _PHI3, "<|endoftext|>", _phi3, stops=stops, spaces="first", greedy=True)


def _of_mistral(name: str, template: str, control: tuple[str, ...], answer: Callable[[str, bool], str]) -> Family:
    return Family(name, template, control, "</s>", answer, bos="<s>", system=False, spaces="first")


FAMILIES: Final = {
    family.name: family
    for family in [
        _of_llama("llama-3", "llama3"),
        _of_llama("llama-3.1", "llama3_1"),
        _of_llama("llama-3.2", "llama3_2"),
        _of_qwen("qwen-2.5", "qwen2_5", _chatml),
        _of_qwen("qwen-3", "qwen3", _qwen3),
        _of_qwen("qwen-3-2507", "qwen3_instruct_2507", _chatml),
        _of_qwen("qwen-3.5-think", "qwen3_5_think", _qwen3_5_think),
        _of_qwen("qwen-3.5-nothink", "qwen3_5_nothink", _qwen3_5_nothink),
        _of_gemma("gemma-2", "gemma", system=False),
        _of_gemma("gemma-3", "gemma3", system=True),
        _of_phi3("phi-3", "phi3"),
        _of_phi3("phi-3.5", "phi3_5"),
        Family(
            "phi-4",
            own_template("phi_4"),
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
            "<|im_end|>",
            _chatml,
            bos="<|endoftext|>",
        ),
        _of_mistral("mistral-0.1", own_template("mistral_v1"), ("<s>", "</s>"), lambda content, last: content + "</s>"),
        _of_mistral(
            "mistral-0.3",
            own_template("mistral_v3"),
            ("<s>", "</s>", "[INST]", "[/INST]"),
            lambda content, last: " " + content.strip() + "</s>",
        ),
    ]
}
"""Gemma 1 and 2 have one template, Llama 3.2 and 3.3 nearly; Mistral 0.2 writes as 0.1 does."""
