"""Permutation specs of language models, made from config.json and the tensors' shapes: `model_spec(config, shapes)`.

    layers.0.ffn          units of the feed-forward net: rows of gate and up, columns of down
    layers.0.heads        key/value heads as blocks, each with its query heads: rows of q, k, v, columns of o
    layers.0.heads.2.q    the query heads within block 2 (grouped-query attention)
    layers.0.heads.2.v    the dimensions of value head 2, which all its query heads share: rows of v, columns of o
    layers.0.heads.2.qk   the dimensions that queries and keys share: only where positions are not rotated into them
    residual              the model's width: every reader's columns, every writer's rows, norms, embeddings (`residual=True`)

Rotary positions turn each pair of dimensions (i, i + d/2) at a speed of its own, so no other order of them is the same
function: `query_key=True` is refused there. Norms of queries and keys whose weight is shared by all heads stay as they are;
ones as wide as all heads together move with the heads.

A tensor that none of this accounts for is refused by name: a permutation that forgets one changes the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Group, Place, Spec

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = re.compile(r"^(.*?)\b(?:layers|h)\.(\d+)\.(.+)\.(weight|bias)$")
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|attention\.(bias|masked_bias)|attn\.(bias|masked_bias))$")


@dataclass(frozen=True)
class Family:
    """Where a kind of model keeps things. q, k, v: (module, part of it); a part counts in the sizes of q, k and v before it.

    by_head: q, k and v interleaved head by head in one module. transposed: weights stored [in, out]. norms: modules of the
    width of the stream; outside: of the tensors outside the layers, the axis of the stream.
    """

    q: str
    k: str
    v: str
    o: str
    up: tuple[str, ...]
    down: str
    norms: tuple[str, ...]
    rope: bool = True
    transposed: bool = False
    by_head: bool = False
    outside: tuple[tuple[str, int], ...] = (("embed_tokens", 1), ("norm", 0), ("lm_head", 1), ("score", 1))


_llama = Family(
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj", ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm"),
)  # fmt: skip
_outside_gpt = (("wte", 1), ("wpe", 1), ("ln_f", 0), ("lm_head", 1), ("score", 1))
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "granite"), _llama
    ),
    "phi3": Family(
        "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj",
        ("mlp.gate_up_proj", "mlp.gate_up_proj"), "mlp.down_proj", _llama.norms,
    ),
    "phi": Family(
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", ("mlp.fc1",), "mlp.fc2",
        ("input_layernorm",), outside=(("embed_tokens", 1), ("final_layernorm", 0), ("lm_head", 1)),
    ),
    "opt": Family(
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", ("fc1",), "fc2",
        ("self_attn_layer_norm", "final_layer_norm"), rope=False,
        outside=(
            ("embed_positions", 1), ("final_layer_norm", 0), ("project_in", 0), ("project_out", 1), ("embed_tokens", 1),
            ("lm_head", 1),
        ),
    ),
    "gpt2": Family(
        "attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", ("ln_1", "ln_2"),
        rope=False, transposed=True, outside=_outside_gpt,
    ),
    "gpt_neox": Family(
        *("attention.query_key_value",) * 3, "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h",
        ("input_layernorm", "post_attention_layernorm"), by_head=True,
        outside=(("embed_in", 1), ("final_layer_norm", 0), ("embed_out", 1), ("lm_head", 1)),
    ),
}  # fmt: skip


def model_spec(
    config: Mapping[str, Any], shapes: Shapes, residual: bool = False, query_key: bool | None = None
) -> Spec:
    """The groups of a language model. config: of config.json; shapes: of every tensor in the checkpoint.

    residual: also the units of the stream, for models that do not share a base. query_key: also the dimensions within query
    and key heads (None: where positions allow it). UsageError: an unknown kind of model or tensor; query_key under rotary
    positions.
    """
    kind = str(config.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None:
        raise UsageError(
            f"it is not known which units of a {kind!r} model may be permuted (known: {', '.join(sorted(FAMILIES))}): "
            'give a spec of your own, --spec FILE.json with {"groups": [{"name": "layers.0.ffn", "size": 64, "places": '
            "[[TENSOR, AXIS], ...]}]}"
        )
    if query_key and family.rope:
        raise UsageError(
            f"{kind} turns queries and keys by position (RoPE), each pair of dimensions at a speed of its own: they cannot "
            "be permuted; leave query_key out"
        )
    made = _Builder(config, shapes, family, family.rope is False if query_key is None else query_key)
    spec = made.spec(residual)
    spec.check(shapes)
    return spec


class _Builder:
    def __init__(self, config: Mapping[str, Any], shapes: Shapes, family: Family, query_key: bool) -> None:
        self.shapes, self.family, self.query_key = shapes, family, query_key
        self.out_axis, self.in_axis = (1, 0) if family.transposed else (0, 1)

        def first(*keys: str) -> int | None:
            return next((int(config[key]) for key in keys if config.get(key) is not None), None)

        width, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
        if width is None or heads is None:
            raise UsageError("config.json lacks hidden_size or num_attention_heads: the model's heads are not known")
        self.width, self.heads = width, heads
        self.kv_heads = first("num_key_value_heads") or heads
        self.head_dim = first("head_dim") or width // heads
        self.layers = self._read_layers()

    def _read_layers(self) -> dict[str, set[str]]:
        """Prefix of each layer -> its tensors' names without it. UsageError for one that is not accounted for."""
        layers: dict[str, set[str]] = {}
        family = self.family
        known = {family.q, family.k, family.v, family.o, *family.up, family.down, *family.norms}
        strange = []
        for name in self.shapes:
            found = _LAYER.match(name)
            if found is None:
                if re.search(r"\b(?:layers|h)\.\d+\.", name) and not _IGNORED.search(name):
                    strange.append(name)
                continue
            module = found[3]
            if module not in known and not re.search(r"[qk]_norm$", module) and not _IGNORED.search(name):
                strange.append(name)
            prefix = name[: found.start(3)]
            layers.setdefault(prefix, set()).add(name[len(prefix) :])
        if strange:
            raise UsageError(
                f"it is not known what a permutation does to {strange[0]!r} (and {len(strange) - 1} more tensors): "
                "give a spec of your own, --spec FILE.json"
            )
        if not layers:
            raise UsageError("the checkpoint has no layers that are known: give a spec of your own, --spec FILE.json")
        return dict(sorted(layers.items(), key=lambda one: int(one[0].rstrip(".").rpartition(".")[2])))

    def spec(self, residual: bool) -> Spec:
        groups = [
            group
            for number, prefix in enumerate(self.layers)
            for group in (*self._ffn(number, prefix), *self._attention(number, prefix))
        ]
        return Spec((*groups, *((self._residual(),) if residual else ())))

    # Where a module's outputs and inputs lie

    def _out(self, module: str, start: int = 0, block: int = 1) -> list[Place]:
        bias = [Place(f"{module}.bias", 0, start, block)] if f"{module}.bias" in self.shapes else []
        return [Place(f"{module}.weight", self.out_axis, start, block), *bias]

    def _in(self, module: str, start: int = 0, block: int = 1) -> list[Place]:
        return [Place(f"{module}.weight", self.in_axis, start, block)]

    def _ffn(self, number: int, prefix: str) -> list[Group]:
        down = f"{prefix}{self.family.down}"
        size = self.shapes[f"{down}.weight"][self.in_axis]
        places, used = [], 0
        for module in self.family.up:
            fused = self.family.up.count(module) > 1
            places += self._out(prefix + module, used if fused else 0)
            used += size
        return [Group(f"layers.{number}.ffn", size, (*places, *self._in(down)))]

    def _attention(self, number: int, prefix: str) -> list[Group]:
        family, kv, dim = self.family, self.kv_heads, self.head_dim
        each = self.heads // kv  # query heads of a key/value head
        q, k, v, o = (prefix + module for module in (family.q, family.k, family.v, family.o))
        fused = family.q == family.k and not family.by_head
        q_at, k_at = 0, self.heads * dim if fused else 0
        v_at = k_at + kv * dim if fused else 0
        if family.by_head:  # [head, (q, k, v), dim] in one module
            places = self._out(q, 0, 3 * dim)
            q_at, k_at, v_at, q_step, step = 0, dim, 2 * dim, 3 * dim, 3 * dim
        else:
            q_step, step = each * dim, dim
            places = [*self._out(q, q_at, q_step), *self._out(k, k_at, dim), *self._out(v, v_at, dim)]
        places += self._in(o, 0, each * dim) + self._wide_norms(prefix, each)
        name = f"layers.{number}.heads"
        groups = [Group(name, kv, tuple(places))]
        for block in range(kv):
            first = block * each * dim  # of the block's columns of o
            if each > 1:
                moved = [*self._out(q, q_at + block * q_step, dim), *self._in(o, first, dim)]
                moved += [Place(one.tensor, 0, first, dim) for one in self._wide_norms(prefix, each, "q")]
                groups.append(Group(f"{name}.{block}.q", each, tuple(moved), name))
            dims = [*self._out(v, v_at + block * step)]
            dims += [place for head in range(each) for place in self._in(o, first + head * dim)]
            groups.append(Group(f"{name}.{block}.v", dim, tuple(dims), name))
            if self.query_key and not any(re.search(r"[qk]_norm", one) for one in self.layers[prefix]):
                dims = [place for head in range(each) for place in self._out(q, q_at + block * q_step + head * dim)]
                groups.append(Group(f"{name}.{block}.qk", dim, (*dims, *self._out(k, k_at + block * step)), name))
        return groups

    def _wide_norms(self, prefix: str, each: int, which: str = "qk") -> list[Place]:
        """Norms of queries and keys that are as wide as all heads together."""
        places = []
        for letter, heads, block in (("q", self.heads, each * self.head_dim), ("k", self.kv_heads, self.head_dim)):
            for name in sorted(self.layers[prefix]):
                shape = self.shapes[prefix + name]
                if letter in which and re.search(rf"\b{letter}_norm\.", name) and shape == (heads * self.head_dim,):
                    if heads > 1:
                        places.append(Place(prefix + name, 0, 0, block))
        return places

    # The stream

    def _residual(self) -> Group:
        family = self.family
        places: list[Place] = []
        for prefix, names in self.layers.items():
            for module in dict.fromkeys((family.q, family.k, family.v, *family.up)):
                places += self._in(prefix + module)
            for module in (family.o, family.down):
                places += self._out(prefix + module)
            places += [Place(prefix + name, 0) for name in sorted(names) if name.rpartition(".")[0] in family.norms]
        for name, shape in self.shapes.items():
            if _LAYER.match(name) or _IGNORED.search(name):
                continue
            module, _, kind = name.rpartition(".")
            axis = next((axis for key, axis in family.outside if module.rpartition(".")[2] == key), None)
            if axis is None:
                raise UsageError(
                    f"the residual stream cannot be permuted: what {name!r} does to it is not known; leave --residual "
                    "out, or give a spec of your own, --spec FILE.json"
                )
            if kind == "bias" and axis == 1:
                continue  # one a token
            axis = 0 if kind == "bias" else axis
            if shape[axis] == self.width:
                places.append(Place(name, axis))
            elif not (module.endswith(("embed_tokens", "lm_head")) and any("project_" in one for one in self.shapes)):
                raise UsageError(f"the residual stream cannot be permuted: {name!r} has the shape {tuple(shape)}")
        return Group("residual", self.width, tuple(places))
