"""A transformers model of which one block is in memory at a time: `load_block` reads its weights,
`free` drops them.

This is the only module of the write path that uses private transformers API (the v5 weight
converters); it was written against transformers 5.23 and `tests/test_host.py` names every private
symbol, so that a moved one fails there and not in a user's run. Nothing here is specific to a model
family: disk names are mapped to module parameters by transformers' own renaming and conversion
rules, so any model that `from_pretrained` loads can be streamed.

It knows nothing about quantization, calibration text or the output.
"""

import copy
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from qmoe.errors import SourceError
from qmoe.models.auto import building, foreign_name
from qmoe.models.classes import block_lists, model_class, read_config
from qmoe.models.families.find import KINDS, experts_in, require, take_any_width
from qmoe.models.finite import check_finite
from qmoe.models.matching import (
    EXPERT_NUMBER,
    check_complete,
    check_dtypes,
    check_experts,
    check_sizes,
    check_tables,
    read_part,
    shared_lists,
)
from qmoe.models.one_expert import PartOf, StandIn
from qmoe.models.plain_loading import plain_loading
from qmoe.models.precision import settle_dtype
from qmoe.models.ties import settle_ties, stand_ins, tied_names
from qmoe.source.checkpoint import Checkpoint
from qmoe.types import ExpertsLayout


@dataclass(frozen=True)
class BlockRef:
    """One transformer block: the module list it lives in ("model.layers"), its index there and its
    module.
    """

    list_name: str
    index: int
    module: nn.Module

    @property
    def name(self) -> str:
        """Module path, e.g. "model.layers.3"."""
        return f"{self.list_name}.{self.index}"


