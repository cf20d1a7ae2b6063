"""Ouro in plain PyTorch, to make folders of any size and to say what they compute.

Written from the paper (arXiv 2510.25741) and upstream's modeling_ouro.py: one stack of layers goes
round, `model.norm` acts after every loop, and a gate reads the normalised state. `ouro_test.py`
compares it with upstream's own numbers where those are at hand.
"""

import math

import numpy as np
import torch
import torch.nn.functional as functional

THRESHOLDS = (0.3, 0.5, 0.8)
# More threads wait for each other longer than such products take.
torch.set_num_threads(1)


def make_ouro(values, seed):
    """Random tensors, float32, of a folder with this config.json; gates differ between tokens."""
    rng = np.random.default_rng(seed)
    width, hidden = values["hidden_size"], values["intermediate_size"]
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    head_dim = values.get("head_dim", width // heads)
    shapes = {
        "model.embed_tokens.weight": (values["vocab_size"], width),
        "model.norm.weight": (width,),
        "model.early_exit_gate.weight": (1, width),
        "model.early_exit_gate.bias": (1,),
    }
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (values["vocab_size"], width)
    for layer in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows * head_dim, width)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (width, heads * head_dim)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}.{norm}{end}.weight": (width,) for end in ("", "_2")}

    def draw(name, shape):
        scale = 0.3 / math.sqrt(len(shape)) if "gate.weight" in name else 0.15
        center = 1.0 if "norm" in name else 0.0
        return (center + scale * rng.normal(size=shape)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def expected_of_ouro(values, tensors, ids, labels, new_tokens):
    """What upstream computes, under the names of the reference data's expected.npz."""
    leaves = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in tensors.items()}
    model, ids = _Ouro(values, leaves), torch.tensor(ids)
    hidden, gates = model.loops(ids)
    logits = [model.logits(state) for state in hidden]
    found = {}
    for number, parts in enumerate(zip(hidden, gates, logits, strict=True), start=1):
        for name, part in zip(("hidden", "gate_logit", "logits"), parts, strict=True):
            found[f"{name}_loop{number}"] = part
    shares = exit_distribution(gates)
    cumulative = torch.cumsum(shares, 0)
    stacked = torch.stack(logits)
    for threshold in THRESHOLDS:
        reached = cumulative >= threshold
        first = torch.where(reached.any(0), reached.float().argmax(0), len(hidden) - 1)
        index = first[None, ..., None].expand(1, *stacked.shape[1:])
        found[f"logits_exit_threshold_{threshold}"] = stacked.gather(0, index)[0]
    found["logits_weighted_exit"] = (shares[..., None] * stacked).sum(0)
    loss = functional.cross_entropy(logits[-1].flatten(0, 1), torch.tensor(labels).flatten())
    loss.backward()
    found["loss_last_loop"] = loss
    found |= {f"grad/{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    with torch.no_grad():
        for _ in range(new_tokens):
            newest = model.logits(model.loops(ids)[0][-1])[:, -1].argmax(-1)
            ids = torch.cat([ids, newest[:, None]], 1)
    found["greedy_all_loops"] = ids
    return {name: value.detach().numpy() for name, value in found.items()}


def last_step_reuse(values, tensors, ids):
    """Logits of the last token where it reads, in every loop, the others' keys and values of their
    last loop (Ouro's last-step reuse; the others have read each loop's own, as in a prefill)."""
    model = _Ouro(values, {name: torch.tensor(tensor) for name, tensor in tensors.items()})
    ids = torch.tensor(ids)
    with torch.no_grad():
        kept = []
        model.loops(ids[:, :-1], kept=kept)
        hidden, _ = model.loops(ids[:, -1:], read=kept[-1], start=ids.shape[1] - 1)
        return model.logits(hidden[-1]).numpy()


def exit_distribution(gates):
    """[loops, B, T]; the last loop takes what is left."""
    stop = torch.sigmoid(torch.stack(gates))
    left, shares = torch.ones_like(stop[0]), []
    for one in stop[:-1]:
        shares.append(one * left)
        left = left * (1 - one)
    return torch.stack([*shares, left])


class _Ouro:
    def __init__(self, values, tensors):
        self.values, self.tensors = values, tensors
        self.heads, self.kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        self.head_dim = values.get("head_dim", values["hidden_size"] // self.heads)

    def loops(self, ids, *, kept=None, read=None, start=0):
        """States and gate logits after each loop. `kept` collects keys and values by loop; `read`
        has those of earlier tokens, by layer."""
        state = self.tensors["model.embed_tokens.weight"][ids]
        hidden, gates = [], []
        for _ in range(self.values["total_ut_steps"]):
            of_loop = []
            for layer in range(self.values["num_hidden_layers"]):
                past = None if read is None else read[layer]
                state = self._layer(state, f"model.layers.{layer}", of_loop, past, start)
            state = self._norm(state, "model.norm")
            hidden.append(state)
            gate = functional.linear(
                state,
                self.tensors["model.early_exit_gate.weight"],
                self.tensors["model.early_exit_gate.bias"],
            )
            gates.append(gate[..., 0])
            if kept is not None:
                kept.append(of_loop)
        return hidden, gates

    def logits(self, state):
        name = "model.embed_tokens" if self.values["tie_word_embeddings"] else "lm_head"
        return state @ self.tensors[f"{name}.weight"].T

    def _layer(self, x, prefix, of_loop, past, start):
        update = self._attention(
            self._norm(x, f"{prefix}.input_layernorm"), prefix, of_loop, past, start
        )
        x = x + self._norm(update, f"{prefix}.input_layernorm_2")
        y = self._norm(x, f"{prefix}.post_attention_layernorm")
        gate, up, down = (
            self.tensors[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        update = (functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
        return x + self._norm(update, f"{prefix}.post_attention_layernorm_2")

    def _attention(self, x, prefix, of_loop, past, start):
        batch, length, _ = x.shape

        def project(name, heads):
            weight = self.tensors[f"{prefix}.self_attn.{name}_proj.weight"]
            return (x @ weight.T).view(batch, length, heads, self.head_dim).transpose(1, 2)

        query, key = project("q", self.heads), project("k", self.kv_heads)
        value = project("v", self.kv_heads)
        query, key = self._rotate(query, start), self._rotate(key, start)
        of_loop.append((key, value))
        if past is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(past, (key, value), strict=True))
        group = self.heads // self.kv_heads
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)
        hidden = torch.ones(length, key.shape[2], dtype=torch.bool).triu(start + 1)
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
        merged = mixed.transpose(1, 2).reshape(batch, length, -1)
        return merged @ self.tensors[f"{prefix}.self_attn.o_proj.weight"].T

    def _rotate(self, x, start):
        half = self.head_dim // 2
        frequency = self.values["rope_theta"] ** -(torch.arange(half) / half)
        angle = torch.arange(start, start + x.shape[2])[:, None] * frequency
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _norm(self, x, name):
        mean = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self.values["rms_norm_eps"]) * self.tensors[f"{name}.weight"]
