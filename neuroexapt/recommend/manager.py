"""The five operators of sequence recommenders behind switches, with a record of what ran."""

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt import functional
from neuroexapt.backend import get_backend, registry
from neuroexapt.backend.candidates import candidates, without_kernels
from neuroexapt.backend.dispatch import Decision, observed
from neuroexapt.backend.measure import time_calls
from neuroexapt.core.sequence_operations import (
    AttentionLayerNorm,
    HierarchicalFusion,
    Places,
    SequenceOperation,
    SequenceSize,
)
from neuroexapt.errors import UserError
from neuroexapt.recommend.config import OPERATORS, SECTIONS, refuse_unknown, section, switches
from neuroexapt.recommend.failures import in_one_line

logger = logging.getLogger(__name__)

_HSTU = ("d_model", "num_heads", "dropout")
_WINDOWS = (1, 3, 7, 15)
_LOG_DECAY = -3.0
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_MADE_UP_BATCH = (32, 50)
_MADE_UP_FIELDS = 26


class TritonOperatorManager(nn.Module):
    """Applies the operators; made by ``create_triton_operator_manager``.

    An operator that is switched off runs in plain PyTorch. One whose kernel fails does so, too, with the same
    weights, from that call on until ``retry_kernels``, and the failure is recorded; what a kernel raises in
    the backward pass is raised there. The weights are parameters of this module, made at once where the
    configuration has their width, else when one of them is first applied, of the input's width. The first
    input also decides about their dtype and device, and the module's mode about dropout.

    Masks ``attention_mask`` [B, N] are true, or not 0, at valid positions. The valid positions of a row, in
    their order and wherever they lie, are its sequence: padding may be on the left or the right. Outputs at
    other positions are 0, and what stands there has no influence. None: all positions are valid.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        refuse_unknown(config, SECTIONS, "config")
        self.enabled = switches(config)
        sizes = section(config, "hstu", _HSTU)
        self.d_model: int | None = sizes.get("d_model")
        self.num_heads: int = sizes.get("num_heads", 2)
        self.dropout: float = sizes.get("dropout", 0.0)
        self.log_decay = nn.Parameter(torch.tensor(_LOG_DECAY))
        self._implementations: dict[str, Counter[str]] = {operator: Counter() for operator in OPERATORS}
        self._failures: dict[str, str] = {}
        self._fallbacks: dict[str, Counter[str]] = {operator: Counter() for operator in OPERATORS}
        self._check_sizes()
        self.attention_layernorm: AttentionLayerNorm | None = None
        self.sequence_fusion: HierarchicalFusion | None = None
        self._are_placed = False
        if self.d_model is not None:
            self._make_weights(self.d_model)

    def apply_fused_attention_layernorm(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Causal self-attention, its projection and residual, normalised: [B, N, D] → [B, N, D]."""
        attend, _ = self._operations_for(hidden_states)
        return self._on_sequences(_of_lengths(attend), attention_mask, hidden_states)

    def apply_hierarchical_sequence_fusion(
        self, sequence_features: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Gated means over windows of 1, 3, 7 and 15 positions: [B, N, D] → [B, N, D]."""
        _, fuse = self._operations_for(sequence_features)
        return self._on_sequences(_of_lengths(fuse), attention_mask, sequence_features)

    def apply_hstu_hierarchical_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_bias: Tensor | None = None,
        time_bias: Tensor | None = None,
        timestamps: Tensor | None = None,
        windows: Sequence[int | None] = (None,),
    ) -> Tensor:
        """HSTU's attention without softmax, like ``value``; it has no weights of its own.

        ``query``, ``key``, ``value``: [B, N, H, d], or [B, N, D], which is split into the configured heads.
        The other arguments are those of ``neuroexapt.functional.hstu_hierarchical_attention``.
        """
        shape = value.shape
        if query.dim() == 3:
            query, key, value = (self._heads_of(x) for x in (query, key, value))

        def attend(
            query: Tensor, key: Tensor, value: Tensor, *times: Tensor, lengths: Tensor | None
        ) -> Tensor:
            return functional.hstu_hierarchical_attention(
                query,
                key,
                value,
                position_bias=position_bias,
                time_bias=time_bias,
                timestamps=times[0] if times else None,
                windows=windows,
                lengths=lengths,
            )

        times = () if timestamps is None else (timestamps,)
        return self._on_sequences(attend, attention_mask, query, key, value, *times).reshape(shape)

    def apply_sequence_recommendation_interaction(
        self,
        user_sequences: Tensor,
        candidate_items: Tensor,
        attention_mask: Tensor | None = None,
        *,
        timestamps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pools [B, 3, D] of histories [B, N, D] in view of candidates [B, D], and similarities [B, N].

        The latter are those of each item to the ones before it; both by a learned rate of decay with time.
        """
        decay = self.log_decay.exp().to(user_sequences.device)

        def pool(items: Tensor, *times: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
            return functional.sequence_recommendation_interaction(
                items, candidate_items, decay, timestamps=times[0] if times else None, lengths=lengths
            )

        times = () if timestamps is None else (timestamps,)
        if attention_mask is None:
            with self.in_charge():
                return pool(user_sequences, *times, lengths=None)
        packed, order, lengths = _packed(attention_mask, user_sequences, *times)
        with self.in_charge():
            pools, similarity = pool(*packed, lengths=lengths)
        return pools, _taken(similarity, order.argsort(dim=1))

    def apply_interaction_operator(self, features: Tensor) -> Tensor:
        """The first of a sample's vectors [B, F, D] and all products of two: [B, D + F · (F − 1) / 2]."""
        with self.in_charge():
            return functional.interaction_operator(features)

    def get_operator_availability(self) -> dict[str, bool]:
        """Which operators can run on kernels here; ``get_operator_reasons`` says why others cannot."""
        return {operator: not reason for operator, reason in self.get_operator_reasons().items()}

    def get_operator_reasons(self) -> dict[str, str]:
        """Why each operator does not run on kernels here; empty where it can."""
        return {operator: self._why_not(operator) for operator in OPERATORS}

    def get_operator_stats(self) -> dict[str, dict[str, Any]]:
        """By operator: ``enabled``, ``calls``, ``implementations`` that ran with counts, and ``fallbacks``.

        The last are calls whose kernel failed, as ``{reason: count}``; later ones do not try it.
        """
        return {
            operator: {
                "enabled": self.enabled[operator],
                "calls": self._implementations[operator].total(),
                "implementations": dict(self._implementations[operator]),
                "fallbacks": dict(self._fallbacks[operator]),
            }
            for operator in OPERATORS
        }

    def kernels_used(self) -> Counter[str]:
        """Calls that ran on kernels, by ``tier:operator``."""
        return Counter(
            {
                f"{implementation}:{operator}": count
                for operator, counts in self._implementations.items()
                for implementation, count in counts.items()
                if implementation != "torch"
            }
        )

    def retry_kernels(self) -> None:
        """Give kernels that failed another try, as after an update of the driver; their record stays."""
        self._failures.clear()

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Inside, operators follow the switches and are watched over, wherever they are called from."""
        with without_kernels(name for name in OPERATORS if self._why_off(name)), observed(self._run):
            yield

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Calls inside are no calls of the user's; failures are kept."""
        kept = {operator: Counter(counts) for operator, counts in self._implementations.items()}
        try:
            yield
        finally:
            self._implementations = kept

    def benchmark_all_operators(
        self, test_data: Mapping[str, Tensor] | None = None, num_iterations: int = 20
    ) -> dict[str, dict[str, Any]]:
        """Time each operator's forward pass, call by call until the device has finished, beside PyTorch's.

        Args:
            test_data: ``hidden_states`` [B, N, D], and if you like ``attention_mask`` [B, N],
                ``candidate_items`` [B, D] and ``features`` [B, F, D]; what is missing is made up.
            num_iterations: calls that are timed, at least 2.

        Returns:
            By operator ``status`` ("ok", or why there are no times), ``implementation``, ``max_error``
            against PyTorch's result, ``median_ms``, ``p20_ms``, ``p80_ms`` and ``reference_median_ms``.
        """
        if num_iterations < 2:
            raise UserError(f"num_iterations must be at least 2, not {num_iterations}")
        calls = self._sample_calls(test_data or {})
        was_training = self.training
        # A sample does not decide what the first input does: the weights' width, where they are, their dtype.
        own = self.d_model, self.attention_layernorm, self.sequence_fusion, self._are_placed
        self.attention_layernorm, self.sequence_fusion = copy.deepcopy(own[1:3])
        self.eval()
        try:
            with torch.no_grad():
                return {name: self._benchmark(name, call, num_iterations) for name, call in calls.items()}
        finally:
            self.d_model, self.attention_layernorm, self.sequence_fusion, self._are_placed = own
            self.train(was_training)

    def _on_sequences(
        self, run: Callable[..., Tensor], attention_mask: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        """``run(*tensors, lengths=…)`` on the valid positions of tensors [B, N, …]."""
        if attention_mask is None:
            with self.in_charge():
                return run(*tensors, lengths=None)
        packed, order, lengths = _packed(attention_mask, *tensors)
        with self.in_charge():
            result = run(*packed, lengths=lengths)
        return _taken(result, order.argsort(dim=1))

    def _run(self, decision: Decision, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """What the dispatch decided to call; an operator whose kernel fails, now or before, in PyTorch."""
        operator = decision.op
        if operator not in OPERATORS:
            return run(*args, **kwargs)
        implementation = "torch" if operator in self._failures else decision.impl
        try:
            result = registry.IMPLEMENTATIONS[operator, implementation].fn(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # a kernel fails to compile, to launch or to run, each in its own way
            if implementation == "torch":
                raise
            implementation = "torch"
            result = registry.IMPLEMENTATIONS[operator, "torch"].fn(*args, **kwargs)
            # Not before: where PyTorch fails as well, the kernel is not at fault.
            self._give_up(operator, in_one_line(error))
        self._implementations[operator][implementation] += 1
        return result

    def _give_up(self, operator: str, reason: str) -> None:
        """Run ``operator`` in PyTorch from now on: to try again could take a compilation at every call."""
        logger.warning("%s runs in plain PyTorch from now on, its kernel failed: %s", operator, reason)
        self._failures[operator] = reason
        self._fallbacks[operator][reason] += 1

    def _why_off(self, operator: str) -> str:
        """Why ``operator`` is not to run on kernels, wherever it is; empty where it is."""
        if not self.enabled[operator]:
            return f"enable_{operator} is off"
        if operator in self._failures:
            return f"its kernel failed: {self._failures[operator]}; retry_kernels gives it another try"
        return ""

    def _why_not(self, operator: str) -> str:
        if self._why_off(operator):
            return self._why_off(operator)
        backend = get_backend()
        if backend.device != "cuda":
            return f"the kernels need an NVIDIA GPU; the backend is {backend.value}"
        tiers, refusals = candidates(operator, torch.float32, 1)
        if any(tier != "torch" for tier, _ in tiers):
            return ""
        return "; ".join(refusals) or f"the backend {backend.value} has no kernels"

    def _make_weights(self, width: int) -> None:
        size = SequenceSize(width, max_length=0, heads=self.num_heads, dropout=self.dropout)  # of any length
        self.attention_layernorm = AttentionLayerNorm(size).train(self.training)
        self.sequence_fusion = HierarchicalFusion(size, _WINDOWS).train(self.training)

    def _operations_for(self, x: Tensor) -> tuple[AttentionLayerNorm, HierarchicalFusion]:
        """The operations with weights, for sequences like ``x``."""
        if x.dim() != 3 or not x.is_floating_point():
            raise UserError(
                f"sequences are [B, N, D] of floating-point numbers, not {[*x.shape]} of {x.dtype}"
            )
        if self.d_model is None:
            self._heads_of(x)
            self.d_model = x.shape[-1]
            self._make_weights(self.d_model)
        if x.shape[-1] != self.d_model:
            raise UserError(
                f"the operators have d_model {self.d_model}, the input has {x.shape[-1]} features"
            )
        assert self.attention_layernorm is not None
        assert self.sequence_fusion is not None
        if not self._are_placed:
            self.attention_layernorm.to(x)
            self.sequence_fusion.to(x)
            self._are_placed = True
        return self.attention_layernorm, self.sequence_fusion

    def _heads_of(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.num_heads:
            raise UserError(f"{x.shape[-1]} features cannot be split among {self.num_heads} heads")
        return x.unflatten(-1, (self.num_heads, -1))

    def _check_sizes(self) -> None:
        for name, value in (("d_model", self.d_model), ("num_heads", self.num_heads)):
            left_open = name == "d_model" and value is None
            if not left_open and (not isinstance(value, int) or value < 1):
                raise UserError(f"hstu: {name} must be an integer from 1 on, not {value!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UserError(f"hstu: dropout must be from 0 to below 1, not {self.dropout!r}")
        if self.d_model is not None and self.d_model % self.num_heads:
            raise UserError(f"hstu: d_model {self.d_model} cannot be split among {self.num_heads} heads")

    def _sample_calls(self, data: Mapping[str, Tensor]) -> dict[str, Callable[[], Any]]:
        """A call of every operator on ``data`` and what has to be made up beside it."""
        refuse_unknown(data, ("hidden_states", "attention_mask", "candidate_items", "features"), "test_data")
        x = data.get("hidden_states")
        if x is None:
            device = get_backend().torch_device
            x = torch.randn(*_MADE_UP_BATCH, self.d_model or 64, device=device)
        mask = data.get("attention_mask")
        candidate = data.get("candidate_items", x[:, -1])
        features = data.get("features")
        if features is None:
            features = x.new_empty(len(x), _MADE_UP_FIELDS, x.shape[-1]).normal_()
        return {
            "fused_attention_layernorm": lambda: self.apply_fused_attention_layernorm(x, mask),
            "hierarchical_sequence_fusion": lambda: self.apply_hierarchical_sequence_fusion(x, mask),
            "hstu_hierarchical_attention": lambda: self.apply_hstu_hierarchical_attention(x, x, x, mask),
            "sequence_recommendation_interaction": lambda: self.apply_sequence_recommendation_interaction(
                x, candidate, mask
            ),
            "interaction_operator": lambda: self.apply_interaction_operator(features),
        }

    def _benchmark(self, operator: str, call: Callable[[], Any], calls: int) -> dict[str, Any]:
        """Times of ``call``, as it runs here and in plain PyTorch, once both have agreed."""
        with self.uncounted():
            before = self._implementations[operator].copy()
            results = _tensors(call())
            if operator in self._failures:
                return {"status": self._why_off(operator), "implementation": "torch"}
            (implementation,) = self._implementations[operator] - before
            with without_kernels([operator]):
                expected = _tensors(call())
            error = max(_relative_error(*pair) for pair in zip(results, expected, strict=True))
            found: dict[str, Any] = {"implementation": implementation, "max_error": error}
            if not error <= _TOLERANCES.get(results[0].dtype, 1e-6):
                return {**found, "status": f"differs from PyTorch by {error:.1e}"}
            device, exactly = results[0].device, (calls, calls)
            timing = time_calls(call, device, 0, exactly)
            with without_kernels([operator]):
                reference = time_calls(call, device, 0, exactly)
        return {
            **found,
            "status": "ok",
            "median_ms": timing.median_ms,
            "p20_ms": timing.p20_ms,
            "p80_ms": timing.p80_ms,
            "reference_median_ms": reference.median_ms,
        }


def create_triton_operator_manager(config: Mapping[str, Any]) -> TritonOperatorManager:
    """A manager for a configuration with these sections, all optional.

    ``triton_operators``, also inside ``optimizations``: ``{enable_<operator>: bool}``, on where not given.
    ``hstu``: ``{d_model, num_heads, dropout}``. The controller's sections are left to it.

    Raises:
        UserError: a key is unknown, and the message names the closest; or a value makes no sense.
    """
    return TritonOperatorManager(config)


def _of_lengths(operation: SequenceOperation) -> Callable[..., Tensor]:
    def run(x: Tensor, lengths: Tensor | None) -> Tensor:
        return operation(x, None if lengths is None else Places(lengths, None))

    return run


def _packed(mask: Tensor, *tensors: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Tensors [B, N, …] with valid positions at the front, the order [B, N] that brings them there, and how
    many there are, [B]. Zeros follow: a NaN there would reach gradients of weights.
    """
    shape = tensors[0].shape[:2]
    if mask.shape != shape:
        raise UserError(f"attention_mask must be {[*shape]}, a value a position, not {[*mask.shape]}")
    is_padding = mask == 0
    order = is_padding.to(torch.int8).argsort(dim=1, stable=True)
    packed = [_taken(x.masked_fill(_like(is_padding, x), 0), order) for x in tensors]
    return packed, order, (~is_padding).sum(dim=1)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """x [B, N, …] with the positions of each row in this order."""
    return x.gather(1, _like(order, x))


def _like(of_positions: Tensor, x: Tensor) -> Tensor:
    """[B, N] as the shape of x [B, N, …]."""
    return of_positions.reshape(*of_positions.shape, *[1] * (x.dim() - 2)).expand_as(x)


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _relative_error(result: Tensor, expected: Tensor) -> float:
    difference = (result.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1))