class StreamedModel:
    """A model on the meta device, filled piece by piece from a checkpoint.

    Memory: what `load_*` materialised and `free` has not released; nothing else.

    Attributes:
        model: the transformers model, parameters on meta until loaded; buffers (rotary tables) are
            real.
        config: its config, without any `quantization_config` of the source; the dtype is the
            source's, whatever is computed in.
        sources: module parameter name -> {disk name: pattern of the converter that reads it, or
            None}.
        experts: (layout, module) of every experts module.
        unused: disk tensors that no module of the model takes (multi-token-prediction layers, say).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Builds the empty model.

        Args:
            checkpoint: the open source.
            dtype: compute dtype of materialised weights; parameters that the family keeps in
                float32 stay so.
            trust_remote_code: run model code that the checkpoint brings along.
            device: where the dense parts of blocks are put; the CPU if not given.

        Raises:
            UnsupportedModelError: a model type that transformers does not know, or no block lists
                in the model.
            SourceError: a parameter of the model, or a size, that no tensor on disk feeds.
        """
        self.checkpoint, self.dtype = checkpoint, dtype
        self.device = device or torch.device("cpu")
        config = read_config(checkpoint, trust_remote_code)
        with building(checkpoint.directory):
            self._build(*model_class(config, checkpoint, trust_remote_code))
        self._map_names()
        settle_dtype(self.config, self._usual_dtype())
        self._absent = settle_ties(self.model, checkpoint, self.sources)
        for original, stored in stand_ins(self.model, self.sources).items():
            self.sources[original] = self.sources[stored]
        self.block_lists = block_lists(self.model)
        self.experts = experts_in(self.model)
        take_any_width(self.model)
        self._check()
        self._fill_tables()

    def _build(self, cls: Any, config: Any) -> None:
        self.config = copy.deepcopy(config)  # the model's own gets the compute dtype
        if not foreign_name(config):
            self.config.architectures = [cls.__name__]
        with torch.device("meta"):
            self.model = cls._from_config(config, dtype=self.dtype)
        self.model.eval()
        self._mapping = get_model_conversion_mapping(self.model, None, None)

    def _fill_tables(self) -> None:
        # as from_pretrained rebuilds non-persistent buffers; parameters stay on meta
        with building(self.checkpoint.directory):
            self.model._move_missing_keys_from_meta_to_device(set(), None, None, None)
            self.model._initialize_missing_keys(is_quantized=False)
        for buffer in self.model.buffers():
            if not buffer.is_meta:
                buffer.data = buffer.data.to(self.device)

    def _map_names(self) -> None:
        renamings = [t for t in self._mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in self._mapping if isinstance(t, WeightConverter)]
        self._converter = {p: c for c in converters for p in c.source_patterns}
        state = self.model.state_dict()
        self.sources: dict[str, dict[str, str | None]] = {}
        self.unused: list[str] = []
        for name in sorted(self.checkpoint.names()):
            target, pattern = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, state
            )
            if target not in state and name in state:
                target, pattern = name, None
            if target not in state:
                self.unused.append(name)
            for fed in self._fed(target, pattern):
                if fed in state:
                    self.sources.setdefault(fed, {})[name] = pattern

    def _usual_dtype(self) -> torch.dtype:
        """That of most tensors that the model takes."""
        kinds = Counter(self.checkpoint.dtype(d) for disks in self.sources.values() for d in disks)
        found = [k for k, _ in kinds.most_common() if k.is_floating_point]
        return found[0] if found else torch.float32

    def _fed(self, target: str, pattern: str | None) -> list[str]:
        """The parameters that a converter fills beside the one that it names first."""
        if pattern is None:
            return [target]
        first, *others = self._converter[pattern].target_patterns
        return [target, *(target.replace(first, t) for t in others if first in target)]

    def _check(self) -> None:
        where = str(self.checkpoint.directory)
        self._lists = shared_lists(self.experts, self.sources)
        check_experts(where, self.experts, self.sources, self._lists)
        check_dtypes(where, self.model, self.sources, self.checkpoint.dtype)
        check_sizes(where, self.model, self.sources, self.checkpoint.shape)
        check_tables(where, self.model, self.checkpoint.source_bytes)
        require(self.model, self.experts)
        several = (c.target_patterns for c in self._converter.values())
        check_complete(where, self.model, self.sources, {t for p in several if p[1:] for t in p})

    def blocks(self) -> Iterator[BlockRef]:
        """All blocks in the order in which the model's forward calls their lists."""
        for name, blocks in self.block_lists:
            for i, module in enumerate(blocks):
                yield BlockRef(name, i, module)

    def load(self, want: Callable[[str], bool]) -> None:
        """Materialises the parameters and persistent buffers whose module name satisfies `want`,
        checking for NaN and Inf.

        Raises:
            SourceError: shapes that disagree with the config, or a failed conversion.
            NonFiniteError: NaN or Inf in a tensor, named.
        """
        chosen = {
            disk: self.checkpoint.lazy(disk)
            for target, disks in self.sources.items()
            if want(target)
            for disk in disks
        }
        if not chosen:
            return
        config = LoadStateDictConfig(
            device_map=None,
            hf_quantizer=None,
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._mapping,
        )
        with plain_loading(), building(str(self.checkpoint.directory), what="load"):
            info, _ = convert_and_load_state_dict_in_model(self.model, chosen, config)
        if info.mismatched_keys:
            name, disk, expected = sorted(info.mismatched_keys)[0]
            raise SourceError(
                f"{self.checkpoint.directory}: {name} has shape {tuple(disk)} on disk, "
                "config.json asks for "
                f"{tuple(expected)}; the checkpoint does not match its config"
            )
        if info.conversion_errors:
            name, text = next(iter(info.conversion_errors.items()))
            raise SourceError(
                f"{self.checkpoint.directory}: cannot convert {name}: {str(text).strip()}"
            )
        for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            if want(name) and not tensor.is_meta:
                if tensor.is_floating_point():
                    check_finite(name, tensor)
                tensor.data = tensor.data.to(self.device)

    def load_rest(self) -> None:
        """Everything outside the blocks: embeddings, final norms, head, vision tower."""
        inside = tuple(f"{name}." for name, _ in self.block_lists)
        self.load(lambda t: not t.startswith(inside))
        self._tie()

    def load_block(self, block: BlockRef, skip: Container[str] = ()) -> None:
        """A block without the parameters in `skip` (its experts' matrices)."""
        self.load(lambda t: t.startswith(f"{block.name}.") and t not in skip)

    def whole(self) -> Any:
        """The model with everything in memory."""
        self.load(lambda target: True)
        self._tie()
        return self.model

    def _tie(self) -> None:
        # as from_pretrained does: whichever of a tied pair is stored stands for the other
        self.model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)

    def head_name(self) -> str | None:
        """The output embeddings' weight if it is a parameter of its own, not shared with the
        input's.
        """
        head, inputs = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is None or head.weight is inputs.weight:
            return None
        name = next(n for n, m in self.model.named_modules() if m is head) + ".weight"
        return None if name in {n for n, _ in tied_names(self.model)} else name

    def free_head(self) -> None:
        """Puts the output embeddings back on the meta device: no block needs them."""
        if self.head_name() is not None:
            self.model.get_output_embeddings().to("meta")

    def free(self, block: BlockRef) -> None:
        """Puts a block's weights back on the meta device; tables that no file holds stay."""
        stored = block.module.state_dict().keys()
        tables = [(n, b) for n, b in block.module.named_buffers() if n not in stored]
        block.module.to("meta")
        for name, buffer in tables:
            owner, _, leaf = name.rpartition(".")
            block.module.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)

    def read_expert(
        self, layout: ExpertsLayout, module: nn.Module, expert: int
    ) -> dict[str, Tensor]:
        """One expert's matrices, read from disk without its siblings.

        Args:
            layout: of the experts module.
            module: the module itself, its matrices on meta.
            expert: index.

        Returns:
            projection -> canonical matrix [rows, cols] (rows are outputs) in the compute dtype,
            contiguous.

        Raises:
            SourceError: a tensor is missing. NonFiniteError: NaN or Inf, with the tensor's name.
        """
        kind = KINDS[layout.kind]
        stand_in = StandIn(module)
        position = 0
        for name in kind.encoded(module):
            target = f"{layout.path}.{name}"
            number = EXPERT_NUMBER.search(target)
            if number:  # a module per expert: its siblings stay where they are
                position = expert
                if int(number.group(1)) == expert:
                    stand_in.put(name, self._whole(target))
            else:
                rows = module.get_parameter(name).shape[0] // layout.experts
                stand_in.put(name, self._rows(target, expert, rows, layout.experts))
        where = str(self.checkpoint.directory)
        read = read_part(where, layout, expert, lambda: kind.read(stand_in, position))
        return {k: w.contiguous() for k, w in read.items()}

    def _whole(self, target: str) -> Tensor:
        tensor = self.checkpoint.lazy(next(iter(self.sources[target])))[...].to(self.dtype)
        check_finite(target, tensor)
        return tensor

    def _rows(self, target: str, expert: int, rows: int, experts: int) -> Tensor:
        """Rows [expert * rows, (expert + 1) * rows) of a parameter that holds all `experts`,
        through its converter.
        """
        converter: Any = None
        collected: dict[str, list[Tensor]] = {}
        modules = self._lists.get(target, [target])
        ours = expert + modules.index(target) * experts
        for disk, pattern in sorted(self.sources[target].items()):
            number = EXPERT_NUMBER.search(disk)
            if number and int(number.group(1)) != ours:
                continue
            selection = ... if number else slice(expert * rows, (expert + 1) * rows)
            tensor = self.checkpoint.lazy(disk, selection)[...].to(self.dtype)
            check_finite(disk, tensor)
            if pattern is not None:
                converter = converter or copy.deepcopy(self._converter[pattern])
            # a converter that deals a list out to several modules gets one tensor for each
            collected.setdefault(pattern or disk, []).extend([tensor] * len(modules))
        if not collected:
            raise SourceError(
                f"{self.checkpoint.directory}: no tensor for expert {expert} of {target}"
            )
        if converter is None:
            return next(iter(collected.values()))[0]
        for pattern, tensors in collected.items():
            converter.collected_tensors[pattern] = tensors
        part = PartOf(self.model, rows)
        with building(str(self.checkpoint.directory), what="load"):
            made = converter.convert(target, model=part, config=self.config, hf_quantizer=None)
        result: Any = made[target] if target in made else next(iter(made.values()))
        found: Tensor = result[0] if isinstance(result, list) else result
        return found

    def prefetch(self, layout: ExpertsLayout, module: nn.Module, experts: range) -> None:
        """Lets the matrices of some experts be read ahead where each has a tensor of its own; one
        tensor of all experts is read in order, which the operating system sees by itself.
        """
        names = []
        for name in KINDS[layout.kind].encoded(module):
            for disk in self.sources.get(f"{layout.path}.{name}", ()):
                number = EXPERT_NUMBER.search(disk)
                if number and int(number.group(1)) in experts:
                    names.append(disk)
        self.checkpoint.prefetch(names)

    def prefetch_block(self, block: BlockRef) -> None:
        """Lets a block without its experts' matrices be read ahead."""
        skip = self.encoded_names(block)
        inside = f"{block.name}."
        for target, disks in self.sources.items():
            if target.startswith(inside) and target not in skip:
                self.checkpoint.prefetch(disks)

    def experts_of(self, block: BlockRef) -> list[tuple[ExpertsLayout, nn.Module]]:
        """The experts modules of a block in the order in which its forward calls them."""
        inside = f"{block.name}."
        found = [(layout, m) for layout, m in self.experts if layout.path.startswith(inside)]
        return sorted(found, key=lambda pair: KINDS[pair[0].kind].turn(pair[0].path))

    def encoded_names(self, block: BlockRef) -> set[str]:
        """Names of the parameters that the encoded experts of a block replace."""
        return {
            f"{layout.path}.{name}"
            for layout, module in self.experts_of(block)
            for name in KINDS[layout.kind].encoded(module)
        }

    def dense(self, want: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """Resident parameters and persistent buffers by module name, in the dtype that they have on
        disk, one at a time.

        Tied copies are left out: the model ties them again when it is loaded.
        """
        tied = {name for name, _ in tied_names(self.model)}
        for name, tensor in self.model.state_dict().items():
            if want(name) and not tensor.is_meta and name not in tied:
                yield name, tensor.cpu().to(self._stored_dtype(name, tensor))

    def _stored_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        disks = sorted(self.sources.get(name, ()))
        return self.checkpoint.dtype(disks[0]) if disks else self.config.dtype or tensor.dtype
