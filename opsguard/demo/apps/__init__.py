"""The demo's shop, once for each framework: how opsguard is installed, and how it is used."""

from __future__ import annotations
