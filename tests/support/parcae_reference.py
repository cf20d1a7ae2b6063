"""Parcae in PyTorch as its source defines it, on a dictionary of tensors, of any sizes."""

import math
from typing import Any

import torch
from torch.nn import functional as F

SIZES = {
    "_class_name": "ParcaeConfig",
    "block_size": 32,
    "vocab_size": 40,
    "padding_multiple": 16,
    "norm_eps": 1e-5,
    "state_init": "zero",
    "mean_backprop_depth": 2,
}
# Layers 0 and 2 have value embeddings without a gate and layer 1 a gate alone; layer 4 has both.
DIAGONAL = SIZES | {
    "n_embd": 32,
    "recurrent_embedding_dimension": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "recurrent_intermediation_embedding_dimension": 48,
    "norm_class_name": "RMSNorm",
    "nonlin_name": "ReLU2",
    "qk_norm": True,
    "prelude_norm": True,
    "tie_embeddings": True,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 1,
    "n_layers_in_coda": 2,
    "mean_recurrence": 4,
}
# Layers 1 and 3 have both.
LINEAR = SIZES | {
    "n_embd": 36,
    "recurrent_embedding_dimension": 36,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "recurrent_intermediation_embedding_dimension": 20,
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "norm_class_name": "LayerNorm",
    "qk_bias": True,
    "logit_softcap": 5.0,
    "injection_type": "linear",
    "rope_settings": {"rope_condense_ratio": 2, "rope_base": 500},
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 1,
    "mean_recurrence": 3,
}


