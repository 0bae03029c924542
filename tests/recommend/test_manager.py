"""On the CPU all operators run in plain PyTorch; kernels that fail or give wrong results are made up."""

import pytest
import torch

from neuroexapt import functional
from neuroexapt.errors import UserError
from neuroexapt.recommend import create_triton_operator_manager
from neuroexapt.recommend.config import OPERATORS

B, N, D = 3, 5, 8
SEQUENCE_OPERATORS = OPERATORS[:3]


def make_manager(**config):
    torch.manual_seed(0)
    return create_triton_operator_manager({"hstu": {"num_heads": 2}, **config}).eval()


def apply(manager, operator: str, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    torch.manual_seed(1)
    method = getattr(manager, f"apply_{operator}")
    return method(x, x, x, mask) if operator == "hstu_hierarchical_attention" else method(x, mask)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("operator", SEQUENCE_OPERATORS)
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_the_valid_positions_are_the_sequence_wherever_they_lie(operator, side, x):
    places = {"right": [0, 1, 2], "left": [2, 3, 4], "scattered": [0, 2, 3]}[side]
    mask = torch.zeros(B, N, dtype=torch.int64)
    mask[:, places] = 1
    padded = torch.full_like(x, torch.nan)
    padded[:, places] = x[:, :3]
    manager = make_manager()
    # HSTU divides by the longest length, which padding is part of.
    full_length = torch.cat([x[:, :3], torch.zeros(B, 2, D)], dim=1)
    expected = apply(manager, operator, full_length, torch.arange(N).lt(3).expand(B, N))
    found = apply(manager, operator, padded, mask)
    found.sum().backward() if found.requires_grad else None
    assert all(w.grad is None or w.grad.isfinite().all() for w in manager.parameters())
    torch.testing.assert_close(found[:, places], expected[:, :3])
    assert found.isfinite().all()
    assert not found[mask == 0].any()


def test_interaction_of_sequences_takes_masks_and_times(x):
    manager = make_manager()
    times = torch.tensor([[0, 1, 5]]).expand(B, 3)
    pools, similarity = manager.apply_sequence_recommendation_interaction(x[:, :3], x[:, 0], timestamps=times)
    left = torch.full_like(x, torch.nan)
    left[:, 2:] = x[:, :3]
    left_times = torch.zeros(B, N, dtype=torch.int64)
    left_times[:, 2:] = times
    mask = torch.tensor([0, 0, 1, 1, 1]).expand(B, N)
    found = manager.apply_sequence_recommendation_interaction(left, x[:, 0], mask, timestamps=left_times)
    torch.testing.assert_close(found[0], pools)
    torch.testing.assert_close(found[1], torch.cat([torch.zeros(B, 2), similarity], dim=1))


def test_interaction_of_fields(x):
    expected = functional.interaction_operator(x)
    torch.testing.assert_close(make_manager().apply_interaction_operator(x), expected)


def test_hstu_passes_biases_times_and_windows_on(x):
    query = x.unflatten(-1, (2, 4))
    tables = {"position_bias": torch.randn(2 * N - 1), "time_bias": torch.randn(4)}
    times = torch.arange(N).expand(B, N) ** 3
    options = {**tables, "timestamps": times, "windows": (None, 2)}
    found = make_manager().apply_hstu_hierarchical_attention(x, x, x, **options)
    expected = functional.hstu_hierarchical_attention(query, query, query, **options)
    torch.testing.assert_close(found, expected.flatten(-2))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"triton_operators": {"enable_hstu_hierarchical_atention": True}},
            "did you mean 'enable_hstu_hierarchical_attention'?",
        ),
        ({"triton_operator": {}}, "config has no key 'triton_operator'; did you mean 'triton_operators'?"),
        ({"triton_operators": {"enable_interaction_operator": 1}}, "must be True or False, not 1"),
        ({"triton_operators": ["enable_interaction_operator"]}, "must be a mapping"),
        ({"optimizations": {"xyz": 1}}, "has no key 'xyz'; it takes triton_operators"),
        ({"triton_operators": {}, "optimizations": {"triton_operators": {}}}, "given twice"),
        ({"hstu": {"d_modell": 8}}, "did you mean 'd_model'?"),
        ({"hstu": {"d_model": 9, "num_heads": 2}}, "d_model 9 cannot be split among 2 heads"),
        ({"hstu": {"d_model": 0}}, "d_model must be an integer from 1 on"),
        ({"hstu": {"num_heads": None}}, "num_heads must be an integer from 1 on"),
        ({"hstu": {"dropout": 1.0}}, "dropout must be from 0 to below 1"),
        (None, "config must be a mapping, not None"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(config, reason):
    with pytest.raises(UserError, match=reason):
        create_triton_operator_manager(config)


def test_an_input_that_is_refused_does_not_decide_about_the_width(x):
    manager = make_manager()
    with pytest.raises(UserError, match="9 features cannot be split among 2 heads"):
        manager.apply_fused_attention_layernorm(torch.zeros(B, N, 9))
    assert manager.apply_fused_attention_layernorm(x).shape == x.shape


@pytest.mark.parametrize("nested", [False, True])
def test_switches(nested):
    section = {"triton_operators": {"enable_interaction_operator": False}}
    manager = create_triton_operator_manager({"optimizations": section} if nested else section)
    assert [name for name, on in manager.enabled.items() if not on] == ["interaction_operator"]
    assert manager.get_operator_reasons()["interaction_operator"] == "enable_interaction_operator is off"


def test_availability_has_reasons():
    manager = make_manager()
    assert [*manager.get_operator_availability()] == [*OPERATORS]
    for operator, available in manager.get_operator_availability().items():
        assert available != bool(manager.get_operator_reasons()[operator])


def test_inputs_that_do_not_fit_are_refused(x):
    manager = make_manager(hstu={"d_model": D, "num_heads": 2})
    with pytest.raises(UserError, match="the operators have d_model 8, the input has 6 features"):
        manager.apply_hierarchical_sequence_fusion(x[..., :6])
    with pytest.raises(UserError, match=r"sequences are \[B, N, D\] of floating-point numbers, not \[5, 8\]"):
        manager.apply_hierarchical_sequence_fusion(x[0])
    with pytest.raises(UserError, match=r"not \[3, 5, 8\] of torch.int64"):
        manager.apply_fused_attention_layernorm(x.long())
    with pytest.raises(UserError, match="test_data must be a mapping"):
        manager.benchmark_all_operators([x])
    with pytest.raises(UserError, match=r"attention_mask must be \[3, 5\]"):
        manager.apply_hierarchical_sequence_fusion(x, torch.ones(B, N + 1))
    with pytest.raises(UserError, match="9 features cannot be split among 2 heads"):
        manager.apply_hstu_hierarchical_attention(*[torch.zeros(B, N, 9)] * 3)


def _failing(*args, **kwargs):
    raise RuntimeError("out of shared memory\nin line 7")


REASON = "RuntimeError: out of shared memory … in line 7"


def test_a_kernel_that_fails_gives_way_to_pytorch_and_is_recorded(x, kernel_on_cpu):
    expected = functional.interaction_operator(x)
    kernel_on_cpu("interaction_operator", _failing)
    manager = make_manager()
    torch.testing.assert_close(manager.apply_interaction_operator(x), expected)
    assert manager.get_operator_stats()["interaction_operator"] == {
        "enabled": True,
        "calls": 1,
        "implementations": {"torch": 1},
        "fallbacks": {REASON: 1},
    }


def test_a_kernel_that_failed_is_tried_again_only_when_asked_to(x, kernel_on_cpu):
    tries = []

    def fragile(dense, fields=None):
        tries.append(None)
        return _failing() if len(tries) == 1 else dense

    kernel_on_cpu("interaction_operator", fragile)
    manager = make_manager()
    for _ in range(3):
        manager.apply_interaction_operator(x)
    assert len(tries) == 1
    assert not manager.get_operator_availability()["interaction_operator"]
    assert manager.get_operator_reasons()["interaction_operator"].startswith(f"its kernel failed: {REASON}")
    manager.retry_kernels()
    assert manager.apply_interaction_operator(x) is x
    stats = manager.get_operator_stats()["interaction_operator"]
    assert (stats["implementations"], stats["fallbacks"]) == ({"torch": 3, "triton": 1}, {REASON: 1})


def test_a_kernel_is_not_given_up_for_an_input_that_pytorch_fails_on_too(x, kernel_on_cpu):
    kernel_on_cpu("interaction_operator", _failing)
    manager = make_manager()
    with pytest.raises(RuntimeError, match="not implemented for 'Bool'"):
        manager.apply_interaction_operator(x > 0)
    assert manager.get_operator_stats()["interaction_operator"]["fallbacks"] == {}
    assert "failed" not in manager.get_operator_reasons()["interaction_operator"]


def test_an_operator_that_is_switched_off_never_tries_its_kernel(x, kernel_on_cpu):
    kernel_on_cpu("interaction_operator", _failing)
    manager = make_manager(triton_operators={"enable_interaction_operator": False})
    manager.apply_interaction_operator(x)
    stats = manager.get_operator_stats()["interaction_operator"]
    assert (stats["implementations"], stats["fallbacks"]) == ({"torch": 1}, {})


def test_which_implementation_ran_is_counted(x, kernel_on_cpu):
    kernel_on_cpu("interaction_operator", lambda dense, fields=None: dense)
    manager = make_manager()
    assert manager.apply_interaction_operator(x) is x
    assert manager.get_operator_stats()["interaction_operator"]["implementations"] == {"triton": 1}


def test_a_mistake_of_the_caller_is_no_fallback(x):
    manager = make_manager()
    with pytest.raises(UserError):
        manager.apply_interaction_operator(x[0])
    assert manager.get_operator_stats()["interaction_operator"]["calls"] == 0


def test_benchmark_times_every_operator_and_leaves_the_statistics_alone(x):
    manager = make_manager().train()
    found = manager.benchmark_all_operators({"hidden_states": x, "attention_mask": torch.ones(B, N)}, 3)
    assert [*found] == [*OPERATORS]
    for row in found.values():
        assert (row["status"], row["implementation"], row["max_error"]) == ("ok", "torch", 0)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["reference_median_ms"] > 0
    assert manager.training
    assert all(stats["calls"] == 0 for stats in manager.get_operator_stats().values())
    with pytest.raises(UserError, match="test_data has no key 'hidden_state'; did you mean 'hidden_states'"):
        manager.benchmark_all_operators({"hidden_state": x})


@pytest.mark.parametrize("width", [None, D])
def test_benchmark_decides_nothing_about_the_weights(width, x):
    manager = make_manager(hstu={"num_heads": 2, "d_model": width})
    before = [weight.clone() for weight in manager.parameters()]
    for data in ({}, {"hidden_states": x.half()}):
        manager.benchmark_all_operators(data, 2)
    assert manager.d_model == width
    assert all(torch.equal(a, b) for a, b in zip(before, manager.parameters(), strict=True))
    assert apply(manager, "hierarchical_sequence_fusion", x, None).dtype == torch.float32
    assert manager.d_model == D


def test_benchmark_gives_no_time_to_a_kernel_that_is_wrong(x, kernel_on_cpu):
    kernel_on_cpu("interaction_operator", lambda dense, fields=None: dense.new_zeros(B, D + N * (N - 1) // 2))
    row = make_manager().benchmark_all_operators({"hidden_states": x, "features": x}, 2)[
        "interaction_operator"
    ]
    assert row["status"].startswith("differs from PyTorch by")
    assert "median_ms" not in row


def test_benchmark_tells_that_a_kernel_failed(x, kernel_on_cpu):
    kernel_on_cpu("interaction_operator", _failing)
    found = make_manager().benchmark_all_operators({"hidden_states": x, "features": x}, 2)
    assert found["interaction_operator"]["status"].startswith(f"its kernel failed: {REASON}")
    assert found["hierarchical_sequence_fusion"]["status"] == "ok"


def test_weights_are_made_once_and_learn(x):
    manager = make_manager(hstu={"num_heads": 2, "dropout": 0.5})
    first = manager.apply_fused_attention_layernorm(x)
    torch.testing.assert_close(manager.apply_fused_attention_layernorm(x), first)
    first.sum().backward()
    assert manager.attention_layernorm.project_in.weight.grad is not None
    assert not torch.equal(manager.train().apply_fused_attention_layernorm(x), first)


def test_a_configured_width_makes_the_weights_at_once(x):
    """So optimizers find them, and a state can be loaded; the first input still decides about the dtype."""
    sizes = {"d_model": D, "num_heads": 2}
    manager, other = make_manager(hstu=sizes), create_triton_operator_manager({"hstu": sizes})
    weights = dict(manager.named_parameters())
    assert {name.partition(".")[0] for name in weights} == {
        "log_decay",
        "attention_layernorm",
        "sequence_fusion",
    }
    other.load_state_dict(manager.state_dict())
    for operator in SEQUENCE_OPERATORS[:2]:
        torch.testing.assert_close(apply(other.eval(), operator, x), apply(manager, operator, x))
    doubled = make_manager(hstu=sizes)
    parameter = doubled.sequence_fusion.gate.weight
    assert doubled.apply_hierarchical_sequence_fusion(x.double()).dtype == torch.float64
    assert doubled.sequence_fusion.gate.weight is parameter


@pytest.mark.parametrize("operator", SEQUENCE_OPERATORS[:2])
@pytest.mark.parametrize("sizes", [{}, {"d_model": D}], ids=["first-input", "configured"])
def test_nothing_is_dropped_in_evaluation(operator, sizes, x):
    manager = make_manager(hstu={"dropout": 0.5, **sizes})
    first = apply(manager, operator, x)
    torch.manual_seed(5)
    assert torch.equal(getattr(manager, f"apply_{operator}")(x), first)
