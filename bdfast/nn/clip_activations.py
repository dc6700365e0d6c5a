"""Upper bounds on the activations of any network, put in and taken out again."""

from __future__ import annotations

import copy
import math
import numbers
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from bdfast.errors import message
from bdfast.nn.clipped_relu import ClippedReLU
from bdfast.nn.relu_sites import Network, Site, find, input_of, is_inplace, relu_nodes, trace
from bdfast.nn.stage_sites import spread_sites, stage_sites

NAME = "clip_activations"
_CLIPS = "_bdfast_clips"  # where a block finds its clips; not a child of the block, whose state dict stays as it is
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ClippedModel(nn.Module):
    """A model whose ReLUs at some sites have upper bounds; made by :func:`clip_activations`.

    Call it like the model. Its attributes are reached through it (``clipped.linear``). Its state dict is that of the
    model, key for key, and ``clips.<site>.bound`` for each site.

    Attributes:
        model: the model itself, which is clipped as long as this is not removed: what it computes has changed, its
            modules, parameters, hooks and state dict have not.
        clips: the :class:`ClippedReLU` modules, at the names of their sites.
    """

    def __init__(self, model: nn.Module, clips: Mapping[str, ClippedReLU], forwards: Sequence[_Forward]) -> None:
        super().__init__()
        self.clips = nn.Module()
        self.model = model  # behind the clips: whoever looks for the last layer finds the model's
        self.training = model.training
        self._names = list(clips)
        self._blocks = [forward.block for forward in forwards]
        for name, clip in clips.items():
            _add(self.clips, name, clip.train(model.training))
        for forward in forwards:
            forward.block.__dict__["forward"] = forward
            forward.block.__dict__[_CLIPS] = nn.ModuleList([clips[name] for name in forward.sites])
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    @property
    def sites(self) -> dict[str, ClippedReLU]:
        """The clip of each site, by the site's name, in the order of execution."""
        return {name: _get(self.clips, name) for name in self._names}

    @property
    def bounds(self) -> dict[str, nn.Parameter]:
        """The bound ``[C]`` of each site, by the site's name, in the order of execution."""
        return {name: clip.bound for name, clip in self.sites.items()}

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the model returns, clipped."""
        if not self._blocks:
            raise RuntimeError(message("ClippedModel", "self", "clips in place", "removed ones", "call .model instead"))
        return self.model(*inputs, **options)

    def remove(self) -> nn.Module:
        """Take the clips out, and return the model as it was; once they are out, nothing happens."""
        for block in self._blocks:
            del block.__dict__["forward"], block.__dict__[_CLIPS]
        self._blocks.clear()
        return self.model

    def __enter__(self) -> ClippedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not `self._modules`: while a copy is being made it is not there yet, and would bring us back here.
            inside = self.__dict__.get("_modules", {}).get("model")
            if inside is None:
                raise
            return getattr(inside, name)


def clip_activations(
    model: nn.Module,
    sites: Literal["stage-relu", "all-relu"] | Sequence[str] = "stage-relu",
    *,
    bound: float = math.inf,
    example: Tensor | None = None,  # [N, C, H, W]
    fuse: bool = True,
) -> ClippedModel:
    """Give ReLUs of ``model`` an upper bound a channel, whether they are modules or functions.

    The forwards that call the chosen ReLUs are traced with ``torch.fx``, block by block, and rewritten: ``nn.ReLU``,
    ``nn.ReLU6``, ``F.relu``, ``F.relu6``, ``torch.relu``, ``x.relu()`` and their in-place forms become calls of
    :class:`ClippedReLU`, and a batch norm that feeds nothing but one of them is computed with it in one pass (in eval
    mode, where its weights need no gradient). With infinite bounds the outputs are those of ``model``: bit for bit
    where no batch norm was joined, else to a few float32 roundings (1e-5 of the largest logit).

    Args:
        model: any module. Its modules, parameters and hooks stay; only instances' ``forward`` is replaced, until
            ``remove()``. Move and save it through the result, which owns the bounds.
        sites: ``"stage-relu"``, the three of MM-BD (see :func:`bdfast.nn.stage_sites.stage_sites`) or, with a warning,
            three as far into a network without such stages; ``"all-relu"``; or names as errors and ``sites`` list them,
            where one without ``:1``, ``:2`` stands for all calls of its ReLU. ReLUs of a module called from several
            places share a bound.
        bound: to start from, in every channel, >= 0.
        example: a batch, run once in eval mode if the channels of a site cannot be read off the network's layers.
        fuse: whether batch norms may be joined.

    Returns:
        the clipped model: a module, and a context manager that removes the clips on leaving.

    Raises:
        ValueError: a site is not there, none is, a block that calls ReLUs cannot be traced, the channels of a site are
            not known, the model is clipped already, or the bound is negative.

    Notes:
        Hooks on a ReLU module that is replaced, and on a batch norm that is joined, rest meanwhile.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> images = torch.rand(1, 3, 8, 8)
        >>> with clip_activations(model, bound=0.0) as clipped:
        ...     print(list(clipped.bounds), torch.equal(clipped(images), model[3].bias[None]))
        ['1'] True
        >>> torch.equal(model(images), model[3].bias[None])
        False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message(NAME, "model", "a torch.nn.Module", type(model).__name__, "wrap it in a Module"))
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        expected, remedy = "a module with Python forwards", "clip it before it is scripted or traced"
        raise ValueError(message(NAME, "model", expected, "a TorchScript one", remedy))
    if any(_CLIPS in module.__dict__ for module in model.modules()):
        raise ValueError(message(NAME, "model", "one without clips", "a clipped one", "call .remove() on its clips"))
    if not isinstance(bound, numbers.Real) or isinstance(bound, bool):
        raise TypeError(message(NAME, "bound", "a number", type(bound).__name__, "set bounds a channel by .bounds"))
    if not bound >= 0.0:
        raise ValueError(message(NAME, "bound", "a number >= 0", str(bound), "an activation behind a ReLU is >= 0"))
    network = find(model)
    chosen = _choose(network, sites)
    unknown = [site.name for site in chosen if site.channels is None]
    if unknown and example is None:
        expected = f"a batch, because the channels of {', '.join(unknown)} cannot be read off the layers"
        raise ValueError(message(NAME, "example", expected, "none", "pass images that the model takes"))
    forwards = [_rewrite(network, path, sites, fuse) for path, sites in _by_block(chosen).items()]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32))
    dtype = torch.promote_types(torch.float32, like.dtype)  # a bound in half precision would learn in coarse steps
    clips = {
        site.name: ClippedReLU(
            torch.full((site.channels,) if site.channels else (), float(bound), dtype=dtype, device=like.device),
            ceiling=site.ceiling,
        )
        for site in chosen
    }
    clipped = ClippedModel(model, clips, forwards)
    if unknown and example is not None:
        try:
            _measure(clipped, unknown, example)
        except BaseException:
            clipped.remove()
            raise
    return clipped