class Reference:
    """A model with random weights, under the names of `state_dict()`."""

    def __init__(self, values: dict[str, Any], seed: int):
        self.values = values
        self.width, self.heads = values["n_embd"], values["num_attention_heads"]
        counts = [values[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")]
        before = counts[0] + counts[1] * values["mean_recurrence"]
        starts = (0, counts[0], before)
        # Name of each layer, and the number that says whether it has a gate.
        self.stacks = [
            [(f"transformer.{name}.{i}", start + i) for i in range(count)]
            for name, count, start in zip(
                ("prelude", "core_block", "coda"), counts, starts, strict=True
            )
        ]
        self.gate_parity = (counts[1] * values["mean_backprop_depth"] - 1) % 2
        self.num_layers = sum(counts)
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self._declare()

    def _draw(self, name: str, *shape: int, center: float = 0.0) -> None:
        std = 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[-1])
        noise = torch.randn(shape, generator=self.generator)
        self.tensors[name] = center + std * noise

    def _declare_norm(self, name: str) -> None:
        self._draw(f"{name}.weight", self.width, center=1.0)
        if self.values["norm_class_name"] == "LayerNorm":
            self._draw(f"{name}.bias", self.width)

    def _declare(self) -> None:
        values, width = self.values, self.width
        multiple = values["padding_multiple"]
        vocab_size = -(-values["vocab_size"] // multiple) * multiple
        self._draw("transformer.wte.weight", vocab_size, width)
        self._draw("transformer.C.weight", width, width)
        self._declare_norm("transformer.ln_f")
        if values.get("prelude_norm"):
            self._declare_norm("transformer.ln_prelude")
        if not values.get("tie_embeddings"):
            self._draw("lm_head.weight", vocab_size, width)
        if values.get("injection_type") == "linear":
            self._draw("transformer.adapter.adapter.weight", width, 2 * width)
        else:
            self._draw("transformer.adapter.A_log", width)
            self._draw("transformer.adapter.dt_bias", width)
            self._draw("transformer.adapter.B", width, width)
        hidden = values["intermediate_size"]
        for place, (name, number) in enumerate(layer for stack in self.stacks for layer in stack):
            for norm in ("norm_1", "norm_2"):
                self._declare_norm(f"{name}.{norm}")
            for part in ("c_q", "c_k", "c_v", "c_proj"):
                self._draw(f"{name}.attn.{part}.weight", width, width)
            if values.get("qk_bias"):
                self._draw(f"{name}.attn.qk_bias", 2, 1, self.heads, width // self.heads)
            gated = values.get("mlp_class_name") == "GatedMLP"
            self._draw(f"{name}.mlp.fc.weight", hidden * (1 + gated), width)
            self._draw(f"{name}.mlp.proj.weight", width, hidden)
            if number % 2 == self.gate_parity:
                self._draw(f"{name}.attn.ve_gate.weight", self.heads, 32)
            if place % 2 == (self.num_layers - 1) % 2:
                self._draw(f"value_embeds.{place}.weight", vocab_size, width)

    def logits(
        self, tokens: torch.Tensor, state: torch.Tensor, no_grad: int, with_grad: int = 0
    ) -> torch.Tensor:
        """[B, T, V] after so many iterations without gradients and so many with."""
        weights, (prelude, core, coda) = self.tensors, self.stacks
        x = F.embedding(tokens, weights["transformer.wte.weight"])
        for place, layer in enumerate(prelude):
            x = self._layer(x, tokens, layer[0], place)
        if self.values.get("prelude_norm"):
            x = self._norm(x, "transformer.ln_prelude")
        for iteration in range(no_grad + with_grad):
            with torch.set_grad_enabled(iteration >= no_grad):
                state = self._inject(state, x)
                for place, layer in enumerate(core):
                    state = self._layer(state, tokens, layer[0], len(prelude) + place)
        x = state @ weights["transformer.C.weight"].T
        for place, layer in enumerate(coda):
            x = self._layer(x, tokens, layer[0], len(prelude) + len(core) + place)
        x = self._norm(x, "transformer.ln_f")
        head = weights.get("lm_head.weight", weights["transformer.wte.weight"])
        cap = self.values.get("logit_softcap")
        return x @ head.T if cap is None else cap * torch.tanh(x @ head.T / cap)

    def _inject(self, state: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        name = "transformer.adapter"
        if self.values.get("injection_type") == "linear":
            return torch.cat([state, e], -1) @ self.tensors[f"{name}.adapter.weight"].T
        dt = F.softplus(self.tensors[f"{name}.dt_bias"])
        decay = torch.exp(-dt * torch.exp(self.tensors[f"{name}.A_log"]))
        return state * decay + dt * (e @ self.tensors[f"{name}.B"].T)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, eps = self.tensors[f"{name}.weight"], self.values["norm_eps"]
        if self.values["norm_class_name"] == "LayerNorm":
            return F.layer_norm(x, (self.width,), weight, self.tensors[f"{name}.bias"], eps)
        return F.rms_norm(x, (self.width,), weight, eps)

    def _layer(self, x: torch.Tensor, tokens: torch.Tensor, name: str, place: int) -> torch.Tensor:
        x = x + self._attend(self._norm(x, f"{name}.norm_1"), tokens, f"{name}.attn", place)
        hidden = self._norm(x, f"{name}.norm_2") @ self.tensors[f"{name}.mlp.fc.weight"].T
        if self.values.get("mlp_class_name") == "GatedMLP":
            first, second = hidden.chunk(2, -1)
            hidden = F.silu(first) * second
        else:
            hidden = 0.5 * F.relu(hidden) ** 2
        return x + hidden @ self.tensors[f"{name}.mlp.proj.weight"].T

    def _attend(self, x: torch.Tensor, tokens: torch.Tensor, name: str, place: int) -> torch.Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        weights = [self.tensors[f"{name}.c_{part}.weight"] for part in "qkv"]
        query, key, value = ((x @ weight.T).view(shape) for weight in weights)
        gate, table = f"{name}.ve_gate.weight", f"value_embeds.{place}.weight"
        if gate in self.tensors and table in self.tensors:
            factor = 2 * torch.sigmoid(x[..., :32] @ self.tensors[gate].T)
            rows = F.embedding(tokens, self.tensors[table]).view(shape)
            value = value + factor[..., None] * rows
        if self.values.get("qk_bias"):
            both = self.tensors[f"{name}.qk_bias"]
            query, key = query + both[0], key + both[1]
        query, key = self._rotate(query), self._rotate(key)
        if self.values.get("qk_norm"):
            query, key = (F.rms_norm(y, (y.shape[-1],)) for y in (query, key))
        heads_first = [y.transpose(1, 2) for y in (query, key, value)]
        mixed = F.scaled_dot_product_attention(*heads_first, is_causal=True)
        return mixed.transpose(1, 2).reshape(x.shape) @ self.tensors[f"{name}.c_proj.weight"].T

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        settings = {"rope_base": 50_000, "rope_condense_ratio": 1}
        settings |= self.values.get("rope_settings", {})
        head_dim = x.shape[-1]
        frequency = settings["rope_base"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        places = torch.arange(x.shape[1]) / settings["rope_condense_ratio"]
        turn = torch.polar(torch.ones(()), torch.outer(places, frequency))[:, None]
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3)
