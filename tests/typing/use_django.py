"""Type-checked, never run: what a Django project writes."""

from __future__ import annotations

from typing import assert_type

from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse

from opsguard import OpsGuard
from opsguard_django import OpsGuardMiddleware, install, ops

assert_type(ops, OpsGuard)

application = install(get_wsgi_application())
asgi_application = install(get_asgi_application(), ops)


def view(request: HttpRequest) -> JsonResponse:
    ops.bind(tenant_id="t1")
    return JsonResponse({"request": ops.request_id})


middleware = OpsGuardMiddleware(view)
