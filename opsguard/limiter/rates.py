"""The rates, as this room calls them; they live where the settings can check them, too."""

from __future__ import annotations

from opsguard.rates import OnStoreError, Rate, Strategy, parse_rates

__all__ = ["OnStoreError", "Rate", "Strategy", "parse_rates"]
