import pytest
import torch

from neuroexapt.backend import registry
from neuroexapt.backend.registry import Backend, Support


@pytest.fixture
def kernel_on_cpu(monkeypatch):
    """Let the dispatch think that these tensors are on a GPU whose Triton kernel is ``run``."""

    def install(operator: str, run) -> None:
        from neuroexapt.backend import candidates, dispatch

        monkeypatch.setattr(registry, "IMPLEMENTATIONS", dict(registry.IMPLEMENTATIONS))
        registry.register_impl(operator, "triton", run, lambda *args, **kwargs: Support(True))
        monkeypatch.setattr(registry, "get_backend", lambda: Backend("cuda", "triton", True, ""))
        monkeypatch.setattr(registry, "probe_tier", lambda tier: "")
        monkeypatch.setattr(candidates, "implements", lambda op, tier: (op, tier) in registry.IMPLEMENTATIONS)
        real = dispatch.explain

        def explain(op, *args, **kwargs):
            tiers, refusals = candidates.candidates(op, torch.float32, 1)
            if op == operator and tiers:
                return dispatch.Decision(op, "triton", "as if on a GPU")
            return dispatch.Decision(op, "torch", "; ".join(refusals)) if op == operator else real(op, *args)

        monkeypatch.setattr(dispatch, "explain", explain)

    return install
