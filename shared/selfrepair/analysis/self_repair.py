"""What self-repair is, of effects of ablated heads (Rushing & Nanda 2024, §2)."""

from __future__ import annotations

import xarray as xr


def with_self_repair(sweep: xr.Dataset) -> xr.Dataset:
    """Adds ``self_repair = logit_change − (ablated_direct_effect − direct_effect)``, and ``…_layernorm``."""
    repair = sweep.logit_change - (sweep.ablated_direct_effect - sweep.direct_effect)
    layernorm = repair - sweep.self_repair_heads - sweep.self_repair_mlps
    return sweep.assign(self_repair=repair, self_repair_layernorm=layernorm)
