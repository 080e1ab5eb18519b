from __future__ import annotations

from tests.contract.apps.django_app import _urls

urlpatterns = _urls(asynchronous=True)
