"""Passes with a cache written as they are defined: token by token, dictionaries, float64, no JAX.

Every token keeps a dictionary from (slot, layer) to the key and value that it wrote there. A reader
in an iteration looks up the slot of that iteration; what it gets of a token that never wrote there
is `exited_reads`. The tokens of one pass iterate side by side, so within a pass they read each
other's present iteration.
"""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(eq=False)
class Token:
    """One token and all that is remembered of it."""

    id: int
    position: int
    embedding: np.ndarray
    steps: int = 0
    value: float = np.inf
    outer: dict = dataclasses.field(default_factory=dict)
    slots: dict = dataclasses.field(default_factory=dict)
    latest: dict = dataclasses.field(default_factory=dict)


class ReferenceSequence:
    """A model without norm bias and the like (see `_stack`), and one sequence's cache.

    ALiBi positions, pre-norm RMSNorm, gated SiLU, linear adapter, zero first state, tied head.
    """

    def __init__(self, config, params, slopes, *, num_slots, sharing="modulo", reads="latest"):
        self.config = config
        self.params = _as_float64(params)
        self.slopes = np.asarray(slopes, np.float64)
        self.order = slot_order(num_slots, sharing)
        self.reads = reads
        self.tokens = []
        self.values = []  # Every value that was compared with a threshold.

    def run(self, ids, *, depth, criterion="fixed", threshold=0.0, min_depth=1):
        """One pass: logits [T, V] and iterations [T]."""
        table = self.params["embedding"]["embedding"]
        new = [Token(int(token), len(self.tokens) + i, table[token]) for i, token in enumerate(ids)]
        self.tokens += new
        entered = self._outer("prelude", {token: token.embedding for token in new})
        states = self._iterate(entered, depth, criterion, threshold, min_depth)
        logits = self._logits(states)
        return [logits[token] for token in new], [token.steps for token in new]

    def _iterate(self, entered, depth, criterion, threshold, min_depth):
        adapter = self.params["core"]["adapter"]
        states = {token: np.zeros_like(x) for token, x in entered.items()}
        before = None
        active = list(entered)
        for iteration, slot in zip(range(depth), self.order(), strict=False):
            inputs = {
                token: states[token] @ adapter["state_kernel"]
                + entered[token] @ adapter["embedding_kernel"]
                for token in active
            }
            stepped = self._core(inputs, slot)
            previous, states = states, states | stepped
            for token in active:
                token.steps += 1
            if criterion == "latent_diff":
                changes = {
                    token: _length(states[token] - previous[token]) / _length(states[token])
                    for token in active
                }
            elif criterion == "kl":
                vocab_size = len(self.params["embedding"]["embedding"])
                uniform = np.full(vocab_size, -np.log(vocab_size))
                now = {token: _log_softmax(x) for token, x in self._logits(states).items()}
                old = before or dict.fromkeys(now, uniform)
                changes = {t: np.exp(old[t]) @ (old[t] - now[t]) for t in active}
                before = now
            else:
                continue
            if iteration + 1 >= min_depth:
                self.values += changes.values()
                active = [token for token in active if not changes[token] < threshold]
        return states

    def _logits(self, states):
        scale = self.params["final_norm"]["scale"]
        latents = {token: self._norm(state, scale) for token, state in states.items()}
        hidden = self._outer("coda", latents)
        table = self.params["embedding"]["embedding"]
        return {token: table @ self._norm(x, scale) for token, x in hidden.items()}

    def _outer(self, name, inputs):
        def remember(token, layer, key_value):
            token.outer[name, layer] = key_value

        def recall(token, layer):
            return token.outer[name, layer]

        return self._stack(name, self.params.get(name, {}), inputs, remember, recall)

    def _core(self, inputs, slot):
        def remember(token, layer, key_value):
            token.slots[slot, layer] = key_value
            token.latest[layer] = key_value

        def recall(token, layer):
            absent = token.latest[layer] if self.reads == "latest" else None
            return token.slots.get((slot, layer), absent)

        return self._stack("core", self.params["core"]["layers"], inputs, remember, recall)

    def _stack(self, name, params, inputs, remember, recall):
        """Pre-norm layers over {token: vector}."""
        first = self.config.first_layer(name)
        x = dict(inputs)
        for layer in range(len(params)):
            weights = params[f"layer_{layer}"]
            queries = {}
            for token, residual in x.items():
                normed = self._norm(residual, weights["attention_norm_in"]["scale"])
                fused = np.einsum("d,dkgh->kgh", normed, weights["attention"]["qkv"])
                queries[token] = fused[:, :-2]
                value = fused[:, -1]
                if first + layer in self.config.value_embedding.layers:
                    gate = weights["attention"]["value_gate"]
                    table = self.params["value_embedding"][f"layer_{first + layer}_embedding"]
                    factor = 2 / (1 + np.exp(-normed[: len(gate)] @ gate))
                    value = value + factor[:, None] * table[token.id].reshape(value.shape)
                remember(token, layer, (fused[:, -2], value))
            for token, query in queries.items():
                mixed = self._attend(token, query, lambda t, n=layer: recall(t, n))
                x[token] = x[token] + np.einsum("nh,nhd->d", mixed, weights["attention"]["output"])
            for token, residual in x.items():
                normed = self._norm(residual, weights["mlp_norm_in"]["scale"])
                gate, up = np.einsum("d,dpf->pf", normed, weights["mlp"]["up"])
                x[token] = residual + (gate / (1 + np.exp(-gate)) * up) @ weights["mlp"]["down"]
        return x

    def _attend(self, reader, query, recall):
        """[N, H] from one token's queries [K, G, H]."""
        seen = []
        for token in self.tokens[: reader.position + 1]:
            distance = reader.position - token.position
            window = self.config.attention.window
            found = recall(token) if window is None or distance < window else None
            if found is not None:
                seen.append((distance, *found))
        distances, keys, values = (np.asarray(part) for part in zip(*seen, strict=True))
        logits = np.einsum("kgh,skh->kgs", query, keys) / np.sqrt(query.shape[-1])
        logits = logits - self.slopes.reshape(*logits.shape[:2], 1) * distances
        weights = np.exp(_log_softmax(logits))
        mixed = np.einsum("kgs,skh->kgh", weights, values)
        return mixed.reshape(-1, mixed.shape[-1])

    def _norm(self, x, scale):
        return x / np.sqrt(np.mean(x**2) + self.config.norm.eps) * scale


def slot_order(num_slots, sharing):
    """A function that begins the endless series of slots that iterations take."""
    repeated = {
        "modulo": range(num_slots),
        "last": range(num_slots - 1, num_slots),
        "anchor": range(num_slots // 2, num_slots),
    }[sharing]
    return lambda: itertools.chain(range(num_slots), itertools.cycle(repeated))


def _as_float64(tree):
    if isinstance(tree, dict):
        return {name: _as_float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


def _length(vector):
    return np.sqrt(np.sum(vector**2))


def _log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
