"""The peer: decode and prefill of llama.cpp on random Llama shapes, asked and answered in lines of JSON.

It runs in an environment of its own, because microscale does not depend on it:

    python3 -m venv PEER && PEER/bin/pip install llama-cpp-python gguf
    PEER/bin/python benchmarks/cpu/peer_llamacpp.py --work-dir DIR

Every line on standard input is one request, every line on standard output its answer; ``{"do": "facts"}`` says what
runs. A request names the shape, the type (f32, bf16, q8_0, mxfp4), threads, flash attention and repacking; the model
file is written into the work folder when it is first asked for. All matrices of the blocks get the type, norms stay
f32, and the answer to ``load`` lists how many tensors of which type llama.cpp reads. Python is kept out of the way: the
calls are llama.cpp's own ``llama_decode``, and the time is that of the call and of reading the logits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

FILE_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "mxfp4": (gguf.GGMLQuantizationType.MXFP4, gguf.LlamaFileType.MOSTLY_MXFP4_MOE),
}
QUIET = llama_cpp.llama_log_callback(lambda level, text, user_data: None)


def matrix_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return the matrices of one block, [out, in], under GGUF's names."""
    hidden, ffn, head_dim = shape["hidden"], shape["ffn"], shape["hidden"] // shape["heads"]
    kv = shape["kv_heads"] * head_dim
    return {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }


def write_model(path: Path, shape: dict[str, int], type_name: str) -> None:
    """Write a random Llama; the same seed gives every type the same numbers before rounding."""
    qtype, file_type = FILE_TYPES[type_name]
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    writer.add_file_type(file_type)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["ffn"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape["hidden"] // shape["heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape["vocab"])
    add_tokenizer(writer, shape["vocab"])
    random = np.random.default_rng(0)

    def add(name: str, rows: int, cols: int, as_type: gguf.GGMLQuantizationType) -> None:
        values = random.standard_normal((rows, cols), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, gguf.quants.quantize(values, as_type), raw_dtype=as_type)

    # The embedding is no block weight: it stays f32, or Q8_0 in the small files; it is the output matrix, too.
    embedding_type = qtype if type_name in ("f32", "bf16") else gguf.GGMLQuantizationType.Q8_0
    add("token_embd.weight", shape["vocab"], shape["hidden"], embedding_type)
    for layer in range(shape["layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(shape["hidden"], dtype=np.float32))
        for name, (rows, cols) in matrix_shapes(shape).items():
            add(f"blk.{layer}.{name}.weight", rows, cols, qtype)
    writer.add_tensor("output_norm.weight", np.ones(shape["hidden"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path.with_suffix(".part"), path)


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """The smallest vocabulary that loads: three marks, 256 bytes, and words without meaning."""
    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
    if vocab < len(tokens):
        raise SystemExit(f"the vocabulary must have at least {len(tokens)} entries, got {vocab}")
    types += [kinds.NORMAL] * (vocab - len(tokens))
    tokens += [f"w{index}" for index in range(len(tokens), vocab)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


class Peer:
    """One loaded model with its context; another request frees it first."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.model: Any = None
        self.context: Any = None
        self.loaded: str | None = None
        llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def facts(self, request: dict[str, Any]) -> dict[str, Any]:
        del request
        return {
            "llama_cpp_python": llama_cpp.__version__,
            "gguf": getattr(gguf, "__version__", "unknown"),
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write the file if need be, load it, make a context."""
        shape, type_name = request["shape"], request["type"]
        name = "-".join(str(shape[key]) for key in ("hidden", "ffn", "layers", "heads", "kv_heads", "vocab"))
        path = self.work_dir / f"llama-{name}-{type_name}.gguf"
        if not path.exists():
            write_model(path, shape, type_name)
        self.free()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # Weights repacked for the machine at load; llama.cpp 0.3.36 crashes in its AMX path on some virtual machines.
        parameters.use_extra_bufts = request["repack"]
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = request["context"]
        context.n_batch = context.n_ubatch = request["context"]
        context.n_threads = context.n_threads_batch = request["threads"]
        context.flash_attn_type = 1 if request["flash"] else 0
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {path}")
        tensors = gguf.GGUFReader(path).tensors
        types = Counter(tensor.tensor_type.name for tensor in tensors if tensor.name.startswith("blk."))
        matrices = Counter(
            tensor.tensor_type.name for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2
        )
        return {
            "file_bytes": path.stat().st_size,
            "parameters": int(llama_cpp.llama_model_n_params(self.model)),
            "model_bytes": int(llama_cpp.llama_model_size(self.model)),
            "block_tensor_types": dict(types),
            "block_matrix_types": dict(matrices),
        }

    def free(self) -> None:
        """Give the memory of the last model back."""
        if self.context:
            llama_cpp.llama_free(self.context)
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self.model = self.context = None

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each of ``tokens`` steps of one token, after a prompt of ``prompt`` tokens."""
        self.clear()
        self.feed(prompt_tokens(request["prompt"]))
        token, seconds = 5, []
        for _ in range(request["tokens"]):
            start = time.perf_counter()
            self.feed([token])
            logits = llama_cpp.llama_get_logits_ith(self.context, -1)
            token = 3 + int(abs(logits[0]) * 1000) % 200
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one prompt of ``tokens`` tokens in one batch."""
        tokens = prompt_tokens(request["tokens"])
        self.clear()
        start = time.perf_counter()
        self.feed(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        first = float(logits[0])
        return {"seconds": time.perf_counter() - start, "first_logit": first}

    def logits(self, request: dict[str, Any]) -> dict[str, Any]:
        """The logits after a prompt: models of two types must agree nearly."""
        self.clear()
        self.feed(prompt_tokens(request["tokens"]))
        values = llama_cpp.llama_get_logits_ith(self.context, -1)
        return {"logits": [float(values[index]) for index in range(request["vocab"])]}

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def feed(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)


def prompt_tokens(count: int) -> list[int]:
    """A prompt of byte tokens, always the same."""
    return [1] + [3 + (index * 37) % 200 for index in range(1, count)]


def main() -> None:
    """Answer requests until standard input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the model files")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    peer = Peer(options.work_dir)
    requests: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "facts": peer.facts,
        "load": peer.load,
        "decode": peer.decode,
        "prefill": peer.prefill,
        "logits": peer.logits,
    }
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(requests[request["do"]](request)), flush=True)
    peer.free()


if __name__ == "__main__":
    main()