# --- which sites -----------------------------------------------------------------------------------------------------


def _choose(network: Network, sites: str | Sequence[str]) -> list[Site]:
    available = {site.name: site for site in network.sites}
    if sites == "all-relu":
        if network.opaque or not available:
            raise ValueError(message(NAME, "sites", "ReLUs within reach", _listing(network), _REMEDY))
        return network.sites
    if sites == "stage-relu":
        return stage_sites(network) or _spread(network)
    if isinstance(sites, str) or not isinstance(sites, Iterable) or not sites:
        expected = '"stage-relu", "all-relu" or a list of names'
        raise ValueError(message(NAME, "sites", expected, repr(sites), f"choose among {', '.join(available)}"))
    wanted = set(sites)
    chosen = [site for site in network.sites if not wanted.isdisjoint(site.names)]
    missing = [name for name in sites if not any(name in site.names for site in chosen)]
    if missing:
        expected = f"names of ReLUs, not {', '.join(map(repr, missing))}"
        raise ValueError(message(NAME, "sites", expected, _listing(network), "correct the names"))
    return chosen


def _spread(network: Network) -> list[Site]:
    found = spread_sites(network)
    if not found:
        expected = (
            "a model with ReLUs, all of them within reach or in stages of a ResNet, PreAct-ResNet, VGG or MobileNetV2"
        )
        raise ValueError(message(NAME, "sites", expected, _listing(network), 'name the ReLUs or pass "all-relu"'))
    names = ", ".join(site.name for site in found)
    text = f'`sites` "stage-relu" finds no stages that it knows in a {type(network.model).__name__} and takes {names}'
    warnings.warn(f'{NAME}: {text}; name the ReLUs or pass "all-relu" for others', UserWarning, stacklevel=4)
    return found


_REMEDY = "name the ReLUs to clip, or rewrite those forwards without decisions on the values of tensors"


def _listing(network: Network) -> str:
    """The ReLUs that a model has, as an error tells them."""
    names = ", ".join(site.name for site in network.sites) or "none"
    text = f"a {type(network.model).__name__} with ReLUs {names}"
    hidden = [f"{path or 'the model itself'} ({reason})" for path, reason in network.opaque.items()]
    return f"{text}, and more in forwards that torch.fx cannot trace: {', '.join(hidden)}" if hidden else text


