"""The other peer: transformers' Llama in bfloat16 (or float32) on torch, asked and answered in lines of JSON.

The requests are those of peer_llamacpp.py (load, decode, prefill); the weights are random. Attention is torch's own
(sdpa), the cache transformers' default.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class Peer:
    """One model in memory."""

    model: Any = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make a random model of a shape."""
        torch.set_num_threads(request["threads"])
        shape = request["shape"]
        config = LlamaConfig(
            hidden_size=shape["hidden"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            vocab_size=shape["vocab"],
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config).to(DTYPES[request["type"]]).eval()
        self.vocab = shape["vocab"]
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"parameters": sum(weight.numel() for weight in self.model.parameters()), **versions}

    @torch.inference_mode()
    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each step of one token after a prompt."""
        cache = self.model(self.prompt(request["prompt"]), use_cache=True, logits_to_keep=1).past_key_values
        token, seconds = torch.tensor([[5]]), []
        for _ in range(request["tokens"]):
            start = time.perf_counter()
            logits = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    @torch.inference_mode()
    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one prompt."""
        tokens = self.prompt(request["tokens"])
        start = time.perf_counter()
        self.model(tokens, use_cache=True, logits_to_keep=1)
        return {"seconds": time.perf_counter() - start}

    def prompt(self, count: int) -> torch.Tensor:
        return (torch.arange(count) * 37 % self.vocab)[None]


def main() -> None:
    """Answer requests until standard input ends."""
    peer = Peer()
    requests = {"load": peer.load, "decode": peer.decode, "prefill": peer.prefill}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(requests[request["do"]](request)), flush=True)


if __name__ == "__main__":
    main()
