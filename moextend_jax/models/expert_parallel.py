"""Where tokens meet their experts on a mesh: `x_BLD -> (y_BLD, Routing)`, dropless.

Pretrained experts are split over devices by number (mesh axis "expert") and by hidden width ("tensor"), new ones by
hidden width over both; "fsdp" splits everything for storage and is gathered for use. The devices that hold all experts
of a layer between them are a group. TABLE of dispatches, each of one signature:

    gather    every device of the group sees the group's tokens, computes its own experts' rows and its slice of the
              new experts, and the sums are scattered back: any backend, balanced for new experts
    exchange  rows travel to the device that holds their expert and back (`ragged_all_to_all`), new experts are
              gathered and computed where the tokens are: TPU and GPU; on CPU the same arithmetic on gathered rows

docs/plans.md has what each costs. Everything runs in one `shard_map`, whose transpose is the backward pass: a
reduce-scatter for what trains, nothing for what is frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moextend_jax.config import ModelConfig
from moextend_jax.models.adapters import EXPERTS, Adapted, Update, router_update, update_of
from moextend_jax.models.blocked_swiglu import Weights
from moextend_jax.models.experts import apply_experts, bias_behind, combine, dispatch, sort_by_expert
from moextend_jax.models.glu import Glu
from moextend_jax.models.router import WEIGHT_GUARDS, Gate, Routing, Rule, route, route_extended
from moextend_jax.models.weights import Stacked, used
from moextend_jax.parameters import element_type, with_arrays
from moextend_jax.sharding import Shards, map_shards, module_shards, platform, shards


class Split(NamedTuple):
    """How a layer's experts and tokens are split over mesh axes; () where nothing splits them.

    expert: pretrained experts by number; tensor: by hidden width; new: those of each extension by hidden width; tokens.
    """

    expert: tuple[str, ...]
    tensor: tuple[str, ...]
    new: tuple[tuple[str, ...], ...]
    tokens: tuple[str, ...]


def mixture(
    x_BLD: jax.Array,
    moe: Any,
    slots: Sequence[Any] = (),
    *,
    config: ModelConfig,
    extended: Sequence[jax.Array | bool] = (),
    shares: Sequence[jax.Array | None] = (),
    sources: Sequence[jax.Array | None] = (),
    real_BL: jax.Array | None = None,
    adapted: Sequence[Adapted] = (),
    stacked: Sequence[Stacked | None] = (),
):
    """One mixture-of-experts block: `x_BLD -> (y_BLD, Routing)`, T = B*L.

    Args:
      moe: `experts`, `gate` and its biases of one layer. slots: `router`, `new_experts` of every extension
        in it.
      config: its decoder's `Rule`, its dispatch (a row of DISPATCHES), how calibrated weights are guarded and summed.
      extended: for each extension a bool scalar, false on layers that it does not have.
      sources: for each the experts that its own were copied from in this layer [X], which twins need.
      shares: for each extension the log of its share [B, L] (`route_extended`), None: share 1 for every token.
      adapted: low-rank updates of the pretrained experts and of their router.
      stacked: for the pretrained experts, then each extension's: those of all layers, if frozen. They are read from
        this stack if the device uses its part as stored.
      real_BL: tokens that experts compute, None: all; the others' y is zero. All are routed.
    """
    x_split = shards("BLd", x_BLD.shape)
    rule, glu = Rule.of(config.decoder), Glu.of(config.decoder)
    blocks = [of.module.block for of in adapted]
    modules = (moe, *slots, *blocks)
    arrays, splits = zip(*map(module_shards, modules), strict=True)
    experts = splits[0]["experts/w_gate"]
    split = Split(
        experts.over("E"),
        experts.over("F"),
        tuple(of_slot["new_experts/w_gate"].over("f") for of_slot in splits[1 : 1 + len(slots)]),
        x_split.over("BL"),
    )
    # Mesh axes over which experts stay split while they compute; with "gather", new experts stay in slices too.
    kept = {"experts": split.expert + split.tensor}
    kept["new_experts"] = kept["experts"] if config.dispatch == "gather" else split.tensor
    kept |= dict.fromkeys(EXPERTS, kept["experts"])  # maps that are adapted
    scales = [of.scale_BL1(x_BLD) for of in adapted]
    names = ("experts", *("new_experts" for _ in slots))
    in_stacks = [
        of if of is not None and _as_stored(of.module, x_BLD.dtype, kept[name]) else None
        for name, of in zip(names, stacked or [None] * len(names), strict=True)
    ]
    stacks, of_stacks = zip(*(({}, {}) if of is None else module_shards(of.module) for of in in_stacks), strict=True)

    # For example a group of expert 2 x tensor 2, E = 8, 128 tokens on each device. Device (1, 0) holds the first half
    # of the hidden width of experts 4 to 7 and the third quarter of a new expert's. With "gather" it sees the group's
    # 512 tokens, adds up what these parts give each, and is left with the group's sum for its own 128.
    def local(x_BLD, arrays, stacks, layers, extended, sources, real_BL, shares, scales):
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        this, *rest = map(in_use, modules, arrays, splits)
        added, low = rest[: len(slots)], rest[len(slots) :]
        low = [(of.config, own, s.reshape(-1, 1)) for of, own, s in zip(adapted, low, scales, strict=True)]
        with jax.named_scope("router"):
            gate = Gate.of(this)._replace(update_TE=router_update(low, x_TD))
            if not added:
                routing = route(x_TD, gate, rule=rule)
            else:
                routing = route_extended(
                    x_TD, gate, [slot.router for slot in added], extended=extended, rule=rule,
                    normalise=WEIGHT_GUARDS[config.weight_guard], mass=config.mass, sources=sources or None,
                    shares=[None if share_BL is None else share_BL.reshape(-1) for share_BL in shares],
                )  # fmt: skip
        experts = [this.experts, *(slot.new_experts for slot in added)]
        all_layers = [
            None if of is None else Stacked(with_arrays(of.module, stack), layer)
            for of, stack, layer in zip(in_stacks, stacks, layers, strict=True)
        ]
        parts = [own.weights(x_TD.dtype, whole) for own, whole in zip(experts, all_layers, strict=True)]
        computed = _of_real(routing, real_BL)
        update, lora = update_of(low, x_TD)
        routing = routing._replace(lora_TI=dict(zip(choosing, lora, strict=True)))
        y_TD = DISPATCHES[config.dispatch](x_TD, computed, parts, split, glu, rule.top_k, update)
        if this.experts.b_down is not None:
            b_OD = jnp.concatenate([this.experts.b_down[...], *(slot.new_experts.b_down[...] for slot in added)])
            y_TD += bias_behind(computed.ids_Tk, computed.weights_Tk, b_OD.astype(x_TD.dtype))
        return jax.tree.map(lambda leaf: leaf.reshape(*x_BLD.shape[:2], -1), (y_TD, routing))

    def in_use(module: Any, arrays: dict[str, jax.Array], splits: dict[str, Shards]) -> Any:
        """The module with its parameters as this device uses them."""

        def gathered(path: str, leaf: jax.Array) -> jax.Array:
            kind, inside, _ = path.partition("/")
            kind = kind if inside else ""  # the router's own columns are called gate
            whole = path.endswith("/b_down")  # added where the tokens are
            dtype = x_BLD.dtype if kind.endswith("experts") else None
            return used(path, leaf, splits[path], dtype=dtype, keep=() if whole else kept.get(kind, ()))

        return with_arrays(module, {path: gathered(path, leaf) for path, leaf in arrays.items()})

    choosing = [of.name for of in adapted if of.config.method == "mole"]
    tokens = Shards("BL", x_split.split[:2])
    everywhere = Shards("", ())
    ins = (x_split, splits, of_stacks, everywhere, everywhere, everywhere, tokens, tokens, tokens)
    layers = [None if of is None else of.layer for of in in_stacks]
    given = (x_BLD, arrays, stacks, layers, list(extended), list(sources), real_BL, list(shares), scales)
    y_BLD, routing = map_shards(local, ins, x_split)(*given)
    return y_BLD, jax.tree.map(lambda leaf_BLk: leaf_BLk.reshape(-1, leaf_BLk.shape[-1]), routing)


def _as_stored(experts: Any, dtype: Any, kept: tuple[str, ...]) -> bool:
    """Whether a device computes with its part of these experts as stored, without a gather or a cast."""
    arrays, splits = module_shards(experts)
    kinds = {path: element_type(f"experts/{path}", dtype, stored=leaf.dtype) for path, leaf in arrays.items()}
    return all(kinds[path] in (None, leaf.dtype) and {*splits[path].over(splits[path].axes)} <= {*kept}
               for path, leaf in arrays.items() if path.startswith("w_"))  # fmt: skip


def _of_real(routing: Routing, real_BL: jax.Array | None) -> Routing:
    """The routing, in which tokens that are not real choose no expert."""
    if real_BL is None:
        return routing
    nobody = routing.logits_TO.shape[-1]
    return routing._replace(ids_Tk=jnp.where(real_BL.reshape(-1, 1), routing.ids_Tk, nobody))


def gather_tokens(
    x_TD: jax.Array, routing: Routing, parts: Sequence[Weights], split: Split, glu: Glu, top_k: int,
    update: Update | None = None,
) -> jax.Array:  # fmt: skip
    """Tokens come to the experts: all-gather within the group, reduce-scatter of the results."""
    group = split.expert + split.tensor
    together = tuple(axis for axis in group if axis in split.tokens)
    x_TD, ids_Tk, weights_Tk = (_gathered(array, together) for array in (x_TD, routing.ids_Tk, routing.weights_Tk))

    if update is not None:
        update = update._replace(rank_weights_Tr=_gathered(update.rank_weights_Tr, together))
    pretrained, *new = parts
    here = pretrained[0].shape[0]
    experts = here * _devices(split.expert)
    local_Tk = ids_Tk - _index(split.expert) * here
    is_here_Tk = (local_Tk >= 0) & (local_Tk < here) & (ids_Tk < experts)
    if not new:
        y_TD = apply_experts(x_TD, jnp.where(is_here_Tk, local_Tk, here), weights_Tk, parts, glu, update)
    elif (
        update is None
        and ids_Tk.shape[1] == top_k
        and len({part[0].shape[-1] for part in parts}) == 1  # their hidden width here
        and len({*split.new}) == 1
    ):  # one buffer of rows serves all
        added = sum(part[0].shape[0] for part in new)
        local_Tk = jnp.where(is_here_Tk, local_Tk, here + added)
        local_Tk = jnp.where(ids_Tk >= experts, ids_Tk - experts + here, local_Tk)
        y_TD = apply_experts(x_TD, local_Tk, _shared(weights_Tk, ids_Tk >= experts, group, split.new[0]), parts, glu)
    else:
        local_Tk = jnp.where(is_here_Tk, local_Tk, here)[:, :top_k]
        y_TD = apply_experts(x_TD, local_Tk, weights_Tk[:, :top_k], [pretrained], glu, update)
        y_TD += _new_alone(x_TD, ids_Tk - experts, weights_Tk, new, group, split, glu)
    return _summed(y_TD, group, together)


def exchange_rows(
    x_TD: jax.Array, routing: Routing, parts: Sequence[Weights], split: Split, glu: Glu, top_k: int,
    update: Update | None = None,
) -> jax.Array:  # fmt: skip
    """Rows go to the experts and come back: `ragged_all_to_all` over the expert axis, twice.

    Every buffer has room for all rows of the group, because all may choose one device's experts: nothing is dropped.
    """
    together = tuple(axis for axis in split.tensor if axis in split.tokens)
    x_TD, ids_Tk, weights_Tk = (_gathered(array, together) for array in (x_TD, routing.ids_Tk, routing.weights_Tk))

    pretrained, *new = parts
    here = pretrained[0].shape[0]
    devices, me = _devices(split.expert), _index(split.expert)
    experts = here * devices
    sorting = sort_by_expert(ids_Tk[:, :top_k], experts=experts)
    x_RD = dispatch(top_k, x_TD, sorting)
    weights_R1 = weights_Tk[:, :top_k].reshape(-1)[sorting.order_R][:, None]

    counts_pqe = _gathered(sorting.sizes_O[None], split.expert).reshape(devices, devices, here)
    rows_pq = counts_pqe.sum(axis=-1)
    before_p, before_q = _before(rows_pq, axis=0), _before(rows_pq, axis=1)
    there = _Exchange(before_q[me], rows_pq[me], before_p[me], rows_pq[:, me])
    back = _Exchange(before_p[:, me], rows_pq[:, me], before_q[:, me], rows_pq[me])
    room = devices * len(x_RD)
    arrived_RD, arrived_weights_R1 = (there.send(array, room, split.expert) for array in (x_RD, weights_R1))

    counts_pe = counts_pqe[:, me]
    expert_R = jnp.repeat(jnp.tile(jnp.arange(here), devices), counts_pe.reshape(-1), total_repeat_length=room)
    expert_R1 = jnp.where(jnp.arange(room) < counts_pe.sum(), expert_R, here)[:, None]
    if update is not None:  # its weights travel with the rows
        m_Rr = dispatch(top_k, _gathered(update.rank_weights_Tr, together), sorting)
        update = update._replace(rank_weights_Tr=there.send(m_Rr, room, split.expert))
    y_RD = apply_experts(arrived_RD, expert_R1, arrived_weights_R1, [pretrained], glu, update)
    y_TD = combine(top_k, back.send(y_RD, len(x_RD), split.expert), sorting)
    if new:
        y_TD += _new_alone(x_TD, ids_Tk - experts, weights_Tk, new, split.tensor, split, glu)
    return _summed(y_TD, split.tensor, together)


DISPATCHES: dict[str, Callable[..., jax.Array]] = {"gather": gather_tokens, "exchange": exchange_rows}


class _Exchange(NamedTuple):
    """One device's part in an exchange of rows: to each device q it sends `sizes_q` rows from `starts_q` on, to offset
    `places_q` there; from each device p it gets `arriving_p` rows."""

    starts_q: jax.Array
    sizes_q: jax.Array
    places_q: jax.Array
    arriving_p: jax.Array

    def send(self, x_RD: jax.Array, room: int, axes: tuple[str, ...]) -> jax.Array:
        out_RD = jnp.zeros((room, x_RD.shape[1]), x_RD.dtype)
        if not axes:
            return lax.dynamic_update_slice_in_dim(out_RD, x_RD, 0, axis=0)
        if platform() != "cpu":
            (axis,) = axes
            sizes = (self.starts_q, self.sizes_q, self.places_q, self.arriving_p)
            return lax.ragged_all_to_all(x_RD, out_RD, *sizes, axis_name=axis)
        # The same by hand: gather the rows of all devices, and take those meant for this one.
        rows_pRD, *offsets = (_gathered(array[None], axes) for array in (x_RD, *self[:3]))
        starts_p, sizes_p, places_p = (offset_pq[:, _index(axes)] for offset_pq in offsets)
        row_R1 = jnp.arange(room)[:, None]
        from_Rp = (row_R1 >= places_p[None]) & (row_R1 < (places_p + sizes_p)[None])
        sender_R = jnp.argmax(from_Rp, axis=1)
        index_R = starts_p[sender_R] + jnp.arange(room) - places_p[sender_R]
        return jnp.where(from_Rp.any(axis=1)[:, None], rows_pRD[sender_R, index_R], out_RD)


def _new_alone(
    x_TD, ids_Tk, weights_Tk, new: Sequence[Weights], group: tuple[str, ...], split: Split, glu: Glu
) -> jax.Array:
    """The new experts' share of the sum; `ids_Tk` is negative for pretrained ones. A token chooses each new expert at
    most once, so it needs no more rows than there are new experts. Those of one width go together."""
    y_TD, first = jnp.zeros_like(x_TD), 0
    for how, run in itertools.groupby(zip(new, split.new, strict=True), lambda one: (one[0][0].shape[-1], one[1])):
        parts = [part for part, _ in run]
        X, top_k = sum(part[0].shape[0] for part in parts), ids_Tk.shape[-1]
        is_here_Tk = (ids_Tk >= first) & (ids_Tk < first + X)
        slots_Tk = jnp.argsort(~is_here_Tk, axis=1, stable=True)[:, : min(X, top_k)]
        of_Tk, by_Tk, is_here_Tk = (
            jnp.take_along_axis(array, slots_Tk, axis=1) for array in (ids_Tk - first, weights_Tk, is_here_Tk)
        )
        by_Tk = _shared(by_Tk, is_here_Tk, group, how[1])
        y_TD += apply_experts(x_TD, jnp.where(is_here_Tk, of_Tk, X), by_Tk, parts, glu)
        first += X
    return y_TD


def _shared(weights_Tk: jax.Array, is_new_Tk: jax.Array, group: tuple[str, ...], new: tuple[str, ...]) -> jax.Array:
    """Where several devices hold the same slice of a new expert, its weights are divided by the number of these
    devices, since outputs are summed over the group. `new`: mesh axes that split the expert."""
    repeats = _devices(tuple(axis for axis in group if axis not in new))
    return weights_Tk if repeats == 1 else jnp.where(is_new_Tk, weights_Tk / repeats, weights_Tk)


def _gathered(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(array, axes, axis=0, tiled=True) if axes else array


def _summed(y_TD: jax.Array, group: tuple[str, ...], together: tuple[str, ...]) -> jax.Array:
    """Over the group; each device keeps its own tokens, or all of them where the tokens were never split."""
    if together:
        y_TD = lax.psum_scatter(y_TD, together, scatter_dimension=0, tiled=True)
    same = tuple(axis for axis in group if axis not in together)
    return lax.psum(y_TD, same) if same else y_TD


def _before(sizes: jax.Array, *, axis: int) -> jax.Array:
    return jnp.cumsum(sizes, axis=axis) - sizes


def _devices(axes: tuple[str, ...]) -> int:
    return lax.axis_size(axes) if axes else 1


def _index(axes: tuple[str, ...]) -> jax.Array | int:
    return lax.axis_index(axes) if axes else 0