def _by_block(sites: Sequence[Site]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        found[site.block].append(site)
    return found


# --- rewriting -------------------------------------------------------------------------------------------------------


class _Forward:
    """What stands in for the forward of a block: a function for each mode, because tracing fixes ``self.training``."""

    def __init__(self, block: nn.Module, sites: Sequence[str], functions: Mapping[bool, Callable[..., Any]]) -> None:
        self.block = block
        self.sites = list(sites)
        self.functions = dict(functions)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.functions[self.block.training](self.block, *inputs, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _Forward(copy.deepcopy(self.block, memo), self.sites, self.functions)

    def __reduce__(self) -> Any:
        # Without this a pickled model would come back unclipped, and nobody would notice.
        expected = "one without clips, since its rewritten forwards are not importable"
        remedy = "save its state_dict(), or call .remove() first"
        raise TypeError(message("pickle", "model", expected, "a clipped one", remedy))


def _rewrite(network: Network, path: str, sites: Sequence[Site], fuse: bool) -> _Forward:
    """The forward of the block at ``path`` with calls of its clips at ``sites``."""
    block = network.model.get_submodule(path)
    if "forward" in block.__dict__:
        got = f"another one set on `{path or type(block).__name__}`"
        raise ValueError(message(NAME, "model", "blocks with the forward of their class", got, "unwrap the model"))
    functions = {}
    before = block.training
    try:
        for training in (False, True):
            block.training = training
            graph = trace(block)
            if isinstance(graph, str) or not _same_calls(graph, network.graphs[block], block):
                reason = graph if isinstance(graph, str) else "its ReLUs differ between training and evaluation"
                got = f"`{path or type(block).__name__}`: {reason}"
                raise ValueError(message(NAME, "model", "blocks that torch.fx can trace in both modes", got, _REMEDY))
            _insert_clips(graph, block, sites, fuse)
            functions[training] = _function(block, graph, len(sites))
    finally:
        block.training = before
    return _Forward(block, [site.name for site in sites], functions)


def _same_calls(graph: fx.Graph, other: fx.Graph, block: nn.Module) -> bool:
    calls = ([(node.op, node.target) for node in relu_nodes(g, block)] for g in (graph, other))
    return next(calls) == next(calls)


def _insert_clips(graph: fx.Graph, block: nn.Module, sites: Sequence[Site], fuse: bool) -> None:
    nodes = relu_nodes(graph, block)
    for index, site in enumerate(sites):
        relu = nodes[site.position]
        source = input_of(relu)
        joined = fuse and _is_batch_norm_for(source, relu, block)
        with graph.inserting_before(relu):
            if joined:
                inputs: tuple[fx.Node, ...] = (input_of(source), graph.get_attr(str(source.target)))
            else:
                inputs = (source,)
            clip = graph.call_module(f"{_CLIPS}.{index}", inputs)
        if not joined and is_inplace(relu, block):
            # Whoever reads the input after it was overwritten reads the activation.
            later = set(_nodes_after(relu))
            source.replace_all_uses_with(clip, delete_user_cb=later.__contains__)  # type: ignore[no-untyped-call,unused-ignore]
        relu.replace_all_uses_with(clip)
        graph.erase_node(relu)
        if joined:
            graph.erase_node(source)


def _nodes_after(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node


def _is_batch_norm_for(node: fx.Node, relu: fx.Node, block: nn.Module) -> bool:
    """Whether a node is a batch norm whose output only this ReLU reads."""
    clip = node.op == "call_module" and str(node.target).startswith(f"{_CLIPS}.")  # in place of a ReLU before this one
    if node.op != "call_module" or clip or set(node.users) != {relu}:
        return False
    return type(block.get_submodule(str(node.target))) in _BATCH_NORMS


def _function(block: nn.Module, graph: fx.Graph, clips: int) -> Callable[..., Any]:
    """The graph as a function of the block: it finds layers, and what replaces them later, where the block has them."""
    block.__dict__[_CLIPS] = nn.ModuleList([nn.Identity() for _ in range(clips)])  # targets for the graph module
    try:
        function: Callable[..., Any] = type(fx.GraphModule(block, graph)).forward
    finally:
        del block.__dict__[_CLIPS]
    return function


@torch.no_grad()
def _measure(clipped: ClippedModel, names: Sequence[str], example: Tensor) -> None:
    """Give the bounds of these sites as many channels as their activations have in one run."""
    channels: dict[str, int] = {}

    def watch(name: str) -> Any:
        return lambda clip, inputs: channels.__setitem__(name, inputs[0].shape[1])

    clips = {name: clipped.sites[name] for name in names}
    modes = [(module, module.training) for module in clipped.modules()]
    handles = [clip.register_forward_pre_hook(watch(name)) for name, clip in clips.items()]
    try:
        clipped.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    missing = [name for name in names if name not in channels]
    if missing:
        got = f"images that never reach {', '.join(missing)}"
        raise ValueError(message(NAME, "example", "a batch that passes every site", got, "leave these sites out"))
    for name, clip in clips.items():
        clip.bound.data = clip.bound.data.expand(channels[name]).clone()


# --- names -----------------------------------------------------------------------------------------------------------


def _add(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)


def _get(root: nn.Module, name: str) -> ClippedReLU:
    found = root.get_submodule(name)
    assert isinstance(found, ClippedReLU)
    return found


def _strip_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Mapping[str, Any]) -> None:
    for names in (state, getattr(state, "_metadata", {})):
        for key in list(names):
            value = names.pop(key)
            inside = key.startswith(f"{prefix}model.")
            names[prefix + key[len(f"{prefix}model.") :] if inside else key] = value


def _add_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    for key in list(state):
        value = state.pop(key)
        own = key.startswith(prefix) and not key.startswith(f"{prefix}clips.")
        state[f"{prefix}model.{key[len(prefix) :]}" if own else key] = value
